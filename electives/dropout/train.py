"""Elective dropout: regularization, when there are only 1,000 training images.

Parent:  07_mnist_mlp
New:     augment, Dropout, Run, summarize, save_spread
Changed: MLP, train, parse_args

A network with more parameters than examples can memorize all training images, noise included.
Regularization works against that: weight decay pulls the parameters towards zero, dropout zeroes
units at random in training, early stopping keeps the parameters with the lowest loss on held-out
images, and augmentation makes new images from the old ones. Every regularizer is tried with several
seeds, which choose the training images and the initial weights. Is its gain in accuracy larger than
the spread over the seeds (spread.png)? Does it lower the test loss, raise the test accuracy, or
both? Why is the accuracy of early stopping below that of no regularization?

Try:     --n_train 10000 (what is left of the gains?), --dropout 0.9, --shift 6
Source:  Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
         overfitting".
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import copy
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args):
    """Return MNIST's training and test TensorDataset: normalized pixels x (784,) and label y."""
    datasets = []
    for name in ("train", "t10k"):
        try:
            dataset = MNIST(args.data_dir, train=name == "train", download=True)
            x, y = dataset.data, dataset.targets
            if x.shape != (len(y), 28, 28) or not x.any() or y.max() > 9:
                raise ValueError("not 28 x 28 images with as many labels from 0 to 9")
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise OSError(
                f"{args.data_dir}/MNIST/raw/{name}-*: missing or broken ({str(error)[-80:]!r}); "
                f"put MNIST there, or stand-ins: python tests/standins.py {args.data_dir}"
            ) from error
        datasets.append((x.flatten(1) / 255, y))  # x (N, 784), 0 to 1
    # Mean 0 and variance 1, the scale that the initialization preserves; from training images only.
    mean, std = datasets[0][0].mean(), datasets[0][0].std()
    return [TensorDataset((x - mean) / std, y) for x, y in datasets]


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    loader = DataLoader(dataset, batch_size, shuffle=True)
    while True:
        yield from loader


def augment(x, shift):
    """Shift the images x (B, 784) by up to shift pixels per axis, all by the same amount."""
    # One random shift per minibatch is cheap; over the epochs every image meets many of them.
    dy, dx = torch.randint(-shift, shift + 1, (2,)).tolist()
    # roll wraps around, but 99.8% of the pixels within 2 of MNIST's borders are blank.
    return x.view(-1, 28, 28).roll((dy, dx), dims=(1, 2)).flatten(1)


# ---------- model ----------
class Dropout(nn.Module):
    """Zeroes a fraction p of its input at random in training; in evaluation, the identity."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        is_kept = torch.rand_like(x) >= self.p  # a new mask for every unit of every example
        # Inverted dropout: scaled by 1 / (1 - p), each unit keeps its expected value, so that
        # evaluation, where all units are present, needs no scaling.
        return x * is_kept / (1 - self.p)


class MLP(nn.Module):
    """Maps x (B, D) to logits (B, C) through n_layer hidden layers of n_hidden units."""

    def __init__(self, n_inputs, n_hidden, n_layer, n_classes, dropout):
        super().__init__()
        sizes = [n_inputs] + n_layer * [n_hidden]
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], n_classes)
        self.dropout = Dropout(dropout)  # zeroes this fraction of its input in training
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in

    def forward(self, x):
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))  # (B, n_hidden)
        return self.out(x)  # (B, C)


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(model, dataset, name):
    """Return {name}_loss, in nats, and {name}_accuracy, a fraction, on a TensorDataset."""
    model.eval()  # no dropout
    x, y = dataset.tensors
    logits = torch.cat([model(chunk) for chunk in x.split(200)])  # (N, C), chunks to save memory
    model.train()
    accuracy = (logits.argmax(dim=1) == y).float().mean().item()
    return {f"{name}_loss": F.cross_entropy(logits, y).item(), f"{name}_accuracy": accuracy}


def summarize(runs, test_set, name):
    """Return mean losses of the runs, and mean and standard deviation of their test accuracies."""
    train = [evaluate(run.best_model, run.train_set, "train")["train_loss"] for run in runs]
    test = [evaluate(run.best_model, test_set, "test") for run in runs]
    for run, result in zip(runs, test):
        run.test_accuracy = result["test_accuracy"]
    accuracy = torch.tensor([run.test_accuracy for run in runs])
    return {
        f"{name}_train_loss": sum(train) / len(runs),
        f"{name}_test_loss": sum(result["test_loss"] for result in test) / len(runs),
        f"{name}_test_accuracy": accuracy.mean().item(),
        f"{name}_spread": accuracy.std(correction=min(1, len(runs) - 1)).item(),
    }


def save_spread(runs, path):
    """Draw the test accuracies of the runs {name: runs}, and their means, into the file path."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for row, group in enumerate(runs.values()):
        accuracy = [run.test_accuracy for run in group]
        axis.plot(accuracy, len(group) * [row], "o", alpha=0.5)
        axis.plot(sum(accuracy) / len(group), row, "k|", markersize=24)
    axis.set_yticks(range(len(runs)), runs)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.set(xlabel="test accuracy (fraction); a dot per seed, a bar: their mean")
    figure.savefig(path, dpi=80)


