"""Step 15: torchvision's network, a pack that loses only what is broken, an exact resume."""

import argparse
import copy
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from runs import watched_run
from standins import write_imagenet
from steps import folder_of, load_step, run_main

TINY = "--recipe tiny --train_size 16 --test_size 16 --batch_size 8 --num_workers 0".split()
TINY += "--device cpu --dtype float32 --max_iters 6 --eval_interval 2".split()


@pytest.fixture(scope="module")
def step():
    return load_step("15_imagenet")


@pytest.fixture
def tree(tmp_path):
    write_imagenet(tmp_path)
    return tmp_path / "imagenet"


def flags(step, tree, tmp_path, *more):
    out_dir = ["--data_dir", str(tree), "--out_dir", str(tmp_path / "out")]
    return step.parse_args([*TINY, *out_dir, *more])


def small_net(step, monkeypatch):
    """Put a net with the same layers, but few weights, in the place of ResNet; draw no pictures."""

    def make(depth, n_classes, small_stem):
        blocks = [step.conv(3, 8, 3, 2), nn.BatchNorm2d(8), step.BasicBlock(8, 8, 1)]
        return nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes)
        )

    monkeypatch.setattr(step, "ResNet", make)
    monkeypatch.setattr(step, "plot_run", lambda out_dir: out_dir / "loss.png")


# ---------- model ----------


@pytest.mark.parametrize(("depth", "small_stem"), [(18, False), (18, True), (50, False)])
def test_logits_are_those_of_torchvision_with_our_weights(step, depth, small_stem):
    torch.manual_seed(0)
    ours = step.ResNet(depth, 1000, small_stem).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):  # the zero scales would hide the branches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    if small_stem:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_resnet50_has_25557032_parameters(step):
    with torch.device("meta"):
        model = step.ResNet(50, 1000, small_stem=False)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_every_depth_has_torchvisions_parameters(step):
    for depth in step.N_BLOCKS:
        with torch.device("meta"):
            nets = step.ResNet(depth, 1000), getattr(torchvision.models, f"resnet{depth}")()
        ours, theirs = ({k: v.shape for k, v in net.state_dict().items()} for net in nets)
        assert ours == theirs
    assert list(step.N_BLOCKS) == [18, 34, 50, 101]


def test_convolutions_start_normal_with_variance_2_over_fan_out(step):
    torch.manual_seed(0)
    for name, module in step.ResNet(18, 10).named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            assert module.weight.var().item() * fan_out == pytest.approx(2, rel=0.1), name
            assert module.weight.abs().max() > 3 * module.weight.std()  # normal, not uniform


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_a_new_block_is_its_shortcut(step, block):
    x = torch.randn(2, 32, 8, 8).relu()
    n = 32 if block == "BasicBlock" else 8
    torch.testing.assert_close(getattr(step, block)(32, n, 1)(x), x)


