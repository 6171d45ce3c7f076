"""Elective scaling_laws: the fits find planted laws, and the prediction comes before the run."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import load_step
from torch.utils.flop_counter import FlopCounterMode

scaling = load_step("electives/scaling_laws")
TINY = "--max_iters 64 --batch_size 4 --n_seeds 1 --growth 1".split()


def args_of(data_dir, out_dir, *flags):
    return scaling.parse_args(["--data_dir", str(data_dir), "--out_dir", str(out_dir), *flags])


def small_task(args):
    """Return training, validation and test set of a few images."""
    train_set, test_set = scaling.load_data(args)
    cut = [train_set[:60], train_set[60:100], test_set[:50]]
    return [scaling.TensorDataset(x, y) for x, y in cut]


# ---------- data ----------


def test_images_are_those_of_step_09_at_half_the_resolution(standins):
    args = args_of(standins, "out")
    full_sets = [dataset.tensors for dataset in load_step("09").load_data(args)]
    half_sets = [dataset.tensors for dataset in scaling.load_data(args)]
    for (x, y), (full, labels) in zip(half_sets, full_sets):
        coarse = full.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        assert x.shape == (len(y), 1, 14, 14)
        assert torch.equal(y, labels)
        assert np.corrcoef(x.flatten(), coarse.flatten())[0, 1] > 0.99999
    x, _ = half_sets[0]
    assert x.mean().abs() < 1e-4 and (x.std() - 1).abs() < 1e-4


def test_augment_without_angle_and_distortion_is_the_identity():
    x = torch.randn(3, 1, 14, 14)
    torch.testing.assert_close(scaling.augment(x, 0, 0), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("drawn", "quarter_turns"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_augment_rotates_up_to_the_angle_each_way(drawn, quarter_turns, monkeypatch):
    x = torch.randn(3, 1, 14, 14)
    monkeypatch.setattr(torch, "rand", lambda n: torch.full((n,), drawn))
    turned_back = torch.rot90(scaling.augment(x, 90, 0), -quarter_turns, (2, 3))
    torch.testing.assert_close(turned_back, x, atol=1e-4, rtol=0)


def test_augment_moves_points_by_pixels_and_continues_the_border(monkeypatch):
    x = torch.randn(2, 1, 14, 14)

    def randn(*shape):  # every point reads two standard deviations to its right, half one above
        assert shape == (2, 2, 4, 4)
        return torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(shape)

    monkeypatch.setattr(torch, "randn", randn)
    moved = scaling.augment(x, 0, 1.0)
    torch.testing.assert_close(moved[:, :, 1:, :-2], x[:, :, :-1, 2:], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[:, :, 0, :-2], x[:, :, 0, 2:], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[:, :, 1:, -1], x[:, :, :-1, -1], atol=1e-4, rtol=0)


def test_augment_treats_every_image_in_its_own_way_and_smoothly():
    torch.manual_seed(0)
    ramp = torch.arange(14.0).expand(400, 1, 14, 14)  # its value is where it is read
    moved = scaling.augment(ramp, 0, 0.3)[:, 0, 4:10, 4:10]
    offset = moved - torch.arange(4.0, 10.0)
    assert len(offset.flatten(1).unique(dim=0)) == 400
    assert 0.15 < offset.std() < 0.35  # interpolated between points of standard deviation 0.3
    assert offset.mean().abs() < 0.02
    assert (offset[:, :, 1:] - offset[:, :, :-1]).std() < 0.2
    turned = scaling.augment(ramp, 30, 0)[:, 0, 6:8, 6:8]
    assert len(turned.flatten(1).unique(dim=0)) == 400


def test_distort_keeps_labels_shape_and_order(standins):
    args = args_of(standins, "out")
    x, y = scaling.load_data(args)[1].tensors
    dataset = scaling.TensorDataset(x[:30], y[:30])
    new_x, new_y = scaling.distort(dataset, args).tensors
    assert torch.equal(new_y, y[:30])
    assert new_x.shape == (30, 1, 14, 14)
    assert not torch.equal(new_x, x[:30])
    pairs = np.corrcoef(new_x.flatten(1), x[:30].flatten(1))[:30, 30:]
    assert np.diag(pairs).mean() > 0.6 > 0.5 > pairs.mean()


# ---------- model ----------


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_width_sets_parameters_and_flops(width):
    model, x = scaling.ConvNet(width, 10, 0), torch.randn(1, 1, 14, 14)
    expected = 194 * width**2 + 116 * width + 10
    assert sum(p.numel() for p in model.parameters()) == expected == scaling.count_params(width)
    with FlopCounterMode(display=False) as forward:
        loss = model(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    forward, backward = forward.get_total_flops(), backward.get_total_flops()
    assert scaling.count_flops(width) == 3 * forward
    no_gradient = 2 * 25 * width * 14 * 14  # of the images: Kaplan's count has it, torch saves it
    assert backward == 2 * forward - no_gradient


def test_network_is_that_of_torchs_layers():
    torch.manual_seed(0)
    model, x = scaling.ConvNet(3, 10, 0.4), torch.randn(5, 1, 14, 14)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    conv_1, conv_2, hidden, out = model.conv_1, model.conv_2, model.hidden, model.out
    reference = torch.nn.Sequential(
        *(conv_1, torch.nn.ReLU(), torch.nn.MaxPool2d(2), conv_2, torch.nn.ReLU()),
        *(torch.nn.MaxPool2d(2), torch.nn.Flatten(), hidden, torch.nn.ReLU(), out),
    )
    torch.testing.assert_close(model.eval()(x), reference(x))
    assert model.dropout.p == 0.4
    assert not torch.allclose(model.train()(x), reference(x))
    fresh = scaling.ConvNet(16, 10, 0)
    for layer, fan_in in ((fresh.conv_2, 25 * 16), (fresh.hidden, 9 * 32)):
        assert layer.weight.var().item() == pytest.approx(2 / fan_in, rel=0.1)
    assert not fresh.out.weight.any()


# ---------- optimizer ----------


def test_average_weighs_update_t_by_a_polynomial_of_degree_8():
    values = torch.randn(20, dtype=torch.float64)
    model = torch.nn.Linear(1, 1, bias=False).double()
    averaged = scaling.AveragedModel(model, avg_fn=scaling.average)
    for value in values:
        model.weight.data.fill_(value)
        averaged.update_parameters(model)
    weights = torch.tensor([math.comb(t + 8, 8) for t in range(20)], dtype=torch.float64)
    expected = (weights * values).sum() / weights.sum()
    assert averaged.module.weight.item() == pytest.approx(expected.item())


# ---------- fits ----------


def test_fit_recovers_a_planted_law():
    law = scaling.PowerLaw([(x, 7.5 * x**-0.43) for x in (10, 30, 50, 1000, 20000)])
    assert law.exponent == pytest.approx(-0.43)
    assert law.scale == pytest.approx(7.5)
    assert law.interval() == pytest.approx([-0.43, -0.43])
    assert law(1e6) == pytest.approx(7.5 * 1e6**-0.43)


def test_fit_is_least_squares_on_logs():
    points = [(1, 2.0), (math.e, 1.0), (math.e**3, 3.0), (math.e**3, 0.5)]
    x, y = torch.log(torch.tensor(points)).T
    slope = ((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum()
    law = scaling.PowerLaw(points)
    assert law.exponent == pytest.approx(slope.item(), rel=1e-5)
    assert law.scale == pytest.approx((y.mean() - slope * x.mean()).exp().item(), rel=1e-5)


def test_fit_recovers_a_planted_irreducible_loss():
    x = np.array([10, 100, 1000, 40**2.5])  # at the last one, half of the loss is irreducible
    law = scaling.PowerLaw(list(zip(x, 0.05 + 2 * x**-0.4)), has_floor=True)
    assert (law.floor, law.exponent, law.scale) == pytest.approx((0.05, -0.4, 2))
    assert law(1e9) == pytest.approx(0.05 + 2 * 1e9**-0.4)
    assert law.interval()[0] == pytest.approx(-0.4, abs=0.01)  # fitted with a floor as well
    straight = scaling.PowerLaw(law.points)
    assert straight.floor == 0 and straight.exponent > -0.35 and straight(1e9) < 0.01
    straight = scaling.PowerLaw(list(zip(x, 2 * x**-0.4)), has_floor=True)
    assert (straight.floor, straight.exponent) == pytest.approx((0, -0.4))


def test_the_floor_is_the_one_with_the_least_squared_error_of_log_losses():
    rng = np.random.default_rng(3)
    x = 2.0 ** np.arange(9)
    y = (0.2 + x**-0.5) * np.exp(0.05 * rng.standard_normal(9))
    law = scaling.PowerLaw(list(zip(x, y)), has_floor=True)
    errors = []
    for floor in y.min() * np.arange(100) / 100:
        slope, intercept = np.polyfit(np.log(x), np.log(y - floor), 1)
        errors.append(sum((np.log(floor + math.exp(intercept) * x**slope) - np.log(y)) ** 2))
    assert 0 < np.argmin(errors) < 99
    assert law.floor == pytest.approx(y.min() * np.argmin(errors) / 100)


def test_intervals_cover_the_planted_exponent():
    rng = np.random.default_rng(1)
    x = np.repeat(2.0 ** np.arange(7), 2)
    covered = 0
    for noise in (0.02, 0.2):
        spans = []
        for _ in range(15):
            y = 3 * x**-0.57 * np.exp(noise * rng.standard_normal(14))
            law = scaling.PowerLaw(list(zip(x, y)))
            low, high = law.interval()
            assert low < law.exponent < high
            spans.append(high - low)
            covered += low < -0.57 < high
        # Least squares: noise over the root of the sum of squares of log x about its mean.
        expected = 2 * 1.96 * noise / (14 * np.log(x).var()) ** 0.5
        assert 0.7 * expected < np.mean(spans) < 1.3 * expected
    assert 25 <= covered <= 30
    assert law.interval() == pytest.approx([low, high], abs=0)  # the same samples every time


def test_no_line_goes_through_one_x():
    assert scaling.PowerLaw([(1, 1), (4, 2)]).interval() == pytest.approx([0.5, 0.5])


def planted_curves(loss, budgets):
    """Return curves of networks whose losses are loss(C, N) at the budgets C."""
    return [
        [{"flops": c, "n_params": n, "test_loss": loss(c, n)} for c in budgets]
        for n in (1000, 2000, 3500, 5500, 7500, 13000)
    ]


def test_best_size_is_the_minimum_of_a_parabola():
    def loss(c, n):
        return c**-0.1 * math.exp(0.2 * (math.log(n) - 0.5 * math.log(c)) ** 2)

    budgets = 2.0 ** (np.arange(38, 57) / 2)  # the best N at the largest one is 16384
    points = scaling.compute_optimal(planted_curves(loss, budgets))
    inside = [c for c in budgets[:-10:-1] if 1000 < c**0.5 < 13000]
    assert [c for c, _, _ in points] == pytest.approx(inside) and len(inside) == 7
    for c, n, best in points:
        assert n == pytest.approx(c**0.5, rel=0.005)
        assert best == pytest.approx(c**-0.1, rel=1e-4)


def test_losses_between_evaluations_are_interpolated_on_log_axes():
    def loss(c, n):  # a power law of C, for each N
        return c**-0.1 * math.exp(0.2 * (math.log(n) - 8.5) ** 2)

    points = scaling.compute_optimal(planted_curves(loss, [1e9, 4e11, 1e12]))
    assert [c for c, _, _ in points] == pytest.approx(1e12 * 2 ** (-np.arange(9) / 2))
    for c, n, best in points:
        assert (n, best) == pytest.approx((math.exp(8.5), c**-0.1), rel=0.005)


def test_only_networks_that_were_trained_with_a_budget_count_there():
    def loss(c, n):
        return math.exp((math.log(n) - 8.2) ** 2)

    curves = planted_curves(loss, [2.0**19.9, 2.0**24])
    for i, c in ((2, 2.0**20.7), (3, 2.0**23.3)):
        curves[i] = [{"flops": c, "n_params": 3000, "test_loss": 1e-9}]
    points = scaling.compute_optimal(curves)
    assert len(points) == 9
    for _, n, best in points:
        assert (n, best) == pytest.approx((math.exp(8.2), 1), rel=0.005)


def test_budgets_that_the_widths_do_not_bracket_count_only_in_need():
    def falling(c, n):
        return c**-0.1 * n**-0.2

    curves = planted_curves(falling, [2.0**20, 2.0**21])
    assert [n for _, n, _ in scaling.compute_optimal(curves)] == pytest.approx(3 * [13000])
    assert not scaling.compute_optimal(curves[:2])  # two points make no parabola
    few = [curve[:1] for curve in curves[:4]] + curves[4:]
    assert [c for c, _, _ in scaling.compute_optimal(few)] == pytest.approx([2.0**20])


def test_best_size_of_a_sum_of_power_laws():
    """L = N**-a + T**-b at C = N T has the best N ~ C**(b / (a + b)) (Hoffmann et al. 2022)."""

    def loss(c, n):
        return n**-0.4 + (c / n) ** -0.4

    points = scaling.compute_optimal(planted_curves(loss, 2.0 ** (np.arange(36, 51) / 2)))
    for c, n, best in points:
        assert best == pytest.approx(2 * c**-0.2, rel=0.02)
        assert n == pytest.approx(c**0.5, rel=0.1)
    law = scaling.PowerLaw([(c, n) for c, n, _ in points])
    assert law.exponent == pytest.approx(0.5, abs=0.05)


# ---------- training ----------


def test_early_stopping_takes_the_lowest_validation_loss():
    curve = [{"val_loss": v, "test_loss": t} for v, t in [(3, 1), (1, 3), (2, 0.5), (1, 2)]]
    assert scaling.stop_early(curve) == {"val_loss": 1, "test_loss": 3}


@pytest.fixture
def scripted(standins, monkeypatch):
    """A function that trains on n_images with these validation losses, and returns the curve."""

    def train(n_images, val_losses):
        args = args_of(standins, "out", *TINY)
        losses = iter(val_losses)

        def evaluate(model, dataset, name):
            loss = next(losses) if name == "val" else 1 + len(dataset)
            return {f"{name}_loss": loss, f"{name}_accuracy": 0.5}

        monkeypatch.setattr(scaling, "evaluate", evaluate)
        return scaling.train_network(args, small_task(args), 2, n_images, 64, 0)

    return train


def test_training_stops_after_two_evaluations_without_a_new_lowest(scripted):
    losses = [9, 8, 8.5, 7, 7.2, 7.1, 0, 0, 0, 0, 0]
    curve = scripted(20, losses)
    assert [record["val_loss"] for record in curve] == losses[:6]
    assert scaling.stop_early(curve) is curve[3]
    assert all(record["test_loss"] == 51 for record in curve)
    assert len(scripted(0, losses)) == 11  # ample data: all of max_iters
    assert len(scripted(20, range(11, 0, -1))) == 11


def test_evaluations_are_even_on_a_log_axis_and_count_compute(scripted):
    curve = scripted(0, 11 * [1])
    iters = [record["iter"] for record in curve]
    assert iters == [2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    for record in curve:
        assert record["flops"] == scaling.count_flops(2) * 4 * record["iter"]
        assert record["n_params"] == scaling.count_params(2)


def test_a_loss_that_is_not_finite_ends_the_run(scripted):
    with pytest.raises(FloatingPointError, match=r"iteration 2: lower --learning_rate 0\.0"):
        scripted(0, [math.nan])


@pytest.mark.parametrize("n_images", [0, 20])
def test_training_is_that_of_a_textbook(n_images, standins):
    """Adam's equations and the mean of all parameters, on the same random numbers."""
    flags = [*TINY, "--warmup_iters", "20", "--dropout", "0.3", "--angle", "20"]
    args = args_of(standins, "out", *flags, "--distortion", "0.4")
    datasets = small_task(args)
    curve = scaling.train_network(args, datasets, 3, n_images, 64, 5)

    torch.manual_seed(5)
    train_set = datasets[0]
    if n_images:
        x, y = train_set[torch.randperm(60)[:20]]
        train_set = scaling.TensorDataset(scaling.augment(x, 20, 0.4), y)
    batches = scaling.minibatches(train_set, 4)
    model = scaling.ConvNet(3, 10, 0.3)
    params = list(model.parameters())
    m, v, mean = ([torch.zeros_like(p) for p in params] for _ in range(3))
    for t in range(1, curve[-1]["iter"] + 1):
        x, y = next(batches)
        if not n_images:
            x = scaling.augment(x, 20, 0.4)
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        lr = 0.03 / 3**0.5 * (t / 20 if t < 20 else (20 / t) ** 0.5)
        for i, grad in enumerate(grads):
            m[i] = 0.9 * m[i] + 0.1 * grad
            v[i] = 0.999 * v[i] + 0.001 * grad**2
            update = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            params[i].data -= lr * update
            mean[i] = mean[i] + (params[i].detach() - mean[i]) * 9 / (t + 8)
        if t in (8, curve[-1]["iter"]):
            reference = copy.deepcopy(model).eval()
            for param, value in zip(reference.parameters(), mean):
                param.data = value.clone()
            (record,) = (record for record in curve if record["iter"] == t)
            for name, (x, y) in zip(("val", "test"), (d.tensors for d in datasets[1:])):
                loss = F.cross_entropy(reference(x), y).item()
                assert record[f"{name}_loss"] == pytest.approx(loss, rel=1e-3)
    assert curve[-1]["iter"] == 64 or n_images


