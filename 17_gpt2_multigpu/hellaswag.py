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
    bpe, n_right, encoded = load_bpe(), 0, []
    for question in questions[args.rank :: args.world_size]:
        context = bpe.encode_ordinary(question["ctx"])
        endings = [bpe.encode_ordinary(" " + ending) for ending in question["endings"]]
        rows = [((context + ids)[-args.block_size - 1 :], len(ids)) for ids in endings]
        encoded.append((rows, question["label"]))
    encoded.sort(key=lambda item: max(len(ids) for ids, _ in item[0]))  # so that padding is short
    n = max(1, args.batch_size // 4)  # questions per forward pass
    for i in tqdm(range(0, len(encoded), n), disable=None if args.rank == 0 else True):
        rows = [row for item in encoded[i : i + n] for row in item[0]]
        x = np.zeros((len(rows), max(len(ids) for ids, _ in rows)), dtype=np.int64)  # (B, T + 1)
        y = np.full_like(x, -100)  # only endings are scored
        for row, (ids, n_ending) in enumerate(rows):
            x[row, : len(ids)] = ids
            y[row, : len(ids)] = [-100] * (len(ids) - n_ending) + ids[-n_ending:]
        x, y = to_device(x[:, :-1], device), to_device(y[:, 1:], device)  # (B, T)
        with autocast(args):
            logits = model(x).float().mT  # (B, V, T)
        losses = F.cross_entropy(logits, y, reduction="none").sum(1) / (y >= 0).sum(1)  # (B,)
        losses = iter(losses.tolist())
        for rows, label in encoded[i : i + n]:
            scores = [next(losses) for _ in rows]
            n_right += scores[label] == min(scores)
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
        print("hellaswag.py: error: out of GPU memory: lower --batch_size", file=sys.stderr)
        sys.exit(2)
    except (argparse.ArgumentTypeError, MemoryError, OSError) as error:
        print(f"hellaswag.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
