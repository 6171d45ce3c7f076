"""Steps 01 to 06: gradients, losses and networks, each held against something known."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import load_step

step_01, step_02, step_03 = load_step("01"), load_step("02"), load_step("03")
step_04, step_05, step_06 = load_step("04"), load_step("05"), load_step("06")


def curve(step, out_dir, *flags):
    """Run a step and return its train_loss at every evaluation."""
    args = ["--n_examples", "2000", "--max_iters", "60", "--eval_interval", "1", *flags]
    step.train(step.parse_args([*args, "--out_dir", str(out_dir)]))
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


@pytest.mark.parametrize("step", [step_01, step_02, step_03], ids=lambda step: step.__name__)
def test_regression_reaches_the_noise_variance_and_the_teacher(step, tmp_path):
    final = step.train(step.parse_args(["--out_dir", str(tmp_path)]))
    assert abs(final["train_loss"] / final["best_loss"] - 1) < 0.02
    assert final["best_loss"] == 0.25
    assert final["param_error"] < 0.02


def test_01_hand_gradient_equals_central_differences():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=7), rng.normal(size=7)
    params, h = {"w": 0.7, "b": -0.3}, 1e-6
    grads = step_01.backward(x, y, step_01.forward(params, x))
    for name in params:
        up = step_01.loss_fn(step_01.forward(params | {name: params[name] + h}, x), y)
        down = step_01.loss_fn(step_01.forward(params | {name: params[name] - h}, x), y)
        assert grads[name] == pytest.approx((up - down) / (2 * h), rel=1e-6)


def test_01_every_epoch_shows_each_example_once_with_its_own_label():
    x = np.arange(10)
    batches = step_01.minibatches(x, -x, 5, np.random.default_rng(0))
    epochs = []
    for _ in range(3):
        (x0, y0), (x1, y1) = next(batches), next(batches)
        assert (x0 == -y0).all() and (x1 == -y1).all()
        epochs.append([*x0, *x1])
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_02_autograd_gives_the_curve_of_the_hand_gradient(tmp_path):
    by_hand = curve(step_01, tmp_path / "01")
    assert by_hand[0] > 2 * by_hand[-1]
    assert curve(step_02, tmp_path / "02") == pytest.approx(by_hand, abs=1e-5)


def test_03_with_one_input_is_02(tmp_path):
    vector = curve(step_03, tmp_path / "03", "--n_inputs", "1")
    assert vector == pytest.approx(curve(step_02, tmp_path / "02"), abs=1e-5)


def test_03_gradient_at_the_teacher_is_about_zero():
    args = step_03.parse_args([])
    x, y, teacher = step_03.load_data(args, np.random.default_rng(0))
    params = {name: value.float().requires_grad_() for name, value in teacher.items()}
    step_03.loss_fn(step_03.forward(params, x), y).backward()
    # The gradient of the noise alone has standard deviation 2 * noise / sqrt(N).
    limit = 5 * 2 * args.noise / math.sqrt(args.n_examples)
    assert all(param.grad.abs().max() < limit for param in params.values())


@pytest.mark.parametrize("scale", [1, 1e4])
def test_04_loss_is_cross_entropy_also_at_huge_logits(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * (2 * torch.rand(50, 7, generator=generator) - 1)
    y = torch.randint(7, (50,), generator=generator)
    torch.testing.assert_close(step_04.loss_fn(logits, y), F.cross_entropy(logits, y))
    assert step_04.loss_fn(torch.tensor([[1e4, -1e4]]), torch.tensor([1])) == 2e4


def test_04_first_loss_is_log_of_the_classes(tmp_path):
    first = curve(step_04, tmp_path, "--n_classes", "7")[0]
    assert first == pytest.approx(math.log(7), rel=1e-5)


def test_04_reaches_the_teachers_entropy(tmp_path):
    final = step_04.train(step_04.parse_args(["--out_dir", str(tmp_path)]))
    assert abs(final["train_loss"] / final["best_loss"] - 1) < 0.02
    assert 0 < final["best_loss"] < 0.9 * math.log(10)


def test_05_without_hidden_layers_is_04():
    args = step_05.parse_args(["--n_layer", "0"])
    params = step_05.init_params(args, np.random.default_rng(0))
    linear = step_04.init_params(step_04.parse_args([]))
    x = torch.randn(20, args.n_inputs)
    with torch.no_grad():
        params["w_out"] += torch.randn(args.n_inputs, args.n_classes)
        linear["w"] += params["w_out"]
    assert len(params) == len(linear) == 2
    assert torch.equal(step_05.forward(params, x), step_04.forward(linear, x))


def test_05_activations_keep_their_scale_through_ten_layers():
    args = step_05.parse_args(["--n_layer", "10", "--n_hidden", "512", "--n_inputs", "512"])
    params = step_05.init_params(args, np.random.default_rng(0))
    x = torch.randn(200, 512)
    for i in range(10):
        x = step_05.relu(x @ params[f"w{i}"] + params[f"b{i}"])
        assert 0.5 < x.square().mean() < 2, f"layer {i}"


def test_05_relu_is_relu():
    x = torch.linspace(-2, 2, 41, requires_grad=True)
    step_05.relu(x).sum().backward()
    assert torch.equal(step_05.relu(x), F.relu(x))
    assert torch.equal(x.grad, (x > 0).float())


@pytest.mark.parametrize("step", [step_05, step_06], ids=lambda step: step.__name__)
def test_hidden_layers_come_three_times_closer_than_the_linear_model(step, tmp_path):
    final = step.train(step.parse_args(["--out_dir", str(tmp_path)]))
    linear, mlp = (final[key] - final["best_loss"] for key in ("linear_loss", "train_loss"))
    assert 0 < 3 * mlp < linear


def test_06_with_05s_weights_has_05s_logits_and_gradients():
    args = step_05.parse_args(["--n_layer", "3", "--n_hidden", "16"])
    params = step_05.init_params(args, np.random.default_rng(0))
    with torch.no_grad():
        params["w_out"] += torch.randn(16, args.n_classes)
    model = step_06.MLP(args.n_inputs, args.n_hidden, args.n_layer, args.n_classes)
    pairs = [(layer, str(i)) for i, layer in enumerate(model.hidden)] + [(model.out, "_out")]
    for layer, name in pairs:
        layer.weight.data = params[f"w{name}"].detach().T.clone()
        layer.bias.data = params[f"b{name}"].detach().clone()
    x, y = torch.randn(30, args.n_inputs), torch.randint(args.n_classes, (30,))
    by_hand, by_torch = step_05.forward(params, x), model(x)
    torch.testing.assert_close(by_torch, by_hand)
    step_05.loss_fn(by_hand, y).backward()
    F.cross_entropy(by_torch, y).backward()
    for layer, name in pairs:
        torch.testing.assert_close(layer.weight.grad, params[f"w{name}"].grad.T)
        torch.testing.assert_close(layer.bias.grad, params[f"b{name}"].grad)


def test_06_every_epoch_shows_each_example_once_with_its_own_label():
    x = torch.arange(10)
    batches = step_06.minibatches(torch.utils.data.TensorDataset(x, -x), 5)
    epochs = []
    for _ in range(3):
        (x0, y0), (x1, y1) = next(batches), next(batches)
        assert torch.equal(x0, -y0) and torch.equal(x1, -y1)
        epochs.append([*x0.tolist(), *x1.tolist()])
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_06_gradients_do_not_add_up_over_iterations(tmp_path, monkeypatch):
    norms = []
    real = torch.optim.SGD.step

    def step(self):
        norms.append(self.param_groups[0]["params"][-1].grad.norm().item())
        return real(self)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    flags = ["--n_examples", "500", "--n_layer", "0", "--learning_rate", "1e-9"]
    args = step_06.parse_args([*flags, "--max_iters", "50", "--out_dir", str(tmp_path)])
    step_06.train(args)
    assert np.mean(norms[-10:]) < 3 * np.mean(norms[:10])
