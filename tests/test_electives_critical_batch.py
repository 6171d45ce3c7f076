"""Elective critical_batch: the noise scale is unbiased, the fit exact, and every run is counted."""

import argparse
import importlib.util
import json
import math
import re
import signal
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from steps import definitions, folder_of, load_step, run_main, tiny_flags
from tqdm import tqdm

NAME = "electives/critical_batch"
cb, step_09, step_13 = load_step(NAME), load_step("09"), load_step("13")


def load_transformer():
    """Import transformer.py, which imports the train.py beside it, as a module of its own."""
    path = folder_of(NAME) / "transformer.py"
    spec = importlib.util.spec_from_file_location("critical_batch_transformer", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "train", cb)
        spec.loader.exec_module(module)
    return module


tf = load_transformer()


class Linear(nn.Module):
    """A model that is fast, and whose gradients are all different from zero at first."""

    def __init__(self, n_classes):
        super().__init__()
        self.out = nn.Linear(28 * 28, n_classes)

    def forward(self, x):
        return self.out(x.flatten(1) / 28)


def tiny_args(data_dir, out_dir, *flags):
    return cb.parse_args([*tiny_flags(NAME, data_dir, out_dir), *flags])


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(standins):
    return cb.load_data(cb.parse_args(["--data_dir", str(standins)]))


# ---------- data ----------


def test_minibatches_are_drawn_with_replacement_and_keep_their_labels():
    torch.manual_seed(0)
    dataset = cb.TensorDataset(torch.arange(10.0), torch.arange(10))
    batches = cb.minibatches(dataset, 4000)
    (x, y), (other, _) = next(batches), next(batches)
    assert x.shape == y.shape == (4000,)
    assert torch.equal(x.long(), y)
    assert not torch.equal(x, other)
    counts = torch.bincount(y, minlength=10)
    assert (counts > 320).all() and (counts < 480).all()  # 400 are expected
    repeated = (y[1:] == y[:-1]).float().mean().item()
    assert repeated == pytest.approx(0.1, abs=0.03)  # which no shuffled epochs would have


def test_data_are_those_of_step_09(data, standins):
    for mine, its in zip(
        data, step_09.load_data(step_09.parse_args(["--data_dir", str(standins)]))
    ):
        assert torch.equal(mine.tensors[0], its.tensors[0])
        assert torch.equal(mine.tensors[1], its.tensors[1])
    assert [len(dataset) for dataset in data] == [2000, 400]
    assert data[0].tensors[0].mean().abs() < 1e-4
    assert data[0].tensors[0].std().item() == pytest.approx(1)


