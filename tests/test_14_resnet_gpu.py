"""Step 14: the data stay on the device, nothing waits, and the clock tells the truth."""

import json
import math
import struct
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import watched_run
from standins import write_mnist
from steps import TINY, load_step, run_main
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock

step = load_step("14")
CPU = torch.device("cpu")


def args_for(*flags):
    return step.parse_args([str(flag) for flag in flags])


def run_flags(standins, out_dir, *more):
    flags = [*TINY["14_resnet_gpu"].split(), "--data_dir", standins, "--out_dir", out_dir, *more]
    return [str(flag) for flag in flags]


def images(n, device="cpu"):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)


# ---------- the whole training ----------


def read_mnist(folder, part):
    """Return images (N, 1, 28, 28), uint8, and labels (N,) from the files behind their headers."""
    raw = folder / "MNIST" / "raw"
    x = np.fromfile(raw / f"{part}-images-idx3-ubyte", np.uint8, offset=16)
    y = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    return torch.from_numpy(x).view(-1, 1, 28, 28), torch.from_numpy(y).long()


def as_torchvision(ours, n, n_layer):
    """Return the network as PyTorch's layers and torchvision's blocks, with the same weights."""
    layers = [nn.Conv2d(1, n, 5, 2, 2, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
    n_in = n
    for n_out in (n, 2 * n, 4 * n):
        wider = None
        if n_in < n_out:
            conv = nn.Conv2d(n_in, n_out, 1, bias=False)
            layers, wider = [*layers, nn.MaxPool2d(2)], nn.Sequential(conv, nn.BatchNorm2d(n_out))
        layers += [BasicBlock(n_in, n_out, downsample=wider)]
        layers += [BasicBlock(n_out, n_out) for _ in range(n_layer - 1)]
        n_in = n_out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * n, 10)]
    theirs = nn.Sequential(*layers)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    return theirs


def one_cycle(i, peak, warmup_iters, max_iters):
    if i < warmup_iters:
        return peak * (i + 1) / warmup_iters
    return peak * (1 + math.cos(math.pi * (i - warmup_iters) / (max_iters - warmup_iters))) / 2


