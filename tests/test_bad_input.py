"""A mistake by the user gives one clear line and exit code 2, and nothing is written or lost."""

import math
import re
import shutil

import pytest
import torch
from steps import STEPS, load_step, run_main, source, tiny_flags

NUMBER = re.compile(
    r'flag\(\s*"--(\w+)",\s*type=number\((int|float), ([-+.\de]+)(?:, ([-+.\d_e]+))?\)'
)
BAD_NUMBERS = [
    (step, flag, bad)
    for step in STEPS
    for flag, kind, low, high in NUMBER.findall(source(step))
    for bad in (
        "abc",
        "nan",
        "1e400",
        "-1" if float(low) >= 0 else "-1e30",
        f"{float(high or 1e9) + 1:.0f}",
        *(["0"] * (float(low) > 0)),
    )
]
MNIST_STEPS = [s for s in STEPS if "MNIST_SHA256" in source(s)]
MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def assert_one_line(errors, *words):
    assert len(errors.strip().splitlines()) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert str(word) in errors


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_numbers_to_check(step):
    assert any(step == bad[0] for bad in BAD_NUMBERS)


@pytest.mark.parametrize(("step", "flag", "bad"), BAD_NUMBERS)
def test_bad_number_names_its_flag(step, flag, bad, capsys):
    with pytest.raises(SystemExit) as end:
        load_step(step).parse_args([f"--{flag}={bad}"])
    assert end.value.code == 2
    assert_one_line(capsys.readouterr().err, f"--{flag}", bad)


@pytest.mark.parametrize("step", STEPS)
def test_unknown_flag(step, capsys):
    with pytest.raises(SystemExit) as end:
        load_step(step).parse_args(["--no_such_flag", "1"])
    assert end.value.code == 2
    assert_one_line(capsys.readouterr().err, "--no_such_flag")


@pytest.mark.parametrize("step", STEPS)
def test_unwritable_out_dir(step, standins, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path / "file" / "out"))
    assert code == 2
    assert_one_line(errors, "--out_dir", tmp_path / "file")


@pytest.mark.parametrize("step", [step for step in STEPS if "--device" in source(step)])
def test_a_batch_over_the_gpus_memory(step, standins, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert code == 2
    assert_one_line(errors, "--batch_size", "memory")


# Softmax regression and Adam move by bounded steps: their losses grow huge, but stay finite.
@pytest.mark.parametrize(
    "step", [step for step in STEPS if step[:2] in ("01", "02", "03", "05", "06", "07")]
)
def test_diverging_run_stops_and_keeps_what_it_wrote(step, standins, tmp_path):
    flags = [*tiny_flags(step, standins, tmp_path), "--learning_rate", "1e9", "--max_iters", "200"]
    code, errors = run_main(step, *flags)
    assert code == 2
    assert_one_line(errors, "iteration", "learning_rate")
    assert (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("step", STEPS[:3])
def test_a_loss_that_overflows_unseen_is_not_recorded(step, tmp_path):
    flags = ["--learning_rate", "1e9", "--max_iters", "2", "--eval_interval", "2"]
    code, errors = run_main(step, *flags, "--n_examples", "500", "--out_dir", tmp_path)
    assert code == 2
    assert_one_line(errors, "'iter': 2", "--learning_rate")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("step", [step for step in STEPS if "08" <= step[:2] <= "13"])
def test_loss_that_is_not_a_number_stops_the_run(step, standins, tmp_path, monkeypatch):
    real = torch.nn.functional.cross_entropy
    calls = []

    def cross_entropy(logits, y, **options):
        calls.append(logits.requires_grad)
        return real(logits, y, **options) * (math.nan if sum(calls) > 2 else 1)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", cross_entropy)
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert code == 2
    assert_one_line(errors, "nan", "iteration 2", "learning_rate")


@pytest.mark.parametrize("step", STEPS[:6])
def test_batch_larger_than_the_data(step, tmp_path):
    flags = ["--n_examples", "10", "--batch_size", "11", "--out_dir", tmp_path / "out"]
    code, errors = run_main(step, *flags)
    assert code == 2
    assert_one_line(errors, "--batch_size 11", "--n_examples 10")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", MNIST_STEPS)
def test_missing_mnist_says_what_to_do(step, tmp_path, no_network):
    code, errors = run_main(step, "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, "train-images-idx3-ubyte", "tests/standins.py", tmp_path / "data")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", MNIST_STEPS)
@pytest.mark.parametrize("name", MNIST_FILES)
def test_truncated_mnist_file_is_named(step, name, standins, tmp_path):
    shutil.copytree(standins / "MNIST", tmp_path / "MNIST")
    broken = tmp_path / "MNIST" / "raw" / name
    broken.write_bytes(broken.read_bytes()[:-100])
    code, errors = run_main(step, "--data_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, tmp_path / "MNIST" / "raw", name.split("-")[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", MNIST_STEPS)
def test_labels_of_other_images_are_noticed(step, standins, tmp_path):
    shutil.copytree(standins / "MNIST", tmp_path / "MNIST")
    raw = tmp_path / "MNIST" / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    code, errors = run_main(step, "--data_dir", tmp_path, "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, raw / "train", "not as many labels as images")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", MNIST_STEPS)
def test_batch_larger_than_mnist(step, standins, tmp_path):
    flags = ["--data_dir", standins, "--batch_size", "5000", "--out_dir", tmp_path / "out"]
    code, errors = run_main(step, *flags)
    assert code == 2
    assert_one_line(errors, "--batch_size 5000", "2000")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", STEPS)
def test_interrupt_leaves_with_130(step, standins, tmp_path, monkeypatch):
    def interrupt(bar):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.__iter__", interrupt)
    code, errors = run_main(step, *tiny_flags(step, standins, tmp_path))
    assert code == 130
    assert_one_line(errors, "interrupted")


@pytest.mark.parametrize("step", STEPS)
def test_plot_of_a_missing_run(step, tmp_path):
    code, errors = run_main(step, tmp_path / "none", script="plot.py")
    assert code == 2
    assert_one_line(errors, tmp_path / "none")
