"""Elective dropout: the layer is nn.Dropout, and every regularizer does what it says."""

import copy
import io
import json
import math
import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import check_picture
from steps import load_step
from torchvision.io import read_image

dropout, step_07, step_09 = (load_step(name) for name in ("electives/dropout", "07", "09"))
TINY = "--max_iters 8 --eval_interval 3 --val_interval 2 --batch_size 16 --n_hidden 16 --n_train 50"


def run(data_dir, out_dir, *flags):
    """Run the elective; return its arguments and the records of metrics.jsonl."""
    args = dropout.parse_args([*flags, "--data_dir", str(data_dir), "--out_dir", str(out_dir)])
    final = dropout.train(args)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert final == records[-1]
    return args, records


# ---------- dropout ----------


@pytest.mark.parametrize("p", [0, 0.3, 0.5, 0.9])
def test_mean_of_the_output_is_the_input(p):
    torch.manual_seed(0)
    x = torch.randn(50)
    y = dropout.Dropout(p)(x.expand(40_000, 50))
    spread = x.abs() * (p / (1 - p) / 40_000) ** 0.5  # standard deviation of the mean
    assert ((y.mean(0) - x).abs() <= 4 * spread + 1e-5).all()


def test_dropout_is_the_identity_in_evaluation():
    x = torch.randn(20, 30)
    layer = dropout.Dropout(0.7)
    assert not torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(dropout.Dropout(0)(x), x)


@pytest.mark.parametrize("p", [0.2, 0.6])
def test_dropout_is_distributed_as_torchs(p):
    """Same two values, same frequencies of all patterns of three units and two examples."""

    def patterns(layer):
        torch.manual_seed(0)
        y = layer(torch.full((30_000, 2, 3), 2.0))
        values = y.unique()
        bits = (y > 0).flatten(1).float() @ 2.0 ** torch.arange(6)
        return values, torch.bincount(bits.long(), minlength=64) / 30_000

    (values, ours), (expected, theirs) = patterns(dropout.Dropout(p)), patterns(nn.Dropout(p))
    torch.testing.assert_close(values, expected)
    n_kept = torch.tensor([i.bit_count() for i in range(64)])
    exact = (1 - p) ** n_kept * p ** (6 - n_kept)
    for measured in (ours, theirs):
        assert ((measured - exact).abs() < 4.5 * (exact * (1 - exact) / 30_000).sqrt()).all()


def test_gradient_is_masked_as_the_output():
    torch.manual_seed(0)
    x = torch.rand(30, 40) + 1
    x.requires_grad_()
    y = dropout.Dropout(0.4)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())
    assert 0.3 < (x.grad == 0).float().mean() < 0.5


def test_mlp_drops_the_units_of_every_hidden_layer_with_this_layer(monkeypatch):
    torch.manual_seed(0)
    model, reference = dropout.MLP(6, 8, 2, 3, 0.5), step_07.MLP(6, 8, 2, 3, 0.5)
    nn.init.normal_(model.out.weight)
    reference.load_state_dict(model.state_dict())
    x, seen = torch.randn(5, 6), []
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))
    model.dropout.register_forward_hook(lambda module, inputs, y: seen.append(y))
    model.train()(x)
    assert isinstance(model.dropout, dropout.Dropout)
    assert [y.shape for y in seen] == [(5, 8), (5, 8)]


def test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero():
    torch.manual_seed(0)
    model = dropout.MLP(784, 500, 2, 10, 0.5).requires_grad_(False)
    assert [layer.weight.shape for layer in model.hidden] == [(500, 784), (500, 500)]
    for layer in model.hidden:
        assert layer.weight.var() * layer.weight.shape[1] == pytest.approx(2, rel=0.05)
        assert not layer.bias.any()
    assert model.out.weight.shape == (10, 500) and not any(p.any() for p in model.out.parameters())


# ---------- the other regularizers ----------


def test_augmentation_is_that_of_step_09():
    x = torch.rand(4, 784)
    for seed in range(5):
        torch.manual_seed(seed)
        moved = dropout.augment(x, 3)
        torch.manual_seed(seed)
        assert torch.equal(moved.view(4, 1, 28, 28), step_09.augment(x.view(4, 1, 28, 28), 3))
    assert torch.equal(dropout.augment(x, 0), x)


@pytest.fixture(scope="module")
def data(standins):
    return dropout.load_data(dropout.parse_args(["--data_dir", str(standins)]))


