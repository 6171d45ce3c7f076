"""The elective classify_text: verses, bags of words, and an encoder that sees all of a verse."""

import json
import math
import random
import re
from itertools import pairwise

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from steps import load_step, run_main, tiny_flags
from torch.utils.data import TensorDataset

NAME = "electives/classify_text"
classify = load_step(NAME)
N, N_OLD = 3110, 2314  # of the small Bibles here, a tenth of the real one
PAD = classify.PAD


def small_args(*flags):
    sizes = "--n_embd 16 --n_head 2 --n_layer 2 --block_size 12"
    return classify.parse_args([*sizes.split(), *flags])


def small_model(*flags):
    torch.manual_seed(0)
    model = classify.Encoder(small_args(*flags), vocab_size=30)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def random_verses(n, n_words=(1, 12), vocab_size=30, seed=0):
    """Return x (n, 12): verses of words other than <pad>, the longest of n_words[1] words."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(2, vocab_size, (n, 12), generator=generator)
    lengths = torch.randint(n_words[0], n_words[1] + 1, (n, 1), generator=generator)
    lengths[0] = n_words[1]
    x[x == 7] = 0  # <unk>
    return x.masked_fill(torch.arange(12) >= lengths, PAD)


def bible(monkeypatch, line):
    """Let the Bible have N verses, the i-th of them line(i)."""
    text = "".join(f"{line(i)}\n" for i in range(N))
    monkeypatch.setattr(classify, "read_text", lambda args: text)
    monkeypatch.setattr(classify, "N_VERSES", N)
    monkeypatch.setattr(classify, "N_OLD", N_OLD)


# ---------- data ----------


def numbered(i):
    return " ".join(f"{place}{digit}" for place, digit in zip("abcd", f"{i:04}"))


def verse_numbers(dataset, vocab):
    return [int("".join(vocab[j][1] for j in row)) for row in dataset.tensors[0].tolist()]


@pytest.mark.parametrize("run_length", [1, 30])
def test_a_tenth_of_the_verses_is_for_the_test_and_none_is_in_two_sets(monkeypatch, run_length):
    bible(monkeypatch, numbered)
    splits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        *datasets, vocab = classify.load_data(small_args("--run_length", str(run_length)))
        parts = [verse_numbers(dataset, vocab) for dataset in datasets]
        assert sorted(i for part in parts for i in part) == list(range(N))
        n_val, n_test = map(len, parts[1:])
        assert n_val == pytest.approx(N / 10, abs=run_length)
        assert n_test == pytest.approx(N / 10, abs=run_length)
        for dataset, part in zip(datasets, parts):
            y = [int(i >= N_OLD) for i in part]
            assert dataset.tensors[1].tolist() == y
            assert sum(y) / len(y) == pytest.approx(1 - N_OLD / N, abs=0.15)
        runs = [{i // run_length for i in part} for part in parts]
        assert sum(map(len, runs)) == math.ceil(N / run_length)  # a run is in one set, whole
        splits.append(parts)
    assert splits[0] == splits[1]
    assert len(set(splits[0][2]) & set(splits[2][2])) < n_test / 4


def test_the_vocabulary_is_that_of_the_training_verses(monkeypatch):
    bible(monkeypatch, lambda i: f"And {i}, and" if i % 2 else f"And {i}, and and")
    torch.manual_seed(0)
    *datasets, vocab = classify.load_data(small_args())
    train_set, *held_out = (dataset.tensors[0] for dataset in datasets)
    assert vocab[:2] == ["<unk>", "<pad>"]
    common, numbers = {"And", ",", "and"}, set(vocab[2:]) - {"And", ",", "and"}
    assert len(vocab) == 2 + len(common) + len(train_set) and common < set(vocab)
    assert numbers == {vocab[j] for j in train_set[:, 1].tolist()}
    assert not (train_set == 0).any()
    for x in held_out:
        assert (x[:, 1] == 0).all()
        assert {vocab[j] for j in x[:, [0, 2, 3]].unique().tolist()} == common
        assert {vocab[j] for j in x[:, 4].unique().tolist()} == {"<pad>", "and"}
        assert (x[:, 5:] == PAD).all()


def test_words_behind_block_size_are_cut_off(monkeypatch):
    bible(monkeypatch, lambda i: " ".join("abcdefgh"[: 1 + i % 8]))
    for block_size, n_columns in ((3, 3), (12, 8)):
        args = small_args("--block_size", str(block_size))
        *datasets, vocab = classify.load_data(args)
        for x in (dataset.tensors[0] for dataset in datasets):
            assert x.shape[1] == n_columns
            for row in x.tolist():
                words = [vocab[j] for j in row if j != PAD]
                assert words == list("abcdefgh"[: len(words)])


def test_an_epoch_shows_every_verse_once_and_needs_little_padding():
    x = random_verses(2000)
    x[:, 0] = torch.arange(2000) + 30
    dataset = TensorDataset(x, torch.arange(2000))
    batches = classify.minibatches(dataset, 16)
    torch.manual_seed(0)
    epochs = [[next(batches) for _ in range(125)] for _ in range(2)]
    for epoch in epochs:
        seen = torch.cat([y for _, y in epoch])
        assert torch.equal(seen.sort().values, torch.arange(2000))
        assert all(torch.equal(rows, x[y]) for rows, y in epoch)
        lengths = [(rows != PAD).sum(dim=1).float() for rows, _ in epoch]
        padded = sum(len(group) * group.max() for group in lengths)
        assert padded < 1.15 * torch.cat(lengths).sum()  # 1.8 in batches of all lengths
        means = torch.stack([group.mean() for group in lengths])
        assert abs(torch.corrcoef(torch.stack([means, torch.arange(125.0)]))[0, 1]) < 0.3
        assert abs(means[:20].diff()).mean() > 2  # neither do the lengths ascend within a pool
    first, second = (torch.cat([y for _, y in epoch]) for epoch in epochs)
    assert not torch.equal(first, second)
    assert len(set(first[:320].tolist()) & set(second[:320].tolist())) < 200


# ---------- logistic regression ----------


@pytest.mark.parametrize("n_gram", [1, 2])
def test_bags_are_sets_of_words_and_of_bigrams(n_gram):
    """A feature is a word or a pair, the same in all verses; each is there once per verse."""
    x = random_verses(40, vocab_size=12)
    verse, feature = classify.bags(x, 12, n_gram)
    found = [[] for _ in x]
    for i, j in zip(verse.tolist(), feature.tolist()):
        found[i].append(j)
    bags = []
    for row in x.tolist():
        words = [j for j in row if j != PAD]
        bags.append(set(words) | (set(pairwise(words)) if n_gram == 2 else set()))
    assert [len(bag) for bag in found] == [len(bag) for bag in bags]
    features = sorted(set().union(*bags), key=lambda f: (isinstance(f, tuple), f))
    assert [{features[j] for j in bag} for bag in found] == bags  # words first, then bigrams
    assert verse.tolist() == sorted(verse.tolist())


def newton(features, y, penalty):
    """Return the weights and the bias of logistic regression, by Newton's method, in float64."""
    a = torch.cat([features, torch.ones(len(y), 1)], dim=1).double()
    ridge = penalty * torch.ones(a.shape[1]).double()
    ridge[-1] = 0
    w = torch.zeros(a.shape[1]).double()
    for _ in range(30):
        p = (a @ w).sigmoid()
        gradient = a.T @ (p - y) / len(y) + ridge * w
        hessian = a.T @ (a * (p * (1 - p))[:, None]) / len(y) + ridge.diag()
        w = w - torch.linalg.solve(hessian, gradient)
    assert gradient.abs().max() < 1e-12
    return w.float()


