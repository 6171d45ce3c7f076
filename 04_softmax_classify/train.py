"""Step 04: many inputs, one category out of several.

Parent:  03_vector_linreg
New:     log_softmax
Changed: load_data, init_params, forward, loss_fn, train, parse_args

A score (logit) for each class, softmax to turn scores into probabilities, and as the loss the
negative logarithm of the probability given to the label, in nats. The labels are drawn from the
teacher's own probabilities, so no model can go below the teacher's entropy, the dashed line, but
by learning examples by heart.

Try:     --n_classes 2 (what is this model's classical name?)
         --learning_rate 100 (worse, but never infinite: why?)
Source:  Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs".
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------


def load_data(args, rng):
    """Return x (N, D), labels y (N,) drawn from a random teacher, and the teacher's entropy."""
    teacher = {"w": rng.normal(size=(args.n_inputs, args.n_classes)), "b": 0}
    x = rng.normal(size=(args.n_examples, args.n_inputs)).astype(np.float32)
    log_p = log_softmax(torch.from_numpy(forward(teacher, x)))  # (N, C)
    # Argmax of the logits plus Gumbel noise draws each class with its softmax probability.
    y = (log_p + torch.from_numpy(rng.gumbel(size=log_p.shape))).argmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean().item()
    return torch.from_numpy(x), y, entropy


def minibatches(x, y, batch_size, rng):
    """Yield batches (x, y) without end, reshuffled every epoch; an incomplete one is skipped."""
    while True:
        order = rng.permutation(len(x))
        for i in range(0, len(x) - batch_size + 1, batch_size):
            batch = order[i : i + batch_size]
            yield x[batch], y[batch]


# ---------- model ----------


def init_params(args):
    """Return the parameters before training: all classes equally likely."""
    shapes = {"w": (args.n_inputs, args.n_classes), "b": (args.n_classes,)}
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


def forward(params, x):
    """Return logits (B, C) from x (B, D)."""
    return x @ params["w"] + params["b"]


def log_softmax(logits):
    """Return log(e^z_c / sum_k e^z_k) = z_c - log(sum_k e^z_k) for logits z, (B, C) to (B, C)."""
    logits = logits - logits.amax(dim=1, keepdim=True)  # changes no probability; exp stays finite
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def loss_fn(logits, y):
    """Return the mean negative log likelihood, in nats, of labels y (B,) under logits (B, C)."""
    return -log_softmax(logits)[torch.arange(len(y)), y].mean()


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
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    x_train, y_train, best_loss = load_data(args, rng)
    batches = minibatches(x_train, y_train, args.batch_size, rng)
    params = init_params(args)
    start_run(args)

    for iter_num in (bar := tqdm(range(args.max_iters + 1), disable=None)):
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            with torch.no_grad():
                train_loss = loss_fn(forward(params, x_train), y_train).item()
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record |= {"train_loss": train_loss, "best_loss": best_loss}
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break

        x, y = next(batches)
        logits = forward(params, x)
        loss = loss_fn(logits, y)
        if not math.isfinite(loss.item()):
            fail(f"loss {loss} at iteration {iter_num}, --learning_rate {args.learning_rate}")
        if iter_num % args.log_interval == 0:
            bar.set_postfix(loss=f"{loss:.4f}")

        loss.backward()
        with torch.no_grad():
            for name in params:
                params[name] -= args.learning_rate * params[name].grad
                params[name].grad = None

    excess = train_loss / best_loss - 1
    print(f"train_loss {train_loss:.4f} is {excess:+.2%} from the best possible, {best_loss:.4f}")
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
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 1e-9), default=0.5, help="size of a step downhill")
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
