"""Elective critical_batch: how large should a minibatch be?

Parent:  09_mnist_convnet
New:     gradient, noise_moments, updates_to_target, fit_trade, save_trade, search, measure
Changed: minibatches, ConvNet, log_metrics, train, parse_args
Gone:    augment, OptaxOptimizer

The gradient of a minibatch is the full gradient G plus noise of covariance Sigma / batch_size,
where Sigma is that of one example's gradient. While the noise dominates, twice the batch size
allows nearly twice the progress per update; once the noise is small, more examples are wasted. The
simple noise scale, tr(Sigma) / |G|^2, predicts where this changes; it is estimated in training from
the gradients of two batch sizes (loss.png). Is it right? For every batch size, with the best of
several learning rates, we count the updates S and examples E that plain SGD takes to reach a target
loss, and fit the trade-off of both (trade.png):

    (S / S_min - 1) (E / E_min - 1) = 1        critical batch size = E_min / S_min

At the critical batch size, training takes twice the least updates, S_min, and twice the least
examples, E_min. In the default run it is 73. The noise scale grows as the loss falls, and drops
again where the loss spikes; up to the target, its median is 87 (60 to 96 with five seeds), and its
mean, which the theory asks for, 197 (197 to 318): the few largest values dominate the mean.
transformer.py measures a small transformer likewise: critical batch size 14, noise scale 20 (mean).

Try:     --n_seeds 1 (a quick look), --target 0.1 (does the critical batch size grow as well?)
Source:  McCandlish et al. 2018, "An empirical model of large-batch training".
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args):
    """Return MNIST's training and test TensorDataset: normalized images x (1, 28, 28), label y."""
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
        datasets.append((x[:, None] / 255, y))  # x (N, 1, 28, 28), 0 to 1
    # Mean 0 and variance 1, the scale that the initialization preserves; from training images only.
    mean, std = datasets[0][0].mean(), datasets[0][0].std()
    return [TensorDataset((x - mean) / std, y) for x, y in datasets]


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, each sampled from all examples, with replacement."""
    while True:  # independent examples: the covariance of their mean is exactly Sigma / batch_size
        yield dataset[torch.randint(len(dataset), (batch_size,))]


# ---------- model ----------
class ConvNet(nn.Module):
    """Maps images x (B, 1, 28, 28) to logits (B, C): two convolutions, two linear layers."""

    def __init__(self, n_classes):
        super().__init__()
        # A stride of 2 instead of pooling, and half the channels: the many runs must be fast.
        self.conv_1 = nn.Conv2d(1, 8, 5, padding=2, stride=2)
        self.conv_2 = nn.Conv2d(8, 16, 5, padding=2, stride=2)
        self.hidden = nn.Linear(16 * 7 * 7, 64)
        self.out = nn.Linear(64, n_classes)
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in (self.conv_1, self.conv_2, self.hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in

    def forward(self, x):
        x = F.relu(self.conv_1(x))  # (B, 8, 14, 14)
        x = F.relu(self.conv_2(x))  # (B, 16, 7, 7)
        x = F.relu(self.hidden(x.flatten(1)))  # (B, 64)
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


def gradient(model, x, y):
    """Return the gradient of the mean loss of the examples x, y as one vector (P,)."""
    loss = F.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])


def noise_moments(small, big, n_small, n_big):
    """Return unbiased estimates (2,) of tr(Sigma) and |G|^2 (McCandlish et al., appendix A.1).

    small and big are squared norms of the gradients of n_small and of n_big examples.
    """
    # The mean g of n gradients with mean G and covariance Sigma has E|g|^2 = |G|^2 + tr(Sigma) / n.
    # For two values of n, these are two linear equations in two unknowns.
    trace = (small - big) / (1 / n_small - 1 / n_big)
    return torch.stack([trace, (n_big * big - n_small * small) / (n_big - n_small)])


def fit_trade(updates):
    """Return S_min and E_min, fitted to {batch size B: updates S to the target}."""
    # With E = B S, (S / S_min - 1) (E / E_min - 1) = 1 is the same as S = S_min + E_min / B. This
    # is linear in S_min and E_min; divided by S, least squares minimizes relative errors.
    B, S = torch.tensor([*updates.items()], dtype=torch.float64).T
    A = torch.stack([1 / S, 1 / (B * S)], dim=1)
    s_min, e_min = torch.linalg.lstsq(A, torch.ones_like(S)[:, None]).solution.flatten().tolist()
    if min(s_min, e_min) < 1:
        problem = f"--target, --batch_sizes: no trade-off of updates and examples in {updates}"
        raise argparse.ArgumentTypeError(f"{problem}; lower the target, or choose other sizes")
    return s_min, e_min


def save_trade(updates, s_min, e_min, path):
    """Draw examples to the target against updates, and the fit, into the PNG file path."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for batch_size, n_updates in updates.items():
        n_examples = batch_size * n_updates
        axis.plot(n_updates, n_examples, "o", color="tab:blue")
        axis.annotate(f" {batch_size}", (n_updates, n_examples))
    B = torch.logspace(math.log10(min(updates) / 2), math.log10(2 * max(updates)), 200)
    S = s_min + e_min / B
    axis.plot(S, B * S, color="tab:orange", label="fit: (S / S_min - 1) (E / E_min - 1) = 1")
    axis.plot(2 * s_min, 2 * e_min, "k*", label=f"critical batch size: {e_min / s_min:.0f}")
    axis.axvline(s_min, color="gray", linestyle="--", label=f"S_min: {s_min:.0f} updates")
    axis.axhline(e_min, color="gray", linestyle=":", label=f"E_min: {e_min:.0f} examples")
    axis.set(xscale="log", yscale="log", title="A dot per batch size, with its best learning rate")
    axis.set(xlabel="updates to the target loss, S", ylabel="examples to the target loss, E")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter("{x:,.0f}")
        ticks.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=80)