def reference(args, folder):
    """Repeat the training with torchvision's network; return it, its first weights, records."""
    torch.manual_seed(args.seed)
    (x, y), test_set = read_mnist(folder, "train"), read_mnist(folder, "t10k")
    mean, std = (x / 255).mean(), (x / 255).std()
    model = step.ResNet(args.n_channel, args.n_layer, 10)
    with torch.random.fork_rng():  # new layers draw random numbers
        model = as_torchvision(model, args.n_channel, args.n_layer)
    model.to(memory_format=torch.channels_last)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    decay, records, batches = args.weight_decay, [], []
    optimizer = torch.optim.SGD(model.parameters(), 1, 0.9, nesterov=True, weight_decay=decay)
    sets = {"train": (x[:2000], y[:2000]), "test": test_set}
    for i in range(args.max_iters + 1):
        rate = one_cycle(i, args.learning_rate, args.max_iters // 5, args.max_iters)
        if i % args.eval_interval == 0 or i == args.max_iters:
            records.append({"learning_rate": rate})
            model.eval()
            for name, (pixels, labels) in sets.items():
                images, views = (pixels / 255 - mean) / std, [(0, 0), (0, 1), (0, -1), (1, 0)]
                with torch.no_grad():
                    logits = [model(images.roll(view, (2, 3))) for view in [*views, (-1, 0)]]
                logits = torch.stack(logits).mean(0)
                records[-1][f"{name}_loss"] = F.cross_entropy(logits, labels).item()
                right = logits.argmax(1) == labels
                records[-1][f"{name}_accuracy"] = right.float().mean().item()
            model.train()
        if i == args.max_iters:
            return model, first, records
        if not batches:  # an epoch of 21 minibatches of 96; 16 of them are augmented together
            order = torch.randperm(len(x))[: 21 * 96]
            for chunk in order.split(16 * 96):
                images = (step.augment(args, x[chunk] / 255) - mean) / std
                batches += zip(images.split(96), y[chunk].split(96))
        images, labels = batches.pop(0)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.2).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def test_training_is_the_loop_written_out_here(tmp_path, monkeypatch, capsys):
    """Every record and every weight, over more than an epoch of 21 minibatches."""
    write_mnist(tmp_path, n_train=2100)  # more than the 2000 of the training loss
    models, evaluate = [], step.evaluate

    def spy(args, model, *rest):
        models.append(model)
        return evaluate(args, model, *rest)

    monkeypatch.setattr(step, "evaluate", spy)
    flags = "--max_iters 23 --eval_interval 8 --batch_size 96 --n_channel 4 --n_layer 1 --seed 5"
    flags += " --learning_rate 0.02 --weight_decay 0.01 --label_smoothing 0.2 --device cpu"
    flags += " --dtype float32"
    place = ["--data_dir", tmp_path, "--out_dir", tmp_path / "out"]
    args, records = watched_run(step, *flags.split(), *place)
    assert capsys.readouterr().err == ""  # no bar in a file that the output is sent to
    model, first, expected = reference(args, tmp_path)
    assert len(records) == len(expected) == 4
    parts = ("data", "forward", "backward", "update")
    measures = {f"{part}_ms" for part in parts} | {"data_share", "images_per_second"}
    for record, known in zip(records, expected):
        assert set(record) == {"iter", "seconds", *known} | (measures if record["iter"] else set())
        for key, value in known.items():  # accuracy: a few of the 400 images may be near ties
            tolerance = {"abs": 3 / 400 + 1e-6} if "accuracy" in key else {"rel": 1e-4, "abs": 1e-7}
            assert record[key] == pytest.approx(value, **tolerance), (record["iter"], key)
    losses = [record["train_loss"] for record in records]
    assert max(losses) > 1.01 * min(losses)  # 100 times what the two may differ
    for record in records[1:]:
        total = sum(record[f"{part}_ms"] for part in parts)
        assert record["data_share"] == pytest.approx(record["data_ms"] / total)
        assert record["images_per_second"] == pytest.approx(96 * 1000 / total)
    for (key, weights), ours in zip(model.state_dict().items(), models[-1].state_dict().values()):
        difference, change = (ours - weights).float(), (weights - first[key]).float()
        assert difference.norm() <= 0.02 * change.norm(), key
    deep = [p for p in models[-1].parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in deep)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_logits_and_gradients_are_those_of_torchvisions_blocks(n_layer):
    torch.manual_seed(0)
    ours = step.ResNet(4, n_layer, 10)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):  # the zero scales would hide the residuals
            nn.init.uniform_(module.weight, 0.5, 1.5)
    theirs, x = as_torchvision(ours, 4, n_layer), torch.randn(16, 1, 28, 28)
    results = []
    for model in (ours, theirs):
        logits = model(x)
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *grads, *model.state_dict().values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# ---------- data ----------


def test_data_are_mnists_bytes(standins):
    for dataset, part in zip(step.load_data(args_for("--data_dir", standins), CPU), FILES):
        x, y = dataset.tensors
        expected = read_mnist(standins, part)
        assert x.dtype == torch.uint8
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    for dataset in step.load_data(args_for("--data_dir", standins), torch.device("meta")):
        assert [tensor.device.type for tensor in dataset.tensors] == ["meta", "meta"]


FILES = ("train", "t10k")