def test_test_images_have_no_part_in_training_or_early_stopping(standins):
    args = args_of(standins, "out", *TINY)
    train_set, val_set, test_set = small_task(args)
    other = scaling.TensorDataset(-test_set.tensors[0], test_set.tensors[1])
    for n_images in (0, 20):
        a = scaling.train_network(args, (train_set, val_set, test_set), 2, n_images, 64, 0)
        b = scaling.train_network(args, (train_set, val_set, other), 2, n_images, 64, 0)
        assert [r["val_loss"] for r in a] == [r["val_loss"] for r in b]
        assert [r["test_loss"] for r in a] != [r["test_loss"] for r in b]


def test_mean_curve_is_geometric_over_the_seeds():
    curves = [[{"iter": i, "test_loss": a * i} for i in (1, 2)] for a in (2.0, 4.0, 8.0)]
    mean = scaling.mean_curve(curves)
    assert [record["iter"] for record in mean] == [1, 2]
    assert [record["test_loss"] for record in mean] == pytest.approx([4, 8])


# ---------- the study ----------


def planted(width, iter_num):
    """Return the loss of networks that obey L = N**-0.75 + T**-0.5, T: updates."""
    return 20 * (194 * width**2 + 116 * width + 10) ** -0.75 + 2 * iter_num**-0.5


