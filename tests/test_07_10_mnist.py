"""Steps 07 to 10: honest measurement on MNIST, Adam, convolution, residual blocks.

For every step a reference repeats its training with an optimizer of PyTorch's and measures it. A
`train` that leaves out an idea of the step (the schedule, the augmentation, ...) differs from it.
"""

import math
import struct

import jax
import optax
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import check_number, check_warm_up, watched_run
from steps import load_step
from torch.utils.data import TensorDataset

step_07, step_08, step_09, step_10 = (load_step(number) for number in ("07", "08", "09", "10"))
MNIST_STEPS = [step_07, step_08, step_09, step_10]


def name(step):
    return step.__name__


# ---------- training ----------


def new_model(step, args):
    if step in (step_07, step_08):
        return step.MLP(28 * 28, args.n_hidden, args.n_layer, 10, args.dropout)
    if step is step_09:
        return step.ConvNet(10, args.dropout)
    return step.ResNet(args.n_channel, args.n_layer, 10)


def warmup_cosine(i, args):
    """Return the factor of the learning rate at update i: linear warm-up, then a cosine to zero."""
    if i < args.warmup_iters:
        return i / args.warmup_iters
    done = (i - args.warmup_iters) / (args.max_iters - args.warmup_iters)
    return (1 + math.cos(math.pi * done)) / 2


def reference(step, args):
    """Repeat the training with PyTorch's optimizer; return the records, first and last weights."""
    torch.manual_seed(args.seed)
    train_set, test_set = step.load_data(args)
    batches = step.minibatches(train_set, args.batch_size)
    model, records, factor = new_model(step, args), [], lambda i: 1
    first = {key: value.clone() for key, value in model.state_dict().items()}
    if step is step_07:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
        factor = lambda i: warmup_cosine(i, args)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    n_test = len(test_set.tensors[1])
    for i in range(args.max_iters + 1):
        if i % args.eval_interval == 0 or i == args.max_iters:
            record = {} if step is step_07 else {"learning_rate": optimizer.param_groups[0]["lr"]}
            model.eval()
            for part, dataset in ("train", train_set), ("test", test_set):
                x, y = (tensor[:n_test] for tensor in dataset.tensors)
                with torch.no_grad():
                    logits = model(x)
                record[f"{part}_loss"] = F.cross_entropy(logits, y).item()
                record[f"{part}_accuracy"] = (logits.argmax(1) == y).sum().item() / n_test
            records.append(record)
            model.train()
        if i < args.max_iters:
            x, y = next(batches)
            if step in (step_09, step_10):
                x = step.augment(x, args.shift)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return records, first, model.state_dict()


FLAGS = {
    step_07: "--max_iters 10 --learning_rate 0.1 --n_hidden 32 --n_layer 3",
    step_08: "--max_iters 8 --warmup_iters 3 --learning_rate 0.01 --n_hidden 32 --n_layer 3",
    step_09: "--max_iters 5 --warmup_iters 2 --shift 1 --dropout 0.3 --learning_rate 0.01",
    step_10: "--max_iters 7 --warmup_iters 3 --shift 1 --learning_rate 0.02 --n_channel 4",
}


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_training_is_that_of_pytorchs_optimizer(step, standins, tmp_path, monkeypatch):
    """Every record and every weight: the schedule, augmentation and dropout, the data used."""
    models, evaluate = [], step.evaluate

    def spy(model, *rest):
        models.append(model)
        return evaluate(model, *rest)

    monkeypatch.setattr(step, "evaluate", spy)
    flags = f"{FLAGS[step]} --eval_interval 3 --batch_size 60 --seed 5".split()
    flags += ["--data_dir", standins, "--out_dir", tmp_path]
    args, records = watched_run(step, *flags)
    expected, first, last = reference(step, args)
    assert len(records) == len(expected) == math.ceil(args.max_iters / 3) + 1
    losses = [record["train_loss"] for record in records]
    assert max(losses) > 1.005 * min(losses)  # 100 times what the two may differ
    for record, known in zip(records, expected):
        assert set(record) == {"iter", "seconds", *known}
        for key, value in known.items():  # accuracy: three of the 400 images may be near ties
            tolerance = {"abs": 3 / 400 + 1e-6} if "accuracy" in key else {"rel": 5e-5, "abs": 1e-7}
            assert record[key] == pytest.approx(value, **tolerance), (record["iter"], key)
    for key, weights in models[-1].state_dict().items():  # Adam magnifies the rounding of a few
        difference, change = (weights - last[key]).float(), (last[key] - first[key]).float()
        assert difference.norm() <= 0.01 * change.norm(), key


