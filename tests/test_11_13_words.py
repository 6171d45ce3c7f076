"""Steps 11 to 13: honest scoring of words, sampling, causal attention."""

import argparse
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import check_number, check_warm_up, watched_run
from steps import load_step, run_main, tiny_flags
from torch.utils.data import TensorDataset

step_11, step_12, step_13 = (load_step(number) for number in ("11", "12", "13"))
WORD_STEPS = ["11_shakespeare_ffn", "12_sampling", "13_transformer"]


def model_class(name):
    step = load_step(name)
    return step.WordMLP if name < "13" else step.GPT


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
    every = torch.arange(16)[:, None] + torch.arange(4)
    assert torch.equal(x, every)
    assert torch.equal(y, torch.arange(4, 20))
    x, y = step_13.windows(ids, 4).tensors
    assert torch.equal(x, every)
    assert torch.equal(y, every + 1)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_every_epoch_shows_each_window_once_in_a_new_order(name):
    x = torch.arange(11)
    batches = load_step(name).minibatches(TensorDataset(x, -x), 4)
    epochs = []
    for _ in range(3):
        epoch = [next(batches) for _ in range(3)]
        assert [len(x) for x, _ in epoch] == [4, 4, 3]
        assert all(torch.equal(x, -y) for x, y in epoch)
        epochs.append(torch.cat([x for x, _ in epoch]).tolist())
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert list(range(11)) != epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("name", WORD_STEPS)
def test_a_missing_default_text_is_downloaded_once_and_checked(name, tmp_path, monkeypatch):
    step, calls = load_step(name), []

    def download(url, path, sha256, progress):
        calls.append((url, path, sha256, progress))
        path.write_text("l\u00e0", encoding="utf-8")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    args = step.parse_args(["--data_dir", str(tmp_path / "new")])
    assert [step.read_text(args) for _ in range(2)] == 2 * ["l\u00e0"]
    path = tmp_path / "new" / "shakespeare" / "input.txt"
    assert calls == [(step.URL, path, step.SHA256, False)]
    path.unlink()  # its folder is there
    assert step.read_text(args) == "l\u00e0" and len(calls) == 2
    args.input = tmp_path / "mine.txt"
    args.input.write_text("mine")
    assert step.read_text(args) == "mine"
    args.input = tmp_path / "none.txt"
    with pytest.raises(OSError, match=r"--input .*none\.txt"):
        step.read_text(args)
    assert len(calls) == 2


@pytest.mark.parametrize("name", WORD_STEPS)
def test_a_text_of_one_window_is_enough(name, tmp_path):
    step, path = load_step(name), write_text(tmp_path, "a b a c c d e a " + 2 * " ", "a c")
    flags = ["--input", str(path), *(["--eval_stride", "2"] if name >= "13" else [])]
    train_ids, test_ids, vocab = step.load_data(step.parse_args([*flags, "--block_size", "7"]))
    assert vocab == ["<unk>", "a", "c"]
    assert train_ids.tolist() == [1, 0, 1, 2, 2, 0, 0, 1]
    assert test_ids.tolist()[-2:] == [1, 2]
    assert len(step.windows(train_ids, 7)) == 1
    with pytest.raises(argparse.ArgumentTypeError, match="8 training, 2 test, 3 known"):
        step.load_data(step.parse_args([*flags, "--block_size", "8"]))
    write_text(tmp_path, "a b a c c d e a " + 2 * " ", 2 * " ")
    with pytest.raises(argparse.ArgumentTypeError, match="8 training, 0 test, 3 known"):
        step.load_data(step.parse_args([*flags, "--block_size", "7"]))


