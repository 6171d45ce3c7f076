"""The elective induction: sequences that repeat, heads that find what came next, what fails."""

import itertools
import json
import math
import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.image import imread
from runs import Idle, check_number
from steps import load_step, run_main, tiny_flags

NAME = "electives/induction"
induction = load_step(NAME)


def small_args(*flags):
    sizes = "--vocab_size 16 --block_size 15 --period_min 2 --period_max 7 --n_embd 16 --n_head 2"
    return induction.parse_args([*sizes.split(), *flags])


def random_model(*flags):
    torch.manual_seed(0)
    args = small_args(*flags)
    model = induction.GPT(args, args.vocab_size)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return args, model


# ---------- data ----------


def test_sequences_repeat_and_only_what_can_be_known_is_a_target():
    """Brute force: a target follows a token that had this successor before, and never another."""
    args = small_args("--block_size", "25")
    torch.manual_seed(0)
    x, y = induction.make_sequences(args, 500, 3, 6)
    periods, starts = set(), set()
    for row, targets in zip(x.tolist(), y.tolist()):
        period = len(set(row))
        assert len(set(row[:period])) == period
        start = row[:period].index(row[period])
        for t in range(period, 25):  # round and round
            assert row[t] == row[(start + t - period) % period]
        for t, (token, target) in enumerate(zip(row, targets)):
            successors = {row[place + 1] for place in range(t) if row[place] == token}
            assert (target >= 0) == (bool(successors) and token != row[period - 1])
            assert target < 0 or successors == {target}
            assert target < 0 or t == 24 or row[t + 1] == target
        periods.add(period)
        starts.add((period, start))
    assert periods == {3, 4, 5, 6}
    assert starts == {(period, start) for period in periods for start in range(period)}


def test_tokens_of_all_kinds_occur_in_all_places():
    torch.manual_seed(0)
    x, _ = induction.make_sequences(small_args(), 2000, 5, 5)
    counts = torch.stack([torch.bincount(column, minlength=16) for column in x.T[:5]])
    assert (counts > 75).all() and (counts < 175).all()  # 125 are expected


