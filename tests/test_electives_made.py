"""Elective made: no pixel depends on itself or a later one, and the probabilities sum to 1."""

import io
import itertools
import json
import math
import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from runs import check_picture
from steps import load_step
from torch.distributions import Bernoulli
from torchvision.io import read_image

made = load_step("electives/made")


def new_model(n_inputs=9, n_hidden=32, n_layer=1, order="random", seed=0):
    """Return a MADE with all parameters random and the masks of the seed."""
    torch.manual_seed(0)
    model = made.MADE(n_inputs, n_hidden, n_layer, order)
    for param in model.parameters():
        nn.init.normal_(param)
    model.set_masks(seed)
    return model


def run(data_dir, out_dir, *flags):
    """Run the elective; return its arguments and the records of metrics.jsonl."""
    args = made.parse_args([*flags, "--data_dir", str(data_dir), "--out_dir", str(out_dir)])
    final = made.train(args)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert final == records[-1]
    return args, records


def all_images(n_pixels):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n_pixels)))


# ---------- masks ----------


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("n_layer", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pixel_depends_on_all_before_it_and_on_no_other(order, n_layer, seed):
    model = new_model(9, 32, n_layer, order, seed)
    x = torch.rand(20, 9)
    jacobian = torch.func.vmap(torch.func.jacrev(model))(x)  # (20, outputs, inputs)
    depends = (jacobian != 0).any(dim=0)
    before = torch.tensor([[i < j for i in model.position] for j in model.position])
    assert torch.equal(depends, before)


@pytest.mark.parametrize("n_layer", [0, 1, 3])
def test_the_network_is_torchs_with_masked_weights(n_layer):
    model, x = new_model(9, 32, n_layer), torch.rand(5, 9)
    copies = []
    for layer in (*model.hidden, model.out, model.direct):
        n_out, n_in = layer.weight.shape
        assert layer.mask.shape == (n_out, n_in) and set(layer.mask.unique().tolist()) <= {0, 1}
        copies.append(nn.Linear(n_in, n_out))
        copies[-1].weight.data = torch.where(layer.mask == 1, layer.weight, 0)
        copies[-1].bias.data = layer.bias.data
    *hidden, out, direct = copies
    reference = nn.Sequential(*(part for layer in hidden for part in (layer, nn.ReLU())), out)
    torch.testing.assert_close(model(x), reference(x) + direct(x))


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_hidden_units_alone_let_every_pixel_see_those_before_it(n_layer):
    """Without the direct weights, too: the degrees are spread over all positions."""
    model = new_model(9, 500, n_layer, "random", 3)
    nn.init.zeros_(model.direct.weight)
    jacobian = torch.func.vmap(torch.func.jacrev(model))(torch.rand(50, 9))
    position = model.position
    assert torch.equal((jacobian != 0).any(dim=0), position[:, None] > position)


def test_order_and_masks_repeat_by_seed():
    def masks(seed, order="random"):
        model = new_model(9, 32, 2, order, seed)
        return [layer.mask for layer in (*model.hidden, model.out, model.direct)], model.position

    (first, order), (again, same_order), (others, other_order) = masks(1), masks(1), masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(order, same_order)
    assert not any(torch.equal(a, b) for a, b in zip(first, others))
    assert order.tolist() != other_order.tolist()
    assert sorted(order.tolist()) == sorted(other_order.tolist()) == list(range(9))
    first, others = masks(1, "raster"), masks(2, "raster")
    assert first[1].tolist() == others[1].tolist() == list(range(9))
    assert not torch.equal(first[0][0], others[0][0])  # other masks in the same order
    model = new_model()
    torch.manual_seed(5)
    model.set_masks(7)
    drawn = torch.rand(1)  # the choice leaves training's random numbers alone
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


# ---------- the likelihood ----------


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("n_layer", [0, 1, 2])
def test_probabilities_of_all_images_sum_to_1(order, n_layer):
    model = new_model(9, 32, n_layer, order).requires_grad_(False)
    log_p = model.log_likelihood(all_images(9))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_p.std() > 0.5


def test_images_of_one_pixel_have_a_probability_too():
    model = new_model(1, 4, 1).requires_grad_(False)
    assert model.log_likelihood(all_images(1)).exp().sum().item() == pytest.approx(1)


def test_likelihood_of_large_logits_is_finite():
    model = made.MADE(3, 4, 0, "raster").requires_grad_(False)  # only out's biases are not zero
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    for bias, expected in ((-200.0, [0.0, -600.0]), (200.0, [-600.0, 0.0])):
        model.out.bias.fill_(bias)
        torch.testing.assert_close(model.log_likelihood(x), torch.tensor(expected))


def test_likelihood_is_the_product_of_the_pixels_probabilities():
    model = new_model(4, 16, 1).requires_grad_(False)
    x = all_images(4)
    p = torch.sigmoid(model(x))
    expected = torch.where(x == 1, p, 1 - p).prod(dim=1)
    torch.testing.assert_close(model.log_likelihood(x).exp(), expected)


def test_evaluation_averages_the_probabilities_of_all_masks():
    model = new_model(9, 32, 1).requires_grad_(False)
    x = all_images(9)
    p = torch.zeros(512)
    for seed in range(3):
        model.set_masks(seed)
        p += model.log_likelihood(x).exp() / 3
    dataset = made.TensorDataset(x, torch.zeros(512))
    measured = made.evaluate(model, dataset, "some", 3)
    assert measured == {"some_loss": pytest.approx(-p.log().mean().item(), rel=1e-5)}


# ---------- sampling ----------


@pytest.mark.parametrize("order", ["raster", "random"])
def test_samples_are_as_frequent_as_they_are_probable(order):
    model = new_model(4, 16, 1, order, seed=1).requires_grad_(False)
    torch.manual_seed(0)
    zeros = torch.zeros(20_000, 4)
    x = made.sample(model, zeros, 0)
    assert not zeros.any()  # the argument is left as it was
    counts = torch.bincount((x @ torch.tensor([8.0, 4, 2, 1])).long(), minlength=16)
    p = model.log_likelihood(all_images(4)).exp()
    error = (counts / 20_000 - p).abs() / (p * (1 - p) / 20_000).sqrt()
    assert error.max() < 4
    assert p.max() > 2 * p.median()


def test_known_pixels_are_kept_and_the_others_follow_from_them():
    model = new_model(4, 16, 1, "random", seed=1).requires_grad_(False)
    known = model.position < 2
    torch.manual_seed(0)
    start = torch.where(known, torch.tensor([1.0, 0, 1, 1]), 0.5)
    x = made.sample(model, start.expand(20_000, 4), 2)
    assert (x[:, known] == start[known]).all()
    p = model.log_likelihood(all_images(4)).exp()
    p = torch.where((all_images(4)[:, known] == start[known]).all(dim=1), p, 0)
    counts = torch.bincount((x @ torch.tensor([8.0, 4, 2, 1])).long(), minlength=16)
    torch.testing.assert_close(counts / 20_000, p / p.sum(), rtol=0, atol=0.015)


def test_pictures_show_samples_and_completions_of_test_images(tmp_path, monkeypatch):
    model = new_model(784, 8, 1, "random", seed=1)
    position = new_model(784, 8, 1, "random", seed=0).position  # the pictures are of this order
    known = position < 392

    def sample(model, x, n_known):  # in place of 784 passes
        assert torch.equal(model.position, position)
        return torch.where(position < n_known, x, torch.rand(x.shape).round())

    monkeypatch.setattr(made, "sample", sample)
    torch.manual_seed(0)
    x = torch.rand(12, 784).bernoulli()
    made.save_pictures(model, made.TensorDataset(x, torch.zeros(12)), tmp_path)
    samples, completions = (
        read_image(str(tmp_path / name))[0, 2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30) / 255
        for name in ("samples.png", "completions.png")
    )  # (10, 10, 28, 28) each
    assert samples.shape == completions.shape == (10, 10, 28, 28)
    assert set(samples.unique().tolist()) == {0, 1}
    completions = completions.flatten(2)  # (10, 10, 784)
    assert torch.equal(completions[:, 0], x[:10])
    assert (completions[:, 1:, known] == x[:10, None, known]).all()
    assert (completions[:, 1, ~known] - 0.5).abs().max() < 0.01
    rest = completions[:, 2:, ~known]
    assert set(rest.unique().tolist()) == {0, 1}
    assert not any(torch.equal(*pair) for row in rest for pair in itertools.combinations(row, 2))


# ---------- training ----------


def nll(model, x, n_masks):
    """Return the mean negative log-likelihood of images x (B, D) by torch's own loss."""
    log_p = []
    for seed in range(n_masks):
        model.set_masks(seed)
        bce = nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="none")
        log_p.append(-bce.sum(1))
    return -(torch.stack(log_p).logsumexp(0) - math.log(n_masks)).mean()