def regression_problem(n=300, n_features=12):
    torch.manual_seed(1)
    features = (torch.rand(n, n_features) < 0.3).float()
    y = (torch.rand(n) < (features @ torch.randn(n_features) - 0.5).sigmoid()).long()
    verse, feature = features.nonzero().T
    return features, y, verse, feature


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_logistic_regression_is_the_minimum_that_newton_finds(penalty):
    features, y, verse, feature = regression_problem()
    w = classify.fit_logistic_regression(verse, feature, y, 12, penalty)
    torch.testing.assert_close(w, newton(features, y, penalty), rtol=1e-3, atol=2e-3)
    logits = classify.bag_logits(w, verse, feature, len(y))
    torch.testing.assert_close(logits, features @ w[:-1] + w[-1])


def test_logistic_regression_runs_until_it_has_converged():
    """On features of very different frequencies, which take L-BFGS more than 20 iterations."""
    torch.manual_seed(1)
    features = (torch.rand(2000, 40) < torch.logspace(-2, -0.1, 40)).float()
    y = (torch.rand(2000) < (3 * features @ torch.randn(40)).sigmoid()).long()
    verse, feature = features.nonzero().T
    w = classify.fit_logistic_regression(verse, feature, y, 40, 1e-5)
    torch.testing.assert_close(w, newton(features, y, 1e-5), rtol=0.05, atol=0.05)


