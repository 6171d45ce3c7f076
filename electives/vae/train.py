"""Elective vae: new digits, from latent variables.

Parent:  08_mnist_adam
New:     kl_divergence, VAE, save_images, save_pictures
Changed: load_data, MLP, evaluate, train, parse_args

The model explains an image x by a latent vector z, sampled from the prior p(z) = N(0, I): the
decoder turns z into the probability of each pixel, p(x|z). The likelihood p(x) is an integral over
all z, but only a few z make a given image likely. The encoder predicts which, as a normal
distribution q(z|x), and training maximizes a lower bound of log p(x):

    log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))      evidence lower bound (ELBO)
    log p(x) >= E_q[log 1/k sum_i p(x, z_i) / q(z_i|x)]   importance-weighted, k samples: tighter

The ELBO is the expected log-likelihood of reconstruction, less the information in the code z. Its
gradient passes through the sampled z by the reparameterization z = mean + std * noise. Look at
samples.png, images of random z, and at plane.png. test_nll estimates -log p(x) by the second bound
with 500 samples; 5,000 would lower it by 0.25 nats (measured on 6,000 of the test images), but take
five minutes more. Burda et al. report 86.76 nats with 5,000, after 3,280 epochs: 48 times as many
as here.

Try:     --k 5 (the tighter bound: what does it cost?), --n_latent 2 (and look at plane.png)
Source:  Kingma and Welling 2014, "Auto-encoding variational Bayes"; Burda, Grosse and Salakhutdinov
         2016, "Importance weighted autoencoders".
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
            # SiLU, x sigmoid(x), is a smooth ReLU: the decoder's images change smoothly with z.
            x = self.dropout(F.silu(layer(x)))  # (B, n_hidden)
        return self.out(x)  # (B, C)


def kl_divergence(mean, log_std):
    """Return KL(N(mean, std^2) || N(0, I)) in nats, (B,), of mean and log_std (B, Z)."""
    # E_q[log q - log p] per latent variable is, since E_q[(z - mean)^2] = std^2 and E_q[z^2] =
    # mean^2 + std^2, and as log(2 pi) / 2 cancels: (-log std - 1/2) - (-(mean^2 + std^2) / 2)
    return (0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std).sum(-1)


class VAE(nn.Module):
    """Maps images x (B, D) of zeros and ones to a lower bound of log p(x) (B,), in nats.

    Shapes: B images, D pixels, Z latent variables, k samples of z per image.
    """

    def __init__(self, n_inputs, n_hidden, n_layer, n_latent, dropout):
        super().__init__()
        self.encoder = MLP(n_inputs, n_hidden, n_layer, 2 * n_latent, dropout)
        self.decoder = MLP(n_latent, n_hidden, n_layer, n_inputs, dropout)

    def log_likelihood(self, x, z):
        """Return log p(x|z) (k, B) of images x (B, D), whose pixels are independent given z."""
        logits = self.decoder(z)  # (k, B, D)
        # log p = x log sigmoid(logit) + (1 - x) log sigmoid(-logit) = x logit - log(1 + exp(logit))
        # The last term, softplus, in a form whose exp cannot overflow; F.softplus takes longer.
        softplus = F.relu(logits) + (1 + (-logits.abs()).exp()).log()
        return (x * logits - softplus).sum(-1)  # (k, B)

    def forward(self, x, k):
        mean, log_std = self.encoder(x).chunk(2, dim=-1)  # (B, Z) each
        # The reparameterization trick: a sample has no gradient, but as a function of mean, std and
        # noise that does not depend on them, z has.
        noise = torch.randn(k, *mean.shape)  # (k, B, Z)
        z = mean + log_std.exp() * noise  # (k, B, Z)
        log_likelihood = self.log_likelihood(x, z)  # (k, B)
        if k == 1:  # the ELBO, whose second term has a closed form
            return log_likelihood[0] - kl_divergence(mean, log_std)  # (B,)
        # log p(z) - log q(z|x); the constants of the two normal densities cancel.
        log_ratio = (0.5 * (noise**2 - z**2) + log_std).sum(-1)  # (k, B)
        return (log_likelihood + log_ratio).logsumexp(0) - math.log(k)  # (B,)


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
def evaluate(model, dataset, name, k):
    """Return {name}: the negative bound with k samples, nats per image, on a TensorDataset."""
    model.eval()  # no dropout
    with torch.random.fork_rng([]):  # the same noise every time, and training's left alone
        torch.manual_seed(0)
        x = dataset.tensors[0].bernoulli()  # test images are zeros and ones, and remain so
        bounds = torch.cat([model(chunk, k) for chunk in x.split(max(1, 1000 // k))])  # (N,)
    model.train()
    return {name: -bounds.mean().item()}


def save_images(images, path, nrow):
    """Write images (N, 784) of values from 0 to 1 into the PNG file path, nrow per row."""
    grid = make_grid(images.view(-1, 1, 28, 28), nrow)[:1]  # (1, H, W); make_grid repeats it: RGB
    write_png((255 * grid).byte(), str(path))


@torch.no_grad()
def save_pictures(model, dataset, out_dir):
    """Write samples.png, images of z from the prior, and plane.png, images of z on a plane."""
    model.eval()
    mean, log_std = model.encoder(dataset.tensors[0]).chunk(2, dim=-1)  # (N, Z) each
    z = torch.randn(100, mean.shape[1])  # (100, Z), samples of the prior
    save_images(model.decoder(z).sigmoid(), out_dir / "samples.png", nrow=10)
    # On the plane, only the two latent variables with the largest KL divergence, that is, with most
    # information, vary; the others are 0. Its points are quantiles of the prior, equally likely.
    kl = [kl_divergence(*pair).mean() for pair in zip(mean.split(1, 1), log_std.split(1, 1))]
    axes = torch.stack(kl).argsort(descending=True)[:2]
    quantiles = 2**0.5 * torch.erfinv(torch.linspace(-0.95, 0.95, 12))
    z = torch.zeros(12 * 12, mean.shape[1])
    z[:, axes] = torch.cartesian_prod(quantiles, quantiles)
    save_images(model.decoder(z).sigmoid(), out_dir / "plane.png", nrow=12)
    model.train()


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
    model = VAE(28 * 28, args.n_hidden, args.n_layer, args.n_latent, args.dropout)
    # The output bias starts at the logits of the mean image: they need not be learned.
    model.decoder.out.bias.data = train_set.tensors[0].mean(0).logit(eps=1e-3)  # (784,)
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
            record |= evaluate(model, train_eval, "train_loss", args.k)
            record |= evaluate(model, test_set, "test_loss", args.k)
            if iter_num == args.max_iters:
                record |= evaluate(model, test_set, "test_nll", args.eval_k)
                record["seconds"] = time.perf_counter() - start
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, _ = next(batches)  # the labels are not used
        loss = -model(x.bernoulli(), args.k).mean()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    save_pictures(model, test_set, args.out_dir)
    print(f"test NLL {record['test_nll']:.2f} nats after {record['seconds']:.0f} s")
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
    flag("--n_layer", type=number(int, 0), default=2, help="number of hidden layers")
    flag("--n_hidden", type=number(int, 1), default=200, help="units per hidden layer")
    flag("--n_latent", type=number(int, 2), default=50, help="latent variables; usually 2 to 64")
    flag("--dropout", type=number(float, 0, 0.99), default=0, help="usually 0 to 0.5")
    flag("--k", type=number(int, 1), default=1, help="samples of z per image; 1: the ELBO")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=2e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=200, help="linear warm-up; usually 1-10%%")
    flag("--max_iters", type=number(int, 1), default=32000, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=2000, help="iterations per evaluation")
    flag("--eval_k", type=number(int, 1), default=500, help="samples of z for test_nll")
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
