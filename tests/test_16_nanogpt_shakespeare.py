"""Step 16: GPT-2's blocks as nanoGPT has them, exact evaluation, cached sampling, exact resume."""

import argparse
import json
import math
import os
import signal
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from steps import load_step, run_main, tiny_flags
from torch.utils._python_dispatch import TorchDispatchMode

STEP = "16_nanogpt_shakespeare"
step = load_step(STEP)
SMALL = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --dtype float32".split()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing would take much of the time; test_smoke.py has the pictures."""
    monkeypatch.setattr(step, "plot_run", lambda out_dir: out_dir / "loss.png")


def run_sample(*flags):
    """Run sample.py as a script of its own, as run_main does: (exit code, stderr)."""
    sys.modules.pop("train", None)  # each step has another one
    try:
        return run_main(STEP, *flags, script="sample.py")
    finally:
        sys.modules.pop("train", None)


def small(*flags):
    """Return args and a model with large weights, so that mistakes show in its outputs."""
    args = step.parse_args([*SMALL, "--device", "cpu", *map(str, flags)])
    torch.manual_seed(0)
    model = step.GPT(args, 65)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return args, model


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def gpu_sizes():
    return step.parse_args("--n_layer 6 --n_head 6 --n_embd 384 --block_size 256".split())


def test_parameter_count_is_nanogpts():
    model = step.GPT(gpu_sizes(), 65)
    assert sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel() == 10_646_784


def test_first_loss_is_that_of_the_uniform_distribution():
    torch.manual_seed(0)
    model = step.GPT(gpu_sizes(), 65).eval()
    ids = torch.randint(65, (4, 65))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(65), rel=0.03)


def test_initial_weights_are_gpt2s():
    """Normal with a standard deviation of 0.02, smaller where residuals add up."""
    torch.manual_seed(0)
    for name, p in step.GPT(gpu_sizes(), 65).named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name  # layer norm
            continue
        std = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.05), name
        assert p.abs().max() > 3 * std, name  # a uniform one ends at sqrt(3) std


def logits_of_torchs_layers(args, model, x):
    """Return what torch's own encoder layers give with the model's weights."""
    p = model.state_dict()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    sizes = args.n_embd, args.n_head, 4 * args.n_embd, 0.0
    options = {"activation": "gelu", "batch_first": True, "norm_first": True, "bias": args.bias}
    block = torch.nn.TransformerEncoderLayer(*sizes, **options)
    names = {"attn.c_attn.": "self_attn.in_proj_", "attn.c_proj": "self_attn.out_proj"}
    names |= {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    x = p["wte.weight"][x] + p["wpe.weight"][: x.shape[1]]
    for i in range(args.n_layer):
        weights = {k.removeprefix(f"h.{i}."): v for k, v in p.items() if k.startswith(f"h.{i}.")}
        for ours, theirs in names.items():
            weights = {k.replace(ours, theirs): v for k, v in weights.items()}
        block.load_state_dict(weights)
        x = block(x, mask)
    x = F.layer_norm(x, x.shape[-1:], p["ln_f.weight"], p.get("ln_f.bias"))
    return x @ p["wte.weight"].T  # weight tying


@pytest.mark.parametrize("bias", ["--bias", "--no-bias"])
def test_logits_are_those_of_torchs_layers(bias):
    args, model = small(bias)
    x = torch.randint(65, (3, 13))
    expected = logits_of_torchs_layers(args, model, x)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), expected, rtol=1e-4, atol=1e-4)


