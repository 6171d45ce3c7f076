"""A mistake by the user gives one clear line and exit code 2, and nothing is written or lost."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from steps import (
    FOLDERS,
    ROOT,
    STEPS,
    definitions,
    distinct,
    load_step,
    main_guard,
    run_main,
    source,
    tiny_flags,
)
from tqdm import tqdm

NUMBER = re.compile(
    r'flag\(\s*"--(\w+)",\s*type=number\((int|float), ([-+.\de]+)(?:, ([-+.\d_e]+))?\)'
)
NUMBERS = [(step, *found) for step in FOLDERS for found in NUMBER.findall(source(step))]
MNIST_STEPS = [step for step in FOLDERS if re.search(r"\bMNIST\(|MNIST_SHA256", source(step))]
LOADERS = distinct(MNIST_STEPS, lambda step: definitions(step)["load_data"])
GUARDS = distinct(FOLDERS, main_guard)
MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
BREAKS = {
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "another format": lambda content: b"<html><body>not found</body></html>",
}
# Every file broken in every way once; of the other copies of load_data one case.
BROKEN = [(LOADERS[0], name, how) for name in MNIST_FILES for how in BREAKS]
BROKEN += [(step, MNIST_FILES[0], "truncated") for step in LOADERS[1:]]


def assert_one_line(errors, *words):
    assert len(errors.strip().splitlines()) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert str(word) in errors


def test_every_step_has_numbers_to_check():
    assert {step for step, *_ in NUMBERS} == set(FOLDERS)


@pytest.mark.parametrize(("step", "flag", "kind", "low", "high"), NUMBERS)
def test_bad_number_names_its_flag(step, flag, kind, low, high, capsys):
    below = "-1" if float(low) >= 0 else "-1e30"
    above = f"{float(high or 1e9) + 1:.0f}"
    zero = ["0"] * (float(low) > 0)
    for bad in ("abc", "nan", "1e400", below, above, *zero):
        with pytest.raises(SystemExit) as end:
            load_step(step).parse_args([f"--{flag}={bad}"])
        assert end.value.code == 2
        assert_one_line(capsys.readouterr().err, f"--{flag}", bad)


@pytest.mark.parametrize("step", FOLDERS)
def test_unknown_flag(step, capsys):
    with pytest.raises(SystemExit) as end:
        load_step(step).parse_args(["--no_such_flag", "1"])
    assert end.value.code == 2
    assert_one_line(capsys.readouterr().err, "--no_such_flag")


@pytest.mark.parametrize("step", FOLDERS)
def test_unwritable_out_dir_is_named(step, standins, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path / "file" / "out"))
    assert code == 2
    assert_one_line(errors, "train.py: error: ", tmp_path / "file")


def raise_in_the_loop(monkeypatch, error):
    def iterate(bar):
        raise error

    monkeypatch.setattr("tqdm.tqdm.__iter__", iterate)


@pytest.mark.parametrize("step", GUARDS)
def test_too_little_memory_is_one_line(step, standins, tmp_path, monkeypatch):
    raise_in_the_loop(monkeypatch, MemoryError("Unable to\nallocate 8 TiB"))
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert code == 2
    assert_one_line(errors, "train.py: error: ", "8 TiB")
    monkeypatch.setenv("LOCAL_RANK", "1")  # under torchrun, one process of a machine reports it
    assert (run_main(step, *tiny_flags(step, standins, tmp_path))[1] == "") == step.startswith("17")


@pytest.mark.parametrize("step", GUARDS)
@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError])
def test_a_bug_of_the_learner_keeps_its_traceback(step, error, standins, tmp_path, monkeypatch):
    raise_in_the_loop(monkeypatch, error("a bug"))
    with pytest.raises(error, match="a bug"):
        run_main(step, *tiny_flags(step, standins, tmp_path))


WRITERS = [x for x in FOLDERS if all(f'"--{y}"' in source(x) for y in ("input", "prompt"))]


@pytest.mark.parametrize("step", distinct(WRITERS, main_guard))
def test_a_terminal_that_lacks_characters(step, standins, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("þæt wæs gód cyning\n" * 200, encoding="utf-8")
    flags = [*tiny_flags(step, standins, tmp_path), "--input", tmp_path / "text.txt"]
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert run_main(step, *flags) == (0, "")
    stdout.flush()
    assert b"?" in stdout.buffer.getvalue()
    assert "æ" in (tmp_path / "samples.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("step", [step for step in GUARDS if '"--device"' in source(step)])
def test_a_batch_over_the_gpus_memory(step, standins, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert code == 2
    assert_one_line(errors, "--batch_size", "memory")


def finite_records(out_dir):
    """Return the records of metrics.jsonl; a value that is inf or nan fails the test."""

    def refuse(name):
        raise AssertionError(f"{name} was recorded")

    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# Softmax regression and Adam move by bounded updates: their losses grow huge, but stay finite.
@pytest.mark.parametrize(
    "step", [step for step in STEPS if step[:2] in ("01", "02", "03", "05", "06", "07")]
)
def test_diverging_run_stops_and_keeps_what_it_wrote(step, standins, tmp_path):
    flags = [*tiny_flags(step, standins, tmp_path), "--learning_rate", "1e9", "--max_iters", "200"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, a second line on stderr
        code, errors = run_main(step, *flags)
    assert code == 2
    assert_one_line(errors, "train.py: error: ", "--learning_rate 1000000000.0")
    stopped = int(re.search(r"at iteration (\d+)", errors)[1])
    records = finite_records(tmp_path)
    assert records[0]["iter"] == 0
    assert records[-1]["iter"] < stopped <= 200


@pytest.mark.parametrize("step", [step for step in STEPS if "08" <= step[:2] <= "13"])
def test_loss_that_is_not_a_number_stops_the_run(step, standins, tmp_path, monkeypatch):
    real = torch.nn.functional.cross_entropy

    def cross_entropy(logits, y, **options):  # in training, the gradient makes the parameters nan
        return real(logits, y, **options) * (math.nan if logits.requires_grad else 1)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", cross_entropy)
    flags = tiny_flags(step, standins, tmp_path)
    code, errors = run_main(step, *flags)
    assert code == 2
    second = flags[flags.index("--eval_interval") + 1]
    assert_one_line(errors, f"at iteration {second}", "--learning_rate")
    assert [record["iter"] for record in finite_records(tmp_path)] == [0]


@pytest.mark.parametrize("step", LOADERS)
def test_missing_mnist_says_what_to_do(step, tmp_path, no_network):
    code, errors = run_main(step, "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    assert code == 2
    raw = tmp_path / "data" / "MNIST" / "raw"
    assert_one_line(errors, raw, "no network", f"tests/standins.py {tmp_path / 'data'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "name", "how"), BROKEN)
def test_broken_mnist_file_is_named(step, name, how, standins, tmp_path, no_network):
    shutil.copytree(standins / "MNIST", tmp_path / "MNIST")
    broken = tmp_path / "MNIST" / "raw" / name
    broken.write_bytes(BREAKS[how](broken.read_bytes()))
    code, errors = run_main(step, "--data_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, broken.parent / name.split("-")[0], "tests/standins.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", LOADERS)
def test_labels_of_other_images_are_noticed(step, standins, tmp_path, no_network):
    shutil.copytree(standins / "MNIST", tmp_path / "MNIST")
    raw = tmp_path / "MNIST" / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    code, errors = run_main(step, "--data_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, raw / "train", "images", "labels", "tests/standins.py")
    assert not (tmp_path / "out").exists()


BATCHES = distinct(
    [*STEPS[:6], *(step for step in MNIST_STEPS if step in STEPS)],
    lambda step: (definitions(step).get("minibatches"), "exceeds the" in source(step)),
)


@pytest.mark.parametrize("step", BATCHES)
def test_a_batch_larger_than_the_data_is_smaller_or_refused(step, standins, tmp_path):
    flags = [*tiny_flags(step, standins, tmp_path), "--batch_size", "5000", "--max_iters", "2"]
    code, errors = run_main(step, *flags)
    if "exceeds the" in source(step):  # a step that needs batches of one size
        assert code == 2
        assert_one_line(errors, "--batch_size 5000", "2000")
    else:
        assert code == 0
        assert finite_records(tmp_path)[-1]["iter"] == 2


@pytest.mark.parametrize("step", FOLDERS)
def test_interrupt_leaves_with_130(step, standins, tmp_path, monkeypatch):
    real = tqdm.__iter__

    def interrupt(bar):
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.SIG_DFL:  # the process ends, and the shell reports 130
            raise SystemExit(130)
        handler(signal.SIGINT, None)
        yield from real(bar)  # for a step that first saves a checkpoint

    monkeypatch.setattr("tqdm.tqdm.__iter__", interrupt)
    monkeypatch.setattr("os._exit", sys.exit)
    code, _ = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert code == 130


INTERRUPTED = [
    *((step, "imports") for step in STEPS if step[:2] in ("01", "08")),
    *((step, "a callback") for step in STEPS if step[:2] == "01"),
    *((step, "training") for step in STEPS if step[:2] in ("01", "06", "10", "13")),
]
WAITING = {  # instead of tqdm: import it, and wait for the signal
    "imports": "import time\nprint('waiting', flush=True)\ntime.sleep(60)\n",
    # JAX has a callback for garbage collection: what a signal's handler raises in one is ignored.
    "a callback": """import gc, time
