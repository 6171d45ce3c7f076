"""Print samples of a trained model: python sample.py [FLAGS OF train.py]

The model is out_dir/best.pt, or the one that --init_from names (gpt2, ... or a directory).
--prompt FILE:PATH takes the prompt from a text file.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
from pathlib import Path

import torch
from train import load_checkpoint, make_model, parse_args, read_checkpoint, sample, setup_device


def load_model(args):
    """Return the trained model on the device; its sizes become those of args."""
    device = setup_device(args)
    if args.init_from not in ("scratch", "resume"):
        return make_model(args).to(device)
    path = args.out_dir / "best.pt"
    vars(args).update(read_checkpoint(path, {"args": {}})["state"]["args"])
    model = make_model(args)
    load_checkpoint(path, {"model": model}, {})
    return model.to(device)


def main(argv):
    """Print args.num_samples samples."""
    args = parse_args(argv)
    if args.prompt.startswith("FILE:"):
        file = Path(args.prompt[5:])
        args.prompt = file.read_text(encoding="utf-8")
        if not args.prompt:
            raise argparse.ArgumentTypeError(f"--prompt FILE:{file} is empty")
    print(sample(args, load_model(args)))


if __name__ == "__main__":
    if sys.stdout:  # None if closed; its encoding may lack characters of a sample
        sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError:
        print("sample.py: error: out of GPU memory: lower --num_samples", file=sys.stderr)
        sys.exit(2)
    except (argparse.ArgumentTypeError, MemoryError, OSError, UnicodeDecodeError) as error:
        print(f"sample.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
