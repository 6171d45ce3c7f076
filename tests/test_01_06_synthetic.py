"""Steps 01 to 06: gradients, losses and networks, each held against something known.

For every step a reference repeats its training on the same data and minibatches, with the gradient
in closed form or from PyTorch. A `train` that leaves out an idea of the step has another curve.
"""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import check_number, watched_run
from steps import load_step
from torch.utils.data import TensorDataset

step_01, step_02, step_03 = load_step("01"), load_step("02"), load_step("03")
step_04, step_05, step_06 = load_step("04"), load_step("05"), load_step("06")
REGRESSION = [step_01, step_02, step_03]
MLPS = [step_05, step_06]
STEPS = [*REGRESSION, step_04, *MLPS]
SHORT = "--n_examples 2000 --max_iters 40 --eval_interval 3 --batch_size 64".split()


def name(step):
    return step.__name__


def run(step, out_dir, *flags):
    """Run a step; return its arguments and the records of metrics.jsonl."""
    return watched_run(step, *SHORT, *flags, "--out_dir", out_dir)


def curve(records, key="train_loss"):
    return [record[key] for record in records]


def evaluated(args, values):
    """Return those of values, one per iteration, that a run records."""
    return [
        *values[:: args.eval_interval],
        *values[-1:] * (args.max_iters % args.eval_interval > 0),
    ]


def assert_falls(losses, start=None):
    """A curve that is compared with another must go down, or equality would say little."""
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(start or losses[0], rel=1e-5)


# ---------- the ideas of each step's training ----------


def descend_regression(step, args):
    """Return the losses and parameter errors of gradient descent in float64, as records."""
    rng = np.random.default_rng(args.seed)
    x, y, teacher = step.load_data(args, rng)
    batches = step.minibatches(x, y, args.batch_size, rng)
    truth = np.array([*np.ravel(teacher["w"]), teacher["b"]], float)
    theta, records = np.zeros(len(truth)), []
    assert truth.max() > -truth.min()  # or param_error would be the same without abs

    def errors(x, y):  # of a linear map with an input of ones for the bias
        x = np.column_stack([np.asarray(x, float), np.ones(len(y))])
        return x, x @ theta - np.asarray(y, float)

    for _ in range(args.max_iters + 1):
        loss = (errors(x, y)[1] ** 2).mean()
        records.append({"train_loss": loss, "param_error": abs(theta - truth).max()})
        inputs, error = errors(*next(batches))
        theta = theta - args.learning_rate * 2 * inputs.T @ error / len(error)
    return records


@pytest.mark.parametrize("step", REGRESSION, ids=name)
def test_every_update_goes_against_the_gradient_of_a_new_minibatch(step, tmp_path):
    args, records = run(step, tmp_path, "--noise", "0.7", "--seed", "12")
    expected = evaluated(args, descend_regression(step, args))
    assert_falls(curve(records))
    assert curve(records, "noise_variance") == pytest.approx([0.49] * len(records))
    assert set(records[0]) == {"iter", "seconds", "train_loss", "noise_variance", "param_error"}
    for key in ("train_loss", "param_error"):
        assert curve(records, key) == pytest.approx(curve(expected, key), rel=1e-4)


def test_04_every_update_uses_the_gradient_p_minus_onehot(tmp_path):
    args, records = run(step_04, tmp_path, "--learning_rate", "0.5", "--n_inputs", "6")
    rng = np.random.default_rng(args.seed)
    x_train, y_train, entropy = step_04.load_data(args, rng)
    batches = step_04.minibatches(x_train, y_train, args.batch_size, rng)
    w, b, expected = torch.zeros(args.n_inputs, args.n_classes), torch.zeros(args.n_classes), []
    for _ in range(args.max_iters + 1):
        expected.append(F.cross_entropy(x_train @ w + b, y_train).item())
        x, y = next(batches)
        d_logits = ((x @ w + b).softmax(1) - F.one_hot(y, args.n_classes)) / len(y)
        w = w - args.learning_rate * x.T @ d_logits
        b = b - args.learning_rate * d_logits.sum(0)
    assert_falls(curve(records), math.log(10))  # at first all classes are equally likely
    assert set(records[0]) == {"iter", "seconds", "train_loss", "entropy"}
    assert curve(records) == pytest.approx(evaluated(args, expected), rel=1e-4)
    assert curve(records, "entropy") == [entropy] * len(records)