def test_images_are_normalized_by_the_training_images(data, standins):
    raw = [dropout.MNIST(standins, train=train) for train in (True, False)]
    x = [images.data.flatten(1).float() for images in raw]
    for dataset, images, labels in zip(data, x, (images.targets for images in raw)):
        torch.testing.assert_close(dataset.tensors[0], (images - x[0].mean()) / x[0].std())
        assert torch.equal(dataset.tensors[1], labels)


@pytest.mark.parametrize("error", [AssertionError, OSError, RuntimeError, TypeError, ValueError])
def test_any_error_of_reading_mnist_names_the_files(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error("a problem")

    monkeypatch.setattr(dropout, "MNIST", fail)
    with pytest.raises(OSError, match=r"MNIST/raw/train-.*a problem"):
        dropout.load_data(dropout.parse_args([]))


@pytest.mark.parametrize(
    ("shape", "brightness", "label"),
    [((5, 28, 27), 1, 9), ((5, 28, 28), 0, 9), ((5, 28, 28), 1, 10)],
)
def test_what_is_not_mnist_is_refused(shape, brightness, label, monkeypatch):
    images = SimpleNamespace(data=torch.full(shape, brightness), targets=torch.full((5,), label))
    monkeypatch.setattr(dropout, "MNIST", lambda *args, **kwargs: images)
    with pytest.raises(OSError, match=r"MNIST/raw/train-.*not 28 x 28"):
        dropout.load_data(dropout.parse_args([]))
    images.data, images.targets = torch.ones(5, 28, 28), torch.full((5,), 9)
    assert len(dropout.load_data(dropout.parse_args([]))[0]) == 5


def new_run(name, train_set, *flags, seed=3):
    return dropout.Run(dropout.parse_args(flags), name, seed, train_set)


def test_runs_of_a_seed_start_from_the_same_images_and_weights(data):
    train_set, _ = data
    runs = {name: new_run(name, train_set) for name in dropout.REGULARIZERS}
    plain = runs["none"]
    assert len(plain.train_set) == len(plain.train_set.tensors[0].unique(dim=0)) == 1000
    for name, one in runs.items():
        images = torch.cat([one.val_set.tensors[0], one.train_set.tensors[0]])
        labels = torch.cat([one.val_set.tensors[1], one.train_set.tensors[1]])
        assert torch.equal(images, plain.train_set.tensors[0])
        assert torch.equal(labels, plain.train_set.tensors[1])
        assert len(one.val_set) == (200 if name == "early_stopping" else 0)
        for mine, its in zip(one.model.parameters(), plain.model.parameters()):
            assert torch.equal(mine, its)
    other = new_run("none", train_set, seed=4)
    assert not torch.equal(other.train_set.tensors[0], plain.train_set.tensors[0])
    assert not torch.equal(other.model.hidden[0].weight, plain.model.hidden[0].weight)


def test_each_run_has_its_regularizers_and_no_other(data):
    flags = "--dropout 0.4 --weight_decay 0.03 --shift 3".split()
    names = list(dropout.REGULARIZERS)
    assert names == "none weight_decay dropout early_stopping augmentation combined".split()
    runs = [new_run(name, data[0], *flags) for name in names]
    assert [one.model.dropout.p for one in runs] == [0, 0, 0.4, 0, 0, 0.4]
    assert [one.shift for one in runs] == [0, 0, 0, 0, 3, 3]
    decay = [one.optimizer.param_groups[0]["weight_decay"] for one in runs]
    assert decay == [0, 0.03, 0, 0, 0, 0.03]
    assert [len(one.val_set) > 0 for one in runs] == [False, False, False, True, False, False]


def test_early_stopping_keeps_the_parameters_of_the_lowest_loss(data, monkeypatch):
    one = new_run("early_stopping", data[0])
    losses = iter([5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 2.2])
    seen = []

    def evaluate(model, dataset, name):
        seen.append((model, dataset))
        return {f"{name}_loss": next(losses), f"{name}_accuracy": 0.5}

    monkeypatch.setattr(dropout, "evaluate", evaluate)
    stopped, kept = [], []
    for i in range(7):
        one.model.out.bias.data.fill_(i)
        stopped.append(one.stop_early(patience=3))
        kept.append(one.best_model.out.bias[0].item())
    assert kept == [0, 1, 1, 3, 3, 3, 3]
    assert stopped == 6 * [False] + [True]
    assert all(pair == (one.model, one.val_set) for pair in seen)
    plain = new_run("none", data[0])
    assert not plain.stop_early(patience=1)
    assert plain.best_model is plain.model


# ---------- training ----------


def test_training_is_that_of_torchs_layers_and_gradients(standins, tmp_path, monkeypatch, capsys):
    """Every regularizer in the equations of a textbook, on the same random numbers.

    So is everything logged, printed and drawn.
    """
    bars, figures, start = [], [], dropout.time.perf_counter()

    class Bar(dropout.tqdm):
        def __init__(self, *args, disable, **kwargs):
            assert disable is None  # no bar in a file that the output is sent to
            super().__init__(*args, disable=False, file=io.StringIO(), **kwargs)
            bars.append(self)

    monkeypatch.setattr(dropout, "tqdm", Bar)
    plot = dropout.plot_run.__globals__
    monkeypatch.setattr(plot["plt"], "close", figures.append)
    flags = "--n_seeds 2 --weight_decay 0.1 --dropout 0.4 --shift 3 --patience 1"
    args, records = run(standins, tmp_path / "new" / "out", *TINY.split(), *flags.split())
    seconds = [record["seconds"] for record in records]
    end = dropout.time.perf_counter() - start
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3] < end
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"picture: {args.out_dir / 'loss.png'}"
    check_picture(figures[-1], plot, records)
    plot["plt"].close(figures[-1])
    saved = json.loads((args.out_dir / "args.json").read_text())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    assert saved == json.loads(json.dumps(vars(args), default=str)) | versions

    torch.manual_seed(args.seed)
    train_set, test_set = dropout.load_data(args)
    runs = [
        dropout.Run(args, name, args.seed + i, train_set)
        for name in dropout.REGULARIZERS
        for i in range(2)
    ]
    names = [name for name in dropout.REGULARIZERS for _ in range(2)]

    def measure(model, dataset):
        x, y = dataset.tensors
        for layer in model.hidden:
            x = F.relu(layer(x))
        logits = model.out(x)
        return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean()

    logged = iter(records)
    for iter_num in range(9):
        if iter_num in (0, 3, 6, 8):
            expected = {"iter": iter_num}
            for name in dropout.REGULARIZERS:
                same = [one for one, its_name in zip(runs, names) if its_name == name]
                models = [one.best_model if name == "early_stopping" else one.model for one in same]
                losses, accuracies = zip(*(measure(model, test_set) for model in models))
                trained = [measure(model, one.train_set)[0] for model, one in zip(models, same)]
                expected[f"{name}_train_loss"] = sum(trained) / 2
                expected[f"{name}_test_loss"] = sum(losses) / 2
                expected[f"{name}_test_accuracy"] = torch.stack(accuracies).mean().item()
                expected[f"{name}_spread"] = torch.stack(accuracies).std().item()
            record = next(logged)
            assert "  ".join(f"{key} {value:.5g}" for key, value in record.items()) in printed
            assert record.keys() == expected.keys() | {"seconds"}
            for key, value in expected.items():
                close = {"abs": 0.006} if "accuracy" in key or "spread" in key else {"rel": 1e-3}
                assert record[key] == pytest.approx(value, **close)
        if iter_num == 8:
            break
        for one, name in zip(runs, names):
            if name == "early_stopping" and iter_num % 2 == 0:
                one.val_losses.append(measure(one.model, one.val_set)[0])
                if min(one.val_losses) == one.val_losses[-1]:
                    one.best_model = copy.deepcopy(one.model)
        for one, name in zip(runs, names):
            if name == "early_stopping" and min(one.val_losses) < one.val_losses[-1]:
                continue  # has stopped, and adds no loss
            x, y = next(one.batches)
            dy, dx = torch.randint(-one.shift, one.shift + 1, (2,)).tolist()
            if name in ("augmentation", "combined"):
                x = x.view(-1, 28, 28).roll((dy, dx), (1, 2)).view(-1, 784)
            h = x
            for layer in one.model.hidden:
                h = F.relu(layer(h))
                mask = (torch.rand(h.shape) >= one.model.dropout.p).float()
                if name in ("dropout", "combined"):
                    h = h * mask / 0.6
            shown = loss = F.cross_entropy(one.model.out(h), y)
            params = list(one.model.parameters())
            if name in ("weight_decay", "combined"):
                loss = loss + 0.1 / 2 * sum((p**2).sum() for p in params)
            for p, grad in zip(params, torch.autograd.grad(loss, params)):
                p.data -= args.learning_rate * grad
    assert len({record[f"{name}_test_loss"] for name in dropout.REGULARIZERS}) == 6
    (bar,) = bars
    assert (bar.n, bar.total) == (8, 8)
    assert float(bar.postfix.removeprefix("loss=")) == pytest.approx(shown.item(), rel=1e-3)


