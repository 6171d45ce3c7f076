"""Tokens per second and MFU of step 17, by size: python tests/benchmarks/gpt2_speed.py

--nanogpt DIR compares with nanoGPT's train.py on the same sizes, batches and tokens. --processes N
also runs under torchrun and prints the scaling efficiency: tokens per second of N processes over N
times those of one; on a CPU every process has its share of the cores, one alone as well. Speeds are
those of the second half of a run without evaluation and checkpoints; medians of --repeat runs that
take turns. MFU is the fraction of the device's peak; on a CPU, of the speed at which it multiplies
large matrices.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from table import row

SCRIPT = Path(__file__).resolve().parents[2] / "17_gpt2_multigpu" / "train.py"
NAMES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
SIZES = {
    "cpu": {
        "mini": (4, 4, 128, 64, 12),
        "small": (6, 6, 384, 256, 4),
        "124M": (12, 12, 768, 256, 4),
    },
    "cuda": {f"124M-{batch}": (12, 12, 768, 1024, batch) for batch in (8, 16, 32, 64)}
    | {"350M": (24, 16, 1024, 1024, 16), "774M": (36, 20, 1280, 1024, 8)},
}


def matmul_tflops(dtype):
    """Return the TFLOP/s of this CPU in a product of two large matrices."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_float32_matmul_precision("high")
    a = torch.randn(2048, 2048, dtype=dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e12


def ours(args, folder, size, *flags, processes=1):
    """Return the last record of a run: tokens_per_second, memory_gib and mfu."""
    batch = size[3] * size[4] * processes
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(SCRIPT), "--data_dir", str(folder / "data"), "--out_dir", str(folder / "out")]
    command += [f"--{name}={value}" for name, value in zip(NAMES, size)]
    command += [f"--total_batch_tokens={batch}", f"--max_iters={args.iters}", "--no-bias"]
    command += [f"--eval_interval={args.iters // 2}", "--max_new_tokens=0", *flags]
    command += [f"--device={args.device}", "--overwrite"]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])


def nanogpt(args, folder, size):
    """Return {"tokens_per_second": that of the median iteration of the second half}."""
    command = [sys.executable, "train.py", "--dataset=openwebtext", f"--device={args.device}"]
    command += [f"--{name}={value}" for name, value in zip(NAMES, size)]
    command += [f"--max_iters={args.iters}", "--gradient_accumulation_steps=1", "--eval_iters=1"]
    if args.device == "cpu":  # where it knows float32 alone
        command += ["--compile=False", "--dtype=float32"]
    result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    times = [float(ms) for ms in re.findall(r"time ([0-9.]+)ms", result.stdout)]
    median = statistics.median(times[args.iters // 2 :])
    return {"tokens_per_second": size[3] * size[4] / median * 1000}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a copy of nanoGPT")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--sizes", nargs="+", help="of " + ", ".join(SIZES["cpu"] | SIZES["cuda"]))
    parser.add_argument("--processes", type=int, default=1, help="to compare with one")
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.processes))
    sizes = {name: SIZES[args.device][name] for name in args.sizes or SIZES[args.device]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data" / "openwebtext"
        data.mkdir(parents=True)
        for split, n in (("train", 1_000_000), ("val", 2100)):
            ids = np.random.default_rng(0).integers(50257, size=n)
            ids.astype(np.uint16).tofile(data / f"{split}.bin")
        runs = {"bfloat16": lambda size, *flags: ours(args, folder, size, *flags)}
        runs["float32"] = runs["bfloat16"]
        if args.processes > 1:
            runs["processes"] = lambda *size_flags: ours(
                args, folder, *size_flags, processes=args.processes
            )
        if args.nanogpt:
            for file in ("train.py", "model.py", "configurator.py"):
                shutil.copy(args.nanogpt / file, folder)
            runs["nanoGPT"] = lambda size, *flags: nanogpt(args, folder, size)
        for name, size in sizes.items():
            found = {run: [] for run in runs}
            for _ in range(args.repeat):
                for run, measure in runs.items():
                    dtype = "float32" if run == "float32" else "bfloat16"
                    flags = [f"--dtype={dtype}"]
                    if args.device == "cpu":
                        flags += [f"--peak_tflops={matmul_tflops(getattr(torch, dtype))}"]
                    found[run].append(measure(size, *flags))
            speeds = {
                run: statistics.median(record["tokens_per_second"] for record in records)
                for run, records in found.items()
            }
            for run, speed in speeds.items():
                line = f"{name:10} {run:12} {speed:9.0f} tokens/s"
                if args.nanogpt:
                    line += f"  {speed / speeds['nanoGPT']:5.2f} x nanoGPT"
                last = found[run][-1]
                if "mfu" in last:
                    line += f"  MFU {last['mfu']:.0%}  {last['memory_gib']:.1f} GiB"
                if run == "processes":
                    line += f"  efficiency {speed / speeds['bfloat16'] / args.processes:.0%}"
                print(line, flush=True)
            for run in ("float32", "bfloat16") if args.nanogpt else ():
                row(f"GPT {name}, {run}: tokens/s, nanoGPT's", speeds[run], speeds["nanoGPT"])


if __name__ == "__main__":
    main()
