"""Draw the gradient norm against the distance for finished runs: python gradients.py RUN [RUN ...]

A RUN is the out_dir of a run of train.py. The curves are those of its last record; the picture,
gradients.png, goes to the current directory. To compare the three cells:

    for cell in rnn gru lstm; do python train.py --cell $cell --out_dir out/$cell; done
    python gradients.py out/rnn out/gru out/lstm
"""

import json
import math
import sys
from pathlib import Path

from plot import plt, read_metrics


def draw_gradients(runs, path):
    """Plot one or several runs into the PNG file path, and return path."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for run in runs:
        cell = json.loads((Path(run) / "args.json").read_text())["cell"]
        record = read_metrics(run)[-1]
        norms = {int(key[9:]): record[key] for key in record if key.startswith("gradient_")}
        perplexity = math.exp(min(record["test_loss"], 700))  # math.exp overflows above 709
        label = f"{cell}, iteration {record['iter']}, test perplexity {perplexity:.1f}"
        axis.plot(norms.keys(), norms.values(), marker=".", label=label)
    axis.set(xlabel="distance (words)", ylabel="relative gradient norm")
    axis.set(xscale="log", yscale="log", title="How far back the gradient of a word's loss reaches")
    axis.set_xticks([*norms], [*norms])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


if __name__ == "__main__":
    runs = sys.argv[1:] or [Path(__file__).parent / "out"]
    try:
        print(draw_gradients(runs, Path("gradients.png")))
    except (OSError, ValueError, LookupError) as error:
        names = " ".join(map(str, runs))
        print(f"gradients.py: error: cannot plot {names}: {error}", file=sys.stderr)
        sys.exit(2)