def test_summary_is_the_mean_and_the_standard_deviation_over_seeds(data, monkeypatch):
    accuracies = iter([0.8, 0.9, 0.7])

    def evaluate(model, dataset, name):
        accuracy = next(accuracies) if name == "test" else 0.0
        return {f"{name}_loss": 2 - accuracy, f"{name}_accuracy": accuracy}

    monkeypatch.setattr(dropout, "evaluate", evaluate)
    runs = [SimpleNamespace(best_model=None, train_set=None) for _ in range(3)]
    expected = {"x_train_loss": 2, "x_test_loss": 1.2, "x_test_accuracy": 0.8, "x_spread": 0.1}
    assert dropout.summarize(runs, None, "x") == pytest.approx(expected)
    accuracies = iter([0.8])
    assert dropout.summarize(runs[:1], None, "x")["x_spread"] == 0


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_the_run(loss, tmp_path):
    args = dropout.parse_args(["--out_dir", str(tmp_path), "--learning_rate", "7"])
    dropout.log_metrics(args, {"iter": 0, "train_loss": 1.0, "test_loss": 2.0})
    with pytest.raises(FloatingPointError, match=r"iteration 5: lower --learning_rate 7"):
        dropout.log_metrics(args, {"iter": 5, "train_loss": 1.0, "test_loss": loss})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"iter": 0, "train_loss": 1.0, "test_loss": 2.0}']


