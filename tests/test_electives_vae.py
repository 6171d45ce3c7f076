"""Elective vae: the bounds are bounds, the gradients right, and training maximizes them."""

import itertools
import json
import math
import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from runs import Idle, check_number
from steps import load_step
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torchvision.io import read_image

vae = load_step("electives/vae")


def new_model(n_inputs=6, n_hidden=16, n_layer=1, n_latent=3, scale=0.5):
    """Return a VAE in double precision whose parameters are all random."""
    torch.manual_seed(0)
    model = vae.VAE(n_inputs, n_hidden, n_layer, n_latent, 0.0).double()
    for param in model.parameters():
        nn.init.normal_(param, std=scale)
    return model


def bound_by_torch(model, x, k):
    """Return the bound of each image by torch's distributions, on the same random numbers."""
    mean, log_std = model.encoder(x).chunk(2, dim=1)
    q, p = Normal(mean, log_std.exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    z = mean + q.stddev * torch.randn(k, *mean.shape)
    likelihood = Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    if k == 1:
        return likelihood[0] - kl_divergence(q, p).sum(-1)
    return (likelihood + (p.log_prob(z) - q.log_prob(z)).sum(-1)).logsumexp(0) - math.log(k)


def run(data_dir, out_dir, *flags):
    """Run the elective; return its arguments and the records of metrics.jsonl."""
    args = vae.parse_args([*flags, "--data_dir", str(data_dir), "--out_dir", str(out_dir)])
    final = vae.train(args)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert final == records[-1]
    return args, records


# ---------- the bounds ----------


def test_closed_form_kl_is_torchs_and_the_monte_carlo_mean():
    torch.manual_seed(0)
    mean, log_std = torch.randn(4, 3), 0.5 * torch.randn(4, 3)
    q, p = Normal(mean, log_std.exp()), Normal(torch.zeros(3), torch.ones(3))
    ours = vae.kl_divergence(mean, log_std)
    torch.testing.assert_close(ours, kl_divergence(q, p).sum(-1))
    z = q.sample((100_000,))
    monte_carlo = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)
    torch.testing.assert_close(ours, monte_carlo, rtol=0.02, atol=0.02)
    assert not vae.kl_divergence(torch.zeros(4, 3), torch.zeros(4, 3)).any()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_bound_is_that_of_torchs_distributions(k):
    model, x = new_model(), torch.rand(5, 6).double().bernoulli()
    torch.manual_seed(1)
    ours = model(x, k)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, bound_by_torch(model, x, k))
    z = torch.randn(k, 5, 3).double()
    likelihood = Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_likelihood(x, z), likelihood)


@pytest.mark.parametrize("k", [1, 3])
def test_reparameterized_gradient_is_that_of_finite_differences(k):
    model, x = new_model(n_layer=0), torch.rand(8, 6).double().bernoulli()

    def bound():
        torch.manual_seed(1)
        return model(x, k).mean()

    bound().backward()
    for param in model.parameters():  # the encoder's, too, through the sampled z
        assert param.grad.abs().max() > 1e-3
        flat, grad = param.data.view(-1), param.grad.view(-1)
        for i in range(0, len(flat), 5):
            value = flat[i].item()
            values = []
            for step in (1e-5, -1e-5):
                flat[i] = value + step
                values.append(bound().item())
            flat[i] = value
            assert grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)


def test_bound_grows_with_k_and_meets_the_integral():
    """With one latent, p(x) is an integral over a line, which the trapezoid rule computes."""
    model = new_model(n_latent=1, scale=0.8)
    model.encoder.out.weight.data *= 0.1  # near the prior, so that no sample weighs too much
    model.encoder.out.bias.data.zero_()
    x = torch.rand(3, 6).double().bernoulli()
    grid = torch.linspace(-8, 8, 4001).double()
    prior = Normal(0, 1).log_prob(grid)[:, None]
    joint = prior + model.log_likelihood(x, grid[:, None, None].expand(-1, 3, 1))
    exact = joint.logsumexp(0) + math.log(16 / 4000)
    with torch.no_grad():
        torch.manual_seed(0)
        bounds = [model(x.repeat(2000, 1), k).view(2000, 3).mean(0) for k in (1, 2, 5, 50)]
        for looser, tighter in zip(bounds, [*bounds[1:], exact]):
            assert (looser < tighter + 1e-3).all()
        assert (bounds[0] < bounds[-1] - 0.1).all()
        torch.testing.assert_close(model(x, 200_000), exact, rtol=0, atol=0.02, check_dtype=False)


