"""Run every benchmark and print one table: ours, the reference, the ratio.

    python tests/benchmarks/run.py [--nanogpt DIR] [--examples DIR] [--imagenet DIR] [--only NAME]

Takes about an hour on two cores. MNIST and tiny Shakespeare come from $DATA_DIR, else data/.
--nanogpt is a checkout of github.com/karpathy/nanoGPT, --examples of github.com/pytorch/examples,
--imagenet a folder with train/ and val/; what needs one that is not given is left out, and the
table says so.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "optax_update": "",
    "kneser_ney": "",
    "resnet_measures": "",
    "imagenet_loader": "{imagenet}",
    "lstm_peer": "--peer {examples}/word_language_model",
    "nanogpt_parity": "--nanogpt {nanogpt}",
    "gpt2_speed": "--nanogpt {nanogpt}",
    "nanogpt_shakespeare": "--nanogpt {nanogpt}",
    "mnist_time_to_accuracy": "",
}


def run(name, flags):
    """Run a benchmark, its output passed on; return its rows of the table."""
    command = [sys.executable, "-u", str(HERE / f"{name}.py"), *flags]
    print(f"\n--- {' '.join(command[2:])}", flush=True)
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("| "):
                rows.append(line.strip())
    if process.returncode:
        rows.append(f"| failed with exit code {process.returncode} | | | |")
    return rows or ["| printed no row | | | |"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--examples", type=Path, help="a checkout of pytorch/examples")
    parser.add_argument("--imagenet", type=Path, help="photographs in train/ and val/")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    os.environ.setdefault("DATA_DIR", str(HERE.parents[1] / "data"))
    table = ["| benchmark | measured | ours | reference | ratio |", "|---|---|---|---|---|"]
    for name in args.only:
        given = {name: getattr(args, name) for name in ("nanogpt", "examples", "imagenet")}
        absent = [key for key in given if f"{{{key}}}" in COMMANDS[name] and not given[key]]
        if absent:
            rows = [f"| not run: needs --{absent[0]} | | | |"]
        else:
            rows = run(name, [word.format(**given) for word in COMMANDS[name].split()])
        table += [f"| {name} {line}" for line in rows]
    print("", *table, sep="\n")
    sys.exit(any("failed with" in line or "printed no" in line for line in table))


if __name__ == "__main__":
    main()
