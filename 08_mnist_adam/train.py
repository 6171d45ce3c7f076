"""Step 08: Adam with a learning rate schedule, from optax.

Parent:  07_mnist_mlp
New:     OptaxOptimizer
Changed: train, parse_args

Adam divides each parameter's update by the recent magnitude of its gradients g, so that a
parameter moves by at most about lr per update, whatever the scale of its gradients:

    m = b1 m + (1 - b1) g                   first moment: an exponential moving average of g
    v = b2 v + (1 - b2) g^2                 second moment: the same of g^2
    m_hat = m / (1 - b1^t)                  bias correction at update t: both averages
    v_hat = v / (1 - b2^t)                  start at zero
    w = w - lr m_hat / (sqrt(v_hat) + eps)  with b1 = 0.9, b2 = 0.999, eps = 1e-8

The learning rate lr rises linearly (warm-up) while the moments are still poor estimates, then falls
along a cosine to zero, so that the noise of the minibatches averages out. (torch.optim.Adam is the
same algorithm; in optax an optimizer is a pure function, which the class below applies.)

Try:     --learning_rate 0.2 (SGD's; follow the printed loss: why is it too much for Adam?)
Source:  Kingma and Ba 2015, "Adam: a method for stochastic optimization"; Loshchilov and Hutter
         2017, "SGDR: stochastic gradient descent with warm restarts" (the cosine).
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
from itertools import pairwise
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
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


# ---------- model ----------
class MLP(nn.Module):
    """Maps x (B, D) to logits (B, C) through n_layer hidden layers of n_hidden units."""

    def __init__(self, n_inputs, n_hidden, n_layer, n_classes, dropout):
        super().__init__()
        sizes = [n_inputs] + n_layer * [n_hidden]
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], n_classes)
        self.dropout = nn.Dropout(dropout)  # zeroes this fraction of its input in training
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in

    def forward(self, x):
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))  # (B, n_hidden)
        return self.out(x)  # (B, C)


# ---------- optimizer ----------
class OptaxOptimizer:
    """Updates torch parameters on the CPU with tx, any gradient transformation of optax.

    An optax optimizer is a pure function: gradients and state (Adam's t, m, v) go in, updates and
    the next state come out. jax.jit compiles this; dlpack shares arrays between torch and JAX.
    """

    def __init__(self, params, tx):
        jax.config.update("jax_platforms", "cpu")
        self.params = list(params)
        self.tx = tx
        self.state = tx.init([jax.dlpack.from_dlpack(p.detach()) for p in self.params])
        self.update = jax.jit(self._update)

    def _update(self, params, grads, state):
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        params = [jax.dlpack.from_dlpack(p.detach()) for p in self.params]
        grads = [jax.dlpack.from_dlpack(p.grad) for p in self.params]
        params, self.state = self.update(params, grads, self.state)
        for p, new in zip(self.params, jax.block_until_ready(params)):  # JAX is asynchronous
            p.data = torch.from_dlpack(new)


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
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args)
    train_eval = TensorDataset(*train_set[: len(test_set)])  # as many images as the test set has
    batches = minibatches(train_set, args.batch_size)
    model = MLP(28 * 28, args.n_hidden, args.n_layer, 10, args.dropout)
    warmup = min(args.warmup_iters, args.max_iters - 1)  # optax needs it below max_iters
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.max_iters)
    optimizer = OptaxOptimizer(model.parameters(), optax.adam(schedule))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["learning_rate"] = float(schedule(iter_num))
            record |= evaluate(model, train_eval, "train") | evaluate(model, test_set, "test")
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
        optimizer.step()

    print(f"test accuracy {record['test_accuracy']:.2%} after {record['seconds']:.0f} s")
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
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[1] / "data")
    flag("--data_dir", type=Path, default=data_dir, help="directory that holds MNIST/raw/")
    flag("--batch_size", type=number(int, 1), default=128, help="examples per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 0), default=2, help="number of hidden layers")
    flag("--n_hidden", type=number(int, 1), default=800, help="units per hidden layer")
    flag("--dropout", type=number(float, 0, 0.99), default=0.3, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=2e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=200, help="linear warm-up; usually 1-10%%")
    flag("--max_iters", type=number(int, 1), default=6500, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        train(parse_args())
    except (FloatingPointError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
