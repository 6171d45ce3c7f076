"""Step 14: the residual network as fast as the hardware allows, on a GPU or a CPU.

Parent:  10_mnist_resnet + 13_transformer
New:     normalise, compile_model, make_optimizer, schedule, Clock, setup_device, autocast,
         print_times
Changed: load_data, minibatches, augment, ResNet, evaluate, start_run, train, parse_args
Gone:    OptaxAdam

The whole data set lies on the device as bytes; shuffling and distorting happen there, many images
at a time. Filters and activations are bfloat16 with the channels last, one fused kernel updates all
parameters, and nothing in the loop makes the CPU wait for the device. The table at the end shows
where the time went. Time to an accuracy is what counts: the learning rate rises and falls once.

Try:     --dtype float32 (what is slower then: forward, backward or update?)
         --max_iters 1000 --n_channel 16 --rotate 6 --scale 0.06 (what does the hurry cost?)
Source:  Smith and Topin 2017, "Super-convergence" (one rise and fall of the learning rate);
         Szegedy et al. 2016, "Rethinking the Inception architecture" (label smoothing).
"""

import argparse
import gzip
import hashlib
import http.client
import json
import math
import os
import shutil
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST
from tqdm import tqdm

from plot import plot_run

ITERATION = ("data", "forward", "backward", "update")  # the parts of an iteration
VIEWS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]  # shifts in pixels: how a tested image is seen

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
    """Return MNIST's train and test TensorDataset: bytes x (1, 28, 28) and label y."""
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
    return [TensorDataset(dataset.data[:, None], dataset.targets) for dataset in datasets]


def normalise(x, stats):
    """Return pixels x, 0 to 1, with the mean and the standard deviation of stats taken out."""
    mean, std = stats
    return (x - mean) / std


def minibatches(args, dataset, stats):
    """Yield augmented batches (x, y) without end, reshuffled every epoch, made on the device."""
    x, y = dataset.tensors
    n = len(x) - len(x) % args.batch_size  # an incomplete batch is skipped
    while True:
        order = torch.randperm(len(x), device=x.device)[:n]
        for chunk in order.split(16 * args.batch_size):  # few large kernels for many batches
            images = normalise(augment(args, x[chunk] / 255), stats)
            yield from zip(images.split(args.batch_size), y[chunk].split(args.batch_size))


def augment(args, x):
    """Rotate, stretch and shift each of the images x (B, 1, H, W) in its own random way."""

    def rand(most):
        return (2 * torch.rand(len(x), device=x.device) - 1) * most  # (B,)

    angle, width, height = rand(math.radians(args.rotate)), rand(args.scale), rand(args.scale)
    shift = 2 * args.shift / x.shape[-1]  # grid_sample's coordinates run from -1 to 1
    to_x = [angle.cos() * (1 + width), -angle.sin() * (1 + width), rand(shift)]
    to_y = [angle.sin() * (1 + height), angle.cos() * (1 + height), rand(shift)]
    theta = torch.stack(to_x + to_y, dim=1).view(-1, 2, 3)  # (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(x, grid, align_corners=False)


# ---------- model ----------


