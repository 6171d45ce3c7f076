"""Every folder runs: in process on a tiny configuration, and alone, from an empty folder."""

import functools
import io
import json
import re
import time
from pathlib import Path

import pytest
import torch
from steps import FOLDERS, STEPS, load_plot, load_step, run_main, tiny_flags

TIMES = {"seconds", "images_per_second", "tokens_per_second", "mfu", "data_share", "memory_gib"}


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES and "_ms" not in key}


@pytest.fixture(scope="module")
def tiny_run(standins, tmp_path_factory):
    """A function from a step to what one tiny run returned, left and showed as its progress."""

    @functools.cache
    def run(step):
        module, folder = load_step(step), tmp_path_factory.mktemp(Path(step).name)
        out_dir = folder / "new" / "out"
        bars, screen, start = [], io.StringIO(), time.perf_counter()

        class Bar(module.tqdm):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs | {"disable": False, "file": screen})
                bars.append(self)

        torch.set_num_threads(1)  # as when it runs alone: its metrics are the same to the last bit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "tqdm", Bar)
            final = module.train(module.parse_args(tiny_flags(step, standins, out_dir)))
        return final, out_dir, bars, screen.getvalue(), time.perf_counter() - start

    return run


@pytest.mark.parametrize("step", FOLDERS)
def test_tiny_run_leaves_what_it_should(step, tiny_run):
    final, out_dir, *_, seconds = tiny_run(step)
    logged = records(out_dir)
    assert final == logged[-1]
    assert {"iter", "seconds"} <= final.keys()
    assert [r["iter"] for r in logged] == sorted({r["iter"] for r in logged})
    assert [r["seconds"] for r in logged] == sorted({r["seconds"] for r in logged})
    assert 0 < logged[0]["seconds"] and final["seconds"] < seconds
    versions = json.loads((out_dir / "args.json").read_text())
    assert {"seed", "python", "device"} <= versions.keys()
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", STEPS)
def test_every_evaluation_is_recorded_the_last_one_after_max_iters(step, tiny_run):
    out_dir = tiny_run(step)[1]
    args = json.loads((out_dir / "args.json").read_text())
    assert args["max_iters"] % args["eval_interval"] == 0
    iters = [record["iter"] for record in records(out_dir)]
    assert iters[-1] == args["max_iters"]
    assert set(iters) >= set(range(args["eval_interval"], args["max_iters"], args["eval_interval"]))


@pytest.mark.parametrize("step", STEPS)
def test_the_bar_ends_at_100_percent(step, tiny_run):
    final, _, bars, screen, _ = tiny_run(step)
    n = final["iter"]
    assert (n, n) in [(bar.n, bar.total) for bar in bars]  # step 15 shows other work, too
    assert re.search(rf"100%\|#+\| {n}/{n} .*loss=", screen)


@pytest.mark.parametrize("step", FOLDERS)
def test_what_the_plot_shows_is_recorded(step, tiny_run):
    recorded = set().union(*records(tiny_run(step)[1]))
    for panel in load_plot(step).PANELS:
        levels = panel["references"].values()
        assert panel["curves"]
        assert {*panel["curves"], *(key for key in levels if isinstance(key, str))} <= recorded


def test_plot_draws_curves_and_references(tiny_run, monkeypatch):
    plot, out_dir = load_plot(STEPS[0]), tiny_run(STEPS[0])[1]
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.draw([out_dir, out_dir], out_dir / "both.png")
    first, second, reference = figures[0].axes[0].lines
    expected = [(record["iter"], record["train_loss"]) for record in records(out_dir)]
    assert first.get_xydata().tolist() == [list(map(float, point)) for point in expected]
    assert str(out_dir) in second.get_label()
    assert reference.get_label() == "noise variance: 0.25"
    assert reference.get_ydata()[0] == 0.25
    monkeypatch.undo()
    plot.plt.close(figures[0])


def test_plot_compares_runs(tiny_run, tmp_path, monkeypatch):
    out_dir = tiny_run(STEPS[0])[1]
    monkeypatch.chdir(tmp_path)
    assert run_main(STEPS[0], out_dir, out_dir, script="plot.py") == (0, "")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", FOLDERS)
def test_folder_runs_when_copied_alone_with_the_same_metrics(step, runs_alone, tiny_run):
    result, alone, elsewhere = runs_alone[step].result()
    assert result.returncode == 0, result.stderr
    assert not list(elsewhere.iterdir())
    here, there = (map(without_times, records(out)) for out in (tiny_run(step)[1], alone / "out"))
    assert list(here) == list(there)


# The references of 01 to 13 have another seed: a run that forgets it differs from them.
@pytest.mark.parametrize("step", [step for step in FOLDERS if step not in STEPS[:13]])
def test_another_seed_gives_other_metrics(step, tiny_run, standins, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iter": 0}\n')  # of an earlier run: replaced
    module, first = load_step(step), records(tiny_run(step)[1])
    module.train(module.parse_args([*tiny_flags(step, standins, tmp_path), "--seed", "1"]))
    other = records(tmp_path)
    assert [r["iter"] for r in other] == [r["iter"] for r in first]
    assert [*map(without_times, other)] != [*map(without_times, first)]