def test_images_or_labels_that_are_no_mnist_are_refused(tmp_path, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = bytes(range(196)) * 4 * 50, bytes(range(10)) * 5
    files = {
        "images-idx3": struct.pack(">4i", 0x803, 50, 28, 28) + images,
        "labels-idx1": struct.pack(">2i", 0x801, 50) + labels,
    }
    changes = [
        {},
        {"images-idx3": files["images-idx3"][:16] + bytes(len(images))},  # black
        {"images-idx3": struct.pack(">4i", 0x803, 50, 56, 14) + images},
        {"images-idx3": files["images-idx3"][:-1]},
        {"images-idx3": b"<html><body>not found</body></html>"},
        {"images-idx3": files["labels-idx1"]},
        {"images-idx3": b""},
        {"labels-idx1": struct.pack(">2i", 0x801, 50) + labels[1:] + bytes([10])},
        {"labels-idx1": struct.pack(">2i", 0x801, 49) + labels[1:]},
    ]
    for change in changes:
        for part in FILES:
            for kind, content in (files | change).items():
                (raw / f"{part}-{kind}-ubyte").write_bytes(content)
        if not change:
            sets = step.load_data(args_for("--data_dir", tmp_path), CPU)
            assert [len(dataset) for dataset in sets] == [50, 50]
        else:
            with pytest.raises(OSError, match="raw/train"):
                step.load_data(args_for("--data_dir", tmp_path), CPU)


@pytest.mark.parametrize(
    "error", [AssertionError, OSError, RuntimeError, TypeError, ValueError], ids=str
)
def test_whatever_the_reader_raises_names_the_files(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error("denied")

    monkeypatch.setattr(step, "MNIST", fail)
    with pytest.raises(OSError, match=rf"{tmp_path}/MNIST/raw/train-\*: missing .*denied"):
        step.load_data(args_for("--data_dir", tmp_path), CPU)


def test_augmentation_is_the_affine_map_of_its_random_numbers():
    """Bilinear interpolation in pixels: a pixel's weight falls from 1 to 0 within one pixel."""
    args, x = args_for("--shift", 3, "--rotate", 40, "--scale", 0.3), images(8)
    torch.manual_seed(3)
    angle, width, height, right, down = (2 * torch.rand(8, 1) - 1 for _ in range(5))
    angle = angle * math.radians(40)
    pixel = torch.arange(28.0)
    row, column = (t.reshape(1, -1) - 13.5 for t in torch.meshgrid(pixel, pixel, indexing="ij"))
    from_x = (1 + 0.3 * width) * (angle.cos() * column - angle.sin() * row) + 3 * right + 13.5
    from_y = (1 + 0.3 * height) * (angle.sin() * column + angle.cos() * row) + 3 * down + 13.5
    weight_x, weight_y = ((1 - (p[..., None] - pixel).abs()).relu() for p in (from_x, from_y))
    expected = torch.einsum("bpi,bij,bpj->bp", weight_y, x[:, 0], weight_x).view_as(x)
    torch.manual_seed(3)
    torch.testing.assert_close(step.augment(args, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_augmented_batch_stays_on_the_device(device):
    x = images(4, device)
    moved = step.augment(args_for(), x)
    assert moved.device == x.device
    assert moved.shape == x.shape


def test_augmented_batch_stays_in_range_and_differs_from_image_to_image():
    torch.manual_seed(0)
    x = images(1).expand(64, -1, -1, -1)
    moved = step.augment(args_for(), x)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not any(torch.equal(moved[0], other) for other in moved[1:])


def test_augmentation_of_strength_zero_changes_nothing():
    still = args_for("--shift", 0, "--rotate", 0, "--scale", 0)
    x = images(4)
    torch.testing.assert_close(step.augment(still, x), x, rtol=0, atol=1e-5)


def test_shift_is_in_pixels():
    torch.manual_seed(0)
    x = torch.zeros(256, 1, 28, 28)
    x[:, :, 14, 14] = 1
    moved = step.augment(args_for("--rotate", 0, "--scale", 0, "--shift", 3), x)
    rows = (moved.sum((1, 3)) * torch.arange(28)).sum(1) - 14  # the centre of mass
    assert rows.abs().max() <= 3.001
    assert rows.max() > 2.5
    assert rows.min() < -2.5


def test_rotation_is_in_degrees_and_stretching_a_fraction_of_each_side():
    torch.manual_seed(0)
    x = torch.zeros(256, 1, 28, 28)
    x[:, :, 20:22, 20:22] = 1  # 7 pixels right of the centre and 7 below
    places = torch.arange(28) - 13.5

    def centres(*flags):
        moved = step.augment(args_for("--shift", 0, *flags), x)[:, 0]
        mass = moved.sum((1, 2))
        return (moved.sum(1) * places).sum(1) / mass, (moved.sum(2) * places).sum(1) / mass

    right, down = centres("--rotate", 30, "--scale", 0)
    angles = torch.atan2(down, right).rad2deg() - 45
    assert angles.min() < -25 and angles.max() > 25 and angles.abs().max() < 31
    torch.testing.assert_close(right**2 + down**2, torch.full((256,), 98.0), rtol=0.05, atol=0)
    right, down = centres("--rotate", 0, "--scale", 0.25)
    for side in (right, down):
        assert 7 / 1.25 - 0.2 < side.min() < 6 and 8.8 < side.max() < 7 / 0.75 + 0.2
    assert (right - down).abs().max() > 2


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    still = "--shift 0 --rotate 0 --scale 0 --batch_size 8".split()
    x = torch.arange(43, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    stats = torch.tensor(0.0), torch.tensor(1 / 255)
    batches = step.minibatches(args_for(*still), TensorDataset(x, torch.arange(43)), stats)
    epochs = [[next(batches) for _ in range(5)] for _ in range(2)]
    orders = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    for epoch, order in zip(epochs, orders):
        assert len(order.unique()) == 40  # the incomplete sixth batch is skipped
        pixels = torch.cat([x[:, 0, 14, 14] for x, _ in epoch])
        torch.testing.assert_close(pixels, order.float(), rtol=0, atol=1e-2)
    assert not torch.equal(*orders)


def test_pixels_are_normalized_with_the_training_sets_statistics(standins, tmp_path, monkeypatch):
    seen, sets = [], {}
    evaluate = step.evaluate

    def spy(args, model, dataset, stats, name):
        sets[name] = dataset.tensors
        x = step.normalize(dataset.tensors[0] / 255, stats)
        seen.append((name, stats, x.mean().item(), x.std().item()))
        return evaluate(args, model, dataset, stats, name)

    monkeypatch.setattr(step, "evaluate", spy)
    step.train(step.parse_args(run_flags(standins, tmp_path)))
    train_set, test_set = step.load_data(args_for("--data_dir", standins), CPU)
    assert all(torch.equal(*pair) for pair in zip(sets["test"], test_set.tensors))
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(sets["train"], train_set.tensors))
    pixels = train_set.tensors[0] / 255
    for _, (mean, std), _, _ in seen:
        assert mean.item() == pytest.approx(pixels.mean().item(), rel=1e-5)
        assert std.item() == pytest.approx(pixels.std().item(), rel=1e-5)
    assert all(abs(mean) < 0.1 and abs(std - 1) < 0.1 for _, _, mean, std in seen)


def test_evaluation_is_the_mean_over_views_of_every_image():
    torch.manual_seed(0)
    args, stats = args_for("--device", "cpu", "--dtype", "float32"), (0.1, 0.3)
    model = step.ResNet(4, 1, 10)
    model(images(64) - 1)  # running statistics that differ from a batch's
    x = torch.randint(256, (1100, 1, 28, 28), dtype=torch.uint8)  # two chunks, one short
    y, calls = torch.randint(10, (1100,)), []

    def note(model, inputs):
        calls.append((len(inputs[0]) <= 1000, torch.is_grad_enabled()))

    with model.register_forward_pre_hook(note):
        result = step.evaluate(args, model, TensorDataset(x, y), stats, "test")
    assert set(calls) == {(True, False)}  # the memory that it takes is limited
    assert model.training
    model.eval()
    pixels = step.normalize(x / 255, stats)
    with torch.no_grad():
        views = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
        logits = torch.stack([model(pixels.roll(view, (2, 3))) for view in views]).mean(0)
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    assert result["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


def test_every_update_has_its_gradient_and_its_learning_rate(standins, tmp_path, monkeypatch):
    make_optimizer, cross_entropy, calls = step.make_optimizer, step.F.cross_entropy, []

    def spy_optimizer(args, model):
        optimizer = make_optimizer(args, model)
        zero_grad, update = optimizer.zero_grad, optimizer.step
        optimizer.zero_grad = lambda: (calls.append("zero_grad"), zero_grad())
        optimizer.step = lambda: (calls.append(optimizer.param_groups[0]["lr"]), update())
        return optimizer

    def spy_loss(logits, y, label_smoothing=0.0):
        calls.append(f"smoothing {label_smoothing}")
        return cross_entropy(logits, y, label_smoothing=label_smoothing)

    monkeypatch.setattr(step, "make_optimizer", spy_optimizer)
    monkeypatch.setattr(step.F, "cross_entropy", spy_loss)
    args = step.parse_args(run_flags(standins, tmp_path, "--eval_interval", 9))
    step.train(args)
    rates = [step.schedule(args, i) for i in range(4)]
    updates = [call for rate in rates for call in ("smoothing 0.1", "zero_grad", rate)]
    both_sets = ["smoothing 0.0"] * 2  # of the evaluations before and after
    assert calls == [*both_sets, *updates, *both_sets]


def test_bfloat16_and_float32_agree(standins, tmp_path, monkeypatch):
    finals, cross_entropy, dtypes = {}, F.cross_entropy, set()

    def spy(logits, y, **more):
        dtypes.add(logits.dtype)
        return cross_entropy(logits, y, **more)

    monkeypatch.setattr(step.F, "cross_entropy", spy)
    for dtype in ("float32", "bfloat16"):
        flags = run_flags(standins, tmp_path / dtype, "--dtype", dtype, "--learning_rate", 0.01)
        finals[dtype] = step.train(step.parse_args(flags))
    assert dtypes == {torch.float32}  # the softmax of bfloat16 logits would lose digits
    one, other = finals.values()
    assert one["test_loss"] != other["test_loss"]  # or both ran in the same precision
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=0.02)
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)


def test_nothing_in_the_loop_waits_for_the_device(standins, tmp_path, monkeypatch):
    """Whatever reads a number from the device is as rare in a long run as in a short one."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, **kwargs):
            waits.append(real)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for max_iters in ("2", "12"):
        more = ["--max_iters", max_iters, "--eval_interval", "100"]
        step.train(step.parse_args(run_flags(standins, tmp_path, *more)))
        counts.append(len(waits))
        waits.clear()
    assert 0 < counts[0] == counts[1]


def test_clock_gives_each_part_its_time():
    start = time.perf_counter()
    time.sleep(0.01)
    clock = step.Clock(CPU, start)
    for _ in range(2):
        time.sleep(0.02)
        clock.mark("short")
        time.sleep(0.06)
        clock.mark("long")
    latest = clock.read()
    assert 0.04 <= latest["short"] < latest["long"]
    assert latest["long"] >= 0.12
    assert clock.seconds["start-up"] >= 0.01
    assert clock.seconds == latest | {"start-up": clock.seconds["start-up"]}
    assert clock.read() == {}
    clock.mark("short")
    assert clock.read().keys() == {"short"}
    assert clock.seconds["short"] > latest["short"]


def test_on_a_gpu_the_gpu_itself_measures(monkeypatch):
    gpu = {"time": 5.0, "waited": False}

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing  # without it CUDA's elapsed_time fails

        def record(self):
            self.time, gpu["waited"] = gpu["time"], False

        def elapsed_time(self, end):
            assert gpu["waited"]  # before the GPU has reached an event, it fails, too
            return 1000 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.update(waited=True))
    clock = step.Clock(torch.device("cuda"), time.perf_counter())
    for latest in ({"data": 2.0, "forward": 3.0}, {"data": 4.0}):
        for part, seconds in latest.items():
            gpu["time"] += seconds
            clock.mark(part)
        assert clock.read() == latest
    assert 0 < clock.seconds.pop("start-up") < 1
    assert clock.seconds == {"data": 6.0, "forward": 3.0}


def test_a_run_on_a_gpu_names_it(standins, tmp_path, monkeypatch):
    """Everything runs on the CPU, but train has been told that it is a GPU."""
    clock, load_data = step.Clock, step.load_data
    monkeypatch.setattr(step, "setup_device", lambda args: torch.device("cuda"))
    monkeypatch.setattr(step, "Clock", lambda device, start: clock(CPU, start))
    monkeypatch.setattr(step, "load_data", lambda args, device: load_data(args, CPU))
    monkeypatch.setattr(nn.Module, "to", lambda model, *args, **kwargs: model)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {device}")
    more = ["--device", "cpu", "--dtype", "float32"]
    step.train(step.parse_args(run_flags(standins, tmp_path, *more)))
    assert json.loads((tmp_path / "args.json").read_text())["device"] == "NVIDIA cuda"


def test_timing_table_shows_shares_and_milliseconds(capsys):
    step.print_times({"start-up": 1.0, "data": 2.0, "update": 4.5, "evaluation": 2.5}, 100)
    assert capsys.readouterr().out.splitlines() == [
        "part          seconds  share  ms/iteration",
        "start-up         1.00  10.0% ",
        "data             2.00  20.0%         20.00",
        "update           4.50  45.0%         45.00",
        "evaluation       2.50  25.0% ",
        "total           10.00 100.0%",
    ]


def test_timing_table_adds_up_to_the_wall_time(standins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "plot_run", lambda out_dir: "no picture")
    begin = time.perf_counter()
    final = step.train(step.parse_args(run_flags(standins, tmp_path)))
    wall = time.perf_counter() - begin
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    parts = ["start-up", "evaluation", *step.ITERATION, "total"]
    table = {row[0]: float(row[1]) for row in rows if row and row[0] in parts}
    assert sorted(table) == sorted(parts)
    total = table.pop("total")
    assert sum(table.values()) == pytest.approx(total, abs=0.05)
    assert total == pytest.approx(wall, rel=0.1, abs=0.1)
    # The last record is made before the last evaluation, one of three.
    assert total - table["evaluation"] < final["seconds"] < total


def test_speed_is_measured_since_the_last_evaluation(standins, tmp_path, monkeypatch):
    """Of ten iterations the third evaluation covers two: 8 and 9."""
    reads = iter([{}, *(dict.fromkeys(step.ITERATION, 0.016 * n) for n in (4, 4, 2)), {}])
    monkeypatch.setattr(step.Clock, "read", lambda self: next(reads))
    more = ["--max_iters", 10, "--eval_interval", 4]
    step.train(step.parse_args(run_flags(standins, tmp_path, *more)))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "data_ms" not in records[0]
    for record in records[1:]:
        assert record["data_ms"] == record["update_ms"] == pytest.approx(16)
        assert record["data_share"] == pytest.approx(0.25)
        assert record["images_per_second"] == pytest.approx(32 / 0.064)


def test_learning_rate_rises_and_falls_once():
    args = args_for("--max_iters", 100, "--warmup_iters", 20, "--learning_rate", 0.3)
    rates = [step.schedule(args, i) for i in range(101)]
    assert rates == pytest.approx([one_cycle(i, 0.3, 20, 100) for i in range(101)], abs=1e-9)
    assert (rates[0], rates[19], rates[60]) == pytest.approx((0.3 / 20, 0.3, 0.15))
    assert rates.index(max(rates)) in (19, 20) and rates[100] == pytest.approx(0, abs=1e-9)


def test_optimizer_is_nesterov_momentum_with_decay():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    layer = torch.nn.Module()
    layer.p = p
    optimizer = step.make_optimizer(args_for("--weight_decay", 0.1), layer)
    assert optimizer.param_groups[0]["fused"]
    expected, velocity = p.detach().clone(), torch.zeros(2)
    for grad in ([1.0, 2.0], [-3.0, 0.5], [0.2, 0.2]):
        optimizer.param_groups[0]["lr"] = 0.1
        p.grad = torch.tensor(grad)
        optimizer.step()
        total = torch.tensor(grad) + 0.1 * expected
        velocity = 0.9 * velocity + total
        expected -= 0.1 * (total + 0.9 * velocity)
    torch.testing.assert_close(p.detach(), expected)


def test_warmup_takes_a_fifth_of_the_run_at_most():
    args = args_for("--max_iters", 50, "--warmup_iters", 400, "--learning_rate", 0.3)
    rates = [step.schedule(args, i) for i in range(51)]
    assert rates.index(max(rates)) in (9, 10)
    one = args_for("--max_iters", 1)
    assert step.schedule(one, 0) == one.learning_rate


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_without_bfloat16_computes_in_float32(native, dtype, monkeypatch):
    """T4 and V100 emulate bfloat16; is_bf16_supported() says True for them."""

    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    args = args_for()
    assert step.setup_device(args).type == args.device == "cuda"
    assert args.dtype == dtype
    args = args_for("--dtype", "float32")
    step.setup_device(args)
    assert args.dtype == "float32"


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    args = args_for("--device", "cpu")
    assert step.setup_device(args) == CPU
    assert args.dtype == dtype


def test_a_run_leaves_the_process_as_it_was(standins, tmp_path):
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    step.train(step.parse_args(run_flags(standins, tmp_path)))
    assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())


def error_of(*flags):
    code, errors = run_main("14_resnet_gpu", *flags)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors, errors
    return errors


def test_batch_larger_than_the_training_set_is_one_line(standins, tmp_path):
    errors = error_of(*run_flags(standins, tmp_path / "o", "--batch_size", 2001))
    assert "--batch_size 2001" in errors and "2000" in errors
    assert not (tmp_path / "o").exists()
    whole = run_flags(standins, tmp_path, "--batch_size", 2000, "--max_iters", 2)
    assert step.train(step.parse_args(whole))["iter"] == 2


def test_out_of_gpu_memory_is_one_line(standins, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    assert "--batch_size" in error_of(*run_flags(standins, tmp_path))


def test_diverging_run_is_one_line_and_keeps_what_it_wrote(standins, tmp_path):
    errors = error_of(*run_flags(standins, tmp_path, "--learning_rate", 1e9, "--max_iters", 20))
    assert "--learning_rate" in errors and "iteration" in errors
    assert (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(standins, tmp_path):
    assert "--device cuda" in error_of(*run_flags(standins, tmp_path / "o", "--device=cuda"))
    assert not (tmp_path / "o").exists()


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--max_iters 250 --n_channel 16 --rotate 0 --scale 0 --eval_interval 250"
    flags = [*flags.split(), "--data_dir", str(real_data), "--out_dir", str(tmp_path)]
    final = step.train(step.parse_args(flags))
    assert 0.982 < final["test_accuracy"] < 0.997