@pytest.mark.parametrize("flags", ["--n_masks 1 --warmup_iters 2", "--n_masks 2 --order random"])
def test_training_maximizes_the_likelihood_of_images_sampled_anew(
    flags, standins, tmp_path, monkeypatch, capsys
):
    """Everything logged, printed and drawn is that of torch's Adam on the same random numbers."""
    flags += " --max_iters 8 --eval_interval 3 --learning_rate 0.02 --batch_size 300 --n_hidden 16"
    bars, pictures, figures, start = [], [], [], made.time.perf_counter()

    class Bar(made.tqdm):
        def __init__(self, *args, disable, **kwargs):
            assert disable is None  # no bar in a file that the output is sent to
            super().__init__(*args, disable=False, file=io.StringIO(), **kwargs)
            bars.append(self)

    monkeypatch.setattr(made, "tqdm", Bar)
    monkeypatch.setattr(made, "save_pictures", lambda *args: pictures.append(args))
    plot = made.plot_run.__globals__
    monkeypatch.setattr(plot["plt"], "close", figures.append)
    out_dir = tmp_path / "new" / "out"
    if "random" in flags:  # an earlier run's metrics are replaced
        out_dir.mkdir(parents=True)
        (out_dir / "metrics.jsonl").write_text('{"iter": 9}\n')
    args, records = run(standins, out_dir, *flags.split())
    printed = capsys.readouterr().out.splitlines()
    assert [record["iter"] for record in records] == [0, 3, 6, 8]
    seconds = [record["seconds"] for record in records]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3] < made.time.perf_counter() - start

    torch.manual_seed(args.seed)
    train_set, test_set = made.load_data(args)
    batches = made.minibatches(train_set, 300)
    model = made.MADE(784, 16, args.n_layer, args.order)
    mean_image = train_set.tensors[0].mean(0).clamp(1e-3, 1 - 1e-3)
    model.out.bias.data = (mean_image / (1 - mean_image)).log()
    begin = Bernoulli(mean_image).log_prob(test_set.tensors[0]).sum(1).mean().item()
    assert records[0]["test_loss"] == pytest.approx(-begin, rel=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    warmup = min(args.warmup_iters, 7)  # the rate falls at least once
    logged = iter(records)
    for i in range(9):
        rising, falling = i / warmup, (1 + math.cos(math.pi * (i - warmup) / (8 - warmup))) / 2
        rate = args.learning_rate * (rising if i < warmup else falling)
        if i in (0, 3, 6, 8):
            with torch.no_grad(), torch.random.fork_rng([]):
                torch.manual_seed(0)
                x = train_set.tensors[0][: len(test_set)].bernoulli()
                expected = {"iter": i, "learning_rate": rate}
                expected["train_loss"] = nll(model, x, args.n_masks).item()
                expected["test_loss"] = nll(model, test_set.tensors[0], args.n_masks).item()
            record = next(logged)
            assert "  ".join(f"{key} {value:.5g}" for key, value in record.items()) in printed
            expected["seconds"] = record["seconds"]
            assert record == pytest.approx(expected, rel=1e-4, abs=1e-9)
        if i < 8:
            optimizer.param_groups[0]["lr"] = rate
            x = next(batches)[0].bernoulli()
            model.set_masks(i % args.n_masks)
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), x) * 784
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert records[3]["train_loss"] < 0.99 * records[0]["train_loss"]

    assert (bars[0].n, bars[0].total) == (8, 8)
    assert float(bars[0].postfix.removeprefix("loss=")) == pytest.approx(loss.item(), rel=1e-4)

    ((trained, images, out_dir),) = pictures
    assert torch.equal(images.tensors[0], test_set.tensors[0]) and out_dir == args.out_dir
    loss = nll(trained, images.tensors[0], args.n_masks).item()  # it is the final model
    assert loss == pytest.approx(records[3]["test_loss"], rel=1e-5)
    summary = f"test NLL {records[3]['test_loss']:.2f} nats after {seconds[3]:.0f} s"
    assert printed[-2:] == [summary, f"picture: {args.out_dir / 'loss.png'}"]
    check_picture(figures[-1], plot, records)
    plot["plt"].close(figures[-1])
    saved = json.loads((args.out_dir / "args.json").read_text())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    assert saved == json.loads(json.dumps(vars(args), default=str)) | versions


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_the_run(loss, tmp_path):
    args = made.parse_args(["--out_dir", str(tmp_path), "--learning_rate", "7"])
    made.log_metrics(args, {"iter": 0, "train_loss": 1.0, "test_loss": 2.0})
    with pytest.raises(FloatingPointError, match=r"iteration 5: lower --learning_rate 7"):
        made.log_metrics(args, {"iter": 5, "train_loss": 1.0, "test_loss": loss})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"iter": 0, "train_loss": 1.0, "test_loss": 2.0}']