def train_mlps(models, batches, x_train, y_train, args):
    """Return the loss curves of models that plain gradient descent trains on the same batches."""
    curves = [[] for _ in models]
    for _ in range(args.max_iters + 1):
        x, y = next(batches)
        for model, losses in zip(models, curves):
            losses.append(F.cross_entropy(model(x_train), y_train).item())
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            with torch.no_grad():
                for param, grad in zip(model.parameters(), grads):
                    param -= args.learning_rate * grad
    return curves


def as_modules(params):
    """Return step 05's parameters as a network of PyTorch's own layers."""
    layers = []
    for suffix in [key[1:] for key in params if key.startswith("w")]:
        w, b = params[f"w{suffix}"].detach(), params[f"b{suffix}"].detach()
        layers += [nn.Linear(*w.shape), nn.ReLU()]
        layers[-2].weight.data, layers[-2].bias.data = w.T.clone(), b.clone()
    return nn.Sequential(*layers[:-1])


MLP_FLAGS = "--n_hidden 32 --n_layer 3 --n_classes 4 --learning_rate 0.4".split()


def test_05_trains_the_mlp_and_the_linear_model_alongside(tmp_path):
    args, records = run(step_05, tmp_path, *MLP_FLAGS)
    rng = np.random.default_rng(args.seed)
    x_train, y_train, entropy = step_05.load_data(args, rng)
    batches = step_05.minibatches(x_train, y_train, args.batch_size, rng)
    models = [as_modules(step_05.init_params(args, n_layer, rng)) for n_layer in (3, 0)]
    assert [len(list(model.parameters())) for model in models] == [8, 2]
    mlp, linear = train_mlps(models, batches, x_train, y_train, args)
    check_mlp_records(records, evaluated(args, mlp), evaluated(args, linear), entropy)


def test_06_trains_the_mlp_and_the_linear_model_alongside(tmp_path):
    args, records = run(step_06, tmp_path, *MLP_FLAGS)
    torch.manual_seed(args.seed)
    x_train, y_train, entropy = step_06.load_data(args, np.random.default_rng(args.seed))
    batches = step_06.minibatches(TensorDataset(x_train, y_train), args.batch_size)
    sizes = args.n_inputs, args.n_hidden
    models = [step_06.MLP(*sizes, n_layer, args.n_classes) for n_layer in (3, 0)]
    mlp, linear = train_mlps(models, batches, x_train, y_train, args)
    check_mlp_records(records, evaluated(args, mlp), evaluated(args, linear), entropy)


def check_mlp_records(records, mlp, linear, entropy):
    assert set(records[0]) == {"iter", "seconds", "train_loss", "linear_loss", "entropy"}
    assert_falls(mlp, math.log(4))  # at first all of the four classes are equally likely
    assert_falls(linear, math.log(4))
    assert curve(records) == pytest.approx(mlp, rel=1e-4)
    assert curve(records, "linear_loss") == pytest.approx(linear, rel=1e-4)
    assert curve(records, "entropy") == [entropy] * len(records)


@pytest.mark.parametrize("step", [step_02, step_03, step_04, step_05, step_06], ids=name)
def test_an_evaluation_builds_no_computation_graph(step, tmp_path, monkeypatch):
    owner = step.MLP if step is step_06 else step
    real, calls = owner.forward, []

    def forward(model, x):
        if torch.is_tensor(x):  # the teacher of step 03 gets arrays
            calls.append((len(x) == 500, torch.is_grad_enabled()))
        return real(model, x)

    monkeypatch.setattr(owner, "forward", forward)
    run(step, tmp_path, "--n_examples", "500", "--max_iters", "3")
    assert set(calls) == {(True, False), (False, True)}


# ---------- data ----------


