"""Plot the metrics of finished runs: python plot.py RUN [RUN ...]

A RUN is the out_dir of a run, with its metrics.jsonl. One run is plotted into its own loss.png,
several are compared in compare.png in the current directory.
"""

import json
import math
import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # draws into files, without a display
import matplotlib.pyplot as plt

TITLE = "Elective critical_batch: simple noise scale during training"
# Per panel: axes, metrics drawn as curves, horizontal reference lines (label: metric or number).
PANELS = [
    {
        "axes": {"ylabel": "loss (nats)", "yscale": "log"},
        "curves": ["train_loss"],
        "references": {"target": "target"},
    },
    {
        "axes": {"ylabel": "simple noise scale (examples)", "yscale": "log"},
        "curves": ["noise_scale"],
        "references": {
            "critical batch size, from trade.png": "critical_batch",
            "mean noise scale to the target": "noise_scale_to_target",
        },
    },
]


def read_metrics(run):
    """Return the records of a run's metrics.jsonl, a list of dicts; damaged lines are skipped."""
    records = []
    for line in (Path(run) / "metrics.jsonl").read_text("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
            if "iter" in record and all(map(math.isfinite, record.values())):
                records.append(record)
        except (AttributeError, TypeError, ValueError):  # half a line, or no object of numbers
            continue
    if not records:
        raise ValueError(f"{run} has no records in metrics.jsonl")
    return records


def draw(runs, path):
    """Plot one or several runs into the PNG file path, and return path."""
    logs = [read_metrics(run) for run in runs]
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(6 * len(PANELS), 4), squeeze=False, layout="constrained"
    )
    figure.suptitle(TITLE)
    for axis, panel in zip(axes[0], PANELS):
        for run, records in zip(runs, logs):
            for key in panel["curves"]:
                points = [(r["iter"], r[key]) for r in records if key in r]
                suffix = f" ({run})" if len(runs) > 1 else ""
                axis.plot(*zip(*points), marker=".", markersize=4, label=f"{key}{suffix}")
        for (label, level), style in zip(panel["references"].items(), ("--", ":", "-.")):
            level = records[-1][level] if isinstance(level, str) else level
            axis.axhline(level, color="gray", linestyle=style, label=f"{label}: {level:.4g}")
        axis.set(xlabel="iteration", **panel["axes"])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def plot_run(out_dir):
    """Plot the run in out_dir into its loss.png, and return that file's path."""
    return draw([out_dir], Path(out_dir) / "loss.png")


if __name__ == "__main__":
    runs = sys.argv[1:] or [Path(__file__).parent / "out"]
    try:
        print(plot_run(runs[0]) if len(runs) == 1 else draw(runs, Path("compare.png")))
    except (OSError, ValueError, LookupError) as error:
        print(f"plot.py: error: cannot plot {' '.join(map(str, runs))}: {error}", file=sys.stderr)
        sys.exit(2)