def test_training_images_are_brightness_and_test_images_one_sample(standins):
    args = made.parse_args(["--data_dir", str(standins)])
    train_set, test_set = made.load_data(args)
    raw = [made.MNIST(standins, train=train).data.flatten(1) / 255 for train in (True, False)]
    assert torch.equal(train_set.tensors[0], raw[0])
    x = test_set.tensors[0]
    assert set(x.unique().tolist()) == {0, 1}
    # The same at every seed, and the images that the README's results are of.
    assert torch.equal(x, raw[1].bernoulli(generator=torch.Generator().manual_seed(0)))
    assert not x[raw[1] == 0].any() and x[raw[1] == 1].all()
    between = (raw[1] > 0.4) & (raw[1] < 0.6)
    assert abs(x[between].mean() - raw[1][between].mean()) < 0.03


@pytest.mark.parametrize("error", [AssertionError, OSError, RuntimeError, TypeError, ValueError])
def test_any_error_of_reading_mnist_names_the_files(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error("a problem")

    monkeypatch.setattr(made, "MNIST", fail)
    with pytest.raises(OSError, match=r"MNIST/raw/train-.*a problem"):
        made.load_data(made.parse_args([]))


@pytest.mark.parametrize(
    ("shape", "brightness", "label"),
    [((5, 28, 27), 1, 9), ((5, 28, 28), 0, 9), ((5, 28, 28), 1, 10)],
)
def test_what_is_not_mnist_is_refused(shape, brightness, label, monkeypatch):
    images = SimpleNamespace(data=torch.full(shape, brightness), targets=torch.full((5,), label))
    monkeypatch.setattr(made, "MNIST", lambda *args, **kwargs: images)
    with pytest.raises(OSError, match=r"MNIST/raw/train-.*not 28 x 28"):
        made.load_data(made.parse_args([]))
    images.data, images.targets = torch.ones(5, 28, 28), torch.full((5,), 9)
    assert len(made.load_data(made.parse_args([]))[0]) == 5


def test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero():
    torch.manual_seed(0)
    model = made.MADE(784, 500, 2, "raster").requires_grad_(False)
    for layer in model.hidden:
        assert layer.weight.var() * layer.weight.shape[1] == pytest.approx(2, rel=0.1)
        assert not layer.bias.any()
    assert not any(param.any() for param in (*model.out.parameters(), *model.direct.parameters()))


def test_a_number_out_of_range_is_told_the_range(capsys):
    with pytest.raises(SystemExit):
        made.parse_args(["--n_hidden", "0"])
    assert "--n_hidden: invalid int from 1 to 1e+09 value: '0'" in capsys.readouterr().err


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--max_iters 1000 --eval_interval 1000".split()
    final = run(real_data, tmp_path, *flags)[1][-1]
    assert 84 < final["test_loss"] < 105
