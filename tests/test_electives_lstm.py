"""The elective lstm: the cells are torch's, the state is carried on, the gradient is cut off."""

import itertools
import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
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
    batches = lstm.minibatches(torch.arange(100), 4, 6)
    rows = [next(batches) for _ in range(20)]
    for x, y in rows:
        assert x.shape == y.shape == (4, 6)
        assert torch.equal(y, (x + 1) % 100)  # after the last word comes the first
    text = torch.cat([x for x, _ in rows], dim=1)  # (4, 120)
    for b, start in enumerate((0, 25, 50, 75)):
        assert torch.equal(text[b], (start + torch.arange(120)) % 100)


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
    loss = lstm.evaluate(args, model.train(), ids, "test")["test_loss"]
    assert loss == pytest.approx(sum(losses) / n, rel=1e-4)
    assert model.training


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
    assert lstm.gradient_norms(model.train(), ids) == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert model.training


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


def reference_model(args, params, vocab_size):
    """Return a function from x and the state to the logits, made of torch's own parts."""
    wte, w_x, b_x, w_h, b_h, w_p, b_p, g, b, bias = params
    layer = nn.LSTM(args.n_embd, args.n_hidden, batch_first=True)
    for name, value in zip(("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"),
                           (w_x, b_x, w_h, b_h)):  # fmt: skip
        layer._parameters[name].data = value.clone()
    layer.flatten_parameters()
    others = [p.clone().requires_grad_() for p in (wte, w_p, b_p, g, b, bias)]

    def forward(x, state):
        wte, w_p, b_p, g, b, bias = others
        h, state = layer(wte[x], state)
        return F.linear(F.layer_norm(F.linear(h, w_p, b_p), g.shape, g, b), wte, bias), state

    return forward, [*layer.parameters(), *others]