@pytest.fixture
def study(standins, tmp_path, monkeypatch):
    """A function that runs the study on planted losses; it returns its result and the runs."""
    out_dir, pictures = tmp_path / "out", []
    monkeypatch.setattr(scaling, "plot_run", lambda out_dir: pictures.append(out_dir))
    monkeypatch.setattr(scaling, "save_fits", lambda *drawn: pictures.append(drawn))

    def run(*flags, fail_at=None, surprise=1.0):
        calls = []

        def train_network(args, datasets, width, n_images, max_iters, seed):
            if len(calls) == fail_at:
                raise KeyboardInterrupt
            predicted = (out_dir / "prediction.json").exists()
            calls.append((width, n_images, max_iters, seed, predicted))
            curve = []
            for iter_num in sorted({round(max_iters / 2 ** (k / 2)) for k in range(11)}):
                loss = planted(width, iter_num)
                if n_images:  # overfits after 530 updates
                    loss = n_images**-0.5 * (1 + abs(math.log(iter_num / 530)))
                elif width not in scaling.WIDTHS or max_iters > args.max_iters:
                    loss = surprise * loss
                record = {"iter": iter_num, "n_params": scaling.count_params(width)}
                record["flops"] = scaling.count_flops(width) * args.batch_size * iter_num
                loss *= 1.02 ** (seed - 1337)
                curve.append(record | {"val_loss": loss, "test_loss": 3 * loss})
            return curve

        monkeypatch.setattr(scaling, "train_network", train_network)
        return scaling.train(args_of(standins, out_dir, *flags)), calls

    run.out_dir, run.pictures = out_dir, pictures
    return run


