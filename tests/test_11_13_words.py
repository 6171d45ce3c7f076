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
    return step.parse_args(["--n_embd", "16", "--block_size", "8", *flags])


def small_gpt(*flags):
    torch.manual_seed(0)
    args = small_args(step_13, "--eval_stride", "8", "--dropout", "0", *flags)
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
    train_set, test_set, vocab = step_11.load_data(step_11.parse_args(["--input", str(path)]))
    assert vocab == ["<unk>", "a", "b"]
    assert (train_set.tensors[0] == 0).any()
    assert not (test_set.tensors[1] == 0).any()


def test_target_is_the_word_after_the_window():
    ids = torch.arange(20)
    x, y = step_11.windows(ids, 4).tensors
    assert torch.equal(x[0], torch.tensor([0, 1, 2, 3]))
    assert torch.equal(y, torch.arange(4, 20))
    x, y = step_13.windows(ids, 4).tensors
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("name", WORD_STEPS[:2])
def test_every_test_word_is_scored_once(name, standins):
    step = load_step(name)
    args = step.parse_args(["--data_dir", str(standins)])
    _, test_set, vocab = step.load_data(args)
    text = (standins / "shakespeare" / "input.txt").read_text()
    words = step.split_words(text[int(0.9 * len(text)) :])
    assert torch.equal(test_set.tensors[1], step.encode(words, vocab))


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 16, 23])
def test_the_transformer_scores_every_test_word_once_with_context(stride, n):
    block_size = 8
    ids = torch.arange(block_size - stride + 1 + n)
    x, y = step_13.scored_windows(ids, block_size, stride).tensors
    assert torch.equal(y[y >= 0], ids[-n:])
    row, column = torch.nonzero(y >= 0, as_tuple=True)
    assert (column >= block_size - stride).all()  # so many words stand before the last one read
    assert torch.equal(x[row, column], y[row, column] - 1)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_evaluation_is_the_mean_over_words_however_they_are_batched(name):
    step = load_step(name)
    args = small_args(step) if name < "13" else small_args(step, "--eval_stride", "3")
    ids = torch.randint(30, (700,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    if name < "13":
        model = step.WordMLP(8, 16, 16, 30, 0.5)
        dataset = step.windows(ids, 8)
        x, y = dataset.tensors
        expected = F.cross_entropy(model.eval()(x), y)
    else:
        model = step.GPT(args, 30)
        dataset = step.scored_windows(ids, 8, 3)
        x, y = dataset.tensors
        expected = F.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten())
    loss = step.evaluate(model.train(), dataset, "test")["test_loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
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


@pytest.mark.parametrize("flag", ["--sdpa", "--no-sdpa"])
def test_later_words_never_change_earlier_logits(flag):
    model = small_gpt(flag)
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
    own, torchs = small_gpt("--no-sdpa"), small_gpt("--sdpa")
    x = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(own(x), torchs(x))
    own(x).square().mean().backward()
    torchs(x).square().mean().backward()
    for a, b in zip(own.parameters(), torchs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_every_position_learns(standins):
    """The loss falls at every position of the window, not only at the last."""
    args = small_args(step_13, "--data_dir", str(standins), "--eval_stride", "8", "--dropout", "0")
    torch.manual_seed(0)
    train_set, *_, vocab = step_13.load_data(args)
    model = step_13.GPT(args, len(vocab))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = step_13.minibatches(train_set, 64)
    losses = []
    for _ in range(40):
        x, y = next(batches)
        loss = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(dim=0)  # (T,)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert (losses[-1] < losses[0] - 0.5).all()


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


def test_top_k_draws_only_from_the_k_best():
    logits = [9.0, 1.0, 1.1, 0.9, 1.2]
    assert set(draw(logits, top_k=2)) == {2, 4}
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
    args = small_args(step_13, "--eval_stride", "8", "--top_k", "1", "--max_new_tokens", "12")
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
    assert_fails(name, tmp_path, "--input", path, words=["--input", path])


def test_a_text_too_short_to_be_scored_with_context_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("to be or not to be " * 60)
    words = ["324 words to train on, 36 to test", "--block_size 70"]
    flags = ["--input", tmp_path / "short.txt", "--block_size", "70"]
    assert_fails("13_transformer", tmp_path, *flags, words=words)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_a_text_without_a_word_that_occurs_twice_is_named(name, tmp_path):
    (tmp_path / "once.txt").write_text(" ".join(f"word{i}" for i in range(900)))
    words = ["once.txt", "no word occurs twice"]
    assert_fails(name, tmp_path, "--input", tmp_path / "once.txt", words=words)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_a_missing_text_is_named(name, tmp_path, no_network):
    assert_fails(name, tmp_path, "--input", tmp_path / "no.txt", words=["--input", "no.txt"])
    words = ["shakespeare", "tests/standins.py", tmp_path]
    assert_fails(name, tmp_path, "--data_dir", tmp_path, words=words)


@pytest.mark.parametrize("name", WORD_STEPS[1:])
def test_top_k_over_the_vocabulary(name, standins, tmp_path):
    flags = ["--data_dir", standins, "--top_k", "100000"]
    assert_fails(name, tmp_path, *flags, words=["--top_k 100000"])


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
def test_unknown_words_of_a_prompt_are_told(name, standins, tmp_path, capsys):
    step = load_step(name)
    flags = [*tiny_flags(name, standins, tmp_path), "--max_iters", "1", "--prompt", "the zyx"]
    step.train(step.parse_args(flags))
    assert "<unk>: ['zyx']" in capsys.readouterr().out
    assert "the <unk>" in (tmp_path / "samples.txt").read_text()


# ---------- real data ----------


@pytest.mark.data
@pytest.mark.parametrize("name", WORD_STEPS)
def test_tiny_shakespeare_is_cut_as_agreed(name, real_data):
    step = load_step(name)
    *_, train_or_test, vocab = step.load_data(step.parse_args(["--data_dir", str(real_data)]))
    assert len(vocab) == 7115
    assert (train_or_test.tensors[1] >= 0).sum() == 30449


@pytest.mark.data
@pytest.mark.parametrize(("name", "low", "high"), [("11", 90, 150), ("13", 100, 200)])
def test_real_text_is_learned(name, low, high, real_data, tmp_path):
    step = load_step(name)
    flags = ["--data_dir", str(real_data), "--max_iters", "300", "--eval_interval", "300"]
    final = step.train(step.parse_args([*flags, "--out_dir", str(tmp_path)]))
    assert low < math.exp(final["test_loss"]) < high
