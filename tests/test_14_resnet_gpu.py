"""Step 14: the data stay on the device, nothing waits, and the clock tells the truth."""

import json
import time

import pytest
import torch
from steps import TINY, load_step, run_main
from torch.utils.data import TensorDataset

step = load_step("14")
CPU = torch.device("cpu")


def args_for(*flags):
    return step.parse_args([str(flag) for flag in flags])


def run_flags(standins, out_dir, *more):
    flags = [*TINY["14_resnet_gpu"].split(), "--data_dir", standins, "--out_dir", out_dir, *more]
    return [str(flag) for flag in flags]


def images(n, device="cpu"):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_augmented_batch_stays_on_the_device(device):
    x = images(4, device)
    moved = step.augment(args_for(), x)
    assert moved.device == x.device
    assert moved.shape == x.shape


def test_augmented_batch_stays_in_range_and_differs_from_image_to_image():
    torch.manual_seed(0)
    x = images(1).expand(64, -1, -1, -1)
    moved = step.augment(args_for(), x)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not any(torch.equal(moved[0], other) for other in moved[1:])


def test_augmentation_of_strength_zero_changes_nothing():
    still = args_for("--shift", 0, "--rotate", 0, "--scale", 0)
    x = images(4)
    torch.testing.assert_close(step.augment(still, x), x, rtol=0, atol=1e-5)


def test_shift_is_in_pixels():
    torch.manual_seed(0)
    x = torch.zeros(256, 1, 28, 28)
    x[:, :, 14, 14] = 1
    moved = step.augment(args_for("--rotate", 0, "--scale", 0, "--shift", 3), x)
    rows = (moved.sum((1, 3)) * torch.arange(28)).sum(1) - 14  # the centre of mass
    assert rows.abs().max() <= 3.001
    assert rows.max() > 2.5
    assert rows.min() < -2.5


def test_rotation_is_in_degrees_and_stretching_a_fraction_of_each_side():
    torch.manual_seed(0)
    x = torch.zeros(256, 1, 28, 28)
    x[:, :, 20:22, 20:22] = 1  # 7 pixels right of the centre and 7 below
    places = torch.arange(28) - 13.5

    def centres(*flags):
        moved = step.augment(args_for("--shift", 0, *flags), x)[:, 0]
        mass = moved.sum((1, 2))
        return (moved.sum(1) * places).sum(1) / mass, (moved.sum(2) * places).sum(1) / mass

    right, down = centres("--rotate", 30, "--scale", 0)
    angles = torch.atan2(down, right).rad2deg() - 45
    assert angles.min() < -25 and angles.max() > 25 and angles.abs().max() < 31
    torch.testing.assert_close(right**2 + down**2, torch.full((256,), 98.0), rtol=0.05, atol=0)
    right, down = centres("--rotate", 0, "--scale", 0.25)
    for side in (right, down):
        assert 7 / 1.25 - 0.2 < side.min() < 6 and 8.8 < side.max() < 7 / 0.75 + 0.2
    assert (right - down).abs().max() > 2


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    still = "--shift 0 --rotate 0 --scale 0 --batch_size 8".split()
    x = torch.arange(43, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    stats = torch.tensor(0.0), torch.tensor(1 / 255)
    batches = step.minibatches(args_for(*still), TensorDataset(x, torch.arange(43)), stats)
    epochs = [[next(batches) for _ in range(5)] for _ in range(2)]
    orders = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    for epoch, order in zip(epochs, orders):
        assert len(order.unique()) == 40  # the incomplete sixth batch is skipped
        pixels = torch.cat([x[:, 0, 14, 14] for x, _ in epoch])
        torch.testing.assert_close(pixels, order.float(), rtol=0, atol=1e-2)
    assert not torch.equal(*orders)


def test_pixels_are_normalized_with_the_training_sets_statistics(standins, tmp_path, monkeypatch):
    seen, sets = [], {}
    evaluate = step.evaluate

    def spy(args, model, dataset, stats, name):
        sets[name] = dataset.tensors
        x = step.normalize(dataset.tensors[0] / 255, stats)
        seen.append((name, stats, x.mean().item(), x.std().item()))
        return evaluate(args, model, dataset, stats, name)

    monkeypatch.setattr(step, "evaluate", spy)
    step.train(step.parse_args(run_flags(standins, tmp_path)))
    train_set, test_set = step.load_data(args_for("--data_dir", standins), CPU)
    assert all(torch.equal(*pair) for pair in zip(sets["test"], test_set.tensors))
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(sets["train"], train_set.tensors))
    pixels = train_set.tensors[0] / 255
    for _, (mean, std), _, _ in seen:
        assert mean.item() == pytest.approx(pixels.mean().item(), rel=1e-5)
        assert std.item() == pytest.approx(pixels.std().item(), rel=1e-5)
    assert all(abs(mean) < 0.1 and abs(std - 1) < 0.1 for _, _, mean, std in seen)