def test_softmax_over_two_classes_is_logistic_regression():
    """Two columns w/2 and -w/2 have half the squares of w: twice the penalty, the same p."""
    features, y, verse, feature = regression_problem()
    w = torch.zeros(2, 12, requires_grad=True)
    b = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ w.T + b, y) + 0.02 / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    p_softmax = (features @ w.T + b).softmax(dim=1)[:, 1].detach()
    fitted = classify.fit_logistic_regression(verse, feature, y, 12, 0.01)
    p = classify.bag_logits(fitted, verse, feature, len(y)).sigmoid()
    torch.testing.assert_close(p, p_softmax, rtol=1e-3, atol=1e-3)
    logits = small_model().eval()(random_verses(20))
    one_logit = logits[:, 1] - logits[:, 0]
    expected = F.binary_cross_entropy_with_logits(one_logit, y[:20].float())
    torch.testing.assert_close(F.cross_entropy(logits, y[:20]), expected)


@pytest.mark.parametrize("n_gram", [1, 2])
def test_the_penalty_is_chosen_by_validation_and_scored_on_the_test(n_gram):
    """The same again with dense features, a dictionary and Newton's method."""
    args = small_args("--penalties", "1e-3", "3e-2", "1")
    datasets, truth = [], torch.randn(12, generator=torch.Generator().manual_seed(5))
    for seed, n in ((1, 150), (2, 80), (3, 400)):
        x = random_verses(n, (2, 4), vocab_size=12 if seed == 1 else 14, seed=seed)
        x[x >= 12] = 0  # words that are not in the vocabulary
        score = (truth[x] * (x != PAD)).sum(dim=1) + (x[:, 0] < x[:, 1]) * 1.0
        noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        datasets.append(TensorDataset(x, (score + noise > 0.5).long()))

    def parts(row):
        words = [j for j in row if j != PAD]
        return {*words, *(pairwise(words) if n_gram == 2 else [])}

    sets = [[parts(row) for row in dataset.tensors[0].tolist()] for dataset in datasets]
    known = sorted(set().union(*sets[0]), key=str)
    dense = [torch.tensor([[float(k in s) for k in known] for s in group]) for group in sets]
    scores = []
    for penalty in args.penalties:
        w = newton(dense[0], datasets[0].tensors[1], penalty)
        scores.append(
            [
                ((a @ w[:-1] + w[-1] > 0) == dataset.tensors[1]).float().mean().item()
                for a, dataset in zip(dense[1:], datasets[1:])
            ]
        )
    chosen = max(range(3), key=lambda i: scores[i][0])
    assert len({val for val, _ in scores}) == 3 and len({test for _, test in scores}) == 3
    result = classify.bag_accuracy(args, datasets, 12, n_gram, "bag")
    val, test = scores[chosen]
    assert result == pytest.approx({"bag_val_accuracy": val, "bag_test_accuracy": test})


# ---------- model ----------


def test_the_encoder_is_that_of_pytorch():
    """The same weights in nn.TransformerEncoder, then the mean over the words."""
    model = small_model().eval()
    layer = nn.TransformerEncoderLayer(16, 2, 64, 0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False).eval()
    names = {"in_proj_": "c_attn.", "out_proj.": "c_proj."}
    for theirs, ours in zip(encoder.layers, model.h):
        for kind in ("weight", "bias"):
            for name, own in names.items():
                value = ours.attn.get_parameter(own + kind)
                theirs.self_attn.get_parameter(name + kind).data = value.data
            for name, own in {
                "linear1": "mlp.c_fc",
                "linear2": "mlp.c_proj",
                "norm1": "ln_1",
                "norm2": "ln_2",
            }.items():
                theirs.get_parameter(f"{name}.{kind}").data = ours.get_parameter(f"{own}.{kind}")
    encoder.norm = model.ln_f
    x = random_verses(20)
    h = encoder(model.wte(x) + model.wpe.weight, src_key_padding_mask=x == PAD)  # (20, 12, 16)
    lengths = (x != PAD).sum(dim=1).tolist()
    expected = torch.stack([model.head(h[i, :n]).mean(dim=0) for i, n in enumerate(lengths)])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.word_logits(x), model.head(h) * (x != PAD)[:, :, None], rtol=1e-4, atol=1e-5
    )