def reference_data(step, args):
    """Return x, y and what the step returns with them, from numpy."""
    rng, n = np.random.default_rng(args.seed), args.n_examples
    if step in REGRESSION:
        shape = (args.n_inputs,) if step is step_03 else ()
        teacher = {"w": 3 * rng.normal(size=shape), "b": 3 * rng.normal()}
        x = rng.normal(size=(n, *shape))
        y = (x * teacher["w"]).reshape(n, -1).sum(1) + teacher["b"]
        return x, y + args.noise * rng.normal(size=n), teacher
    if step is step_04:
        w, x = rng.normal(size=(args.n_inputs, args.n_classes)), rng.normal(size=(n, args.n_inputs))
        z = x @ w
    else:
        x = rng.normal(size=(n, args.n_inputs))
        z = np.sin(x @ rng.normal(size=(args.n_inputs, 8)) / 2)
        z = 3 * z @ rng.normal(size=(8, args.n_classes))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return x, (np.log(p) + rng.gumbel(size=p.shape)).argmax(1), -(p * np.log(p)).sum(1).mean()


@pytest.mark.parametrize("step", STEPS, ids=name)
def test_the_data_are_those_of_the_teacher(step):
    sizes = ["--n_inputs", "4"] if step not in (step_01, step_02) else []
    sizes += ["--noise", "0.7"] if step in REGRESSION else ["--n_classes", "3"]
    args = step.parse_args(["--n_examples", "600", *sizes])
    x, y, known = step.load_data(args, np.random.default_rng(args.seed))
    *expected, teacher = reference_data(step, args)
    pairs = [*zip((x, y), expected)]
    if step in REGRESSION:
        assert known.keys() == teacher.keys()
        pairs += [(known[key], teacher[key]) for key in teacher]
    else:
        assert known == pytest.approx(teacher, rel=1e-9)  # the entropy
    if step is not step_01:
        label = torch.float32 if step in REGRESSION else torch.int64
        assert (x.dtype, y.dtype) == (torch.float32, label)
    for ours, theirs in pairs:
        assert np.shape(ours) == np.shape(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", STEPS, ids=name)
def test_limits_of_numbers_are_inclusive(step):
    check_number(step.number)


# ---------- minibatches ----------


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(5, [5, 5]), (4, [4, 4, 2]), (10, [10]), (25, [10])]
)
@pytest.mark.parametrize("step", STEPS, ids=name)
def test_every_epoch_shows_each_example_once_with_its_own_label(step, batch_size, sizes):
    if step is step_06:
        x = torch.arange(10)
        batches = step.minibatches(TensorDataset(x, -x), batch_size)
    else:
        x = np.arange(10) if step is step_01 else torch.arange(10)
        batches = step.minibatches(x, -x, batch_size, np.random.default_rng(0))
    epochs = []
    for _ in range(3):
        epoch = [next(batches) for _ in sizes]
        assert [len(x) for x, y in epoch] == [len(y) for x, y in epoch] == sizes
        assert all((x == -y).all() for x, y in epoch)
        epochs.append([i for x, _ in epoch for i in x.tolist()])
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert list(range(10)) != epochs[0] != epochs[1] != epochs[2]


# ---------- 01 to 03: linear regression ----------


@pytest.mark.parametrize("step", REGRESSION, ids=name)
def test_regression_reaches_the_noise_variance_and_the_teacher(step, tmp_path):
    final = step.train(step.parse_args(["--out_dir", str(tmp_path)]))
    assert abs(final["train_loss"] / final["noise_variance"] - 1) < 0.02
    assert final["noise_variance"] == 0.25
    assert final["param_error"] < 0.02


@pytest.mark.parametrize("step", REGRESSION, ids=name)
def test_the_examples_are_the_teachers_line_plus_noise(step):
    args = step.parse_args(["--noise", "0.3"])
    x, y, teacher = step.load_data(args, np.random.default_rng(0))
    teacher = {key: torch.as_tensor(value).float() for key, value in teacher.items()}
    noise = torch.as_tensor(y).float() - step.forward(teacher, torch.as_tensor(x).float())
    limit = 5 * 0.3 / math.sqrt(args.n_examples)  # five standard deviations of a mean
    assert abs(noise.mean()) < limit
    assert abs(noise.std() - 0.3) < limit
    inputs = torch.as_tensor(x).float().view(len(x), -1)
    assert (inputs.mean(0).abs() < 0.02).all() and (abs(inputs.std(0) - 1) < 0.02).all()
    assert ((noise[:, None] * inputs).mean(0).abs() < limit).all()  # chance, not a part of the line


