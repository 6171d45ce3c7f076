"""Elective made: no pixel depends on itself or a later one, and the probabilities sum to 1."""

import itertools
import json
import math

import pytest
import torch
import torch.nn as nn
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
    singly = [
        made.evaluate(model, made.TensorDataset(image[None], torch.zeros(1)), "one", 3)["one_loss"]
        for image in x
    ]
    assert sum(math.exp(-loss) for loss in singly) == pytest.approx(1, abs=1e-4)


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


def test_pictures_show_samples_and_completions_of_test_images(tmp_path):
    model = new_model(784, 8, 1, "raster")
    torch.manual_seed(0)
    x = torch.rand(12, 784).bernoulli()
    made.save_pictures(model, made.TensorDataset(x, torch.zeros(12)), tmp_path)
    samples, completions = (
        read_image(str(tmp_path / name))[0, 2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30) / 255
        for name in ("samples.png", "completions.png")
    )  # (10, 10, 28, 28) each
    assert samples.shape == completions.shape == (10, 10, 28, 28)
    assert set(samples.unique().tolist()) == {0, 1}
    images = x[:10].view(10, 28, 28)
    assert torch.equal(completions[:, 0], images)
    assert torch.equal(completions[:, :, :14], images[:, None, :14].expand(-1, 10, -1, -1))
    assert (completions[:, 1, 14:] - 0.5).abs().max() < 0.01
    rest = completions[:, 2:, 14:].flatten(2)
    assert set(rest.unique().tolist()) == {0, 1}
    assert not any(torch.equal(*pair) for row in rest for pair in itertools.combinations(row, 2))


# ---------- training ----------


@pytest.mark.parametrize("flags", ["--n_masks 1", "--n_masks 3 --order random --n_layer 2"])
def test_training_maximizes_the_likelihood_of_images_sampled_anew(flags, standins, tmp_path):
    flags += " --max_iters 12 --eval_interval 6 --learning_rate 0.02 --warmup_iters 2"
    flags += " --batch_size 32 --n_hidden 16"
    args, records = run(standins, tmp_path, *flags.split())
    torch.manual_seed(args.seed)
    train_set, test_set = made.load_data(args)
    batches = made.minibatches(train_set, 32)
    model = made.MADE(784, 16, args.n_layer, args.order)
    mean_image = train_set.tensors[0].mean(0).clamp(1e-3, 1 - 1e-3)
    model.out.bias.data = (mean_image / (1 - mean_image)).log()
    start = Bernoulli(mean_image).log_prob(test_set.tensors[0]).sum(1).mean().item()
    assert records[0]["test_loss"] == pytest.approx(-start, rel=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    for i in range(12):
        factor = i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 10)) / 2
        optimizer.param_groups[0]["lr"] = factor * args.learning_rate
        model.set_masks(i % args.n_masks)
        x = next(batches)[0].bernoulli()
        optimizer.zero_grad()
        (-model.log_likelihood(x).mean()).backward()
        optimizer.step()
    train_set = made.TensorDataset(*train_set[: len(test_set)])
    for name, dataset in (("train", train_set), ("test", test_set)):
        expected = made.evaluate(model, dataset, name, args.n_masks)[f"{name}_loss"]
        assert records[-1][f"{name}_loss"] == pytest.approx(expected, rel=1e-4)
    assert records[-1]["train_loss"] < 0.99 * records[0]["train_loss"]


def test_evaluation_leaves_training_as_it_is(standins, tmp_path):
    flags = "--max_iters 4 --batch_size 32 --n_hidden 16 --n_masks 2".split()
    often = run(standins, tmp_path / "often", *flags, "--eval_interval", "1")[1][-1]
    once = run(standins, tmp_path / "once", *flags, "--eval_interval", "4")[1][-1]
    assert {**often, "seconds": 0} == {**once, "seconds": 0}


def test_training_images_are_brightness_and_test_images_one_sample(standins):
    args = made.parse_args(["--data_dir", str(standins)])
    train_set, test_set = made.load_data(args)
    raw = [made.MNIST(standins, train=train).data.flatten(1) / 255 for train in (True, False)]
    assert torch.equal(train_set.tensors[0], raw[0])
    x = test_set.tensors[0]
    assert set(x.unique().tolist()) == {0, 1}
    assert torch.equal(x, made.load_data(args)[1].tensors[0])  # the same at every seed
    assert not x[raw[1] == 0].any() and x[raw[1] == 1].all()
    between = (raw[1] > 0.4) & (raw[1] < 0.6)
    assert abs(x[between].mean() - raw[1][between].mean()) < 0.03


def test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero():
    torch.manual_seed(0)
    model = made.MADE(784, 500, 2, "raster").requires_grad_(False)
    for layer in model.hidden:
        assert layer.weight.var() * layer.weight.shape[1] == pytest.approx(2, rel=0.1)
        assert not layer.bias.any()
    assert not any(param.any() for param in (*model.out.parameters(), *model.direct.parameters()))


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--max_iters 1000 --eval_interval 1000".split()
    final = run(real_data, tmp_path, *flags)[1][-1]
    assert 84 < final["test_loss"] < 105