def test_evaluation_is_the_mean_over_views_of_every_image():
    torch.manual_seed(0)
    args, stats = args_for("--device", "cpu", "--dtype", "float32"), (0.1, 0.3)
    model = step.ResNet(4, 1, 10)
    model(images(64) - 1)  # running statistics that differ from a batch's
    x = torch.randint(256, (1100, 1, 28, 28), dtype=torch.uint8)  # two chunks, one short
    y = torch.randint(10, (1100,))
    result = step.evaluate(args, model, TensorDataset(x, y), stats, "test")
    assert model.training
    model.eval()
    pixels = step.normalize(x / 255, stats)
    with torch.no_grad():
        views = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
        logits = torch.stack([model(pixels.roll(view, (2, 3))) for view in views]).mean(0)
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    assert result["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


def test_every_update_has_its_gradient_and_its_learning_rate(standins, tmp_path, monkeypatch):
    make_optimizer, cross_entropy, calls = step.make_optimizer, step.F.cross_entropy, []

    def spy_optimizer(args, model):
        optimizer = make_optimizer(args, model)
        zero_grad, update = optimizer.zero_grad, optimizer.step
        optimizer.zero_grad = lambda: (calls.append("zero_grad"), zero_grad())
        optimizer.step = lambda: (calls.append(optimizer.param_groups[0]["lr"]), update())
        return optimizer

    def spy_loss(logits, y, label_smoothing=0.0):
        calls.append(f"smoothing {label_smoothing}")
        return cross_entropy(logits, y, label_smoothing=label_smoothing)

    monkeypatch.setattr(step, "make_optimizer", spy_optimizer)
    monkeypatch.setattr(step.F, "cross_entropy", spy_loss)
    args = step.parse_args(run_flags(standins, tmp_path, "--eval_interval", 9))
    step.train(args)
    rates = [step.schedule(args, i) for i in range(4)]
    updates = [call for rate in rates for call in ("smoothing 0.1", "zero_grad", rate)]
    both_sets = ["smoothing 0.0"] * 2  # of the evaluations before and after
    assert calls == [*both_sets, *updates, *both_sets]


def test_bfloat16_and_float32_agree(standins, tmp_path):
    finals = {}
    for dtype in ("float32", "bfloat16"):
        flags = run_flags(standins, tmp_path / dtype, "--dtype", dtype, "--learning_rate", 0.01)
        finals[dtype] = step.train(step.parse_args(flags))
    one, other = finals.values()
    assert one["test_loss"] != other["test_loss"]  # or both ran in the same precision
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=0.02)
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)


