"""Step 09: the same digits, seen by a convnet.

Parent:  08_mnist_adam
New:     augment, ConvNet
Changed: load_data, train, parse_args
Gone:    MLP

A convolution looks at 5 x 5 pixels at a time and uses the same weights everywhere, so a stroke is
learnt once for all places. The model has fewer parameters than the MLP and makes half its errors.
Training images are shifted a little, at random: a moved digit is still the same digit.

Try:     --shift 0 (watch the train and test curves part), --shift 6 (when does it hurt?)
Source:  LeCun et al. 1998, "Gradient-based learning applied to document recognition".
"""

import argparse
import gzip
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.request
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------


MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def download(url, sha256, path, data_dir):
    """Fetch url to path, if it is not there; it appears whole and checked, unpacked from .gz."""
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        content = gzip.decompress(content) if url.endswith(".gz") else content
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError("wrong SHA-256")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        part.rename(path)
    except (OSError, EOFError, http.client.HTTPException) as error:
        fail(
            f"{path} is missing and {url} did not arrive ({error}): put the file there, "
            f"or make a stand-in with: python tests/standins.py {data_dir}"
        )


def load_data(args):
    """Return MNIST's train and test TensorDataset: normalised pixels x (1, 28, 28) and label y."""
    raw = args.data_dir / "MNIST" / "raw"
    for name, sha256 in MNIST_SHA256.items():
        download(f"{MNIST_URL}/{name}.gz", sha256, raw / name, args.data_dir)
    datasets = []
    for name in ("train", "t10k"):
        try:
            datasets.append(MNIST(args.data_dir, train=name == "train"))
            if len(datasets[-1].data) != len(datasets[-1].targets):
                raise ValueError("not as many labels as images")
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            fail(f"{raw / name}-*: broken or cut short ({error}): delete these files")
    pixels = [dataset.data[:, None] / 255 for dataset in datasets]  # (N, 1, 28, 28), 0 to 1
    mean, std = pixels[0].mean(), pixels[0].std()  # of the training set
    return [TensorDataset((x - mean) / std, d.targets) for x, d in zip(pixels, datasets)]


def minibatches(dataset, batch_size):
    """Yield batches (x, y) without end, reshuffled every epoch; an incomplete one is skipped."""
    # The dataset is asked for a whole batch at a time: much faster than for its examples singly.
    batches = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    loader = DataLoader(dataset, sampler=batches, batch_size=None)
    while True:
        yield from loader


def augment(x, shift):
    """Move the images x (B, 1, H, W) together, by up to shift pixels either way."""
    dy, dx = torch.randint(-shift, shift + 1, (2,)).tolist()
    return x.roll((dy, dx), dims=(2, 3))  # the edge wraps around: blank but for a few strokes


# ---------- model ----------


class ConvNet(nn.Module):
    """Maps images x (B, 1, 28, 28) to logits (B, C): two convolutions, two linear layers."""

    def __init__(self, n_classes, dropout):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv_2 = nn.Conv2d(16, 32, 5, padding=2)
        self.hidden = nn.Linear(32 * 7 * 7, 128)
        self.out = nn.Linear(128, n_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv_1(x)), 2)  # (B, 16, 14, 14)
        x = F.max_pool2d(F.relu(self.conv_2(x)), 2)  # (B, 32, 7, 7)
        x = self.dropout(F.relu(self.hidden(x.flatten(1))))  # (B, 128)
        return self.out(x)  # (B, C)


# ---------- optimizer ----------


class OptaxAdam:
    """optax.adam with a schedule (iteration to learning rate) over torch parameters on the CPU."""

    def __init__(self, params, schedule):
        jax.config.update("jax_platforms", "cpu")  # never take memory on a GPU
        self.params = list(params)
        self.tx = optax.adam(schedule)
        self.state = self.tx.init([jax.dlpack.from_dlpack(p.detach()) for p in self.params])
        self.update = jax.jit(self._update)

    def _update(self, params, grads, state):
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        # dlpack passes addresses, not numbers: JAX reads torch's memory, then torch reads JAX's.
        params = [jax.dlpack.from_dlpack(p.detach()) for p in self.params]
        grads = [jax.dlpack.from_dlpack(p.grad) for p in self.params]
        params, self.state = self.update(params, grads, self.state)
        for p, new in zip(self.params, jax.block_until_ready(params)):
            p.data = torch.from_dlpack(new)


# ---------- evaluation ----------


@torch.no_grad()
def evaluate(model, dataset, name):
    """Return the mean loss (nats) and the accuracy on a TensorDataset, as name_loss and so on."""
    model.eval()
    x, y = dataset.tensors
    logits = torch.cat([model(part) for part in x.split(1000)])  # (N, C)
    model.train()
    accuracy = (logits.argmax(dim=1) == y).float().mean().item()
    return {f"{name}_loss": F.cross_entropy(logits, y).item(), f"{name}_accuracy": accuracy}


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
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args)
    if args.batch_size > len(train_set):
        fail(f"--batch_size {args.batch_size} is over the {len(train_set)} training images")
    train_part = TensorDataset(*train_set[: len(test_set)])  # as many as there are test images
    batches = minibatches(train_set, args.batch_size)
    model = ConvNet(10, args.dropout)
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.max_iters)
    optimizer = OptaxAdam(model.parameters(), schedule)
    start_run(args)

    for iter_num in (bar := tqdm(range(args.max_iters + 1), disable=None)):
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["learning_rate"] = float(schedule(iter_num))
            record |= evaluate(model, train_part, "train") | evaluate(model, test_set, "test")
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break

        x, y = next(batches)
        logits = model(augment(x, args.shift))
        loss = F.cross_entropy(logits, y)
        if not math.isfinite(loss.item()):
            fail(f"loss {loss} at iteration {iter_num}, --learning_rate {args.learning_rate}")
        if iter_num % args.log_interval == 0:
            bar.set_postfix(loss=f"{loss:.4f}")

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"test accuracy {record['test_accuracy']:.2%} after {record['seconds']:.0f} s")
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
    data_dir = os.environ.get("DATA_DIR", here.parent / "data")
    flag("--data_dir", type=Path, default=data_dir, help="folder that holds MNIST/raw/")
    flag("--shift", type=number(int, 0, 27), default=2, help="augmentation, in pixels")
    flag("--batch_size", type=number(int, 1), default=128, help="examples in a minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--dropout", type=number(float, 0, 0.99), default=0.3, help="share of units dropped")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 1e-9), default=2e-3, help="Adam's, at the start")
    flag("--max_iters", type=number(int, 1), default=5000, help="minibatches to train on")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=10, help="iterations between bar updates")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()
    try:
        train(args)
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
