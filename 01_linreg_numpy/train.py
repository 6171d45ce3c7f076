"""Step 01: fit a line to noisy points, with gradients derived by hand.

Parent:  none

A teacher, the line y = wx + b, generates the examples and adds Gaussian noise, which no model can
predict: the lowest loss to expect is the noise variance. (Measured on 100,000 examples, it has a
standard error of 0.45%: a run may end below it.) Watch stochastic gradient descent (SGD) reach it.

Try:     --learning_rate 1.1 (it diverges), --learning_rate 0.1 --batch_size 1 (it fluctuates): why?
Source:  Robbins and Monro 1951, "A stochastic approximation method".
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
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args, rng):
    """Return x (N,), y (N,) = forward(teacher, x) + noise, and the teacher's parameters."""
    teacher = {"w": rng.normal(scale=3), "b": rng.normal(scale=3)}
    x = rng.normal(size=args.n_examples)
    y = forward(teacher, x) + rng.normal(scale=args.noise, size=args.n_examples)
    return x, y, teacher


def minibatches(x, y, batch_size, rng):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    while True:
        order = rng.permutation(len(x))
        for i in range(0, len(x), batch_size):
            batch = order[i : i + batch_size]
            yield x[batch], y[batch]


# ---------- model ----------
def init_params(args):
    """Return the initial parameters: the line y = 0."""
    return {"w": np.float64(0), "b": np.float64(0)}


def forward(params, x):
    """Predict y_hat (B,) from x (B,)."""
    return params["w"] * x + params["b"]


def loss_fn(y_hat, y):
    """Return the mean squared error of y_hat (B,) against y (B,)."""
    return ((y_hat - y) ** 2).mean()


# The loss is a mean over the batch, L = 1/B sum_i (y_hat_i - y_i)^2 with y_hat_i = w x_i + b.
# Chain rule, from the loss backwards: through the square, then through the line.
#   dL/dy_hat_i = 2/B (y_hat_i - y_i)
#   dL/dw       = sum_i dL/dy_hat_i * dy_hat_i/dw = sum_i dL/dy_hat_i * x_i
#   dL/db       = sum_i dL/dy_hat_i * dy_hat_i/db = sum_i dL/dy_hat_i
def backward(x, y, y_hat):
    """Return the gradients of loss_fn with respect to the parameters."""
    d_y_hat = 2 / len(y) * (y_hat - y)  # (B,)
    return {"w": (d_y_hat * x).sum(), "b": d_y_hat.sum()}


# ---------- training ----------
def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


@np.errstate(over="ignore", invalid="ignore")  # log_metrics reports a loss that overflows
def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    x_train, y_train, teacher = load_data(args, rng)
    batches = minibatches(x_train, y_train, args.batch_size, rng)
    params = init_params(args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "numpy": np.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["train_loss"] = loss_fn(forward(params, x_train), y_train).item()
            record["noise_variance"] = args.noise**2
            record["param_error"] = max(abs(params[k] - teacher[k]).max().item() for k in params)
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        y_hat = forward(params, x)
        loss = loss_fn(y_hat, y)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        grads = backward(x, y, y_hat)
        for name in params:  # the gradient points where the loss rises fastest: go against it
            params[name] -= args.learning_rate * grads[name]

    print(f"train_loss {record['train_loss']:.5g}, noise variance {record['noise_variance']:.5g}")
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
    flag("--noise", type=number(float, 0), default=0.5, help="standard deviation of the noise")
    flag("--batch_size", type=number(int, 1), default=128, help="examples per minibatch")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=0.02, help="usually 0.001 to 0.5")
    flag("--max_iters", type=number(int, 1), default=250, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=10, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        train(parse_args())
    except (FloatingPointError, MemoryError, OSError) as error:
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