def test_nothing_in_the_loop_waits_for_the_device(standins, tmp_path, monkeypatch):
    """Whatever reads a number from the device is as rare in a long run as in a short one."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, **kwargs):
            waits.append(real)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for max_iters in ("2", "12"):
        more = ["--max_iters", max_iters, "--eval_interval", "100"]
        step.train(step.parse_args(run_flags(standins, tmp_path, *more)))
        counts.append(len(waits))
        waits.clear()
    assert 0 < counts[0] == counts[1]


def test_clock_gives_each_part_its_time():
    start = time.perf_counter()
    time.sleep(0.01)
    clock = step.Clock(CPU, start)
    for _ in range(2):
        time.sleep(0.02)
        clock.mark("short")
        time.sleep(0.06)
        clock.mark("long")
    latest = clock.read()
    assert 0.04 <= latest["short"] < latest["long"]
    assert latest["long"] >= 0.12
    assert clock.seconds["start-up"] >= 0.01
    assert clock.seconds == latest | {"start-up": clock.seconds["start-up"]}
    assert clock.read() == {}
    clock.mark("short")
    assert clock.read().keys() == {"short"}
    assert clock.seconds["short"] > latest["short"]


def test_timing_table_adds_up_to_the_wall_time(standins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "plot_run", lambda out_dir: "no picture")
    begin = time.perf_counter()
    final = step.train(step.parse_args(run_flags(standins, tmp_path)))
    wall = time.perf_counter() - begin
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    parts = ["start-up", "evaluation", *step.ITERATION, "total"]
    table = {row[0]: float(row[1]) for row in rows if row and row[0] in parts}
    assert sorted(table) == sorted(parts)
    total = table.pop("total")
    assert sum(table.values()) == pytest.approx(total, abs=0.05)
    assert total == pytest.approx(wall, rel=0.1, abs=0.1)
    # The last record is made before the last evaluation, one of three.
    assert total - table["evaluation"] < final["seconds"] < total


def test_speed_is_measured_since_the_last_evaluation(standins, tmp_path, monkeypatch):
    """Of ten iterations the third evaluation covers two: 8 and 9."""
    reads = iter([{}, *(dict.fromkeys(step.ITERATION, 0.016 * n) for n in (4, 4, 2)), {}])
    monkeypatch.setattr(step.Clock, "read", lambda self: next(reads))
    more = ["--max_iters", 10, "--eval_interval", 4]
    step.train(step.parse_args(run_flags(standins, tmp_path, *more)))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "data_ms" not in records[0]
    for record in records[1:]:
        assert record["data_ms"] == record["update_ms"] == pytest.approx(16)
        assert record["data_share"] == pytest.approx(0.25)
        assert record["images_per_second"] == pytest.approx(32 / 0.064)


def test_learning_rate_rises_and_falls_once():
    args = args_for("--max_iters", 100, "--warmup_iters", 20, "--learning_rate", 0.3)
    rates = [step.schedule(args, i) for i in range(101)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.3)
    assert top in (19, 20)
    assert rates[:top] == sorted(rates[:top])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_optimizer_is_nesterov_momentum_with_decay():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    layer = torch.nn.Module()
    layer.p = p
    optimizer = step.make_optimizer(args_for("--weight_decay", 0.1), layer)
    expected, velocity = p.detach().clone(), torch.zeros(2)
    for grad in ([1.0, 2.0], [-3.0, 0.5], [0.2, 0.2]):
        optimizer.param_groups[0]["lr"] = 0.1
        p.grad = torch.tensor(grad)
        optimizer.step()
        total = torch.tensor(grad) + 0.1 * expected
        velocity = 0.9 * velocity + total
        expected -= 0.1 * (total + 0.9 * velocity)
    torch.testing.assert_close(p.detach(), expected)


def test_warmup_takes_a_fifth_of_the_run_at_most():
    args = args_for("--max_iters", 50, "--warmup_iters", 400, "--learning_rate", 0.3)
    rates = [step.schedule(args, i) for i in range(51)]
    assert rates.index(max(rates)) in (9, 10)
    one = args_for("--max_iters", 1)
    assert step.schedule(one, 0) == one.learning_rate


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_without_bfloat16_computes_in_float32(native, dtype, monkeypatch):
    """T4 and V100 emulate bfloat16; is_bf16_supported() says True for them."""

    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    args = args_for()
    assert step.setup_device(args).type == args.device == "cuda"
    assert args.dtype == dtype
    args = args_for("--dtype", "float32")
    step.setup_device(args)
    assert args.dtype == "float32"


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx2": True}, "float32"), ({"amx_bf16": True}, "bfloat16"), (None, "float32")],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:  # torch 2.9
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    args = args_for("--device", "cpu")
    assert step.setup_device(args) == CPU
    assert args.dtype == dtype


def test_a_run_leaves_the_process_as_it_was(standins, tmp_path):
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    step.train(step.parse_args(run_flags(standins, tmp_path)))
    assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())


def error_of(*flags):
    code, errors = run_main("14_resnet_gpu", *flags)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors, errors
    return errors


def test_batch_larger_than_the_training_set_is_one_line(standins, tmp_path):
    errors = error_of(*run_flags(standins, tmp_path / "o", "--batch_size", 2001))
    assert "--batch_size 2001" in errors and "2000" in errors
    assert not (tmp_path / "o").exists()
    whole = run_flags(standins, tmp_path, "--batch_size", 2000, "--max_iters", 2)
    assert step.train(step.parse_args(whole))["iter"] == 2


def test_out_of_gpu_memory_is_one_line(standins, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    assert "--batch_size" in error_of(*run_flags(standins, tmp_path))


def test_diverging_run_is_one_line_and_keeps_what_it_wrote(standins, tmp_path):
    errors = error_of(*run_flags(standins, tmp_path, "--learning_rate", 1e9, "--max_iters", 20))
    assert "--learning_rate" in errors and "iteration" in errors
    assert (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(standins, tmp_path):
    assert "--device cuda" in error_of(*run_flags(standins, tmp_path / "o", "--device=cuda"))
    assert not (tmp_path / "o").exists()


@pytest.mark.data
def test_short_run_on_real_mnist(real_data, tmp_path):
    flags = "--max_iters 250 --n_channel 16 --rotate 0 --scale 0 --eval_interval 250"
    flags = [*flags.split(), "--data_dir", str(real_data), "--out_dir", str(tmp_path)]
    final = step.train(step.parse_args(flags))
    assert 0.982 < final["test_accuracy"] < 0.997
