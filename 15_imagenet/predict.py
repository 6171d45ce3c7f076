"""Classify images with the best checkpoint of a run: python predict.py IMAGE [IMAGE ...]

For every image: the five most likely classes and their probabilities, by the averaged weights.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
from pathlib import Path

import numpy as np
import torch
from train import STATS, ResNet, crop, decode, normalize, read_checkpoint


@torch.no_grad()
def predict(args):
    """Print the five most likely classes of every image in args.images."""
    checkpoint = read_checkpoint(args.out_dir / "best.pt", {"names": [], "args": {}})
    names, train_args = checkpoint["state"]["names"], checkpoint["state"]["args"]
    train_args = argparse.Namespace(**train_args)
    model = ResNet(train_args.depth, len(names), train_args.small_stem)
    model.load_state_dict(checkpoint["ema"])
    model.eval()  # batch norm uses its running averages
    for path in args.images:
        try:
            image = decode(np.fromfile(path, np.uint8))
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f"{path}: not a readable image") from error
        x = crop(train_args, image, None)[None]  # (1, 3, H, W)
        p = model(normalize(x / 255, STATS)).softmax(dim=1)[0]  # (C,)
        top = p.topk(min(5, len(names)))
        print(f"{path}:", ", ".join(f"{p:.1%} {names[i]}" for p, i in zip(*top)))


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG, ...")
    out_dir = Path(__file__).parent / "out"
    parser.add_argument("--out_dir", type=Path, default=out_dir, help="of a run, with best.pt")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        predict(parse_args())
    except OSError as error:
        print(f"predict.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
