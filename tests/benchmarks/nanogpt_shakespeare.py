"""Step 16 beside nanoGPT: python tests/benchmarks/nanogpt_shakespeare.py --nanogpt DIR

DIR is a checkout of github.com/karpathy/nanoGPT; it is copied, not written to. For every seed
nanoGPT's README recipe (on a CPU its CPU recipe) is run, then the --parts of step 16, each in a
process of its own with its start-up counted:

default  no flags
quarter  the same, but shorter (--quarter_flags): as good as nanoGPT in a quarter of its time?
adamw    --optimizer adamw, nanoGPT's own recipe
sample   ten samples of 500 characters, by nanoGPT and by the default run

nanoGPT's checkpoint is evaluated like step 16: over the whole validation text, each character once.
--work_dir keeps the results, so that seeds can be run one at a time; the tables cover all of them.
"""

import argparse
import json
import os
import pickle
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
import torch.nn.functional as F
from table import row

STEP = Path(__file__).resolve().parents[2] / "16_nanogpt_shakespeare"
CPU = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
CPU += " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
CPU += " --lr_decay_iters=2000 --dropout=0.0 --dtype=float32"
QUARTER = "--max_iters 250"


def run(command, folder):
    """Run a command in a folder; return its wall time in seconds and its output."""
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - start, result.stdout


def prepare(args, folder):
    """Copy nanoGPT into folder and write its data files there."""
    folder.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(args.nanogpt / name, folder)
    shutil.copytree(args.nanogpt / "config", folder / "config")
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    text = (args.data_dir / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    itos = dict(enumerate(sorted(set(text))))
    stoi = {character: i for i, character in itos.items()}
    ids = np.array([stoi[character] for character in text], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi})
    )


def load_nanogpt(folder, device):
    """Return the model in nanoGPT's checkpoint."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    checkpoint = torch.load(folder / "out/ckpt.pt", map_location="cpu", weights_only=False)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    names = {name.removeprefix("_orig_mod."): p for name, p in checkpoint["model"].items()}
    model.load_state_dict(names)
    return model.eval().to(device)


@torch.no_grad()
def exact_loss(model, folder):
    """Return the loss over the whole validation text, each character once.

    The windows of block_size do not overlap, as in step 16; the last one is shorter.
    """
    ids = np.fromfile(folder / "data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64)
    ids, size, total = torch.from_numpy(ids), model.config.block_size, 0.0
    for i in range(0, len(ids) - 1, size):
        y = ids[i + 1 : i + size + 1]
        logits, _ = model(ids[None, i : i + len(y)], y[None])
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    return total / (len(ids) - 1)


def run_nanogpt(args, folder, seed):
    """Train nanoGPT; return its wall time, exact loss and speed."""
    text = (folder / "train.py").read_text()
    (folder / "seeded.py").write_text(re.sub(r"manual_seed\(\d+", f"manual_seed({seed}", text))
    flags = CPU.split() if args.device == "cpu" else []
    command = [sys.executable, "seeded.py", "config/train_shakespeare_char.py", "--out_dir=out"]
    seconds, out = run([*command, *flags], folder)
    times = [float(x) for x in re.findall(r"^iter .* time ([\d.]+)ms", out, re.M)]
    tokens = 12 * 64 if args.device == "cpu" else 64 * 256
    loss = exact_loss(load_nanogpt(folder, "cpu"), folder)
    speed = tokens / statistics.median(times) * 1e3
    return {"wall_seconds": seconds, "val_loss": loss, "tokens_per_second": speed}


def run_step(args, out_dir, seed, *flags):
    """Train step 16; return its wall time, last exact loss and speed."""
    command = [sys.executable, STEP / "train.py", "--out_dir", out_dir, "--seed", str(seed)]
    command += ["--device", args.device, "--data_dir", args.data_dir, *flags]
    seconds, _ = run(command, out_dir.parent)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(r["tokens_per_second"] for r in records[1:])
    loss = records[-1]["val_loss"]
    return {"wall_seconds": seconds, "val_loss": loss, "tokens_per_second": speed}


def run_sampling(args, folder, seed):
    """Let both trained models write; yield who wrote, and the characters per second."""
    nanogpt = load_nanogpt(folder / "nanogpt", args.device)
    sys.path.insert(0, str(STEP))
    import train as step

    flags = "--max_new_tokens 500 --temperature 0.8 --top_k 200 --device"
    step_args = step.parse_args([*flags.split(), args.device])
    device = step.setup_device(step_args)
    checkpoint = step.read_checkpoint(folder / f"default_{seed}" / "best.pt", {})
    vars(step_args).update(checkpoint["state"]["args"])  # the sizes of the model
    model = step.GPT(step_args, len(checkpoint["state"]["vocab"])).to(device)
    model.load_state_dict(checkpoint["model"])
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    writers = {
        "nanoGPT": lambda: [nanogpt.generate(start, 500, 0.8, 200).tolist() for _ in range(10)],
        "ten at once": lambda: step.generate(step_args, model, start.repeat(10, 1)).tolist(),
        "one by one": lambda: [step.generate(step_args, model, start).tolist() for _ in range(10)],
    }
    for name, write in writers.items():
        begin = time.perf_counter()
        write()
        yield name, 5000 / (time.perf_counter() - begin)


def print_table(results):
    """Print medians and ranges over the seeds, then the rows of run.py's table."""
    units = {"wall_seconds": "s", "val_loss": "nats per character"}
    units |= {"tokens_per_second": "tokens/s", "characters_per_second": "characters/s"}
    medians = {}
    for key, unit in units.items():
        for name in dict.fromkeys(r["name"] for r in results if key in r):
            values = [r[key] for r in results if r["name"] == name and key in r]
            medians[name, key] = statistics.median(values)
            low, middle, high = (f"{f(values):,.5g}" for f in (min, statistics.median, max))
            print(f"{name:11} {middle:>7} {unit} ({low} to {high}, {len(values)} runs)")
    for (name, key), middle in medians.items():
        if name != "nanoGPT":
            row(f"{name}: {units[key]}", middle, medians["nanoGPT", key])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("default", "quarter", "adamw", "sample")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("DATA_DIR", "data"))
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--quarter_flags", default=QUARTER, help="as one word")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work_dir", type=Path, help="where the runs stay (default: deleted)")
    args = parser.parse_args()
    args.data_dir = args.data_dir.resolve()
    flags = {"default": "", "quarter": args.quarter_flags, "adamw": "--optimizer adamw"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work_dir or Path(temporary)).resolve()
        log = folder / "results.jsonl"
        if not (folder / "nanogpt").exists():
            prepare(args, folder / "nanogpt")

        def keep(name, seed, **result):
            with open(log, "a") as file:
                file.write(json.dumps({"name": name, "seed": seed, **result}) + "\n")
            print(f"  seed {seed}, {name}: {result}", flush=True)

        print(f"{torch.get_num_threads()} threads, {args.device}, torch {torch.__version__}")
        for seed in args.seeds:
            keep("nanoGPT", seed, **run_nanogpt(args, folder / "nanogpt", seed))
            for part in args.parts:
                if part in flags:
                    out_dir = folder / f"{part}_{seed}"
                    keep(part, seed, **run_step(args, out_dir, seed, *flags[part].split()))
                else:
                    for name, rate in run_sampling(args, folder, seed):
                        keep(name, seed, characters_per_second=rate)
        print_table([json.loads(line) for line in log.read_text().splitlines()])


if __name__ == "__main__":
    main()