@pytest.mark.parametrize("step", MNIST_STEPS[1:], ids=name)
def test_warm_up_can_be_none_and_is_cut_to_the_run(step, standins, tmp_path, monkeypatch):
    flags = ["--batch_size", 2, "--data_dir", standins, "--out_dir", tmp_path]
    check_warm_up(step, monkeypatch, *flags)


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_limits_of_numbers_are_inclusive(step):
    check_number(step.number)


def test_07_learns_the_drawn_digits(standins, tmp_path):
    flags = ["--n_hidden", 64, "--max_iters", 150, "--data_dir", standins, "--out_dir", tmp_path]
    final = watched_run(step_07, *flags)[1][-1]
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
    flags += ["--eval_interval", 1000, "--data_dir", real_data, "--out_dir", tmp_path]
    final = watched_run(step, *flags)[1][-1]
    assert floor < final["test_accuracy"] < 0.997
    assert final["train_loss"] < 0.2


# ---------- data and evaluation ----------


def read_mnist(folder, part):
    """Return images (N, 1, 28, 28), 0 to 1, and labels (N,), read byte by byte."""
    raw = folder / "MNIST" / "raw"
    content = (raw / f"{part}-images-idx3-ubyte").read_bytes()
    _, *shape = struct.unpack(">4i", content[:16])
    images = torch.tensor(list(content[16:]), dtype=torch.uint8).view(shape).float() / 255
    labels = (raw / f"{part}-labels-idx1-ubyte").read_bytes()[8:]
    return images[:, None], torch.tensor(list(labels))


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_pixels_are_normalized_with_the_training_sets_statistics(step, standins):
    datasets = step.load_data(step.parse_args(["--data_dir", str(standins)]))
    (train, _), (test, _) = originals = [read_mnist(standins, part) for part in ("train", "t10k")]
    mean, std = train.mean(), train.std()
    for dataset, (images, labels) in zip(datasets, originals):
        x, y = dataset.tensors
        assert x.shape[1:] == ((784,) if step in (step_07, step_08) else (1, 28, 28))
        torch.testing.assert_close(x.view_as(images), (images - mean) / std, rtol=1e-4, atol=1e-4)
        assert torch.equal(y, labels)
    assert abs(datasets[0].tensors[0].mean()) < 1e-4
    assert abs(datasets[0].tensors[0].std() - 1) < 1e-4
    assert not torch.allclose(mean, test.mean(), atol=1e-4)  # or this test could not tell


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_images_or_labels_that_are_no_mnist_are_refused(step, tmp_path, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = bytes(range(196)) * 4 * 50, bytes(range(10)) * 5
    files = {
        "images-idx3": struct.pack(">4i", 0x803, 50, 28, 28) + images,
        "labels-idx1": struct.pack(">2i", 0x801, 50) + labels,
    }
    changes = [
        {},
        {"images-idx3": files["images-idx3"][:16] + bytes(len(images))},  # black
        {"images-idx3": struct.pack(">4i", 0x803, 50, 56, 14) + images},
        {"images-idx3": files["images-idx3"][:-1]},
        {"images-idx3": b"<html><body>not found</body></html>"},
        {"images-idx3": files["labels-idx1"]},
        {"images-idx3": b""},
        {"labels-idx1": struct.pack(">2i", 0x801, 50) + labels[1:] + bytes([10])},
        {"labels-idx1": struct.pack(">2i", 0x801, 49) + labels[1:]},
    ]
    args = step.parse_args(["--data_dir", str(tmp_path)])
    for change in changes:
        for part in ("train", "t10k"):
            for kind, content in (files | change).items():
                (raw / f"{part}-{kind}-ubyte").write_bytes(content)
        if not change:
            assert [len(dataset) for dataset in step.load_data(args)] == [50, 50]
        else:
            with pytest.raises(OSError, match="raw/train"):
                step.load_data(args)


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_every_epoch_shows_each_image_once_in_a_new_order(step):
    x = torch.arange(10)
    batches = step.minibatches(TensorDataset(x, -x), 4)
    epochs = []
    for _ in range(3):
        images, labels = (torch.cat(part) for part in zip(*(next(batches) for _ in range(3))))
        assert torch.equal(images, -labels)
        epochs.append(images.tolist())
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert list(range(10)) != epochs[0] != epochs[1] != epochs[2]


class Probe(nn.Module):
    """A linear model with dropout that remembers how it is called."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout, self.out, self.calls = nn.Dropout(dropout), nn.Linear(6, 3), []

    def forward(self, x):
        self.calls.append((len(x) <= 1000, torch.is_grad_enabled()))
        return self.out(self.dropout(x))


@pytest.mark.parametrize("step", MNIST_STEPS, ids=name)
def test_evaluation_measures_all_examples_in_chunks_and_without_a_graph(step):
    torch.manual_seed(0)
    model = Probe(0.5)  # off in evaluation
    x, y = torch.randn(2500, 6), torch.randint(3, (2500,))
    measured = step.evaluate(model, TensorDataset(x, y), "test")
    logits = model.out(x)
    assert set(measured) == {"test_loss", "test_accuracy"}
    assert measured["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert measured["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert set(model.calls) == {(True, False)}
    assert model.training


# ---------- 07 to 09: models ----------


@pytest.mark.parametrize("step", MNIST_STEPS[:3], ids=name)
def test_weights_have_variance_2_over_n_and_all_else_is_zero(step):
    torch.manual_seed(0)
    model = new_model(step, step.parse_args([])).requires_grad_(False)
    layers = [layer for layer in model.modules() if hasattr(layer, "weight")]
    hidden = [layer for layer in layers if layer is not model.out]
    assert len(hidden) == (3 if step is step_09 else 2)
    for layer in hidden:
        n_in = layer.weight[0].numel()
        assert layer.weight.var() * n_in == pytest.approx(2, rel=0.15)
        assert layer.weight.abs().max() > 2 * layer.weight.std()  # normal, not uniform
    assert not model.out.weight.any()
    assert not any(layer.bias.any() for layer in layers)


def as_layers(model, dropout):
    """Return the network as a chain of PyTorch's own layers, with the same parameters."""
    if isinstance(model, step_09.ConvNet):
        parts = [(conv, nn.ReLU(), nn.MaxPool2d(2)) for conv in (model.conv_1, model.conv_2)]
        parts += [(nn.Flatten(), model.hidden, nn.ReLU(), nn.Dropout(dropout))]
    else:
        parts = [(layer, nn.ReLU(), nn.Dropout(dropout)) for layer in model.hidden]
    return nn.Sequential(*(layer for part in parts for layer in part), model.out)


MLP_SIZES = [(6, 5, 3, 4), (6, 5, 0, 4)]


@pytest.mark.parametrize(
    ("step", "sizes"),
    [*((step, sizes) for step in (step_07, step_08) for sizes in MLP_SIZES), (step_09, (7,))],
)
def test_logits_and_gradients_are_those_of_pytorchs_layers(step, sizes):
    torch.manual_seed(0)
    model = (step.ConvNet if step is step_09 else step.MLP)(*sizes, 0.3)
    for param in model.parameters():
        param.data += 0.1 * torch.randn(param.shape)
    x = torch.randn(9, *((1, 28, 28) if step is step_09 else (6,)))
    results = []
    for network in (model, as_layers(model, 0.3)):  # in training: the same units are zeroed
        torch.manual_seed(1)
        logits = network(x)
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *grads])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0].shape == (9, sizes[-1])
    shapes = [tuple(layer.weight.shape) for layer in model.modules() if hasattr(layer, "weight")]
    if step is step_09:
        assert shapes == [(16, 1, 5, 5), (32, 16, 5, 5), (128, 32 * 7 * 7), (7, 128)]
    else:
        assert shapes == ([(5, 6), (5, 5), (5, 5), (4, 5)] if sizes[2] else [(4, 6)])


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
    counts = [
        sum(p.numel() for p in new_model(step, step.parse_args([])).parameters())
        for step in (step_08, step_09)
    ]
    assert counts[1] < counts[0] / 4


