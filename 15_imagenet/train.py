"""Step 15: ImageNet, a run of days that may be killed at any moment.

Parent:  14_resnet_gpu
New:     list_images, decode, shrink, pack_images, random_crop, middle_crop, crop, Images,
         image_stats, leave_group, load_batches, conv, shortcut, Basic, Bottleneck, update_ema,
         save_checkpoint, read_checkpoint, load_checkpoint, catch_signals, predict
Changed: load_data, minibatches, augment, ResNet, make_optimizer, evaluate, start_run, train,
         parse_args
Gone:    download, Block

A million photographs do not fit on a device, so processes decode them ahead of it: the first run
packs them, shrunk, into one file, which makes decoding several times faster. The checkpoint holds
whatever the next iteration depends on, and all that is random depends on the seed and the iteration
alone: a killed run that is resumed ends with the same weights, bit for bit, as one left in peace
(compiled for a GPU: but for rounding).

Try:     --recipe tiny --data_dir TINY_IMAGENET (minutes on a CPU), then kill -9 it and
         --init_from resume
Source:  He et al. 2016, "Deep residual learning for image recognition"; its recipe as in
         Goyal et al. 2017 (1706.02677), Touvron et al. 2019 (train small, test larger, 1906.06423),
         Wightman et al. 2021 (2110.00476).
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.io import decode_image, encode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize, resized_crop
from tqdm import tqdm

from plot import plot_run

ITERATION = ("data", "forward", "backward", "update")  # the parts of an iteration
# Residual blocks a stage, for every --depth.
LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# ---------- data ----------


def list_images(args, split):
    """Return the class folders (synsets) of a split and its images as pairs (file, label)."""
    folder = args.data_dir / split
    try:
        tree = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError:
        if not folder.is_dir():
            fail(
                f"--data_dir: no {folder}, where {split}/SYNSET/*.JPEG of ImageNet (image-net.org)"
                " belong; python tests/standins.py DIR makes stand-ins in DIR/imagenet"
            )
        fail(
            f"--data_dir: {folder} has no class folders; move every image into {folder}/SYNSET/"
            " (for ImageNet: run soumith/imagenetloader.torch's valprep.sh inside it)"
        )
    return tree.classes, tree.samples


def decode(data):
    """Decode an image file (its bytes as uint8) to RGB (3, H, W), upright, whatever its mode.

    torchvision 0.29 calls its decoder deprecated, silently: torchcodec's would be one more package.
    """
    return decode_image(torch.as_tensor(data), mode="RGB", apply_exif_orientation=True)


def shrink(image, size):
    """Return an image (file, label) as a JPEG, shorter side at most size; b"" if it is broken."""
    try:
        data = np.fromfile(image[0], np.uint8)
        pixels = decode(data)  # (3, H, W)
        if 0 < size < min(pixels.shape[1:]):
            pixels = resize(pixels, size, antialias=True)
        elif data[0] == 0xFF:  # a JPEG, and small enough: recompressing would only blur it
            return data.tobytes()
        return encode_jpeg(pixels, quality=90).numpy().tobytes()
    except (OSError, RuntimeError, ValueError):
        return b""


def pack_images(args, split):
    """Put a split's shrunk JPEGs into one file, once; return that file, its index, the synsets.

    Row i of the index is the place where image i ends in the file, and its label. A packing that
    was killed goes on where it was. Broken images are named and left out; over 0.1% is an error.
    """
    name = f"{args.data_dir.resolve().name}_{split}_{args.pack_size}"
    pack, index, tree = (args.cache_dir / f"{name}.{end}" for end in ("jpegs", "index", "sha256"))
    synsets, images = list_images(args, split)
    files = "".join(path.removeprefix(str(args.data_dir)) for path, _ in images)
    sha256 = hashlib.sha256(files.encode()).hexdigest()
    try:
        if not tree.exists() or tree.read_text() != sha256:  # begin anew
            args.cache_dir.mkdir(parents=True, exist_ok=True)
            for path, text in ((pack, ""), (index, ""), (tree, sha256)):
                path.write_text(text)
    except OSError as error:
        fail(f"--cache_dir {args.cache_dir}: {error}")
    rows = np.fromfile(index, np.int64, index.stat().st_size // 16 * 2).reshape(-1, 2)
    rows = rows[rows[:, 0] <= pack.stat().st_size]
    if len(rows) < len(images):
        end = int(rows[-1, 0]) if len(rows) else 0
        os.truncate(pack, end)
        os.truncate(index, rows.nbytes)
        todo = images[len(rows) :]
        jpegs = DataLoader(  # one by one: its processes call collate_fn on an item of todo
            todo,
            batch_size=None,
            num_workers=args.num_workers,
            collate_fn=partial(shrink, size=args.pack_size),
            worker_init_fn=leave_group,
        )
        bar = tqdm(jpegs, f"packing {split}", len(images), initial=len(rows), disable=None)
        with open(pack, "ab") as pack_file, open(index, "ab") as index_file:
            for jpeg, (path, label) in zip(bar, todo):
                if not jpeg:
                    tqdm.write(f"broken image, left out: {path}")
                end += len(jpeg)
                pack_file.write(jpeg)
                index_file.write(np.array([end, label]).tobytes())
        rows = np.fromfile(index, np.int64).reshape(-1, 2)
    broken = np.flatnonzero(np.diff(rows[:, 0], prepend=0) == 0)
    if len(broken) > len(rows) / 1000:
        tree.unlink()  # a repaired folder is packed anew
        fail(f"--data_dir: {len(broken)} of {len(rows)} broken, the first {images[broken[0]][0]}")
    return pack, np.delete(rows, broken, axis=0), synsets


def random_crop(height, width, min_scale, rng):
    """Return the box (top, left, height, width) of a crop of random place, area and aspect."""
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return middle_crop(height, width, 1)


def middle_crop(height, width, fraction):
    """Return the box of the middle square whose side is a fraction of the shorter side."""
    side = round(fraction * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side


def crop(args, image, key):
    """Cut an image (3, H, W) as key alone decides; key None, for evaluation, takes the middle."""
    if key is None:
        size, box = args.test_size, middle_crop(*image.shape[1:], args.test_crop)
    else:
        size = args.train_size
        box = random_crop(*image.shape[1:], args.min_scale, random.Random(key))
    image = resized_crop(image, *box, [size, size], antialias=True)  # (3, size, size)
    if key is not None and args.trivial_augment:
        torch.manual_seed(key)
        image = v2.TrivialAugmentWide()(image)
    return image


class Images(Dataset):
    """Item (i, key) is image i after crop with that key, uint8 (3, size, size), and its label."""

    def __init__(self, args, pack, rows):
        self.args, self.pack, self.rows = args, pack, rows
        self.file = None  # the memory map: opened in the process that reads

    def __getitem__(self, item):
        i, key = item
        if self.file is None:
            self.file = np.memmap(self.pack, mode="c")
        image = decode(self.file[self.rows[i - 1, 0] if i else 0 : self.rows[i, 0]])
        return crop(self.args, image, key), int(self.rows[i, 1])


def load_data(args):
    """Return the training and the validation images, and the name of every label."""
    train_pack, train_rows, synsets = pack_images(args, "train")
    test_pack, test_rows, test_synsets = pack_images(args, "val")
    if synsets != test_synsets:
        fail(f"--data_dir: train/ and val/ of {args.data_dir} hold different class folders")
    if not len(test_rows):
        fail(f"--data_dir: no images in {args.data_dir}/val")
    if args.batch_size > len(train_rows):
        fail(f"--batch_size {args.batch_size} is over the {len(train_rows)} training images")
    words = {}  # the list that comes with ImageNet, or with Tiny ImageNet, if it is there
    for path in (args.data_dir / "LOC_synset_mapping.txt", args.data_dir / "words.txt"):
        if path.exists():
            words |= dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    names = [f"{synset} {words.get(synset, '')}".strip() for synset in synsets]
    return Images(args, train_pack, train_rows), Images(args, test_pack, test_rows), names


def image_stats(device):
    """Return the mean and the standard deviation of ImageNet's colours, each (3, 1, 1)."""
    stats = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
    return stats[:, :, None, None].unbind()


