"""Steps 11 to 13: honest scoring of words, sampling, causal attention."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from steps import load_step, run_main, tiny_flags

step_11, step_12, step_13 = (load_step(number) for number in ("11", "12", "13"))
WORD_STEPS = ["11_shakespeare_ffn", "12_sampling", "13_transformer"]


def small_args(step, *flags):
    stride = ["--eval_stride", "8"] if "13" in step.__name__ else []
    return step.parse_args(["--n_embd", "16", "--block_size", "8", *stride, *flags])


def small_gpt(*flags):
    torch.manual_seed(0)
    args = small_args(step_13, "--dropout", "0", *flags)
    model = step_13.GPT(args, vocab_size=30)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def write_text(folder, train, test):
    """Write a text whose first 90% of characters are `train`, and return its path."""
    assert len(train) == int(0.9 * len(train + test))
    path = folder / "text.txt"
    path.write_text(train + test, encoding="utf-8")
    return path


# ---------- data ----------


def test_words_keep_case_and_lose_nothing_but_spaces():
    text = "O Romeo, wherefore?\n'Tis  o'er--I'll\n"
    words = ["O", "Romeo", ",", "wherefore", "?", "\n"]
    words += ["'", "Tis", "o'er", "-", "-", "I'll", "\n"]
    assert step_11.split_words(text) == words


@pytest.mark.parametrize("name", WORD_STEPS)
def test_vocabulary_comes_from_the_training_part_only(name, tmp_path):
    step = load_step(name)
    path = write_text(tmp_path, "a b a b once " * 18, "new new new new new, a b ..")
    *_, vocab = step.load_data(
        step.parse_args(
            ["--input", str(path), "--block_size", "4"]
            + (["--eval_stride", "4"] if name.startswith("13") else [])
        )
    )
    assert vocab == ["<unk>", "a", "b", "once"]


def test_vocabulary_leaves_out_words_seen_once(tmp_path):
    path = write_text(tmp_path, "a b a b rare " + "a b " * 50, "b a " * 6)
    train_ids, test_ids, vocab = step_11.load_data(step_11.parse_args(["--input", str(path)]))
    assert vocab == ["<unk>", "a", "b"]
    assert (train_ids == 0).any()
    assert not (test_ids == 0).any()


def test_target_is_the_word_after_the_window():
    ids = torch.arange(20)
    x, y = step_11.windows(ids, 4).tensors
    assert torch.equal(x[0], torch.tensor([0, 1, 2, 3]))
    assert torch.equal(y, torch.arange(4, 20))
    x, y = step_13.windows(ids, 4).tensors
    assert torch.equal(x[0], torch.tensor([0, 1, 2, 3]))
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_test_ids_are_the_test_words_after_a_context_from_the_training_text(name, standins):
    step = load_step(name)
    args = step.parse_args(["--data_dir", str(standins)])
    train_ids, test_ids, vocab = step.load_data(args)
    text = (standins / "shakespeare" / "input.txt").read_text()
    words = step.split_words(text[int(0.9 * len(text)) :])
    assert torch.equal(test_ids[-len(words) :], step.encode(words, vocab))
    context = test_ids[: -len(words)]
    assert torch.equal(context, train_ids[-len(context) :])
    assert len(context) == (args.block_size if name < "13" else 32 - 16 + 1)


@pytest.mark.parametrize("name", WORD_STEPS[:2])
def test_every_test_word_is_scored_once(name, standins):
    step = load_step(name)
    args = step.parse_args(["--data_dir", str(standins)])
    _, test_ids, _ = step.load_data(args)
    _, y = step.windows(test_ids, args.block_size).tensors
    assert torch.equal(y, test_ids[args.block_size :])


class Oracle(nn.Module):
    """Records every window; its logits name the word after each position in 0, 1, 2, ..."""

    def __init__(self):
        super().__init__()
        self.windows = []

    def forward(self, x):
        self.windows += x.tolist()
        return F.one_hot((x + 1) % 50, 50).float()


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 16, 23])
def test_sliding_windows_score_every_test_word_once_with_context(stride, n, monkeypatch):
    """Where y is not ignored, it is each test word once, with T - stride + 1 words before it."""
    args = small_args(step_13, "--eval_stride", str(stride))
    context = 8 - stride + 1
    ids = torch.arange(context + n)
    scored, real = [], F.cross_entropy

    def cross_entropy(logits, y, **options):
        place = (y >= 0).nonzero().flatten()
        scored.extend(zip(y[place].tolist(), (place % 8).tolist()))
        return real(logits, y, **options)

    monkeypatch.setattr(step_13.F, "cross_entropy", cross_entropy)
    model = Oracle()
    loss = step_13.evaluate(args, model, ids, "test")["test_loss"]
    assert [word for word, _ in scored] == ids[context:].tolist()
    assert all(place + 1 >= context for _, place in scored)
    assert loss == pytest.approx(math.log(1 + 49 / math.e), rel=1e-5)  # the right word's logit is 1


@pytest.mark.parametrize("name", WORD_STEPS[:2])
def test_evaluation_is_the_mean_over_words_however_they_are_batched(name):
    step = load_step(name)
    args = small_args(step, "--dropout", "0.5", "--n_hidden", "16")
    ids = torch.randint(30, (700,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = step.WordMLP(args, 30)
    dataset = step.windows(ids, 8)
    x, y = dataset.tensors
    expected = F.cross_entropy(model.eval()(x), y)
    loss = step.evaluate(model.train(), dataset, "test")["test_loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def test_sliding_window_evaluation_is_the_mean_over_words():
    args = small_args(step_13, "--eval_stride", "3", "--dropout", "0.5")
    torch.manual_seed(0)
    model = step_13.GPT(args, 30).eval()
    ids = torch.randint(30, (700,), generator=torch.Generator().manual_seed(0))
    losses = []
    for i in range(6, 700):  # brute force: the window that scores word i, one word at a time
        start = (i - 6) // 3 * 3
        logits = model(ids[None, start:i])[0, -1]
        losses.append(F.cross_entropy(logits, ids[i]).item())
    loss = step_13.evaluate(args, model.train(), ids, "test")["test_loss"]
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert model.training


# ---------- model ----------


@pytest.mark.parametrize("name", WORD_STEPS)
def test_first_guess_is_how_often_each_word_occurs(name, standins, tmp_path):
    """The head's bias makes the untrained model a unigram model."""
    step = load_step(name)
    args = step.parse_args([*tiny_flags(name, standins, tmp_path), "--max_iters", "1"])
    step.train(args)
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    text = (standins / "shakespeare" / "input.txt").read_text()
    words = step.split_words(text[: int(0.9 * len(text))])
    counts = torch.tensor([words.count(word) for word in set(words)]) / len(words)
    entropy = -(counts * counts.log()).sum().item()
    assert json.loads(first)["test_loss"] == pytest.approx(entropy, abs=0.25)
    assert entropy < math.log(len(counts)) - 0.3  # or this test could not tell


