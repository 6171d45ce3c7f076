"""What each optimization of step 14 gains.

    python tests/benchmarks/resnet_measures.py [--rounds 3]

The same small residual network trains on the same digits; the optimizations are switched on one
after the other. Images/s are medians over the rounds, in which the variants take turns. --data_dir
needs MNIST, or stand-ins from tests/standins.py.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import optax
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from steps import load_step
from table import row

step_10, step_14 = load_step("10"), load_step("14")
MEASURES = [  # each line keeps what the lines above it switched on
    ("step 10: float32, DataLoader, optax", {}),
    ("first convolution with stride 2", {"stride": True}),
    ("data and augmentation on the device", {"on_device": True}),
    ("fused SGD in place of the optax bridge", {"fused": True}),
    ("channels-last memory format", {"channels_last": True}),
    ("bfloat16", {"bfloat16": True}),
    ("batches of 256", {"batch_size": 256}),
    ("no synchronization per iteration", {"no_sync": True}),
    ("torch.compile (compilation not counted)", {"compile": True}),
]


def variant(bench, on):
    """Return images/s of one variant: training iterations of bench.seconds, after a warm-up."""
    size = on.get("batch_size", 128)
    args = step_14.parse_args(["--batch_size", str(size), "--data_dir", str(bench.data_dir)])
    args.dtype = "bfloat16" if on.get("bfloat16") else "float32"
    device = step_14.setup_device(args)
    torch.manual_seed(0)
    model = (step_14 if on.get("stride") else step_10).ResNet(16, 1, 10).to(device)
    if on.get("on_device"):
        train_set = step_14.load_data(args, device)[0]
        pixels = train_set.tensors[0] / 255
        batches = step_14.minibatches(args, train_set, (pixels.mean(), pixels.std()))
    else:
        plain = step_10.minibatches(step_10.load_data(args)[0], size)
        batches = ((step_10.augment(x, 2), y) for x, y in plain)
    if on.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    if on.get("fused"):
        optimizer = step_14.make_optimizer(args, model)
        optimizer.param_groups[0]["lr"] = 0.01
    else:
        optimizer = step_10.OptaxOptimizer(model.parameters(), optax.adam(1e-3))
    network = torch.compile(model) if on.get("compile") else model

    def iterate():
        x, y = next(batches)
        with step_14.autocast(args):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y)
        if not on.get("no_sync"):
            loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(5):
        iterate()
    n_iters, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < bench.seconds:
        for _ in range(16):
            iterate()
        n_iters += 16
    return n_iters * size / (time.perf_counter() - begin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the median counts")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("DATA_DIR", "data"))
    bench = parser.parse_args()
    if torch.cuda.is_available():
        sys.exit("optax shares memory on the CPU only: hide the GPU with CUDA_VISIBLE_DEVICES=")
    measures = MEASURES if bench.compile else MEASURES[:-1]
    speeds = {name: [] for name, _ in measures}
    for _ in range(bench.rounds):
        on = {}
        for name, switch in measures:
            on |= switch
            speeds[name].append(variant(bench, on))
    medians = [statistics.median(speeds[name]) for name, _ in measures]
    print(f"{'optimization':42s} {'gain':>6s} {'total':>7s} {'images/s':>9s}")
    for i, (name, _) in enumerate(measures):
        gain, total = medians[i] / medians[max(0, i - 1)], medians[i] / medians[0]
        print(f"{name:42s} {gain:5.2f}x {total:6.2f}x {medians[i]:9.0f}")
    row("images/s in training, all optimizations and none", medians[-1], medians[0])
