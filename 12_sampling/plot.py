"""Draw the curves of finished runs: python plot.py RUN [RUN ...]

A RUN is an out_dir with its metrics.jsonl. One run is drawn into its own loss.png, several are
compared in compare.png in the current folder.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLE = "Step 12: the word model that writes"
# A panel: y label and limits, the metrics drawn, the reference (a metric or a number), its name.
PANELS = [
    (
        "loss (nats a word)",
        (3.5, 5.75),
        ["train_loss", "test_loss"],
        4.389,
        "Kneser-Ney 4-gram on Tiny Shakespeare, test",
    ),
]


def read_metrics(run):
    """Return the records of a run's metrics.jsonl, a list of dicts."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def draw(runs, path):
    """Draw one or several runs into the PNG file path, and return path."""
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(6 * len(PANELS), 4), squeeze=False, layout="constrained"
    )
    figure.suptitle(TITLE)
    for axis, (label, limits, keys, reference, name) in zip(axes[0], PANELS):
        for run in runs:
            records = read_metrics(run)
            for key in keys:
                points = [(r["iter"], r[key]) for r in records if key in r]
                where = f" ({run})" if len(runs) > 1 else ""
                axis.plot(*zip(*points), marker=".", markersize=4, label=f"{key}{where}")
        level = records[-1][reference] if isinstance(reference, str) else reference
        if level is not None:
            axis.axhline(level, color="gray", linestyle="--", label=f"{name}: {level:.4g}")
        axis.set(xlabel="iteration (minibatches)", ylabel=label, ylim=limits)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def plot_run(out_dir):
    """Draw the run in out_dir into its loss.png, and return that file's path."""
    return draw([out_dir], Path(out_dir) / "loss.png")


if __name__ == "__main__":
    runs = sys.argv[1:] or [Path(__file__).resolve().parent / "out"]
    try:
        print(plot_run(runs[0]) if len(runs) == 1 else draw(runs, Path("compare.png")))
    except (OSError, ValueError, LookupError) as error:
        print(f"plot.py: error: cannot draw {' '.join(map(str, runs))}: {error}", file=sys.stderr)
        sys.exit(2)