class Block(nn.Module):
    """Residual block, (B, n_in, H, W) to (B, n_out, H, W)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv_1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(n_out)
        self.conv_2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn_2 = nn.BatchNorm2d(n_out)
        nn.init.zeros_(self.bn_2.weight)
        self.shortcut = nn.Identity()
        if n_in != n_out:
            conv = nn.Conv2d(n_in, n_out, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(n_out))

    def forward(self, x):
        change = self.bn_2(self.conv_2(F.relu(self.bn_1(self.conv_1(x)))))
        return F.relu(self.shortcut(x) + change)


class ResNet(nn.Module):
    """Maps images x (B, 1, 28, 28) to logits (B, C): three stages of n_layer residual blocks.

    The first convolution takes every second pixel: norm and pooling of all would cost more time
    than the convolutions of the first stage.
    """

    def __init__(self, n_channel, n_layer, n_classes):
        super().__init__()
        n = n_channel
        self.conv = nn.Conv2d(1, n, 5, stride=2, padding=2, bias=False)
        self.bn = nn.BatchNorm2d(n)
        blocks = []
        for n_in, n_out in ((n, n), (n, 2 * n), (2 * n, 4 * n)):
            blocks += [nn.Identity() if n_in == n_out else nn.MaxPool2d(2), Block(n_in, n_out)]
            blocks += [Block(n_out, n_out) for _ in range(n_layer - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(4 * n, n_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))  # (B, n, 14, 14)
        x = self.blocks(x)  # (B, 4n, 3, 3)
        return self.out(x.mean(dim=(2, 3)))  # (B, C)


def compile_model(args, model):
    """Return the model compiled, if --compile asks for it and a C++ compiler is there."""
    if not args.compile:
        return model
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        print("--compile: there is no C++ compiler here, going on without")
        return model
    torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it is
    return torch.compile(model, mode="reduce-overhead" if args.device == "cuda" else "default")


# ---------- optimizer ----------


def make_optimizer(args, model):
    """Return SGD with Nesterov momentum, one kernel for the update of all parameters."""
    return torch.optim.SGD(
        model.parameters(), 0.0, 0.9, weight_decay=args.weight_decay, nesterov=True, fused=True
    )


def schedule(args, iter_num):
    """Return the learning rate of an iteration: a linear warm-up, then half a cosine to 0."""
    if iter_num < args.warmup_iters:
        return args.learning_rate * (iter_num + 1) / args.warmup_iters
    done = (iter_num - args.warmup_iters) / (args.max_iters - args.warmup_iters)
    return args.learning_rate * (1 + math.cos(math.pi * done)) / 2


# ---------- evaluation ----------


@torch.no_grad()
def evaluate(args, model, dataset, stats, name):
    """Return the mean loss (nats) and the accuracy on a TensorDataset, as name_loss and so on.

    The logits of an image are the mean over VIEWS of it.
    """
    model.eval()
    x, y = dataset.tensors
    parts = [normalise(part / 255, stats) for part in x.split(1000)]
    logits = 0.0
    with autocast(args):
        for view in VIEWS:
            logits += torch.cat([model(part.roll(view, dims=(2, 3))) for part in parts]).float()
    logits /= len(VIEWS)  # (N, C)
    model.train()
    accuracy = (logits.argmax(dim=1) == y).float().mean().item()
    return {f"{name}_loss": F.cross_entropy(logits, y).item(), f"{name}_accuracy": accuracy}


class Clock:
    """Adds up the seconds of each part of a run; on a GPU by its own clock, without waiting."""

    def __init__(self, device):
        begin = time.perf_counter()
        self.device, self.marks = device, []
        self.mark("start")
        self.seconds = {"start-up": time.perf_counter() - begin}  # a GPU wakes up

    def mark(self, part):
        """End a part of the run here; the next one begins."""
        now = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def read(self):
        """Return {part: seconds} so far; only here the CPU waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (_, begin), (part, end) in pairwise(self.marks):
            gpu = self.device.type == "cuda"
            passed = begin.elapsed_time(end) / 1000 if gpu else end - begin
            self.seconds[part] = self.seconds.get(part, 0.0) + passed
        self.marks = self.marks[-1:]
        return dict(self.seconds)


# ---------- training ----------


def setup_device(args):
    """Return the device; settle args.dtype."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is none; --device cpu goes on without")
    if args.dtype == "auto":
        cpu = torch.cpu.get_capabilities() if args.device == "cpu" else {}
        fast = args.device == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        args.dtype = "bfloat16" if fast else "float32"
    return torch.device(args.device)


def autocast(args):
    """Return the context in which matrix products run in --dtype; the weights stay float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def print_times(seconds, n_iters):
    """Print the table of where the time went, from {part: seconds}."""
    total = sum(seconds.values())
    print(f"{'part':12s} {'seconds':>8s} {'share':>6s} {'ms/iteration':>13s}")
    for part, passed in seconds.items():
        each = f"{1000 * passed / n_iters:13.2f}" if part in ITERATION else ""
        print(f"{part:12s} {passed:8.2f} {passed / total:6.1%} {each}")
    print(f"{'all':12s} {total:8.2f} {1:6.1%}")


