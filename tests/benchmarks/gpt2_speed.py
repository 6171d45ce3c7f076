"""Tokens a second of step 17 on this machine's CPU: python tests/benchmarks/gpt2_speed.py

--nanogpt DIR puts nanoGPT's train.py beside it, on the same sizes and batches. --processes 2 starts
torchrun and prints the scaling efficiency. Medians of --repeat runs.
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
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "17_gpt2_multigpu" / "train.py"
# n_layer, n_head, n_embd, block_size, batch_size
SIZES = {"mini": (4, 4, 128, 64, 12), "small": (6, 6, 384, 256, 4), "124M": (12, 12, 768, 256, 4)}
NAMES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")


def ours(folder, size, processes, *flags):
    """Return the tokens a second of nine iterations' last three."""
    batch = SIZES[size][3] * SIZES[size][4] * processes
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(SCRIPT), "--data_dir", str(folder), "--out_dir", str(folder / "out")]
    command += [f"--{name}={value}" for name, value in zip(NAMES, SIZES[size])]
    command += f"--total_batch_tokens {batch} --max_iters 9 --eval_interval 3".split()
    command += ["--max_new_tokens=0", "--no-bias", "--device=cpu", *flags]
    subprocess.run(command, check=True, capture_output=True)
    last = (folder / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["tokens_per_second"]


def nanogpt(folder, size):
    """Return the tokens a second of nanoGPT's train.py, by its median iteration after three."""
    command = [sys.executable, "train.py", "--dataset=openwebtext", "--device=cpu"]
    command += [f"--{name}={value}" for name, value in zip(NAMES, SIZES[size])]
    command += "--gradient_accumulation_steps=1 --max_iters=9 --eval_iters=1".split()
    command += "--eval_interval=1000 --compile=False --dtype=float32".split()
    result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    times = [float(ms) for ms in re.findall(r"time ([0-9.]+)ms", result.stdout)][3:]
    return SIZES[size][3] * SIZES[size][4] / statistics.median(times) * 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a copy of nanoGPT")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["mini", "small"])
    parser.add_argument("--processes", type=int, default=1, help="to compare with one")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.processes)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data" / "openwebtext"
        data.mkdir(parents=True)
        for split, n in (("train", 200_000), ("val", 2100)):
            ids = np.random.default_rng(0).integers(50257, size=n)
            ids.astype(np.uint16).tofile(data / f"{split}.bin")
        (folder / "openwebtext").symlink_to(data)
        runs = {
            "float32": lambda size: ours(folder, size, 1, "--dtype=float32"),
            "as chosen": lambda size: ours(folder, size, 1),
        }
        if args.processes > 1:
            runs["processes"] = lambda size: ours(folder, size, args.processes)
        if args.nanogpt:
            for file in ("train.py", "model.py", "configurator.py"):
                shutil.copy(args.nanogpt / file, folder)
            runs["nanoGPT"] = lambda size: nanogpt(folder, size)
        for size in args.sizes:
            found = {run: [] for run in runs}
            for _ in range(args.repeat):
                for run, speed in runs.items():
                    found[run].append(speed(size))
            found = {run: statistics.median(speeds) for run, speeds in found.items()}
            for run, speed in found.items():
                ratio = ""
                if args.nanogpt:
                    ratio = f"{speed / found['nanoGPT']:5.2f} x nanoGPT"
                if run == "processes":
                    share = speed / found["as chosen"] / args.processes
                    ratio += f"  efficiency {share:.0%} of {args.processes} processes"
                print(f"{size:6} {run:10} {speed:9.0f} tokens/s  {ratio}", flush=True)


if __name__ == "__main__":
    main()