def test_biases_only_where_asked_and_zero_at_first():
    assert not [n for n, _ in step.GPT(small()[0], 65).named_parameters() if n.endswith("bias")]
    args = small("--bias")[0]
    biases = [p for n, p in step.GPT(args, 65).named_parameters() if n.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(p.any() for p in biases)


def test_later_characters_never_change_earlier_logits():
    _, model = small()
    x = torch.randint(65, (3, 16))
    changed = x.clone()
    changed[:, 9:] = (x[:, 9:] + 7) % 65
    a, b = model.eval()(x), model(changed)
    assert torch.equal(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().amax(2).min() > 1e-3


def test_attention_written_out_equals_torchs():
    _, model = small("--no-sdpa")
    x = torch.randint(65, (3, 16))
    own = model.eval()(x)
    for block in model.h:
        assert not block.attn.sdpa
        block.attn.sdpa = True
    assert torch.allclose(own, model(x), atol=1e-4)


def test_dropout_acts_in_training_only():
    _, model = small("--dropout", 0.5)
    x = torch.randint(65, (2, 16))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_is_where_nanogpt_has_it(monkeypatch):
    """After the embeddings, on the attention weights, before every sum into the residual."""
    _, model = small("--dropout", 0.5)
    real, found = F.dropout, []
    monkeypatch.setattr(F, "dropout", lambda x, p, *a: found.append((x.shape, p)) or real(x, p, *a))
    x = torch.randint(65, (3, 16))
    model(x)
    shapes = [(3, 16, 16), *[(3, 2, 16, 16), (3, 16, 16), (3, 16, 16)] * 2]
    assert found == [(shape, 0.5) for shape in shapes]
    found.clear()
    _, model = small("--dropout", 0.5, "--attn_dropout", 0.25)
    model(x)
    assert found == [(shape, 0.25 if len(shape) == 4 else 0.5) for shape in shapes]
    real_sdpa, rates = F.scaled_dot_product_attention, []

    def sdpa(q, k, v, dropout_p=0.0, is_causal=False):
        rates.append(dropout_p)
        return real_sdpa(q, k, v, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    _, model = small("--dropout", 0.5, "--sdpa")
    model(x)
    model.eval()(x)
    assert rates == [0.5, 0.5, 0.0, 0.0]


def test_bfloat16_agrees_with_float32():
    args, model = small()
    ids = torch.randint(65, (200,))
    exact = step.evaluate(args, model, ids)
    args.dtype = "bfloat16"
    assert step.evaluate(args, model, ids) == pytest.approx(exact, rel=0.03)


def test_a_batch_is_windows_and_the_characters_after_them():
    args, _ = small()
    ids = torch.arange(40)
    batches = step.minibatches(args, ids)
    x, y = next(batches)
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))
    seen = torch.cat([next(batches)[1].flatten() for _ in range(200)])
    assert seen.min() == 1
    assert seen.max() == 39
    assert {x.device.type for x in next(step.minibatches(args, ids.to("meta")))} == {"meta"}


def test_the_first_nine_tenths_train_and_the_rest_validates(tmp_path):
    text = "".join(chr(97 + i * i % 23) for i in range(1000))
    (tmp_path / "text.txt").write_text(text)
    args, _ = small("--input", tmp_path / "text.txt")
    train_ids, val_ids, vocab = step.load_data(args)
    assert "".join(vocab[i] for i in train_ids) == text[:900]
    assert "".join(vocab[i] for i in val_ids) == text[900:]
    assert vocab == "".join(sorted(set(text)))  # the same in every process
    assert len(step.load_data(small("--input", tmp_path / "text.txt", "--block_size", 99)[0])) == 3
    with pytest.raises(argparse.ArgumentTypeError, match="--block_size 100"):
        step.load_data(small("--input", tmp_path / "text.txt", "--block_size", 100)[0])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_is_the_recipe(optimizer, standins, tmp_path):
    """Forward, backward, clip, update: the same weights as by the loop written out here."""
    flags = [*tiny_flags(STEP, standins, tmp_path), "--device", "cpu", "--dtype", "float32"]
    flags += (
        "--dropout 0.3 --grad_clip 0.1 --warmup_iters 3 --max_iters 8 --eval_interval 4".split()
    )
    args = step.parse_args([*flags, "--optimizer", optimizer])
    record = step.train(args)
    train_ids, _, vocab = step.load_data(args)
    torch.manual_seed(args.seed)
    model = step.GPT(args, len(vocab))
    batches, losses = step.minibatches(args, train_ids), []
    hidden = [p for p in model.h.parameters() if p.ndim == 2] if optimizer == "muon" else []
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    groups = [[p for p in others if (p.ndim < 2) == vector] for vector in (0, 1)]
    decay = 0.05 if optimizer == "muon" else 0.1
    groups = [{"params": group, "weight_decay": w} for group, w in zip(groups, (decay, 0.0))]
    betas = (0.9, 0.95 if optimizer == "muon" else 0.99)
    optimizers = [torch.optim.AdamW(groups, betas=betas, fused=optimizer == "muon")]
    if optimizer == "muon":
        optimizers.append(step.Muon(hidden, momentum=0.9, weight_decay=decay))
    for i in range(8):
        torch.manual_seed(args.seed * 1_000_003 + i)
        x, y = next(batches)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        cosine = (1 + math.cos(math.pi * max(0, i - 3) / 5)) / 2
        learning_rate = args.min_lr + (args.learning_rate - args.min_lr) * cosine
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = min((i + 1) / 4, 1) * learning_rate
            each.step()
        losses.append(loss.item())
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, p in model.state_dict().items():
        assert torch.allclose(p, trained[name], atol=1e-6), name
    assert record["train_loss"] == pytest.approx(sum(losses[4:]) / 4)


def test_best_is_the_checkpoint_of_the_lowest_loss(standins, tmp_path, monkeypatch):
    losses = iter([4.0, 2.0, 3.0])
    monkeypatch.setattr(step, "evaluate", lambda *_: next(losses))
    step.train(step.parse_args(tiny_flags(STEP, standins, tmp_path)))
    states = [torch.load(tmp_path / f, weights_only=True)["state"] for f in ("best.pt", "last.pt")]
    assert [(s["iter_num"], s["best"]) for s in states] == [(3, 2.0), (6, 2.0)]


def test_a_loss_that_is_not_finite_stops_the_run(standins, tmp_path, monkeypatch):
    real, calls = F.cross_entropy, []

    def cross_entropy(logits, y, **options):
        calls.append(logits.requires_grad)
        return real(logits, y, **options) * (math.nan if sum(calls) > 4 else 1)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", cross_entropy)
    result = run_main(STEP, *tiny_flags(STEP, standins, tmp_path))
    assert_one_line(result, "no longer finite", "iteration 6", "learning_rate")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state"]["iter_num"] == 3


@pytest.mark.parametrize("n", [17, 40, 48, 49, 50, 16 * 64 + 5])
def test_evaluation_counts_every_character_once(n):
    args, model = small()
    ids = torch.randint(65, (n,))
    losses = []
    model.eval()
    for i in range(n - 1):  # character i + 1, from its window's beginning on
        first = i // 16 * 16
        logits = model(ids[None, first : i + 1])[0, -1]
        losses.append(F.cross_entropy(logits, ids[i + 1]).item())
    assert step.evaluate(args, model, ids) == pytest.approx(sum(losses) / (n - 1), rel=1e-5)


def test_evaluation_and_sampling_drop_nothing_out_and_training_goes_on_doing_it():
    args, model = small("--dropout", 0.5)
    ids = torch.randint(65, (200,))
    assert step.evaluate(args, model, ids) == step.evaluate(args, model, ids)
    assert model.training
    start = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(step.generate(args, model, start), step.generate(args, model, start))
    assert model.training
    graphs = []
    model.register_forward_hook(lambda module, inputs, logits: graphs.append(logits.grad_fn))
    step.evaluate(args, model, ids)
    step.generate(args, model, start)
    assert len(graphs) > 200 and set(graphs) == {None}  # nothing is kept for a backward pass


def test_adamw_is_nanogpts_recipe():
    for device, sizes in (("cpu", (4, 4, 128, 64, 12, 2000)), ("cuda", (6, 6, 384, 256, 64, 5000))):
        args = step.parse_args(["--device", device, "--optimizer", "adamw"])
        names = "n_layer n_head n_embd block_size batch_size max_iters".split()
        assert tuple(getattr(args, name) for name in names) == sizes
        assert (args.learning_rate, args.min_lr, args.warmup_iters) == (1e-3, 1e-4, 100)
        assert (args.beta1, args.beta2, args.weight_decay, args.grad_clip) == (0.9, 0.99, 0.1, 1.0)
        assert args.dropout == (0.2 if device == "cuda" else 0.0)
    assert step.schedule(args, 0) == pytest.approx(1e-3 / 101)
    assert step.schedule(args, 100) == pytest.approx(1e-3)
    assert step.schedule(args, 2550) == pytest.approx((1e-3 + 1e-4) / 2)
    assert step.schedule(args, 5000) == step.schedule(args, 6000) == pytest.approx(1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_muons_defaults_are_those_that_were_measured(device):
    args = step.parse_args(["--device", device])
    found = args.learning_rate, args.min_lr, args.warmup_iters, args.beta1, args.beta2
    assert found == (0.015 if device == "cpu" else 0.005, 0.0, 20, 0.9, 0.95)
    found = args.weight_decay, args.grad_clip, args.batch_size, args.max_iters
    assert found == (0.05, 0.0, *((16, 1300) if device == "cpu" else (64, 2000)))
    assert args.block_size == (128 if device == "cpu" else 256)
    assert (args.compile, args.sdpa) == (device == "cuda", device == "cuda")


@pytest.mark.parametrize("warmup_iters", [0, 5, 20])
def test_the_learning_rate_is_that_of_torchs_schedulers(warmup_iters):
    flags = ["--max_iters", 20, "--learning_rate", 0.3, "--min_lr", 0.1]
    args = small(*flags, "--warmup_iters", warmup_iters)[0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    kinds, n = torch.optim.lr_scheduler, warmup_iters
    rise = kinds.LinearLR(optimizer, 1 / (n + 1), total_iters=max(n, 1))
    fall = kinds.CosineAnnealingLR(optimizer, max(20 - n, 1), eta_min=0.1)
    both = kinds.SequentialLR(optimizer, [rise, fall], [n]) if n else fall
    for iter_num in range(21):
        assert step.schedule(args, iter_num) == pytest.approx(both.get_last_lr()[0]), iter_num
        optimizer.step()
        both.step()


def test_the_learning_rate_ends_at_lr_decay_iters():
    args = small("--lr_decay_iters", 100, "--max_iters", 200)[0]
    assert step.schedule(args, 60) > step.schedule(args, 100) == step.schedule(args, 150)
    assert step.schedule(args, 100) == args.min_lr


def test_a_flag_overrides_the_recipe():
    args = step.parse_args(["--device", "cpu", "--n_embd", "64", "--learning_rate", "0.5"])
    assert (args.n_embd, args.learning_rate, args.n_layer) == (64, 0.5, 4)


def test_compile_without_a_compiler_goes_on_and_says_so(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    args, model = small("--compile")
    assert step.compile_model(args, model) is model
    assert "no C++ compiler" in capsys.readouterr().out


def test_training_runs_through_the_compiled_model(standins, tmp_path, monkeypatch):
    calls = []

    def compile_model(args, model):
        return lambda x: calls.append(len(x)) or model(x)

    monkeypatch.setattr(step, "compile_model", compile_model)
    flags = tiny_flags(STEP, standins, tmp_path)
    args = step.parse_args([*map(str, flags), "--max_iters", "3"])
    step.train(args)
    assert calls == [args.batch_size] * 3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_decay_and_vectors_do_not(optimizer):
    args, model = small("--optimizer", optimizer, "--bias")
    optimizers = step.make_optimizers(args, model)
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for kind, each in optimizers.items():
        for group in each.param_groups:
            for p in group["params"]:
                assert names[p] not in found
                found[names[p]] = kind
                assert group["weight_decay"] == (args.weight_decay if p.ndim == 2 else 0)
    assert found.keys() == set(names.values())
    assert optimizers["adamw"].defaults["fused"]  # one kernel instead of several per tensor
    hidden = {name for name in found if name.startswith("h.") and "ln" not in name}
    hidden = {name for name in hidden if name.endswith("weight")}
    assert {name for name in found if found[name] == "muon"} == (
        hidden if optimizer == "muon" else set()
    )


def test_muon_orthogonalizes(monkeypatch):
    """Singular values near 1 and the singular vectors of the input, whatever its scale."""
    assert not step.orthogonalize(torch.zeros(1, 3, 4)).any()  # as of an unused layer
    real, grams = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *xs: grams.append(real(*xs)) or grams[-1])
    for n, shape in [(1, (4, 4)), (3, (8, 20)), (2, (20, 8))]:
        x = torch.randn(n, *shape) * 1e-3
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        y = step.orthogonalize(x)
        assert y.dtype == torch.bfloat16
        aligned = u.mT @ y.float() @ vh.mT  # (N, K, K)
        values = aligned.diagonal(dim1=1, dim2=2)[s > 0.05 * s.norm(dim=1, keepdim=True)]
        assert 0.6 < values.min() <= values.max() < 1.3
        assert (aligned - torch.diag_embed(aligned.diagonal(dim1=1, dim2=2))).abs().max() < 0.05
        assert {gram.shape for gram in grams} == {(n, min(shape), min(shape))}  # the cheaper one
        grams.clear()


@pytest.mark.parametrize("shapes", [[(6, 6)], [(12, 4), (4, 4), (16, 4), (4, 16), (12, 4)]])
def test_muon_is_torchs(shapes):
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.8, "weight_decay": 0.3}
    reference, muon = torch.optim.Muon(theirs, **options), step.Muon(ours, 0.8, 0.3)
    muon.param_groups[0]["lr"] = 0.1
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        reference.step()
        muon.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=1e-2)  # bfloat16 rounds, perhaps otherwise in a batch
    saved = muon.state_dict()
    again = step.Muon(ours, 0.8, 0.3)
    again.load_state_dict(saved)
    for p in ours:
        assert torch.equal(again.state[p]["momentum_buffer"], muon.state[p]["momentum_buffer"])


class CountKernels(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU: all but views and allocations."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(x.alias_info and not x.alias_info.is_write for x in function._schema.returns)
        self.n += not is_view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def test_muon_starts_few_kernels():
    """At the size for a GPU: 24 matrices of 4 shapes; torch.optim.Muon starts over 500."""
    args, model = small("--n_layer", 6, "--optimizer", "muon")
    muon = step.make_optimizers(args, model)["muon"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    muon.step()
    with CountKernels() as mode:
        muon.step()
    assert 60 < mode.n <= 100


@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_cached_sampling_writes_the_same_text(length):
    args, model = small("--temperature", 0, "--max_new_tokens", 60)
    start = torch.randint(65, (3, length))
    cached = step.generate(args, model, start)
    assert cached.shape == (3, length + 60)
    assert torch.equal(cached, step.generate(args, model, start, use_cache=False))
    assert torch.equal(cached[:, :length], start)
    assert len(cached.unique()) > 5


@torch.no_grad()
def written_by_hand(args, model, ids):
    """Sample without a cache: a context that is over block_size long is cut to its last half."""
    generator = torch.Generator().manual_seed(args.seed)
    context = ids[:, -args.block_size :]
    for _ in range(args.max_new_tokens):
        if context.shape[1] > args.block_size:
            context = context[:, -math.ceil(args.block_size / 2) :]
        values, likely = model.eval()(context)[:, -1].topk(min(args.top_k or 65, 65))
        p = torch.zeros(len(ids), 65).scatter(1, likely, (values / args.temperature).softmax(1))
        new = torch.multinomial(p, 1, generator=generator)
        context, ids = torch.cat([context, new], 1), torch.cat([ids, new], 1)
    return ids


@pytest.mark.parametrize("block_size", [1, 15, 16])
@pytest.mark.parametrize("top_k", [0, 5, 99])
def test_sampling_is_from_the_predicted_distribution(block_size, top_k):
    flags = ["--max_new_tokens", 50, "--block_size", block_size, "--top_k", top_k]
    for temperature, length in ((0.7, 1), (3.0, 16), (3.0, 30)):
        args, model = small(*flags, "--temperature", temperature, "--seed", length)
        start, lengths = torch.randint(65, (3, length)), []
        model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))  # noqa: B023
        ids = step.generate(args, model, start)
        assert lengths.count(1) >= 50 * (1 - 3 / block_size)  # a cache holds the others
        assert torch.equal(ids, written_by_hand(args, model, start))


def test_sampling_takes_the_most_likely_at_temperature_0():
    args, model = small("--temperature", 0, "--max_new_tokens", 12)
    ids = step.generate(args, model, torch.randint(65, (2, 4)))
    best = model.eval()(ids[:, :-1]).argmax(2)
    assert torch.equal(ids[:, 4:], best[:, 3:])
    args.temperature = 1e-4
    assert torch.equal(ids, step.generate(args, model, ids[:, :4]))


def test_top_k_and_seed():
    args, model = small("--temperature", 5.0, "--max_new_tokens", 200, "--top_k", 3)
    start = torch.zeros(4, 1, dtype=torch.long)
    ids = step.generate(args, model, start)
    assert torch.equal(ids, step.generate(args, model, start))
    args.max_new_tokens = 15
    ids = step.generate(args, model, start)
    best = model.eval()(ids[:, :-1]).topk(3).indices  # (B, T, 3)
    assert (best == ids[:, 1:, None]).any(2).all()
    args.seed += 1
    assert not torch.equal(ids, step.generate(args, model, start))


def test_samples_end_with_stop():
    args, model = small("--temperature", 5.0, "--max_new_tokens", 400, "--num_samples", 3)
    args.top_k = 0
    vocab = "".join(map(chr, range(40, 105)))
    args.prompt, args.stop = "ab", "c"
    texts = step.sample(args, model, vocab).split("\n---------------\n")
    assert len(texts) == 3
    for text in texts:
        assert text.startswith("ab")
        assert text.endswith("c")
        assert text[2:].count("c") == 1


def test_losses_are_computed_in_float32(standins, tmp_path, monkeypatch):
    """The sum over a batch has more digits than bfloat16 holds."""
    real, dtypes = F.cross_entropy, []

    def spy(logits, *given, **options):
        dtypes.append(logits.dtype)
        return real(logits, *given, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    flags = [*tiny_flags(STEP, standins, tmp_path), "--dtype", "bfloat16", "--max_iters", "1"]
    step.train(step.parse_args([*flags, "--max_new_tokens", "0"]))
    assert len(dtypes) > 3 and set(dtypes) == {torch.float32}


def test_nothing_in_the_loop_waits_for_the_device(standins, tmp_path, monkeypatch):
    """Whatever reads a number from the device is as rare in a long run as in a short one."""
    waits, counts = [], []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__format__", "cpu"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, **kwargs):
            waits.append(real)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for max_iters in ("2", "7"):
        flags = [*tiny_flags(STEP, standins, tmp_path / max_iters), "--device", "cpu"]
        flags += ["--eval_interval", "100", "--max_iters", max_iters]
        step.train(step.parse_args(flags))
        counts.append(len(waits))
        waits.clear()
    assert 0 < counts[0] == counts[1]


def test_the_bar_shows_every_hundredth_loss(standins, tmp_path, monkeypatch):
    real, losses, shown = F.cross_entropy, [], []
    monkeypatch.setattr(F, "cross_entropy", lambda *args: losses.append(real(*args)) or losses[-1])
    monkeypatch.setattr(step, "evaluate", lambda *args: 1.0)
    monkeypatch.setattr(step.tqdm, "set_postfix", lambda bar, **values: shown.append(values))
    flags = "--n_layer 1 --n_embd 4 --block_size 4 --max_new_tokens 0 --optimizer adamw".split()
    flags = [*tiny_flags(STEP, standins, tmp_path), *flags, "--max_iters", "102"]
    step.train(step.parse_args([*flags, "--eval_interval", "102"]))
    assert shown == [{"loss": f"{losses[i]:.4f}", "refresh": False} for i in (0, 100)]


def test_sampling_does_not_disturb_training(standins, tmp_path):
    losses = []
    for n in ("0", "20"):
        flags = [*tiny_flags(STEP, standins, tmp_path / n), "--dropout", "0.3"]
        flags += ["--max_new_tokens", n]
        losses.append(step.train(step.parse_args(flags))["val_loss"])
    assert losses[0] == losses[1]
    assert (tmp_path / "20" / "samples.txt").read_text().count("=== iter") == 3


def test_every_iteration_of_every_seed_has_its_own_minibatch(standins, tmp_path, monkeypatch):
    real, used = torch.manual_seed, []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: used.append(seed) or real(seed))
    for seed in (1, 2):
        flags = [*tiny_flags(STEP, standins, tmp_path / str(seed)), "--device", "cpu"]
        flags += ["--seed", str(seed)]
        step.train(step.parse_args(flags))
    used = [seed % 2**32 for seed in used if seed > 2]  # a CPU ignores the higher bits
    assert len(used) == len(set(used)) == 2 * 6


def stopped_at(iter_num, monkeypatch):
    """Let this process get a SIGTERM in the iteration before; return the list of signals."""
    calls, signals, real = [], [], torch.Tensor.backward

    def backward(loss):
        real(loss)
        calls.append(loss)
        if len(calls) == iter_num:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return signals


def test_a_signal_saves_and_resume_goes_on(standins, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    whole = step.train(step.parse_args(tiny_flags(STEP, standins, tmp_path / "whole")))
    assert signal.getsignal(signal.SIGTERM) == before
    flags, signals = tiny_flags(STEP, standins, tmp_path), stopped_at(5, monkeypatch)
    step.train(step.parse_args(flags), signals)
    assert signals == [signal.SIGTERM]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state"]["iter_num"] == 5
    final = step.train(step.parse_args([*flags, "--init_from", "resume"]))
    for key in ("train_loss", "val_loss"):
        assert final[key] == whole[key]


def test_a_signal_after_a_loss_that_is_not_finite_saves_nothing(standins, tmp_path, monkeypatch):
    real, signals = F.cross_entropy, stopped_at(5, monkeypatch)

    def cross_entropy(logits, y, **options):
        return real(logits, y, **options) * (math.nan if logits.requires_grad else 1)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    flags = [*tiny_flags(STEP, standins, tmp_path), "--eval_interval", "6"]
    step.train(step.parse_args(flags), signals)
    assert signals == [signal.SIGTERM]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state"]["iter_num"] == 0


def test_a_run_records_and_prints_its_time_speed_and_samples(
    standins, tmp_path, monkeypatch, capsys
):
    """By a clock that load_data moves by 100 s, an evaluation by 10 s, a minibatch by 0.5 s."""
    now, texts, bars = [1000.0], [], []

    def takes(seconds, function):
        def call(*given):
            now[0] += seconds
            return function(*given)

        return call

    def minibatches(*given, real=step.minibatches):
        batches = real(*given)
        while True:
            yield takes(0.5, next)(batches)

    def sample(*given, real=step.sample):
        texts.append(real(*given))
        return texts[-1]

    class Bar(step.tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            bars.append((self.n, self.total, self.disable))

    monkeypatch.setattr(step, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(step, "load_data", takes(100, step.load_data))
    monkeypatch.setattr(step, "evaluate", takes(10, step.evaluate))
    monkeypatch.setattr(step, "minibatches", minibatches)
    monkeypatch.setattr(step, "sample", sample)
    monkeypatch.setattr(step, "tqdm", Bar)
    (tmp_path / "samples.txt").write_text("of an earlier run")
    flags = [*tiny_flags(STEP, standins, tmp_path), "--device", "cpu", "--dtype", "float32"]
    flags += ["--max_iters", "5", "--eval_interval", "3"]
    assert step.train(step.parse_args(flags), stopped_at(4, monkeypatch))["iter"] == 3
    last = tmp_path / "last.pt"
    stopped = f"stopped at iteration 4; --init_from resume continues from {last}"
    said = capsys.readouterr().out
    assert stopped in said.splitlines() and "picture" not in said
    assert torch.load(last, weights_only=True)["state"]["seconds"] == 122  # 100 + 2 * 10 + 4 / 2
    for name in ("metrics.jsonl", "samples.txt"):  # what was written after the last checkpoint
        with open(tmp_path / name, "a") as file:
            file.write('{"iter": 4, "sec')
    final = step.train(step.parse_args([*flags, "--init_from", "resume"]))
    logged, said = records(tmp_path), said + capsys.readouterr().out
    assert logged[-1] == final
    # The last one begins with the 122 seconds of the first run and 100 of its own.
    assert [(r["iter"], r["seconds"]) for r in logged] == [(0, 100), (3, 111.5), (5, 222.5)]
    assert "tokens_per_second" not in logged[0] and "train_loss" not in logged[0]
    assert [r["tokens_per_second"] for r in logged[1:]] == [4 * 16 / 0.5] * 2  # of updates alone
    args = step.parse_args(flags)
    assert [r["learning_rate"] for r in logged] == [step.schedule(args, i) for i in (0, 3, 5)]
    state = torch.load(last, weights_only=True)["state"]
    assert (state["seconds"], state["loss_sum"], state["record"]) == (232.5, 0, final)
    heads = (f"=== iter {r['iter']}, val_loss {r['val_loss']:.4f}" for r in logged)
    written = "".join(f"{head}\n{text}\n\n" for head, text in zip(heads, texts))
    assert (tmp_path / "samples.txt").read_text() == written
    lines = said.splitlines()
    n_params = sum(p.numel() for p in step.GPT(args, len(state["vocab"])).parameters()) - 16 * 16
    assert lines[0] == f"{n_params:,} parameters without positions, cpu, float32"
    for record, text in zip(logged, texts):
        line = "  ".join(f"{key} {value:.5g}" for key, value in record.items())
        assert f"{line}\n{text}\n" in said
    assert lines[-2:] == [
        f"val_loss {final['val_loss']:.4f} after 222 s",
        f"picture: {tmp_path / 'loss.png'}",
    ]
    assert bars == [(0, 5, True), (4, 5, True)]  # not shown where there is no terminal


def test_samples_are_written_as_utf8_on_every_system(tmp_path, monkeypatch):
    def ascii_by_default(path, mode="r", encoding="ascii", real=open):
        return real(path, mode, encoding=encoding)

    monkeypatch.setattr("builtins.open", ascii_by_default)
    args = small("--out_dir", tmp_path)[0]
    for i in (0, 3):
        step.log_sample(args, {"iter": i, "val_loss": 1.23456}, "caf\u00e9")
    written = "".join(f"=== iter {i}, val_loss 1.2346\ncaf\u00e9\n\n" for i in (0, 3))
    assert (tmp_path / "samples.txt").read_bytes().decode() == written


def test_a_shorter_block_crops_the_positions():
    _, model = small()
    _, short = small("--block_size", 8)
    short.load_state_dict(model.state_dict())
    x = torch.randint(65, (2, 8))
    assert torch.equal(short.eval()(x), model.eval()(x))


def test_resume_with_a_cropped_block(standins, tmp_path):
    flags = tiny_flags(STEP, standins, tmp_path)
    step.train(step.parse_args(flags))
    flags += ["--init_from", "resume", "--block_size", "8", "--max_iters", "8"]
    assert step.train(step.parse_args(flags))["iter"] == 8
    assert [r["iter"] for r in records(tmp_path)] == [0, 3, 6, 8]
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    assert checkpoint["model"]["wpe.weight"].shape == (8, 16)
    assert checkpoint["adamw"]["state"][1]["exp_avg"].shape == (8, 16)


def test_resume_takes_the_sizes_from_the_checkpoint(standins, tmp_path):
    step.train(step.parse_args([*tiny_flags(STEP, standins, tmp_path), "--bias"]))
    before = torch.load(tmp_path / "last.pt", weights_only=True)["state"]["args"]
    flags = ["--data_dir", standins, "--out_dir", tmp_path, "--init_from", "resume"]
    flags += ["--device", "cpu", "--dtype", "float32"]
    args = step.parse_args([*map(str, flags)])
    assert before == {name: getattr(args, name) for name in before}
    code, errors = run_main(STEP, *flags, "--n_head", 1 if args.n_head > 1 else 2)
    assert code == 2 and "--n_head" in errors and "Traceback" not in errors


def test_sample_takes_the_sizes_and_the_vocabulary_from_the_checkpoint(standins, tmp_path, capsys):
    step.train(step.parse_args([*tiny_flags(STEP, standins, tmp_path), "--bias"]))
    capsys.readouterr()
    flags = ["--out_dir", tmp_path, "--max_new_tokens", 7]
    assert run_sample(*flags, "--prompt", "The ")[0] == 0
    text = capsys.readouterr().out
    assert text.startswith("The ")
    assert len(text) == len("The ") + 7 + 1
    (tmp_path / "prompt.txt").write_text("The rest", encoding="utf-8")
    assert run_sample(*flags, "--prompt", f"FILE:{tmp_path / 'prompt.txt'}")[0] == 0
    assert capsys.readouterr().out.startswith("The rest")


def test_eval_only_changes_no_file(standins, tmp_path, capsys):
    flags = tiny_flags(STEP, standins, tmp_path)
    final = step.train(step.parse_args(flags))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    again = step.train(step.parse_args([*flags, "--init_from", "resume", "--eval_only"]))
    assert again == {"iter": 6, "val_loss": final["val_loss"]}
    text = (tmp_path / "samples.txt").read_text().rpartition("===")[2].partition("\n")[2]
    said = capsys.readouterr().out.rstrip("\n")
    assert said.endswith(f"val_loss {final['val_loss']:.4f}\n{text.rstrip()}")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_resume_at_iteration_0_keeps_its_record(standins, tmp_path):
    class Signals:
        """A list of signals that gets its first one after iteration 0 was recorded."""

        def __bool__(self):
            return (tmp_path / "last.pt").exists()

    flags = tiny_flags(STEP, standins, tmp_path)
    step.train(step.parse_args(flags), Signals())
    step.train(step.parse_args([*flags, "--init_from", "resume"]))
    assert [r["iter"] for r in records(tmp_path)] == [0, 3, 6]


def assert_one_line(result, *words):
    code, errors = result
    assert code == 2
    lines = [line for line in errors.splitlines() if "it/s]" not in line and line.strip()]
    assert len(lines) == 1, errors
    for word in words:
        assert str(word) in lines[0]


def test_damaged_checkpoints(standins, tmp_path):
    flags = [*tiny_flags(STEP, standins, tmp_path), "--init_from", "resume"]
    assert_one_line(run_main(STEP, *flags), tmp_path / "last.pt")
    step.train(step.parse_args(flags[:-2]))
    assert_one_line(run_main(STEP, *flags, "--n_embd", "32"), tmp_path / "last.pt", "another model")
    whole = (tmp_path / "last.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "last.pt").write_bytes(damaged)
        assert_one_line(run_main(STEP, *flags), tmp_path / "last.pt", "damaged")
        assert (tmp_path / "last.pt").read_bytes() == damaged
    assert len(records(tmp_path)) == 3


def test_a_checkpoint_of_other_characters(standins, tmp_path):
    flags = tiny_flags(STEP, standins, tmp_path)
    step.train(step.parse_args(flags))
    text = (standins / "shakespeare" / "input.txt").read_text().replace("a", "%")
    (tmp_path / "other.txt").write_text(text)
    flags += ["--init_from", "resume", "--input", tmp_path / "other.txt"]
    assert_one_line(run_main(STEP, *flags), tmp_path / "last.pt", "characters")


def test_what_sample_cannot_do_is_one_line(standins, tmp_path):
    flags = ["--out_dir", tmp_path]
    assert_one_line(run_sample(*flags), tmp_path / "best.pt", "missing")
    step.train(step.parse_args(tiny_flags(STEP, standins, tmp_path)))
    assert_one_line(run_sample(*flags, "--prompt", "caf\u00e9"), "--prompt", "\u00e9")
    assert_one_line(run_sample(*flags, "--prompt", "FILE:/nowhere"), "/nowhere")
    for content, word in ((b"caf\xe9", "utf-8"), (b"", "is empty")):
        (tmp_path / "prompt.txt").write_bytes(content)
        assert_one_line(run_sample(*flags, "--prompt", f"FILE:{tmp_path / 'prompt.txt'}"), word)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--n_head", "3"], "--n_embd 16"),
        (["--prompt", ""], "--prompt"),
        (["--block_size", "100000"], "--block_size"),
        (["--prompt", "\u00e9"], "--prompt"),
        *([(["--device", "cuda"], "--device cuda")] if not torch.cuda.is_available() else []),
    ],
)
def test_bad_flags(flags, word, standins, tmp_path):
    before = tiny_flags(STEP, standins, tmp_path / "out")
    assert_one_line(run_main(STEP, *before, *flags), word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "word"), [(b"caf\xe9 and more", "text.txt"), (b"too short", "--block_size 128")]
)
def test_texts_that_cannot_be_used(content, word, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    flags = ["--input", tmp_path / "text.txt", "--out_dir", tmp_path / "out", "--device", "cpu"]
    assert_one_line(run_main(STEP, *flags), "--input", word)
    assert not (tmp_path / "out").exists()


@pytest.mark.data
def test_real_text_is_learned(real_data, tmp_path):
    flags = ["--device", "cpu", "--data_dir", str(real_data), "--out_dir", str(tmp_path)]
    final = step.train(step.parse_args([*flags, "--max_iters", "150", "--eval_interval", "150"]))
    assert 1.7 < final["val_loss"] < 2.7
