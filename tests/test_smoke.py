"""Every step runs: in process on a tiny configuration, and alone, from an empty folder."""

import json
import shutil

import pytest
from steps import ROOT, STEPS, load_step, run_alone, tiny_flags

TIMES = {"seconds", "images_per_second", "tokens_per_second", "mfu", "data_share"}


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES and "_ms" not in key}


@pytest.mark.parametrize("step", STEPS)
def test_tiny_run_leaves_what_it_should(step, standins, tmp_path):
    module = load_step(step)
    out_dir = tmp_path / "new" / "out"
    final = module.train(module.parse_args(tiny_flags(step, standins, out_dir)))
    logged = records(out_dir)
    assert final == logged[-1]
    assert {"iter", "seconds"} <= final.keys()
    assert [r["iter"] for r in logged] == sorted({r["iter"] for r in logged})
    made_by = json.loads((out_dir / "args.json").read_text())
    assert {"seed", "python", "device"} <= made_by.keys()
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", STEPS)
def test_same_seed_same_metrics(step, standins, tmp_path):
    module = load_step(step)
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = [*tiny_flags(step, standins, tmp_path / name), "--seed", str(seed)]
        module.train(module.parse_args(flags))
        runs.append([without_times(record) for record in records(tmp_path / name)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("step", STEPS)
def test_folder_runs_when_copied_alone(step, standins, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(ROOT / step, alone, ignore=shutil.ignore_patterns("out", "__pycache__"))
    flags = tiny_flags(step, standins, alone / "out")
    del flags[flags.index("--out_dir") : flags.index("--out_dir") + 2]  # the default is beside it
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run_alone(alone, *flags, cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert (alone / "out" / "metrics.jsonl").exists()
    assert not list(elsewhere.iterdir())
