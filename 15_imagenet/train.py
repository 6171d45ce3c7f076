"""Step 15: ImageNet, a run of days that may be killed at any moment.

Parent:  14_resnet_gpu
New:     list_images, decode, shrink, pack_images, crop, PackedImages, worker_init, load_batches,
         conv, shortcut, BasicBlock, Bottleneck, compile_model, update_ema, write_file,
         save_checkpoint, read_checkpoint, load_checkpoint, lock_folder, open_out_dir,
         catch_signals, accumulate_gradients
Changed: load_data, minibatches, augment, ResNet, make_optimizer, schedule, evaluate, train,
         parse_args
Gone:    Block, Clock, print_times

A million photographs do not fit into a GPU's memory: worker processes decode and crop them ahead of
the training loop (data_share is the share of time that it still waits for them). The first run
packs them, resized, into one file, which makes decoding several times faster. A checkpoint holds
all that the next iteration depends on, and the random numbers of an iteration depend on nothing but
the seed and its number: a run that is killed and resumed ends with the weights of an uninterrupted
one, bit for bit on a CPU, up to rounding on a GPU. predict.py classifies images with the best
checkpoint.

Each --recipe follows a published one. Listed are its top-1 accuracy and what it does differently
(besides reading the original images). Only tiny, for 64-pixel images on a CPU, has been run here:
90       76.1% (torchvision V1): 224 pixels, learning rate 0.1 per 256 images, divided by 10 every
         30 epochs, weight decay 1e-4 of all parameters, plain momentum, no label smoothing, no EMA
100      78.1% (Wightman et al. 2021, A3): LAMB, binary cross-entropy, RandAugment, no label
         smoothing, no EMA
600      80.9% (torchvision V2): plain momentum, repeated augmentation

Try:     --recipe tiny --data_dir TINY_IMAGENET (minutes on a CPU), then kill -9 it and
         --recipe tiny --data_dir TINY_IMAGENET --init_from resume
Source:  He et al. 2016, "Deep residual learning for image recognition"; Goyal et al. 2017 (large
         minibatches, warm-up); Touvron et al. 2019, "Fixing the train-test resolution discrepancy";
         Wightman et al. 2021, "ResNet strikes back"; Polyak and Juditsky 1992 (averaged weights).
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import copy
import fcntl
import hashlib
import json
import math
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.io import decode_image, encode_jpeg
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2.functional import center_crop, resize, resized_crop, to_dtype
from tqdm import tqdm

from plot import plot_run

# Residual blocks per stage, for every --depth.
N_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Mean and standard deviation of red, green and blue in ImageNet, (2, 3, 1, 1).
STATS = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]


# ---------- data ----------
def list_images(args, split):
    """Return the classes (folder names) of a split and its images, pairs (file, label)."""
    folder = args.data_dir / split
    try:
        tree = ImageFolder(folder)
    except FileNotFoundError as error:  # no such folder, no class folders, or an empty one
        raise OSError(
            f"--data_dir: {error}; image-net.org's images belong in {folder}/CLASS/ "
            "(soumith/imagenetloader.torch's valprep.sh sorts those of val/); for stand-ins in "
            "DIR/imagenet: python tests/standins.py DIR"
        ) from error
    return tree.classes, tree.samples


def decode(data):
    """Decode an image file, its bytes as uint8, to RGB (3, H, W) uint8, rotated as EXIF says."""
    # torchvision deprecates this function, but torchcodec would be one more package to install.
    image = decode_image(torch.as_tensor(data), mode="RGB", apply_exif_orientation=True)
    if image.ndim != 3:
        raise ValueError("an animation")
    return to_dtype(image, torch.uint8, scale=True)  # a 16-bit PNG is decoded to uint16


def shrink(image, size):
    """Return an image (file, label) as a JPEG, shorter side at most size; b"" if it is broken."""
    try:
        data = np.fromfile(image[0], np.uint8)
        pixels = decode(data)  # (3, H, W)
        if 0 < size < min(pixels.shape[1:]):
            pixels = resize(pixels, size)
        elif data[0] == 0xFF:  # already a small JPEG: compressing it again would only lose detail
            return data.tobytes()
        return encode_jpeg(pixels, quality=90).numpy().tobytes()
    except (OSError, RuntimeError, ValueError):
        return b""


def pack_images(args, split, images):
    """Pack a split's images, resized, into one file, once; return the file and its index (N, 2).

    Row i of the index is the offset where image i ends in the file, and its label. Packing that was
    killed is continued. Broken images are reported and left out; more than 0.1% are an error.
    """
    stats = [(os.path.abspath(path), os.stat(path)) for path, _ in images]
    # With sizes and times in its name: a pack of images that have been replaced is not used.
    files = repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    name = f"{split}_{args.pack_size}_{hashlib.sha256(files.encode()).hexdigest()[:16]}"
    pack, index = (args.cache_dir / f"{name}.{suffix}" for suffix in ("jpegs", "index"))
    try:
        args.cache_dir.mkdir(parents=True, exist_ok=True)
        pack_file, index_file = open(pack, "ab"), open(index, "ab")
    except OSError as error:
        raise OSError(f"--cache_dir {args.cache_dir}: {error}") from error
    with pack_file, index_file:
        fcntl.flock(pack_file, fcntl.LOCK_EX)  # another run that packs the same images waits here
        rows = np.fromfile(index, np.int64, index.stat().st_size // 16 * 2).reshape(-1, 2)
        rows = rows[rows[:, 0] <= pack.stat().st_size]  # a kill may have cut the pack short
        end = int(rows[-1, 0]) if len(rows) else 0
        pack_file.truncate(end)
        index_file.truncate(rows.nbytes)
        todo = images[len(rows) :]
        jpegs = DataLoader(  # its worker processes call collate_fn on single items of todo
            todo,
            batch_size=None,
            num_workers=args.num_workers if todo else 0,
            collate_fn=partial(shrink, size=args.pack_size),
            worker_init_fn=worker_init,
        )
        silent = None if todo else True
        bar = tqdm(jpegs, f"packing {split}", len(images), initial=len(rows), disable=silent)
        for jpeg, (path, label) in zip(bar, todo):
            if not jpeg:
                tqdm.write(f"broken image, left out: {path}")
            end += len(jpeg)
            pack_file.write(jpeg)
            index_file.write(np.array([end, label]).tobytes())
    rows = np.fromfile(index, np.int64).reshape(-1, 2)
    broken = np.flatnonzero(np.diff(rows[:, 0], prepend=0) == 0)
    if len(broken) > len(rows) / 1000:
        index.unlink(missing_ok=True)  # the next run packs anew: by then the images may be repaired
        problem = f"{len(broken)} of {len(rows)} images are broken"
        raise OSError(f"--data_dir: {problem}, the first is {images[broken[0]][0]}")
    return pack, np.delete(rows, broken, axis=0)


def crop(args, image, key):
    """Return a resized crop of image (3, H, W): random with seed key, or central if key is None."""
    if key is None:
        side = round(args.test_crop * min(image.shape[1:]))
        return resize(center_crop(image, side), [args.test_size, args.test_size])
    torch.default_generator.manual_seed(key)  # faster than torch.manual_seed: only the CPU's
    # A box (top, left, height, width) with random position, area and aspect ratio.
    box = RandomResizedCrop.get_params(image, (args.min_scale, 1), (3 / 4, 4 / 3))
    image = resized_crop(image, *box, [args.train_size, args.train_size])  # (3, size, size)
    if args.trivial_augment:
        image = v2.TrivialAugmentWide()(image)
    if args.random_erase:
        image = v2.RandomErasing(args.random_erase)(image)  # a random rectangle becomes black
    return image


class PackedImages(Dataset):
    """Item (i, key) is image i after crop with that key, uint8 (3, size, size), and its label."""

    def __init__(self, args, pack, rows):
        self.args, self.pack, self.rows = args, pack, rows
        self.file = None  # a memory map, opened by each worker process for itself

    def __getitem__(self, item):
        i, key = item
        if self.file is None:
            self.file = np.memmap(self.pack, mode="c")
        start, (end, label) = self.rows[i - 1, 0] if i else 0, self.rows[i]
        return crop(self.args, decode(self.file[start:end]), key), int(label)


def load_data(args):
    """Return the training and the validation PackedImages, and the name of every class."""
    classes, train_images = list_images(args, "train")
    val_classes, val_images = list_images(args, "val")
    if classes != val_classes:
        raise OSError(f"--data_dir: train/ and val/ of {args.data_dir} differ in class folders")
    train_set = PackedImages(args, *pack_images(args, "train", train_images))
    val_set = PackedImages(args, *pack_images(args, "val", val_images))
    if args.batch_size > (n := len(train_set.rows)):
        problem = f"--batch_size {args.batch_size} exceeds the {n} training images"
        raise argparse.ArgumentTypeError(problem)
    values = 3 * (args.train_size**2 + args.test_size**2)  # evaluation starts its own workers
    shared = 2 * args.num_workers * args.batch_size * values  # bytes: two minibatches per worker
    if os.path.isdir("/dev/shm") and shared > shutil.disk_usage("/dev/shm").free:
        problem = f"/dev/shm has no room for {shared / 2**30:.1f} GiB of decoded minibatches"
        raise OSError(f"{problem}: lower --num_workers, or give docker a larger --shm-size")
    words = {}  # class folder to class name, from the file that comes with (Tiny) ImageNet, if any
    for path in (args.data_dir / "LOC_synset_mapping.txt", args.data_dir / "words.txt"):
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        words |= dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    names = [f"{name} {words.get(name, '')}".strip() for name in classes]
    return train_set, val_set, names


def normalize(x, stats):
    """Return pixels x, 0 to 1, normalized with stats, the training set's (mean, std)."""
    mean, std = stats
    return (x - mean) / std