def test_bound_meets_the_exact_likelihood_of_a_linear_gaussian_model():
    """x = W z + noise has the density N(0, W W^T + s^2 I); with its posterior, bounds are exact."""
    torch.manual_seed(0)
    weight, s = torch.randn(4, 2), 0.5
    model, x = vae.VAE(4, 8, 1, 2, 0.0), torch.randn(6, 4)
    model.log_likelihood = lambda x, z: Normal(z @ weight.T, s).log_prob(x).sum(-1)
    exact = MultivariateNormal(torch.zeros(4), weight @ weight.T + s**2 * torch.eye(4)).log_prob(x)

    precision = torch.eye(2) + weight.T @ weight / s**2
    rotation = torch.linalg.eigh(precision).eigenvectors  # so that the posterior is diagonal
    weight = weight @ rotation
    precision = torch.eye(2) + weight.T @ weight / s**2
    mean = x @ weight / s**2 @ precision.inverse()
    log_std = (-0.5 * precision.diag().log()).expand_as(mean)

    def posterior(shift):
        model.encoder.forward = lambda x: torch.cat([mean + shift, log_std], dim=1)
        return model

    for k in (2, 50):  # every weight is p(x), for any noise
        torch.testing.assert_close(posterior(0)(x, k), exact, rtol=1e-4, atol=1e-4)
    bounds = [posterior(0.3)(x, k).mean() for k in (1, 10, 100_000)]  # an encoder that is off
    assert bounds[0] < bounds[1] < bounds[2] - 0.01
    torch.testing.assert_close(bounds[2], exact.mean(), rtol=0, atol=0.01)


@pytest.mark.parametrize("n_layer", [0, 1, 2])
def test_encoder_and_decoder_are_perceptrons_with_silu_and_dropout(n_layer):
    torch.manual_seed(0)
    model = vae.VAE(70, 80, n_layer, 30, 0.5)
    for mlp, n_in, n_out in ((model.encoder, 70, 2 * 30), (model.decoder, 30, 70)):
        sizes = [n_in, *n_layer * [80], n_out]
        layers = [*mlp.hidden, mlp.out]
        assert [(x.in_features, x.out_features) for x in layers] == [*itertools.pairwise(sizes)]
        assert not any(x.bias.any() for x in layers) and not mlp.out.weight.any()
        for layer in mlp.hidden:  # He initialization, of about the right spread
            assert 0.9 < layer.weight.std() / (2 / layer.in_features) ** 0.5 < 1.1
        nn.init.normal_(mlp.out.weight)
        nn.init.normal_(mlp.out.bias)
        parts = [part for x in mlp.hidden for part in (x, nn.SiLU(), nn.Dropout(0.5))]
        reference, x = nn.Sequential(*parts, mlp.out), torch.randn(5, n_in)
        for training in (True, False):
            torch.manual_seed(1)
            ours = mlp.train(training)(x)
            torch.manual_seed(1)
            torch.testing.assert_close(ours, reference.train(training)(x))


def test_likelihood_of_extreme_logits_is_finite():
    model = new_model(n_latent=2, n_layer=0)
    model.decoder.out.weight.data.fill_(1e3)
    x, z = torch.tensor([[0.0, 1, 0, 1, 0, 1]]).double(), torch.ones(1, 1, 2).double()
    bias = model.decoder.out.bias
    expected = -(2e3 + bias[0] + 2e3 + bias[2] + 2e3 + bias[4])  # white where it is certainly black
    torch.testing.assert_close(model.log_likelihood(x, z)[0, 0], expected)


# ---------- training ----------


