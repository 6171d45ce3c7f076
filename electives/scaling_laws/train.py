"""Elective scaling_laws: how the loss falls with parameters, data and compute.

Parent:  09_mnist_convnet
New:     distort, count_params, count_flops, average, stop_early, mean_curve, PowerLaw,
         compute_optimal, train_network, run_once, save_fits
Changed: load_data, augment, ConvNet, train, parse_args
Gone:    OptaxOptimizer, log_metrics

Small networks are trained on rotated and distorted digits, and straight lines on log axes (power
laws) are fitted to their test losses: L(N) for N parameters, L(D) for D training images, L(C) for
a compute budget C that is spent on a network of the best size, and N(C) for that size. The laws
then say which network a larger budget should train, and predict its loss before it is trained. How
far off is the prediction? L(C) has an irreducible loss, which no model can go below and which
flattens the curve: fitted to budgets up to half of the largest, it predicts the loss of the largest
to 0.3%, while a straight line is 4% too low. This is why the law of the default run has it. With
seeds 1 to 3, which did not choose it, the largest loss is 5.1% above the prediction, and 8.5% above
a straight line.

Try:     --quick (a minute; why does it predict worse?), --dropout 0.2, --growth 10
Source:  Kaplan et al. 2020, "Scaling laws for neural language models"; Hoffmann et al. 2022,
         "Training compute-optimal large language models" (approach 2: the best N per budget).
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
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST
from tqdm import tqdm

from plot import plot_run


# ---------- data ----------
def load_data(args):
    """Return MNIST's training and test TensorDataset: normalized images x (1, 14, 14), label y."""
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
        # Half the resolution costs a quarter of the compute: more networks fit into the time.
        datasets.append((F.avg_pool2d(x[:, None] / 255, 2), y))  # x (N, 1, 14, 14), 0 to 1
    # Mean 0 and variance 1, the scale that the initialization preserves; from training images only.
    mean, std = datasets[0][0].mean(), datasets[0][0].std()
    return [TensorDataset((x - mean) / std, y) for x, y in datasets]


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    loader = DataLoader(dataset, batch_size, shuffle=True)
    while True:
        yield from loader


def augment(x, angle, distortion):
    """Rotate the images x (B, 1, H, W) by up to angle degrees each way, and distort them smoothly.

    distortion is the standard deviation, in pixels, of how far a point moves in each direction.
    """
    angles = math.radians(angle) * (2 * torch.rand(len(x)) - 1)  # (B,)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(x))
    rotations = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    # The grid holds the place in x from which each pixel is read, in coordinates from -1 to 1.
    grid = F.affine_grid(rotations, x.shape, align_corners=False)  # (B, H, W, 2)
    # A grid of 4 x 4 points moves at random; the moves of the pixels between are interpolated.
    moves = distortion * 2 / x.shape[-1] * torch.randn(len(x), 2, 4, 4)
    moves = F.interpolate(moves, x.shape[2:], mode="bicubic", align_corners=True)  # (B, 2, H, W)
    grid = grid + moves.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def distort(dataset, args):
    """Return a TensorDataset with every image of a dataset augmented once."""
    x, y = dataset.tensors
    return TensorDataset(augment(x, args.angle, args.distortion), y)