def normalise(x, stats):
    """Return pixels x, 0 to 1, with the mean and the standard deviation of stats taken out."""
    mean, std = stats
    return (x - mean) / std


def minibatches(args, images, iter_num):
    """Yield without end the batches [(image, key)], from iteration iter_num on.

    Order and keys depend on --seed and the epoch alone, so a resumed run finds its place.
    """
    while True:
        n = len(images.rows)
        epoch, k = divmod(iter_num, n // args.batch_size)
        rng = np.random.default_rng([args.seed, epoch])
        items = list(zip(rng.permutation(n).tolist(), rng.integers(2**62, size=n).tolist()))
        for i in range(k * args.batch_size, n - args.batch_size + 1, args.batch_size):
            yield items[i : i + args.batch_size]
            iter_num += 1


def leave_group(worker):
    """Take a decoding process out of the reach of Ctrl-C; the main process ends it by SIGTERM."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load_batches(args, images, batches):
    """Return an iterator over the decoded batches: x uint8 (B, 3, H, W) and y (B,)."""
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=args.num_workers,
        worker_init_fn=leave_group,
        pin_memory=args.device == "cuda",
        generator=torch.Generator(),  # so that the loader draws nothing from torch's global one
    )
    return iter(loader)


def augment(args, x, y, stats, n_classes):
    """Mirror half of the images x (B, 3, H, W), normalise all, mix them in pairs if asked to."""
    mirror = torch.rand(len(x), device=x.device) < 0.5
    x = torch.where(mirror[:, None, None, None], x.flip(3), x)
    x = normalise(x / 255, stats)
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=n_classes) for kind, alpha in kinds if alpha > 0]
    if mixes:
        x, y = mixes[torch.randint(len(mixes), ())](x, y)
    return x.contiguous(memory_format=torch.channels_last), y


# ---------- model ----------


def conv(n_in, n_out, size, stride=1):
    """Return a convolution that keeps the image's size (divided by stride); a norm is its bias."""
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=False)