def minibatches(args, images, iter_num):
    """Yield minibatches, lists of items (i, key) of images, forever, from iteration iter_num on."""
    while True:
        n = len(images.rows)
        # The epoch's order and keys depend on the seed and the epoch alone: a resumed run needs
        # neither the state of a generator nor the epoch's earlier minibatches.
        epoch, k = divmod(iter_num, n // args.batch_size)
        rng = np.random.default_rng([args.seed, epoch])
        items = np.stack([rng.permutation(n), rng.integers(2**62, size=n)], axis=1)  # (n, 2)
        for i in range(k * args.batch_size, n - args.batch_size + 1, args.batch_size):
            yield items[i : i + args.batch_size].tolist()
            iter_num += 1


def worker_init(worker_id):
    """Put a worker process into its own group: Ctrl-C in the terminal reaches the parent only."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent process ends it


def load_batches(args, images, batches):
    """Return an iterator over the decoded minibatches: x uint8 (B, 3, H, W) and y (B,)."""
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=args.num_workers,
        worker_init_fn=worker_init,
        pin_memory=args.device == "cuda",  # page-locked memory: copied while the GPU computes
    )
    return iter(loader)


def augment(args, x, y, stats, n_classes):
    """Flip half of the images x (B, 3, H, W), normalize all; mixup or CutMix makes y (B, C)."""
    flip = torch.rand(len(x), device=x.device) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    x = normalize(x / 255, stats)
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=n_classes) for kind, alpha in kinds if alpha > 0]
    if mixes:  # each blends, or pastes together, pairs of images and likewise their labels
        x, y = mixes[torch.randint(len(mixes), ())](x, y)
    return x.contiguous(memory_format=torch.channels_last), y


# ---------- model ----------
def conv(n_in, n_out, size, stride=1):
    """Return a convolution that divides height and width by stride; batch norm follows: no bias."""
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=False)


def shortcut(n_in, n_out, stride):
    """Return the identity or, where the residual has another shape than x, a 1x1 convolution."""
    if n_in == n_out and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (depth 18 and 34)."""

    def __init__(self, n_in, n, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n, 3, stride), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = conv(n, n, 3), nn.BatchNorm2d(n)
        self.downsample = shortcut(n_in, n, stride)
        nn.init.zeros_(self.bn2.weight)  # every block starts as its shortcut

    def forward(self, x):
        residual = F.relu(self.bn1(self.conv1(x)))  # (B, n, H/stride, W/stride)
        residual = self.bn2(self.conv2(residual))
        return F.relu(self.downsample(x) + residual)


class Bottleneck(nn.Module):
    """Residual block whose 3x3 convolution sees a quarter of the channels (depth 50 and 101).

    Two 1x1 convolutions reduce and restore them. In v1.5 the stride is the 3x3 convolution's.
    """

    def __init__(self, n_in, n, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n, 1), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = conv(n, n, 3, stride), nn.BatchNorm2d(n)
        self.conv3, self.bn3 = conv(n, 4 * n, 1), nn.BatchNorm2d(4 * n)
        self.downsample = shortcut(n_in, 4 * n, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x):
        residual = F.relu(self.bn1(self.conv1(x)))  # (B, n, H, W)
        residual = F.relu(self.bn2(self.conv2(residual)))  # (B, n, H/stride, W/stride)
        residual = self.bn3(self.conv3(residual))  # (B, 4n, H/stride, W/stride)
        return F.relu(self.downsample(x) + residual)


class ResNet(nn.Module):
    """Maps images x (B, 3, H, W) to logits (B, C): ResNet v1.5, parameters named as torchvision's.

    small_stem, for images of 64 pixels, halves the image once before the first block, not twice.
    """

    def __init__(self, depth, n_classes, small_stem=False):
        super().__init__()
        block, expansion = (BasicBlock, 1) if depth < 50 else (Bottleneck, 4)
        self.conv1 = conv(3, 64, 3, 2) if small_stem else conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        n_in = 64
        for i, n_blocks in enumerate(N_BLOCKS[depth]):
            n, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks = [block(n_in, n, stride)]
            n_in = n * expansion
            blocks += [block(n_in, n, 1) for _ in range(n_blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(n_in, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (B, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, n, H/32, W/32)
        return self.fc(x.mean(dim=(2, 3)))  # global average pooling, then (B, C)


def compile_model(args, model):
    """Return the model compiled if --compile asks for it; without a compiler, as it is."""
    if not args.compile:
        return model
    try:  # compilation happens at the first call: try it on a small function
        torch.compile(lambda x: x + 1)(torch.ones(1, device=args.device))
    except Exception as error:  # no C++ compiler, no Triton, an old GPU, ...
        print(f"--compile falls back to eager mode: {error!r:.100}")
        return model
    return torch.compile(model)


# ---------- optimizer ----------
def make_optimizer(args, model):
    """Return SGD with Nesterov momentum and weight decay, the latter without biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups,
        lr=0.0,  # train sets it before every update
        momentum=0.9,
        weight_decay=args.weight_decay,
        nesterov=True,
        fused=True,  # one kernel updates all parameters, instead of several for each tensor
    )


def schedule(args, iter_num):
    """Return an iteration's learning rate: linear warm-up, then cosine decay to 0 (one cycle)."""
    # The linear scaling rule (Goyal et al. 2017): the learning rate grows with the batch size.
    peak = args.learning_rate * args.batch_size / 256
    warmup_iters = min(args.warmup_iters, args.max_iters // 5)
    if iter_num < warmup_iters:
        return peak * (iter_num + 1) / warmup_iters
    progress = (iter_num - warmup_iters) / (args.max_iters - warmup_iters)  # 0 to 1
    return peak * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_ema(averages, values, decay):
    """Update an exponential moving average (EMA): average = decay * average + (1 - decay) * value.

    Averaging over many iterations cancels the noise of SGD, as a falling learning rate does.
    """
    torch._foreach_lerp_(averages, values, 1 - decay)  # all tensors in a few kernels


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(args, model, images, stats):
    """Return val_loss (nats), top1 and top5 (fractions) over all images, each counted once."""
    model.eval()  # batch norm uses its running averages, and leaves them as they are
    items = [(i, None) for i in range(len(images.rows))]
    batches = [items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    sums = torch.zeros(3, dtype=torch.float64, device=stats.device)
    for x, y in load_batches(args, images, batches):
        x, y = (tensor.to(sums.device, non_blocking=True) for tensor in (x, y))
        with autocast(args):
            logits = model(normalize(x / 255, stats)).float()  # (B, C)
        correct = logits.topk(min(5, logits.shape[1])).indices == y[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([loss, correct[:, 0].sum(), correct.sum()])
    model.train()
    return dict(zip(("val_loss", "top1", "top5"), (sums / len(items)).tolist()))


# ---------- checkpoint ----------
def write_file(path, write):
    """Call write(file) on a new file, flush it to disk and rename it to path.

    At every moment path has either its old content or all of the new one.
    """
    temporary = path.with_name("unfinished.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        with open(temporary, "xb") as file:  # x: a new file, never one that a link points to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error!r:.100})") from error


def save_checkpoint(path, parts, state):
    """Save the state_dict of every part and the plain values in state.

    Random number generators need not be saved: train seeds them anew in every iteration.
    """
    checkpoint = {name: part.state_dict() for name, part in parts.items()} | {"state": state}
    write_file(path, partial(torch.save, checkpoint))


def read_checkpoint(path, template):
    """Return the checkpoint in a file; its state must have the keys and types of template."""
    if not path.is_file():
        raise OSError(f"{path} is missing: a run with --init_from scratch writes it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state"]
        assert all(type(state[key]) is type(value) for key, value in template.items())
    except Exception as error:  # torch.load raises many types, one for every kind of damage
        raise OSError(f"{path} is damaged, or no checkpoint of this step") from error
    return checkpoint


def load_checkpoint(path, parts, template):
    """Load a checkpoint into the parts; return its state, which is like template."""
    checkpoint = read_checkpoint(path, template)
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (LookupError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise OSError(f"{path} is of another model or optimizer ({name}: {reason})") from error
    return checkpoint["state"]


def lock_folder(folder):
    """Create a folder if it is missing, and lock it until this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"{folder}: another process is writing there") from error


def open_out_dir(args, device, logs, log_sizes):
    """Lock out_dir and write args.json; checkpoints there are an error without --overwrite.

    Logs are cut to their sizes at the checkpoint: a resumed run writes the rest again.
    """
    old = [] if args.init_from == "resume" else sorted(args.out_dir.glob("*.pt"))
    if old and not args.overwrite:
        raise OSError(f"--out_dir: {old[-1]} would be lost; add --init_from resume or --overwrite")
    lock_folder(args.out_dir)
    for path in old:
        path.unlink()
    for log, size in zip(logs, log_sizes):
        if log.exists() and log.stat().st_size > size:
            os.truncate(log, size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": name}
    text = json.dumps(vars(args) | versions, default=str)
    write_file(args.out_dir / "args.json", lambda file: file.write(text.encode()))


def catch_signals(signals):
    """Let SIGTERM and Ctrl-C append their number to signals: the loop then saves and ends."""

    def on_signal(number, frame):
        if number == signal.SIGINT and number in signals:
            sys.exit(130)  # a second Ctrl-C ends the run at once; a second SIGTERM may not
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


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


def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def accumulate_gradients(args, model, x, y, stats, n_classes):
    """Add up a minibatch's gradients, one micro-batch at a time; return its mean loss.

    Backward needs the activations of every layer: for ResNet-50, 27 MB in bfloat16 per image of
    176 pixels. Batch norm sees one micro-batch, whose size must not depend on the GPU's memory.
    """
    batch_size, loss = len(x), torch.zeros((), device=x.device)
    for micro_batch in zip(x.split(args.micro_batch_size), y.split(args.micro_batch_size)):
        x, y = augment(args, *micro_batch, stats, n_classes)
        with autocast(args):
            logits = model(x)
        # Label smoothing: target probabilities below 1, so logits need not grow forever.
        micro_loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        micro_loss = micro_loss * len(x) / batch_size
        micro_loss.backward()
        loss += micro_loss.detach()
    return loss


def train(args, signals=None):
    """Run the whole step; return the last record of metrics.jsonl.

    If signals is a list, SIGTERM and Ctrl-C make the run save a checkpoint and end.
    """
    start = time.perf_counter()
    device = setup_device(args)
    train_set, val_set, names = load_data(args)
    torch.manual_seed(args.seed)  # after load_data: packing draws a random number, too
    stats = STATS.to(device)
    iters_per_epoch = len(train_set.rows) // args.batch_size
    args.max_iters = args.max_iters or max(1, round(args.epochs * iters_per_epoch))
    args.warmup_iters = round(args.warmup_epochs * iters_per_epoch)
    args.eval_interval = args.eval_interval or iters_per_epoch
    model = ResNet(args.depth, len(names), args.small_stem)
    # channels_last (NHWC): a pixel's channels lie side by side, as fast convolutions read them.
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)  # the averaged model is the one that is evaluated
    averages = [tensor for tensor in ema.state_dict().values() if tensor.is_floating_point()]
    values = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    compiled = compile_model(args, model)
    optimizer = make_optimizer(args, model)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    state = {"iter_num": 0, "seconds": 0.0, "best": -1.0, "record": {}, "log_sizes": []}
    state |= {"names": names, "loss_sum": torch.zeros((), device=device)}
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    logs = [args.out_dir / "metrics.jsonl"]
    if args.init_from == "resume":
        state = load_checkpoint(last, parts, state)
    start_iter, record = state["iter_num"], state["record"]
    if state["names"] != names:
        raise OSError(f"--data_dir {args.data_dir}: {last} was trained on other classes")
    if start_iter > args.max_iters:
        problem = f"{last} is at iteration {start_iter}, past the end at {args.max_iters}"
        raise argparse.ArgumentTypeError(f"{problem}: raise --epochs or --max_iters")
    state["args"] = {k: getattr(args, k) for k in ("depth", "small_stem", "test_size", "test_crop")}
    if args.eval_only:
        record = {"iter": start_iter, **evaluate(args, ema, val_set, stats)}
        print("  ".join(f"{key} {value:.5g}" for key, value in record.items()))
        return record
    start -= state["seconds"]  # of the runs before this one
    open_out_dir(args, device, logs, state["log_sizes"])
    batches = load_batches(args, train_set, minibatches(args, train_set, start_iter))
    state["loss_sum"] = state["loss_sum"].to(device)  # a checkpoint is loaded to the CPU
    waited, since = 0.0, time.perf_counter()
    if signals is not None:
        catch_signals(signals)

    iters = range(start_iter, args.max_iters + 1)
    bar = tqdm(iters, total=args.max_iters, initial=start_iter, disable=None)
    for iter_num in bar:
        state |= {"iter_num": iter_num, "seconds": time.perf_counter() - start}
        if signals:
            if state["loss_sum"].isfinite():  # otherwise the last good checkpoint is kept
                save_checkpoint(last, parts, state)
            print(f"stopped at iteration {iter_num}; --init_from resume continues from {last}")
            break
        eval_due = iter_num % args.eval_interval == 0 or iter_num == args.max_iters
        last_eval = record.get("iter")
        if eval_due and iter_num != last_eval:
            record = {"iter": iter_num, "seconds": state["seconds"]}
            record["learning_rate"] = schedule(args, iter_num)
            if iter_num > 0:
                record["train_loss"] = state["loss_sum"].item() / (iter_num - last_eval)
            if iter_num > start_iter:
                n_iters, passed = iter_num - max(start_iter, last_eval), time.perf_counter() - since
                record["data_share"] = waited / passed  # the CPU waited; a GPU may have computed
                record["images_per_second"] = n_iters * args.batch_size / passed
            record |= evaluate(args, ema, val_set, stats)
            log_metrics(args, record)
            plot_run(args.out_dir)
            state["log_sizes"] = [log.stat().st_size for log in logs]
            state |= {"record": record, "seconds": time.perf_counter() - start}
            state["loss_sum"].zero_()
            if record["top1"] > state["best"]:
                state["best"] = record["top1"]
                save_checkpoint(best, parts, state)
            save_checkpoint(last, parts, state)
            waited, since = 0.0, time.perf_counter()
        if iter_num == args.max_iters:
            break

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        before = time.perf_counter()
        x, y = next(batches)
        waited += time.perf_counter() - before
        torch.manual_seed(args.seed * 1_000_003 + iter_num)  # the same numbers in a resumed run
        x, y = (tensor.to(device, non_blocking=True) for tensor in (x, y))
        optimizer.zero_grad()
        loss = accumulate_gradients(args, compiled, x, y, stats, len(names))
        if iter_num % 100 == 0:  # not always: to read the loss, the CPU has to wait for the GPU
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        for group in optimizer.param_groups:
            group["lr"] = schedule(args, iter_num)
        optimizer.step()
        # A shorter average at first: it soon forgets the random initialization.
        update_ema(averages, values, min(args.ema_decay, (iter_num + 1) / (iter_num + 10)))
        state["loss_sum"] += loss

    if record.get("iter") == args.max_iters:
        print(f"top-1 {record['top1']:.2%}, top-5 {record['top5']:.2%}, {record['seconds']:.0f} s")
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


RECIPES = {  # the defaults that --recipe changes; the docstring at the top gives their sources
    "90": {},
    "100": {"epochs": 100, "train_size": 160, "test_crop": 0.95, "mixup": 0.1, "cutmix": 1.0},
    "600": {"epochs": 600, "learning_rate": 0.125, "weight_decay": 2e-5, "ema_decay": 0.999966}
    | {"test_crop": 0.965, "mixup": 0.2, "cutmix": 1.0, "trivial_augment": True}
    | {"random_erase": 0.1},
    "tiny": {"epochs": 32, "train_size": 32, "test_size": 32, "test_crop": 0.875, "min_scale": 0.25}
    | {"depth": 18, "small_stem": True, "batch_size": 128, "learning_rate": 1.0}
    | {"warmup_epochs": 2, "weight_decay": 1e-3, "ema_decay": 0.99},
}


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("data").add_argument
    data_dir = Path(os.environ.get("DATA_DIR", Path(__file__).parents[1] / "data")) / "imagenet"
    flag("--data_dir", type=Path, default=data_dir, help="directory that holds train/ and val/")
    flag("--cache_dir", type=Path, help="for the packed images; None: cache/ in --data_dir")
    flag("--pack_size", type=number(int, 0), default=256, help="pixels of the shorter side; 0: any")
    flag("--batch_size", type=number(int, 2), default=1024, help="images per minibatch")
    flag("--micro_batch_size", type=number(int, 2), default=256, help="images per backward pass")
    flag("--train_size", type=number(int, 8), default=176, help="height and width in training")
    flag("--test_size", type=number(int, 8), default=224, help="height and width in evaluation")
    flag("--test_crop", type=number(float, 0.1, 1), default=0.875, help="share of the shorter side")
    flag("--min_scale", type=number(float, 1e-3, 1), default=0.08, help="least area of a crop")
    flag("--trivial_augment", action="store_true", help="one random TrivialAugment per image")
    flag("--random_erase", type=number(float, 0, 1), default=0.0, help="probability, usually 0.1")
    flag("--mixup", type=number(float, 0), default=0.0, help="alpha, usually 0.1 to 0.4; 0: off")
    flag("--cutmix", type=number(float, 0), default=0.0, help="alpha, usually 1; 0: off")
    flag = parser.add_argument_group("model").add_argument
    flag("--depth", type=int, choices=list(N_BLOCKS), default=50, help="layers with weights")
    flag("--small_stem", action="store_true", help="first convolution 3x3, for 64-pixel images")
    flag("--init_from", choices=("scratch", "resume"), default="scratch", help="resume: last.pt")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--recipe", choices=list(RECIPES), default="90", help="its settings become the defaults")
    flag("--epochs", type=number(float, 0), default=90, help="passes over the training images")
    flag("--max_iters", type=number(int, 0), default=0, help="if not 0, replaces --epochs")
    flag("--learning_rate", type=number(float, 0), default=0.5, help="peak per 256 images")
    flag("--warmup_epochs", type=number(float, 0), default=5, help="at most a fifth of the run")
    flag("--weight_decay", type=number(float, 0), default=5e-5, help="usually 2e-5 to 1e-4")
    flag("--label_smoothing", type=number(float, 0, 1), default=0.1, help="usually 0 to 0.2")
    flag("--ema_decay", type=number(float, 0, 1), default=0.9999, help="0: no averaged weights")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_only", action="store_true", help="only evaluate out_dir/last.pt")
    flag("--eval_interval", type=number(int, 0), default=0, help="in iterations; 0: every epoch")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag("--overwrite", action="store_true", help="delete the checkpoints of an earlier run there")
    flag = parser.add_argument_group("system").add_argument
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    n_workers = min(16, len(cpus))  # a worker's minibatches take shared memory
    flag("--num_workers", type=number(int, 0, 512), default=n_workers, help="decoding processes")
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fastest")
    flag("--compile", action="store_true", help="use torch.compile; pays in long runs")
    parser.set_defaults(**RECIPES[parser.parse_known_args(argv)[0].recipe])
    args = parser.parse_args(argv)
    if args.batch_size % args.micro_batch_size == 1:
        problem = f"leaves one image of --batch_size {args.batch_size}: batch norm needs two"
        parser.error(f"--micro_batch_size {args.micro_batch_size} {problem}")
    args.cache_dir = args.cache_dir or args.data_dir / "cache"
    args.init_from = "resume" if args.eval_only else args.init_from
    return args


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # cuDNN tries several kernels, keeps the fastest
    signals = []
    try:
        train(parse_args(), signals)
    except torch.OutOfMemoryError:
        problem = "out of GPU memory: lower --micro_batch_size or --batch_size"
        print(f"train.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    if signals:
        sys.exit(128 + signals[0])  # by convention: 130 after Ctrl-C, 143 after SIGTERM