# ---------- model ----------
class ConvNet(nn.Module):
    """Maps images x (B, 1, 14, 14) to logits (B, C); all layers scale with the width w."""

    def __init__(self, width, n_classes, dropout):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, width, 5, padding=2)
        self.conv_2 = nn.Conv2d(width, 2 * width, 5, padding=2)
        self.hidden = nn.Linear(2 * width * 3 * 3, 8 * width)
        self.out = nn.Linear(8 * width, n_classes)
        self.dropout = nn.Dropout(dropout)  # zeroes this fraction of its input in training
        for param in self.parameters():
            nn.init.zeros_(param)
        for layer in (self.conv_1, self.conv_2, self.hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan_in

    def forward(self, x):
        # Pooling first gives the same result, and relu has a quarter of the work.
        x = F.relu(F.max_pool2d(self.conv_1(x), 2))  # (B, w, 7, 7)
        x = F.relu(F.max_pool2d(self.conv_2(x), 2))  # (B, 2w, 3, 3)
        x = self.dropout(F.relu(self.hidden(x.flatten(1))))  # (B, 8w)
        return self.out(x)  # (B, C)


def count_params(width):
    """Return N, the number of parameters of a network."""
    return sum(param.numel() for param in ConvNet(width, 10, 0).parameters())


def count_flops(width):
    """Return the floating-point operations of training, per image (after Kaplan et al. 2020)."""
    # A weight is used once per position of its layer's output, for one multiplication and one
    # addition. The backward pass takes twice that: gradients of the inputs and of the weights.
    positions = {"conv_1": 14 * 14, "conv_2": 7 * 7, "hidden": 1, "out": 1}
    model = ConvNet(width, 10, 0)
    return 6 * sum(n * getattr(model, layer).weight.numel() for layer, n in positions.items())


# ---------- optimizer ----------
def average(mean, param, n_averaged):
    """Return the mean of a parameter over all updates, the t-th weighted by about t**8."""
    # Two thirds of the weight are on the latest ninth of the updates. The averaged network has a
    # low loss at any time, not only at the end of a learning rate decay: one run has the losses of
    # all shorter ones. (Polynomial-decay averaging: Shamir and Zhang 2013, "Stochastic gradient
    # descent for non-smooth optimization".)
    return mean + (param - mean) * 9 / (n_averaged + 9)


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(model, dataset, name):
    """Return {name}_loss, in nats, and {name}_accuracy, a fraction, on a TensorDataset."""
    model.eval()  # no dropout
    x, y = dataset.tensors
    logits = torch.cat([model(chunk) for chunk in x.split(200)])  # (N, C), chunks to save memory
    model.train()
    accuracy = (logits.argmax(dim=1) == y).float().mean().item()
    return {f"{name}_loss": F.cross_entropy(logits, y).item(), f"{name}_accuracy": accuracy}


def stop_early(curve):
    """Return the record of a learning curve with the lowest validation loss."""
    # The test loss, which is reported, takes no part in the choice.
    return min(curve, key=lambda record: record["val_loss"])


def mean_curve(curves):
    """Return the learning curve of the geometric mean test loss of several seeds."""
    losses = np.exp(np.mean([[np.log(r["test_loss"]) for r in curve] for curve in curves], axis=0))
    return [record | {"test_loss": loss} for record, loss in zip(curves[0], losses)]


class PowerLaw:
    """The law y = floor + scale * x**exponent, fitted to points (x, y).

    The floor is the irreducible loss; without one it is 0: a straight line on log axes.
    """

    def __init__(self, points, has_floor=False):
        self.points, self.has_floor = np.array(points), has_floor  # (n, 2)
        x, y = self.points.T
        floors = y.min() * np.arange(0, 1, 0.01 if has_floor else 1)  # (F,), to choose from
        # For each floor, y - floor is a straight line on log axes: least squares.
        exponents, log_scales = np.polyfit(np.log(x), np.log(y[:, None] - floors), 1)  # (F,) each
        fits = floors + np.exp(log_scales) * x[:, None] ** exponents  # (n, F)
        errors = np.square(np.log(fits / y[:, None])).sum(axis=0)  # (F,)
        best = errors.round(12).argmin()  # the lowest of equally good floors
        self.floor, self.exponent = floors[best], exponents[best]
        self.scale = np.exp(log_scales[best])

    def __call__(self, x):
        return self.floor + self.scale * x**self.exponent

    def interval(self):
        """Return the bootstrap 95% confidence interval of the exponent.

        It is too narrow for L(C) and N(C), whose points come from the same networks.
        """
        # How much does the exponent vary over samples of the points, drawn with replacement?
        n = len(self.points)
        samples = self.points[np.random.default_rng(0).integers(n, size=(1000, n))]  # (1000, n, 2)
        samples = [s for s in samples if np.ptp(s[:, 0]) > 0]  # one x alone has no slope
        laws = [PowerLaw(s, self.has_floor) for s in samples]
        return np.quantile([law.exponent for law in laws], [0.025, 0.975])


def compute_optimal(curves):
    """Return points (C, best N, its loss), for compute budgets C down to 1/16 of the largest.

    curves: a learning curve per width, a list of dicts with n_params, flops and test_loss.
    """
    points, edges = [], []
    largest = max(record["flops"] for curve in curves for record in curve)
    # On smaller budgets warm-up is a large part of training: the loss is no power law there.
    for log_c in np.log(largest) - np.log(2) / 2 * np.arange(9):
        log_n, log_loss = [], []
        for curve in curves:
            log_flops = np.log([record["flops"] for record in curve])
            log_losses = np.log([record["test_loss"] for record in curve])
            if log_flops[0] <= log_c <= log_flops[-1] + 1e-3:  # equal but for rounding
                log_n.append(np.log(curve[0]["n_params"]))
                log_loss.append(np.interp(log_c, log_flops, log_losses))
        if len(log_n) > 2:
            # At equal compute, too small a network learns too little, and too large a one sees too
            # few images: a parabola fitted to the losses has its minimum in between (IsoFLOP).
            parabola = np.polynomial.Polynomial.fit(log_n, log_loss, 2)
            sizes = np.linspace(min(log_n), max(log_n), 1001)
            best = sizes[parabola(sizes).argmin()]
            inside = sizes[0] < best < sizes[-1]  # else the minimum may lie beyond these widths
            (points if inside else edges).append(np.exp([log_c, best, parabola(best)]))
    return points if len(points) > 1 else points + edges


# ---------- training ----------
WIDTHS = (2, 3, 4, 5, 6, 8, 12, 16)
LONGEST_WIDTH = 6  # wider networks train for fewer updates, with the same compute as this one
N_IMAGES = (500, 1000, 2000, 4000, 8000)  # training images, for L(D)
AMPLE_WIDTH = 12  # of the networks for L(D), which are limited by the number of images


def train_network(args, datasets, width, n_images, max_iters, seed):
    """Train one network; return its learning curve, a list of dicts, one per evaluation.

    With n_images > 0, as many images are distorted once and seen again and again, until the network
    overfits; with 0, every minibatch of the training set is distorted anew: ample data.
    """
    n_params, flops = count_params(width), count_flops(width) * args.batch_size  # per update
    torch.manual_seed(seed)
    train_set, val_set, test_set = datasets
    if n_images:
        chosen = torch.randperm(len(train_set))[:n_images]
        train_set = distort(TensorDataset(*train_set[chosen]), args)
    batches = minibatches(train_set, args.batch_size)
    model = ConvNet(width, 10, args.dropout)
    averaged = AveragedModel(model, avg_fn=average)
    optimizer = torch.optim.Adam(model.parameters())
    eval_iters = {round(max_iters / 2 ** (k / 2)) or 1 for k in range(11)}  # even on a log axis
    curve = []

    bar = tqdm(range(max_iters + 1), total=max_iters, disable=None, leave=False)
    for iter_num in bar:
        if iter_num in eval_iters:
            record = {"iter": iter_num, "n_params": n_params, "flops": flops * iter_num}
            record |= evaluate(averaged, val_set, "val") | evaluate(averaged, test_set, "test")
            if not all(map(math.isfinite, record.values())):
                problem = f"the loss is no longer finite at iteration {iter_num}"
                raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
            curve.append(record)
            if iter_num == max_iters or (n_images and stop_early(curve) in curve[:-2]):
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        logits = model(x if n_images else augment(x, args.angle, args.distortion))
        loss = F.cross_entropy(logits, y)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        # The inverse square root schedule depends on no final iteration. Wider layers have more
        # inputs, and need a lower learning rate.
        warmup = (iter_num + 1) / args.warmup_iters
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate / width**0.5 * min(warmup, warmup**-0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    return curve


def run_once(args, datasets, width, n_images, max_iters, seed):
    """Return train_network's learning curve, read from runs/ if this run was finished before."""
    names = "angle distortion batch_size dropout learning_rate warmup_iters seed".split()
    settings = {name: getattr(args, name) for name in names}
    path = args.out_dir / "runs" / f"w{width}_d{n_images}_i{max_iters}_s{seed}.json"
    if path.exists() and (run := json.loads(path.read_text()))["settings"] == settings:
        return run["curve"]
    curve = train_network(args, datasets, width, n_images, max_iters, seed)
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps({"settings": settings, "curve": curve}))
    path.with_suffix(".tmp").replace(path)  # if the write is interrupted, no half a file is left
    last = stop_early(curve)
    tqdm.write(f"{path.stem}: test loss {last['test_loss']:.4f} after {last['iter']} updates")
    return curve


def save_fits(points, laws, curves, path):
    """Draw points and laws on log axes into the PNG file path, and the largest run as a star."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    labels = {
        "L(N)": ("parameters N", "test loss (nats)"),
        "L(D)": ("training images D", "test loss (nats)"),
        "L(C)": ("compute C (FLOPs)", "test loss (nats)"),
        "N(C)": ("compute C (FLOPs)", "best number of parameters N"),
    }
    for axis, (name, (xlabel, ylabel)) in zip(figure.subplots(2, 2).flat, labels.items()):
        law, x = laws[name], [x for x, _ in points[name]]
        if name == "L(C)":
            for curve in curves.values():
                flops = [record["flops"] for record in curve]
                losses = [record["test_loss"] for record in curve]
                axis.plot(flops, losses, color="gray", linewidth=0.5, alpha=0.5)
            x.append(flops[-1])
            axis.plot(x[-1], losses[-1], "r*", markersize=12, label="largest run, not fitted")
        axis.loglog(*zip(*points[name]), "o", markersize=4)
        low, high = law.interval()
        label = f"exponent {law.exponent:.2f} ({low:.2f} to {high:.2f})"
        label += f"\nirreducible loss {law.floor:.3f}" if law.has_floor else ""
        x = np.geomspace(min(x), max(x))
        axis.plot(x, law(x), "k--", label=label)
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel)
        axis.tick_params(which="minor", labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=80)


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args)
    # Training, validation and test images come from one distribution: that of distorted digits.
    # Test images only measure the losses that the laws describe, and choose nothing.
    n_val = len(train_set) // 12
    val_set = distort(TensorDataset(*train_set[:n_val]), args)
    test_set = distort(TensorDataset(*test_set[::2]), args)  # every second one, for speed
    datasets = TensorDataset(*train_set[n_val:]), val_set, test_set
    if args.quick:
        args.max_iters, args.n_seeds = 1024, 1
    seeds = range(args.seed, args.seed + args.n_seeds)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    # The laws' points, of all seeds: (N, loss), (D, loss), (C, loss) and (C, N).
    points = {"L(N)": [], "L(D)": [], "L(C)": [], "N(C)": []}
    curves = {f"width_{width}": [] for width in WIDTHS}
    largest_flops = count_flops(LONGEST_WIDTH) * args.batch_size * args.max_iters
    for seed in seeds:
        for width in WIDTHS:
            n_updates = min(args.max_iters, largest_flops // (count_flops(width) * args.batch_size))
            curve = run_once(args, datasets, width, 0, n_updates, seed)
            curves[f"width_{width}"].append(curve)
            if n_updates == args.max_iters:
                points["L(N)"].append((count_params(width), curve[-1]["test_loss"]))
        for n_images in N_IMAGES:
            curve = run_once(args, datasets, AMPLE_WIDTH, n_images, args.max_iters, seed)
            points["L(D)"].append((n_images, stop_early(curve)["test_loss"]))
    means = {name: mean_curve(of_seeds) for name, of_seeds in curves.items()}
    for budget, n_params, loss in compute_optimal(means.values()):
        points["L(C)"].append((budget, loss))
        points["N(C)"].append((budget, n_params))
    laws = {name: PowerLaw(points[name], has_floor=name == "L(C)") for name in points}

    # The prediction is written to the disk before the largest network is trained.
    budget = args.growth * largest_flops
    log_n = math.log(laws["N(C)"](budget))
    width = min(range(1, 50), key=lambda w: abs(math.log(count_params(w)) - log_n))
    n_updates = round(budget / count_flops(width) / args.batch_size)
    final = {name: law.exponent for name, law in laws.items()}
    final |= {"flops": budget, "width": width, "predicted_loss": laws["L(C)"](budget)}
    final["irreducible_loss"] = laws["L(C)"].floor
    (args.out_dir / "prediction.json").write_text(json.dumps(final))
    print(f"prediction for {budget:.2g} FLOPs, width {width}: loss {final['predicted_loss']:.4f}")
    largest = [run_once(args, datasets, width, 0, n_updates, seed) for seed in seeds]
    means["largest"] = mean_curve(largest)
    final["measured_loss"] = means["largest"][-1]["test_loss"]

    error = final["measured_loss"] / final["predicted_loss"] - 1
    print(f"measured: {final['measured_loss']:.4f}, {error:+.1%} from the prediction; per seed:")
    print(*(f"{curve[-1]['test_loss']:.4f}" for curve in largest))
    for name, law in laws.items():
        low, high = law.interval()
        print(f"{name}: exponent {law.exponent:.3f}, 95% interval {low:.3f} to {high:.3f}")
    print(f"irreducible loss: {final['irreducible_loss']:.4f}")
    iters = sorted({point["iter"] for curve in means.values() for point in curve})
    records = [{"iter": i, "seconds": time.perf_counter() - start} for i in iters]
    for name, curve in means.items():
        losses = {point["iter"]: point["test_loss"] for point in curve}
        for record in records:
            record |= {name: losses[record["iter"]]} if record["iter"] in losses else {}
    records[-1] |= final
    lines = [json.dumps(record) + "\n" for record in records]
    (args.out_dir / "metrics.jsonl").write_text("".join(lines))
    save_fits(points, laws, means, args.out_dir / "fits.png")
    print(f"picture: {plot_run(args.out_dir)}")
    return records[-1]


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
    flag("--angle", type=number(float, 0, 180), default=30, help="maximum rotation, in degrees")
    flag("--distortion", type=number(float, 0, 14), default=0.2, help="in pixels; usually 0 to 1")
    flag("--batch_size", type=number(int, 1), default=32, help="examples per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--dropout", type=number(float, 0, 0.99), default=0, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=0.03, help="peak, at width 1")
    flag("--warmup_iters", type=number(int, 1), default=100, help="linear warm-up; usually 1-10%%")
    flag("--max_iters", type=number(int, 64), default=6000, help="parameter updates per network")
    flag("--growth", type=number(float, 1), default=3, help="compute of the largest run / others'")
    flag = parser.add_argument_group("logging").add_argument
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="first seed of the random numbers")
    flag("--n_seeds", type=number(int, 1, 100), default=3, help="networks per point")
    flag("--quick", action="store_true", help="1024 updates, one seed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small a model a second thread costs more than it gains
    try:
        train(parse_args())
    except (FloatingPointError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