@pytest.mark.parametrize(("k", "flags"), [(1, "--dropout 0.2"), (3, "--seed 5")])
def test_training_maximizes_the_bound_of_images_sampled_anew(
    k, flags, standins, tmp_path, monkeypatch, capsys
):
    """Everything logged, printed and drawn is that of torch's Adam on the same random numbers."""
    flags += f" --k {k} --max_iters 8 --eval_interval 3 --eval_k 4 --learning_rate 0.02"
    flags += " --warmup_iters 2 --batch_size 300 --n_hidden 16 --n_latent 4"
    pictures, figures, clock = [], [], itertools.count(100)
    monkeypatch.setattr(vae, "save_pictures", lambda *args: pictures.append(args))
    monkeypatch.setattr(vae, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    plot = vae.plot_run.__globals__
    monkeypatch.setattr(plot["plt"], "close", figures.append)
    args, records = run(standins, tmp_path / "new" / "out", *flags.split())
    printed = capsys.readouterr().out.splitlines()
    assert [record["iter"] for record in records] == [0, 3, 6, 8]
    assert [record["seconds"] for record in records] == [1, 2, 3, 5]  # the last with test_nll

    torch.manual_seed(args.seed)
    train_set, test_set = vae.load_data(args)
    batches = vae.minibatches(train_set, 300)
    model = vae.VAE(784, 16, args.n_layer, 4, args.dropout)
    mean_image = train_set.tensors[0].mean(0).clamp(1e-3, 1 - 1e-3)
    model.decoder.out.bias.data = (mean_image / (1 - mean_image)).log()
    first = {name: weights.clone() for name, weights in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())

    def loss_of(images, k):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            chunks = images.bernoulli().split(1000 // k)
            return -torch.cat([bound_by_torch(model.eval(), x, k) for x in chunks]).mean().item()

    for i in range(9):
        lr = 0.02 * (i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 6)) / 2)
        optimizer.param_groups[0]["lr"] = lr
        if i in (0, 3, 6, 8):
            expected = {"train_loss": (train_set.tensors[0][:400], k)}
            expected["test_loss"] = test_set.tensors[0], k
            if i == 8:
                expected["test_nll"] = test_set.tensors[0], 4
            record = {key: loss_of(*given) for key, given in expected.items()}
            record |= {"iter": i, "learning_rate": lr}
            logged = records[[0, 3, 6, 8].index(i)]
            assert logged == pytest.approx(record | {"seconds": logged["seconds"]}, rel=1e-4)
            assert "  ".join(f"{key} {value:.5g}" for key, value in logged.items()) in printed
        if i < 8:
            optimizer.zero_grad()
            (-bound_by_torch(model.train(), next(batches)[0].bernoulli(), k).mean()).backward()
            optimizer.step()
    ((trained, pictured, out_dir),) = pictures
    for name, weights in trained.state_dict().items():
        last = model.state_dict()[name]
        assert (weights - last).norm() <= 0.01 * (last - first[name]).norm(), name
    assert torch.equal(pictured.tensors[0], test_set.tensors[0]) and out_dir == args.out_dir

    assert printed[-2] == f"test NLL {records[-1]['test_nll']:.2f} nats after 5 s"
    assert printed[-1] == f"picture: {args.out_dir / 'loss.png'}"
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    for key in ("train_loss", "test_loss", "test_nll"):
        assert lines[key] == [[r["iter"], r[key]] for r in records if key in r]
    saved = json.loads((args.out_dir / "args.json").read_text())
    paths = {"data_dir": str(args.data_dir), "out_dir": str(args.out_dir)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    assert saved == vars(args) | paths | versions
    monkeypatch.undo()
    plot["plt"].close(figures[0])


def test_warm_up_is_cut_to_the_run(standins, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "OptaxOptimizer", Idle)
    monkeypatch.setattr(vae, "evaluate", lambda model, dataset, name, k: {name: 100.0})
    monkeypatch.setattr(vae, "save_pictures", lambda *args: None)
    flags = "--max_iters 4 --eval_interval 1 --learning_rate 0.01 --n_hidden 4 --batch_size 8"
    records = run(standins, tmp_path, *flags.split())[1]
    rates = [0, 1 / 300, 2 / 300, 0.01, 0]
    assert [r["learning_rate"] for r in records] == pytest.approx(rates, abs=1e-6)


def test_training_images_are_brightness_and_test_images_one_sample(standins):
    args = vae.parse_args(["--data_dir", str(standins)])
    train_set, test_set = vae.load_data(args)
    raw = [vae.MNIST(standins, train=train).data.flatten(1) / 255 for train in (True, False)]
    labels = [vae.MNIST(standins, train=train).targets for train in (True, False)]
    assert torch.equal(train_set.tensors[1], labels[0])
    assert torch.equal(test_set.tensors[1], labels[1])
    assert torch.equal(train_set.tensors[0], raw[0])
    x = test_set.tensors[0]
    assert set(x.unique().tolist()) == {0, 1}
    assert torch.equal(x, vae.load_data(args)[1].tensors[0])  # the same at every seed
    assert not x[raw[1] == 0].any() and x[raw[1] == 1].all()
    between = (raw[1] > 0.4) & (raw[1] < 0.6)
    assert abs(x[between].mean() - raw[1][between].mean()) < 0.03
    assert torch.equal(x, raw[1].bernoulli(generator=torch.Generator().manual_seed(0)))


ERRORS = [AssertionError, OSError, RuntimeError, TypeError, ValueError]
IMAGES = {
    "of another size": (torch.ones(3, 28, 27), torch.tensor([0, 5, 9])),
    "black": (torch.zeros(3, 28, 28), torch.tensor([0, 5, 9])),
    "more than labels": (torch.ones(3, 28, 28), torch.tensor([0, 9])),
    "of letters": (torch.ones(3, 28, 28), torch.tensor([0, 5, 10])),
}


@pytest.mark.parametrize("problem", [*ERRORS, *IMAGES])
def test_broken_images_are_named(problem, tmp_path, monkeypatch):
    def dataset(folder, train, download):
        assert folder == tmp_path and download
        if problem in ERRORS:
            raise problem("no digits")
        return SimpleNamespace(data=IMAGES[problem][0], targets=IMAGES[problem][1])

    monkeypatch.setattr(vae, "MNIST", dataset)
    reason = "no digits" if problem in ERRORS else "not 28 x 28 images with as many labels"
    with pytest.raises(OSError, match=f"raw/train-.*: missing or broken .*{reason}.*standins.py"):
        vae.load_data(vae.parse_args(["--data_dir", str(tmp_path)]))


def test_evaluation_is_the_mean_bound_of_all_images_without_dropout():
    torch.manual_seed(0)
    model = vae.VAE(784, 8, 1, 2, 0.5)
    nn.init.normal_(model.decoder.out.weight)
    x = torch.rand(70, 784).bernoulli()
    dataset = vae.TensorDataset(x, torch.zeros(70))
    modes = set()
    model.register_forward_pre_hook(lambda *_: modes.add((model.training, torch.is_grad_enabled())))
    measured = vae.evaluate(model, dataset, "some_loss", 400)
    assert model.training and modes == {(False, False)}
    assert measured == vae.evaluate(model, dataset, "some_loss", 400)  # the same noise
    torch.manual_seed(0)
    x.bernoulli()  # takes as many random numbers as the evaluation does
    with torch.no_grad():
        expected = -torch.cat([model.eval()(chunk, 400) for chunk in x.split(2)]).mean().item()
    assert measured == {"some_loss": pytest.approx(expected, rel=1e-6)}


def test_limits_of_numbers_are_inclusive():
    check_number(vae.number)


# ---------- pictures ----------


def test_pictures_show_samples_of_the_prior_and_the_plane_of_the_two_latents_in_use(tmp_path):
    torch.manual_seed(0)
    model = vae.VAE(784, 8, 1, 5, 0.5)
    nn.init.normal_(model.decoder.out.weight)
    with torch.no_grad():  # latents 3 and 1 depend on the image, the others are as in the prior
        model.encoder.out.weight[3] = 2 * torch.randn(8)
        model.encoder.out.weight[1] = torch.randn(8)
        model.encoder.out.bias[5 + 4] = 0.1  # and this one says as much about every image
    x = torch.rand(50, 784)
    modes = set()
    hook = lambda part, _: modes.add((part.training, torch.is_grad_enabled()))  # noqa: E731
    model.decoder.register_forward_pre_hook(hook)
    torch.manual_seed(1)
    vae.save_pictures(model, vae.TensorDataset(x, torch.zeros(50)), tmp_path)
    assert model.training and modes == {(False, False)}
    torch.manual_seed(1)
    samples = torch.randn(10, 10, 5)
    quantiles = Normal(0, 1).icdf(torch.linspace(0.025, 0.975, 12))
    plane = torch.zeros(12, 12, 5)
    plane[..., 3], plane[..., 1] = quantiles[:, None], quantiles  # down and across
    model.eval()
    for name, z in (("samples.png", samples), ("plane.png", plane)):
        picture = read_image(str(tmp_path / name))
        n = len(z)
        assert picture.shape == (1, 30 * n + 2, 30 * n + 2)
        tiles = picture[0, 2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30).flatten(2)
        expected = 255 * model.decoder(z).sigmoid()
        torch.testing.assert_close(tiles.float(), expected.floor(), rtol=0, atol=1)


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--max_iters 1500 --eval_interval 1500 --eval_k 20".split()
    final = run(real_data, tmp_path, *flags)[1][-1]
    assert 84 < final["test_nll"] < 105
