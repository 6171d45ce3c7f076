"""Images per second and core: step 15's loader and a PIL DataLoader, on full-size photographs.

    python tests/benchmarks/imagenet_loader.py IMAGENET [--size 224] [--repeats 5]

IMAGENET is a folder with train/ and val/. Both make random resized crops and count the last,
incomplete minibatch. The PIL one is what pytorch/examples' imagenet does: ImageFolder,
RandomResizedCrop, flip, ToTensor, Normalize. One process, one thread; the two take turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from steps import load_step
from table import row

BATCH = 64


def images_per_second(loader, n):
    """Return images per second over one epoch, from the first request to the last minibatch."""
    start = time.perf_counter()
    seen = sum(len(x) for x, _ in loader)
    assert seen == n
    return n / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="IMAGENET")
    parser.add_argument("--size", type=int, default=224, help="height and width of a crop")
    parser.add_argument("--repeats", type=int, default=5)
    own = parser.parse_args()
    torch.set_num_threads(1)
    step = load_step("15")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    crop, flip = transforms.RandomResizedCrop(own.size), transforms.RandomHorizontalFlip()
    transform = [crop, flip, transforms.ToTensor(), transforms.Normalize(mean, std)]
    pil = ImageFolder(own.folder / "train", transforms.Compose(transform))
    n = len(pil)
    with tempfile.TemporaryDirectory() as cache:
        sets, packing = {}, {}
        for pack_size in (0, 256):
            flags = ["--data_dir", own.folder, "--cache_dir", cache, "--pack_size", pack_size]
            flags += ["--train_size", own.size, "--num_workers", 0]
            args = step.parse_args([str(flag) for flag in flags])
            start = time.perf_counter()
            images = step.list_images(args, "train")[1]
            pack, rows = step.pack_images(args, "train", images)
            packing[pack_size] = len(rows) / (time.perf_counter() - start)
            sets[pack_size] = step.PackedImages(args, pack, rows)
        items = [(i, key) for key, i in enumerate(np.random.default_rng(0).permutation(n).tolist())]
        batches = [items[i : i + BATCH] for i in range(0, n, BATCH)]

        def ours(pack_size, workers=0):
            epochs = batches * (10 if workers else 1)  # or starting the processes would dominate
            return DataLoader(sets[pack_size], batch_sampler=epochs, num_workers=workers)

        def theirs(workers=0):
            return DataLoader(pil, batch_size=BATCH, shuffle=True, num_workers=workers)

        def threads(n_threads):
            with ThreadPool(n_threads) as pool:
                start = time.perf_counter()
                for batch in batches:
                    torch.stack([x for x, _ in pool.map(sets[256].__getitem__, batch)])
                return n / (time.perf_counter() - start)

        ways = {
            "PIL DataLoader": lambda: images_per_second(theirs(), n),
            "step 15, full size": lambda: images_per_second(ours(0), n),
            "step 15, packed at 256": lambda: images_per_second(ours(256), n),
            "packed, 2 threads": lambda: threads(2),
            "packed, 2 processes": lambda: images_per_second(ours(256, 2), 10 * n),
        }
        speeds = {name: [] for name in ways}
        for _ in range(own.repeats + 1):
            for name, run in ways.items():
                speeds[name].append(run())
    base = statistics.median(speeds["PIL DataLoader"][1:])  # the first round warms up
    print(f"{n} images at {own.size}, {own.repeats} rounds; packing at 256: {packing[256]:.0f}/s")
    print(f"{'loader':24s} {'ratio':>6s} {'images/s':>9s} {'min':>7s} {'max':>7s}")
    for name, values in speeds.items():
        median, low, high = statistics.median(values[1:]), min(values[1:]), max(values[1:])
        print(f"{name:24s} {median / base:6.2f} {median:9.0f} {low:7.0f} {high:7.0f}")
    for name in ("step 15, full size", "step 15, packed at 256"):
        median = statistics.median(speeds[name][1:])
        row(f"images/s on a core, {name} and a PIL DataLoader", median, base)
    if torch.cuda.is_available():
        from torchvision.io import decode_jpeg

        raw = [torch.from_numpy(np.fromfile(path, np.uint8)) for path, _ in pil.samples]
        decode_jpeg(raw[:BATCH], device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(0, n, BATCH):
            decode_jpeg(raw[i : i + BATCH], device="cuda")
        torch.cuda.synchronize()
        per_second = n / (time.perf_counter() - start)
        print(f"nvJPEG, lists of {BATCH}, full size, decoding alone: {per_second:.0f}/s")


if __name__ == "__main__":
    main()
