"""Step 14: the residual network as fast as the hardware allows, on a GPU or a CPU.

Parent:  10_mnist_resnet + 13_transformer
New:     normalize, make_optimizer, schedule, Clock, setup_device, autocast, print_times
Changed: load_data, minibatches, augment, ResNet, evaluate, train, parse_args
Gone:    OptaxOptimizer

The whole data set stays in the device's memory as uint8; shuffling and augmentation run there, on
thousands of images at a time. Convolutions run in bfloat16 mixed precision, in the channels-last
memory format; one fused kernel updates all parameters; nothing in the loop makes the CPU wait for
the GPU. The first convolution has stride 2, so that all others see a quarter of the pixels. The
table printed at the end shows where the time went. The time saved is spent on more channels, a
random affine transformation of every image and test-time augmentation. SGD with Nesterov momentum,
a one-cycle learning rate schedule and label smoothing need few epochs.

Try:     --dtype float32 (which part of an iteration takes longer?)
         --max_iters 650 --n_channel 16 --rotate 6 --scale 0.06 --weight_decay 0.001 (accuracy?)
Source:  Smith and Topin 2017, "Super-convergence" (one-cycle schedule); Micikevicius et al. 2018,
         "Mixed precision training"; Szegedy et al. 2016, "Rethinking the Inception architecture"
         (label smoothing); Sutskever et al. 2013 (Nesterov momentum).
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

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST
from tqdm import tqdm

from plot import plot_run

ITERATION = ("data", "forward", "backward", "update")  # the timed parts of an iteration
VIEWS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]  # test-time augmentation: shifts in pixels


# ---------- data ----------
def load_data(args, device):
    """Return MNIST's training and test TensorDataset, on device: uint8 x (1, 28, 28), label y."""
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
        datasets.append((x[:, None], y))
    # Copied to the device once; as uint8 all of MNIST takes 55 MB, a quarter of float32's size.
    return [TensorDataset(x.to(device), y.to(device)) for x, y in datasets]


def normalize(x, stats):
    """Return pixels x, 0 to 1, normalized with stats, the training set's (mean, std)."""
    mean, std = stats
    return (x - mean) / std


def minibatches(args, dataset, stats):
    """Yield augmented minibatches (x, y) forever, reshuffled every epoch, made on the device."""
    x, y = dataset.tensors
    # Equal shapes let the GPU reuse its kernels and memory: an incomplete minibatch is skipped.
    n = len(x) - len(x) % args.batch_size
    while True:
        order = torch.randperm(len(x), device=x.device)[:n]
        # A kernel takes microseconds to launch: augment 16 minibatches at once, in few large ones.
        for chunk in order.split(16 * args.batch_size):
            images = normalize(augment(args, x[chunk] / 255), stats)
            yield from zip(images.split(args.batch_size), y[chunk].split(args.batch_size))


def augment(args, x):
    """Rotate, scale and shift each image of x (B, 1, H, W) by its own random affine map."""

    def uniform(high):
        return (2 * torch.rand(len(x), device=x.device) - 1) * high  # (B,), from -high to high

    angle = uniform(math.radians(args.rotate))
    width, height = uniform(args.scale), uniform(args.scale)
    shift = 2 * args.shift / x.shape[-1]  # grid_sample's coordinates run from -1 to 1
    # theta maps the coordinates of every output pixel to the point of x that it shows.
    to_x = [angle.cos() * (1 + width), -angle.sin() * (1 + width), uniform(shift)]
    to_y = [angle.sin() * (1 + height), angle.cos() * (1 + height), uniform(shift)]
    theta = torch.stack(to_x + to_y, dim=1).view(-1, 2, 3)  # (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(x, grid, align_corners=False)  # bilinear; zeros outside the image


