"""Achieved FLOP/s of steps 13, 14, 16 and 17 against the machine's peak, and where the time goes.

    python tests/benchmarks/flops.py [--only 13 14]

torch counts the floating-point operations of matrix products and convolutions in a run; what is
counted and timed is the difference between a short and a longer run, so that neither loading nor
evaluation enters. The peak is the speed of the product of two matrices of 2048 x 2048 in the step's
dtype, on the same threads. The slowest operations are those of torch's profiler. MNIST and tiny
Shakespeare come from $DATA_DIR; step 17 trains on random tokens.
"""

import argparse
import collections
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from steps import load_step


def peak_flops(dtype):
    """Return the FLOP/s of the product of two large matrices."""
    a = torch.randn(2048, 2048, dtype=dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def run(step, flags, n):
    """Train for n iterations; return the arguments and the seconds that it took."""
    args = step.parse_args([*flags, "--max_iters", str(n)])
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        step.train(args)
    return args, time.perf_counter() - start


def measure(name, folder, iters):
    """Return the dtype, the FLOP and seconds per iteration, and the slowest operations' shares."""
    step = load_step(name)
    flags = ["--eval_interval", "1000000", "--out_dir", str(folder / name)]
    if name != "13":
        flags += ["--device", "cpu"]
    if name in ("16", "17"):
        flags += ["--max_new_tokens", "0", "--overwrite"]
    if name == "17":
        flags += ["--data_dir", str(folder)]
    counts = []
    for n in (2, 4):
        with FlopCounterMode(display=False) as counter:
            args, _ = run(step, flags, n)
        counts.append(counter.get_total_flops())
    flops = (counts[1] - counts[0]) / 2
    seconds = (run(step, flags, iters + 2)[1] - run(step, flags, 2)[1]) / iters
    cpu_time = collections.Counter()
    for n, sign in ((2, -1), (iters + 2, 1)):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run(step, flags, n)
        for event in profiled.key_averages():
            cpu_time[event.key.removeprefix("aten::")] += sign * event.self_cpu_time_total
    total = sum(cpu_time.values())
    slowest = ", ".join(f"{key} {t / total:.0%}" for key, t in cpu_time.most_common(8))
    return getattr(args, "dtype", "float32"), flops, seconds, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["13", "14", "16", "17"], help="steps")
    parser.add_argument("--iters", type=int, default=40, help="iterations that are timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "openwebtext").mkdir()
        for name, n_tokens in (("train", 300_000), ("val", 3_000)):
            tokens = np.random.default_rng(0).integers(50257, size=n_tokens).astype(np.uint16)
            tokens.tofile(folder / "openwebtext" / f"{name}.bin")
        print("| step | GFLOP per iteration | ms | GFLOP/s | peak | ratio | slowest operations |")
        print("|---|---|---|---|---|---|---|")
        for name in args.only:
            dtype, flops, seconds, slowest = measure(name, folder, args.iters)
            speed, peak = flops / seconds, peak_flops(getattr(torch, dtype))
            values = f"{flops / 1e9:.2f} | {seconds * 1e3:.1f} | {speed / 1e9:.0f}"
            values += f" | {peak / 1e9:.0f} | {speed / peak:.2f}"
            print(f"| {name} ({dtype}) | {values} | {slowest} |", flush=True)


if __name__ == "__main__":
    main()