def test_01_hand_gradient_equals_central_differences():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=7), rng.normal(size=7)
    params, h = {"w": 0.7, "b": -0.3}, 1e-6
    grads = step_01.backward(x, y, step_01.forward(params, x))
    for key in params:
        up = step_01.loss_fn(step_01.forward(params | {key: params[key] + h}, x), y)
        down = step_01.loss_fn(step_01.forward(params | {key: params[key] - h}, x), y)
        assert grads[key] == pytest.approx((up - down) / (2 * h), rel=1e-6)


def test_01_diverges_without_a_warning_of_numpys(tmp_path):
    flags = "--learning_rate 1e9 --max_iters 60 --eval_interval 60".split()  # inf - inf on the way
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(FloatingPointError, match="at iteration 60: lower --learning_rate"):
            run(step_01, tmp_path, *flags)


def test_02_autograd_gives_the_curve_of_the_hand_gradient(tmp_path):
    by_hand = curve(run(step_01, tmp_path / "01")[1])
    assert_falls(by_hand)
    assert curve(run(step_02, tmp_path / "02")[1]) == pytest.approx(by_hand, abs=1e-5)


def test_03_with_one_input_is_02(tmp_path):
    vector = curve(run(step_03, tmp_path / "03", "--n_inputs", "1")[1])
    assert vector == pytest.approx(curve(run(step_02, tmp_path / "02")[1]), abs=1e-5)


def test_03_gradient_at_the_teacher_is_about_zero():
    args = step_03.parse_args([])
    x, y, teacher = step_03.load_data(args, np.random.default_rng(0))
    params = {key: value.float().requires_grad_() for key, value in teacher.items()}
    step_03.loss_fn(step_03.forward(params, x), y).backward()
    # The gradient of the noise alone has standard deviation 2 * noise / sqrt(N).
    limit = 5 * 2 * args.noise / math.sqrt(args.n_examples)
    assert all(param.grad.abs().max() < limit for param in params.values())


# ---------- 04 to 06: classification ----------


