"""Elective made: new digits, pixel by pixel.

Parent:  08_mnist_adam
New:     MaskedLinear, MADE, sample, save_images, save_pictures
Changed: load_data, evaluate, train, parse_args
Gone:    MLP

An autoregressive model writes the probability of an image as a product, one factor per pixel:

    p(x) = p(x_0) p(x_1 | x_0) p(x_2 | x_0, x_1) ...

MADE, a masked autoencoder, computes all factors in one pass: every hidden unit has a degree m and
depends only on pixels 0 to m, and the output for a pixel depends only on hidden units of a lower
degree than its position. Masks of zeros and ones, which multiply the weights, remove all other
connections. Unlike a variational autoencoder's, the likelihood is exact; sampling is slow, with one
pass through the network per pixel.

Training images are binarized anew for every minibatch (dynamic binarization), test images once;
Germain et al. report 88.04 nats with one hidden layer and 32 masks, on training images binarized
once. Look at completions.png: digits, their upper halves, and samples of the lower halves.

Try:     --n_masks 4 --order random (an ensemble in one network: is it worth its cost?)
Source:  Germain et al. 2015, "MADE: masked autoencoder for distribution estimation".
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
from torchvision.io import write_png
from torchvision.utils import make_grid
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args):
    """Return MNIST's training and test TensorDataset: pixels x (784,), 0 to 1, and label y."""
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
    # Binarization: a pixel becomes 1 with a probability equal to its brightness, else 0. Test
    # images are sampled here, the same in every run, training images anew for every minibatch.
    (x, y), (x_test, y_test) = datasets
    x_test = x_test.bernoulli(generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, y), TensorDataset(x_test, y_test)


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    loader = DataLoader(dataset, batch_size, shuffle=True)
    while True:
        yield from loader


# ---------- model ----------
class MaskedLinear(nn.Linear):
    """A linear layer whose weights are multiplied by a mask (n_outputs, n_inputs) of 0 and 1."""

    def forward(self, x):
        return F.linear(x, self.mask * self.weight, self.bias)


