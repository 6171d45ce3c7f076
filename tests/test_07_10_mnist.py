"""Steps 07 to 10: honest measurement on MNIST, Adam, convolution, residual blocks."""

import json
import struct

import numpy as np
import optax
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from steps import load_step
from torch.utils.data import TensorDataset

step_07, step_08, step_09, step_10 = (load_step(number) for number in ("07", "08", "09", "10"))
MNIST_STEPS = [step_07, step_08, step_09, step_10]


def name(step):
    return step.__name__


def read_images(folder, part):
    content = (folder / "MNIST" / "raw" / f"{part}-images-idx3-ubyte").read_bytes()
    _, n, h, w = struct.unpack(">4i", content[:16])
    return (
        torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(n, 1, h, w).float() / 255
    )


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_pixels_are_normalised_with_the_training_sets_statistics(step, standins):
    train_set, test_set = step.load_data(step.parse_args(["--data_dir", str(standins)]))
    train, test = read_images(standins, "train"), read_images(standins, "t10k")
    mean, std = train.mean(), train.std()
    expected = ((test - mean) / std).view_as(test_set.tensors[0])
    torch.testing.assert_close(test_set.tensors[0], expected, rtol=1e-4, atol=1e-4)
    assert abs(train_set.tensors[0].mean()) < 1e-4
    assert abs(train_set.tensors[0].std() - 1) < 1e-4
    assert not torch.allclose(mean, test.mean(), atol=1e-4)  # or this test could not tell


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_test_data_are_never_trained_on(step, standins, tmp_path, monkeypatch):
    """Other test images give other test losses and exactly the same training."""
    args = ["--data_dir", str(standins), "--max_iters", "4", "--eval_interval", "2"]
    honest = step.train(step.parse_args([*args, "--out_dir", str(tmp_path / "a")]))
    real = step.load_data

    def load_data(args):
        train_set, test_set = real(args)
        x, y = test_set.tensors
        return train_set, TensorDataset(1 - x, y)

    monkeypatch.setattr(step, "load_data", load_data)
    replaced = step.train(step.parse_args([*args, "--out_dir", str(tmp_path / "b")]))
    assert replaced["train_loss"] == honest["train_loss"]
    assert replaced["test_loss"] != honest["test_loss"]


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_evaluation_is_the_models_own_and_switches_dropout_off(step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(2500, 6), torch.randint(3, (2500,))
    measured = step.evaluate(model, TensorDataset(x, y), "test")
    logits = model[1](x)
    assert measured["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert measured["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert model.training


def test_07_learns_the_drawn_digits(standins, tmp_path):
    flags = ["--data_dir", str(standins), "--n_hidden", "64", "--max_iters", "150"]
    final = step_07.train(step_07.parse_args([*flags, "--out_dir", str(tmp_path)]))
    assert 0.9 < final["test_accuracy"] <= 1


@pytest.mark.data
@pytest.mark.parametrize(
    ("step", "flags", "floor"),
    [
        (step_07, ["--max_iters", "1000"], 0.965),
        (step_08, ["--max_iters", "1000"], 0.97),
        (step_09, ["--max_iters", "500"], 0.975),
        (step_10, ["--max_iters", "500"], 0.98),
    ],
)
def test_short_run_on_real_mnist(step, flags, floor, real_data, tmp_path):
    flags = [*flags, "--eval_interval", "1000", "--data_dir", str(real_data)]
    final = step.train(step.parse_args([*flags, "--out_dir", str(tmp_path)]))
    assert floor < final["test_accuracy"] < 0.997
    assert final["train_loss"] < 0.2


def copies(n_copies=2):
    """Return lists of equal parameters and a function that gives both the same gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (5,), (2, 5, 3, 3)]
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    models = [[nn.Parameter(p.clone()) for p in first] for _ in range(n_copies)]

    def set_grads():
        for params in zip(*models):
            grad = torch.randn(params[0].shape, generator=generator)
            for p in params:
                p.grad = grad.clone()

    return models, set_grads


def test_08_ten_optax_updates_equal_torch_adams():
    (ours, theirs), set_grads = copies()
    schedule = optax.cosine_decay_schedule(0.01, 20)
    adam = step_08.OptaxAdam(ours, schedule)
    reference = torch.optim.Adam(theirs, lr=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 20)
    for _ in range(10):
        set_grads()
        adam.step()
        reference.step()
        cosine.step()
    for p, q in zip(ours, theirs):
        assert (p - q).abs().max() < 1e-6


def test_08_optimizer_state_survives_from_update_to_update():
    (ours, fresh), set_grads = copies()
    adam = step_08.OptaxAdam(ours, lambda count: 0.1)
    for i in range(3):
        set_grads()
        adam.step()
        step_08.OptaxAdam(fresh, lambda count: 0.1).step()  # forgets its moments every time
        assert int(adam.state[0].count) == i + 1
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(ours, fresh))


def test_08_arrays_are_shared_without_a_copy():
    (params,), set_grads = copies(1)
    adam = step_08.OptaxAdam(params, lambda count: 0.1)
    set_grads()
    adam.step()
    for p in params:
        array = step_08.jax.dlpack.from_dlpack(p.detach())
        assert array.unsafe_buffer_pointer() == p.data_ptr()


@pytest.mark.parametrize("step", MNIST_STEPS[1:], ids=name)
def test_the_rate_falls_along_a_cosine_to_zero(step, standins, tmp_path):
    flags = "--max_iters 4 --eval_interval 2 --batch_size 8 --learning_rate 0.01 --data_dir".split()
    step.train(step.parse_args([*flags, str(standins), "--out_dir", str(tmp_path)]))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records]
    assert rates == pytest.approx([0.01, 0.005, 0], abs=1e-8)


def test_08_zero_grad_forgets_the_gradient():
    (params,), set_grads = copies(1)
    set_grads()
    step_08.OptaxAdam(params, lambda count: 0.1).zero_grad()
    assert all(p.grad is None for p in params)


def test_09_shifted_image_gives_shifted_feature_map():
    model = step_09.ConvNet(10, dropout=0)
    x = torch.zeros(1, 1, 28, 28)
    x[:, :, 8:16, 8:16] = torch.rand(8, 8)

    def features(x):
        return F.max_pool2d(F.relu(model.conv_1(x)), 2)

    moved = x.roll((2, 4), dims=(2, 3))  # pooling halves the shift
    torch.testing.assert_close(features(moved), features(x).roll((1, 2), dims=(2, 3)))
    assert not torch.allclose(features(moved), features(x))


def test_09_has_fewer_parameters_than_the_mlp():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    args = step_08.parse_args([])
    mlp = step_08.MLP(28 * 28, args.n_hidden, args.n_layer, 10, args.dropout)
    assert count(step_09.ConvNet(10, 0)) < count(mlp) / 4


@pytest.mark.parametrize("step", [step_09, step_10], ids=name)
def test_every_minibatch_is_augmented_and_no_evaluation(step, standins, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(step, "augment", lambda x, shift: seen.append((len(x), shift)) or x)
    flags = "--max_iters 3 --eval_interval 1 --batch_size 8 --shift 1 --data_dir".split()
    step.train(step.parse_args([*flags, str(standins), "--out_dir", str(tmp_path)]))
    assert seen == 3 * [(8, 1)]


@pytest.mark.parametrize("step", [step_09, step_10], ids=name)
def test_augmentation_moves_digits_by_at_most_shift(step):
    torch.manual_seed(0)
    x = torch.zeros(1, 1, 28, 28)
    x[0, 0, 14, 14] = 1
    seen = set()
    for _ in range(200):
        moved = step.augment(x, 2)
        assert moved.sum() == 1
        _, _, row, column = (moved > 0).nonzero()[0].tolist()
        seen.add((row - 14, column - 14))
    assert seen == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    assert torch.equal(step.augment(x, 0), x)


def test_10_block_with_zero_last_scale_is_its_shortcut():
    torch.manual_seed(0)
    x = torch.rand(4, 8, 14, 14)  # not negative, so that ReLU passes it on
    assert torch.equal(step_10.Block(8, 8)(x), x)
    wider = step_10.Block(8, 16)
    torch.testing.assert_close(wider(x), F.relu(wider.shortcut(x)))
    assert wider(x).shape == (4, 16, 14, 14)
    awake = step_10.Block(8, 8)
    nn.init.ones_(awake.bn_2.weight)
    assert not torch.allclose(awake(x), x)


def test_10_evaluation_uses_running_statistics():
    torch.manual_seed(0)
    model = step_10.ResNet(4, 1, 10)
    x, y = torch.randn(32, 1, 28, 28), torch.zeros(32, dtype=torch.int64)
    for _ in range(3):
        model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = step_10.evaluate(model, TensorDataset(x, y), "test")["test_loss"]
    single = [step_10.evaluate(model, TensorDataset(*pair), "test")["test_loss"]
              for pair in zip(x.split(1), y.split(1))]  # fmt: skip
    assert whole == pytest.approx(np.mean(single), rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_10_gradients_reach_the_first_layer_of_a_deep_network():
    torch.manual_seed(0)
    model = step_10.ResNet(4, 10, 10)
    for block in model.blocks:
        if isinstance(block, step_10.Block):
            nn.init.ones_(block.bn_2.weight)
    F.cross_entropy(model(torch.randn(16, 1, 28, 28)), torch.arange(16) % 10).backward()
    first, last = model.conv.weight.grad, model.out.weight.grad
    assert 0.1 < first.norm() / last.norm() < 10  # without the shortcuts it is in the thousands