def test_ascending_integers_go_round():
    args = small_args("--task", "ascending")
    x, y = induction.make_sequences(args, 50, 2, 7)
    assert torch.equal(y, (x + 1) % 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert len(x[:, 0].unique()) > 10


def test_every_minibatch_is_new_and_has_the_periods_asked_for():
    args = small_args("--batch_size", "300", "--period_min", "4", "--period_max", "7")
    batches = induction.minibatches(args)
    (x, _), (other, _) = next(batches), next(batches)
    assert x.shape == (300, 15)
    assert not torch.equal(x, other)
    assert {len(set(row)) for row in x.tolist()} == {4, 5, 6, 7}


# ---------- model and scores ----------


def test_the_weights_kept_are_those_of_causal_attention():
    args, _ = random_model()
    attention = induction.CausalSelfAttention(args)
    x = torch.randn(3, 15, 16)
    y = attention(x)
    q, k, v = (part.view(3, 15, 2, 8).transpose(1, 2) for part in attention.c_attn(x).chunk(3, 2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention.weights @ v, expected)
    torch.testing.assert_close(attention.c_proj(expected.transpose(1, 2).flatten(2)), y)
    assert not attention.weights.requires_grad
    assert (attention.weights.triu(1) == 0).all()
    torch.testing.assert_close(attention.weights.sum(dim=3), torch.ones(3, 2, 15))


def logits_by_torch(args, model, x, dropout):
    """Return the model's logits by torch's own functions, with its weights."""
    w = dict(model.named_parameters())

    def linear(t, name):
        return F.linear(t, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(t, name):
        return F.layer_norm(t, t.shape[2:], w[f"{name}.weight"], w[f"{name}.bias"])

    t = F.dropout(w["wte.weight"][x] + w["wpe.weight"][: x.shape[1]], dropout)
    for h in (f"h.{i}" for i in range(args.n_layer)):
        parts = linear(norm(t, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (args.n_head, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        t = t + F.dropout(linear(y, f"{h}.attn.c_proj"), dropout)
        y = F.gelu(linear(norm(t, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        t = t + F.dropout(linear(y, f"{h}.mlp.c_proj"), dropout)
    return F.linear(F.dropout(norm(t, "ln_f"), dropout), w["wte.weight"], w["lm_head.bias"])


@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_torchs_dropout_included(training):
    args, model = random_model("--n_layer", "3", "--dropout", "0.3")
    x = torch.randint(16, (4, 11))
    torch.manual_seed(1)
    ours = model.train(training)(x)
    torch.manual_seed(1)
    expected = logits_by_torch(args, model, x, 0.3 * training)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_untrained_weights_are_small_and_tied():
    torch.manual_seed(0)
    args = small_args("--n_embd", "64", "--n_layer", "3", "--block_size", "99")
    model = induction.GPT(args, 99)
    assert model.lm_head.weight is model.wte.weight
    for block in model.h:
        assert block.mlp.c_fc.weight.shape == block.mlp.c_proj.weight.T.shape == (256, 64)
        for layer in (block.attn, block.mlp):
            assert layer.c_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    for table in (model.wte, model.wpe):
        assert table.weight.shape == (99, 64)
        assert table.weight.std().item() == pytest.approx(0.05, rel=0.1)


def test_scores_are_brute_force_means_of_the_weights():
    args, model = random_model("--n_layer", "3")
    x, y = induction.make_sequences(args, 20, 2, 6)
    previous, copying = induction.head_scores(model, x, y)
    assert previous.shape == copying.shape == (3, 2)
    for layer in range(3):
        for head in range(2):
            w = model.h[layer].attn.weights[:, head].tolist()
            before = [w[b][t][t - 1] for b in range(20) for t in range(1, 15)]
            assert previous[layer, head].item() == pytest.approx(sum(before) / len(before))
            known = [(b, t) for b in range(20) for t in range(15) if y[b, t] >= 0]
            behind = [sum(w[b][t][j + 1] for j in range(t) if x[b, j] == x[b, t]) for b, t in known]
            assert copying[layer, head].item() == pytest.approx(sum(behind) / len(behind))


def induction_circuit(args):
    """Return a model with weights written by hand: the two heads of the docstring, nothing else.

    Token and position have coordinates of their own in the residual stream, all one-hot; so have
    the token before (written by the first layer) and the answer (written by the second).
    """
    V, T = args.vocab_size, args.block_size
    model = induction.GPT(args, V)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.lm_head.weight = nn.Parameter(torch.zeros(V, args.n_embd))  # not tied
    token, place = slice(0, V), slice(V, V + T)
    before, answer = slice(V + T, 2 * V + T), slice(2 * V + T, 3 * V + T)
    q, k, v = (slice(i * args.n_embd, (i + 1) * args.n_embd) for i in range(3))
    eye, shift = torch.eye(V), torch.eye(T).roll(1, 0)  # shift: position t asks for t - 1
    with torch.no_grad():
        model.wte.weight[:, token] = eye
        model.wpe.weight[:, place] = torch.eye(T)
        first, second = (block.attn for block in model.h)
        first.c_attn.weight[q][place, place] = 1000 * shift.T
        first.c_attn.weight[k][place, place] = torch.eye(T)
        first.c_attn.weight[v][token, token] = eye
        first.c_proj.weight[before, token] = eye
        second.c_attn.weight[q][token, token] = 1000 * eye
        second.c_attn.weight[k][token, before] = eye
        second.c_attn.weight[k][token, V] = -1  # position 0 has no token before it
        second.c_attn.weight[v][token, token] = eye
        second.c_proj.weight[answer, token] = eye
        model.lm_head.weight[:, answer] = 100 * eye
    for block in model.h:
        block.ln_1 = block.ln_2 = nn.Identity()
    model.ln_f = nn.Identity()
    return model


@pytest.mark.parametrize("period", [3, 5, 11, 13])
def test_two_heads_written_by_hand_copy_whatever_the_period(period):
    args = small_args("--n_embd", "64", "--n_head", "1")
    model = induction_circuit(args)
    x, y = induction.make_sequences(args, 50, period, period)
    result = induction.evaluate(model, x, y, "test")
    assert result["test_loss"] < 1e-3 and result["test_accuracy"] == 1
    previous, copying = induction.head_scores(model, x, y)
    assert previous[0, 0] > 0.99 and copying[1, 0] > 0.99
    assert previous[1, 0] < 0.5 and copying[0, 0] < 0.5


def test_evaluation_counts_the_known_targets_only():
    args, model = random_model("--dropout", "0.5")
    x, y = induction.make_sequences(args, 20, 2, 6)
    modes = set()
    model.register_forward_pre_hook(lambda *_: modes.add((model.training, torch.is_grad_enabled())))
    result = induction.evaluate(model.train(), x, y, "test")
    induction.head_scores(model, x, y)
    assert model.training and modes == {(False, False)}
    log_p = model.eval()(x).log_softmax(dim=2)
    known = [(b, t) for b in range(20) for t in range(15) if y[b, t] >= 0]
    losses = [-log_p[b, t, y[b, t]].item() for b, t in known]
    right = [log_p[b, t].argmax() == y[b, t] for b, t in known]
    assert result["test_loss"] == pytest.approx(sum(losses) / len(known), rel=1e-4)
    assert result["test_accuracy"] == pytest.approx(sum(right).item() / len(known))


# ---------- training ----------


def tiny_args(standins, out_dir, *flags):
    return induction.parse_args([*tiny_flags(NAME, standins, out_dir), *flags])


def test_ascending_integers_take_one_layer(standins, tmp_path, monkeypatch):
    adam = torch.optim.Adam  # needs no compiling
    monkeypatch.setattr(induction, "OptaxOptimizer", lambda params, tx: adam(params, 0.02))
    flags = "--task ascending --n_layer 1 --max_iters 60 --eval_interval 60"
    final = induction.train(tiny_args(standins, tmp_path, *flags.split()))
    assert final["test_loss"] < 0.05 and final["longer_loss"] < 0.05


def test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices(
    standins, tmp_path, monkeypatch, capsys
):
    """Everything logged, printed and drawn is that of torch's AdamW on the same random numbers."""
    pictures, figures, clock = [], [], itertools.count(100)
    monkeypatch.setattr(induction, "draw_attention", lambda *args: pictures.append(args))
    monkeypatch.setattr(induction, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    plot = induction.plot_run.__globals__
    monkeypatch.setattr(plot["plt"], "close", figures.append)
    flags = "--max_iters 8 --eval_interval 3 --warmup_iters 2 --learning_rate 0.01 --seed 5"
    flags += " --weight_decay 3 --dropout 0.2"
    args = tiny_args(standins, tmp_path / "new" / "out", *flags.split())
    final = induction.train(args)
    printed = capsys.readouterr().out.splitlines()
    lines = (args.out_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert final == records[-1]

    torch.manual_seed(5)
    test_set = induction.make_sequences(args, 256, 3, 7)
    longer_set = induction.make_sequences(args, 256, 8, 14)
    model = induction.GPT(args, 16)
    first = {name: weights.clone() for name, weights in model.state_dict().items()}
    groups = [{"params": [], "weight_decay": 3.0}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        groups[p.ndim < 2]["params"].append(p)
    optimizer, expected = torch.optim.AdamW(groups, betas=(0.9, 0.99)), []
    for i in range(9):
        lr = 0.01 * (i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 6)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if i in (0, 3, 6, 8):
            record = {"iter": i, "seconds": len(expected) + 1, "learning_rate": lr}
            for name, (x, y) in (("test", test_set), ("longer", longer_set)):
                logits = logits_by_torch(args, model, x, 0.0)[y >= 0]
                record[f"{name}_loss"] = F.cross_entropy(logits, y[y >= 0]).item()
                right = (logits.argmax(dim=1) == y[y >= 0]).float()
                record[f"{name}_accuracy"] = right.mean().item()
            scores = [s.max().item() for s in induction.head_scores(model, *test_set)]
            expected.append(record | dict(zip(("previous", "induction"), scores)))
        if i < 8:
            x, y = induction.make_sequences(args, 8, 3, 7)
            optimizer.zero_grad()
            F.cross_entropy(logits_by_torch(args, model, x, 0.2)[y >= 0], y[y >= 0]).backward()
            optimizer.step()
    assert len(records) == len(expected)
    for record, known in zip(records, expected):
        rough = [key for key in known if "accuracy" in key]  # one of about 1500 may turn
        assert {key: record.pop(key) for key in rough} == pytest.approx(
            {key: known.pop(key) for key in rough}, abs=0.002
        )
        assert record == pytest.approx(known, rel=1e-4, abs=1e-7)
    ((given, trained, *pair),) = pictures
    assert given is args and all(map(torch.equal, pair, test_set))
    for name, weights in trained.state_dict().items():
        last, start = model.state_dict()[name], first[name]
        if name.endswith("c_attn.bias"):  # softmax ignores a key's bias: its gradient is rounding
            weights, last, start = (w.view(3, -1)[[0, 2]] for w in (weights, last, start))
        assert (weights - last).norm() <= 0.01 * (last - start).norm(), name

    records = [json.loads(line) for line in lines]
    for record in records:
        assert "  ".join(f"{key} {value:.5g}" for key, value in record.items()) in printed
    assert printed[-2] == f"test loss {final['test_loss']:.4f} nats per token after 4 s"
    assert printed[-1] == f"picture: {args.out_dir / 'loss.png'}"
    for axis, panel in zip(figures[0].axes, plot["PANELS"]):
        shown = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for key in panel["curves"]:
            assert shown[key] == [[r["iter"], r[key]] for r in records]
    saved = json.loads((args.out_dir / "args.json").read_text())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    assert saved == vars(args) | {"out_dir": str(args.out_dir)} | versions
    monkeypatch.undo()
    plot["plt"].close(figures[0])


def test_warm_up_is_cut_to_the_run(standins, tmp_path, monkeypatch):
    monkeypatch.setattr(induction, "OptaxOptimizer", Idle)
    monkeypatch.setattr(induction, "draw_attention", lambda *args: None)
    flags = "--max_iters 4 --eval_interval 1 --learning_rate 0.01"
    induction.train(tiny_args(standins, tmp_path, *flags.split()))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == pytest.approx([0, 1 / 300, 2 / 300, 0.01, 0], abs=1e-6)


@pytest.mark.parametrize(("vocab_size", "block_size"), [(14, 20), (20, 15)])
def test_the_picture_shows_the_best_heads_and_the_loss_by_period(
    vocab_size, block_size, monkeypatch, tmp_path
):
    sizes = ["--vocab_size", str(vocab_size), "--block_size", str(block_size)]
    flags = [*sizes, "--period_min", "3", "--n_layer", "3", "--dropout", "0.5"]
    args, model = random_model(*flags, "--out_dir", str(tmp_path))
    real, asked, figures = induction.make_sequences, [], []

    def make_sequences(*given):
        asked.append((given, real(*given)))
        return asked[-1][1]

    monkeypatch.setattr(induction, "make_sequences", make_sequences)
    monkeypatch.setattr(induction.plt, "close", figures.append)
    x, y = real(args, 20, 4, 4)
    induction.draw_attention(args, model, x, y)
    *maps, third = figures[0].axes
    for axis, scores, name in zip(
        maps, induction.head_scores(model, x, y), ("previous-token", "induction")
    ):
        layer, head = (scores == scores.max()).nonzero()[0].tolist()
        image = axis.images[0]
        shown = torch.from_numpy(image.get_array().data)
        torch.testing.assert_close(shown, model.h[layer].attn.weights[0, head])
        assert (image.norm.vmin, image.norm.vmax, image.get_cmap().name) == (0, 1, "Blues")
        assert axis.get_title() == f"best {name} head: layer {layer + 1}, score {scores.max():.2f}"
        assert axis.get_xlabel() == "position attended to" and axis.get_ylabel() == "position"
    assert [given for given, _ in asked] == [(args, 64, p, p) for p in range(2, 15)]
    losses = [induction.evaluate(model, *pair, "a")["a_loss"] for _, pair in asked]
    shown, chance = third.lines
    assert shown.get_xydata().tolist() == [[p, loss] for p, loss in zip(range(2, 15), losses)]
    assert chance.get_xydata().tolist() == [[p, math.log(p - 1)] for p in range(2, 15)]
    assert chance.get_linestyle() == "--" and chance.get_color() == "gray"
    (span,) = third.patches
    assert (span.get_x(), span.get_x() + span.get_width(), span.get_alpha()) == (3, 7, 0.15)
    labels = ["loss", "log(period - 1): chance", "periods in training"]
    assert [text.get_text() for text in third.get_legend().get_texts()] == labels
    assert third.get_xlabel() == "period (tokens)" and third.get_ylim()[0] == 0
    assert third.get_ylabel() == "loss (nats per token)"
    assert imread(tmp_path / "attention.png").shape[:2] == (300, 900)
    monkeypatch.undo()
    induction.plt.close(figures[0])


# ---------- input ----------


def test_limits_of_numbers_are_inclusive():
    check_number(induction.number)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n_embd 10 --n_head 4", ["--n_embd 10", "--n_head 4"]),
        ("--period_min 9 --period_max 8", ["--period_min 9", "--period_max 8"]),
        ("--period_max 33", ["--period_max 33", "--vocab_size 32", "--block_size 32"]),
        ("--vocab_size 29", ["--period_max 15", "--vocab_size 29"]),
        ("--block_size 30", ["--period_max 15", "--block_size 30"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(flags, words, tmp_path):
    code, errors = run_main(NAME, *flags.split(), "--out_dir", tmp_path / "out")
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert all(word in errors for word in words)
    assert not (tmp_path / "out").exists()
