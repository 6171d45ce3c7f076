"""Step 06: the same network with torch.nn, torch.optim and DataLoader.

Parent:  05_mlp_manual
New:     MLP
Changed: load_data, minibatches, train
Gone:    init_params, relu, forward, log_softmax, loss_fn

PyTorch provides all of this: nn.Linear (x W^T + b), torch.optim.SGD (step 05's update), DataLoader
(minibatches), and F.cross_entropy (log_softmax and negative log-likelihood in one). An nn.Module
collects the parameters of the layers assigned to it (in an nn.ModuleList, not in a plain list), and
model(x) calls its forward. The initialization stays step 05's; the random numbers differ.

Try:     remove the loops over nn.init (the first loss is no longer log(10): why?)
Source:  Paszke et al. 2019, "PyTorch: an imperative style, high-performance deep learning library".
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args, rng):
    """Return x (N, D), labels y (N,) sampled from a random teacher, and the teacher's entropy."""
    x = rng.normal(size=(args.n_examples, args.n_inputs))
    features = np.sin(x @ rng.normal(size=(args.n_inputs, 8), scale=0.5))  # (N, 8)
    logits = features @ rng.normal(size=(8, args.n_classes), scale=3)  # (N, C)
    log_p = F.log_softmax(torch.from_numpy(logits), dim=1)  # (N, C)
    # Gumbel-max: the argmax of log_p plus Gumbel noise is a sample from the distribution p.
    y = (log_p + torch.from_numpy(rng.gumbel(size=log_p.shape))).argmax(dim=1)  # (N,)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean().item()
    return torch.from_numpy(x).float(), y, entropy


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    loader = DataLoader(dataset, batch_size, shuffle=True)
    while True:
        yield from loader


# ---------- model ----------
class MLP(nn.Module):
    """Maps x (B, D) to logits (B, C) through n_layer hidden layers of n_hidden units."""

    def __init__(self, n_inputs, n_hidden, n_layer, n_classes):
        super().__init__()
        sizes = [n_inputs] + n_layer * [n_hidden]
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], n_classes)
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in

    def forward(self, x):
        for layer in self.hidden:
            x = F.relu(layer(x))  # (B, n_hidden)
        return self.out(x)  # (B, C)


# ---------- training ----------
def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    x_train, y_train, entropy = load_data(args, rng)
    batches = minibatches(TensorDataset(x_train, y_train), args.batch_size)
    model = MLP(args.n_inputs, args.n_hidden, args.n_layer, args.n_classes)
    linear = MLP(args.n_inputs, args.n_hidden, 0, args.n_classes)  # step 04's model, for comparison
    optimizer = torch.optim.SGD([*model.parameters(), *linear.parameters()], lr=args.learning_rate)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            with torch.no_grad():  # no computation graph where no gradient is needed
                record["train_loss"] = F.cross_entropy(model(x_train), y_train).item()
                record["linear_loss"] = F.cross_entropy(linear(x_train), y_train).item()
            record["entropy"] = entropy
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        F.cross_entropy(linear(x), y).backward()
        optimizer.step()

    print(f"train_loss {record['train_loss']:.5g}, entropy of the teacher {entropy:.5g}")
    gaps = [record[name] - entropy for name in ("train_loss", "linear_loss")]
    print(f"gap to the entropy: {gaps[0]:.4f}, with step 04's linear model {gaps[1]:.4f}")
    print(f"picture: {plot_run(args.out_dir)}")
    return record


# ---------- command line ----------
def number(kind, low, high=1e9):
    """Return an argparse type: an int or float (kind) from low to high."""

    def convert(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise ValueError

    convert.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse's error shows it
    return convert


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("data").add_argument
    flag("--n_examples", type=number(int, 1), default=100_000, help="number of examples")
    flag("--n_inputs", type=number(int, 1), default=10, help="length of the vector x")
    flag("--n_classes", type=number(int, 2), default=10, help="number of classes")
    flag("--batch_size", type=number(int, 1), default=128, help="examples per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 0), default=2, help="number of hidden layers")
    flag("--n_hidden", type=number(int, 1), default=128, help="units per hidden layer")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=0.2, help="usually 0.001 to 0.5")
    flag("--max_iters", type=number(int, 1), default=2000, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=100, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small a model a second thread costs more than it gains
    try:
        train(parse_args())
    except (FloatingPointError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