def test_norms_and_biases_do_not_decay(step):
    args = step.parse_args(["--recipe", "tiny"])
    model = step.ResNet(18, 20, small_stem=True)
    decay, rest = step.make_optimizer(args, model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == args.weight_decay and rest["weight_decay"] == 0
    assert decay["fused"] and rest["fused"]
    assert all(
        "conv" in names[id(p)] or names[id(p)].endswith(("fc.weight", "0.weight"))
        for p in decay["params"]
    )
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert any("bn" in names[id(p)] for p in rest["params"])


def test_schedule_warms_up_then_falls_to_zero(step):
    args = step.parse_args(["--recipe", "tiny", "--max_iters", "100"])
    args.warmup_iters = 10
    rates = [step.schedule(args, i) for i in range(101)]
    cosine = [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(91)]
    factors = [*(i / 10 for i in range(1, 11)), *cosine]
    assert rates == pytest.approx([0.5 * x for x in factors], abs=1e-12)  # 1.0 per 256 images
    args.batch_size *= 2
    assert [step.schedule(args, i) for i in range(101)] == [2 * rate for rate in rates]
    args.batch_size, args.warmup_iters = 128, 50  # of 100: cut to 20
    assert [step.schedule(args, i) for i in (0, 19, 60)] == pytest.approx([0.025, 0.5, 0.25])


# ---------- data ----------


def test_packing_shrinks_the_shorter_side_and_keeps_small_jpegs(step, tree, tmp_path):
    args = flags(step, tree, tmp_path, "--pack_size", "56")
    images, _, names = step.load_data(args)
    assert names == [f"n{i:08d}" for i in range(len(names))]
    _, files = step.list_images(args, "train")
    assert len(images.rows) == len(files)
    packed = np.fromfile(images.pack, np.uint8)
    kept = 0
    for (path, label), (end, packed_label), start in zip(
        files, images.rows, [0, *images.rows[:, 0]]
    ):
        assert label == packed_label
        before, after = step.decode(np.fromfile(path, np.uint8)), step.decode(packed[start:end])
        assert min(after.shape[1:]) == min(56, *before.shape[1:])
        assert abs(after.float().mean() - before.float().mean()) < 3
        kept += packed[start:end].tobytes() == open(path, "rb").read()
    assert 0 < kept < len(files)


@pytest.mark.parametrize("size", [(90, 140), (140, 90)])
def test_packed_images_are_resized_with_antialiasing_and_compressed_once(step, tmp_path, size):
    torch.manual_seed(0)
    image = nn.functional.interpolate(torch.rand(1, 3, 9, 9), size, mode="bicubic")[0]
    image = (255 * image.clamp(0, 1)).byte()
    path = tmp_path / "image"

    def jpeg(x, quality=90):
        return bytes(torchvision.io.encode_jpeg(x, quality=quality).numpy())

    path.write_bytes(jpeg(image, quality=98))
    decoded = torchvision.io.decode_image(torch.tensor(list(path.read_bytes()), dtype=torch.uint8))
    small = [57 * side // 90 for side in size]  # the shorter one is 57 pixels
    resized = nn.functional.interpolate(decoded[None], small, mode="bilinear", antialias=True)[0]
    assert step.shrink((path, 0), 57) == jpeg(resized)
    for unlimited in (0, 90, 91):
        assert step.shrink((path, 0), unlimited) == path.read_bytes()
    assert step.shrink((path, 0), 1) != path.read_bytes()
    path.write_bytes(bytes(torchvision.io.encode_png(decoded).numpy()))
    assert step.shrink((path, 0), 90) == jpeg(decoded)
    assert step.shrink((tmp_path / "none", 0), 90) == b""


def test_a_pack_is_of_these_paths_sizes_times_and_its_own_size(step, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "shrink", lambda image, size: b"12345")
    cache, images = tmp_path / "a" / "b", step.list_images(flags(step, tree, tmp_path), "train")[1]

    def packed(images, *more):
        args = flags(step, tree, tmp_path, "--cache_dir", str(cache), *more)
        return step.pack_images(args, "train", images)[0]

    first = packed(images)
    monkeypatch.chdir(tree)
    assert packed([(os.path.relpath(path), label) for path, label in images]) == first
    others = [packed(images, "--pack_size", "57"), packed(images[1:])]
    path = images[0][0]
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    os.utime(path, ns=(0, 0))
    others.append(packed(images))
    with open(path, "ab") as file:
        file.write(b"one more")
    os.utime(path, ns=times)
    others.append(packed(images))
    assert len({first, *others}) == 5


def test_packing_shows_how_far_it_is(step, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "shrink", lambda image, size: b"12345")
    bars = []

    class Bar(step.tqdm):
        def __init__(self, items, text, total, initial, disable):
            bars.append((text, total, initial, disable))
            super().__init__(items, text, total, initial=initial, disable=True)

    monkeypatch.setattr(step, "tqdm", Bar)
    args = flags(step, tree, tmp_path)
    file, _ = pack(step, args)
    os.truncate(file, 5 * 20 + 3)  # killed in the middle of image 20
    file, rows = pack(step, args)
    pack(step, args)
    total = len(rows)
    expected = [(total, 0, None), (total, 20, None), (total, total, True)]  # True: nothing to show
    assert bars == [("packing train", *bar) for bar in expected]
    assert file.read_bytes() == b"12345" * total


def test_workers_leave_ctrl_c_to_the_parent_which_ends_them(step, tree, tmp_path, monkeypatch):
    calls, loaders = [], []
    monkeypatch.setattr(step.os, "setpgid", lambda *group: calls.append(group))
    monkeypatch.setattr(step.signal, "signal", lambda *args: calls.append(args))
    step.worker_init(3)
    assert calls == [(0, 0), (signal.SIGTERM, signal.SIG_DFL)]
    dataset = step.load_data(flags(step, tree, tmp_path))[0]  # packed: nothing is left to do

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers, worker_init_fn, **kwargs):
            loaders.append((num_workers, worker_init_fn))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(step, "DataLoader", Loader)
    args = flags(step, tree, tmp_path, "--num_workers", "3")
    step.load_batches(args, dataset, [[(0, 1)]])
    step.load_data(args)  # no processes to do nothing
    args.cache_dir = tmp_path / "another"
    step.load_data(args)
    assert loaders == [(n, step.worker_init) for n in (3, 0, 0, 3, 3)]


def test_loading_pins_memory_for_a_gpu(step, monkeypatch):
    pins, loader = [], torch.utils.data.DataLoader

    def spy(*args, pin_memory, **kwargs):
        pins.append(pin_memory)
        return loader(*args, **kwargs)

    monkeypatch.setattr(step, "DataLoader", spy)
    for device in ("cpu", "cuda"):
        args = argparse.Namespace(num_workers=0, device=device)
        (x,) = step.load_batches(args, {(0, 1): torch.tensor(7)}, [[(0, 1)]])
        assert x.tolist() == [7]
    assert pins == [False, True]


def pack(step, args, split="train"):
    return step.pack_images(args, split, step.list_images(args, split)[1])


def test_packing_continues_where_it_was_killed(step, tree, tmp_path):
    args = flags(step, tree, tmp_path)
    file, rows = pack(step, args)
    complete = file.read_bytes()
    os.truncate(file, len(complete) // 2)  # the rest never reached the disk
    os.truncate(file.with_suffix(".index"), 16 * len(rows) - 7)
    before = file.stat().st_ino
    _, rows_again = pack(step, args)
    assert file.read_bytes() == complete and file.stat().st_ino == before
    np.testing.assert_array_equal(rows, rows_again)


def test_two_runs_that_pack_into_the_same_cache_do_not_mix(step, tree, tmp_path):
    """The second waits for the first and finds nothing left to do."""
    args = flags(step, tree, tmp_path)
    alone, rows = pack(step, args)
    expected = alone.read_bytes()
    more = ["--data_dir", str(tree), "--cache_dir", str(tmp_path / "shared")]
    line, folder = [sys.executable, "-c", PACK, *TINY, *more], folder_of("15_imagenet")
    runs = [subprocess.Popen(line, cwd=folder) for _ in range(2)]
    assert [run.wait(100) for run in runs] == [0, 0]
    (shared,) = (tmp_path / "shared").glob("train*.jpegs")
    assert shared.read_bytes() == expected
    index = np.fromfile(shared.with_suffix(".index"), np.int64).reshape(-1, 2)
    np.testing.assert_array_equal(index, rows)


PACK = """import sys; sys.path.insert(0, ".")
import train
args = train.parse_args(sys.argv[1:])
train.pack_images(args, "train", train.list_images(args, "train")[1])
"""


def test_another_folder_with_the_same_names_has_its_own_pack(step, tree, tmp_path):
    shared = ["--cache_dir", str(tmp_path / "cache")]
    other = tmp_path / "elsewhere" / "imagenet"
    shutil.copytree(tree, other)
    for path in (other / "train").glob("*/*"):
        path.write_bytes(next((tree / "val").glob("*/*")).read_bytes())
    files = [pack(step, flags(step, data_dir, tmp_path, *shared))[0] for data_dir in (tree, other)]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert len(list((tmp_path / "cache").glob("train*.jpegs"))) == 2


def test_broken_image_is_named_and_packed_anew_when_repaired(step, tree, tmp_path, capsys):
    victim = sorted((tree / "train").glob("*/*"))[5]
    complete = victim.read_bytes()
    victim.write_bytes(complete[:300])
    assert str(victim) in error_of("--data_dir", tree, "--out_dir", tmp_path / "out")
    assert capsys.readouterr().out == f"broken image, left out: {victim}\n"
    victim.write_bytes(complete)
    images, _, _ = step.load_data(flags(step, tree, tmp_path))
    assert len(images.rows) == 64


def test_one_broken_image_in_thousands_is_left_out(step, tmp_path):
    tree = tmp_path / "imagenet"
    write_imagenet(tmp_path, n_train=250)  # of each of four classes: 0.1% are allowed
    victim = sorted((tree / "train").glob("*/*"))[0]
    victim.write_bytes(b"not an image")
    args = flags(step, tree, tmp_path)
    images, _, _ = step.load_data(args)
    _, files = step.list_images(args, "train")
    assert len(images.rows) == len(files) - 1
    assert images.rows[:, 1].tolist() == [y for path, y in files if path != str(victim)]


def test_odd_images_are_read(step, tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # white on the left
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be rotated a quarter to the right: white on top
    image.save(tmp_path / "rotated.jpeg", exif=exif)
    image.convert("L").save(tmp_path / "gray.jpeg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpeg")
    image.save(tmp_path / "png.jpeg", format="PNG")
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.jpeg", format="PNG")
    images = {p.stem: step.decode(np.fromfile(p, np.uint8)) for p in tmp_path.glob("*.jpeg")}
    assert all(image.dtype == torch.uint8 for image in images.values())
    rotated = images["rotated"]
    assert rotated.shape == (3, 60, 40)
    assert rotated[:, :25].min() > 200 and rotated[:, 35:].max() < 50
    for name in ("gray", "cmyk", "png", "deep"):
        assert images[name].shape == (3, 40, 60)
        assert images[name][:, :, :25].min() > 200 and images[name][:, :, 35:].max() < 50


def test_an_animation_is_no_image(step, tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animation"):
        step.decode(np.fromfile(tmp_path / "a.gif", np.uint8))
    assert step.shrink((tmp_path / "a.gif", 0), 256) == b""


@pytest.mark.parametrize("more", ["", "--trivial_augment", "--trivial_augment --random_erase 0.9"])
def test_a_crop_is_torchvisions_cut_out_resized_augmented_and_erased(step, more):
    torch.manual_seed(0)
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    args = step.parse_args(["--train_size", "24", "--min_scale", "0.2", *more.split()])
    for key in (2**62 - 1, 5):
        torch.manual_seed(key)
        expected = torchvision.transforms.v2.RandomResizedCrop(24, (0.2, 1))(image)
        if more:
            expected = torchvision.transforms.v2.TrivialAugmentWide()(expected)
        if "erase" in more:
            expected = torchvision.transforms.v2.RandomErasing(0.9)(expected)
        torch.manual_seed(1)
        assert torch.equal(step.crop(args, image, key), expected)


@pytest.mark.parametrize(
    ("test_crop", "size", "box"),
    [(0.875, (90, 160), (6, 40, 79)), (0.5, (160, 91), (57, 22, 46)), (1, (90, 160), (0, 35, 90))],
)
def test_the_central_crop_is_a_square_of_the_shorter_side(step, test_crop, size, box):
    image, (top, left, side) = torch.randint(256, (3, *size), dtype=torch.uint8), box
    args = step.parse_args(["--test_size", "20", "--test_crop", str(test_crop)])
    args.trivial_augment, args.random_erase = True, 1.0  # in training only
    cut = image[None, :, top : top + side, left : left + side]
    expected = nn.functional.interpolate(cut, (20, 20), mode="bilinear", antialias=True)[0]
    assert torch.equal(step.crop(args, image, None), expected)


def test_a_rectangle_is_erased_in_training_only(step):
    args = step.parse_args(["--recipe", "tiny", "--random_erase", "1"])
    image = torch.full((3, 64, 64), 9, dtype=torch.uint8)
    x, again, other = (step.crop(args, image, key) for key in (1, 1, 2))
    assert torch.equal(x, again) and not torch.equal(x, other)
    erased = (x == 0).all(0)
    rows, columns = erased.any(1).sum(), erased.any(0).sum()
    assert 0 < erased.sum() == rows * columns < erased.numel() / 2
    assert (step.crop(args, image, None) == 9).all()
    args.random_erase = 0.0
    assert (step.crop(args, image, 1) == 9).all()


def test_eval_only_writes_nothing(step, tree, tmp_path, monkeypatch, capsys):
    small_net(step, monkeypatch)
    final = step.train(args := flags(step, tree, tmp_path))
    before = {path: path.read_bytes() for path in args.out_dir.iterdir()}
    again = step.train(flags(step, tree, tmp_path, "--eval_only"))
    assert [again[key] for key in ("iter", "val_loss", "top1")] == [
        final[key] for key in ("iter", "val_loss", "top1")
    ]
    assert before == {path: path.read_bytes() for path in args.out_dir.iterdir()}
    printed = "  ".join(f"{key} {value:.5g}" for key, value in again.items())
    assert capsys.readouterr().out.splitlines()[-1] == printed


def test_batches_are_a_function_of_seed_and_iteration(step, tree, tmp_path):
    args = flags(step, tree, tmp_path)
    images, _, _ = step.load_data(args)
    n = len(images.rows) // 8
    run = step.minibatches(args, images, 0)
    batches = [next(run) for _ in range(3 * n)]
    for iter_num in range(3 * n):
        assert next(step.minibatches(args, images, iter_num)) == batches[iter_num]
    args.seed += 1
    (ids, keys), (other_ids, other_keys) = (
        zip(*batch) for batch in (batches[0], next(step.minibatches(args, images, 0)))
    )
    assert ids != other_ids and not {*keys} & {*other_keys}
    epochs = [[i for batch in batches[e * n : e * n + n] for i, _ in batch] for e in range(3)]
    assert all(len(set(epoch)) == 8 * n for epoch in epochs)  # every image once
    assert epochs[0] != epochs[1]
    assert len({key for batch in batches for _, key in batch}) == 3 * 8 * n  # never the same crop
    x, _ = images[batches[4][0]]
    again, _ = images[batches[4][0]]
    assert torch.equal(x, again) and x.dtype == torch.uint8 and x.shape == (3, 16, 16)
    other, _ = images[batches[4][0][0], 1]
    assert not torch.equal(x, other)


def test_every_validation_image_counts_once(step, tree, tmp_path):
    args = flags(step, tree, tmp_path, "--batch_size", "5", "--test_size", "24")
    _, images, _ = step.load_data(args)
    guess, seen = torch.tensor([0.0, 4.2, 4.5, 9, 4, 5, 6, 7]), []

    class Spy(nn.Module):
        def forward(self, x):
            assert not self.training and x.shape[1:] == (3, 24, 24)
            seen.append(x)
            return guess.expand(len(x), 8)

    result = step.evaluate(args, Spy(), images, step.STATS)
    pixels = torch.cat(seen)
    assert len(pixels) == len(images.rows) == 16 == len(pixels.unique(dim=0))
    # Of labels 0 to 3, four times each: 3 comes first, 2 fifth, 1 sixth.
    assert result["top1"] == 0.25 and result["top5"] == 0.5
    assert result["val_loss"] == pytest.approx((guess.logsumexp(0) - guess[:4].mean()).item())
    # Added up in float32, losses near 1 would vanish beside that of the first class, 2^28.
    guess[:] = torch.tensor([-(2.0**26), 0, 0, -1, -9, -9, -9, -9])
    args.batch_size = 4  # one class
    total = 16 * step.evaluate(args, Spy(), images, step.STATS)["val_loss"]
    others = 4 * (3 * guess.logsumexp(0).item() + 1)
    assert total - 2.0**28 == pytest.approx(others, rel=1e-5)


def test_evaluation_sees_the_center(step):
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, 10:30, 30:50] = 255
    args = step.parse_args(["--recipe", "tiny", "--test_size", "16", "--test_crop", "0.5"])
    assert step.crop(args, image, None).min() == 255
    args.test_crop = 0.6
    assert step.crop(args, image, None).min() == 0
    wide = step.crop(args, image, 7)
    assert wide.shape == (3, args.train_size, args.train_size)
    assert torch.equal(wide, step.crop(args, image, 7))


def test_mixed_labels_sum_to_one(step):
    args = step.parse_args(["--recipe", "tiny", "--mixup", "0.2", "--cutmix", "1"])
    x, y = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 4
    stats = step.STATS
    mixed, labels = step.augment(args, x, y, stats, 4)
    assert mixed.shape == x.shape and labels.shape == (8, 4)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    kinds = {"mixup": torchvision.transforms.v2.MixUp, "cutmix": torchvision.transforms.v2.CutMix}
    for names in (["mixup"], ["cutmix"], ["mixup", "cutmix"]):
        alphas = {"mixup": 0.3, "cutmix": 0.8}
        given = [text for name in names for text in (f"--{name}", str(alphas[name]))]
        for seed in range(4):
            torch.manual_seed(seed)
            flip = torch.rand(8) < 0.5
            pixels = [image.flip(2) if f else image for image, f in zip(x / 255, flip)]
            pixels = (torch.stack(pixels) - stats[0]) / stats[1]
            name = names[torch.randint(len(names), ())]
            expected = kinds[name](alpha=alphas[name], num_classes=4)(pixels, y)
            torch.manual_seed(seed)
            mixed = step.augment(step.parse_args(given), x, y, stats, 4)
            torch.testing.assert_close(mixed, expected)
    plain = step.parse_args(["--recipe", "tiny"])
    torch.manual_seed(0)
    kept, same = step.augment(plain, x, y, stats, 4)
    both = torch.stack([step.normalize(x / 255, stats), step.normalize(x.flip(3) / 255, stats)])
    same_as = (kept == both).flatten(2).all(2)  # (2, B): as it was, flipped
    assert same_as.any(0).all() and same_as[0].any() and same_as[1].any() and same is y


def test_colors_are_normalized_as_torchvision_does(step):
    theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    x = torch.rand(2, 3, 5, 5)
    ours = step.normalize(x, step.STATS)
    torch.testing.assert_close(
        ours, torchvision.transforms.functional.normalize(x, theirs.mean, theirs.std)
    )


def test_evaluation_is_in_chunks_without_a_graph_and_its_loss_in_float32(
    step, tree, tmp_path, monkeypatch
):
    more = ["--batch_size", "7", "--dtype", "bfloat16"]
    args, calls, cross_entropy = flags(step, tree, tmp_path, *more), [], step.F.cross_entropy
    _, images, _ = step.load_data(args)

    class Model(nn.Linear):
        def forward(self, x):
            calls.append((len(x) <= 7, torch.is_grad_enabled()))
            return super().forward(x.flatten(1))

    def spy(logits, *args, **kwargs):
        calls.append(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(step.F, "cross_entropy", spy)
    model = Model(3 * 16 * 16, 4)
    result = step.evaluate(args, model, images, step.STATS)
    assert set(calls) == {(True, False), torch.float32} and model.training
    assert result["top5"] == 1  # of four classes


# ---------- checkpoint ----------


def run_and_die(argv, function, count):
    """Train in this process, which SIGKILLs itself at the count-th call of a function.

    If the function is SIGTERM or SIGINT, that signal is sent at the third update and, by the time a
    checkpoint is then being written, until it has been sent count times.
    """
    torch.set_num_threads(1)
    step, signals = load_step("15_imagenet"), []
    small_net(step, pytest.MonkeyPatch())  # for good: this process runs nothing else
    if function.startswith("SIG"):
        number, update_ema, save, updates = (
            getattr(signal, function),
            step.update_ema,
            torch.save,
            [],
        )

        def updating(*args):
            update_ema(*args)
            updates.append(1)
            if len(updates) == 3:
                os.kill(os.getpid(), number)

        def saving(checkpoint, file):
            if signals:
                file.write(b"the first half")
                for _ in range(count - 1):
                    os.kill(os.getpid(), number)
                file.seek(0)
            save(checkpoint, file)

        step.update_ema, torch.save = updating, saving
        step.train(step.parse_args(argv), signals)
        sys.exit(128 + signals[0])
    place, name = (torch, "save") if function == "torch.save" else (step, function)
    calls, original = [], getattr(place, name, None)

    def dying(*args):
        calls.append(1)
        if len(calls) >= count:
            if place is torch:  # in the middle of writing
                args[1].write(b"the first half")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    if original:
        setattr(place, name, dying)
    step.train(step.parse_args(argv))


def run(argv, function="", count=0):
    """Run run_and_die in a fresh process; return how it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["matplotlib.pyplot", "torchvision.datasets", "test_15_imagenet"]
    )
    process = context.Process(target=run_and_die, args=(argv, function, count))
    process.start()
    process.join()
    return process.exitcode


DEATHS = [  # the call at which it dies: in an update, an evaluation, a write, between two files
    ("update_ema", 4),
    ("evaluate", 2),
    ("torch.save", 2),
    ("save_checkpoint", 2),
    ("load_batches", 2),
]


def test_killed_at_five_moments_ends_bit_identical(tree, tmp_path):
    more = ["--data_dir", str(tree), "--max_iters", "12"]
    whole = [*TINY, *more, "--out_dir", str(tmp_path / "whole")]
    broken = [*TINY, *more, "--out_dir", str(tmp_path / "broken")]
    assert run(whole) == 0
    for function, count in DEATHS:
        assert run(broken, function, count) == -signal.SIGKILL
        if "--init_from" not in broken:
            broken += ["--init_from", "resume"]
    assert run(broken) == 0
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(tmp_path / run / name) for run in ("whole", "broken"))
        for part in ("model", "ema"):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
        momentum = [
            [s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*momentum))
    best = b["state"]["record"]  # of best.pt
    a, b = (metrics(tmp_path / run) for run in ("whole", "broken"))
    assert a == b and len(a) == 7
    assert best["iter"] == max(a, key=lambda record: record["top1"])["iter"]  # the first of equals


def test_what_is_evaluated_is_the_average_of_the_weights(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    update_ema, evaluate, weights, evaluated = step.update_ema, step.evaluate, [], []

    def snapshot(model):
        return [v.clone() for v in model.state_dict().values() if v.is_floating_point()]

    def spy_update(averages, values, decay):
        weights.append([value.clone() for value in values])
        update_ema(averages, values, decay)

    def spy_evaluate(args, model, *rest):
        evaluated.append(snapshot(model))
        return evaluate(args, model, *rest)

    monkeypatch.setattr(step, "update_ema", spy_update)
    monkeypatch.setattr(step, "evaluate", spy_evaluate)
    step.train(flags(step, tree, tmp_path, "--ema_decay", "0.3"))
    assert len(weights) == 6 and len(evaluated) == 4
    average = evaluated[0]
    for i, new in enumerate(weights):
        decay = min(0.3, (i + 1) / (i + 10))
        average = [decay * old + (1 - decay) * value for old, value in zip(average, new)]
    assert len(average) == 17  # 3 convolutions, 4 tensors of 3 batch norms, 2 of the output
    for ours, expected, value in zip(evaluated[-1], average, weights[-1]):
        torch.testing.assert_close(ours, expected)
        assert not torch.equal(expected, value)


@pytest.mark.parametrize("micro_batch_size", [8, 3, 2])
def test_training_is_the_recipe(micro_batch_size, step, tree, tmp_path, monkeypatch):
    """Augment, forward, backward, accumulate, update: the weights of the loop written out here."""
    plot_run, plots = step.plot_run, []
    draw = plot_run.__globals__["draw"]
    small_net(step, monkeypatch)
    monkeypatch.setattr(step, "plot_run", plot_run)
    monkeypatch.setitem(
        plot_run.__globals__, "draw", lambda *args: (plots.append(1), draw(*args))[1]
    )
    item = torch.Tensor.item

    def without_a_graph(tensor):
        assert not tensor.requires_grad  # a sum of losses with their graphs would fill the memory
        return item(tensor)

    more = ["--mixup", "0.2", "--label_smoothing", "0.3", "--eval_interval", "4", "--seed", "3"]
    more += ["--ema_decay", "0.3", "--micro_batch_size", str(micro_batch_size)]
    place = ["--data_dir", tree, "--out_dir", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", without_a_graph)
        args, records = watched_run(step, *TINY, *place, *more)
    assert len(plots) == 4  # at every evaluation, and at the end
    images, val_images, names = step.load_data(args)
    val_x, val_y = zip(*(val_images[i, None] for i in range(len(val_images.rows))))
    val_x, val_y = torch.stack(val_x), torch.tensor(val_y)
    stats = step.STATS
    torch.manual_seed(args.seed)
    model = step.ResNet(18, len(names), True).to(memory_format=torch.channels_last)
    ema, losses = copy.deepcopy(model).eval(), []
    groups = [[p for p in model.parameters() if (p.ndim == 1) == vector] for vector in (0, 1)]
    groups = [{"params": group, "weight_decay": w} for group, w in zip(groups, (1e-3, 0.0))]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for i, items in zip(range(7), step.minibatches(args, images, 0)):
        cosine = (1 + math.cos(math.pi * max(0, i - 1) / 5)) / 2  # after one update of warm-up
        for group in optimizer.param_groups:
            group["lr"] = 1.0 * 8 / 256 * cosine
        if i in (0, 4, 6):
            record = records.pop(0)
            with torch.no_grad():
                logits = ema(step.normalize(val_x / 255, stats))
            rank = (logits > logits.gather(1, val_y[:, None])).sum(1)
            known = {"iter": i, "learning_rate": 1.0 * 8 / 256 * cosine}
            known |= {f"top{k}": (rank < k).float().mean() for k in (1, 5)}
            known |= {"val_loss": nn.functional.cross_entropy(logits, val_y)}
            timed = {"seconds"}
            if i > 0:
                known["train_loss"] = sum(losses) / len(losses)
                timed |= {"data_share", "images_per_second"}
            assert record.keys() == known.keys() | timed
            for key, value in known.items():
                assert record[key] == pytest.approx(float(value), rel=1e-4, abs=1e-7), (i, key)
            losses = []
        if i == 6:
            break
        pixels, labels = zip(*(images[item] for item in items))
        torch.manual_seed(args.seed * 1_000_003 + i)
        model.zero_grad()
        losses.append(0.0)
        for k in range(0, 8, micro_batch_size):
            part = slice(k, k + micro_batch_size)
            x, y = torch.stack(pixels[part]), torch.tensor(labels[part])
            x, y = step.augment(args, x, y, stats, len(names))
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.3) * len(x) / 8
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        decay = min(0.3, (i + 1) / (i + 10))
        for average, value in zip(ema.state_dict().values(), model.state_dict().values()):
            if value.is_floating_point():
                average.copy_(decay * average + (1 - decay) * value)
    assert not records
    trained = torch.load(tmp_path / "out" / "last.pt")
    for part, expected in (("model", model), ("ema", ema)):
        for name, value in expected.state_dict().items():
            if value.is_floating_point():
                assert torch.allclose(value, trained[part][name], atol=1e-5), name
    kernels = [p for p in trained["model"].values() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_losses_of_bfloat16_logits_are_float32(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    dtypes, cross_entropy = [], step.F.cross_entropy

    def spy(logits, *args, **kwargs):
        dtypes.append(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(step.F, "cross_entropy", spy)
    final = step.train(flags(step, tree, tmp_path, "--dtype", "bfloat16", "--max_iters", "2"))
    assert set(dtypes) == {torch.float32}
    exact = step.train(flags(step, tree, tmp_path, "--max_iters", "2", "--overwrite"))
    assert final["val_loss"] != exact["val_loss"]  # or both ran in the same precision
    assert final["val_loss"] == pytest.approx(exact["val_loss"], rel=0.02)


def test_every_tensor_is_made_on_the_device(step, tree, tmp_path, monkeypatch):
    """On a GPU a tensor made on the CPU would be an error, or be copied in every iteration."""
    small_net(step, monkeypatch)
    made = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.zeros, torch.tensor, torch.rand):
                if sys._getframe(1).f_code.co_filename == step.__file__:
                    made.append("device" in (kwargs or {}))
            return function(*args, **kwargs or {})

    with Spy():
        step.train(flags(step, tree, tmp_path, "--max_iters", "2"))
    assert made == [True] * 7  # a sum, 2 evaluations, 2 iterations: a loss and flips


def test_epochs_become_iterations(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    given = "--max_iters 0 --eval_interval 0 --epochs 1.3 --warmup_epochs 0.3 --overwrite".split()
    given += ["--batch_size", "20"]  # of 64 images: 3 iterations per epoch
    step.train(args := flags(step, tree, tmp_path, *given))
    assert (args.max_iters, args.warmup_iters, args.eval_interval) == (4, 1, 3)
    assert [record["iter"] for record in metrics(args.out_dir)] == [0, 3, 4]
    step.train(args := flags(step, tree, tmp_path, *given, "--epochs", "0"))
    assert [record["iter"] for record in metrics(args.out_dir)] == [0, 1]


@pytest.mark.parametrize(("depth", "megabytes"), [(50, 27), (101, 40)])
def test_activations_take_the_memory_that_is_assumed(step, depth, megabytes):
    """What autograd stores for backward per image of 176 pixels, here of 88 pixels."""
    model, stored = step.ResNet(depth, 1000).to(memory_format=torch.channels_last), {}
    known = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            stored[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, or it may be reused
        return tensor

    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    with bfloat16, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.rand(8, 3, 88, 88).to(memory_format=torch.channels_last))
    # The weights are cast once, whatever the number of images: 2 bytes for each.
    weights = 2 * sum(p.numel() for p in model.parameters())
    per_image = (sum(n for n, _ in stored.values()) - weights) / 8
    assert per_image * 4 == pytest.approx(megabytes * 1e6, rel=0.1)


def metrics(out_dir):
    """Return the records of a run without the times."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_second", "data_share")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(step, tree, tmp_path, number, monkeypatch, capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    small_net(step, monkeypatch)
    update_ema, updates = step.update_ema, []

    def signal_at_the_third(*args):
        update_ema(*args)
        updates.append(1)
        if len(updates) == 3:  # in the middle of an interval
            os.kill(os.getpid(), number)

    step.train(flags(step, tree, tmp_path / "whole"))
    monkeypatch.setattr(step, "update_ema", signal_at_the_third)
    try:
        step.train(flags(step, tree, tmp_path / "stopped"), signals := [])
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert len(updates) == 3 and signals == [number]
    assert "stopped at iteration 3; --init_from resume" in capsys.readouterr().out
    step.train(flags(step, tree, tmp_path / "stopped", "--init_from", "resume"))
    whole, stopped = (tmp_path / name / "out" for name in ("whole", "stopped"))
    a, b = (torch.load(out_dir / "last.pt")["model"] for out_dir in (whole, stopped))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(whole) == metrics(stopped)


def test_a_second_sigterm_does_not_stop_a_save(tree, tmp_path):
    """Slurm and torchrun send SIGTERM again; only a second Ctrl-C ends the run at once."""
    argv = [*TINY, "--data_dir", str(tree), "--out_dir", str(tmp_path / "out")]
    assert run(argv, "SIGTERM", 2) == 128 + signal.SIGTERM
    last = torch.load(tmp_path / "out" / "last.pt")
    assert last["state"]["iter_num"] == 3
    argv += ["--init_from", "resume"]
    assert run(argv, "SIGINT", 2) == 128 + signal.SIGINT  # in the middle of the save
    assert torch.load(tmp_path / "out" / "last.pt")["state"]["iter_num"] == 4  # the one before
    assert run(argv) == 0


def test_iteration_0_survives_a_resume(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    step.train(flags(step, tree, tmp_path / "whole"))
    update_ema = step.update_ema

    def die(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(step, "update_ema", die)
    with pytest.raises(ZeroDivisionError):
        step.train(flags(step, tree, tmp_path / "killed"))
    monkeypatch.setattr(step, "update_ema", update_ema)
    with open(tmp_path / "killed" / "out" / "metrics.jsonl", "a") as file:
        file.write('{"iter": 2, "sec')  # a full disk left half a line
    step.train(flags(step, tree, tmp_path / "killed", "--init_from", "resume"))
    whole, killed = (metrics(tmp_path / name / "out") for name in ("whole", "killed"))
    assert [record["iter"] for record in killed] == [0, 2, 4, 6]
    assert whole == killed


def test_resume_at_and_past_the_end(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    final = step.train(flags(step, tree, tmp_path))
    more = ["--init_from", "resume"]
    assert step.train(flags(step, tree, tmp_path, *more)) == final
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    with pytest.raises(argparse.ArgumentTypeError, match=r"last.pt is at iteration 6.*--max_iters"):
        step.train(flags(step, tree, tmp_path, *more, "--max_iters", "4"))
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
    bars = []

    class Bar(step.tqdm):
        def __init__(self, items, total, initial, disable):
            bars.append((total, initial, disable))
            super().__init__(items, total=total, initial=initial, disable=disable)

    images = step.load_data(flags(step, tree, tmp_path))  # packed
    monkeypatch.setattr(step, "load_data", lambda args: images)
    monkeypatch.setattr(step, "tqdm", Bar)
    longer = step.train(flags(step, tree, tmp_path, *more, "--max_iters", "8"))
    assert longer["iter"] == 8 and bars == [(8, 6, None)]


def test_resume_with_other_classes_is_refused(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    step.train(flags(step, tree, tmp_path))
    for split in ("train", "val"):
        (tree / split / "n00000003").rename(tree / split / "n00000007")
    with pytest.raises(OSError, match="other classes"):
        step.train(flags(step, tree, tmp_path, "--init_from", "resume"))


def test_a_full_disk_keeps_the_last_checkpoint(step, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    step.save_checkpoint(path, {}, {"iter_num": 1})

    def full(checkpoint, file):
        file.write(b"the first half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.pt cannot be written"):
        step.save_checkpoint(path, {}, {"iter_num": 2})
    assert step.load_checkpoint(path, {}, {}) == {"iter_num": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_kind_is_named(step, tmp_path):
    path, state = tmp_path / "last.pt", {"iter_num": 1}
    parts = {"model": nn.Linear(2, 3)}
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters())
    step.save_checkpoint(path, parts, state)
    assert step.load_checkpoint(path, parts, {"iter_num": 0}) == state
    for template in ({"iter_num": 0.0}, {"iter_num": 0, "best": 1.0}):
        with pytest.raises(OSError, match=r"last\.pt is damaged"):
            step.load_checkpoint(path, parts, template)
    two_groups = torch.optim.SGD([{"params": [p]} for p in parts["model"].parameters()])
    others = {"model": nn.Linear(2, 4), "optimizer": two_groups, "ema": nn.Linear(2, 3)}
    for name, part in others.items():
        with pytest.raises(
            OSError, match=rf"last\.pt is of another model or optimizer \({name}: \S"
        ):
            step.load_checkpoint(path, {name: part}, state)
    with pytest.raises(OSError, match=r"none\.pt is missing"):
        step.read_checkpoint(tmp_path / "none.pt", {})


def test_args_json_names_the_gpu_and_logs_are_cut_to_their_sizes(step, tmp_path, monkeypatch):
    args = step.parse_args(["--out_dir", str(tmp_path / "a" / "b")])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {device}")
    for device, name in (("cuda", "NVIDIA cuda"), ("cpu", "cpu")):
        step.open_out_dir(args, torch.device(device), [], [])
        assert json.loads((args.out_dir / "args.json").read_text())["device"] == name
    logs = [tmp_path / name for name in ("long", "as long", "short", "absent")]
    for log in logs[:3]:
        log.write_text("123")
    step.open_out_dir(args, torch.device("cpu"), logs, [2, 3, 4, 5])
    assert [log.read_text() for log in logs[:3]] == ["12", "123", "123"]
    assert not logs[3].exists()


def test_a_diverged_run_does_not_replace_its_last_checkpoint(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    monkeypatch.setattr(step, "catch_signals", lambda signals: None)
    update_ema, cross_entropy, signals = step.update_ema, step.F.cross_entropy, []

    def spy_loss(logits, y, **more):
        return cross_entropy(logits, y, **more) * (torch.nan if logits.requires_grad else 1)

    def stop(*args):
        update_ema(*args)
        signals.append(signal.SIGTERM)

    monkeypatch.setattr(step.F, "cross_entropy", spy_loss)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        step.train(flags(step, tree, tmp_path))
    monkeypatch.setattr(step, "update_ema", stop)
    step.train(flags(step, tree, tmp_path, "--init_from", "resume"), signals)
    last = torch.load(tmp_path / "out" / "last.pt")
    assert last["state"]["iter_num"] == 0
    assert [record["iter"] for record in metrics(tmp_path / "out")] == [0]


def test_times_are_those_of_a_clock_that_we_set(step, tree, tmp_path, monkeypatch):
    """Start 100, loading 3, updating 1, evaluating 10, saving 20: in seconds."""
    small_net(step, monkeypatch)
    now = [1000.0]

    def takes(name, seconds):
        function = getattr(step, name)

        def call(*args):
            now[0] += seconds
            return function(*args)

        monkeypatch.setattr(step, name, call)

    load_batches = step.load_batches

    def slow(args, images, batches):
        for batch in load_batches(args, images, batches):
            now[0] += 3 if images.train else 0
            yield batch

    load_data = step.load_data

    def marked(args):
        train_set, val_set, names = load_data(args)
        train_set.train, val_set.train = True, False
        return train_set, val_set, names

    monkeypatch.setattr(step, "load_data", marked)
    for name, seconds in (("make_optimizer", 100), ("update_ema", 1), ("evaluate", 10)):
        takes(name, seconds)
    takes("save_checkpoint", 20)
    monkeypatch.setattr(step, "load_batches", slow)
    monkeypatch.setattr(step, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    evaluate, top1 = step.evaluate, iter([0.2, 0.5, 0.5, 0.1, 0.6])
    monkeypatch.setattr(step, "evaluate", lambda *args: evaluate(*args) | {"top1": next(top1)})
    step.train(flags(step, tree, tmp_path, "--max_iters", "5"))
    now[0] += 10_000  # between the two runs
    more = "--max_iters 8 --eval_interval 8 --init_from resume".split()
    final = step.train(flags(step, tree, tmp_path, *more))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1] == final
    # Two updates take 8, an evaluation 10, and 20 for each of last.pt and a better best.pt.
    first = [100, 100 + 50 + 8, 158 + 50 + 8, 216 + 30 + 4]
    assert [r["seconds"] for r in records[:4]] == first
    for record in records[1:]:
        assert record["data_share"] == pytest.approx(3 / 4)
        assert record["images_per_second"] == pytest.approx(8 / 4)
    saved = torch.load(tmp_path / "out" / "last.pt")["state"]["seconds"]
    assert final["seconds"] == first[-1] + 10 + 100 + 12 and saved == final["seconds"] + 10


def test_the_bar_shows_every_hundredth_loss(step, tree, tmp_path, monkeypatch):
    """Not every one: to read a loss, the CPU has to wait for the GPU."""
    small_net(step, monkeypatch)
    losses, shown = (torch.tensor(i / 8) for i in range(202)), []
    batch = torch.zeros(1), torch.zeros(1)
    monkeypatch.setattr(step, "evaluate", lambda *args: {"val_loss": 1.0, "top1": 0.0, "top5": 0.0})
    monkeypatch.setattr(step, "load_batches", lambda *args: iter(lambda: batch, None))
    monkeypatch.setattr(step, "accumulate_gradients", lambda *args: next(losses))
    monkeypatch.setattr(step.tqdm, "set_postfix", lambda bar, **values: shown.append(values))
    step.train(flags(step, tree, tmp_path, "--max_iters", "202", "--eval_interval", "202"))
    assert shown == [{"loss": f"{i / 8:.4f}", "refresh": False} for i in (0, 100, 200)]


def test_only_as_a_program_it_lets_cudnn_choose_its_kernels(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    step.train(flags(step, tree, tmp_path))
    assert not torch.backends.cudnn.benchmark
    assert run_main("15_imagenet", "--data_dir", tmp_path / "missing")[0] == 2
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("error", [None, "no C++ compiler"])
def test_without_a_compiler_it_runs_eagerly_and_says_so(step, monkeypatch, capsys, error):
    def compile_(function):
        if error:
            raise RuntimeError(f"{error}\nand much more")
        return function if isinstance(function, nn.Module) else lambda x: x

    monkeypatch.setattr(torch, "compile", compile_)
    model = nn.Linear(2, 2)
    args = step.parse_args(["--device", "cpu", "--compile"])
    assert step.compile_model(args, model) is model
    said = capsys.readouterr().out
    assert ("falls back to eager mode" in said and error in said) if error else not said


def test_training_runs_through_the_compiled_model(step, tree, tmp_path, monkeypatch):
    small_net(step, monkeypatch)
    calls = []

    def compile_model(args, model):
        return lambda x: (calls.append(1), model(x))[1]

    monkeypatch.setattr(step, "compile_model", compile_model)
    step.train(flags(step, tree, tmp_path))
    assert len(calls) == 6


def test_recipes_are_the_published_ones(step):
    # torchvision's flag 0.99998, for 32 updates of 1024 images in one of 600 epochs
    assert (1 - 2e-5 * 32 * 1024 / 600) ** (1 / 32) == pytest.approx(0.999966, abs=1e-6)
    common = {"min_scale": 0.08, "depth": 50, "small_stem": False, "batch_size": 1024}
    common |= {"label_smoothing": 0.1, "warmup_epochs": 5, "pack_size": 256, "test_size": 224}
    plain = {"mixup": 0.0, "cutmix": 0.0, "random_erase": 0.0, "trivial_augment": False}
    short = {"train_size": 176, "test_crop": 0.875, "learning_rate": 0.5, "weight_decay": 5e-5}
    short |= {"ema_decay": 0.9999, "epochs": 90} | plain
    mixed = {"mixup": 0.1, "cutmix": 1.0, "train_size": 160, "test_crop": 0.95, "epochs": 100}
    long = {"train_size": 176, "test_crop": 0.965, "learning_rate": 0.125, "weight_decay": 2e-5}
    long |= {"ema_decay": 0.999966, "epochs": 600, "mixup": 0.2, "cutmix": 1.0}
    long |= {"random_erase": 0.1, "trivial_augment": True}
    tiny = {"train_size": 32, "test_size": 32, "test_crop": 0.875, "min_scale": 0.25, "depth": 18}
    tiny |= {"small_stem": True, "batch_size": 128, "learning_rate": 1.0, "weight_decay": 1e-3}
    tiny |= {"warmup_epochs": 2, "ema_decay": 0.99, "epochs": 32}
    recipes = {"90": short, "100": short | mixed, "600": short | long, "tiny": short | tiny}
    assert list(step.RECIPES) == list(recipes)
    for name, changes in recipes.items():
        args = vars(step.parse_args(["--recipe", name]))
        expected = common | changes
        assert {key: args[key] for key in expected} == expected


def test_recipes_change_defaults_that_flags_override(step):
    assert step.parse_args([]).epochs == 90
    args = step.parse_args(["--recipe", "600", "--epochs", "3"])
    assert args.epochs == 3 and args.trivial_augment and args.random_erase == 0.1
    assert 1024 / 256 * args.learning_rate == 0.5  # torchvision's, for 1,024 images
    assert step.parse_args([]).num_workers <= 16


def test_mixed_images_keep_the_channels_last(step, tree, tmp_path, monkeypatch):
    # On a GPU torch.roll, and with it MixUp, returns the usual layout.
    monkeypatch.setattr(step.v2, "MixUp", lambda **_: lambda x, y: (x.contiguous(), y))
    args = flags(step, tree, tmp_path, "--mixup", "0.2")
    stats = step.STATS
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    mixed, _ = step.augment(args, x, torch.arange(4), stats, 5)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


LOAD = """import sys; sys.path.insert(0, sys.argv.pop(1))
import torch, train
args = train.parse_args(sys.argv[1:])
images = train.load_data(args)[0]
batches = train.load_batches(args, images, train.minibatches(args, images, 3))
torch.save(next(batches), sys.stdout.buffer)
"""


def test_what_is_loaded_makes_the_same_batches_in_processes(step, tree, tmp_path):
    more = ["--data_dir", str(tree), "--trivial_augment"]
    args = step.parse_args([*TINY, *more])
    images = step.load_data(args)[0]
    x, y = next(step.load_batches(args, images, step.minibatches(args, images, 3)))
    # From a process of its own: a fork of this one, where JAX has threads, might hang.
    command = [sys.executable, "-c", LOAD, folder_of("15_imagenet"), *TINY, *more]
    command += ["--num_workers", "2"]
    helped = subprocess.run(command, check=True, capture_output=True, timeout=100).stdout
    x_helped, y_helped = torch.load(io.BytesIO(helped))
    assert torch.equal(x, x_helped) and torch.equal(y, y_helped)


# ---------- predict.py ----------


@pytest.fixture
def predict():
    """A function that runs predict.py with these flags in this process: (exit code, stderr)."""
    before = sys.modules.pop("train", None)
    yield lambda *argv: run_main("15_imagenet", *argv, script="predict.py")
    sys.modules.pop("train", None)
    if before:
        sys.modules["train"] = before


def test_predict_names_the_five_most_likely_classes(step, tree, tmp_path, capsys, predict):
    (tree / "words.txt").write_bytes(b"\nlone\nn00000002\ttabby, tabby cat\nn1\tcaf\xe9\n")
    (tree / "LOC_synset_mapping.txt").write_text("n00000001 tench\n")
    args = flags(step, tree, tmp_path, "--max_iters", "2", "--depth", "34", "--test_size", "24")
    step.train(args)
    capsys.readouterr()
    files = [next((tree / "val" / name).iterdir()) for name in ("n00000002", "n00000001")]
    assert predict("--out_dir", args.out_dir, *files) == (0, "")
    lines = capsys.readouterr().out.splitlines()
    for file, line in zip(files, lines, strict=True):
        assert line.startswith(f"{file}: ") and line.count("%") == 4
        assert "n00000002 tabby, tabby cat" in line and "n00000003" in line
        assert "n00000001 tench" in line
    # The first class is the averaged model's, whose flags come from the checkpoint.
    model = step.ResNet(34, 4, True)
    model.load_state_dict(torch.load(args.out_dir / "best.pt")["ema"])
    x = step.crop(args, step.decode(np.fromfile(files[0], np.uint8)), None)[None]
    with torch.no_grad():
        p = model.eval()(step.normalize(x / 255, step.STATS)).softmax(1)[0]
    assert lines[0].startswith(f"{files[0]}: {p.max():.1%} n{p.argmax():08d}")


def test_bad_input_of_predict_is_one_line(step, tree, tmp_path, predict):
    code, errors = predict("--out_dir", tmp_path, "a.jpeg")
    assert code == 2 and errors.count("\n") == 1 and "best.pt is missing" in errors
    step.train(args := flags(step, tree, tmp_path, "--max_iters", "1"))
    (tmp_path / "text.jpeg").write_text("not an image")
    for name in ("text.jpeg", "none.jpeg"):
        code, errors = predict("--out_dir", args.out_dir, tmp_path / name)
        assert code == 2 and errors.count("\n") == 1 and str(tmp_path / name) in errors
    code, errors = predict()
    assert code == 2 and errors.count("\n") == 1 and "IMAGE" in errors


# ---------- bad input ----------


def error_of(*argv):
    code, errors = run_main("15_imagenet", *TINY, *argv)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors, errors
    return errors


def test_val_without_class_folders_gives_the_fix(tree, tmp_path):
    for path in list((tree / "val").glob("*/*")):
        path.rename(tree / "val" / path.name)
    for folder in list((tree / "val").glob("n*[0-9]")):
        if folder.is_dir():
            folder.rmdir()
    errors = error_of("--data_dir", tree, "--out_dir", tmp_path / "out")
    assert str(tree / "val") in errors and "valprep.sh" in errors
    assert not (tmp_path / "out").exists()


def test_absent_data_says_where_it_belongs(tmp_path):
    errors = error_of("--data_dir", tmp_path / "nowhere", "--out_dir", tmp_path / "out")
    assert str(tmp_path / "nowhere" / "train") in errors and "standins.py" in errors
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_one_line(step, tree, tmp_path, monkeypatch):
    place = ["--data_dir", tree, "--out_dir", tmp_path / "out"]
    assert "--batch_size 65" in error_of(*place, "--batch_size", "65")
    assert "--micro_batch_size" in error_of(*place, "--batch_size", "9", "--micro_batch_size", "4")
    step.load_data(flags(step, tree, tmp_path, "--batch_size", "64"))
    shutil.rmtree(tree / "cache")
    (tmp_path / "file").write_text("")
    assert "--cache_dir" in error_of(*place, "--cache_dir", tmp_path / "file")
    assert "last.pt" in error_of(*place, "--init_from", "resume")
    if not torch.cuda.is_available():
        assert "--device cuda" in error_of(*place, "--device", "cuda")
    assert not (tmp_path / "out").exists()
    extra = tree / "val" / "n00000009"
    extra.mkdir()
    assert "n00000009" in error_of(*place)  # it is empty
    extra.rmdir()
    (tree / "val" / "n00000003").rename(extra)
    assert "differ in class folders" in error_of(*place)
    extra.rename(tree / "val" / "n00000003")
    for path in (tree / "val").glob("*/*"):
        path.unlink()
    assert f"{tree}/val" in error_of(*place)
    shutil.rmtree(tree / "val")
    shutil.rmtree(tree / "cache", ignore_errors=True)
    assert str(tree / "val") in error_of(*place)
    assert not (tree / "cache").exists()  # nothing was packed before this was noticed


def test_shared_memory_must_hold_the_minibatches_of_the_workers(step, tree, tmp_path, monkeypatch):
    args = flags(step, tree, tmp_path, "--batch_size", "8")
    args.train_size, args.test_size = 10, 20
    step.load_data(args)  # packs the images in this process: no fork of pytest, which has threads
    args.num_workers = 2
    # Bytes: two minibatches per worker, and the workers of training and of evaluation together.
    needed = 2 * 2 * 8 * 3 * (10 * 10 + 20 * 20)
    real, free, isdir = shutil.disk_usage, {"/dev/shm": needed}, os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm" or isdir(path))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: types.SimpleNamespace(free=free.get(p)) or real(p)
    )
    step.load_data(args)
    free["/dev/shm"] -= 1
    with pytest.raises(OSError, match="/dev/shm"):
        step.load_data(args)
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/dev/shm" and isdir(path))
    step.load_data(args)  # a system without it
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm" or isdir(path))
    args.num_workers = 0  # this process decodes
    step.load_data(args)


def test_out_of_gpu_memory_is_one_line(tree, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    assert "--batch_size" in error_of("--data_dir", tree, "--out_dir", tmp_path / "out")


def test_damaged_checkpoint_is_one_line_and_stays(step, tree, tmp_path, monkeypatch):
    args = flags(step, tree, tmp_path, "--max_iters", "1")
    step.train(args)
    place = ["--data_dir", tree, "--out_dir", args.out_dir, "--init_from", "resume"]
    assert "another model" in error_of(*place, "--depth", "34")
    last = args.out_dir / "last.pt"
    whole = last.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2], whole[:-1]):
        last.write_bytes(damaged)
        assert str(last) in error_of(*place)
        assert last.read_bytes() == damaged


# ---------- real data ----------


@pytest.mark.data
def test_tiny_imagenet_is_learned(step, real_data, tmp_path):
    """Two epochs of the 32: well above chance (5%), below what a whole run reaches."""
    folder = real_data / "tiny-imagenet-20"
    if not folder.is_dir():
        pytest.skip("no tiny-imagenet-20")
    flags = ["--recipe", "tiny", "--data_dir", folder, "--cache_dir", tmp_path, "--epochs", "2"]
    flags += ["--num_workers", "0", "--out_dir", tmp_path / "out"]  # no fork: JAX has threads
    final = step.train(step.parse_args([str(flag) for flag in flags]))
    assert 0.08 < final["top1"] < 0.6