def test_training_is_truncated_backpropagation_through_time_with_adamw(
    standins, tmp_path, monkeypatch
):
    """`train` ends with the parameters of torch's LSTM, trained on the text window by window."""
    flags = ["--max_iters", "12", "--eval_interval", "4", "--warmup_iters", "4", "--dropout", "0"]
    flags += ["--learning_rate", "0.01", "--weight_decay", "3"]
    args = lstm.parse_args([*tiny_flags(NAME, standins, tmp_path), *flags])
    params = []

    class Recorded(lstm.OptaxOptimizer):
        def __init__(self, mine, tx):
            mine = list(mine)
            params.append([p.detach().clone() for p in mine])
            params.append(mine)
            super().__init__(mine, tx)

    monkeypatch.setattr(lstm, "OptaxOptimizer", Recorded)
    lstm.train(args)
    first, trained = params
    ids, _, vocab = lstm.load_data(args)
    forward, mine = reference_model(args, first, len(vocab))
    groups = [{"params": [], "weight_decay": 3.0}, {"params": [], "weight_decay": 0.0}]
    for p in mine:
        groups[p.ndim < 2]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    state = None
    starts = [row * len(ids) // args.batch_size for row in range(args.batch_size)]
    for i in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (i / 4 if i < 4 else (1 + math.cos(math.pi * (i - 4) / 8)) / 2)
        windows = torch.stack(
            [ids[s + i * args.block_size :][: args.block_size + 1] for s in starts]
        )
        logits, state = forward(windows[:, :-1], state)
        state = tuple(s.detach() for s in state)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wte, w_x, b_x, w_h, b_h, *others = trained
    for p, q in zip([w_x, w_h, b_x, b_h, wte, *others], mine):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_state_is_carried_on_and_detached(standins, tmp_path, monkeypatch):
    args = lstm.parse_args(tiny_flags(NAME, standins, tmp_path))
    seen, real = [], lstm.WordRNN.forward

    def forward(model, x, state=None):
        logits, after = real(model, x, state)
        if model.training:
            seen.append((state, after))
        return logits, after

    monkeypatch.setattr(lstm.WordRNN, "forward", forward)
    lstm.train(args)
    assert len(seen) == args.max_iters
    assert seen[0][0] is None
    for (_, before), (state, _) in itertools.pairwise(seen):
        for carried, kept in zip(state, before):
            assert torch.equal(carried, kept)
            assert kept.requires_grad and not carried.requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns_what_only_the_state_can_tell(cell, standins, tmp_path):
    """After every second word, which is "a", the next word is that after the last but one."""
    (tmp_path / "text.txt").write_text("a b a c a d a e " * 60)
    flags = [*tiny_flags(NAME, standins, tmp_path), "--cell", cell, "--dropout", "0"]
    flags += ["--input", str(tmp_path / "text.txt"), "--max_iters", "100", "--eval_interval", "100"]
    final = lstm.train(lstm.parse_args([*flags, "--learning_rate", "0.02", "--warmup_iters", "5"]))
    assert final["test_loss"] < 0.1  # without the state: log(4) / 2 = 0.69
    assert json.loads((tmp_path / "args.json").read_text())["cell"] == cell


def test_the_untrained_model_is_a_unigram_model(standins, tmp_path):
    flags = [*tiny_flags(NAME, standins, tmp_path), "--max_iters", "1"]
    lstm.train(lstm.parse_args(flags))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    text = (standins / "shakespeare" / "input.txt").read_text()
    words = lstm.split_words(text[: int(0.9 * len(text))])
    counts = torch.tensor([words.count(word) for word in set(words)]) / len(words)
    entropy = -(counts * counts.log()).sum().item()
    assert first["test_loss"] == pytest.approx(entropy, abs=0.25)


def test_train_uses_training_words_and_evaluates_test_words(standins, tmp_path, monkeypatch):
    """Other test words change the test loss and nothing else."""
    args = lstm.parse_args(tiny_flags(NAME, standins, tmp_path / "a"))
    honest = lstm.train(args)
    real = lstm.load_data

    def load_data(args):
        train_ids, test_ids, vocab = real(args)
        return train_ids, test_ids.flip(0), vocab

    monkeypatch.setattr(lstm, "load_data", load_data)
    args.out_dir = tmp_path / "b"
    replaced = lstm.train(args)
    differ = {key for key in honest if honest[key] != replaced[key]}
    assert differ == {"test_loss", "seconds"}


def test_dropout_is_on_in_training_only(standins, tmp_path):
    flags = [*tiny_flags(NAME, standins, tmp_path), "--max_iters", "3", "--eval_interval", "1"]
    with_dropout, without = (
        lstm.train(lstm.parse_args([*flags, "--dropout", p])) for p in ("0.5", "0")
    )
    assert with_dropout["train_loss"] != without["train_loss"]
    model, x = small_model("--dropout", "0.5"), small_ids(8)[None]
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


# ---------- sampling ----------


def test_sampling_carries_the_state(monkeypatch):
    """The text is that of reading everything again for each word, but each word is read once."""
    model, read = small_model(), []
    args = small_args("--top_k", "3", "--max_new_tokens", "12", "--temperature", "1")
    real = lstm.WordRNN.forward

    def forward(model, x, state=None):
        read.append(x.shape[1])
        return real(model, x, state)

    monkeypatch.setattr(lstm.WordRNN, "forward", forward)
    ids = lstm.generate(args, model, torch.tensor([[1, 2, 3]]))
    assert read[:12] == [3] + [1] * 11
    model.eval()
    expected, generator = torch.tensor([[1, 2, 3]]), torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for _ in range(12):
            logits = real(model, expected)[0][0, -1]
            best = (logits[1:].topk(3).indices + 1).sort().values  # never <unk>
            p = torch.zeros(30).index_copy(0, best, logits[best].softmax(dim=0))
            word = torch.multinomial(p, 1, generator=generator)
            expected = torch.cat([expected, word[None]], dim=1)
    assert torch.equal(ids, expected)


def test_sampling_does_not_disturb_training(standins, tmp_path):
    runs = []
    for folder, n in (("silent", "0"), ("writing", "30")):
        flags = tiny_flags(NAME, standins, tmp_path / folder)
        lstm.train(lstm.parse_args([*flags, "--max_new_tokens", n]))
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        runs.append([{k: v for k, v in json.loads(s).items() if k != "seconds"} for s in lines])
    assert runs[0] == runs[1]


def test_samples_begin_with_the_prompt_and_unknown_words_are_shown(standins, tmp_path):
    flags = [*tiny_flags(NAME, standins, tmp_path), "--max_iters", "1", "--prompt", "the zyx king"]
    lstm.train(lstm.parse_args(flags))
    assert "\nthe <unk> king" in (tmp_path / "samples.txt").read_text()


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


def test_a_short_text_is_enough(standins, tmp_path):
    (tmp_path / "short.txt").write_text("to be or not to be " * 10)
    flags = [*tiny_flags(NAME, standins, tmp_path / "out"), "--input", tmp_path / "short.txt"]
    assert run_main(NAME, *flags)[0] == 0


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