# ---------- training ----------
REGULARIZERS = {
    "none": [],
    "weight_decay": ["weight_decay"],
    "dropout": ["dropout"],
    "early_stopping": ["early_stopping"],
    "augmentation": ["augmentation"],
    "combined": ["weight_decay", "dropout", "augmentation"],
}


class Run:
    """A model in training, with its images and its regularizers."""

    def __init__(self, args, name, seed, train_set):
        torch.manual_seed(seed)  # the same images and initial weights for all regularizers
        x, y = train_set[torch.randperm(len(train_set))[: args.n_train]]
        used = REGULARIZERS[name]
        # The held-out images of early stopping are a fifth of the images: it trains on the others.
        n_val = len(x) // 5 if "early_stopping" in used else 0
        self.val_set = TensorDataset(x[:n_val], y[:n_val])
        self.train_set = TensorDataset(x[n_val:], y[n_val:])
        self.batches = minibatches(self.train_set, args.batch_size)
        self.shift = args.shift if "augmentation" in used else 0
        dropout = args.dropout if "dropout" in used else 0
        # Weight decay adds weight_decay / 2 times the sum of all squared parameters to the loss.
        weight_decay = args.weight_decay if "weight_decay" in used else 0
        self.model = MLP(28 * 28, args.n_hidden, args.n_layer, 10, dropout)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.learning_rate, weight_decay=weight_decay
        )
        self.best_model = self.model  # early stopping replaces it by copies
        self.val_losses = []

    def stop_early(self, patience):
        """Keep a copy of the model if its held-out loss is a new lowest; return whether to stop."""
        if not len(self.val_set):
            return False
        self.val_losses.append(evaluate(self.model, self.val_set, "val")["val_loss"])
        lowest = self.val_losses.index(min(self.val_losses))
        if lowest == len(self.val_losses) - 1:
            self.best_model = copy.deepcopy(self.model)
        return len(self.val_losses) - 1 - lowest >= patience


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
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args)
    seeds = range(args.seed, args.seed + args.n_seeds)
    runs = {name: [Run(args, name, seed, train_set) for seed in seeds] for name in REGULARIZERS}
    active = [run for group in runs.values() for run in group]
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            for name, group in runs.items():
                record |= summarize(group, test_set, name)
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        if iter_num % args.val_interval == 0:
            active = [run for run in active if not run.stop_early(args.patience)]
        for run in active:
            # Random minibatches give unbiased estimates of the gradient at a fraction of its cost.
            x, y = next(run.batches)
            logits = run.model(augment(x, run.shift))
            loss = F.cross_entropy(logits, y)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    for name in runs:
        accuracy, spread = record[f"{name}_test_accuracy"], record[f"{name}_spread"]
        gain = accuracy - record["none_test_accuracy"]
        print(f"{name:15} test accuracy {accuracy:.2%} +- {spread:.2%}, gain {gain:+.2%}")
    save_spread(runs, args.out_dir / "spread.png")
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
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[2] / "data")
    flag("--data_dir", type=Path, default=data_dir, help="directory that holds MNIST/raw/")
    flag("--n_train", type=number(int, 10), default=1000, help="training images per run")
    flag("--shift", type=number(int, 0, 27), default=2, help="of augmentation, in pixels")
    flag("--batch_size", type=number(int, 1), default=100, help="examples per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 0), default=2, help="number of hidden layers")
    flag("--n_hidden", type=number(int, 1), default=400, help="units per hidden layer")
    flag("--dropout", type=number(float, 0, 0.99), default=0.3, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=0.2, help="usually 0.001 to 0.5")
    flag("--weight_decay", type=number(float, 0), default=3e-3, help="usually 1e-4 to 1e-2")
    flag("--val_interval", type=number(int, 1), default=10, help="iterations per held-out check")
    flag("--patience", type=number(int, 1), default=20, help="checks without a new lowest loss")
    flag("--max_iters", type=number(int, 1), default=1500, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=100, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="first seed of the random numbers")
    flag("--n_seeds", type=number(int, 1, 100), default=5, help="models per regularizer")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        train(parse_args())
    except (FloatingPointError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
