"""Nothing of the user's is lost: kills and full disks at every write, locks, odd files."""

import builtins
import errno
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import (
    STEPS,
    definitions,
    distinct,
    folder_of,
    load_plot,
    load_step,
    main_guard,
    run_main,
    source,
    tiny_flags,
)

LONG_RUNS = [step for step in STEPS if '"--overwrite"' in source(step)]
MNIST_STEPS = [step for step in STEPS if " MNIST(" in source(step)]
LOADERS = distinct(MNIST_STEPS, lambda step: definitions(step)["load_data"])
TIMES = ("seconds", "images_per_second", "tokens_per_second", "data_share", "memory_gib", "mfu")


def assert_one_line(result, *words):
    code, errors = result
    assert code == 2
    assert len(errors.strip().splitlines()) == 1, errors
    for word in words:
        assert str(word) in errors


def hashes(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flags_of(step, standins, out_dir, *more):
    flags = [*tiny_flags(step, standins, out_dir), "--device", "cpu", "--dtype", "float32"]
    if step == "15_imagenet":
        flags += ["--cache_dir", str(standins / "packs")]
    return [*flags, "--max_iters", "2", "--eval_interval", "1", *map(str, more)]


# ---------- kills and full disks ----------
class Killed(BaseException):
    """As SIGKILL, it passes every `except Exception`."""


@pytest.fixture(scope="module", params=LONG_RUNS)
def long_run(request, standins):
    """A function (out_dir, *flags) that runs a step of small size in this process."""
    name, module = request.param, load_step(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plot_run", lambda out_dir: out_dir / "loss.png")
        if name == "15_imagenet":  # a network that is small, but has all kinds of parameters
            make = module.ResNet

            def small(depth, n_classes, small_stem):
                net = make(depth, n_classes, small_stem)
                net.layer2 = net.layer3 = net.layer4 = torch.nn.Identity()
                net.fc = torch.nn.Linear(64, n_classes)
                return net

            patch.setattr(module, "ResNet", small)

        def run(out, *more):
            more = ["--max_iters", 1, *more]
            return module.train(module.parse_args(flags_of(name, standins, out, *more)))

        yield name, run


def fail_at(patch, out_dir, n, error):
    """Let the n-th write into out_dir fail: an open, half of a log's record, a new name."""
    calls = [0]

    def counted(function, before=lambda *args: None):
        def call(*args, **kwargs):
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            mine = str(args[0]).startswith(str(out_dir))
            if mine and (function is not builtins_open or mode[0] in "wax"):
                calls[0] += 1
                if calls[0] == n:
                    before(*args)
                    raise error
            return function(*args, **kwargs)

        return call

    def half_a_record(path, mode="r", **_):
        with builtins_open(path, mode) as file:
            file.write('{"iter": 1, "sec' if "b" not in mode else b"PK")

    builtins_open = open
    patch.setattr(builtins, "open", counted(builtins_open, half_a_record))
    for name in ("replace", "link", "truncate"):
        patch.setattr(os, name, counted(getattr(os, name)))
    return calls


def outcome(out_dir):
    """Return all that a run leaves, but the times."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]
    samples = out_dir / "samples.txt"
    checkpoints = {name: torch.load(out_dir / name) for name in ("last.pt", "best.pt")}
    for checkpoint in checkpoints.values():
        state = checkpoint["state"]
        state["record"] = {k: v for k, v in state["record"].items() if k not in TIMES}
        del state["seconds"], state["log_sizes"]  # the records' times vary in length
    return records, samples.read_text() if samples.exists() else "", checkpoints


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_run_that_fails_at_any_write_ends_as_the_unbroken_one(long_run, tmp_path):
    name, run = long_run
    run(tmp_path / "unbroken")
    expected = outcome(tmp_path / "unbroken")
    # The code that writes is the same in all: a full disk is tried in the quickest of them.
    errors = [Killed(), *[OSError(errno.ENOSPC, "No space left")] * name.startswith("16")]
    for error in errors:
        n, n_writes = 0, None
        while n_writes is None:
            n += 1
            out_dir = tmp_path / f"{type(error).__name__}_{n}"
            with pytest.MonkeyPatch.context() as patch:
                calls = fail_at(patch, out_dir, n, error)
                try:
                    run(out_dir)
                    n_writes = calls[0]  # it wrote less often than n times
                except Killed:
                    pass
                except OSError:
                    assert not list(out_dir.glob("*.tmp"))
            if n_writes is None:
                can_resume = (out_dir / "last.pt").exists()
                run(out_dir, *(["--init_from", "resume"] if can_resume else ["--overwrite"]))
            assert_same(outcome(out_dir), expected)
            assert not list(out_dir.glob("*.tmp"))
        assert n_writes >= 10


# ---------- nothing is overwritten unasked ----------
@pytest.mark.parametrize("step", LONG_RUNS)
def test_a_finished_run_is_not_replaced_unasked(step, standins, tmp_path):
    flags = flags_of(step, standins, tmp_path)
    assert run_main(step, *flags)[0] == 0
    before = hashes(tmp_path)
    assert_one_line(run_main(step, *flags), tmp_path / "last.pt", "--overwrite", "resume")
    (tmp_path / "last.pt").rename(tmp_path / "mine.pt")
    assert_one_line(run_main(step, *flags), ".pt", "--overwrite")
    (tmp_path / "mine.pt").rename(tmp_path / "last.pt")
    assert hashes(tmp_path) == before
    assert run_main(step, *flags, "--overwrite", "--max_iters", 1)[0] == 0
    assert torch.load(tmp_path / "last.pt")["state"]["iter_num"] == 1


LOCK = """import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_SH)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("step", LONG_RUNS)
def test_two_runs_do_not_write_to_one_folder(step, standins, tmp_path):
    flags = flags_of(step, standins, tmp_path)
    run_main(step, *flags)
    before = hashes(tmp_path)
    command = [sys.executable, "-c", LOCK, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    for more in (["--overwrite"], ["--init_from", "resume"]):
        assert_one_line(run_main(step, *flags, *more), tmp_path, "another process")
    other.communicate("")
    assert hashes(tmp_path) == before
    assert run_main(step, *flags, "--init_from", "resume") == (0, "")


@pytest.mark.parametrize("step", LONG_RUNS)
def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(step, standins, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.tmp").symlink_to(tmp_path / "mine.txt")
    assert run_main(step, *flags_of(step, standins, tmp_path / "out"))[0] == 0
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("step", LONG_RUNS)
def test_a_checkpoint_with_other_contents_is_one_line(step, standins, tmp_path):
    flags = flags_of(step, standins, tmp_path)
    run_main(step, *flags)
    good = torch.load(tmp_path / "last.pt")
    other = {"model": {}, "state": {"iter_num": 3}}  # of another program
    changes = [{"iter_num": "2"}, {"record": []}, {"best": None}, {"log_sizes": 1.0}]
    for bad in [other, [1], *(good | {"state": good["state"] | change} for change in changes)]:
        torch.save(bad, tmp_path / "last.pt")
        with pytest.raises(OSError, match=r"last\.pt is damaged, or no checkpoint of this step"):
            load_step(step).load_checkpoint(tmp_path / "last.pt", {}, good["state"])
    before = hashes(tmp_path)
    assert_one_line(run_main(step, *flags, "--init_from", "resume"), tmp_path / "last.pt")
    assert hashes(tmp_path) == before


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("step", LONG_RUNS)
def test_no_pickle_is_executed(step, tmp_path):
    torch.save({"state": {}, "model": Malicious(tmp_path / "executed")}, tmp_path / "last.pt")
    with pytest.raises(OSError, match="damaged"):
        load_step(step).read_checkpoint(tmp_path / "last.pt", {})
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("step", LONG_RUNS)
def test_a_file_is_on_the_disk_before_it_gets_its_name(step, tmp_path, monkeypatch):
    module, calls = load_step(step), []
    fsync, replace = os.fsync, os.replace

    def checked_fsync(descriptor):  # what a buffer still held would be missing from the size
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", checked_fsync)
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    module.write_file(tmp_path / "a.json", lambda file: file.write(b"12345"))
    assert calls == [("fsync", 5), "replace"]
    assert (tmp_path / "a.json").read_bytes() == b"12345"


@pytest.mark.parametrize("step", LONG_RUNS)
def test_a_run_resumes_without_its_logs(step, standins, tmp_path):
    flags = [*flags_of(step, standins, tmp_path), "--max_iters", "1"]
    assert run_main(step, *flags)[0] == 0
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["max_iters"] == 1 and saved["eval_interval"] == 1 and saved["device"] == "cpu"
    assert saved["torch"] == torch.__version__ and saved["python"] == sys.version.split()[0]
    (tmp_path / "metrics.jsonl").unlink()
    assert run_main(step, *flags, "--max_iters", "2", "--init_from", "resume") == (0, "")
    assert '"iter": 2' in (tmp_path / "metrics.jsonl").read_text()


# ---------- data ----------
def idx(array):
    """Return an array as a file of MNIST's format."""
    code = {np.dtype("uint8"): 8, np.dtype(">f4"): 13}[array.dtype]
    return struct.pack(f">HBB{array.ndim}i", 0, code, array.ndim, *array.shape) + array.tobytes()


X, Y = np.arange(50 * 28 * 28).reshape(50, 28, 28), np.arange(50) % 10
ODD_MNIST = {
    "labels over 9": (X, Y + 1),
    "other sizes": (X[:, 1:], Y),
    "black": (0 * X, Y),
    "float": (X.astype(">f4"), Y),
    "empty": (X[:0], Y[:0]),
}


@pytest.mark.parametrize("step", LOADERS)
@pytest.mark.parametrize("odd", ODD_MNIST)
def test_odd_mnist_is_named(step, odd, standins, tmp_path, no_network):
    shutil.copytree(standins / "MNIST", tmp_path / "MNIST")
    for name, values in zip(("images-idx3", "labels-idx1"), ODD_MNIST[odd]):
        values = values if values.dtype == np.dtype(">f4") else values.astype(np.uint8)
        (tmp_path / "MNIST" / "raw" / f"train-{name}-ubyte").write_bytes(idx(values))
    result = run_main(step, "--data_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert_one_line(result, tmp_path / "MNIST" / "raw" / "train", "tests/standins.py")
    assert not (tmp_path / "out").exists()


def test_replaced_images_are_packed_anew(standins, tmp_path):
    step = load_step("15")
    tree = shutil.copytree(standins / "imagenet", tmp_path / "imagenet")
    flags = ["--recipe", "tiny", "--num_workers", "0", "--batch_size", "8", "--data_dir", str(tree)]
    args = step.parse_args([*flags, "--cache_dir", str(tmp_path / "packs")])
    key = (0, None)
    first = step.load_data(args)[0][key][0]
    before = hashes(tmp_path / "packs")
    images = step.list_images(args, "train")[1]
    shutil.copy(images[-1][0], images[0][0])  # in place: only size and time change
    second = step.load_data(args)[0][key][0]
    assert not torch.equal(first, second)
    assert before.items() <= hashes(tmp_path / "packs").items()
    n_packs = len(hashes(tmp_path / "packs"))
    step.load_data(args)
    assert len(hashes(tmp_path / "packs")) == n_packs


# ---------- memory ----------
@pytest.mark.parametrize("step", distinct(STEPS[1:], main_guard))
def test_an_allocation_that_fails_is_one_line(step, standins, tmp_path, monkeypatch):
    def iterate(bar):
        torch.empty(10**15)

    monkeypatch.setattr("tqdm.tqdm.__iter__", iterate)
    result = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert_one_line(result, "train.py: error: ", "allocate", 4 * 10**15)


# ---------- plot.py: its text is the same in all steps but for title and panels ----------
@pytest.mark.parametrize("line", ['{"iter": 2, "train_lo', "", "[1]", "3", '{"iter": NaN}', "\xff"])
def test_plot_skips_damaged_lines(line, tmp_path):
    good = '{"iter": 0, "train_loss": 2.0, "noise_variance": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n", encoding="latin-1")
    assert load_plot(STEPS[0]).read_metrics(tmp_path) == [json.loads(good)]
    assert run_main(STEPS[0], tmp_path, script="plot.py") == (0, "")
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n", encoding="latin-1")
    assert_one_line(run_main(STEPS[0], tmp_path, script="plot.py"), tmp_path)


def test_plot_needs_no_display(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"iter": 0, "train_loss": 2.0, "noise_variance": 0.25}\n'
    )
    command = [sys.executable, str(folder_of(STEPS[0]) / "plot.py"), str(tmp_path)]
    subprocess.run(command, env=os.environ | {"MPLBACKEND": "none such"}, check=True)


# ---------- torchrun ----------
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_workers_of_a_killed_torchrun_save_and_leave(standins, tmp_path):
    step = "17_gpt2_multigpu"
    flags = [*flags_of(step, standins, tmp_path), "--max_iters", "1000000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun = subprocess.Popen(
        [*command, str(folder_of(step) / "train.py"), *flags, "--eval_interval", "1000000"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    assert len(children) >= 2
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    assert torch.load(tmp_path / "last.pt")["state"]["iter_num"] > 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
