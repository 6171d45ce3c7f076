"""Step 16 beside nanoGPT: python tests/benchmarks/nanogpt_shakespeare.py --nanogpt DIR

DIR is a checkout of github.com/karpathy/nanoGPT; it is copied, not written to. Every part runs
nanoGPT and this project in turn, --seeds times, start-up included, and takes medians. nanoGPT's
checkpoint is scored as step 16 scores itself: over the whole validation text, each character once.

train    the default run beside nanoGPT's README recipe (on a CPU its CPU recipe)
quarter  the default recipe, cut to --quarter_iters iterations, beside the same nanoGPT run
adamw    --optimizer adamw beside the same nanoGPT run
sample   ten samples of 500 characters from each one's model (after one of the others)
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

STEP = Path(__file__).resolve().parents[2] / "16_nanogpt_shakespeare" / "train.py"
CPU = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
CPU += " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
CPU += " --lr_decay_iters=2000 --dropout=0.0 --dtype=float32"


def run(command, folder):
    """Run a command in a folder; return its wall time in seconds and its output."""
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - start, result.stdout


def prepare(args, folder):
    """Copy nanoGPT into folder and write its data files there."""
    for name in ("train.py", "sample.py", "model.py", "configurator.py"):
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


def exact_loss(folder):
    """Return the loss of nanoGPT's checkpoint over the whole validation text, each character once.

    Windows of block_size lie side by side, as in step 16; the last one is shorter.
    """
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    checkpoint = torch.load(folder / "out/ckpt.pt", map_location="cpu", weights_only=False)
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    names = {name.removeprefix("_orig_mod."): p for name, p in checkpoint["model"].items()}
    model.load_state_dict(names)
    ids = np.fromfile(folder / "data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64)
    ids, size, total = torch.from_numpy(ids), checkpoint["model_args"]["block_size"], 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, size):
            y = ids[i + 1 : i + size + 1]
            logits, _ = model(ids[None, i : i + len(y)], y[None])
            total += F.cross_entropy(logits[0], y, reduction="sum").item()
    return total / (len(ids) - 1)


def nanogpt(folder, seed, device):
    """Train nanoGPT; return seconds, exact loss, tokens per second."""
    text = (folder / "train.py").read_text()
    (folder / "seeded.py").write_text(re.sub(r"manual_seed\(\d+", f"manual_seed({seed}", text))
    flags = CPU.split() if device == "cpu" else []
    seconds, out = run(
        [sys.executable, "seeded.py", "config/train_shakespeare_char.py", "--out_dir=out", *flags],
        folder,
    )
    times = [float(x) for x in re.findall(r"^iter .* time ([\d.]+)ms", out, re.M)]
    tokens = 12 * 64 if device == "cpu" else 64 * 256
    return seconds, exact_loss(folder), tokens / statistics.median(times) * 1e3


def ours(args, out_dir, seed, *flags):
    """Train step 16; return seconds, the last exact loss, the median of its tokens per second."""
    command = [sys.executable, STEP, "--out_dir", out_dir, "--seed", str(seed), *flags]
    seconds, _ = run([*command, "--data_dir", args.data_dir], out_dir.parent)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    return seconds, records[-1]["val_loss"], statistics.median(speeds)


def compare_training(args, title, folder, *flags):
    """Print nanoGPT and step 16 beside each other."""
    rows = {"nanoGPT": [], "step 16": []}
    for seed in args.seeds:
        if args.nanogpt_result:
            rows["nanoGPT"].append(args.nanogpt_result)
        else:
            rows["nanoGPT"].append(nanogpt(folder / "nanogpt", seed, args.device))
        rows["step 16"].append(ours(args, folder / "ours", seed, *flags))
        for name, results in rows.items():
            seconds, loss, speed = results[-1]
            print(
                f"  seed {seed} {name}: {seconds:.1f} s, val_loss {loss:.4f}, {speed:.0f} tokens/s",
                flush=True,
            )
    medians = {
        name: [statistics.median(c) for c in zip(*results)] for name, results in rows.items()
    }
    (s0, l0, v0), (s1, l1, v1) = medians.values()
    ratios = f"{v1 / v0:.2f} times the tokens/s, {s1 / s0:.2f} of the wall time"
    print(f"{title}: {ratios}, loss {l1 - l0:+.4f}")
    for name, (seconds, loss, speed) in medians.items():
        print(
            f"  median {name}: {seconds:.1f} s, val_loss {loss:.4f}, {speed:.0f} tokens/s",
            flush=True,
        )


def compare_sampling(folder, device):
    """Print the characters per second of nanoGPT's sample.py and of step 16's generate."""
    rates = {"nanoGPT": [], "step 16": []}
    sys.path[:0] = [str(STEP.parent), str(folder / "nanogpt")]  # both have a train.py
    import train as step
    from model import GPT, GPTConfig

    checkpoint = torch.load(folder / "nanogpt/out/ckpt.pt", map_location=device, weights_only=False)
    reference = GPT(GPTConfig(**checkpoint["model_args"])).eval().to(device)
    args = step.parse_args(
        ["--out_dir", str(folder / "ours"), "--sample_only", "--max_new_tokens", "500"]
    )
    step.setup_device(args)
    vocab = step.read_checkpoint(folder / "ours/best.pt")["state"]["vocab"]
    model = step.GPT(args, len(vocab)).to(device)
    step.load_checkpoint(folder / "ours/best.pt", {"model": model})
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(10):  # one after the other, as sample.py does
            reference.generate(start, 500, temperature=0.8, top_k=200).tolist()
        rates["nanoGPT"].append(5000 / (time.perf_counter() - begin))
        begin = time.perf_counter()
        step.generate(args, model, start.repeat(10, 1)).tolist()
        rates["step 16"].append(5000 / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"sampling: {medians['step 16'] / medians['nanoGPT']:.1f} times the characters/s")
    for name, rate in medians.items():
        print(f"  {name}: {rate:.0f} characters/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("DATA_DIR", "data"))
    parser.add_argument("--parts", nargs="+", default=["train", "quarter", "adamw", "sample"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--quarter_iters", type=int, default=300)
    parser.add_argument(
        "--nanogpt_result",
        type=float,
        nargs=3,
        help="instead of training nanoGPT: its seconds, loss and tokens/s",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work_dir", type=Path, help="where the runs stay (default: deleted)")
    args = parser.parse_args()
    args.data_dir = args.data_dir.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = (args.work_dir or Path(folder)).resolve()
        if not (folder / "nanogpt").exists():
            (folder / "nanogpt").mkdir(parents=True)
            prepare(args, folder / "nanogpt")
        print(f"{torch.get_num_threads()} threads, {args.device}, torch {torch.__version__}")
        if "adamw" in args.parts:
            compare_training(args, "adamw", folder, "--optimizer", "adamw")
        if "quarter" in args.parts:
            n = str(args.quarter_iters)
            compare_training(args, f"default, {n} iterations", folder, "--max_iters", n)
        if "sample" in args.parts:
            compare_sampling(folder, args.device)
        if "train" in args.parts:
            compare_training(args, "default", folder)


if __name__ == "__main__":
    main()