def wait(phase, info):
    print('waiting', flush=True)
    time.sleep(60)
gc.callbacks.append(wait)
gc.collect()
""",
}


@pytest.fixture(scope="module")
def interrupted(standins, tmp_path_factory):
    """Interrupt processes of their own, two at a time: {(step, when): future of the result}."""

    def run(step, when):
        folder = tmp_path_factory.mktemp(f"{step}_{when}")
        flags = [*tiny_flags(step, standins, folder / "out"), "--max_iters", "1000000"]
        command = [sys.executable, str(ROOT / step / "train.py"), *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if when in WAITING:
            (folder / "tqdm.py").write_text(WAITING[when])
            env["PYTHONPATH"] = str(folder)
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if when in WAITING:
            assert process.stdout.readline() == "waiting\n"
        metrics = folder / "out" / "metrics.jsonl"
        while when == "training" and not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=40)[1]
        return process.returncode, errors, folder / "out"

    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(run, *case) for case in INTERRUPTED}


@pytest.mark.parametrize(("step", "when"), INTERRUPTED)
def test_interrupted_process_leaves_with_130_and_no_traceback(step, when, interrupted):
    code, errors, out_dir = interrupted[step, when].result()
    assert code in (130, -signal.SIGINT)  # a shell reports both as 130
    assert not errors
    assert out_dir.exists() == (when == "training")
    if when == "training":
        assert finite_records(out_dir)


@pytest.mark.parametrize("step", FOLDERS)
def test_plot_of_a_missing_run(step, tmp_path):
    code, errors = run_main(step, tmp_path / "none", script="plot.py")
    assert code == 2
    assert_one_line(errors, tmp_path / "none")
