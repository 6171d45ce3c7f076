"""The benchmark of the GPU steps: its cheapest rows, on the CPU, and what becomes of failures."""

import gzip
import importlib
import json
import sys

import pytest
import standins as standins_script
import torch
from steps import ROOT


@pytest.fixture(scope="module")
def gpu():
    """Return tests/benchmarks/gpu.py as a module."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.pop(0)


@pytest.fixture
def bench(gpu, tmp_path):
    args = gpu.parse_args(["--device", "cpu", "--out", str(tmp_path)])
    bench = gpu.Bench(args, tmp_path)
    bench.data, bench.group = tmp_path / "data", "16"
    return bench


def test_rows_that_compare_a_device_with_the_cpu(gpu, bench):
    bench.measure(["logits", "update", "logits in bf16", "its update"], gpu.compare_updates, "16")
    logits, update, logits_16, update_16 = (row["ours"] for row in bench.rows)
    assert logits == update == 0  # it is the same device
    assert 0 < logits_16 < 0.05
    assert 0 < update_16 < 0.5


def test_a_device_that_computes_something_else_fails(gpu, bench, monkeypatch):
    right, n_calls = gpu.one_update, []

    def wrong(*args):
        n_calls.append(args)
        logits, change = right(*args)
        return logits * (1 if len(n_calls) == 1 else 1.01), change

    monkeypatch.setattr(gpu, "one_update", wrong)
    bench.measure(["logits", "update"], gpu.compare_updates, "16")
    assert [row["note"] for row in bench.rows] == ["failed: 0.01 exceeds 0.001"] * 2
    with pytest.raises(RuntimeError, match="nan exceeds"):
        gpu.within(float("nan"), 1)


def test_killed_and_resumed_and_moved(gpu, bench):
    standins_script.write_shakespeare(bench.data, 300)
    bench.measure(["moved"], gpu.move_checkpoint, "16", "cpu", "cpu")
    bench.measure(["killed"], gpu.kill_and_resume, "16")
    assert [row["ours"] for row in bench.rows] == [0, 0], bench.rows


def test_a_row_that_fails_does_not_stop_the_others(gpu, bench, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PUBLISHED", {"b": (2.0, "a source"), "c": (2.0, "a source")})

    def broken(bench):
        raise ValueError("two\nlines | of it")

    bench.measure(["a", "b"], broken)
    bench.measure(["c", "d", "e"], lambda bench: [(1.0, "a note"), None, 3e6])
    bench.group_deadline = 0
    bench.measure(["f"], lambda bench: [1])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "| 16 | a |  |  |  | failed: two lines / of it |",
        "| 16 | b |  | 2 |  | failed: two lines / of it |",
        "| 16 | c | 1 | 2 | 0.5 | a note; a source |",
        "| 16 | d |  |  |  |  |",
        "| 16 | e | 3,000,000 |  |  |  |",
        "| 16 | f |  |  |  | skipped: no time left |",
    ]


def test_a_run_that_fails_gives_its_reason(gpu, bench):
    bench.measure(["a"], lambda bench: bench.run("16", "--n_embd", 7))
    (row,) = bench.rows
    assert row["note"].startswith("failed: exit code 2: train.py: error: ")
    assert "--n_embd 7" in row["note"]


def test_the_table_is_written(gpu, tmp_path, monkeypatch, capsys):
    def group(bench):
        bench.measure(["a row: MFU"], lambda bench: [0.205])

    def broken(bench):
        bench.measure(["another"], lambda bench: importlib.import_module("not_there"))

    monkeypatch.setattr(gpu, "GROUPS", {"16": group, "17": broken})
    flags = ["--device", "cpu", "--out", str(tmp_path)]
    rows = gpu.main(flags)
    assert [(row["ours"], row["ratio"]) for row in rows] == [(0.205, 0.5), (None, None)]
    assert rows[1]["note"] == "skipped: No module named 'not_there'"
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["rows"] == rows
    assert torch.__version__.startswith(saved["machine"]["torch"])
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert lines[-2:] == [gpu.markdown(row) for row in rows]
    assert capsys.readouterr().out.splitlines() == lines


def test_mnist_may_be_zipped(gpu, bench, tmp_path):
    standins_script.write_mnist(tmp_path / "given", 20, 10)
    raw, expected = tmp_path / "given/MNIST/raw", {}
    for path in list(raw.iterdir()):
        expected[path.name] = path.read_bytes()
        (tmp_path / "given" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    bench.args.data_dir = tmp_path / "given"
    data = gpu.write_data(bench)
    assert {p.name: p.read_bytes() for p in (data / "MNIST/raw").iterdir()} == expected
    assert (bench.digits, bench.text) == ("MNIST", "synthetic play")