def test_padding_changes_nothing():
    model = small_model().eval()
    x = random_verses(20)
    together = model(x)
    for verse, logits in zip(x, together):
        torch.testing.assert_close(model(verse[verse != PAD][None])[0], logits)
    with torch.no_grad():
        model.wte.weight[PAD] = 100
    torch.testing.assert_close(model(x), together)


def test_every_word_sees_every_other_one():
    """No causal mask: a later word changes what an earlier one adds to the logits."""
    model = small_model().eval()
    x = random_verses(1, (9, 9))
    before, total = model.word_logits(x)[0], model(x)
    for place in range(9):
        changed = x.clone()
        changed[0, place] = 29 - x[0, place]
        after = model.word_logits(changed)[0]
        assert ((after - before)[:9].abs().amax(dim=1) > 1e-4).all()
        assert (after[9:] == 0).all()
        assert not torch.allclose(model(changed), total, atol=1e-4)


def test_the_order_of_the_words_counts():
    model = small_model().eval()
    x = random_verses(1, (9, 9))
    swapped = x.clone()
    swapped[0, [2, 6]] = x[0, [6, 2]]
    assert not torch.allclose(model(x), model(swapped), atol=1e-4)


def test_word_dropout_hides_words_like_padding_in_training_only():
    model = small_model("--word_dropout", "0.6", "--dropout", "0")
    seen = []
    model.wte.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = random_verses(2000)
    logits = model.train()(x)
    model.eval()(x)
    in_training, in_evaluation = seen
    assert torch.equal(in_evaluation, x)
    is_kept = in_training != PAD
    assert torch.equal(in_training[is_kept], x[is_kept])  # where they stood
    assert is_kept.any(dim=1).all()
    long = (x != PAD).sum(dim=1) == 12  # of 12 words, one is always kept
    expected = 0.6 - 0.6**12 / 12
    assert (in_training[long] == PAD).float().mean().item() == pytest.approx(expected, abs=0.03)
    assert ((in_training[long] == PAD).float().mean(dim=0) - 0.6).abs().max() < 0.12
    single = (x != PAD).sum(dim=1) == 1
    assert single.sum() > 20 and torch.equal(in_training[single], x[single])
    n_kept = is_kept.sum(dim=1, keepdim=True)
    torch.testing.assert_close(logits, model.word_logits(in_training).sum(dim=1) / n_kept)
    assert not torch.equal(model.train()(x), logits)


def test_dropout_acts_on_embeddings_blocks_and_the_final_norm():
    model = small_model("--dropout", "0.5", "--word_dropout", "0")
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5] * 3
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, inputs, y: calls.append(module.p))
    model.train()(random_verses(3))
    assert len(calls) == 2 + 2 * 2


def test_residual_projections_start_small():
    torch.manual_seed(0)
    args = classify.parse_args(["--n_layer", "2", "--n_embd", "128"])
    model = classify.Encoder(args, 300)
    assert model.wte.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.wpe.weight.std().item() == pytest.approx(0.05, rel=0.05)
    for block in model.h:
        for part in (block.attn, block.mlp):
            assert part.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
        for part in (block.attn.c_attn, block.mlp.c_fc):  # torch's own: uniform
            assert part.weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05)


def test_the_ensemble_is_the_mean_of_different_networks():
    model = classify.Ensemble(small_args("--n_models", "3"), vocab_size=30).eval()
    x = random_verses(20)
    logits = [network(x) for network in model.networks]
    torch.testing.assert_close(model(x), sum(logits) / 3)
    words = [network.word_logits(x) for network in model.networks]
    torch.testing.assert_close(model.word_logits(x), sum(words) / 3)
    for i in range(3):
        assert not torch.allclose(logits[i], logits[i - 1], atol=1e-3)


# ---------- evaluation ----------


def refuse_graphs(model):
    """Let the model fail where it would record a computation graph."""

    def check(module, inputs):
        assert not torch.is_grad_enabled()

    return model.wte.register_forward_pre_hook(check)


def test_evaluation_is_the_mean_over_verses():
    model = small_model("--dropout", "0.5")
    hook = refuse_graphs(model)
    x = random_verses(250)
    y = (torch.arange(250) % 3 == 0).long()
    result = classify.evaluate(model.train(), TensorDataset(x, y), "val")
    assert model.training
    hook.remove()
    model.eval()
    losses, right = [], 0
    for verse, label in zip(x, y):  # one at a time
        logits = model(verse[None])
        losses.append(F.cross_entropy(logits, label[None]).item())
        right += (logits[0, 1] > logits[0, 0]).item() == label.item()
    assert result["val_loss"] == pytest.approx(sum(losses) / 250, rel=1e-4)
    assert result["val_accuracy"] == pytest.approx(right / 250)