@pytest.mark.parametrize("step", [step_09, step_10], ids=name)
def test_augmentation_moves_digits_by_at_most_shift(step):
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 28, 28)
    x[:, 0, 14, 14] = torch.tensor([1, 2])
    seen = set()
    for _ in range(200):
        moved = step.augment(x, 2)
        assert moved.sum() == 3
        (image, _, row, column), (other, *place) = (moved > 0).nonzero().tolist()
        assert (image, other, place) == (0, 1, [0, row, column])  # the same shift for all
        seen.add((row - 14, column - 14))
    assert seen == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    assert torch.equal(step.augment(x, 0), x)


# ---------- 08: the optimizer ----------


def copies(n_copies=2):
    """Return lists of equal parameters and a function that gives all the same gradients."""
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
    optimizer = step_08.OptaxOptimizer(ours, optax.adam(optax.cosine_decay_schedule(0.01, 20)))
    reference = torch.optim.Adam(theirs, lr=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 20)
    for _ in range(10):
        set_grads()
        optimizer.step()
        reference.step()
        cosine.step()
    for p, q in zip(ours, theirs):
        assert (p - q).abs().max() < 1e-6


def test_08_adam_is_the_formula_of_the_docstring():
    (ours, theirs), set_grads = copies()
    optimizer = step_08.OptaxOptimizer(iter(ours), optax.adam(0.01))
    m, v = ([torch.zeros_like(p) for p in theirs] for _ in range(2))
    for t in range(1, 6):
        set_grads()
        optimizer.step()
        for i, p in enumerate(theirs):
            m[i] = 0.9 * m[i] + 0.1 * p.grad
            v[i] = 0.999 * v[i] + 0.001 * p.grad**2
            m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)
            p.data -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8)
    for p, q in zip(ours, theirs):
        assert (p - q).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("tx", "reference"),
    [
        (optax.sgd(0.1), lambda params: torch.optim.SGD(params, lr=0.1)),
        (
            optax.adamw(0.01, weight_decay=0.5),
            lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.5),
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_08_any_transformation_of_optax_will_do(tx, reference):
    (ours, theirs), set_grads = copies()
    optimizer, reference = step_08.OptaxOptimizer(ours, tx), reference(theirs)
    for _ in range(3):
        set_grads()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs):
        assert (p - q).abs().max() < 1e-6


