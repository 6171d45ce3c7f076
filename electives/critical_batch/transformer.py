"""Measure the critical batch size of a small transformer on tiny Shakespeare: python transformer.py

The model is step 13's without dropout, the optimizer plain SGD. An example is a window of T
characters, in which the character after each position is predicted. The target, 2.4 nats per
character, is out of reach with one character of context: the entropy given that one is 2.45. In the
default run the critical batch size is 14 windows, and up to the target the simple noise scale has
a mean of 20 and a median of 21 (--seed 1: 16, 23 and 26). It grows from 2 to about 50 in training.
transformer.png is trade.png of the default run.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from train import measure, number

# ---------- data ----------
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(args):
    """Return tiny Shakespeare, which is downloaded if missing."""
    path = args.data_dir / "shakespeare" / "input.txt"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, path, SHA256, progress=False)
        return path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        problem = f"{path}: missing or not UTF-8 text ({error!r:.99}); put a text there, or"
        raise OSError(f"{problem} stand-ins: python tests/standins.py {args.data_dir}") from error


def windows(ids, block_size):
    """Return a TensorDataset of windows x (T,), T = block_size ids, and the next ids y (T,).

    The windows do not overlap. Their order is random, so that the first are a fair sample.
    """
    chunks = ids.unfold(0, block_size + 1, block_size)  # (N, T + 1)
    chunks = chunks[torch.randperm(len(chunks))]
    return TensorDataset(chunks[:, :-1], chunks[:, 1:])


def load_data(args):
    """Return the training and the test windows, and the vocabulary, a string.

    The first 90% of the characters are the training text.
    """
    text = read_text(args)
    split = int(0.9 * len(text))
    if len(text) - split <= args.block_size:
        problem = f"{len(text)} characters: too few for --block_size {args.block_size}"
        raise argparse.ArgumentTypeError(problem)
    vocab = "".join(sorted(set(text)))
    ids = {character: i for i, character in enumerate(vocab)}
    ids = torch.tensor([ids[character] for character in text])
    torch.manual_seed(args.seed)
    return windows(ids[:split], args.block_size), windows(ids[split:], args.block_size), vocab


# ---------- model ----------
# B batch, T characters, C n_embd, H n_head, D = C / H, V vocab_size
class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it, (B, T, C) to (B, T, C).

    Linear maps give each position a query q, a key k and a value v. The dot product of position i's
    query with position j's key scores how relevant j is to i; softmax turns the scores into weights
    of a mean over the values. Each of H heads has its own q, k, v: a position can attend in H ways.
    """

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # If q and k have variance 1, q . k has variance D: divide by sqrt(D), or softmax saturates.
        scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)
        mask = torch.ones(T, T, dtype=torch.bool).tril()  # position t sees positions 0 to t
        y = scores.masked_fill(~mask, -math.inf).softmax(dim=3) @ v  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Position-wise feed-forward network, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, T, 4C) inside


class Block(nn.Module):
    """Transformer block: attention and MLP, each with layer norm before and a skip connection."""

    def __init__(self, args):
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd)
        self.attn = CausalSelfAttention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd)
        self.mlp = MLP(args)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Maps x (B, T), T up to block_size, to the logits (B, V, T) of the character after each."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.Sequential(*(Block(args) for _ in range(args.n_layer)))
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.lm_head = nn.Linear(args.n_embd, vocab_size)
        nn.init.normal_(self.wte.weight, std=0.05)  # with torch's std of 1, logits would be large
        nn.init.normal_(self.wpe.weight, std=0.05)
        for name, p in self.h.named_parameters():
            if name.endswith("c_proj.weight"):  # the 2 n_layer residuals add up: start them small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
        self.lm_head.weight = self.wte.weight  # weight tying: logit = x . embedding + bias

    def forward(self, x):
        # A weighted mean ignores order: the position embeddings wpe say where each one stands.
        x = self.wte(x) + self.wpe.weight[: x.shape[1]]  # (B, T, C)
        return self.lm_head(self.ln_f(self.h(x))).mT  # (B, V, T), as cross_entropy expects


# ---------- training ----------
def train(args):
    """Run the whole script; return the last record of metrics.jsonl."""
    train_set, test_set, vocab = load_data(args)
    return measure(args, lambda: GPT(args, len(vocab)), train_set, test_set)


# ---------- command line ----------
def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("data").add_argument
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[2] / "data")
    flag("--data_dir", type=Path, default=data_dir, help="directory with shakespeare/input.txt")
    sizes = [4, 8, 16, 32, 64, 128]
    flag("--batch_sizes", type=number(int, 2), nargs="+", default=sizes, help="two or more")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=16, help="characters of context")
    flag("--n_layer", type=number(int, 1), default=1, help="number of blocks")
    flag("--n_head", type=number(int, 1), default=4, help="attention heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), default=64, help="size of an embedding")
    flag = parser.add_argument_group("optimizer").add_argument
    rates = [0.3, 0.2, 0.4, 0.1]  # a good one first: others are given up sooner
    flag("--learning_rates", type=number(float, 0), nargs="+", default=rates, help="to choose from")
    flag("--target", type=number(float, 1e-3), default=2.4, help="training loss to reach, in nats")
    flag("--max_updates", type=number(int, 1), default=10000, help="limit per run to the target")
    flag("--max_iters", type=number(int, 1), default=400, help="updates while noise is measured")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=10, help="iterations between evaluations")
    out_dir = Path(__file__).parent / "out" / "transformer"
    flag("--out_dir", type=Path, default=out_dir, help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="first seed of the random numbers")
    flag("--n_seeds", type=number(int, 1, 100), default=3, help="runs per learning rate")
    args = parser.parse_args(argv)
    if len(set(args.batch_sizes)) < 2:
        parser.error(f"--batch_sizes {args.batch_sizes}: give two or more to compare")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    return args


if __name__ == "__main__":
    try:
        train(parse_args())
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"transformer.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