class MADE(nn.Module):
    """Maps images x (B, D) of zeros and ones to the logit of each pixel given those before it."""

    def __init__(self, n_inputs, n_hidden, n_layer, order):
        super().__init__()
        sizes = [n_inputs] + n_layer * [n_hidden]
        self.hidden = nn.ModuleList(MaskedLinear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.out = MaskedLinear(sizes[-1], n_inputs)
        self.direct = MaskedLinear(n_inputs, n_inputs)  # direct connections, input to output
        self.order = order
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in
        self.set_masks(0)

    def set_masks(self, seed):
        """Sample the order of the pixels and the masks; the same seed gives the same ones."""
        generator = torch.Generator().manual_seed(seed)
        n_inputs = len(self.out.bias)
        self.position = torch.arange(n_inputs)  # (D,), of each pixel in the order, from 0
        if self.order == "random":
            self.position = torch.randperm(n_inputs, generator=generator)
        # A hidden unit of degree m depends on pixels at positions 0 to m only. It is an input to
        # units of the next layer of degree m or more, and to outputs at positions after m.
        degree = self.position
        for layer in self.hidden:
            previous, n_units = degree, len(layer.bias)
            low = min(int(previous.min()), n_inputs - 2)  # with a lower degree it had no inputs
            degree = torch.randint(low, n_inputs - 1, (n_units,), generator=generator)
            layer.mask = (degree[:, None] >= previous).float()  # (n_units, n_units before)
        self.out.mask = (self.position[:, None] > degree).float()  # (D, n_hidden)
        self.direct.mask = (self.position[:, None] > self.position).float()  # (D, D)

    def forward(self, x):
        h = x
        for layer in self.hidden:
            h = F.relu(layer(h))  # (B, n_hidden)
        return self.out(h) + self.direct(x)  # (B, D)

    def log_likelihood(self, x):
        """Return log p(x) (B,) of images x (B, D), in nats."""
        logits = self(x)  # (B, D)
        # log p = x log sigmoid(logit) + (1 - x) log sigmoid(-logit) = x logit - log(1 + exp(logit))
        # The last term, softplus, in a form whose exp cannot overflow; F.softplus takes longer.
        softplus = F.relu(logits) + (1 + (-logits.abs()).exp()).log()
        return (x * logits - softplus).sum(-1)  # (B,)


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
def evaluate(model, dataset, name, n_masks):
    """Return {name}_loss: the negative log-likelihood in nats per image, on a TensorDataset.

    With several sets of masks, the probability of an image is the mean over this ensemble.
    """
    with torch.random.fork_rng([]):  # the same images every time, and training's left alone
        torch.manual_seed(0)
        x = dataset.tensors[0].bernoulli()  # test images are zeros and ones, and remain so
    log_p = []
    for seed in range(n_masks):
        model.set_masks(seed)
        log_p.append(torch.cat([model.log_likelihood(chunk) for chunk in x.split(200)]))  # (N,)
    log_p = torch.stack(log_p).logsumexp(0) - math.log(n_masks)  # (N,)
    return {f"{name}_loss": -log_p.mean().item()}


@torch.no_grad()
def sample(model, x, n_known):
    """Return images (B, D): those of x, with the pixels after the first n_known sampled."""
    x = x.clone()
    for pixel in model.position.argsort()[n_known:]:
        x[:, pixel] = model(x)[:, pixel].sigmoid().bernoulli()  # given all pixels before it
    return x


def save_images(images, path, nrow):
    """Write images (N, 784) of values from 0 to 1 into the PNG file path, nrow per row."""
    grid = make_grid(images.view(-1, 1, 28, 28), nrow)[:1]  # (1, H, W); make_grid repeats it: RGB
    write_png((255 * grid).byte(), str(path))


def save_pictures(model, dataset, out_dir):
    """Write samples.png, and completions.png: digits, their first half, and samples of the rest."""
    model.set_masks(0)
    images = sample(model, torch.zeros(100, 28 * 28), n_known=0)
    save_images(images, out_dir / "samples.png", nrow=10)
    x = dataset.tensors[0][:10]  # (10, 784)
    half = 28 * 28 // 2
    given = torch.where(model.position < half, x, 0.5)  # gray where pixels are to be sampled
    completions = sample(model, x.repeat(8, 1), half).view(8, 10, 28 * 28)
    images = torch.cat([x[None], given[None], completions]).transpose(0, 1)  # (10, 10, 784)
    save_images(images.reshape(100, 28 * 28), out_dir / "completions.png", nrow=10)


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
    model = MADE(28 * 28, args.n_hidden, args.n_layer, args.order)
    # The output bias starts at the logits of the mean image: they need not be learned.
    model.out.bias.data = train_set.tensors[0].mean(0).logit(eps=1e-3)  # (784,)
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
            record |= evaluate(model, train_eval, "train", args.n_masks)
            record |= evaluate(model, test_set, "test", args.n_masks)
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, _ = next(batches)  # the labels are not used
        if args.n_masks > 1:
            model.set_masks(iter_num % args.n_masks)
        loss = -model.log_likelihood(x.bernoulli()).mean()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    save_pictures(model, test_set, args.out_dir)
    print(f"test NLL {record['test_loss']:.2f} nats after {record['seconds']:.0f} s")
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
    flag("--batch_size", type=number(int, 1), default=128, help="examples per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 0), default=1, help="number of hidden layers")
    flag("--n_hidden", type=number(int, 1), default=1500, help="units per hidden layer")
    orders = ["raster", "random"]
    flag("--order", choices=orders, default="raster", help="row by row, or random per set of masks")
    flag("--n_masks", type=number(int, 1), default=1, help="sets of masks, averaged in p(x)")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=1e-2, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=200, help="linear warm-up; usually 1-10%%")
    flag("--max_iters", type=number(int, 1), default=9000, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=1000, help="iterations per evaluation")
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