def test_08_optimizer_state_survives_from_update_to_update():
    (ours, fresh), set_grads = copies()
    optimizer = step_08.OptaxOptimizer(ours, optax.adam(0.1))
    for i in range(3):
        set_grads()
        optimizer.step()
        step_08.OptaxOptimizer(fresh, optax.adam(0.1)).step()  # forgets its moments every time
        assert int(optimizer.state[0].count) == i + 1
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(ours, fresh))


def test_08_arrays_are_shared_without_a_copy():
    (params,), set_grads = copies(1)
    optimizer = step_08.OptaxOptimizer(params, optax.adam(0.1))
    set_grads()
    optimizer.step()
    for p in params:
        array = step_08.jax.dlpack.from_dlpack(p.detach())
        assert array.unsafe_buffer_pointer() == p.data_ptr()


def test_08_uses_the_cpu_also_where_jax_has_a_gpu():
    jax.config.update("jax_platforms", "")
    step_08.OptaxOptimizer(copies(1)[0][0], optax.sgd(0.1))
    assert jax.config.jax_platforms == "cpu"


def test_08_zero_grad_forgets_the_gradient():
    (params,), set_grads = copies(1)
    set_grads()
    step_08.OptaxOptimizer(params, optax.adam(0.1)).zero_grad()
    assert all(p.grad is None for p in params)