def test_the_study_finds_planted_laws_and_predicts_before_it_runs(study, capsys):
    final, calls = study("--n_seeds", "3")
    seeds = (1337, 1338, 1339)
    most = 6000 * 32 * scaling.count_flops(6)
    small = [(w, 0, 6000, s) for s in seeds for w in (2, 3, 4, 5, 6)]
    small += [(w, 0, most // (32 * scaling.count_flops(w)), s) for s in seeds for w in (8, 12, 16)]
    small += [(scaling.AMPLE_WIDTH, n, 6000, s) for s in seeds for n in scaling.N_IMAGES]
    assert sorted(call[:4] for call in calls[:-3]) == sorted(small)
    assert not any(predicted for *_, predicted in calls[:-3])
    assert all(predicted for *_, predicted in calls[-3:])
    width, _, n_updates, *_ = calls[-1]
    assert [call[:4] for call in calls[-3:]] == [(width, 0, n_updates, s) for s in seeds]

    assert final["L(D)"] == pytest.approx(-0.5, abs=0.001)
    x = np.log([scaling.count_params(w) for w in (2, 3, 4, 5, 6)])
    y = np.log([planted(w, 6000) for w in (2, 3, 4, 5, 6)])
    assert final["L(N)"] == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-6)
    assert final["N(C)"] == pytest.approx(0.5 / 1.25, abs=0.1)
    assert final["L(C)"] == pytest.approx(-0.75 * 0.5 / 1.25, abs=0.05)
    assert final["irreducible_loss"] < 0.2 * final["measured_loss"]  # none is planted

    # The largest run takes the budget that --growth says, and a network of the best size.
    prediction = json.loads((study.out_dir / "prediction.json").read_text())
    assert prediction.items() <= final.items() and "measured_loss" not in prediction
    assert width == final["width"]
    budget = 3 * most
    assert final["flops"] == budget
    assert scaling.count_flops(width) * 32 * n_updates == pytest.approx(budget, rel=0.001)
    losses = [planted(w, budget / scaling.count_flops(w) / 32) for w in range(1, 40)]
    assert abs(width - 1 - np.argmin(losses)) <= 3
    assert final["measured_loss"] == pytest.approx(3 * 1.02 * planted(width, n_updates))
    assert final["predicted_loss"] == pytest.approx(final["measured_loss"], rel=0.03)
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[0] for line in lines]
    assert starts.index("prediction") < starts.index("measured:")
    assert f"{final['predicted_loss']:.4f}" in lines[starts.index("prediction")]
    error = final["measured_loss"] / final["predicted_loss"] - 1
    measured = f"measured: {final['measured_loss']:.4f}, {error:+.1%} "
    assert lines[starts.index("measured:")].startswith(measured)
    for name in ("L(N)", "L(D)", "L(C)", "N(C)"):
        assert any(line.startswith(f"{name}: exponent {final[name]:.3f}, 95%") for line in lines)
    assert f"irreducible loss: {final['irreducible_loss']:.4f}" in lines


