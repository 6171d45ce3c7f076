"""Every step runs: in process on a tiny configuration, and alone, from an empty folder."""

import functools
import json

import pytest
from steps import STEPS, load_step, tiny_flags

TIMES = {"seconds", "images_per_second", "tokens_per_second", "mfu", "data_share", "memory_gib"}


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES and "_ms" not in key}


@pytest.fixture(scope="module")
def tiny_run(standins, tmp_path_factory):
    """A function from a step to the final metrics and the out_dir of one tiny run."""

    @functools.cache
    def run(step):
        module, out_dir = load_step(step), tmp_path_factory.mktemp(step) / "new" / "out"
        return module.train(module.parse_args(tiny_flags(step, standins, out_dir))), out_dir

    return run


@pytest.mark.parametrize("step", STEPS)
def test_tiny_run_leaves_what_it_should(step, tiny_run):
    final, out_dir = tiny_run(step)
    logged = records(out_dir)
    assert final == logged[-1]
    assert {"iter", "seconds"} <= final.keys()
    assert [r["iter"] for r in logged] == sorted({r["iter"] for r in logged})
    made_by = json.loads((out_dir / "args.json").read_text())
    assert {"seed", "python", "device"} <= made_by.keys()
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", STEPS)
def test_same_seed_same_metrics(step, tiny_run, standins, tmp_path):
    module, out_dirs = load_step(step), [tiny_run(step)[1], tmp_path / "same", tmp_path / "other"]
    for out_dir, seed in zip(out_dirs[1:], ("1337", "1")):
        flags = [*tiny_flags(step, standins, out_dir), "--seed", seed]
        module.train(module.parse_args(flags))
    first, same, other = ([without_times(r) for r in records(folder)] for folder in out_dirs)
    assert first == same
    assert first != other


@pytest.mark.parametrize("step", STEPS)
def test_folder_runs_when_copied_alone(step, runs_alone):
    result, alone, elsewhere = runs_alone[step].result()
    assert result.returncode == 0, result.stderr
    assert (alone / "out" / "metrics.jsonl").exists()
    assert not list(elsewhere.iterdir())