def shortcut(n_in, n_out, stride):
    """Return the identity where x has y's shape already, else a 1x1 convolution that gives it."""
    if n_in == n_out and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))


class Basic(nn.Module):
    """x plus two 3x3 convolutions of it (depth 18 and 34)."""

    def __init__(self, n_in, n, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n, 3, stride), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = conv(n, n, 3), nn.BatchNorm2d(n)
        self.downsample = shortcut(n_in, n, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, n, H/stride, W/stride)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """x plus a 3x3 convolution between two 1x1; v1.5 strides in the 3x3 (depth 50 and 101)."""

    def __init__(self, n_in, n, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n, 1), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = conv(n, n, 3, stride), nn.BatchNorm2d(n)
        self.conv3, self.bn3 = conv(n, 4 * n, 1), nn.BatchNorm2d(4 * n)
        self.downsample = shortcut(n_in, 4 * n, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, n, H, W)
        y = F.relu(self.bn2(self.conv2(y)))  # (B, n, H/stride, W/stride)
        y = self.bn3(self.conv3(y))  # (B, 4n, H/stride, W/stride)
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet v1.5 (He et al. 2015) with torchvision's parameter names.

    Shapes: B images, C classes, H and W the image's sides. small_stem, for images of 64 pixels,
    halves the image once before the first block, not twice.
    """

    def __init__(self, depth, n_classes, small_stem=False):
        super().__init__()
        block, expand = (Basic, 1) if depth < 50 else (Bottleneck, 4)
        self.conv1 = conv(3, 64, 3, 2) if small_stem else conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        n_in = 64
        for i, n_layer in enumerate(LAYERS[depth]):
            n, stride = 64 << i, 1 if i == 0 else 2
            blocks = [block(n_in, n, stride)]
            n_in = n * expand
            blocks += [block(n_in, n, 1) for _ in range(n_layer - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(n_in, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (B, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, n, H/32, W/32)
        return self.fc(x.mean((2, 3)))  # (B, C)


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
    """Return SGD with Nesterov momentum; filters and matrices decay, norms and biases do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, 0.0, 0.9, weight_decay=args.weight_decay, nesterov=True, fused=True
    )


