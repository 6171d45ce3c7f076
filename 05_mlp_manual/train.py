"""Step 05: hidden layers, from raw tensors.

Parent:  04_softmax_classify
New:     relu
Changed: load_data, init_params, forward, train, parse_args

The teacher now bends its inputs before it scores them, and no linear model can follow. Feed-forward
layers, each a linear map and a ReLU, can. A run first trains step 04's model (--n_layer 0) on the
same data, then the deep one: see how much closer to the teacher's entropy depth comes.

Try:     --n_layer 20, then also 1 in place of 2 in init_params: why does it stand still so long?
Source:  He et al. 2015, "Delving deep into rectifiers" (the initialisation).
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
    x = rng.normal(size=(args.n_examples, args.n_inputs)).astype(np.float32)
    features = np.sin(x @ rng.normal(size=(args.n_inputs, 8), scale=0.5))  # (N, 8)
    logits = features @ rng.normal(size=(8, args.n_classes), scale=3)
    log_p = log_softmax(torch.from_numpy(logits))  # (N, C)
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


def init_params(args, rng):
    """Return the weights and biases of n_layer hidden layers and the output layer.

    Weights have variance 2 / n for n inputs, so that activations keep their size through layers:
    a sum of n products has n * 2 / n = 2 times the inputs' mean square, and ReLU halves it again.
    The output layer starts at zero, all classes equally likely.
    """
    params, n_in = {}, args.n_inputs
    for i in range(args.n_layer):
        w = rng.normal(scale=math.sqrt(2 / n_in), size=(n_in, args.n_hidden)).astype(np.float32)
        params |= {f"w{i}": torch.from_numpy(w), f"b{i}": torch.zeros(args.n_hidden)}
        n_in = args.n_hidden
    params |= {"w_out": torch.zeros(n_in, args.n_classes), "b_out": torch.zeros(args.n_classes)}
    return {name: param.requires_grad_() for name, param in params.items()}


def relu(x):
    """Return x where it is positive, else 0."""
    return x * (x > 0)


def forward(params, x):
    """Return logits (B, C) from x (B, D)."""
    for i in range(len(params) // 2 - 1):
        x = relu(x @ params[f"w{i}"] + params[f"b{i}"])  # (B, n_hidden)
    return x @ params["w_out"] + params["b_out"]  # (B, C)


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
    if args.n_layer > 0:  # first the linear model, for comparison
        linear = {"n_layer": 0, "out_dir": args.out_dir / "linear"}
        linear_loss = train(argparse.Namespace(**vars(args) | linear))["train_loss"]
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    x_train, y_train, best_loss = load_data(args, rng)
    batches = minibatches(x_train, y_train, args.batch_size, rng)
    params = init_params(args, rng)
    start_run(args)

    for iter_num in (bar := tqdm(range(args.max_iters + 1), disable=None)):
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            with torch.no_grad():
                train_loss = loss_fn(forward(params, x_train), y_train).item()
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record |= {"train_loss": train_loss, "best_loss": best_loss}
            if args.n_layer > 0:
                record["linear_loss"] = linear_loss
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
