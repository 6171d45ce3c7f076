"""Steps 09, 10 and 14 beside the usual MNIST loop.

    python tests/benchmarks/mnist_time_to_accuracy.py [--epochs 2] [--only short]

The usual loop is that of pytorch/examples: a DataLoader that transforms one image after another,
minibatches of 64, two convolutions with dropout, Adadelta, a test after every epoch, 14 epochs. It
runs for --epochs of them, from which its total time is extrapolated. The steps run as their users
run them, each in its own process, and all start-up counts. Needs MNIST under --data_dir.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from table import row
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = {
    "09_mnist_convnet": "",
    "10_mnist_resnet": "",
    "14_resnet_gpu, short run": "--max_iters 650 --n_channel 16 --rotate 6 --scale 0.06"
    " --weight_decay 1e-3",
    "14_resnet_gpu": "",
}


def usual_epochs(data_dir, n_epochs):
    """Train as the usual script does; return images/s, seconds per epoch, the test accuracy."""
    to_x = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.13,), (0.31,))])
    train_set, test_set = (datasets.MNIST(data_dir, part, transform=to_x) for part in (True, False))
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    begin = time.perf_counter()
    for _ in range(n_epochs):
        model.train()
        for i, (x, y) in enumerate(DataLoader(train_set, 64, shuffle=True)):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if i % 10 == 0:
                loss.item()  # the example prints it
        model.eval()
        with torch.no_grad():
            n_correct = sum((model(x).argmax(1) == y).sum() for x, y in DataLoader(test_set, 1000))
    seconds = (time.perf_counter() - begin) / n_epochs
    return len(train_set) / seconds, seconds, n_correct.item() / len(test_set)


def first_at(records, accuracy):
    """Return the seconds at the first evaluation that reached the accuracy, as text."""
    reached = [r["seconds"] for r in records if r["test_accuracy"] >= accuracy]
    return f"{reached[0]:8.1f}" if reached else "       -"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the usual loop to run")
    parser.add_argument("--only", default="", help="run only the steps with this in their name")
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("DATA_DIR", "data"))
    bench = parser.parse_args()
    usual_speed, per_epoch, accuracy = usual_epochs(bench.data_dir, bench.epochs)
    usual, rows = 14 * per_epoch, []
    print(f"the usual loop: {usual_speed:.0f} images/s, {per_epoch:.1f} s per epoch, so")
    print(f"{usual:.0f} s for 14 ({accuracy:.2%} after the {bench.epochs} run here)")
    print(f"{'':27s} {'speed-up':>8s} {'total s':>8s} {'to 99%':>8s} {'to 99.5%':>8s}", end="")
    print(f" {'images/s':>8s} {'accuracy':>8s}")
    for name, flags in RUNS.items():
        if bench.only not in name:
            continue
        with tempfile.TemporaryDirectory() as out_dir:
            script = ROOT / name.split(",")[0] / "train.py"
            more = ["--data_dir", bench.data_dir, "--out_dir", out_dir, *flags.split()]
            begin = time.perf_counter()
            subprocess.run([sys.executable, script, *more], check=True, capture_output=True)
            total = time.perf_counter() - begin
            lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
            used = json.loads((Path(out_dir) / "args.json").read_text())
        records = [json.loads(line) for line in lines]
        print(f"{name:27s} {usual / total:7.1f}x {total:8.1f}", end=" ")
        print(first_at(records, 0.99), first_at(records, 0.995), end=" ")
        speed = used["max_iters"] * used["batch_size"] / records[-1]["seconds"]
        accuracy = records[-1]["test_accuracy"]
        print(f"{speed:8.0f} {accuracy:8.2%}", flush=True)
        rows.append((f"images/s, {name} and the usual loop", speed, usual_speed))
        rows.append((f"s to the end ({accuracy:.2%}), {name} and the usual loop", total, usual))
    for values in rows:
        row(*values)
