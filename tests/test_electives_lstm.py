"""The elective lstm: the cells are torch's, the state is carried on, the gradient is cut off."""

import argparse
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import Idle, check_number, check_warm_up, watched_run
from steps import load_plot, load_step, run_main, tiny_flags

NAME = "electives/lstm"
lstm = load_step(NAME)
CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def small_args(*flags):
    return lstm.parse_args(["--n_embd", "6", "--n_hidden", "5", "--block_size", "8", *flags])


def small_model(*flags):
    torch.manual_seed(0)
    model = lstm.WordRNN(small_args(*flags), vocab_size=30)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def small_ids(n):
    return torch.randint(30, (n,), generator=torch.Generator().manual_seed(0))


def torchs_layer(layer, cell):
    """Return torch's recurrent layer with the weights of ours."""
    theirs = CELLS[cell](layer.x2h.in_features, layer.h2h.in_features, batch_first=True)
    parts = {"ih_l0": layer.x2h, "hh_l0": layer.h2h}
    theirs.load_state_dict(
        {f"{kind}_{n}": getattr(p, kind) for n, p in parts.items() for kind in ("weight", "bias")}
    )
    return theirs


# ---------- the cells ----------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("has_state", [False, True])
def test_outputs_state_and_gradients_equal_torchs(cell, has_state):
    torch.manual_seed(0)
    layer = lstm.RecurrentLayer(cell, 6, 5)
    theirs = torchs_layer(layer, cell)
    x = torch.randn(3, 7, 6, requires_grad=True)
    state = [torch.randn(3, 5, requires_grad=True) for _ in range(layer.n_states)]
    hidden = [s[None] for s in state]
    hidden = tuple(hidden) if cell == "lstm" else hidden[0]
    own, own_state = layer(x, state) if has_state else layer(x)
    reference, last = theirs(x, hidden) if has_state else theirs(x)
    torch.testing.assert_close(own, reference)
    for ours, other in zip(own_state, last if cell == "lstm" else [last]):
        torch.testing.assert_close(ours, other[0])
    of = [x, *state] if has_state else [x]
    weights = torch.randn_like(own)
    own_gradients = torch.autograd.grad((own * weights).sum(), [*of, *layer.parameters()])
    expected = torch.autograd.grad((reference * weights).sum(), [*of, *theirs.parameters()])
    shapes = [[p.shape for p in side] for side in (own_gradients, expected)]
    order = [0] if not has_state else list(range(len(of)))
    order += [len(order) + i for i in (0, 2, 1, 3)]  # torch lists both weights, then both biases
    assert [shapes[0][i] for i in order] == shapes[1]
    for i, gradient in zip(order, expected):
        torch.testing.assert_close(own_gradients[i], gradient)


@pytest.mark.parametrize("cell", CELLS)
def test_a_window_cut_in_two_with_carried_state_is_one_window(cell):
    model = small_model("--cell", cell)
    x = small_ids(24).view(2, 12)
    logits, state = model(x)
    first, middle = model(x[:, :5])
    second, last = model(x[:, 5:], middle)
    torch.testing.assert_close(torch.cat([first, second], dim=1), logits)
    for ours, other in zip(last, state):
        torch.testing.assert_close(ours, other)
    assert not torch.allclose(model(x[:, 5:])[0], second)  # or the state would be of no effect


def test_forget_gate_1_and_input_gate_0_keep_the_cell():
    torch.manual_seed(0)
    layer = lstm.RecurrentLayer("lstm", 6, 5)
    with torch.no_grad():
        layer.x2h.bias[:5] = -100.0  # input gate
        layer.x2h.bias[5:10] = 100.0  # forget gate
    h, c = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True)
    _, (_, after) = layer(torch.randn(3, 50, 6), (h, c))
    assert torch.equal(after, c)
    (gradient,) = torch.autograd.grad(after.sum(), c)
    assert torch.equal(gradient, torch.ones(3, 5))  # the gradient comes through 50 words unchanged


