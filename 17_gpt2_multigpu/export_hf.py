"""Write a trained model in Hugging Face's format: python export_hf.py DIR [FLAGS OF train.py]

DIR is then a directory that transformers' GPT2LMHeadModel.from_pretrained loads, and that train.py
takes as --init_from. The model is out_dir/best.pt.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
from pathlib import Path

import torch
from sample import load_model
from train import parse_args, transpose_conv1d


def export_hf(args, model, folder):
    """Write config.json and model.safetensors into folder."""
    from safetensors.torch import save_file  # pip install safetensors

    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    config |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    config |= {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config |= {"n_positions": args.block_size, "bos_token_id": 50256, "eos_token_id": 50256}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to wte there, too
    tensors = {}
    for name, tensor in weights.items():
        tensors[f"transformer.{name}"] = transpose_conv1d(name, tensor).contiguous()
        if not args.bias and not name.startswith(("wte", "wpe")):  # there, every layer has a bias
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(len(tensor))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main(argv):
    """Export the model to the directory argv[0]."""
    if not argv or argv[0].startswith("-"):
        raise argparse.ArgumentTypeError("usage: python export_hf.py DIR [FLAGS OF train.py]")
    args = parse_args(argv[1:])
    export_hf(args, load_model(args), Path(argv[0]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (argparse.ArgumentTypeError, ImportError, MemoryError, OSError) as error:
        print(f"export_hf.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
