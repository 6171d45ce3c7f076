"""Validation loss against minutes: nanoGPT's GPU recipe and a run of step 16, on this machine.

    python tests/benchmarks/nanogpt_minutes.py --nanogpt DIR --run OUT_DIR

DIR is a checkout of github.com/karpathy/nanoGPT; it is copied, not written to. OUT_DIR is what
step 16 wrote here: nanoGPT's model for a GPU (6 layers of 384, 64 sequences of 256 characters per
iteration) trains for as many minutes, with the unchanged settings of train_shakespeare_char.py (on
a CPU, nanoGPT computes in float32). A few iterations alone give its speed, so that the long run
need not have the machine to itself. Its checkpoints are evaluated as step 16 is: over the whole
validation text, each character once. The two curves go to minutes.png beside this file.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"
import matplotlib.pyplot as plt
from nanogpt_shakespeare import exact_loss, load_nanogpt, prepare, run
from table import row

N_CHECKPOINTS = 8
FLAGS = ["--device=cpu", "--compile=False", "--out_dir=out", "--eval_iters=1", "--log_interval=1"]


def train_nanogpt(folder, n_iters, *flags):
    """Train nanoGPT's GPU recipe for n_iters iterations; return the median seconds of one."""
    config = "config/train_shakespeare_char.py"
    command = [sys.executable, "train.py", config, *FLAGS, f"--max_iters={n_iters}", *flags]
    _, out = run(command, folder)
    times = [float(ms) / 1000 for ms in re.findall(r"^iter .* time ([\d.]+)ms", out, re.M)]
    return statistics.median(times[2:])


def keep_checkpoints(folder):
    """Let nanoGPT keep every checkpoint, under the number of its iteration."""
    path = folder / "train.py"
    text = path.read_text()
    assert text.count("'ckpt.pt'))") == 1
    path.write_text(text.replace("'ckpt.pt'))", "f'{iter_num}.pt'))"))


def draw(ours, theirs, path):
    """Draw two curves of (minutes, loss) into a PNG file."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(*zip(*theirs), marker=".", label="nanoGPT's GPU recipe")
    axis.plot(*zip(*ours), marker=".", label="step 16")
    label = "nanoGPT's GPU recipe: final loss on an A100"
    axis.axhline(1.4697, color="gray", linestyle="--", label=label)
    axis.set(xlabel="minutes on this machine", ylabel="validation loss (nats per character)")
    axis.set(ylim=(1.4, 3.4))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--run", type=Path, required=True, help="the out_dir of a run of step 16")
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("DATA_DIR", "data"))
    parser.add_argument("--seconds", type=float, help="of an iteration of nanoGPT, if known")
    args = parser.parse_args()
    records = [json.loads(x) for x in (args.run / "metrics.jsonl").read_text().splitlines()]
    ours = [(r["seconds"] / 60, r["val_loss"]) for r in records]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "nanogpt"
        prepare(args, folder)
        keep_checkpoints(folder)
        seconds = args.seconds or train_nanogpt(folder, 8, "--eval_interval=1000000")
        n_iters = int(records[-1]["seconds"] / seconds)
        print(f"nanoGPT: {seconds:.2f} s per iteration, {n_iters} iterations", flush=True)
        interval = max(1, n_iters // N_CHECKPOINTS)
        keep = [f"--eval_interval={interval}", "--always_save_checkpoint=True"]
        train_nanogpt(folder, n_iters, *keep)
        theirs = []
        for path in sorted((folder / "out").glob("*.pt"), key=lambda path: int(path.stem)):
            path.rename(folder / "out" / "ckpt.pt")
            loss = exact_loss(load_nanogpt(folder, "cpu"), folder)
            theirs.append((int(path.stem) * seconds / 60, loss))
            print(f"nanoGPT, {theirs[-1][0]:.1f} min: {loss:.4f}", flush=True)
    draw(ours, theirs, Path(__file__).with_name("minutes.png"))
    row(f"validation loss after {ours[-1][0]:.0f} min", ours[-1][1], theirs[-1][1])


if __name__ == "__main__":
    main()
