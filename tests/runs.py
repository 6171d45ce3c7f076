"""A run of a step from 01 to 15, with all that it leaves, prints and draws against its records."""

import contextlib
import io
import json
import math
import platform
from pathlib import Path

import numpy
import pytest
import torch


def watched_run(step, *flags):
    """Run a step; return its arguments and the records of metrics.jsonl."""
    args = step.parse_args([str(flag) for flag in flags])
    screen, errors = io.StringIO(), io.StringIO()
    args.out_dir.mkdir(exist_ok=True)
    (args.out_dir / "metrics.jsonl").write_text('{"iter": 0}\n')  # of an earlier run: replaced
    plot, figures = step.plot_run.__globals__, []
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plot["plt"], "close", figures.append)
            final = step.train(args)
    assert "|" not in errors.getvalue()  # no bar in a file that the output is sent to
    lines = (args.out_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert final == records[-1]
    evaluated = {*range(0, args.max_iters, args.eval_interval), args.max_iters}
    assert [record["iter"] for record in records] == sorted(evaluated)

    saved = json.loads((args.out_dir / "args.json").read_text())
    library = "torch" if "torch" in vars(step) else "numpy"
    versions = {"torch": torch.__version__, "numpy": numpy.__version__}
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    machine = {"python": platform.python_version(), library: versions[library], "device": "cpu"}
    assert saved == given | machine

    printed = screen.getvalue().splitlines()
    for record in records:
        assert "  ".join(f"{key} {value:.5g}" for key, value in record.items()) in printed
    assert printed[-1] == f"picture: {args.out_dir / 'loss.png'}"
    assert expected_summary(final) == printed[-len(expected_summary(final)) - 1 : -1]
    check_picture(figures[-1], plot, records)
    for figure in figures:
        plot["plt"].close(figure)
    return args, records


def check_picture(figure, plot, records):
    """The picture shows every record, each curve under its name, beside the known results."""
    assert figure.get_suptitle() == plot["TITLE"]
    assert len(figure.axes) == len(plot["PANELS"])
    for axis, panel in zip(figure.axes, plot["PANELS"]):
        curves = panel["curves"]
        expected = {k: [[r["iter"], r[k]] for r in records if k in r] for k in curves}
        for label, level in panel["references"].items():
            level = records[-1][level] if isinstance(level, str) else level
            expected[f"{label}: {level:.4g}"] = [[0, level], [1, level]]  # from edge to edge
        assert {line.get_label(): line.get_xydata().tolist() for line in axis.lines} == expected
        assert [text.get_text() for text in axis.get_legend().get_texts()] == [*expected]
        assert axis.get_xlabel() == "iteration"
        assert axis.get_ylabel() == panel["axes"]["ylabel"]
        assert axis.get_ylim() == panel["axes"].get("ylim", axis.get_ylim())


def expected_summary(final):
    """Return the lines above the picture's: the result beside what it is to be compared with."""
    if "test_accuracy" in final:
        return [f"test accuracy {final['test_accuracy']:.2%} after {final['seconds']:.0f} s"]
    if "top1" in final:
        return [f"top-1 {final['top1']:.2%}, top-5 {final['top5']:.2%}, {final['seconds']:.0f} s"]
    if "test_loss" in final:
        perplexity = math.exp(min(final["test_loss"], 700))
        return [f"test perplexity {perplexity:.2f} after {final['seconds']:.0f} s"]
    loss = f"train_loss {final['train_loss']:.5g}"
    if "noise_variance" in final:
        return [f"{loss}, noise variance {final['noise_variance']:.5g}"]
    lines = [f"{loss}, entropy of the teacher {final['entropy']:.5g}"]
    if "linear_loss" in final:
        mlp, linear = (final[key] - final["entropy"] for key in ("train_loss", "linear_loss"))
        lines += [f"gap to the entropy: {mlp:.4f}, with step 04's linear model {linear:.4f}"]
    return lines


def check_number(number):
    """Both limits of a flag's type are allowed, nothing beyond, and its name shows them."""
    kind = number(int, 3, 5)
    assert [kind(text) for text in ("3", "4", "5")] == [3, 4, 5]
    for text in ("2", "6", "4.5", "abc"):
        with pytest.raises(ValueError):
            kind(text)
    assert kind.__name__ == "int from 3 to 5"
    wide = number(float, 0)
    assert wide("1e9") == 1e9
    with pytest.raises(ValueError):
        wide("1.1e9")
    assert wide.__name__ == "float from 0 to 1e+09"


class Idle:
    """Stands for an optimizer: a run with it costs nothing but leaves the schedule's records."""

    def __init__(self, params, tx):
        pass

    def zero_grad(self):
        pass

    def step(self):
        pass


def check_warm_up(step, monkeypatch, *flags):
    """The warm-up can be none, and is cut to the run; a perplexity can be too large to print."""
    monkeypatch.setattr(step, "OptaxOptimizer", Idle)
    measures = ("loss", "accuracy") if "MNIST" in vars(step) else ("loss",)
    unlearned = lambda *given: {f"{given[-1]}_{key}": 1000.0 for key in measures}  # noqa: E731
    monkeypatch.setattr(step, "evaluate", unlearned)
    cuts = [(0, [0.01, 0.008536, 0.005, 0.001464, 0]), (200, [0, 1 / 300, 2 / 300, 0.01, 0])]
    for warmup_iters, rates in cuts:
        flags = [*flags, "--learning_rate", 0.01, "--max_iters", 4, "--eval_interval", 1]
        records = watched_run(step, *flags, "--warmup_iters", warmup_iters)[1]
        assert [r["learning_rate"] for r in records] == pytest.approx(rates, abs=1e-6)
