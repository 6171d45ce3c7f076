"""The elective induction: sequences that repeat, heads that find what came next, what fails."""

import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
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
    result = induction.evaluate(model.train(), x, y, "test")
    assert model.training
    log_p = model.eval()(x).log_softmax(dim=2)
    known = [(b, t) for b in range(20) for t in range(15) if y[b, t] >= 0]
    losses = [-log_p[b, t, y[b, t]].item() for b, t in known]
    right = [log_p[b, t].argmax() == y[b, t] for b, t in known]
    assert result["test_loss"] == pytest.approx(sum(losses) / len(known), rel=1e-4)
    assert result["test_accuracy"] == pytest.approx(sum(right).item() / len(known))


# ---------- training ----------


def tiny_args(standins, out_dir, *flags):
    return induction.parse_args([*tiny_flags(NAME, standins, out_dir), *flags])


def test_ascending_integers_take_one_layer(standins, tmp_path):
    flags = ["--task", "ascending", "--n_layer", "1", "--max_iters", "60", "--warmup_iters", "5"]
    final = induction.train(tiny_args(standins, tmp_path, *flags, "--learning_rate", "0.02"))
    assert final["test_loss"] < 0.05 and final["longer_loss"] < 0.05


def test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices(
    standins, tmp_path, monkeypatch
):
    """`train` ends with the parameters that torch's AdamW finds on the same minibatches."""
    flags = "--max_iters 12 --eval_interval 12 --warmup_iters 4 --learning_rate 0.01"
    args = tiny_args(standins, tmp_path, *flags.split(), "--weight_decay", "3")
    batches, params, real = [], [], induction.minibatches

    def minibatches(args):
        for batch in real(args):
            batches.append(batch)
            yield batch

    class Recorded(induction.OptaxOptimizer):
        def __init__(self, mine, tx):
            mine = list(mine)
            params.append([p.detach().clone() for p in mine])
            params.append(mine)
            super().__init__(mine, tx)

    monkeypatch.setattr(induction, "minibatches", minibatches)
    monkeypatch.setattr(induction, "OptaxOptimizer", Recorded)
    induction.train(args)
    first, trained = params
    model = induction.GPT(args, args.vocab_size)
    groups = [{"params": [], "weight_decay": 3.0}, {"params": [], "weight_decay": 0.0}]
    for p, value in zip(model.parameters(), first):
        p.data = value
        groups[p.ndim < 2]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for i, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (i / 4 if i < 4 else (1 + math.cos(math.pi * (i - 4) / 8)) / 2)
        log_p, known = model(x).log_softmax(dim=2), y >= 0
        optimizer.zero_grad()
        (-log_p[known].gather(1, y[known][:, None]).mean()).backward()
        optimizer.step()
    assert len(batches) == 12
    other = induction.GPT(args, args.vocab_size)
    for p, value in zip(other.parameters(), trained):
        p.data = value
    torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-3)


def test_the_longer_periods_are_not_trained_on(standins, tmp_path, monkeypatch):
    asked, real = [], induction.make_sequences

    def make_sequences(args, n, low, high):
        asked.append((n, low, high))
        return real(args, n, low, high)

    monkeypatch.setattr(induction, "make_sequences", make_sequences)
    args = tiny_args(standins, tmp_path)
    induction.train(args)
    low, high = args.period_min, args.period_max
    assert asked[:2] == [(256, low, high), (256, high + 1, 2 * high)]
    trained = asked[2 : 2 + args.max_iters]
    assert trained == [(args.batch_size, low, high)] * args.max_iters
    drawn = asked[2 + args.max_iters :]  # for the picture
    assert [case[1:] for case in drawn] == [(p, p) for p in range(2, 16)]


def test_the_picture_shows_the_best_heads_and_the_loss_by_period(monkeypatch, tmp_path):
    args = small_args("--n_embd", "64", "--n_head", "1", "--out_dir", str(tmp_path))
    model, figures = induction_circuit(args), []
    monkeypatch.setattr(induction.plt, "close", figures.append)
    x, y = induction.make_sequences(args, 20, 4, 4)
    induction.draw_attention(args, model, x, y)
    first, second, third = figures[0].axes
    for axis, layer in ((first, 0), (second, 1)):
        induction.head_scores(model, x, y)
        shown = torch.from_numpy(axis.images[0].get_array().data)
        torch.testing.assert_close(shown, model.h[layer].attn.weights[0, 0])
        assert f"layer {layer + 1}, score " in axis.get_title()
    periods, losses = third.lines[0].get_data()
    assert list(periods) == list(range(2, 15)) and max(losses) < 1e-3
    assert third.lines[1].get_ydata()[0] == pytest.approx(math.log(2))
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    induction.plt.close(figures[0])


def test_evaluation_and_pictures_do_not_disturb_training(standins, tmp_path):
    finals = []
    for interval in ("3", "6"):
        args = tiny_args(standins, tmp_path / interval, "--eval_interval", interval)
        finals.append(induction.train(args))
        del finals[-1]["seconds"]
    assert finals[0] == finals[1]
    assert (tmp_path / "3" / "attention.png").exists()
    lines = (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == [0, 3, 6]


# ---------- input ----------


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