def test_the_forget_gate_starts_open():
    torch.manual_seed(0)
    layer = lstm.RecurrentLayer("lstm", 6, 5)
    assert torch.equal(layer.x2h.bias[5:10], torch.ones(5))
    assert (layer.x2h.bias[[*range(5), *range(10, 20)]].abs() < 1).all()


def test_update_gate_1_keeps_the_state_of_the_gru():
    torch.manual_seed(0)
    layer = lstm.RecurrentLayer("gru", 6, 5)
    with torch.no_grad():
        layer.x2h.bias[5:10] = 100.0
    h = torch.randn(3, 5)
    _, (after,) = layer(torch.randn(3, 50, 6), (h,))
    assert torch.equal(after, h)


# ---------- data ----------


def test_each_row_continues_where_it_stopped():
    batches = lstm.minibatches(torch.arange(103), 4, 6)
    rows = [next(batches) for _ in range(20)]
    for x, y in rows:
        assert x.shape == y.shape == (4, 6)
        assert torch.equal(y, (x + 1) % 103)  # after the last word comes the first
    text = torch.cat([x for x, _ in rows], dim=1)  # (4, 120)
    for b, start in enumerate((0, 25, 51, 77)):
        assert torch.equal(text[b], (start + torch.arange(120)) % 103)


TEXTS = ["the sea, the end. " * 5, "a " * 20, "a " * 9, "a " * 8, "b c d e f g h i j k l m", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_those_of_step_12_and_not_too_few(text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    outcomes = []
    for step in (lstm, load_step("12")):
        try:
            args = step.parse_args(["--input", str(tmp_path / "text.txt"), "--block_size", "8"])
            *ids, vocab = step.load_data(args)
            outcomes.append([*(x.tolist() for x in ids), vocab])
        except argparse.ArgumentTypeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert isinstance(outcomes[0], str) == (text not in TEXTS[:2])


# ---------- evaluation ----------


@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 700])
def test_evaluation_is_the_mean_over_words_each_after_its_context(n):
    """Brute force: every part is read from 8 words before it to its end."""
    args, ids = small_args("--dropout", "0.5"), small_ids(8 + n)
    model = small_model("--dropout", "0.5")
    size = math.ceil(n / 32)
    losses = []
    for i in range(8, len(ids)):
        start = (i - 8) // size * size
        logits, _ = model(ids[None, start:i])
        losses.append(F.cross_entropy(logits[0, -1], ids[i]).item())
    modes = set()
    model.register_forward_pre_hook(lambda *_: modes.add((model.training, torch.is_grad_enabled())))
    loss = lstm.evaluate(args, model.train(), ids, "test")["test_loss"]
    assert loss == pytest.approx(sum(losses) / n, rel=1e-4)
    assert model.training and modes == {(False, False)}