# ---------- model ----------
class Block(nn.Module):
    """Residual block, (B, n_in, H, W) to (B, n_out, H, W)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv_1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(n_out)
        self.conv_2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn_2 = nn.BatchNorm2d(n_out)
        nn.init.zeros_(self.bn_2.weight)  # scale 0: starts as its shortcut (Goyal et al. 2017)
        self.shortcut = nn.Identity()
        if n_in != n_out:  # a 1x1 convolution gives x as many channels as the residual has
            conv = nn.Conv2d(n_in, n_out, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(n_out))

    def forward(self, x):
        residual = self.bn_2(self.conv_2(F.relu(self.bn_1(self.conv_1(x)))))  # (B, n_out, H, W)
        return F.relu(self.shortcut(x) + residual)


class ResNet(nn.Module):
    """Maps x (B, 1, 28, 28) to logits (B, C): three stages of n_layer blocks, n to 4n channels."""

    def __init__(self, n, n_layer, n_classes):
        super().__init__()
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
        return self.out(x.mean(dim=(2, 3)))  # global average pooling, then (B, C)


# ---------- optimizer ----------
def make_optimizer(args, model):
    """Return SGD with weight decay and Nesterov momentum, which looks ahead along the momentum."""
    return torch.optim.SGD(
        model.parameters(),
        lr=0.0,  # train sets it before every update
        momentum=0.9,
        weight_decay=args.weight_decay,
        nesterov=True,
        fused=True,  # one kernel updates all parameters, instead of several for each tensor
    )


def schedule(args, iter_num):
    """Return an iteration's learning rate: linear warm-up, then cosine decay to 0 (one cycle)."""
    warmup_iters = min(args.warmup_iters, args.max_iters // 5)
    if iter_num < warmup_iters:
        return args.learning_rate * (iter_num + 1) / warmup_iters
    progress = (iter_num - warmup_iters) / (args.max_iters - warmup_iters)  # 0 to 1
    return args.learning_rate * (1 + math.cos(math.pi * progress)) / 2


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(args, model, dataset, stats, name):
    """Return {name}_loss, in nats, and {name}_accuracy, a fraction, on a TensorDataset."""
    model.eval()  # batch norm uses its running averages, and leaves them as they are
    x, y = dataset.tensors
    chunks = [normalize(chunk / 255, stats) for chunk in x.split(1000)]
    logits = 0.0
    # Test-time augmentation: the errors made on slightly shifted views of an image partly cancel.
    for view in VIEWS:
        with autocast(args):
            logits += torch.cat([model(chunk.roll(view, dims=(2, 3))) for chunk in chunks]).float()
    logits /= len(VIEWS)  # (N, C)
    model.train()
    accuracy = (logits.argmax(dim=1) == y).float().mean().item()
    return {f"{name}_loss": F.cross_entropy(logits, y).item(), f"{name}_accuracy": accuracy}


class Clock:
    """Measures the seconds that each part of a run takes.

    A GPU runs asynchronously: the CPU's clock would only show how long launching its kernels took.
    CUDA events are recorded by the GPU itself, between its kernels; nothing waits for them.
    """

    def __init__(self, device, start):
        self.device, self.marks = device, []
        self.mark("start")  # on a GPU, this creates the CUDA context
        self.seconds = {"start-up": time.perf_counter() - start}

    def mark(self, part):
        """End a part of the run here; the next one begins."""
        now = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def read(self):
        """Return {part: seconds} since the last read, having added them to self.seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the CPU waits until the GPU has reached the last mark
        latest = {}
        for (_, begin), (part, end) in pairwise(self.marks):
            gpu = self.device.type == "cuda"
            passed = begin.elapsed_time(end) / 1000 if gpu else end - begin
            latest[part] = latest.get(part, 0.0) + passed
            self.seconds[part] = self.seconds.get(part, 0.0) + passed
        self.marks = self.marks[-1:]
        return latest


# ---------- training ----------
def setup_device(args):
    """Return the torch.device; replace "auto" in args.device and args.dtype by what is there."""
    has_gpu = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    if args.device == "cuda" and not has_gpu:
        raise argparse.ArgumentTypeError("--device cuda: torch finds no GPU here; use --device cpu")
    if args.dtype == "auto":  # bfloat16 where the hardware has it: emulated, it would be slow
        if args.device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = torch.cpu.get_capabilities()
            native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        args.dtype = "bfloat16" if native else "float32"
    return torch.device(args.device)


def autocast(args):
    """Return the context of mixed precision: convolutions and matrix products run in --dtype.

    bfloat16 has the range of float32, so that gradients need no loss scaling, but only 8 bits of
    precision: the parameters stay float32, or small updates would be rounded away.
    """
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def print_times(seconds, n_iters):
    """Print the table of where the time went, from {part: seconds}."""
    total = sum(seconds.values())
    print(f"{'part':12s} {'seconds':>8s} {'share':>6s} {'ms/iteration':>13s}")
    for part, passed in seconds.items():
        per_iter = f"{1000 * passed / n_iters:13.2f}" if part in ITERATION else ""
        print(f"{part:12s} {passed:8.2f} {passed / total:6.1%} {per_iter}")
    print(f"{'total':12s} {total:8.2f} {1:6.1%}")


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
    device = setup_device(args)
    clock = Clock(device, start)
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args, device)
    if args.batch_size > len(train_set):
        problem = f"--batch_size {args.batch_size} exceeds the {len(train_set)} training images"
        raise argparse.ArgumentTypeError(problem)
    pixels = train_set.tensors[0] / 255
    # Inputs of mean 0 and variance 1, as the initialization assumes. The test images have no say.
    stats = pixels.mean(), pixels.std()  # tensors on the device
    train_eval = TensorDataset(*train_set[:2000])  # enough for a curve; evaluation takes time, too
    batches = minibatches(args, train_set, stats)
    # channels_last (NHWC): a pixel's channels lie side by side, as fast convolutions read them.
    model = ResNet(args.n_channel, args.n_layer, 10).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args, model)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": name}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))
    clock.mark("start-up")

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            latest = clock.read()
            record = {"iter": iter_num, "seconds": sum(clock.seconds.values())}
            record["learning_rate"] = schedule(args, iter_num)
            if iter_num > 0:
                n_iters = (iter_num - 1) % args.eval_interval + 1  # since the last evaluation
                total = sum(latest[part] for part in ITERATION)
                record |= {f"{part}_ms": 1000 * latest[part] / n_iters for part in ITERATION}
                record["data_share"] = latest["data"] / total
                record["images_per_second"] = n_iters * args.batch_size / total
            record |= evaluate(args, model, train_eval, stats, "train")
            record |= evaluate(args, model, test_set, stats, "test")
            log_metrics(args, record)
            # Not every minibatch's loss: to read it, the CPU would have to wait for the GPU.
            bar.set_postfix(loss=f"{record['train_loss']:.4f}", refresh=False)
            clock.mark("evaluation")
            if iter_num == args.max_iters:
                break

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        clock.mark("data")
        with autocast(args):
            logits = model(x)
        # Label smoothing: the target probability stays below 1, so logits need not grow forever.
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        clock.mark("forward")
        optimizer.zero_grad()
        loss.backward()
        clock.mark("backward")
        for group in optimizer.param_groups:
            group["lr"] = schedule(args, iter_num)
        optimizer.step()
        clock.mark("update")

    clock.read()
    print_times(clock.seconds, args.max_iters)
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
    flag("--shift", type=number(float, 0, 27), default=2, help="augmentation: pixels each way")
    flag("--rotate", type=number(float, 0, 180), default=10, help="augmentation: degrees each way")
    flag("--scale", type=number(float, 0, 0.9), default=0.1, help="augmentation: 0.1 is +-10%%")
    flag("--batch_size", type=number(int, 1), default=256, help="examples per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=number(int, 1), default=1, help="residual blocks per stage")
    flag("--n_channel", type=number(int, 1), default=32, help="channels of the first stage")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=0.4, help="peak of the schedule")
    flag("--warmup_iters", type=number(int, 0), default=400, help="at most max_iters / 5")
    flag("--weight_decay", type=number(float, 0), default=5e-4, help="usually 1e-4 to 5e-4")
    flag("--label_smoothing", type=number(float, 0, 1), default=0.1, help="usually 0 to 0.2")
    flag("--max_iters", type=number(int, 1), default=3000, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=750, help="iterations per evaluation")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fastest")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        train(parse_args())
    except torch.OutOfMemoryError:
        print("train.py: error: out of GPU memory: lower --batch_size", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