@pytest.mark.parametrize("name", WORD_STEPS)
def test_test_ids_are_the_test_words_after_a_context_from_the_training_text(name, standins):
    step = load_step(name)
    sizes = ["--block_size", "24", *(["--eval_stride", "6"] if name >= "13" else [])]
    args = step.parse_args(["--data_dir", str(standins), *sizes])
    train_ids, test_ids, vocab = step.load_data(args)
    text = (standins / "shakespeare" / "input.txt").read_text()
    words = step.split_words(text[int(0.9 * len(text)) :])
    assert torch.equal(test_ids[-len(words) :], step.encode(words, vocab))
    context = test_ids[: -len(words)]
    assert torch.equal(context, train_ids[-len(context) :])
    assert len(context) == (24 if name < "13" else 24 - 6 + 1)


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
    expected = mean_loss(args, model, ids)
    loss = step_13.evaluate(args, model.train(), ids, "test")["test_loss"]
    assert loss == pytest.approx(expected, rel=1e-4)
    assert model.training


# ---------- model ----------


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
    heads = (part.view(2, 8, args.n_head, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    expected = attention.c_proj(y.transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x), expected)
    (own,) = torch.autograd.grad(attention(x).square().sum(), x)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(own, reference)


def reference_logits(name, model, args, x):
    """Return the network's logits from PyTorch's own functions; a dropout multiplies by 1/2."""
    p = dict(model.named_parameters())

    def norm(x, ln):
        return F.layer_norm(x, x.shape[-1:], p[f"{ln}.weight"], p[f"{ln}.bias"])

    def linear(x, layer):
        return x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]

    x = p["wte.weight"][x]
    if name < "13":
        x = F.gelu(norm(linear(x.reshape(len(x), -1) / 2, "c_fc"), "ln_1")) / 2
        x = norm(linear(x, "c_proj"), "ln_f") / 2
    else:
        x = (x + p["wpe.weight"][: x.shape[1]]) / 2
        sizes = args.n_embd, args.n_head, 4 * args.n_embd
        block = nn.TransformerEncoderLayer(
            *sizes, 0, activation="gelu", batch_first=True, norm_first=True
        )
        for residual_dropout in (block.dropout1, block.dropout2):
            residual_dropout.register_forward_hook(halve)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        names = ["self_attn.in_proj_", "self_attn.out_proj.", "norm1.", "norm2.", "linear1."]
        names = dict(zip(["attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp.c_fc"], names))
        names["mlp.c_proj"] = "linear2."
        for i in range(args.n_layer):
            weights = {
                f"{theirs}{kind}": p[f"h.{i}.{ours}.{kind}"]
                for ours, theirs in names.items()
                for kind in ("weight", "bias")
            }
            x = torch.func.functional_call(block, weights, (x, mask))
        x = norm(x, "ln_f") / 2
    return x @ p["wte.weight"].T + p["lm_head.bias"]  # weight tying


def halve(module, inputs, output):
    return inputs[0] / 2


@pytest.mark.parametrize("name", WORD_STEPS)
def test_logits_and_gradients_are_those_of_pytorchs_layers(name):
    step = load_step(name)
    layers = ["--n_layer", "3", "--n_head", "2"] if name >= "13" else ["--n_hidden", "24"]
    args = small_args(step, "--dropout", "0.3", *layers)
    torch.manual_seed(0)
    model = model_class(name)(args, 30)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert {module.p for module in dropouts} == {0.3}
    for module in dropouts:
        module.register_forward_hook(halve)  # where it stands shows in the logits, without chance
    x = torch.randint(30, (5, 8 if name < "13" else 6))  # 13: also shorter than block_size
    params = list(model.parameters())
    ours, theirs = model(x), reference_logits(name, model, args, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grads = (torch.autograd.grad(logits.square().mean(), params) for logits in (ours, theirs))
    for (key, _), p, q in zip(model.named_parameters(), *grads):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_initial_weights_have_the_right_scale(name):
    """Embeddings are small, so are residuals of a deep network; the rest is as PyTorch has it."""
    step = load_step(name)
    flags = ["--n_embd", "64", "--n_head", "2", "--n_layer", "3", "--block_size", "60"]
    args = step.parse_args(flags if name >= "13" else ["--n_hidden", "200", "--n_embd", "64"])
    torch.manual_seed(0)
    for key, p in model_class(name)(args, 200).named_parameters():
        layer, kind = key.split(".")[-2:]
        if layer.startswith("ln_"):
            assert (p == (kind == "weight")).all()
            continue
        if layer in ("wte", "wpe"):
            std, normal = 0.05, True
        elif name >= "13" and key.endswith("c_proj.weight"):
            std, normal = 0.02 / math.sqrt(2 * 3), True
        else:
            fan_in = {"c_fc": args.block_size * 64, "c_proj": 200} if name < "13" else {}
            fan_in |= {"c_proj": 256} if "mlp.c_proj" in key else {}
            std, normal = 1 / math.sqrt(3 * fan_in.get(layer, 64)), False
        assert p.std().item() == pytest.approx(std, rel=0.05 if p.ndim == 2 else 0.3), key
        assert (p.abs().max() > 2.5 * std) == normal, key  # a uniform one ends at sqrt(3) std


def test_the_order_of_the_words_matters():
    """Without position embeddings, swapping two earlier words would leave the last logits alone."""
    model = small_gpt("--n_layer", "1")
    x = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1])


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