# ---------- training ----------
def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rates {args.learning_rates}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def updates_to_target(
    args, make_model, train_set, train_eval, batch_size, learning_rate, seed, limit
):
    """Return how many updates of SGD bring the training loss to the target, at most limit."""
    torch.manual_seed(seed)
    batches = minibatches(train_set, batch_size)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    interval = max(1, 256 // batch_size)  # updates per evaluation, which takes time, too
    for n_updates in range(1, limit):
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if n_updates % interval == 0:
            train_loss = evaluate(model, train_eval, "train")["train_loss"]
            if train_loss <= args.target:
                return n_updates
            if not math.isfinite(train_loss):
                break
    return limit


def search(args, make_model, train_set, train_eval):
    """Return {batch size: updates to the target, mean over seeds} and {batch size: learning rate}.

    The learning rate is the one of --learning_rates with the fewest updates.
    """
    fewest, learning_rates = {}, {}
    bar = tqdm([*product(args.batch_sizes, args.learning_rates)], disable=None)
    for batch_size, learning_rate in bar:
        # A learning rate is given up as soon as it has taken as many updates as the best so far.
        total, limit = 0, fewest.get(batch_size, args.n_seeds * args.max_updates)
        for seed in range(args.seed, args.seed + args.n_seeds):
            run = (batch_size, learning_rate, seed, limit - total)
            total += updates_to_target(args, make_model, train_set, train_eval, *run)
        if total < limit:
            fewest[batch_size], learning_rates[batch_size] = total, learning_rate
        result = f"{total / args.n_seeds:.1f} updates" if total < limit else "given up"
        tqdm.write(f"batch size {batch_size}  learning rate {learning_rate:g}  {result}")
    if missed := set(args.batch_sizes) - set(fewest):
        raise argparse.ArgumentTypeError(
            f"--target {args.target}: not reached within --max_updates {args.max_updates} with "
            f"batch size {min(missed)} and any of --learning_rates"
        )
    return {size: total / args.n_seeds for size, total in fewest.items()}, learning_rates


def measure(args, make_model, train_set, test_set):
    """Compare the critical batch size with the noise scale; return metrics.jsonl's last record.

    make_model() returns a new model, the sets are TensorDatasets: a classifier of whatever kind.
    """
    start = time.perf_counter()
    train_eval = TensorDataset(*train_set[:1000])
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))
    updates, learning_rates = search(args, make_model, train_set, train_eval)
    s_min, e_min = fit_trade(updates)
    save_trade(updates, s_min, e_min, args.out_dir / "trade.png")

    # The critical batch size should be the noise scale's mean over the updates to the target of a
    # run with little noise (McCandlish et al.): hence the largest batch size.
    torch.manual_seed(args.seed)
    batch_size = max(args.batch_sizes)
    batches = minibatches(train_set, batch_size // 2)
    model = make_model()
    moments, to_target, reached = [], [], False
    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record |= {"target": args.target, "critical_batch": e_min / s_min}
            record |= evaluate(model, train_eval, "train") | evaluate(model, test_set, "test")
            if moments:
                # A ratio of unbiased estimates is biased; averaging them first lowers the bias.
                trace, squared_norm = torch.stack(moments).mean(dim=0).tolist()
                record["noise_scale"] = trace / squared_norm
                if not reached:
                    to_target.append(record["noise_scale"])
                    reached = record["train_loss"] <= args.target
                record["noise_scale_to_target"] = mean(to_target)
                moments = []
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # The mean gradient of two minibatches of half the size is that of one of the full size.
        halves = torch.stack([gradient(model, *next(batches)) for _ in range(2)])  # (2, P)
        grad = halves.mean(dim=0)  # (P,)
        small, big = halves.square().sum(dim=1).mean(), grad.square().sum()
        moments.append(noise_moments(small, big, batch_size // 2, batch_size // 2 * 2))
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        weights -= learning_rates[batch_size] * grad
        nn.utils.vector_to_parameters(weights, model.parameters())

    print(f"critical batch size {e_min / s_min:.0f} = {e_min:.0f} examples / {s_min:.0f} updates")
    end = "the target" if reached else "the end, before the target"
    print(f"simple noise scale, mean over updates to {end}: {mean(to_target):.0f}")
    print(f"its median: {median(to_target):.0f}")
    print(f"pictures: {plot_run(args.out_dir)} and trade.png")
    return record


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    return measure(args, lambda: ConvNet(10), *load_data(args))


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
    sizes = [16, 32, 64, 128, 256, 512, 1024, 2048]
    flag("--batch_sizes", type=number(int, 2), nargs="+", default=sizes, help="two or more")
    flag = parser.add_argument_group("optimizer").add_argument
    rates = [0.2, 0.3, 0.4, 0.1, 0.05]  # a good one first: others are given up sooner
    flag("--learning_rates", type=number(float, 0), nargs="+", default=rates, help="to choose from")
    flag("--target", type=number(float, 1e-3), default=0.2, help="training loss to reach, in nats")
    flag("--max_updates", type=number(int, 1), default=10000, help="limit per run to the target")
    flag("--max_iters", type=number(int, 1), default=400, help="updates while noise is measured")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=10, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="first seed of the random numbers")
    flag("--n_seeds", type=number(int, 1, 100), default=3, help="runs per learning rate")
    args = parser.parse_args(argv)
    if len(set(args.batch_sizes)) < 2:
        parser.error(f"--batch_sizes {args.batch_sizes}: give two or more to compare")
    return args


if __name__ == "__main__":
    try:
        train(parse_args())
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