def schedule(args, iter_num):
    """Return the learning rate of an iteration: a linear warm-up, then half a cosine to 0."""
    if iter_num < args.warmup_iters:
        return args.learning_rate * (iter_num + 1) / args.warmup_iters
    done = (iter_num - args.warmup_iters) / (args.max_iters - args.warmup_iters)
    return args.learning_rate * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def update_ema(ema, model, decay):
    """Move the averaged model a step towards the model, its norms' running statistics too."""
    for average, value in zip(ema.state_dict().values(), model.state_dict().values()):
        if value.is_floating_point():
            average.lerp_(value, 1 - decay)


# ---------- evaluation ----------


@torch.no_grad()
def evaluate(args, model, images, stats):
    """Return val_loss (nats), top1 and top5 over all the images, each counted once."""
    model.eval()
    items = [(i, None) for i in range(len(images.rows))]
    batches = [items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    sums = torch.zeros(3, dtype=torch.float64, device=stats[0].device)
    for x, y in load_batches(args, images, batches):
        x, y = (tensor.to(sums.device, non_blocking=True) for tensor in (x, y))
        with autocast(args):
            logits = model(normalise(x / 255, stats)).float()  # (B, C)
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    model.train()
    return dict(zip(("val_loss", "top1", "top5"), (sums / len(items)).tolist()))


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


# ---------- checkpoint ----------


def save_checkpoint(path, parts, state):
    """Write the state_dict of every part, the plain numbers in `state` and the random generators.

    Written beside, forced to disk and renamed: whoever kills the run leaves the old file or the
    new one, whole.
    """
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"state": state, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state()
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_checkpoint(path):
    """Return the checkpoint in a file."""
    if not path.is_file():
        fail(f"there is no {path}: a run with --init_from scratch leaves it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint.keys() >= {"state", "rng"}
    except Exception:  # torch.load raises many kinds, one for every way a file can be damaged
        fail(f"{path} is not a whole checkpoint of this step")
    return checkpoint


def load_checkpoint(path, parts):
    """Put a checkpoint back into the parts and the random generators; return its `state`."""
    checkpoint = read_checkpoint(path)
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (LookupError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            fail(f"{path} is of another shape ({name}: {reason})")
    torch.set_rng_state(checkpoint["rng"])
    if torch.cuda.is_available() and "cuda_rng" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    return checkpoint["state"]


def catch_signals():
    """Return an event that SIGTERM or Ctrl-C sets: the loop then saves and leaves."""
    stop = threading.Event()

    def ask(number, frame):
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


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


def start_run(args, device, iter_num):
    """Make out_dir and args.json; keep of metrics.jsonl what was so at iter_num."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    metrics = args.out_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if iter_num and metrics.is_file() else []
    metrics.write_text("".join(line for line in lines if json.loads(line)["iter"] <= iter_num))
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


def train(args, stop=None):
    """Run the whole step, or until stop is set; return the last record of metrics.jsonl."""
    device = setup_device(args)
    torch.backends.cudnn.deterministic = True  # the same sums, also in a resumed run
    clock = Clock(device)
    train_set, test_set, names = load_data(args)
    torch.manual_seed(args.seed)  # after load_data: a loader that packs draws a random number, too
    stats = image_stats(device)
    per_epoch = len(train_set.rows) // args.batch_size
    args.max_iters = args.max_iters or max(1, round(args.epochs * per_epoch))
    args.warmup_iters = min(round(args.warmup_epochs * per_epoch), args.max_iters // 2)
    args.eval_interval = args.eval_interval or per_epoch
    model = ResNet(args.depth, len(names), args.small_stem)
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)  # the average of the latest weights: this is what is evaluated
    compiled = compile_model(args, model)
    optimizer = make_optimizer(args, model)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    state = {"iter_num": 0, "seconds": 0.0, "loss_sum": 0.0, "best": -1.0, "record": {}}
    state["names"] = names
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    if args.init_from == "resume":
        state = load_checkpoint(last, parts)
    first, seconds_before, record = state["iter_num"], state["seconds"], state["record"]
    start_run(args, device, first)
    batches = load_batches(args, train_set, minibatches(args, train_set, first))
    loss_sum = torch.tensor(state["loss_sum"], device=device)
    clock.mark("start-up")
    since, since_iter = clock.read(), first

    bar = tqdm(range(first, args.max_iters + 1), disable=None, initial=first, total=args.max_iters)
    for iter_num in bar:
        stopping = stop is not None and stop.is_set()
        evaluating = iter_num % args.eval_interval == 0 or iter_num == args.max_iters
        if stopping or (evaluating and iter_num != record.get("iter")):
            seconds = clock.read()
            state |= {"iter_num": iter_num, "loss_sum": loss_sum.item()}
            state["seconds"] = seconds_before + sum(seconds.values())
            if not math.isfinite(state["loss_sum"]):
                fail(f"loss not finite at iteration {iter_num}: {args.learning_rate=}")
            if stopping:
                save_checkpoint(last, parts, state)
                print(f"stopped at iteration {iter_num}: --init_from resume goes on from there")
                break
            record = {"iter": iter_num, "seconds": state["seconds"]}
            record["learning_rate"] = schedule(args, iter_num)
            if iter_num > 0:
                record["train_loss"] = state["loss_sum"] / ((iter_num - 1) % args.eval_interval + 1)
            if iter_num > since_iter:
                passed = {part: seconds[part] - since.get(part, 0.0) for part in ITERATION}
                n_iters, whole = iter_num - since_iter, sum(passed.values())
                record["data_share"] = passed["data"] / whole
                record["images_per_second"] = n_iters * args.batch_size / whole
            record |= evaluate(args, ema, test_set, stats)
            clock.mark("evaluation")
            since, since_iter = clock.read(), iter_num
            log_metrics(args, record)
            plot_run(args.out_dir)
            state |= {"loss_sum": 0.0, "record": record}
            state["seconds"] = seconds_before + sum(since.values())
            if record["top1"] > state["best"]:
                state["best"] = record["top1"]
                save_checkpoint(best, parts, state)
            save_checkpoint(last, parts, state)
            loss_sum.zero_()
            clock.mark("checkpoint")
        if iter_num == args.max_iters:
            break

        x, y = next(batches)
        torch.manual_seed((args.seed << 32) + iter_num)
        x, y = (tensor.to(device, non_blocking=True) for tensor in (x, y))
        x, y = augment(args, x, y, stats, len(names))
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
        update_ema(ema, model, min(args.ema_decay, (iter_num + 1) / (iter_num + 10)))
        loss_sum += loss.detach()
        clock.mark("update")

    if iter_num == args.max_iters:
        print_times(clock.read(), max(1, iter_num - first))
        print(f"top-1 {record['top1']:.2%}, top-5 {record['top5']:.2%}, {record['seconds']:.0f} s")
        print(f"picture: {plot_run(args.out_dir)}")
    return record


@torch.no_grad()
def predict(args):
    """Print the five most likely classes of every image in --predict, after out_dir/best.pt."""
    device = setup_device(args)
    path = args.out_dir / "best.pt"
    names = load_checkpoint(path, {})["names"]
    model = ResNet(args.depth, len(names), args.small_stem)
    load_checkpoint(path, {"ema": model})
    model.to(device).eval()
    stats = image_stats(device)
    for file in args.predict:
        try:
            image = decode(np.fromfile(file, np.uint8))
        except (OSError, RuntimeError, ValueError):
            fail(f"--predict {file}: not an image that can be read")
        x = crop(args, image, None)[None]  # (1, 3, H, W)
        shares = model(normalise(x.to(device) / 255, stats)).softmax(1)[0]  # (C,)
        top = shares.topk(min(5, len(names)))
        best = (f"{share:.1%} {names[i]}" for share, i in zip(top.values, top.indices))
        print(f"{file}: {', '.join(best)}")


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


# What --recipe sets, unless a flag says otherwise.
RECIPES = {
    "90": {},
    "100": {"epochs": 100, "train_size": 160, "test_crop": 0.95, "mixup": 0.1, "cutmix": 1.0},
    "600": {"epochs": 600, "weight_decay": 2e-5, "test_crop": 0.965, "ema_decay": 0.99998}
    | {"mixup": 0.2, "cutmix": 1.0, "trivial_augment": True},
    "tiny": {"epochs": 16, "train_size": 48, "test_size": 64, "test_crop": 1.0, "min_scale": 0.25}
    | {"depth": 18, "small_stem": True, "batch_size": 128, "learning_rate": 0.5}
    | {"warmup_epochs": 2, "weight_decay": 1e-3, "ema_decay": 0.99},
}
RECIPE_HELP = """90 epochs (published: 76.1 to 77.2%%), 100 at 160 pixels (78.1%%, with LAMB and
binary cross-entropy), 600 (80.9%%, with random erasing and repeated augmentation), or tiny,
for 64-pixel images on a CPU; each sets other defaults for the flags"""


def parse_args(argv=None):
    """Return the flags of the command line (or of argv), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = Path(__file__).resolve().parent
    flag = parser.add_argument_group("data").add_argument
    data_dir = Path(os.environ.get("DATA_DIR", here.parent / "data")) / "imagenet"
    flag("--data_dir", type=Path, default=data_dir, help="folder that holds train/ and val/")
    flag("--cache_dir", type=Path, help="for the packed images; None: cache/ in --data_dir")
    flag("--pack_size", type=number(int, 0), default=256, help="shorter side, packed; 0: as it is")
    flag("--batch_size", type=number(int, 1), default=1024, help="images in a minibatch, in all")
    flag("--train_size", type=number(int, 8), default=176, help="pixels a side in training")
    flag("--test_size", type=number(int, 8), default=224, help="pixels a side in evaluation")
    flag("--test_crop", type=number(float, 0.1, 1), default=0.875, help="share of a side it sees")
    flag("--min_scale", type=number(float, 1e-3, 1), default=0.08, help="least area of a crop")
    flag("--trivial_augment", action="store_true", help="distort every image in one random way")
    flag("--mixup", type=number(float, 0), default=0.0, help="alpha, 0.1 to 0.2; 0: no mixup")
    flag("--cutmix", type=number(float, 0), default=0.0, help="alpha, usually 1; 0: no cutmix")
    flag = parser.add_argument_group("model").add_argument
    flag("--depth", type=int, choices=list(LAYERS), default=50, help="layers with weights")
    flag("--small_stem", action="store_true", help="halve once, not twice: 64-pixel images")
    flag("--init_from", choices=("scratch", "resume"), default="scratch", help="out_dir/last.pt")
    flag("--predict", nargs="+", type=Path, metavar="FILE", help="name what out_dir/best.pt sees")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--recipe", choices=list(RECIPES), default="90", help=RECIPE_HELP)
    flag("--epochs", type=number(float, 0), default=90, help="passes over the training images")
    flag("--max_iters", type=number(int, 0), default=0, help="instead of --epochs, if not 0")
    flag("--learning_rate", type=number(float, 1e-9), default=2.0, help="0.5 per 256 in a batch")
    flag("--warmup_epochs", type=number(float, 0), default=5, help="at most half of the run")
    flag("--weight_decay", type=number(float, 0), default=5e-5, help="of filters and matrices")
    flag("--label_smoothing", type=number(float, 0, 1), default=0.1, help="shared by all classes")
    flag("--ema_decay", type=number(float, 0, 1), default=0.9999, help="0: evaluate last weights")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 0), default=0, help="iterations; 0: an epoch")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--num_workers", type=number(int, 0, 512), default=os.cpu_count(), help="that decode")
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPU if any")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fastest")
    flag("--compile", action="store_true", help="pays in runs much longer than the default")
    args = parser.parse_known_args(argv)[0]
    parser.set_defaults(**RECIPES[args.recipe])
    args = parser.parse_args(argv)
    args.cache_dir = args.cache_dir or args.data_dir / "cache"
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        predict(args) if args.predict else train(args, catch_signals())
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except torch.OutOfMemoryError:
        fail(f"--batch_size {args.batch_size} does not fit into the GPU's memory")
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