# ---------- training ----------


FLAGS = {
    "11_shakespeare_ffn": "--n_hidden 24 --block_size 5",
    "12_sampling": "--n_hidden 24 --block_size 5",
    "13_transformer": "--n_layer 2 --n_head 2 --block_size 6 --eval_stride 4",
}


def train_by_torch(name, args):
    """Repeat the training with torch's AdamW; return the records, the model, first weights."""
    step = load_step(name)
    torch.manual_seed(args.seed)
    train_ids, test_ids, vocab = step.load_data(args)
    batches = step.minibatches(step.windows(train_ids, args.block_size), args.batch_size)
    model = model_class(name)(args, len(vocab))
    counts = Counter(train_ids.tolist())  # the first logits: how often each word occurs
    shares = [(counts[i] + 0.5) / (len(train_ids) + len(vocab) / 2) for i in range(len(vocab))]
    model.lm_head.bias.data = torch.tensor(shares).log()
    first = {key: value.clone() for key, value in model.state_dict().items()}
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0}]
    for p in model.parameters():
        groups[p.ndim < 2]["params"].append(p)
    optimizer, records, warmup = torch.optim.AdamW(groups, betas=(0.9, 0.99)), [], args.warmup_iters
    for i in range(args.max_iters + 1):
        done = (i - warmup) / (args.max_iters - warmup)
        factor = i / warmup if i < warmup else (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = factor * args.learning_rate
        if i % args.eval_interval == 0 or i == args.max_iters:
            record = {"learning_rate": factor * args.learning_rate}
            for part, ids in ("train", train_ids[: len(test_ids)]), ("test", test_ids):
                record[f"{part}_loss"] = mean_loss(args, model.eval(), ids)
            records.append(record)
            model.train()
        if i < args.max_iters:
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
    return records, model, first, vocab


@torch.no_grad()
def mean_loss(args, model, ids):
    """Return the mean loss of words, one at a time, each after the context that the step gives."""
    stride, losses = getattr(args, "eval_stride", 1), []
    context = args.block_size - stride + 1
    for i in range(context, len(ids)):
        start = (i - context) // stride * stride
        logits = model(ids[None, start:i]).flatten(0, -2)[-1]
        losses.append(F.cross_entropy(logits, ids[i]).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def write_by_hand(name, args, model, vocab):
    """Return a sample, written out once more."""
    step, padding = load_step(name), name < "13" and args.block_size
    words = [word if word in vocab else "<unk>" for word in step.split_words(args.prompt)]
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.max_new_tokens):
        context = (padding * ["\n"] + words)[-args.block_size :]
        logits = model.eval()(torch.tensor([[vocab.index(word) for word in context]]))
        likely = 1 + logits.flatten(0, -2)[-1][1:].topk(args.top_k).indices
        p = torch.zeros(len(vocab))
        p[likely] = (logits.flatten(0, -2)[-1][likely] / args.temperature).softmax(0)
        words.append(vocab[torch.multinomial(p, 1, generator=generator)])
    return step.join_words(words)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices(
    name, standins, tmp_path, monkeypatch
):
    """Every record and weight equals those of torch's AdamW: sampling takes no part in training."""
    step, models, modes = load_step(name), [], set()
    evaluate = step.evaluate

    def spy(*given):
        model = given[name >= "13"]
        if not models:
            mode = lambda model, _: modes.add((model.training, torch.is_grad_enabled()))  # noqa: E731
            model.register_forward_pre_hook(mode)
        models.append(model)
        return evaluate(*given)

    monkeypatch.setattr(step, "evaluate", spy)
    text = (standins / "shakespeare" / "input.txt").read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "samples.txt").write_text("of an earlier run")
    flags = f"{FLAGS[name]} --n_embd 16 --batch_size 20 --max_iters 7 --eval_interval 4 --seed 5"
    flags += " --warmup_iters 2 --learning_rate 0.03 --weight_decay 3 --dropout 0.3"
    flags = [*flags.split(), "--input", tmp_path / "text.txt", "--out_dir", tmp_path]
    if name >= "12":
        flags += "--max_new_tokens 12 --temperature 0.7 --top_k 3".split()
        flags += ["--prompt", "the zyx king"]
    args, records = watched_run(step, *flags)
    expected, model, first, vocab = train_by_torch(name, args)
    assert len(records) == len(expected)
    for record, known in zip(records, expected):
        assert set(record) == {"iter", "seconds", *known}
        for key, value in known.items():
            assert record[key] == pytest.approx(value, rel=1e-4, abs=1e-7), (record["iter"], key)
    for key, weights in models[-1].state_dict().items():  # Adam magnifies the rounding of a few
        last = model.state_dict()[key]
        if key.endswith("c_attn.bias"):  # softmax ignores a key's bias: its gradient is rounding
            weights, last = (bias.view(3, -1)[[0, 2]] for bias in (weights, last))
            first[key] = first[key].view(3, -1)[[0, 2]]
        assert (weights - last).norm() <= 0.01 * (last - first[key]).norm(), key
    assert modes == {(True, True), (False, False)}  # no dropout and no graph but in training
    if name >= "12":
        written = (tmp_path / "samples.txt").read_text()
        heads = [f"=== iter {r['iter']}, test_loss {r['test_loss']:.4f}" for r in records]
        assert [line for line in written.splitlines() if line.startswith("===")] == heads
        sample = write_by_hand(name, args, models[-1], vocab)
        assert sample.startswith("the <unk> king")
        assert written.startswith(heads[0])
        assert written.endswith(f"{heads[-1]}\n{sample}\n\n")
        for p in model.parameters():  # so little training gives no context much weight
            nn.init.normal_(p, std=0.5)
        model.lm_head.bias.data[0] = 99  # <unk> is never sampled, however likely
        assert step.sample(args, model, vocab) == write_by_hand(name, args, model, vocab)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_warm_up_can_be_none_and_is_cut_to_the_run(name, standins, tmp_path, monkeypatch):
    flags = [*tiny_flags(name, standins, tmp_path), "--batch_size", 2]
    check_warm_up(load_step(name), monkeypatch, *flags)


@pytest.mark.parametrize("name", WORD_STEPS)
def test_limits_of_numbers_are_inclusive(name):
    check_number(load_step(name).number)


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
@pytest.mark.parametrize("step", [step_12, step_13], ids=lambda step: step.__name__)
def test_words_are_put_together_as_they_were(step, text):
    assert step.join_words(step.split_words(text)) == text


def test_13_writes_after_a_newline_where_the_prompt_is_empty():
    flags, vocab = ["--max_new_tokens", "9", "--top_k"], ["<unk>", "\n", *map(str, range(28))]
    newline = small_args(step_13, "--prompt", "\n", *flags, "29")
    expected = write_by_hand("13", newline, small_gpt(), vocab)
    for top_k in ("0", "29", "40"):  # all words, also where there are fewer
        args = small_args(step_13, "--prompt", " ", *flags, top_k)
        assert step_13.sample(args, small_gpt(), vocab) == expected


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