def test_missing_data_are_named(tmp_path, no_network):
    code, errors = run_main(NAME, "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    assert code == 2 and len(errors.splitlines()) == 1
    assert str(tmp_path / "data" / "MNIST" / "raw") in errors and "tests/standins.py" in errors
    assert not (tmp_path / "out").exists()


# ---------- the model ----------


def test_convnet_halves_height_and_width_twice(data):
    torch.manual_seed(0)
    model = cb.ConvNet(10)
    assert model.conv_1.weight.shape == (8, 1, 5, 5)
    assert model.conv_2.weight.shape == (16, 8, 5, 5)
    x, y = data[0][:300]
    loss = F.cross_entropy(model(x), y)
    assert loss.item() == pytest.approx(math.log(10))  # the logits are zero at first
    for layer in (model.conv_1, model.conv_2, model.hidden):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    h = F.conv2d(x, model.conv_1.weight, model.conv_1.bias, stride=2, padding=2).clamp(min=0)
    assert h.shape == (300, 8, 14, 14)
    h = F.conv2d(h, model.conv_2.weight, model.conv_2.bias, stride=2, padding=2).clamp(min=0)
    assert h.shape == (300, 16, 7, 7)
    h = (h.flatten(1) @ model.hidden.weight.T + model.hidden.bias).clamp(min=0)
    expected = h @ model.out.weight.T + model.out.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert expected.shape == (300, 10) and h.shape == (300, 64)


# ---------- the noise scale ----------


@pytest.mark.parametrize(("n_small", "n_big"), [(1, 8), (4, 8), (10, 11)])
def test_moments_are_unbiased_on_a_known_covariance(n_small, n_big):
    """Many draws of a Gaussian gradient: the means are tr(Sigma) and |G|^2."""
    torch.manual_seed(0)
    G = torch.tensor([0.5, -1.0, 0.2, 0.0, 0.3], dtype=torch.float64)
    root = torch.randn(5, 5, dtype=torch.float64)
    trace, squared_norm = (root @ root.T).trace(), G @ G

    def gradients(n):  # means over n examples
        return G + torch.randn(40_000, 5, dtype=torch.float64) @ root.T / n**0.5

    small, big = (gradients(n).square().sum(dim=1) for n in (n_small, n_big))
    found = cb.noise_moments(small, big, n_small, n_big)
    assert found.shape == (2, 40_000)
    error = found.std(dim=1) / 200
    assert ((found.mean(dim=1) - torch.stack([trace, squared_norm])).abs() < 4 * error).all()
    assert (error < 0.06 * trace if n_small < 10 else error < trace).all()  # the test is sharp
    # Without noise in the norms themselves, exactly.
    exact = [squared_norm + trace / n for n in (n_small, n_big)]
    expected = torch.stack([trace, squared_norm])
    torch.testing.assert_close(cb.noise_moments(*exact, n_small, n_big), expected)


def test_moments_of_two_halves_are_their_dot_product_and_their_distance():
    torch.manual_seed(0)
    g_1, g_2 = torch.randn(2, 30, dtype=torch.float64)
    small = (g_1 @ g_1 + g_2 @ g_2) / 2
    big = ((g_1 + g_2) / 2).square().sum()
    expected = torch.stack([7 * (g_1 - g_2).square().sum() / 2, g_1 @ g_2])
    torch.testing.assert_close(cb.noise_moments(small, big, 7, 14), expected)


def per_example_gradients(model, x, y):
    """Return the gradient of each example's own loss, (N, P), from torch.func."""
    params = dict(model.named_parameters())

    def loss(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, x[None]), y[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


def test_gradient_is_the_mean_of_the_examples_gradients(data):
    torch.manual_seed(0)
    model = cb.ConvNet(10)
    nn.init.normal_(model.out.weight)
    x, y = data[0][:20]
    expected = per_example_gradients(model, x, y).mean(dim=0)
    torch.testing.assert_close(cb.gradient(model, x, y), expected, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_train_measures_the_noise_scale_of_per_example_gradients(
    data, standins, tmp_path, monkeypatch
):
    """With a learning rate of 0 the model stays as it is: its noise scale is known exactly."""
    monkeypatch.setattr(cb, "ConvNet", Linear)
    monkeypatch.setattr(cb, "search", lambda *_: ({32: 9.0, 1000: 8.0}, {1000: 0.0}))
    flags = "--batch_sizes 32 1000 --max_iters 200 --eval_interval 200 --seed 5"
    final = cb.train(tiny_args(standins, tmp_path, *flags.split()))
    torch.manual_seed(5)
    model = Linear(10)
    grads = per_example_gradients(model, *data[0].tensors).double()
    mean = grads.mean(dim=0)
    exact = (grads - mean).square().sum(dim=1).mean() / mean.square().sum()
    assert final["noise_scale"] == pytest.approx(exact.item(), rel=0.1)
    assert final["noise_scale_to_target"] == final["noise_scale"]


@pytest.mark.parametrize("reached", [True, False])
def test_train_is_sgd_and_averages_the_moments_between_evaluations(
    reached, data, standins, tmp_path, monkeypatch, capsys
):
    """Replay the run of `train` by torch's SGD on whole minibatches, halves taken apart."""
    models = []

    class Kept(Linear):
        def __init__(self, n_classes):
            super().__init__(n_classes)
            models.append(self)

    monkeypatch.setattr(cb, "ConvNet", Kept)
    monkeypatch.setattr(cb, "search", lambda *_: ({24: 8.0, 9: 10.0}, {24: 1.0, 9: 0.3}))
    target = 2.27 if reached else 2.0
    flags = f"--batch_sizes 24 9 --max_iters 7 --eval_interval 3 --target {target}"
    args = tiny_args(standins, tmp_path, *flags.split())
    cb.train(args)
    found = records(tmp_path)
    assert [record["iter"] for record in found] == [0, 3, 6, 7]
    assert "noise_scale" not in found[0]
    trained = models[-1]
    torch.manual_seed(args.seed)
    model = Linear(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    traces, dots, scales, losses = [], [], [], []
    for iter_num in range(1, 8):
        halves = [data[0][torch.randint(len(data[0]), (12,))] for _ in range(2)]
        grads = []
        for x, y in halves:
            loss = F.cross_entropy(model(x), y)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        g_1, g_2 = (torch.cat([g.flatten() for g in grad]) for grad in grads)
        traces.append(12 * (g_1 - g_2).square().sum().item() / 2)
        dots.append((g_1 @ g_2).item())
        x, y = (torch.cat(pair) for pair in zip(*halves))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if iter_num in (3, 6, 7):
            record = found[1 + len(scales)]
            scales.append(sum(traces) / sum(dots))
            traces, dots = [], []
            assert record["noise_scale"] == pytest.approx(scales[-1], rel=1e-3)
            x, y = data[0][:1000]
            losses.append(F.cross_entropy(model(x), y).item())
            n = 2 if reached else 3  # the evaluation that reaches the target is the last to count
            mean = sum(scales[:n]) / len(scales[:n])
            assert record["noise_scale_to_target"] == pytest.approx(mean, rel=1e-3)
    assert losses[0] > 2.27 > losses[1] > losses[2] > 2.0
    end = "to the target" if reached else "to the end, before the target"
    *_, mean_line, median_line, _ = capsys.readouterr().out.splitlines()
    assert f"mean over updates {end}: {mean:.0f}" in mean_line
    assert median_line == f"its median: {sorted(scales[:n])[1] if n == 3 else mean:.0f}"
    torch.testing.assert_close(trained.out.weight, model.out.weight)
    torch.testing.assert_close(trained.out.bias, model.out.bias)
    for name, dataset in (("train", cb.TensorDataset(*data[0][:1000])), ("test", data[1])):
        x, y = dataset.tensors
        expected = F.cross_entropy(model(x), y).item()
        assert found[-1][f"{name}_loss"] == pytest.approx(expected, rel=1e-3)


# ---------- the trade ----------


def test_fit_recovers_what_was_planted():
    s_min, e_min = 137.0, 15_000.0
    updates = {B: s_min + e_min / B for B in (16, 50, 128, 1000, 4096)}
    assert cb.fit_trade(updates) == pytest.approx((s_min, e_min))
    for B, S in updates.items():
        assert (S / s_min - 1) * (B * S / e_min - 1) == pytest.approx(1)


def test_fit_minimizes_the_relative_errors():
    torch.manual_seed(0)
    B = 2.0 ** torch.arange(4, 12, dtype=torch.float64)
    S = (137 + 15_000 / B) * (1 + 0.1 * torch.randn(8, dtype=torch.float64))
    fit = torch.tensor(cb.fit_trade(dict(zip(B.tolist(), S.tolist()))), dtype=torch.float64)

    def error(fit):
        return ((fit[0] + fit[1] / B) / S - 1).square().sum()

    scaled = torch.func.grad(error)(fit) * fit  # by what it changes per relative change of the fit
    assert scaled.abs().max() < 1e-8
    assert fit.tolist() == pytest.approx([137, 15_000], rel=0.15)


@pytest.mark.parametrize("updates", [{16: 32.0, 64: 8.0}, {16: 9.0, 64: 9.0}, {16: 3.0, 64: 7.0}])
def test_updates_without_a_trade_are_an_error(updates):
    with pytest.raises(argparse.ArgumentTypeError, match=r"--target.*--batch_sizes.*\{16: "):
        cb.fit_trade(updates)


def test_picture_shows_the_runs_the_fit_and_the_critical_batch_size(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(cb.Figure, "savefig", lambda self, path, dpi: figures.append((self, path)))
    cb.save_trade({16: 1100.0, 256: 180.0}, 120.0, 15_000.0, tmp_path / "trade.png")
    (figure, path), *_ = figures
    (axis,) = figure.axes
    assert path == tmp_path / "trade.png"
    *dots, curve, star, s_line, e_line = axis.lines
    assert [dot.get_xydata().tolist() for dot in dots] == [[[1100, 17_600]], [[180, 46_080]]]
    assert [text.get_text().strip() for text in axis.texts] == ["16", "256"]
    S, E = map(torch.as_tensor, curve.get_data())
    torch.testing.assert_close((S / 120 - 1) * (E / 15_000 - 1), torch.ones_like(S))
    assert (E / S)[0] < 16 and (E / S)[-1] > 256
    assert star.get_xydata().tolist() == [[240, 30_000]] and star.get_label().endswith(" 125")
    assert s_line.get_xdata()[0] == 120 and e_line.get_ydata()[0] == 15_000
    assert axis.get_xscale() == axis.get_yscale() == "log"
    figure.canvas.draw()
    for ticks, shown in ((axis.xaxis, "500"), (axis.yaxis, "20,000")):
        assert shown in [label.get_text() for label in ticks.get_ticklabels()]


# ---------- the runs to the target ----------


def count_updates(args, train_set, batch_size, learning_rate, seed):
    """Return (updates, loss) at every evaluation of a long run: SGD by hand."""
    torch.manual_seed(seed)
    model, found = Linear(10), []
    for n_updates in range(1, 200):
        x, y = train_set[torch.randint(len(train_set), (batch_size,))]
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads):
                p -= learning_rate * grad
        if batch_size >= 256 or n_updates % (256 // batch_size) == 0:
            x, y = train_set[:300]
            found.append((n_updates, F.cross_entropy(model(x), y).item()))
    return found


@pytest.mark.parametrize("batch_size", [16, 100, 300])
def test_a_run_stops_at_the_first_evaluation_that_reaches_the_target(
    batch_size, data, standins, tmp_path
):
    train_set, train_eval = data[0], cb.TensorDataset(*data[0][:300])
    args = tiny_args(standins, tmp_path, "--target", "1.9")
    evaluations = count_updates(args, train_set, batch_size, 0.5, 3)
    n = next(n for n, loss in evaluations if loss <= 1.9)
    assert evaluations[2][0] < n < evaluations[-3][0]
    run = (args, lambda: Linear(10), train_set, train_eval, batch_size, 0.5, 3)
    assert cb.updates_to_target(*run, limit=10**6) == n
    assert cb.updates_to_target(*run, limit=n + 1) == n
    assert cb.updates_to_target(*run, limit=n) == n  # given up, one update too early
    assert cb.updates_to_target(*run, limit=n - 1) == n - 1
    assert cb.updates_to_target(*run, limit=0) == 0


def test_a_target_just_reached_is_reached_and_a_diverged_run_is_given_up(
    data, standins, tmp_path, monkeypatch
):
    args = tiny_args(standins, tmp_path, "--target", "1.5")
    seen = []

    def run(*losses):
        scripted = iter(losses)

        def evaluate(model, dataset, name):
            seen.append(dataset)
            return {f"{name}_loss": next(scripted)}

        monkeypatch.setattr(cb, "evaluate", evaluate)
        return cb.updates_to_target(args, lambda: Linear(10), data[0], "held", 64, 0.1, 0, 100)

    assert run(1.6, 1.5000001, 1.5, 1.2) == 12
    assert run(1.6, math.nan, 1.2) == 100
    assert run(1.6, math.inf, 1.2) == 100
    assert seen == 7 * ["held"]


# ---------- the search ----------

TABLE = {  # updates of the seeds 1337 and 1338
    (16, 0.1): (50, 70),
    (16, 0.2): (60, 40),
    (16, 0.4): (70, 30),
    (64, 0.1): (500, 500),
    (64, 0.2): (30, 31),
    (64, 0.4): (20, 45),
}


@pytest.fixture
def search(standins, tmp_path, monkeypatch):
    """Return a function that searches in the table, and the runs that it made."""
    made = []

    def updates_to_target(args, *given):
        *same, batch_size, learning_rate, seed, limit = given
        assert same == ["make_model", "train_set", "train_eval"]
        made.append((batch_size, learning_rate, seed, limit))
        return min(TABLE[batch_size, learning_rate][seed - 1337], limit)

    def search(*flags):
        made.clear()
        grid = "--batch_sizes 16 64 --learning_rates 0.1 0.2 0.4 --n_seeds 2 --max_updates 200"
        args = tiny_args(standins, tmp_path, *grid.split(), *flags)
        return cb.search(args, "make_model", "train_set", "train_eval")

    monkeypatch.setattr(cb, "updates_to_target", updates_to_target)
    return search, made


def test_every_batch_size_has_the_learning_rate_with_the_fewest_updates(search):
    search, made = search
    assert search() == ({16: 50, 64: 30.5}, {16: 0.2, 64: 0.2})
    assert made == [
        (16, 0.1, 1337, 400),
        (16, 0.1, 1338, 350),
        (16, 0.2, 1337, 120),
        (16, 0.2, 1338, 60),
        (16, 0.4, 1337, 100),  # no fewer, together: the first of equals stays
        (16, 0.4, 1338, 30),
        (64, 0.1, 1337, 400),
        (64, 0.1, 1338, 0),
        (64, 0.2, 1337, 400),
        (64, 0.2, 1338, 370),
        (64, 0.4, 1337, 61),
        (64, 0.4, 1338, 41),
    ]


# ---------- the whole run ----------


def test_train_fits_the_runs_of_its_search(standins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cb, "ConvNet", Linear)
    flags = "--batch_sizes 8 16 64 --learning_rates 0.5 0.3 --n_seeds 2 --target 1.9"
    args = tiny_args(standins, tmp_path, *flags.split())
    final = cb.train(args)
    train_set, _ = cb.load_data(args)
    train_eval = cb.TensorDataset(*train_set[:1000])
    fewest, totals = {}, {}
    for batch_size in args.batch_sizes:
        for learning_rate in args.learning_rates:
            run = (args, lambda: Linear(10), train_set, train_eval, batch_size, learning_rate)
            totals[learning_rate] = sum(cb.updates_to_target(*run, s, 1000) for s in (1337, 1338))
        fewest[batch_size] = min(totals.values()) / 2
    s_min, e_min = cb.fit_trade(fewest)
    assert final["critical_batch"] == pytest.approx(e_min / s_min)
    assert final["target"] == 1.9
    assert final["iter"] == args.max_iters
    lines = capsys.readouterr().out.splitlines()
    assert f"batch size 64  learning rate 0.5  {fewest[64]:.1f} updates" in lines
    assert "batch size 64  learning rate 0.3  given up" in lines
    assert any(line.startswith("iter 2  seconds ") for line in lines)
    assert f"critical batch size {e_min / s_min:.0f} = {e_min:.0f} examples" in lines[-4]
    assert f"/ {s_min:.0f} updates" in lines[-4]
    assert f": {final['noise_scale_to_target']:.0f}" in lines[-3]
    assert (tmp_path / "trade.png").read_bytes().startswith(b"\x89PNG")


def test_test_images_are_never_trained_on(standins, tmp_path, monkeypatch):
    monkeypatch.setattr(cb, "ConvNet", Linear)
    flags = "--batch_sizes 8 64 --learning_rates 0.5 --target 1.9".split()
    honest = cb.train(tiny_args(standins, tmp_path / "honest", *flags))
    real = cb.load_data

    def load_data(args):
        train_set, test_set = real(args)
        x, y = test_set.tensors
        return train_set, cb.TensorDataset(-x, y)

    monkeypatch.setattr(cb, "load_data", load_data)
    replaced = cb.train(tiny_args(standins, tmp_path / "replaced", *flags))
    for key in ("critical_batch", "noise_scale", "train_loss"):
        assert replaced[key] == honest[key]
    assert replaced["test_loss"] != honest["test_loss"]


# ---------- input ----------


def test_a_target_that_is_not_reached_is_named(standins, tmp_path):
    flags = "--target 0.001 --max_updates 50 --batch_sizes 64 32"
    code, errors = run_main(NAME, *tiny_flags(NAME, standins, tmp_path), *flags.split())
    assert code == 2 and len(errors.splitlines()) == 1
    for words in ("--target 0.001", "--max_updates 50", "batch size 32", "--learning_rates"):
        assert words in errors


@pytest.mark.parametrize("sizes", [["64"], ["64", "64"]])
def test_one_batch_size_is_too_few(sizes, capsys):
    with pytest.raises(SystemExit) as end:
        cb.parse_args(["--batch_sizes", *sizes])
    assert end.value.code == 2
    assert "--batch_sizes" in capsys.readouterr().err


def test_a_diverging_run_names_the_learning_rates(standins, tmp_path, monkeypatch):
    monkeypatch.setattr(cb, "search", lambda *_: ({16: 9.0, 64: 7.0}, {64: 1e30}))
    with pytest.raises(FloatingPointError, match=r"at iteration 2: lower --learning_rates"):
        cb.train(tiny_args(standins, tmp_path))


# ---------- transformer.py ----------

TINY_TRANSFORMER = (
    "--block_size 8 --n_embd 8 --n_head 2 --target 2.8 --n_seeds 1 --batch_sizes 4 64"
    " --learning_rates 0.3 --max_iters 4 --eval_interval 2"
)


def transformer_flags(data_dir, out_dir, *flags):
    folders = ["--data_dir", str(data_dir), "--out_dir", str(out_dir)]
    return [*TINY_TRANSFORMER.split(), *folders, *map(str, flags)]


def transformer_args(*args):
    return tf.parse_args(transformer_flags(*args))


@pytest.fixture
def run_transformer():
    """A function that runs transformer.py with these flags in this process: (exit code, stderr)."""
    before = sys.modules.pop("train", None)
    yield lambda *flags: run_main(NAME, *flags, script="transformer.py")
    sys.modules.pop("train", None)
    if before:
        sys.modules["train"] = before


@pytest.fixture
def play(tmp_path):
    """A data folder with a short text whose last tenth has no character in common with the rest."""
    ids = torch.randint(6, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join(("abcdef" if n < 1800 else "uvwxyz")[i] for n, i in enumerate(ids))
    (tmp_path / "data" / "shakespeare").mkdir(parents=True)
    (tmp_path / "data" / "shakespeare" / "input.txt").write_text(text)
    return tmp_path / "data", text


def small_gpt(*flags):
    """Return args and a model of 20 characters with large weights: mistakes show in its outputs."""
    args = tf.parse_args(["--block_size", "8", "--n_embd", "12", "--n_head", "3", *flags])
    torch.manual_seed(0)
    model = tf.GPT(args, 20)
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return args, model


def test_windows_follow_each_other_in_the_text_and_come_in_random_order():
    torch.manual_seed(0)
    x, y = tf.windows(torch.arange(1003), 4).tensors
    assert x.shape == y.shape == (250, 4)
    assert torch.equal(y, x + 1)  # the next character of each
    assert torch.equal(x[x[:, 0].argsort()], torch.arange(1000).view(250, 4))
    assert (x[:50, 0] < 200).sum() < 25  # the first windows are not those of the text's beginning


def test_the_last_tenth_of_the_text_is_held_out(play, tmp_path):
    data_dir, text = play
    args = transformer_args(data_dir, tmp_path)
    train_set, test_set, vocab = tf.load_data(args)
    assert vocab == "abcdefuvwxyz"
    for dataset, part in ((train_set, text[:1800]), (test_set, text[1800:])):
        found = [
            "".join(vocab[i] for i in [*x.tolist(), y[-1].item()]) for x, y in zip(*dataset.tensors)
        ]
        assert sorted(found) == sorted(part[i : i + 9] for i in range(0, len(part) - 8, 8))
    same, _, _ = tf.load_data(args)
    assert torch.equal(same.tensors[0], train_set.tensors[0])
    other, _, _ = tf.load_data(transformer_args(data_dir, tmp_path, "--seed", "3"))
    assert not torch.equal(other.tensors[0], train_set.tensors[0])


def test_attention_and_mlp_are_those_of_step_13_to_the_letter():
    text = (folder_of(NAME) / "transformer.py").read_text()
    for name in ("CausalSelfAttention", "MLP"):
        assert f"\n{definitions('13_transformer')[name]}\n\n\n" in text


@pytest.mark.parametrize("n_layer", ["1", "2"])
def test_model_is_step_13s_without_dropout_its_classes_in_dimension_1(n_layer):
    flags = ["--block_size", "8", "--n_embd", "12", "--n_head", "3", "--n_layer", n_layer]
    args_13 = step_13.parse_args([*flags, "--eval_stride", "8"])
    models = []
    for GPT, args in ((tf.GPT, tf.parse_args(flags)), (step_13.GPT, args_13)):
        torch.manual_seed(0)
        models.append(GPT(args, 20))
    mine, its = models
    assert its.state_dict().keys() == mine.state_dict().keys()
    for name, p in its.state_dict().items():
        assert torch.equal(mine.state_dict()[name], p)  # the same initialization
    _, large = small_gpt("--n_layer", n_layer)
    its.load_state_dict(large.state_dict())
    its.eval()
    x, y = torch.randint(20, (2, 5, 8))
    logits = large(x)  # in training mode: there is no dropout
    assert logits.shape == (5, 20, 8)
    torch.testing.assert_close(logits.mT, its(x))
    loss = F.cross_entropy(its(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(F.cross_entropy(logits, y), loss)


def test_logits_do_not_depend_on_later_characters():
    _, model = small_gpt("--n_layer", "2")
    x = torch.randint(20, (6, 8))
    logits = model(x)
    for t in range(8):
        other = x.clone()
        other[:, t] = (x[:, t] + 1) % 20
        changed = (model(other) - logits).abs().amax(dim=(0, 1)) > 1e-4  # (T,)
        assert changed.tolist() == [False] * t + [True] * (8 - t)


def test_the_transformers_runs_start_from_models_of_their_own(play, tmp_path, monkeypatch):
    """The search and the run that measures the noise scale train tf.GPT, on the windows."""
    data_dir, _ = play
    args = transformer_args(data_dir, tmp_path / "out", "--max_iters", "1")
    train_set, test_set, vocab = tf.load_data(args)
    models, searched = [], []

    class Kept(tf.GPT):
        def __init__(self, args, vocab_size):
            super().__init__(args, vocab_size)
            models.append((args, vocab_size))

    def search(args, make_model, train_set, train_eval):
        searched.append((make_model(), make_model(), train_set, train_eval))
        return {4: 9.0, 64: 8.0}, {4: 0.1, 64: 0.5}

    monkeypatch.setattr(tf, "GPT", Kept)
    monkeypatch.setattr(cb, "search", search)
    final = tf.train(args)
    (one, other, found, found_eval), *_ = searched
    assert type(one) is Kept and one is not other
    assert models == [(args, len(vocab))] * 3
    for mine, its in zip(found.tensors, train_set.tensors):
        assert torch.equal(mine, its)
    for mine, its in zip(found_eval.tensors, train_set[:1000]):
        assert torch.equal(mine, its)
    torch.manual_seed(args.seed)
    model = tf.GPT(args, len(vocab))
    first, second = records(args.out_dir)
    assert final == second and final["noise_scale"] > 0
    for name, (x, y) in (("train", train_set[:1000]), ("test", test_set.tensors)):
        logits = model(x).mT.flatten(0, 1)
        expected = F.cross_entropy(logits, y.flatten()).item()
        assert first[f"{name}_loss"] == pytest.approx(expected, rel=1e-4)
        accuracy = (logits.argmax(dim=1) == y.flatten()).float().mean().item()
        assert first[f"{name}_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    saved = json.loads((args.out_dir / "args.json").read_text())
    assert saved["block_size"] == 8 and saved["target"] == 2.8


def test_an_example_of_the_transformers_noise_scale_is_a_window(play, tmp_path, monkeypatch):
    """With a learning rate of 0 the model stays as it is: its noise scale is known exactly."""
    data_dir, _ = play
    monkeypatch.setattr(cb, "search", lambda *_: ({8: 9.0, 64: 8.0}, {64: 0.0}))
    flags = "--batch_sizes 8 64 --max_iters 300 --eval_interval 300".split()
    args = transformer_args(data_dir, tmp_path / "out", *flags)
    final = tf.train(args)
    train_set, _, vocab = tf.load_data(args)
    torch.manual_seed(args.seed)
    grads = per_example_gradients(tf.GPT(args, len(vocab)), *train_set.tensors).double()
    mean = grads.mean(dim=0)
    exact = (grads - mean).square().sum(dim=1).mean() / mean.square().sum()
    assert final["noise_scale"] == pytest.approx(exact.item(), rel=0.1)


def test_tiny_run_of_the_transformer(standins, tmp_path, run_transformer, capsys):
    assert run_transformer(*transformer_flags(standins, tmp_path)) == (0, "")
    found = records(tmp_path)
    assert [record["iter"] for record in found] == [0, 2, 4]
    assert found[-1]["target"] == 2.8 and found[-1]["critical_batch"] > 0
    assert found[0]["train_loss"] < 5
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("batch size 64  learning rate 0.3  ") for line in lines)
    assert lines[-4].startswith("critical batch size ")
    for name in ("loss.png", "trade.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "args.json").read_text())["n_embd"] == 8


def test_ctrl_c_ends_the_transformer_with_130(standins, tmp_path, run_transformer, monkeypatch):
    def interrupt(bar):
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)

    monkeypatch.setattr("tqdm.tqdm.__iter__", interrupt)
    monkeypatch.setattr("os._exit", sys.exit)
    assert run_transformer(*transformer_flags(standins, tmp_path))[0] == 130
    guards = []
    for name in ("train.py", "transformer.py"):  # the same, and before the slow imports
        text = (folder_of(NAME) / name).read_text()
        guards.append(re.search(r'"""\n\n(import os\n.*?)\nimport argparse\n', text, re.S)[1])
    assert guards[0] == guards[1] and "signal.SIGINT" in guards[0]


def assert_one_line(errors, *words):
    assert len(errors.strip().splitlines()) == 1, errors
    for word in ("transformer.py: error: ", *map(str, words)):
        assert word in errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch_sizes 64 64", ["--batch_sizes [64, 64]: give two"]),
        ("--n_embd 10 --n_head 4", ["--n_embd 10", "--n_head 4"]),
        ("--block_size 200", ["2000 characters", "--block_size 200"]),
        ("--target 0.001 --max_updates 20", ["--target 0.001", "--max_updates 20"]),
        ("--learning_rates nan", ["--learning_rates", "nan"]),
        *((f"--{flag} 0", [f"--{flag}", "'0'"]) for flag in ("n_layer", "n_head", "max_iters")),
        *((f"--{flag} x", [f"--{flag}", "'x'"]) for flag in ("n_embd", "seed", "n_seeds")),
        *((f"--{flag} -1", [f"--{flag}"]) for flag in ("block_size", "eval_interval", "target")),
    ],
)
def test_a_mistake_in_the_transformers_flags_is_one_line(
    flags, words, play, tmp_path, run_transformer, capsys
):
    flags = transformer_flags(play[0], tmp_path / "out", *flags.split())
    script, sys.argv[0] = sys.argv[0], "transformer.py"
    code, errors = run_transformer(*flags)
    sys.argv[0] = script
    assert code == 2
    assert_one_line(errors, *words)


def test_windows_fit_into_a_text_that_is_just_long_enough(play, tmp_path):
    _, test_set, _ = tf.load_data(transformer_args(play[0], tmp_path, "--block_size", "199"))
    assert len(test_set) == 1


def test_a_missing_text_is_downloaded_once_from_where_step_13_has_it(tmp_path, monkeypatch):
    calls = []

    def download(url, path, sha256, progress):
        calls.append((url, path, sha256))
        path.write_text("l\u00e0", encoding="utf-8")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    args = transformer_args(tmp_path / "new", tmp_path)
    assert [tf.read_text(args) for _ in range(2)] == 2 * ["l\u00e0"]
    path = tmp_path / "new" / "shakespeare" / "input.txt"
    assert calls == [(step_13.URL, path, step_13.SHA256)]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa" * 900])
def test_a_missing_or_binary_text_is_named(content, tmp_path, no_network, run_transformer):
    path = tmp_path / "data" / "shakespeare" / "input.txt"
    if content:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    code, errors = run_transformer("--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, path, f"tests/standins.py {tmp_path / 'data'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError("Unable to\nallocate 8 TiB"), ValueError("a bug")])
def test_only_mistakes_of_the_user_are_one_line(
    error, standins, tmp_path, run_transformer, monkeypatch
):
    def iterate(bar):
        raise error

    monkeypatch.setattr(tqdm, "__iter__", iterate)
    flags = transformer_flags(standins, tmp_path)
    if isinstance(error, MemoryError):
        code, errors = run_transformer(*flags)
        assert code == 2
        assert_one_line(errors, "8 TiB")
    else:
        with pytest.raises(ValueError, match="a bug"):
            run_transformer(*flags)


def test_the_transformers_out_dir_must_be_writable(standins, tmp_path, run_transformer):
    (tmp_path / "file").write_text("not a folder")
    code, errors = run_transformer(*transformer_flags(standins, tmp_path / "file" / "out"))
    assert code == 2
    assert_one_line(errors, tmp_path / "file")


def test_every_flag_of_the_transformer_is_read():
    text = (folder_of(NAME) / "transformer.py").read_text()
    flags = set(re.findall(r'flag\(\s*"--(\w+)"', text))
    code = text.partition("def parse_args")[0] + (folder_of(NAME) / "train.py").read_text()
    assert {"block_size", "n_layer", "target"} < flags == vars(tf.parse_args([])).keys()
    assert all(f"args.{flag}" in code.partition("def parse_args")[0] for flag in flags)


# ---------- real data ----------


@pytest.mark.data
def test_short_run_of_the_transformer_on_tiny_shakespeare(real_data, tmp_path):
    flags = "--batch_sizes 4 16 64 --learning_rates 0.3 --target 2.6 --n_seeds 1 --max_iters 150"
    folders = ["--data_dir", str(real_data), "--out_dir", str(tmp_path)]
    final = tf.train(tf.parse_args([*folders, *flags.split()]))
    assert 2 < final["critical_batch"] < 60
    scales = [record["noise_scale"] for record in records(tmp_path)[1:]]
    assert scales[0] < 5 < scales[-1] < 200
    assert 2 < final["test_loss"] < 2.7


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--batch_sizes 32 128 512 --target 0.3 --n_seeds 1 --max_iters 200 --eval_interval 20"
    folders = ["--data_dir", str(real_data), "--out_dir", str(tmp_path)]
    final = cb.train(cb.parse_args([*folders, *flags.split()]))
    assert 15 < final["critical_batch"] < 300
    scales = [record["noise_scale"] for record in records(tmp_path)[1:]]
    assert scales[0] < 100 < scales[-1] < 10_000
