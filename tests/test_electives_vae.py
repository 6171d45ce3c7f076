"""Elective vae: the bounds are bounds, the gradients right, and training maximizes them."""

import json
import math

import pytest
import torch
import torch.nn as nn
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
    mean, log_std = model.encoder(x).split(3, dim=1)
    torch.manual_seed(1)
    z = mean + log_std.exp() * torch.randn(k, 5, 3)
    q, p = Normal(mean, log_std.exp()), Normal(torch.zeros(3), torch.ones(3))
    likelihood = Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_likelihood(x, z), likelihood)
    if k == 1:
        expected = likelihood[0] - kl_divergence(q, p).sum(-1)
    else:
        weights = likelihood + (p.log_prob(z) - q.log_prob(z)).sum(-1)
        expected = weights.exp().mean(0).log()
    torch.testing.assert_close(ours, expected, check_dtype=False)


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


def test_encoder_and_decoder_are_perceptrons_with_silu():
    model, x = new_model(n_layer=2), torch.randn(5, 6).double()
    layers = [nn.Sequential(layer, nn.SiLU()) for layer in model.encoder.hidden]
    torch.testing.assert_close(model.encoder(x), nn.Sequential(*layers, model.encoder.out)(x))
    assert model.decoder(torch.randn(5, 3).double()).shape == (5, 6)


def test_likelihood_of_extreme_logits_is_finite():
    model = new_model(n_latent=2, n_layer=0)
    model.decoder.out.weight.data.fill_(1e3)
    x, z = torch.tensor([[0.0, 1, 0, 1, 0, 1]]).double(), torch.ones(1, 1, 2).double()
    bias = model.decoder.out.bias
    expected = -(2e3 + bias[0] + 2e3 + bias[2] + 2e3 + bias[4])  # white where it is certainly black
    torch.testing.assert_close(model.log_likelihood(x, z)[0, 0], expected)


# ---------- training ----------


@pytest.mark.parametrize("k", [1, 3])
def test_training_maximizes_the_bound_of_images_sampled_anew(k, standins, tmp_path):
    flags = f"--k {k} --max_iters 42 --eval_interval 21 --learning_rate 0.02 --eval_k 4"
    flags += " --batch_size 32 --n_hidden 16 --n_latent 4 --warmup_iters 2"
    args, records = run(standins, tmp_path, *flags.split())
    torch.manual_seed(args.seed)
    train_set, test_set = vae.load_data(args)
    batches = vae.minibatches(train_set, 32)
    model = vae.VAE(784, 16, 2, 4, 0.0)
    mean_image = train_set.tensors[0].mean(0).clamp(1e-3, 1 - 1e-3)
    model.decoder.out.bias.data = (mean_image / (1 - mean_image)).log()
    start = Bernoulli(mean_image).log_prob(test_set.tensors[0]).sum(1).mean().item()
    assert records[0]["test_loss"] == pytest.approx(-start, rel=1e-4)  # whatever z is
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    for i in range(42):
        factor = i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 40)) / 2
        optimizer.param_groups[0]["lr"] = factor * args.learning_rate
        x = next(batches)[0].bernoulli()
        optimizer.zero_grad()
        (-model(x, k).mean()).backward()
        optimizer.step()
    train_set = vae.TensorDataset(*train_set[: len(test_set)])
    for key, dataset, k_eval in (
        ("train_loss", train_set, k),
        ("test_loss", test_set, k),
        ("test_nll", test_set, 4),
    ):
        expected = vae.evaluate(model, dataset, key, k_eval)[key]
        assert records[-1][key] == pytest.approx(expected, rel=1e-4)
    assert records[-1]["train_loss"] < 0.99 * records[0]["train_loss"]
    assert all("test_nll" not in record for record in records[:-1])


def test_evaluation_leaves_training_as_it_is(standins, tmp_path):
    flags = "--max_iters 4 --eval_k 2 --batch_size 32 --n_hidden 16".split()
    often = run(standins, tmp_path / "often", *flags, "--eval_interval", "1")[1][-1]
    once = run(standins, tmp_path / "once", *flags, "--eval_interval", "4")[1][-1]
    assert {**often, "seconds": 0} == {**once, "seconds": 0}


def test_training_images_are_brightness_and_test_images_one_sample(standins):
    args = vae.parse_args(["--data_dir", str(standins)])
    train_set, test_set = vae.load_data(args)
    raw = [vae.MNIST(standins, train=train).data.flatten(1) / 255 for train in (True, False)]
    assert torch.equal(train_set.tensors[0], raw[0])
    x = test_set.tensors[0]
    assert set(x.unique().tolist()) == {0, 1}
    assert torch.equal(x, vae.load_data(args)[1].tensors[0])  # the same at every seed
    assert not x[raw[1] == 0].any() and x[raw[1] == 1].all()
    between = (raw[1] > 0.4) & (raw[1] < 0.6)
    assert abs(x[between].mean() - raw[1][between].mean()) < 0.03


def test_evaluation_is_the_mean_bound_of_all_images_without_dropout():
    torch.manual_seed(0)
    model = vae.VAE(784, 8, 1, 2, 0.5)
    nn.init.normal_(model.decoder.out.weight)
    x = torch.rand(70, 784).bernoulli()
    dataset = vae.TensorDataset(x, torch.zeros(70))
    measured = vae.evaluate(model, dataset, "some_loss", 400)
    assert model.training
    assert measured == vae.evaluate(model, dataset, "some_loss", 400)  # the same noise
    torch.manual_seed(0)
    x.bernoulli()  # takes as many random numbers as the evaluation does
    with torch.no_grad():
        expected = -torch.cat([model.eval()(chunk, 400) for chunk in x.split(2)]).mean().item()
    assert measured == {"some_loss": pytest.approx(expected, rel=1e-6)}


# ---------- pictures ----------


def test_pictures_show_samples_of_the_prior_and_the_plane_of_the_two_latents_in_use(tmp_path):
    model = vae.VAE(784, 8, 0, 5, 0.0)
    with torch.no_grad():  # latents 1 and 3 depend on the image; the decoder draws a row for each
        model.encoder.out.weight[1, 0] = 3
        model.encoder.out.weight[3, 1] = 2
        for latent in range(5):
            model.decoder.out.weight[28 * latent : 28 * latent + 28, latent] = 5
    x = torch.rand(50, 784)
    vae.save_pictures(model, vae.TensorDataset(x, torch.zeros(50)), tmp_path)
    samples = read_image(str(tmp_path / "samples.png"))
    assert samples.shape == (1, 10 * 30 + 2, 10 * 30 + 2)
    rows = samples[0, 2:7, 2:].float()  # the top five rows of pixels of the first ten samples
    assert (rows.view(5, 10, 30)[:, :, 5].std(dim=1) > 30).all()  # every latent varies
    plane = read_image(str(tmp_path / "plane.png"))
    assert plane.shape == (1, 12 * 30 + 2, 12 * 30 + 2)
    tiles = plane[0, 2:].view(12, 30, -1)[:, :5, 5::30].float()  # (row, latent, column)
    down, across = tiles.std(dim=0).mean(dim=1), tiles.std(dim=2).mean(dim=0)
    assert (down > 30).tolist() == [False, True, False, False, False]
    assert (across > 30).tolist() == [False, False, False, True, False]
    assert model.training


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--max_iters 1500 --eval_interval 1500 --eval_k 20".split()
    final = run(real_data, tmp_path, *flags)[1][-1]
    assert 84 < final["test_nll"] < 105
