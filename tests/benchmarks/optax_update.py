"""Time of one Adam update through step 08's optax bridge, beside torch.optim.Adam's.

python tests/benchmarks/optax_update.py [--repeats 9]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import optax
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from steps import load_step
from table import row


def milliseconds(step, n=20):
    """Return the time of one call, averaged over n."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    return 1000 * (time.perf_counter() - start) / n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=9, help="repetitions, of which the median counts"
    )
    repeats = parser.parse_args().repeats
    step_08 = load_step("08")
    args = step_08.parse_args([])
    optimizers = {}
    for name in ("optax", "torch", "torch, fused"):
        model = step_08.MLP(28 * 28, args.n_hidden, args.n_layer, 10)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if name == "optax":
            optimizers[name] = step_08.OptaxOptimizer(model.parameters(), optax.adam(1e-3))
        else:
            fused = name.endswith("fused")
            optimizers[name] = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    times = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        milliseconds(optimizer.step)  # compilation and first allocations
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            times[name].append(milliseconds(optimizer.step))
    ours = statistics.median(times["optax"])
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {torch.get_num_threads()} threads")
    print(f"{'optimizer':14}{'ratio':>8}{'ms / update':>14}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:14}{median / ours:>8.2f}{median:>14.2f}")
    row("ms per update, optax and torch.optim.Adam", ours, statistics.median(times["torch"]))


if __name__ == "__main__":
    main()