def test_the_network_of_a_budget_is_the_one_nearest_to_the_best_size(study):
    final, calls = study("--n_seeds", "1")
    curves = []
    for width, _, n_updates, *_ in calls[:8]:
        iters = [round(n_updates / 2 ** (k / 2)) for k in range(10, -1, -1)]
        point = {"n_params": scaling.count_params(width)}
        flops = scaling.count_flops(width) * 32
        curves.append(
            [point | {"flops": flops * t, "test_loss": 3 * planted(width, t)} for t in iters]
        )
    points = scaling.compute_optimal(curves)
    n = scaling.PowerLaw([(c, n) for c, n, _ in points])(final["flops"])
    law = scaling.PowerLaw([(c, loss) for c, _, loss in points], has_floor=True)
    distances = [abs(math.log(scaling.count_params(w) / n)) for w in range(1, 60)]
    assert final["width"] == 1 + np.argmin(distances)
    assert final["predicted_loss"] == pytest.approx(law(final["flops"]))
    assert final["L(C)"] == pytest.approx(law.exponent)
    assert final["irreducible_loss"] == pytest.approx(law.floor)


def test_the_prediction_does_not_know_the_largest_run(study):
    honest, _ = study("--n_seeds", "1")
    for path in study.out_dir.glob("runs/*.json"):
        path.unlink()
    surprised, _ = study("--n_seeds", "1", surprise=7.0)
    assert surprised["measured_loss"] == pytest.approx(7 * honest["measured_loss"])
    assert surprised["predicted_loss"] == honest["predicted_loss"]
    assert surprised["width"] == honest["width"]