def test_later_words_never_change_earlier_logits():
    model = small_gpt()
    x = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))
    for t in range(1, 8):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 30
        before, after = model(x), model(changed)
        torch.testing.assert_close(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t:], after[:, t:])


def test_every_earlier_word_reaches_the_last_logits():
    model = small_gpt()
    x = torch.randint(30, (1, 8), generator=torch.Generator().manual_seed(0))
    for t in range(8):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 7) % 30
        assert not torch.allclose(model(x)[:, -1], model(changed)[:, -1])


def test_written_out_attention_equals_sdpa():
    args = small_args(step_13)
    torch.manual_seed(0)
    attention = step_13.CausalSelfAttention(args)
    x = torch.randn(2, 8, 16, requires_grad=True)
    q, k, v = attention.c_attn(x).chunk(3, dim=2)  # (B, T, C) each
    heads = (part.view(2, 8, 4, 4).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    expected = attention.c_proj(y.transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x), expected)
    (own,) = torch.autograd.grad(attention(x).square().sum(), x)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(own, reference)


def test_a_block_is_torchs_pre_norm_transformer_layer():
    args = small_args(step_13, "--dropout", "0")
    torch.manual_seed(0)
    block = step_13.Block(args)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, 0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_": block.attn.c_attn,
        "self_attn.out_proj.": block.attn.c_proj,
        "linear1.": block.mlp.c_fc,
        "linear2.": block.mlp.c_proj,
        "norm1.": block.ln_1,
        "norm2.": block.ln_2,
    }
    weights = {f"{name}{kind}": getattr(layer, kind)
               for name, layer in pairs.items() for kind in ("weight", "bias")}  # fmt: skip
    theirs.load_state_dict(weights)
    x = torch.randn(2, 8, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_words_matters():
    """Without position embeddings, swapping two earlier words would leave the last logits alone."""
    model = small_gpt("--n_layer", "1")
    x = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1])


