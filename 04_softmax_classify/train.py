"""Step 04: many inputs, one of several classes out.

Parent:  03_vector_linreg
New:     log_softmax
Changed: load_data, init_params, forward, loss_fn, train, parse_args

The model gives each class a score (logit), and softmax turns the scores z into probabilities p. By
maximum likelihood, the best parameters give the labels the highest probability, so the loss is the
mean negative log-likelihood (cross-entropy), in nats (natural logarithm). Its gradient is the error
in probability, dL/dz = (p - onehot(y)) / B, where onehot(y) is 1 for the label and 0 for all other
classes. The labels are sampled from the teacher's own probabilities, so the lowest loss to expect
is the entropy of the teacher. (The parameters are not compared with the teacher's: softmax is the
same when a constant is added to all logits.)

Try:     --n_classes 2 (what is this model's classical name?)
         --learning_rate 100 (worse, but never infinite: why?)
Source:  Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs".
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
import torch
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args, rng):
    """Return x (N, D), labels y (N,) sampled from a random teacher, and the teacher's entropy."""
    teacher = {"w": rng.normal(size=(args.n_inputs, args.n_classes)), "b": 0}
    x = rng.normal(size=(args.n_examples, args.n_inputs))
    log_p = log_softmax(torch.from_numpy(forward(teacher, x)))  # (N, C)
    # Gumbel-max: the argmax of log_p plus Gumbel noise is a sample from the distribution p.
    y = (log_p + torch.from_numpy(rng.gumbel(size=log_p.shape))).argmax(dim=1)  # (N,)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean().item()
    return torch.from_numpy(x).float(), y, entropy


def minibatches(x, y, batch_size, rng):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    while True:
        order = rng.permutation(len(x))
        for i in range(0, len(x), batch_size):
            batch = order[i : i + batch_size]
            yield x[batch], y[batch]


# ---------- model ----------
def init_params(args):
    """Return the initial parameters: all classes equally likely."""
    shapes = {"w": (args.n_inputs, args.n_classes), "b": (args.n_classes,)}
    # requires_grad: record the operations on these tensors, so that backward can differentiate.
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


def forward(params, x):
    """Return logits (B, C) from x (B, D)."""
    return x @ params["w"] + params["b"]  # (B, D) @ (D, C) is a dot product per class: (B, C)


def log_softmax(logits):
    """Return log(e^z_c / sum_k e^z_k) = z_c - log(sum_k e^z_k) for logits z, (B, C) to (B, C)."""
    logits = logits - logits.amax(dim=1, keepdim=True)  # softmax is the same; exp stays finite
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def loss_fn(logits, y):
    """Return the mean negative log-likelihood, in nats, of labels y (B,) under logits (B, C)."""
    return -log_softmax(logits)[torch.arange(len(y)), y].mean()  # mean over i of entries [i, y_i]


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
    x_train, y_train, entropy = load_data(args, rng)
    batches = minibatches(x_train, y_train, args.batch_size, rng)
    params = init_params(args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            with torch.no_grad():  # no computation graph where no gradient is needed
                record["train_loss"] = loss_fn(forward(params, x_train), y_train).item()
            record["entropy"] = entropy
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        logits = forward(params, x)
        loss = loss_fn(logits, y)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        loss.backward()
        with torch.no_grad():  # the update is not part of the function to differentiate
            for name in params:
                params[name] -= args.learning_rate * params[name].grad
                params[name].grad = None  # backward adds to .grad; start the next one from zero

    print(f"train_loss {record['train_loss']:.5g}, entropy of the teacher {entropy:.5g}")
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