def test_growth_is_the_largest_budget_over_the_others(study):
    first, _ = study("--n_seeds", "1")
    second, calls = study("--n_seeds", "1", "--growth", "16")
    assert second["flops"] == pytest.approx(16 / 3 * first["flops"])
    assert len(calls) == 1  # only the largest: the other runs are read


def test_an_interrupted_study_goes_on_as_if_unbroken(study):
    expected, all_calls = study("--n_seeds", "1")
    logged = (study.out_dir / "metrics.jsonl").read_text()
    for path in study.out_dir.glob("runs/*.json"):
        path.unlink()
    for n in (3, 0, 7):
        with pytest.raises(KeyboardInterrupt):
            study("--n_seeds", "1", fail_at=n)
    (study.out_dir / "runs" / "w2_d0_i6000_s1337.tmp").write_text('{"settings": {')
    final, calls = study("--n_seeds", "1")
    assert [call[:4] for call in calls] == [call[:4] for call in all_calls[10:]]
    assert {**final, "seconds": 0} == {**expected, "seconds": 0}
    again = (study.out_dir / "metrics.jsonl").read_text()
    for one, other in zip(again.splitlines(), logged.splitlines(), strict=True):
        assert {**json.loads(one), "seconds": 0} == {**json.loads(other), "seconds": 0}
    assert study("--n_seeds", "1")[1] == []