def test_the_output_matrix_is_the_embedding():
    args = small_args(step_11)
    for model in (step_11.WordMLP(args, 30), step_13.GPT(small_args(step_13), 30)):
        assert model.lm_head.weight is model.wte.weight


def test_every_position_learns(standins):
    """The loss falls at every position of the window, not only at the last."""
    args = small_args(step_13, "--data_dir", str(standins), "--dropout", "0")
    torch.manual_seed(0)
    train_ids, _, vocab = step_13.load_data(args)
    model = step_13.GPT(args, len(vocab))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = step_13.minibatches(step_13.windows(train_ids, 8), 64)
    losses = []
    for _ in range(40):
        x, y = next(batches)
        loss = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(dim=0)  # (T,)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert (losses[-1] < losses[0] - 0.5).all()


@pytest.mark.parametrize("name", WORD_STEPS)
def test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices(
    name, standins, tmp_path, monkeypatch
):
    """The losses of `train` equal those of torch's AdamW on the same batches."""
    step = load_step(name)
    flags = ["--max_iters", "12", "--eval_interval", "12", "--warmup_iters", "4", "--dropout", "0"]
    flags += ["--learning_rate", "0.01", "--weight_decay", "3"]
    args = step.parse_args([*tiny_flags(name, standins, tmp_path), *flags])
    batches, models = [], []
    real = step.minibatches

    def minibatches(dataset, batch_size):
        for batch in real(dataset, batch_size):
            batches.append(batch)
            yield batch

    class Recorded(step.OptaxOptimizer):
        def __init__(self, params, tx):
            params = list(params)
            models.append([p.detach().clone() for p in params])
            super().__init__(params, tx)
            models.append(self.params)

    monkeypatch.setattr(step, "minibatches", minibatches)
    monkeypatch.setattr(step, "OptaxOptimizer", Recorded)
    step.train(args)
    first, trained = models
    vocab_size = len(step.load_data(args)[-1])
    model = (step.WordMLP if name < "13" else step.GPT)(args, vocab_size)
    groups = [{"params": [], "weight_decay": 3.0}, {"params": [], "weight_decay": 0.0}]
    for p, value in zip(model.parameters(), first):
        p.data = value
        groups[p.ndim < 2]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for i, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (i / 4 if i < 4 else (1 + math.cos(math.pi * (i - 4) / 8)) / 2)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    assert len(batches) == 12
    for p, (part, q) in zip(trained, model.named_parameters()):
        if part.endswith("c_attn.bias"):  # softmax ignores a key's bias: its gradient is rounding
            p, q = (bias.view(3, -1)[[0, 2]] for bias in (p, q))
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_train_uses_training_words_and_evaluates_test_words(name, standins, tmp_path, monkeypatch):
    """Other test words change the test loss and nothing else."""
    step = load_step(name)
    args = step.parse_args(tiny_flags(name, standins, tmp_path / "a"))
    honest = step.train(args)
    real = step.load_data

    def load_data(args):
        train_ids, test_ids, vocab = real(args)
        return train_ids, test_ids.flip(0), vocab

    monkeypatch.setattr(step, "load_data", load_data)
    args.out_dir = tmp_path / "b"
    replaced = step.train(args)
    assert replaced["train_loss"] == honest["train_loss"]
    assert replaced["test_loss"] != honest["test_loss"]