@pytest.mark.parametrize("step", [step_04, step_05], ids=name)
@pytest.mark.parametrize("scale", [1, 1e4])
def test_loss_is_cross_entropy_also_at_huge_logits(step, scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * (2 * torch.rand(50, 7, generator=generator) - 1)
    y = torch.randint(7, (50,), generator=generator)
    torch.testing.assert_close(step.loss_fn(logits, y), F.cross_entropy(logits, y))
    assert step.loss_fn(torch.tensor([[1e4, -1e4]]), torch.tensor([1])) == 2e4


@pytest.mark.parametrize("step", [step_04, step_05, step_06], ids=name)
def test_labels_are_samples_of_the_teachers_distribution(step):
    """With one input there are few enough places to count: the labels' entropy is the teacher's."""
    args = step.parse_args(["--n_inputs", "1", "--n_classes", "3"])
    x, y, entropy = step.load_data(args, np.random.default_rng(3))
    order = x[:, 0].argsort()
    p = F.one_hot(y[order], 3).float().view(200, -1, 3).mean(1)  # in 200 bins of 500 neighbors
    counted = -(p * p.clamp(min=1e-9).log()).sum(1).mean()
    assert counted == pytest.approx(entropy, rel=0.02)
    assert 0.2 * math.log(3) < entropy < 0.95 * math.log(3)  # neither certain nor pure chance


def test_04_reaches_the_teachers_entropy(tmp_path):
    final = step_04.train(step_04.parse_args(["--out_dir", str(tmp_path)]))
    assert abs(final["train_loss"] / final["entropy"] - 1) < 0.02
    assert 0 < final["entropy"] < 0.9 * math.log(10)


def test_05_without_hidden_layers_is_04():
    args = step_05.parse_args([])
    params = step_05.init_params(args, 0, np.random.default_rng(0))
    linear = step_04.init_params(step_04.parse_args([]))
    x = torch.randn(20, args.n_inputs)
    with torch.no_grad():
        params["w_out"] += torch.randn(args.n_inputs, args.n_classes)
        params["b_out"] += torch.randn(args.n_classes)
        linear["w"] += params["w_out"]
        linear["b"] += params["b_out"]
    assert len(params) == len(linear) == 2
    assert torch.equal(step_05.forward(params, x), step_04.forward(linear, x))


def test_05_activations_keep_their_scale_through_ten_layers():
    args = step_05.parse_args(["--n_hidden", "512", "--n_inputs", "512"])
    params = step_05.init_params(args, 10, np.random.default_rng(0))
    x = torch.randn(200, 512)
    for i in range(10):
        x = step_05.relu(x @ params[f"w{i}"] + params[f"b{i}"])
        assert 0.5 < x.square().mean() < 2, f"layer {i}"


def test_05_relu_is_relu():
    x = (torch.arange(-20.0, 21) / 10).requires_grad_()  # 0 is among them
    step_05.relu(x).sum().backward()
    assert torch.equal(step_05.relu(x), F.relu(x))
    assert torch.equal(x.grad, (x > 0).float())


@pytest.mark.parametrize("step", MLPS, ids=name)
def test_hidden_weights_have_variance_2_over_n_and_all_else_is_zero(step):
    torch.manual_seed(0)
    args = step.parse_args(["--n_inputs", "300", "--n_hidden", "200"])
    if step is step_05:
        model = as_modules(step.init_params(args, 3, np.random.default_rng(0)))
    else:
        model = step.MLP(args.n_inputs, args.n_hidden, 3, args.n_classes)
    *hidden, out = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in hidden] == [300, 200, 200]
    model.requires_grad_(False)
    for layer in hidden:
        assert layer.weight.var() * layer.in_features == pytest.approx(2, rel=0.05)
        assert abs(layer.weight.mean()) < 0.002
        assert layer.weight.abs().max() > 3 * layer.weight.std()  # normal, not uniform
    assert not out.weight.any()
    assert not any(layer.bias.any() for layer in (*hidden, out))


@pytest.mark.parametrize("step", MLPS, ids=name)
def test_hidden_layers_come_three_times_closer_than_the_linear_model(step, tmp_path):
    flags = "--n_examples 5000 --max_iters 700 --n_hidden 64 --learning_rate 0.3".split()
    final = run(step, tmp_path, *flags, "--eval_interval", "700")[1][-1]
    linear, mlp = (final[key] - final["entropy"] for key in ("linear_loss", "train_loss"))
    assert 0 < 3 * mlp < linear


def test_06_with_05s_weights_has_05s_logits_and_gradients():
    args = step_05.parse_args(["--n_hidden", "16"])
    params = step_05.init_params(args, 3, np.random.default_rng(0))
    with torch.no_grad():
        for param in params.values():
            param += 0.3 * torch.randn(param.shape)
    model = step_06.MLP(args.n_inputs, args.n_hidden, 3, args.n_classes)
    pairs = [(layer, str(i)) for i, layer in enumerate(model.hidden)] + [(model.out, "_out")]
    for layer, key in pairs:
        layer.weight.data = params[f"w{key}"].detach().T.clone()
        layer.bias.data = params[f"b{key}"].detach().clone()
    x, y = torch.randn(30, args.n_inputs), torch.randint(args.n_classes, (30,))
    by_hand, by_torch = step_05.forward(params, x), model(x)
    torch.testing.assert_close(by_torch, by_hand)
    step_05.loss_fn(by_hand, y).backward()
    F.cross_entropy(by_torch, y).backward()
    for layer, key in pairs:
        torch.testing.assert_close(layer.weight.grad, params[f"w{key}"].grad.T)
        torch.testing.assert_close(layer.bias.grad, params[f"b{key}"].grad)