def test_the_final_table_and_the_picture_of_the_spread(standins, tmp_path, monkeypatch, capsys):
    figures, real = [], dropout.Figure
    monkeypatch.setattr(dropout, "Figure", lambda **k: figures.append(real(**k)) or figures[-1])
    drawn, save = {}, dropout.save_spread

    def save_spread(runs, path):
        drawn.update({name: [one.test_accuracy for one in group] for name, group in runs.items()})
        save(runs, path)

    monkeypatch.setattr(dropout, "save_spread", save_spread)
    (tmp_path / "metrics.jsonl").write_text('{"iter": 9}\n')  # of an earlier run: replaced
    _, records = run(standins, tmp_path, *TINY.split(), "--n_seeds", "2")
    assert [record["iter"] for record in records] == [0, 3, 6, 8]
    final, table = records[-1], []
    for name in dropout.REGULARIZERS:
        accuracy, spread = final[f"{name}_test_accuracy"], final[f"{name}_spread"]
        gain = accuracy - final["none_test_accuracy"]
        table.append(f"{name:15} test accuracy {accuracy:.2%} +- {spread:.2%}, gain {gain:+.2%}")
    assert capsys.readouterr().out.splitlines()[-7:-1] == table

    (axis,) = figures[0].axes
    assert list(drawn) == [label.get_text() for label in axis.get_yticklabels()]
    assert axis.get_yticks().tolist() == list(range(6))
    assert axis.yaxis_inverted()  # the first on top
    assert "test accuracy" in axis.get_xlabel()
    for row, (name, accuracies) in enumerate(drawn.items()):
        dots, mean = axis.lines[2 * row : 2 * row + 2]
        assert dots.get_xydata().tolist() == [[accuracy, row] for accuracy in accuracies]
        assert (dots.get_linestyle(), dots.get_marker(), mean.get_marker()) == ("None", "o", "|")
        assert dots.get_alpha() < 1  # dots on each other are darker
        assert mean.get_markersize() > 2 * dots.get_markersize()
        assert mean.get_xydata().tolist() == [[pytest.approx(final[f"{name}_test_accuracy"]), row]]
    assert read_image(str(tmp_path / "spread.png")).shape[1:] == (320, 560)


def test_a_number_out_of_range_is_told_the_range(capsys):
    with pytest.raises(SystemExit):
        dropout.parse_args(["--n_hidden", "0"])
    assert "--n_hidden: invalid int from 1 to 1e+09 value: '0'" in capsys.readouterr().err


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    final = run(real_data, tmp_path, *"--max_iters 300 --n_seeds 1".split())[1][-1]
    assert 0.84 < final["none_test_accuracy"] < 0.91
    assert final["none_test_accuracy"] + 0.02 < final["augmentation_test_accuracy"] < 0.96