def test_gradient_norms_are_those_of_single_windows():
    model, ids = small_model(), small_ids(500)
    norms = torch.zeros(65)
    for start in range(64):
        window = ids[(start * 500 // 64 + torch.arange(66)) % 500]
        embeddings = model.wte(window[None, :-1]).detach().requires_grad_()
        h, _ = model.rnn(embeddings)
        logits = model.lm_head(model.ln_f(model.c_proj(h)))[0, -1]
        F.cross_entropy(logits, window[-1]).backward()
        norms += embeddings.grad[0].norm(dim=1)
    expected = {f"gradient_{k}": (norms[64 - k] / norms[64]).item() for k in lstm.DISTANCES}
    assert [*expected] == [f"gradient_{k}" for k in (1, 2, 4, 8, 16, 32, 64)]
    assert lstm.gradient_norms(model.train(), ids) == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert model.training and not model.wte._forward_hooks


def test_the_gradient_reaches_far_where_the_forget_gate_is_open():
    model, ids = small_model(), small_ids(500)
    for p in model.rnn.parameters():
        nn.init.normal_(p, std=0.1)  # forget gate: about 1 / 2
    assert lstm.gradient_norms(model, ids)["gradient_64"] < 1e-6
    with torch.no_grad():
        model.rnn.x2h.bias[5:10] = 7.0  # forget gate: about 0.999
    norms = lstm.gradient_norms(model, ids)
    assert norms["gradient_64"] > 0.8 * norms["gradient_4"] > 1e-3


# ---------- training ----------


def logits_by_torch(model, x, state, dropout=0.0):
    """Return the model's logits and last state by torch's LSTM, with the model's weights."""
    layer = model.rnn
    parts = [layer.x2h.weight, layer.h2h.weight, layer.x2h.bias, layer.h2h.bias]
    state = state or (torch.zeros(1, len(x), layer.h2h.in_features),) * 2
    x = F.dropout(F.embedding(x, model.wte.weight), dropout)
    x, *state = torch.lstm(x, state, parts, True, 1, 0.0, False, False, True)
    proj, norm = model.c_proj, model.ln_f
    x = F.linear(F.dropout(x.contiguous(), dropout), proj.weight, proj.bias)
    x = F.dropout(F.layer_norm(x, x.shape[2:], norm.weight, norm.bias), dropout)
    return F.linear(x, model.wte.weight, model.lm_head.bias), state


@torch.no_grad()
def loss_by_torch(args, model, ids):
    """Return the mean loss of words; each of 32 parts is read from a context before it."""
    context, losses = args.block_size, []
    size = math.ceil((len(ids) - context) / 32)
    for start in range(0, len(ids) - context, size):
        part = ids[start : start + context + size]
        logits = logits_by_torch(model, part[None], None)[0][0]
        log_p = logits.log_softmax(dim=1)[context - 1 : -1]
        losses += log_p[range(len(log_p)), part[context:]].tolist()
    assert len(losses) == len(ids) - context
    return -sum(losses) / len(losses)


@torch.no_grad()
def sample_by_torch(args, model, words, vocab):
    """Return a sample; everything is read once more for each word."""
    ids, generator = [vocab.index(w) for w in words], torch.Generator().manual_seed(args.seed)
    for _ in range(args.max_new_tokens):
        logits = logits_by_torch(model, torch.tensor([ids]), None)[0][0, -1]
        likely = 1 + logits[1:].topk(min(args.top_k or 999, len(vocab) - 1)).indices  # no <unk>
        p = torch.zeros(len(vocab))
        p[likely] = (logits[likely] / args.temperature).softmax(0)
        ids.append(torch.multinomial(p, 1, generator=generator).item())
    return lstm.join_words(vocab[i] for i in ids)


def test_training_is_truncated_backpropagation_through_time_with_adamw(
    standins, tmp_path, monkeypatch
):
    """Everything logged and written is that of torch's LSTM and AdamW, window by window."""
    text = (standins / "shakespeare" / "input.txt").read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "samples.txt").write_text("of an earlier run")
    models, norms, gradient_norms = [], [], lstm.gradient_norms

    def spy(model, ids):
        models.append(model)
        norms.append((ids, gradient_norms(model, ids)))
        return norms[-1][1]

    monkeypatch.setattr(lstm, "gradient_norms", spy)
    flags = "--max_iters 8 --eval_interval 3 --warmup_iters 2 --learning_rate 0.01 --seed 5"
    flags += " --weight_decay 3 --dropout 0.3 --batch_size 7 --block_size 8 --n_embd 16"
    flags += " --n_hidden 12 --max_new_tokens 12 --temperature 0.7 --top_k 3"
    flags = [*flags.split(), "--input", tmp_path / "text.txt", "--prompt", "the zyx king"]
    args, records = watched_run(lstm, *flags, "--out_dir", tmp_path)

    torch.manual_seed(5)
    ids, test_ids, vocab = lstm.load_data(args)
    model = lstm.WordRNN(args, len(vocab))
    counts = Counter(ids.tolist())
    shares = [(counts[i] + 0.5) / (len(ids) + len(vocab) / 2) for i in range(len(vocab))]
    model.lm_head.bias.data = torch.tensor(shares).log()
    first = {name: weights.clone() for name, weights in model.state_dict().items()}
    groups = [{"params": [], "weight_decay": 3.0}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        groups[p.ndim < 2]["params"].append(p)
    optimizer, state = torch.optim.AdamW(groups, betas=(0.9, 0.99)), None
    starts = [row * len(ids) // 7 for row in range(7)]
    evaluated = iter(records)
    for i in range(9):
        lr = 0.01 * (i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 6)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if i in (0, 3, 6, 8):
            record = next(evaluated)
            expected = {"iter": i, "seconds": record["seconds"], "learning_rate": lr}
            expected["train_loss"] = loss_by_torch(args, model, ids[: len(test_ids)])
            expected["test_loss"] = loss_by_torch(args, model, test_ids)
            read, gradients = norms[records.index(record)]
            assert torch.equal(read, ids)
            assert record == pytest.approx(expected | gradients, rel=1e-4, abs=1e-7)
        if i < 8:
            windows = torch.stack([ids[(s + 8 * i + torch.arange(9)) % len(ids)] for s in starts])
            logits, state = logits_by_torch(model, windows[:, :-1], state, 0.3)
            state = tuple(s.detach() for s in state)
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
            optimizer.step()
    for name, weights in models[-1].state_dict().items():
        last = model.state_dict()[name]
        assert (weights - last).norm() <= 0.01 * (last - first[name]).norm(), name

    written = (tmp_path / "samples.txt").read_text()
    heads = [f"=== iter {r['iter']}, test_loss {r['test_loss']:.4f}" for r in records]
    assert [line for line in written.splitlines() if line.startswith("===")] == heads
    sample = sample_by_torch(args, models[-1], ["the", "<unk>", "king"], vocab)
    assert written.startswith(heads[0]) and sample.startswith("the <unk> king")
    assert written.endswith(f"{heads[-1]}\n{sample}\n\n")


def test_warm_up_can_be_none_and_is_cut_to_the_run(standins, tmp_path, monkeypatch):
    check_warm_up(lstm, monkeypatch, *tiny_flags(NAME, standins, tmp_path), "--max_new_tokens", 0)


def test_untrained_weights_are_small_and_tied():
    torch.manual_seed(0)
    model = lstm.WordRNN(lstm.parse_args(["--n_embd", "64", "--n_hidden", "32"]), 99)
    assert model.lm_head.weight is model.wte.weight and model.wte.weight.shape == (99, 64)
    assert model.wte.weight.std().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns_what_only_the_state_can_tell(cell, standins, tmp_path, monkeypatch):
    """After every second word, which is "a", the next word is that after the last but one."""
    (tmp_path / "text.txt").write_text("a b a c a d a e " * 60)
    adam = torch.optim.Adam  # needs no compiling
    monkeypatch.setattr(lstm, "OptaxOptimizer", lambda params, tx: adam(params, 0.01))
    flags = [*tiny_flags(NAME, standins, tmp_path), "--cell", cell, "--dropout", "0"]
    flags += ["--input", str(tmp_path / "text.txt"), "--max_iters", "160", "--eval_interval", "160"]
    final = lstm.train(lstm.parse_args(flags))
    assert final["test_loss"] < 0.1  # without the state: log(4) / 2 = 0.69
    assert json.loads((tmp_path / "args.json").read_text())["cell"] == cell


def test_dropout_is_on_in_training_only():
    model, x = small_model("--dropout", "0.5"), small_ids(8)[None]
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


# ---------- sampling ----------


@pytest.mark.parametrize("top_k", ["0", "3", "99"])
def test_sampling_carries_the_state(top_k, monkeypatch):
    """The text is that of reading everything again for each word, but each word is read once."""
    model, read, vocab = small_model(), [], [f"w{i}" for i in range(30)]
    model.lm_head.bias.data[0] = 99  # <unk> is never sampled, however likely
    flags = ["--max_new_tokens", "12", "--temperature", "0.7", "--prompt", "w1 w2 w3"]
    args = small_args("--top_k", top_k, *flags)
    real = lstm.WordRNN.forward

    def forward(model, x, state=None):
        read.append(x.shape[1])
        assert not model.training and not torch.is_grad_enabled()
        return real(model, x, state)

    monkeypatch.setattr(lstm.WordRNN, "forward", forward)
    text = lstm.sample(args, model.train(), vocab)
    assert model.training
    assert read[:12] == [3] + [1] * 11
    assert text == sample_by_torch(args, model, ["w1", "w2", "w3"], vocab)


def test_an_empty_prompt_is_a_newline():
    args = small_args("--prompt", "", "--max_new_tokens", "0")
    assert lstm.sample(args, small_model(), [*map(str, range(9)), "\n"]) == "\n"


# ---------- input ----------


def assert_one_line(errors, *words):
    assert len(errors.strip().splitlines()) == 1, errors
    assert all(str(word) in errors for word in words)


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe\x00 bytes " * 200])
def test_a_bad_text_is_named(content, tmp_path):
    (tmp_path / "bad.txt").write_bytes(content)
    code, errors = run_main(NAME, "--input", tmp_path / "bad.txt", "--out_dir", tmp_path / "out")
    assert code == 2
    assert_one_line(errors, "--input")
    assert not (tmp_path / "out").exists()


def test_a_short_text_is_enough(standins, tmp_path, monkeypatch):
    monkeypatch.setattr(lstm, "OptaxOptimizer", Idle)
    (tmp_path / "short.txt").write_text("to be or not to be " * 10)
    flags = tiny_flags(NAME, standins, tmp_path / "new" / "out")
    flags += ["--input", tmp_path / "short.txt"]
    final = lstm.train(lstm.parse_args([str(flag) for flag in flags]))
    assert math.isfinite(final["test_loss"]) and 0 < final["seconds"] < 100


def test_limits_of_numbers_are_inclusive():
    check_number(lstm.number)


def test_gradients_of_finished_runs_are_drawn(tmp_path, monkeypatch):
    for cell in CELLS:
        (tmp_path / cell).mkdir()
        (tmp_path / cell / "args.json").write_text(json.dumps({"cell": cell}))
        record = {"iter": 1, "test_loss": 4.0, "gradient_1": 0.5, "gradient_64": 0.25}
        (tmp_path / cell / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(load_plot(NAME).plt, "close", figures.append)
    assert run_main(NAME, *CELLS, script="gradients.py") == (0, "")
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")
    lines = figures[0].axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[1.0, 0.5], [64.0, 0.25]]] * 3
    assert [line.get_label().split(",")[0] for line in lines] == list(CELLS)
    code, errors = run_main(NAME, tmp_path / "none", script="gradients.py")
    assert code == 2
    assert_one_line(errors, tmp_path / "none")


# ---------- real data ----------


@pytest.mark.data
def test_tiny_shakespeare_is_cut_as_in_step_12_and_learned(real_data, tmp_path):
    flags = ["--data_dir", str(real_data), "--max_iters", "300", "--eval_interval", "300"]
    args = lstm.parse_args([*flags, "--out_dir", str(tmp_path)])
    train_ids, test_ids, vocab = lstm.load_data(args)
    counts = len(train_ids), len(test_ids) - args.block_size, len(vocab)
    assert counts == (263144, 30449, 7115)
    assert 90 < math.exp(lstm.train(args)["test_loss"]) < 200