@pytest.mark.parametrize("name", WORD_STEPS)
def test_dropout_is_on_in_training_only(name, standins, tmp_path):
    step = load_step(name)
    flags = [*tiny_flags(name, standins, tmp_path), "--max_iters", "3", "--eval_interval", "1"]
    with_dropout, without = (
        step.train(step.parse_args([*flags, "--dropout", p])) for p in ("0.5", "0")
    )
    assert with_dropout["train_loss"] != without["train_loss"]
    model_class = step.WordMLP if name < "13" else step.GPT
    model = model_class(small_args(step, "--dropout", "0.5"), 30)
    x = torch.zeros(2, 8, dtype=torch.long)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# ---------- sampling ----------


class Fixed(nn.Module):
    """Gives the same logits for every window, in step 12's shape."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.repeat(len(x), 1)


def draw(logits, n=300, **changes):
    args = {"seed": 1, "max_new_tokens": n, "block_size": 2, "temperature": 1.0, "top_k": 0}
    ids = step_12.generate(
        SimpleNamespace(**args | changes), Fixed(logits), torch.ones(1, 2, dtype=torch.long)
    )
    return ids[0, 2:].tolist()


def test_near_temperature_0_the_likeliest_word_wins():
    assert set(draw([9.0, 1.0, 1.1, 0.9], temperature=1e-6)) == {2}
    assert len(set(draw([9.0, 1.0, 1.1, 0.9], temperature=1.0))) == 3


def test_top_k_samples_only_from_the_k_most_likely():
    logits = [9.0, 1.0, 1.1, 0.9, 1.2]
    assert set(draw(logits, top_k=2)) == {2, 4}
    assert set(draw(logits, top_k=99)) == {1, 2, 3, 4}  # as many as there are
    assert set(draw(logits, top_k=0)) == {1, 2, 3, 4}


def test_temperature_sets_the_odds():
    share = draw([9.0, 0.0, 1.0], n=4000, temperature=0.5).count(2) / 4000
    assert share == pytest.approx(math.e**2 / (math.e**2 + 1), abs=0.02)


def test_unknown_is_never_written():
    assert 0 not in draw([99.0, 0.0, 0.0])


def test_same_seed_same_text():
    assert draw([0.0] * 9) == draw([0.0] * 9)
    assert draw([0.0] * 9) != draw([0.0] * 9, seed=2)


def test_the_transformer_writes_past_its_window_from_the_last_position():
    model = small_gpt()
    args = small_args(step_13, "--top_k", "1", "--max_new_tokens", "12")
    ids = step_13.generate(args, model, torch.tensor([[1, 2]]))
    for t in range(2, 14):
        logits = model(ids[:, max(0, t - 8) : t])[0, -1]
        assert ids[0, t] == 1 + logits[1:].argmax()


@pytest.mark.parametrize(
    "text",
    ["ROMEO:\nO, speak; I'll go--now!\n\nJULIET:\n'Tis o' the moon?", "half-way, th' end.\nAy"],
)
def test_words_are_put_together_as_they_were(text):
    assert step_12.join_words(step_12.split_words(text)) == text


def losses(step, name, standins, out_dir, *flags):
    step.train(step.parse_args([*tiny_flags(name, standins, out_dir), *flags]))
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_sampling_does_not_disturb_training(standins, tmp_path):
    silent = losses(step_11, "11_shakespeare_ffn", standins, tmp_path / "a")
    writing = losses(step_12, "12_sampling", standins, tmp_path / "b", "--max_new_tokens", "30")
    assert writing == silent
    samples = (tmp_path / "b" / "samples.txt").read_text()
    assert samples.count("=== iter") == len(silent)
    assert f"test_loss {silent[-1]['test_loss']:.4f}" in samples


# ---------- bad input ----------


def assert_fails(name, tmp_path, *flags, words):
    code, errors = run_main(name, *flags, "--out_dir", tmp_path / "out")
    assert code == 2
    assert len(errors.strip().splitlines()) == 1, errors
    for word in words:
        assert str(word) in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WORD_STEPS)
@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe\x00 bytes " * 200])
def test_a_bad_text_is_named(name, content, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert_fails(name, tmp_path, "--input", path, words=["--input"])


def test_a_text_shorter_than_a_window_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("to be or not to be " * 60)
    words = ["324 training, 36 test", "--block_size 400"]
    flags = ["--input", tmp_path / "short.txt", "--block_size", "400"]
    assert_fails("13_transformer", tmp_path, *flags, words=words)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_a_text_without_a_word_that_occurs_twice_is_named(name, tmp_path):
    (tmp_path / "once.txt").write_text(" ".join(f"word{i}" for i in range(900)))
    words = ["--input", "1 known"]
    assert_fails(name, tmp_path, "--input", tmp_path / "once.txt", words=words)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_a_missing_text_is_named(name, tmp_path, no_network):
    assert_fails(name, tmp_path, "--input", tmp_path / "no.txt", words=["--input", "no.txt"])
    words = ["shakespeare", "tests/standins.py", tmp_path]
    assert_fails(name, tmp_path, "--data_dir", tmp_path, words=words)


@pytest.mark.parametrize("name", WORD_STEPS[1:])
@pytest.mark.parametrize("temperature", ["0", "-1"])
def test_temperature_must_be_positive(name, temperature, tmp_path):
    assert_fails(name, tmp_path, f"--temperature={temperature}", words=["--temperature"])


def test_sizes_that_do_not_fit(tmp_path):
    flags = ["--n_embd", "10", "--n_head", "4"]
    assert_fails("13_transformer", tmp_path, *flags, words=["--n_embd 10", "--n_head 4"])
    flags = ["--block_size", "8", "--eval_stride", "9"]
    assert_fails("13_transformer", tmp_path, *flags, words=["--eval_stride 9", "--block_size 8"])


@pytest.mark.parametrize("name", WORD_STEPS[1:])
def test_samples_begin_with_the_prompt_and_unknown_words_are_shown(name, standins, tmp_path):
    step = load_step(name)
    flags = [*tiny_flags(name, standins, tmp_path), "--max_iters", "1", "--prompt", "the zyx king"]
    step.train(step.parse_args(flags))
    assert "\nthe <unk> king" in (tmp_path / "samples.txt").read_text()


# ---------- real data ----------


@pytest.mark.data
@pytest.mark.parametrize("name", WORD_STEPS)
def test_tiny_shakespeare_is_cut_as_agreed(name, real_data):
    step = load_step(name)
    args = step.parse_args(["--data_dir", str(real_data)])
    train_ids, test_ids, vocab = step.load_data(args)
    context = args.block_size if name < "13" else args.block_size - args.eval_stride + 1
    assert (len(train_ids), len(test_ids) - context, len(vocab)) == (263144, 30449, 7115)


@pytest.mark.data
@pytest.mark.parametrize(("name", "low", "high"), [("11", 90, 150), ("13", 100, 200)])
def test_real_text_is_learned(name, low, high, real_data, tmp_path):
    step = load_step(name)
    flags = ["--data_dir", str(real_data), "--max_iters", "300", "--eval_interval", "300"]
    final = step.train(step.parse_args([*flags, "--out_dir", str(tmp_path)]))
    assert low < math.exp(final["test_loss"]) < high