def test_the_colors_of_the_words_add_up_to_the_logit(monkeypatch, tmp_path):
    model, figures = small_model(), []
    args = small_args("--out_dir", str(tmp_path))
    monkeypatch.setattr(classify.plt, "close", figures.append)
    x = random_verses(31)
    y = (torch.arange(31) % 2).long()
    vocab = [f"w{i}" for i in range(30)]
    hook = refuse_graphs(model)
    classify.draw_words(args, model.train(), TensorDataset(x, y), vocab)
    hook.remove()
    assert model.training
    odds = model.eval()(x).diff(dim=1)[:, 0].tolist()
    old = sorted((i for i in range(31) if i % 2 == 0), key=lambda i: -odds[i])
    new = sorted((i for i in range(31) if i % 2 == 1), key=lambda i: odds[i])
    assert "red: evidence for the New, blue: for the Old" in figures[0].axes[0].get_title()
    texts = list(figures[0].axes[0].texts)
    for verses, name in ((old, "Old"), (new, "New")):
        for i in (verses[0], verses[len(verses) // 2]):
            p = 1 / (1 + math.exp(-odds[i]))
            title = texts.pop(0).get_text()
            assert title.startswith(name) and f"{p:.3f}" in title
            words = [vocab[j] for j in x[i].tolist() if j != PAD]
            shares = model.word_logits(x[i : i + 1]).diff(dim=2).flatten()[: len(words)]
            shares = shares / len(words)
            assert shares.sum().item() == pytest.approx(odds[i], rel=1e-3, abs=1e-5)
            largest = shares.abs().max().item()
            for word, share in zip(words, shares.tolist()):
                text = texts.pop(0)
                assert text.get_text() == word
                box = text.get_bbox_patch().get_facecolor()
                assert box == pytest.approx(classify.plt.cm.RdBu_r(0.5 + 0.25 * share / largest))
    assert not texts
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    classify.plt.close(figures[0])


# ---------- training ----------


def tiny_args(out_dir, *flags):
    return classify.parse_args([*tiny_flags(NAME, out_dir, out_dir), *flags])


def random_bible(monkeypatch):
    """Each verse has three words of ten, of which the New Testament prefers the later ones."""
    choice = random.Random(0).choices
    words, weights = "abcdefghij", range(1, 11)
    bible(
        monkeypatch,
        lambda i: " ".join(choice(words, weights if i >= N_OLD else None, k=2 + i % 3)),
    )


def test_order_is_learned_where_words_alone_say_nothing(monkeypatch, tmp_path, capsys):
    bible(monkeypatch, lambda i: "a b" if i < N_OLD else "b a")
    flags = "--max_iters 100 --eval_interval 100 --n_embd 16 --learning_rate 0.02 --penalties 1e-5"
    flags += " --warmup_iters 10"
    final = classify.train(classify.parse_args([*flags.split(), "--out_dir", str(tmp_path)]))
    assert final["words_test_accuracy"] == pytest.approx(final["majority_test_accuracy"])
    assert final["majority_test_accuracy"] == pytest.approx(N_OLD / N, abs=0.06)
    assert final["bigrams_test_accuracy"] == 1
    p = final["majority_test_accuracy"]
    error = torch.tensor([1.0] * round(p * 311) + [0.0] * round((1 - p) * 311)).std() / 311**0.5
    line = rf"majority +{100 * p:.2f} \+- {100 * error:.2f}\n"
    assert re.search(line, capsys.readouterr().out)
    assert final["test_accuracy"] == final["val_accuracy"] == 1


def test_training_is_adamw_with_warm_up_cosine_and_decay_of_matrices(tmp_path, monkeypatch):
    """`train` ends with the parameters that torch's AdamW finds on the same training batches."""
    flags = "--max_iters 12 --eval_interval 12 --warmup_iters 4 --learning_rate 0.01"
    flags += " --weight_decay 3 --dropout 0 --word_dropout 0"
    args = tiny_args(tmp_path, *flags.split())
    random_bible(monkeypatch)
    batches, params, sets, evaluated = [], [], [], []
    real, load, evaluate = classify.minibatches, classify.load_data, classify.evaluate

    def load_data(args):
        sets.extend(load(args))
        return sets

    def minibatches(dataset, batch_size):
        assert dataset is sets[0] and batch_size == args.batch_size
        for batch in real(dataset, batch_size):
            batches.append(batch)
            yield batch

    def spy(model, dataset, name):
        assert dataset is sets[["train", "val", "test"].index(name)]
        evaluated.append(name)
        return evaluate(model, dataset, name)

    class Recorded(classify.OptaxOptimizer):
        def __init__(self, mine, tx):
            mine = list(mine)
            params.append([p.detach().clone() for p in mine])
            params.append(mine)
            super().__init__(mine, tx)

    monkeypatch.setattr(classify, "load_data", load_data)
    monkeypatch.setattr(classify, "minibatches", minibatches)
    monkeypatch.setattr(classify, "evaluate", spy)
    monkeypatch.setattr(classify, "OptaxOptimizer", Recorded)
    final = classify.train(args)
    assert set(evaluated) == {"val", "test"}
    first, trained = params
    model = classify.Ensemble(args, len(sets[3]))
    groups = [{"params": [], "weight_decay": 3.0}, {"params": [], "weight_decay": 0.0}]
    for p, value in zip(model.parameters(), first):
        p.data = value
        groups[p.ndim < 2]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999))
    for i, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (i / 4 if i < 4 else (1 + math.cos(math.pi * (i - 4) / 8)) / 2)
        optimizer.zero_grad()
        for network in model.networks:  # each learns by itself
            (-network(x).log_softmax(dim=1)[range(len(y)), y].mean()).backward()
        optimizer.step()
    assert len(batches) == 12
    other = classify.Ensemble(args, len(sets[3]))
    for p, value in zip(other.parameters(), trained):
        p.data = value
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    test_loss = evaluate(model, sets[2], "test")["test_loss"]
    assert final["test_loss"] == pytest.approx(test_loss, rel=0.01)
    for n_gram, name in ((1, "words"), (2, "bigrams")):
        bag = classify.bag_accuracy(args, sets[:3], len(sets[3]), n_gram, name)
        assert bag.items() <= final.items()