@pytest.mark.parametrize("n_images", [0, 20])
def test_a_run_depends_on_its_own_seed_alone(n_images, standins):
    """So a resumed study repeats a run, whatever it trained or read before that."""
    args = args_of(standins, "out", *TINY)
    datasets = small_task(args)
    curves = []
    for state, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(state)
        curves.append(scaling.train_network(args, datasets, 2, n_images, 64, seed))
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize(
    "flag",
    "--angle=3 --distortion=1 --batch_size=64 --dropout=0.1 --learning_rate=0.1"
    " --warmup_iters=7 --seed=3".split(),
)
def test_runs_of_other_settings_are_not_reused(flag, tmp_path, monkeypatch):
    seen = []

    def train_network(args, datasets, *point):
        seen.append(point)
        return [{"iter": 1, "val_loss": 2.0, "test_loss": float(len(seen))}]

    monkeypatch.setattr(scaling, "train_network", train_network)

    def run(*flags, point=(2, 0, 64, 5)):
        return scaling.run_once(args_of("data", tmp_path, *flags), None, *point)[0]["test_loss"]

    assert [run(), run(), run("--growth=3", "--n_seeds=1", "--max_iters=100")] == [1, 1, 1]
    assert [run(flag), run(flag), run()] == [2, 2, 3]  # one file per point
    points = [(3, 0, 64, 5), (2, 9, 64, 5), (2, 0, 65, 5), (2, 0, 64, 6)]
    assert [run(point=point) for point in points] == [4, 5, 6, 7]
    assert [run(point=point) for point in points] == [4, 5, 6, 7]
    assert seen[3:] == points


def test_more_seeds_run_only_the_new_ones(study):
    study("--n_seeds", "1")
    _, calls = study("--n_seeds", "2")
    n = len(scaling.WIDTHS) + len(scaling.N_IMAGES)
    assert {call[3] for call in calls[:n]} == {1338}


