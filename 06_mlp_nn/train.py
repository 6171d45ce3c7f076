"""Step 06: the same network, with torch's tools.

Parent:  05_mlp_manual
New:     MLP
Changed: load_data, minibatches, train
Gone:    init_params, relu, forward, log_softmax, loss_fn

Each tool replaces something written by hand before: nn.Module holds the parameters, F.relu and
F.cross_entropy are the functions, torch.optim makes the update, and Dataset and DataLoader deal
out the minibatches. With step 05's weights, the logits and the gradients are step 05's; the curve
differs, as nn.Linear draws its own first weights.

Try:     print(model) in train; --n_layer 4 --n_hidden 64 (a deeper, thinner model)
Source:  Paszke et al. 2019, "PyTorch: an imperative style, high-performance deep learning library".
"""

import argparse
import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------


def load_data(args, rng):
    """Return a dataset of x (D,) and label y, drawn from a random teacher, and its entropy."""
    x = rng.normal(size=(args.n_examples, args.n_inputs)).astype(np.float32)
    features = np.sin(x @ rng.normal(size=(args.n_inputs, 8), scale=0.5))  # (N, 8)
    logits = features @ rng.normal(size=(8, args.n_classes), scale=3)
    log_p = F.log_softmax(torch.from_numpy(logits), dim=1)  # (N, C)
    # Argmax of the logits plus Gumbel noise draws each class with its softmax probability.
    y = (log_p + torch.from_numpy(rng.gumbel(size=log_p.shape))).argmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean().item()
    return TensorDataset(torch.from_numpy(x), y), entropy


def minibatches(dataset, batch_size):
    """Yield batches (x, y) without end, reshuffled every epoch; an incomplete one is skipped."""
    # The dataset is asked for a whole batch at a time: much faster than for its examples singly.
    batches = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    loader = DataLoader(dataset, sampler=batches, batch_size=None)
    while True:
        yield from loader


# ---------- model ----------


class MLP(nn.Module):
    """Maps x (B, D) to logits (B, C) through n_layer hidden layers of n_hidden units."""

    def __init__(self, n_inputs, n_hidden, n_layer, n_classes):
        super().__init__()
        sizes = [n_inputs] + n_layer * [n_hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], n_classes)

    def forward(self, x):
        for layer in self.hidden:
            x = F.relu(layer(x))  # (B, n_hidden)
        return self.out(x)  # (B, C)


# ---------- training ----------


def start_run(args):
    """Make out_dir with an empty metrics.jsonl, and args.json, which tells what made the run."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / "metrics.jsonl").write_text("")
    made_by = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | made_by, default=str))


def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it above the progress bar; stop at inf or nan."""
    if not all(map(math.isfinite, record.values())):
        fail(f"no longer finite, --learning_rate {args.learning_rate}: {record}")
    with open(args.out_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    if args.n_layer > 0:  # first the linear model, for comparison
        linear = {"n_layer": 0, "out_dir": args.out_dir / "linear"}
        linear_loss = train(argparse.Namespace(**vars(args) | linear))["train_loss"]
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    train_set, best_loss = load_data(args, rng)
    x_train, y_train = train_set.tensors
    batches = minibatches(train_set, args.batch_size)
    model = MLP(args.n_inputs, args.n_hidden, args.n_layer, args.n_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    start_run(args)

    for iter_num in (bar := tqdm(range(args.max_iters + 1), disable=None)):
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            with torch.no_grad():
                train_loss = F.cross_entropy(model(x_train), y_train).item()
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record |= {"train_loss": train_loss, "best_loss": best_loss}
            if args.n_layer > 0:
                record["linear_loss"] = linear_loss
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break

        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if not math.isfinite(loss.item()):
            fail(f"loss {loss} at iteration {iter_num}, --learning_rate {args.learning_rate}")
        if iter_num % args.log_interval == 0:
            bar.set_postfix(loss=f"{loss:.4f}")

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    excess = train_loss / best_loss - 1
    print(f"train_loss {train_loss:.4f} is {excess:+.2%} from the best possible, {best_loss:.4f}")
    if args.n_layer > 0:
        ratio = (linear_loss - best_loss) / (train_loss - best_loss)
        print(f"{ratio:.1f} times closer than the linear model, {linear_loss:.4f}")
    print(f"picture: {plot_run(args.out_dir)}")
    return record


# ---------- command line ----------


def fail(message, exit_code=2):
    """Leave with one line on standard error."""
    tqdm.write(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def number(kind, low, high=1e9):
    """Return an argparse type: an int or float (kind) from low to high."""

    def convert(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise ValueError

    convert.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse puts it in its error
    return convert


def parse_args(argv=None):
    """Return the flags of the command line (or of argv), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = Path(__file__).resolve().parent
    flag = parser.add_argument_group("data").add_argument
    flag("--n_examples", type=number(int, 1, 1e6), default=100_000, help="examples drawn in all")
    flag("--n_inputs", type=number(int, 1, 1000), default=10, help="length of the vector x")
    flag("--n_classes", type=number(int, 2, 1000), default=10, help="categories")
    flag("--batch_size", type=number(int, 1), default=128, help="examples in a minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 0, 100), default=2, help="hidden layers")
    flag("--n_hidden", type=number(int, 1, 10_000), default=128, help="units in a hidden layer")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 1e-9), default=0.2, help="size of a step downhill")
    flag("--max_iters", type=number(int, 1), default=2000, help="minibatches to train on")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=100, help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=10, help="iterations between bar updates")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    args = parser.parse_args(argv)
    if args.batch_size > args.n_examples:
        parser.error(f"--batch_size {args.batch_size} is over --n_examples {args.n_examples}")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        train(args)
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