def test_evaluation_does_not_disturb_training(tmp_path, monkeypatch):
    random_bible(monkeypatch)
    finals = []
    for interval in ("3", "6"):
        args = tiny_args(tmp_path / interval, "--eval_interval", interval)
        finals.append(classify.train(args))
        del finals[-1]["seconds"]
    assert finals[0] == finals[1]
    assert (tmp_path / "3" / "words.png").exists()
    lines = (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == [0, 3, 6]


@pytest.mark.data
def test_the_bible_is_read_whole_and_told_apart(real_data, tmp_path):
    folders = ["--data_dir", str(real_data), "--out_dir", str(tmp_path)]
    args = classify.parse_args([*folders, "--max_iters", "150", "--eval_interval", "150"])
    verses = classify.read_text(args).splitlines()
    assert verses[classify.N_OLD].startswith("The book of the generation of Jesus Christ")
    assert max(len(classify.split_words(verse)) for verse in verses) == 102
    assert sum("\u2014" in verse for verse in verses) == 1  # the only character outside ASCII
    final = classify.train(args)
    assert 0.92 < final["words_test_accuracy"] < final["bigrams_test_accuracy"] < 0.97
    assert final["majority_test_accuracy"] + 0.05 < final["test_accuracy"] < 0.97


# ---------- input ----------


@pytest.mark.parametrize("how", ["missing", "a line too few", "an empty line", "not UTF-8"])
def test_another_file_is_refused(how, standins, tmp_path):
    path = tmp_path / "data" / "kjv" / "kjv.txt"
    lines = (standins / "kjv" / "kjv.txt").read_bytes().splitlines()
    if how == "a line too few":
        lines = lines[1:]
    elif how == "an empty line":
        lines[7] = b"  "
    elif how == "not UTF-8":
        lines[7] = b"their sin\x97"
    if how != "missing":
        path.parent.mkdir(parents=True)
        path.write_bytes(b"\n".join(lines) + b"\n")
    folders = "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out"
    code, errors = run_main(NAME, *folders)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    for word in (path, "King James Bible", "UTF-8", f"tests/standins.py {tmp_path / 'data'}"):
        assert str(word) in errors
    assert not (tmp_path / "out").exists()


def test_heads_must_divide_the_embedding(tmp_path):
    code, errors = run_main(NAME, "--n_embd", "10", "--n_head", "4", "--out_dir", tmp_path / "out")
    assert code == 2
    assert "--n_embd 10" in errors and "--n_head 4" in errors
