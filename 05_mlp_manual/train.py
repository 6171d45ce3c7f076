"""Step 05: hidden layers, from raw tensors.

Parent:  04_softmax_classify
New:     relu
Changed: load_data, init_params, forward, train, parse_args

The teacher is now non-linear: its logits are combinations of sines, which no linear model fits. A
multilayer perceptron has hidden layers, each a linear map and a ReLU (without the ReLUs, all the
maps together would be one linear map). Step 04's linear model is trained alongside: compare how far
the two end above the entropy of the teacher.

Try:     --max_iters 20000 (7% above the entropy, not 33%), --n_examples 1000 (below it: why?)
Source:  Rumelhart et al. 1986 (backpropagation); He et al. 2015, "Delving deep into rectifiers".
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
    x = rng.normal(size=(args.n_examples, args.n_inputs))
    features = np.sin(x @ rng.normal(size=(args.n_inputs, 8), scale=0.5))  # (N, 8)
    logits = features @ rng.normal(size=(8, args.n_classes), scale=3)  # (N, C)
    log_p = log_softmax(torch.from_numpy(logits))  # (N, C)
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
# Variance 2 / n_in keeps the scale: summing n_in products doubles the mean square, ReLU halves it.
def init_params(args, n_layer, rng):
    """Return random weights (equal units would stay equal), zero biases, a zero output layer."""
    params, n_in = {}, args.n_inputs
    for i in range(n_layer):
        w = rng.normal(scale=math.sqrt(2 / n_in), size=(n_in, args.n_hidden))
        params |= {f"w{i}": torch.from_numpy(w).float(), f"b{i}": torch.zeros(args.n_hidden)}
        n_in = args.n_hidden
    params |= {"w_out": torch.zeros(n_in, args.n_classes), "b_out": torch.zeros(args.n_classes)}
    return {name: param.requires_grad_() for name, param in params.items()}


def relu(x):
    """Return x where it is positive, else 0."""
    return x * (x > 0)


# Backpropagation (loss.backward()) through a hidden layer h = relu(a), a = x W + b, given dL/dh:
#   dL/da = dL/dh * (a > 0),  dL/dW = x^T dL/da,  dL/db = sum of dL/da over the batch,
#   dL/dx = dL/da W^T, which is dL/dh for the layer below, and so on down to the first.
def forward(params, x):
    """Return logits (B, C) from x (B, D)."""
    for i in range(len(params) // 2 - 1):  # all but the output layer; each has a w and a b
        x = relu(x @ params[f"w{i}"] + params[f"b{i}"])  # (B, n_hidden)
    return x @ params["w_out"] + params["b_out"]  # (B, C)


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
    params = init_params(args, args.n_layer, rng)
    linear = init_params(args, 0, rng)  # step 04's model, for comparison
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            with torch.no_grad():  # no computation graph where no gradient is needed
                record["train_loss"] = loss_fn(forward(params, x_train), y_train).item()
                record["linear_loss"] = loss_fn(forward(linear, x_train), y_train).item()
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
        loss_fn(forward(linear, x), y).backward()
        with torch.no_grad():  # the update is not part of the function to differentiate
            for param in [*params.values(), *linear.values()]:
                param -= args.learning_rate * param.grad
                param.grad = None  # backward adds to .grad; start the next one from zero

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