def start_run(args, device):
    """Make out_dir with an empty metrics.jsonl, and args.json, which tells what made the run."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / "metrics.jsonl").write_text("")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made_by = {"python": sys.version.split()[0], "torch": torch.__version__, "made_on": name}
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
    device = setup_device(args)
    clock = Clock(device)
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args)
    if args.batch_size > len(train_set):
        fail(f"--batch_size {args.batch_size} is over the {len(train_set)} training images")
    train_set, test_set = (
        TensorDataset(*(tensor.to(device) for tensor in dataset.tensors))
        for dataset in (train_set, test_set)
    )
    pixels = train_set.tensors[0] / 255
    stats = pixels.mean(), pixels.std()  # tensors on the device
    train_part = TensorDataset(*train_set[: len(test_set)])  # as many as there are test images
    batches = minibatches(args, train_set, stats)
    model = ResNet(args.n_channel, args.n_layer, 10).to(device, memory_format=torch.channels_last)
    compiled = compile_model(args, model)
    optimizer = make_optimizer(args, model)
    start_run(args, device)
    clock.mark("start-up")
    since, since_iter = clock.read(), 0

    for iter_num in (bar := tqdm(range(args.max_iters + 1), disable=None)):
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            metrics = evaluate(args, model, train_part, stats, "train")
            metrics |= evaluate(args, model, test_set, stats, "test")
            clock.mark("evaluation")
            seconds = clock.read()
            record = {"iter": iter_num, "seconds": sum(seconds.values())}
            record["learning_rate"] = schedule(args, iter_num)
            record |= metrics
            if iter_num > since_iter:
                passed = {part: seconds[part] - since.get(part, 0.0) for part in ITERATION}
                n_iters, whole = iter_num - since_iter, sum(passed.values())
                record |= {f"{part}_ms": 1000 * passed[part] / n_iters for part in ITERATION}
                record["data_share"] = passed["data"] / whole
                record["images_per_second"] = n_iters * args.batch_size / whole
            since, since_iter = seconds, iter_num
            log_metrics(args, record)
            bar.set_postfix(loss=f"{record['train_loss']:.4f}")
            if iter_num == args.max_iters:
                break

        x, y = next(batches)
        clock.mark("data")
        with autocast(args):
            logits = compiled(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        clock.mark("forward")

        optimizer.zero_grad()
        loss.backward()
        clock.mark("backward")
        for group in optimizer.param_groups:
            group["lr"] = schedule(args, iter_num)
        optimizer.step()
        clock.mark("update")

    print_times(seconds, args.max_iters)
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
    flag("--shift", type=number(float, 0, 27), default=2, help="augmentation, in pixels")
    flag("--rotate", type=number(float, 0, 180), default=10, help="augmentation, in degrees")
    flag("--scale", type=number(float, 0, 0.9), default=0.1, help="augmentation, as a fraction")
    flag("--batch_size", type=number(int, 1), default=256, help="examples in a minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 1), default=1, help="residual blocks a stage")
    flag("--n_channel", type=number(int, 1), default=32, help="channels of the first stage")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 1e-9), default=0.2, help="SGD's, at its highest")
    flag("--warmup_iters", type=number(int, 0), default=400, help="at most a fifth of the run")
    flag("--weight_decay", type=number(float, 0), default=5e-4, help="rule of thumb: 5e-4")
    flag("--label_smoothing", type=number(float, 0, 1), default=0.1, help="shared by all classes")
    flag("--max_iters", type=number(int, 1), default=6000, help="minibatches to train on")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=1000, help="in iterations")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPU if any")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fastest")
    flag("--compile", action="store_true", help="torch.compile: slower to start")
    args = parser.parse_args(argv)
    args.warmup_iters = min(args.warmup_iters, args.max_iters // 5)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        train(args)
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except torch.OutOfMemoryError:
        fail(f"--batch_size {args.batch_size} does not fit into the GPU's memory")
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