# ---------- 10: residual blocks ----------


def batch_norm(bn, x):
    """Return what batch norm gives in evaluation, from its formula."""
    mean, var, weight, bias = (
        t[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return weight * (x - mean) / (var + bn.eps).sqrt() + bias


def block(b, x):
    """Return what a residual block gives in evaluation, written out once more."""
    shortcut = x
    if b.conv_1.in_channels != b.conv_1.out_channels:
        conv, bn = b.shortcut
        shortcut = batch_norm(bn, F.conv2d(x, conv.weight))
    residual = F.relu(batch_norm(b.bn_1, F.conv2d(x, b.conv_1.weight, padding=1)))
    residual = batch_norm(b.bn_2, F.conv2d(residual, b.conv_2.weight, padding=1))
    return F.relu(shortcut + residual)


@pytest.mark.parametrize("n_layer", [1, 2])
def test_10_is_batch_norm_residual_blocks_pooling_and_a_global_average(n_layer):
    torch.manual_seed(0)
    model = step_10.ResNet(4, n_layer, 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained: nothing is 0 or 1 by chance
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    x = images = torch.randn(5, 1, 28, 28)
    blocks = [module for module in model.blocks if isinstance(module, step_10.Block)]
    x = F.relu(batch_norm(model.bn, F.conv2d(x, model.conv.weight, padding=1)))
    for i, (b, n_out) in enumerate(zip(blocks, [n for n in (4, 8, 16) for _ in range(n_layer)])):
        x = block(b, F.max_pool2d(x, 2) if i % n_layer == 0 else x)
        assert x.shape[1] == n_out
    assert len(blocks) == 3 * n_layer
    assert x.shape[2:] == (3, 3)
    expected = x.mean((2, 3)) @ model.out.weight.T + model.out.bias
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in convolutions)  # batch norm subtracts it


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


def test_10_training_normalizes_each_channel_over_the_minibatch():
    torch.manual_seed(0)
    b = step_10.Block(8, 16)
    seen = []
    for bn in (b.bn_1, b.bn_2, b.shortcut[1]):
        nn.init.ones_(bn.weight)
        bn.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    b(5 + 3 * torch.randn(32, 8, 14, 14))
    assert len(seen) == 3
    for output in seen:
        assert output.mean((0, 2, 3)).abs().max() < 1e-4
        assert (output.var((0, 2, 3)) - 1).abs().max() < 1e-2


def test_10_evaluation_uses_running_statistics_and_leaves_them():
    torch.manual_seed(0)
    model = step_10.ResNet(4, 1, 10)
    x, y = torch.randn(32, 1, 28, 28), torch.zeros(32, dtype=torch.int64)
    for _ in range(3):
        model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = step_10.evaluate(model, TensorDataset(x, y), "test")["test_loss"]
    singly = [
        step_10.evaluate(model, TensorDataset(*pair), "test")["test_loss"]
        for pair in zip(x.split(1), y.split(1))
    ]
    assert together == pytest.approx(sum(singly) / len(singly), rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_10_gradients_reach_the_first_layer_of_a_deep_network():
    torch.manual_seed(0)
    model = step_10.ResNet(4, 10, 10)
    for module in model.blocks:
        if isinstance(module, step_10.Block):
            nn.init.ones_(module.bn_2.weight)
    F.cross_entropy(model(torch.randn(16, 1, 28, 28)), torch.arange(16) % 10).backward()
    first, last = model.conv.weight.grad, model.out.weight.grad
    assert 0.1 < first.norm() / last.norm() < 10  # without the shortcuts it is in the thousands
