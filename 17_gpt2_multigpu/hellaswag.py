"""Score a trained model on HellaSwag: python hellaswag.py FILE.jsonl [FLAGS OF train.py]

FILE.jsonl is HellaSwag's own (hellaswag_val.jsonl, 10,042 questions). A question is a context and
four endings, and counts as right if the true ending has the lowest mean loss per token. Chance is
25%; OpenAI's GPT-2 124M (--init_from gpt2) scores 29.5% in build-nanogpt, which counts the same
way. The model is out_dir/best.pt, or the one that --init_from names. Under torchrun the processes
share the questions.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sample import load_model
from tqdm import tqdm
from train import NO_BPE, all_sum, autocast, load_bpe, parse_args, to_device


def read_questions(path):
    """Return the questions in a jsonl file: dicts with ctx, endings and label."""
    try:
        questions = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for question in questions:
            assert 0 <= question["label"] < len(question["endings"])
            assert all(isinstance(x, str) and x for x in [question["ctx"], *question["endings"]])
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise OSError(f"{path}: not HellaSwag's questions as jsonl ({error!r:.100})") from error
    if not questions:
        raise OSError(f"{path} is empty")
    return questions


@torch.no_grad()
def evaluate_hellaswag(args, model, questions, device):
    """Return the accuracy: the fraction of questions whose true ending has the lowest mean loss."""
    model.eval()
    bpe, n_right = load_bpe(), 0
    mine = questions[args.rank :: args.world_size]
    for question in tqdm(mine, disable=None if args.rank == 0 else True):
        context = bpe.encode_ordinary(question["ctx"])
        endings = [bpe.encode_ordinary(" " + ending) for ending in question["endings"]]
        y = np.full((len(endings), len(context) + max(map(len, endings))), -100)
        x = y.copy()
        for row, ending in enumerate(endings):
            x[row, : len(context) + len(ending)] = context + ending
            y[row, len(context) : len(context) + len(ending)] = ending  # only endings are scored
        x, y = x[:, :-1].clip(0)[:, -args.block_size :], y[:, 1:][:, -args.block_size :]
        with autocast(args):
            logits = model(to_device(x, device)).float().mT  # (endings, V, T)
        losses = F.cross_entropy(logits, to_device(y, device), reduction="none")
        losses = losses.sum(1).cpu().numpy() / (y >= 0).sum(1)
        n_right += int(losses.argmin() == question["label"])
    return all_sum([n_right], device)[0] / len(questions)


def main(argv):
    """Print the accuracy on the questions in argv[0]; return it."""
    if not argv or argv[0].startswith("-"):
        raise argparse.ArgumentTypeError("usage: python hellaswag.py FILE [FLAGS OF train.py]")
    questions = read_questions(Path(argv[0]))
    if load_bpe() is None:
        raise OSError(NO_BPE)
    args = parse_args(argv[1:])
    model = load_model(args)
    accuracy = evaluate_hellaswag(args, model, questions, model.wte.weight.device)
    if args.rank == 0:
        print(f"HellaSwag accuracy {accuracy:.2%} on {len(questions):,} questions")
    return accuracy


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError:
        print("hellaswag.py: error: out of GPU memory", file=sys.stderr)
        sys.exit(2)
    except (argparse.ArgumentTypeError, MemoryError, OSError) as error:
        print(f"hellaswag.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