def test_a_run_is_written_whole_or_not_at_all(standins, tmp_path, monkeypatch):
    args = args_of(standins, tmp_path, *TINY)
    curve = [{"iter": 1, "val_loss": 2.0, "test_loss": 1.0}]
    monkeypatch.setattr(scaling, "train_network", lambda *args: curve)
    real = scaling.Path.replace

    def killed(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        scaling.run_once(args, None, 2, 0, 64, 5)
    assert not list(tmp_path.glob("runs/*.json"))
    monkeypatch.setattr(scaling.Path, "replace", real)
    assert scaling.run_once(args, None, 2, 0, 64, 5) == curve
    assert [path.name for path in tmp_path.glob("runs/*")] == ["w2_d0_i64_s5.json"]


def test_quick_is_one_seed_and_1024_updates(study):
    _, calls = study("--quick")
    assert {call[3] for call in calls} == {1337}
    assert {call[2] for call in calls[:-1] if call[0] in (2, 6)} == {1024}
    assert max(call[2] for call in calls[:-1]) == 1024


def test_datasets_are_distorted_digits_without_a_common_image(standins, tmp_path, monkeypatch):
    seen = []

    def run_once(args, datasets, *point):
        seen.append(datasets)
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "run_once", run_once)
    args = args_of(standins, tmp_path, "--angle", "0", "--distortion", "0")
    with pytest.raises(KeyboardInterrupt):
        scaling.train(args)
    with pytest.raises(KeyboardInterrupt):
        scaling.train(args_of(standins, tmp_path))
    raw = [dataset.tensors for dataset in scaling.load_data(args)]
    (train_set, val_set, test_set), distorted = ([d.tensors for d in s] for s in seen)
    x, y = raw[0]
    assert len(val_set[0]) == len(x) // 12
    assert torch.equal(torch.cat([val_set[1], train_set[1]]), y)
    torch.testing.assert_close(torch.cat([val_set[0], train_set[0]]), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(test_set[0], raw[1][0][::2], atol=1e-4, rtol=0)
    assert torch.equal(test_set[1], raw[1][1][::2])
    for plain, other, changed in zip((train_set, val_set, test_set), distorted, (0, 1, 1)):
        assert torch.equal(plain[1], other[1])
        assert torch.allclose(plain[0], other[0], atol=0.1) != changed


def test_mean_learning_curves_are_logged(study):
    final, calls = study("--n_seeds", "3")
    records = [json.loads(x) for x in (study.out_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1] == final
    (points, laws, means, path), out_dir = study.pictures
    assert (path, out_dir) == (study.out_dir / "fits.png", study.out_dir)
    assert {name: law.exponent for name, law in laws.items()}.items() <= final.items()
    assert len(points["L(N)"]) == 15 and len(points["L(C)"]) == len(points["N(C)"]) <= 9
    assert list(means)[-1] == "largest"
    saved = json.loads((study.out_dir / "args.json").read_text())
    assert (saved["seed"], saved["torch"], saved["device"]) == (1337, torch.__version__, "cpu")
    names = {f"width_{w}": w for w in scaling.WIDTHS} | {"largest": calls[-1][0]}
    for name, width in names.items():
        curve = {r["iter"]: r[name] for r in records if name in r}
        assert len(curve) == 11
        assert curve == pytest.approx({i: 3 * 1.02 * planted(width, i) for i in curve})
        assert max(curve) == max(call[2] for call in calls if call[:2] == (width, 0))


def test_the_picture_shows_points_laws_and_the_largest_run(tmp_path, monkeypatch):
    figures = []
    real = scaling.Figure
    monkeypatch.setattr(scaling, "Figure", lambda **k: figures.append(real(**k)) or figures[-1])
    points = {name: [(10, 2.0), (1000, 1.0)] for name in ("L(N)", "L(D)", "L(C)", "N(C)")}
    laws = {name: scaling.PowerLaw(points[name], name == "L(C)") for name in points}
    curves = {
        name: [{"flops": c, "test_loss": loss} for c in (100, 20000)]
        for name, loss in (("width_2", 3.0), ("largest", 0.5))
    }
    scaling.save_fits(points, laws, curves, tmp_path / "fits.png")
    assert (tmp_path / "fits.png").read_bytes().startswith(b"\x89PNG")
    for axis, name in zip(figures[0].axes, points):
        assert name in axis.get_title() and axis.get_xscale() == axis.get_yscale() == "log"
        lines = [line.get_xydata().tolist() for line in axis.lines]
        assert [[10, 2], [1000, 1]] in lines
        end = 20000 if name == "L(C)" else 1000
        line = axis.lines[-1].get_xydata()
        assert (line[0, 0], line[-1, 0]) == pytest.approx((10, end))
        assert line[:, 1] == pytest.approx(laws[name](line[:, 0]))
        labels = " ".join(text.get_text() for text in axis.get_legend().get_texts())
        assert f"exponent {laws[name].exponent:.2f} (" in labels
        assert ("irreducible loss 0.000" in labels) == (name == "L(C)")
        assert ([[20000, 0.5]] in lines) == (name == "L(C)")
        assert ([[100, 3], [20000, 3]] in lines) == (name == "L(C)")


@pytest.mark.data
def test_short_study_on_real_mnist(real_data, tmp_path):
    final = scaling.train(args_of(real_data, tmp_path, "--max_iters", "256", "--n_seeds", "1"))
    assert -0.6 < final["L(N)"] < -0.05
    assert -0.9 < final["L(D)"] < -0.2
    assert 0.2 < final["N(C)"] < 1.2
