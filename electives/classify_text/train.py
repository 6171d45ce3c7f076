"""Elective classify_text: a transformer encoder tells the Old Testament from the New.

Parent:  13_transformer
New:     bags, bag_logits, fit_logistic_regression, SelfAttention, Encoder, Ensemble, bag_accuracy,
         draw_words
Changed: read_text, load_data, minibatches, Block, evaluate, train, parse_args
Gone:    join_words, windows, CausalSelfAttention, GPT, generate, sample, log_sample

A classifier needs no causal mask: every word attends to all words of its verse, before and after
it. Only <pad>, which fills up the verses of a minibatch to the same length, is masked. A verse's
logits are the mean of its words' logits; words.png shows what each word contributes in its context:
even a comma has attended to the whole verse. Word dropout, which hides half of the words in
training, and weight decay keep the model from memorizing the short verses. Three such networks,
which differ by their random numbers only, make different mistakes; the mean of their logits, an
ensemble, makes fewer.

The baselines are logistic regressions on bags of words, without and with bigrams (pairs of adjacent
words); 74% of the verses are of the Old Testament. The test set is a random tenth of the verses;
another tenth, the validation set, chose the settings of all three models. Neighboring verses share
names and topics, which makes this easier than an unseen book would be: compare --run_length 30,
which holds out 30 verses in a row.

The test accuracy with seed 1337 is 94.8%, that of words 93.3%, of words and bigrams 94.6%, each
with a standard error of 0.4 points; the means over seeds 1337, 1 and 2 are 94.78, 93.73 and 94.75%.
The ensemble beats logistic regression on words, and with two of the three seeds also that on words
and bigrams; a single network, whose mean is 94.4%, beats only the former.

Try:     --run_length 30 (which of the three models loses most?)
         --n_layer 0 (a mean of embeddings: what does attention add?)
         --n_models 1 (what does the ensemble add?)
         --word_dropout 0 --weight_decay 0 (look at the loss, too)
Source:  Devlin et al. 2019, "BERT" (the encoder); Iyyer et al. 2015, "Deep unordered composition
         rivals syntactic methods for text classification" (mean of the words, word dropout); Wang
         and Manning 2012, "Baselines and bigrams"; Hansen and Salamon 1990, "Neural network
         ensembles".
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import json
import math
import re
import time
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset
from tqdm import tqdm

from plot import plot_run, plt

# ---------- data ----------
N_VERSES, N_OLD = 31102, 23145  # of the Bible, of the Old Testament, which comes first
PAD = 1  # the id of <pad>, which fills up the verses of a minibatch to the same length


def read_text(args):
    """Return the King James Bible, one verse per line."""
    path = args.data_dir / "kjv" / "kjv.txt"
    try:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) != N_VERSES or not all(map(split_words, text.splitlines())):
            raise ValueError(f"not {N_VERSES} lines with words")
        return text
    except (OSError, ValueError) as error:
        raise OSError(
            f"{path}: missing or not the King James Bible in UTF-8, one verse per line "
            f"({error!r:.100}); put it there, or stand-ins: python tests/standins.py "
            f"{args.data_dir}"
        ) from error


def split_words(text):
    """Return the words, punctuation marks and newlines of a text in order, case kept."""
    return re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]|\n", text)


def encode(words, vocab):
    """Return the ids (len(words),) of words; a word outside the vocabulary becomes 0, <unk>."""
    ids = {word: i for i, word in enumerate(vocab)}
    return torch.tensor([ids.get(word, 0) for word in words])


def load_data(args):
    """Return TensorDatasets of training, validation and test verses, and the vocabulary.

    A verse is x (T,), the ids of its words, then <pad>, and y: 0 (Old Testament) or 1 (New).
    A random tenth of the verses is the test set and another the validation set, in runs of
    run_length verses in a row. The others are the training set; it alone determines the vocabulary.
    """
    verses = [split_words(line) for line in read_text(args).splitlines()]
    y = (torch.arange(N_VERSES) >= N_OLD).long()
    runs = torch.randperm(math.ceil(N_VERSES / args.run_length))
    tenth = (10 * runs // len(runs)).repeat_interleave(args.run_length)[:N_VERSES]
    splits = tenth > 1, tenth == 1, tenth == 0  # training, validation, test
    words = {word for verse, i in zip(verses, tenth.tolist()) if i > 1 for word in verse}
    vocab = ["<unk>", "<pad>", *sorted(words)]
    ids = encode([word for verse in verses for word in verse], vocab)
    x = pad_sequence(ids.split([len(verse) for verse in verses]), True, PAD)[:, : args.block_size]
    return *(TensorDataset(x[split], y[split]) for split in splits), vocab


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller.

    The verses of a minibatch are of similar length: they need little padding.
    """
    n_words = (dataset.tensors[0] != PAD).sum(dim=1)
    while True:  # a whole minibatch at once: a DataLoader would fetch its examples one by one
        for pool in torch.randperm(len(dataset)).split(20 * batch_size):
            batches = pool[n_words[pool].argsort()].split(batch_size)
            for i in torch.randperm(len(batches)).tolist():
                yield dataset[batches[i]]


# ---------- model ----------
# B batch, T words, C n_embd, H n_head, D = C / H
def bags(x, vocab_size, n_gram):
    """Return verse (n,) and feature (n,): which features occur in which of the verses x (N, T).

    Features are words, with n_gram 2 also bigrams (pairs of adjacent words), numbered from 0.
    """
    if n_gram == 2:
        bigrams = (1 + x[:, :-1]) * vocab_size + x[:, 1:]  # ids after those of the words
        x = torch.cat([x, bigrams.masked_fill(x[:, 1:] == PAD, PAD)], dim=1)  # (N, 2T - 1)
    verse, position = (x != PAD).nonzero().T
    feature = x[verse, position].unique(return_inverse=True)[1]
    n_features = feature.max() + 1
    once = (verse * n_features + feature).unique()  # a word may occur twice in a verse
    return once // n_features, once % n_features


def bag_logits(w, verse, feature, n):
    """Return the logits (n,) of n verses: the sum of the weights of their features, and a bias."""
    return w[-1] + torch.zeros(n).index_add(0, verse, w.index_select(0, feature))


def fit_logistic_regression(verse, feature, y, n_features, penalty):
    """Return the weights and the bias (n_features + 1,) with the lowest loss on verses with y (N,).

    The loss is the mean negative log-likelihood plus penalty / 2 times the sum of squared weights.
    The sigmoid of a logit is the softmax of two, of which one is 0. The loss is convex: L-BFGS, a
    quasi-Newton method on all training verses at once, finds its minimum from anywhere.
    """
    w = torch.zeros(n_features + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = bag_logits(w, verse, feature, len(y))
        loss = F.binary_cross_entropy_with_logits(logits, y.float())
        loss = loss + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


class SelfAttention(nn.Module):
    """Each position attends to all words of its verse, before and after it, (B, T, C) to (B, T, C).

    Linear maps give each position a query q, a key k and a value v. The dot product of position i's
    query with position j's key scores how relevant j is to i; softmax turns the scores into weights
    of a mean over the values. Each of H heads has its own q, k, v: a position can attend in H ways.
    """

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)

    def forward(self, x, is_word):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # If q and k have variance 1, q . k has variance D: divide by sqrt(D), or softmax saturates.
        scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)
        mask = is_word[:, None, None, :]  # no position attends to padding
        y = scores.masked_fill(~mask, -math.inf).softmax(dim=3) @ v  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Position-wise feed-forward network, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, T, 4C) inside


class Block(nn.Module):
    """Transformer block: attention and MLP, each with layer norm before and a skip connection."""

    def __init__(self, args):
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd)
        self.attn = SelfAttention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd)
        self.mlp = MLP(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, is_word):
        x = x + self.dropout(self.attn(self.ln_1(x), is_word))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Encoder(nn.Module):
    """Maps verses x (B, T), T up to block_size, padded with <pad>, to the logits (B, 2) of y."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.word_dropout = args.word_dropout
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.head = nn.Linear(args.n_embd, 2)
        self.dropout = nn.Dropout(args.dropout)  # zeroes this fraction of its input in training
        nn.init.normal_(self.wte.weight, std=0.05)  # with torch's std of 1, logits would be large
        nn.init.normal_(self.wpe.weight, std=0.05)
        for name, p in self.h.named_parameters():
            if name.endswith("c_proj.weight"):  # the 2 n_layer residuals add up: start them small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))

    def word_logits(self, x):
        """Return the logits (B, T, 2) of each word in its context; those of <pad> are 0."""
        is_word = x != PAD  # (B, T)
        # A weighted mean ignores order: the position embeddings wpe say where each word stands.
        x = self.dropout(self.wte(x) + self.wpe.weight[: x.shape[1]])  # (B, T, C)
        for block in self.h:
            x = block(x, is_word)
        return self.head(self.dropout(self.ln_f(x))) * is_word[:, :, None]  # (B, T, 2)

    def forward(self, x):
        x = x[:, : (x != PAD).sum(dim=1).max()]  # (B, T), T words of the longest verse
        if self.training:  # word dropout hides words as if they were padding, never all of a verse
            u = torch.rand(x.shape).masked_fill(x == PAD, 0)
            x = x.masked_fill((u < self.word_dropout) & (u < u.amax(dim=1, keepdim=True)), PAD)
        n_words = (x != PAD).sum(dim=1, keepdim=True)  # (B, 1)
        return self.word_logits(x).sum(dim=1) / n_words  # (B, 2)


class Ensemble(nn.Module):
    """The mean of the logits (B, 2) of n_models networks, which differ by their random numbers."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.networks = nn.ModuleList(Encoder(args, vocab_size) for _ in range(args.n_models))

    def word_logits(self, x):
        return torch.stack([network.word_logits(x) for network in self.networks]).mean(dim=0)

    def forward(self, x):
        return torch.stack([network(x) for network in self.networks]).mean(dim=0)


# ---------- optimizer ----------
class OptaxOptimizer:
    """Updates torch parameters on the CPU with tx, any gradient transformation of optax.

    An optax optimizer is a pure function: gradients and state (Adam's t, m, v) go in, updates and
    the next state come out. jax.jit compiles this; dlpack shares arrays between torch and JAX.
    """

    def __init__(self, params, tx):
        jax.config.update("jax_platforms", "cpu")
        self.params = list(params)
        self.tx = tx
        self.state = tx.init([jax.dlpack.from_dlpack(p.detach()) for p in self.params])
        self.update = jax.jit(self._update)

    def _update(self, params, grads, state):
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        params = [jax.dlpack.from_dlpack(p.detach()) for p in self.params]
        grads = [jax.dlpack.from_dlpack(p.grad) for p in self.params]
        params, self.state = self.update(params, grads, self.state)
        for p, new in zip(self.params, jax.block_until_ready(params)):  # JAX is asynchronous
            p.data = torch.from_dlpack(new)


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(model, dataset, name):
    """Return {name}_loss, in nats per verse, and {name}_accuracy, a fraction."""
    model.eval()  # no dropout
    x, y = dataset.tensors
    order = (x != PAD).sum(dim=1).argsort()  # verses of similar length need little padding
    logits = torch.cat([model(chunk) for chunk in x[order].split(100)])
    model.train()
    accuracy = (logits.argmax(dim=1) == y[order]).float().mean().item()
    return {f"{name}_loss": F.cross_entropy(logits, y[order]).item(), f"{name}_accuracy": accuracy}


def bag_accuracy(args, datasets, vocab_size, n_gram, name):
    """Return {name}_val_accuracy and {name}_test_accuracy of logistic regression on bags.

    The penalty is the one of --penalties with the best validation accuracy.
    """
    x, y = (torch.cat(tensors) for tensors in zip(*(dataset.tensors for dataset in datasets)))
    train, val, test = torch.arange(len(x)).split([len(dataset) for dataset in datasets])
    verse, feature = bags(x, vocab_size, n_gram)
    n_features, n = feature.max().item() + 1, (verse < len(train)).sum()  # n: of training verses
    results = []
    for penalty in args.penalties:
        # The weight of a feature that is in no training verse stays 0.
        w = fit_logistic_regression(verse[:n], feature[:n], y[train], n_features, penalty)
        is_right = ((bag_logits(w, verse, feature, len(x)) > 0) == y).float()
        accuracies = {"val": is_right[val].mean().item(), "test": is_right[test].mean().item()}
        results.append({f"{name}_{split}_accuracy": a for split, a in accuracies.items()})
    return max(results, key=lambda result: result[f"{name}_val_accuracy"])


@torch.no_grad()
def draw_words(args, model, dataset, vocab):
    """Write words.png: test verses, colored by what each word adds to the log odds of the New.

    Two verses of each Testament: the one with the worst prediction, and the median one.
    """
    model.eval()
    x, y = dataset.tensors
    log_odds = torch.cat([model(chunk).diff(dim=1)[:, 0] for chunk in x.split(100)])  # (N,)
    order = log_odds.argsort().tolist()
    rows = {name: [i for i in order if y[i] == label] for label, name in enumerate(("Old", "New"))}
    rows["Old"].reverse()
    figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
    line = 0
    for name, verses in rows.items():
        for i in (verses[0], verses[len(verses) // 2]):
            words = [vocab[j] for j in x[i] if j != PAD]
            shares = model.word_logits(x[i : i + 1]).diff(dim=2).flatten()
            title = f"{name} Testament; predicted p(New) = {log_odds[i].sigmoid():.3f}"
            axis.text(0, line, title, weight="bold")
            line, column = line + 1, 0
            for word, share in zip(words, shares.tolist()):
                if column + len(word) > 125:
                    line, column = line + 1, 0
                color = plt.cm.RdBu_r(0.5 + 0.25 * share / shares.abs().max().item())
                box = {"facecolor": color, "edgecolor": "none", "pad": 1}
                axis.text(column, line, word, family="monospace", bbox=box)
                column += len(word) + 1
            line += 2
    axis.set(xlim=(0, 126), ylim=(line, -1), title="red: evidence for the New, blue: for the Old")
    axis.axis("off")
    figure.savefig(args.out_dir / "words.png", dpi=60)
    plt.close(figure)
    model.train()


# ---------- training ----------
def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    *datasets, vocab = load_data(args)
    train_set, val_set, test_set = datasets
    baselines = {"majority_test_accuracy": 1 - test_set.tensors[1].float().mean().item()}
    baselines |= bag_accuracy(args, datasets, len(vocab), 1, "words")
    baselines |= bag_accuracy(args, datasets, len(vocab), 2, "bigrams")
    batches = minibatches(train_set, args.batch_size)
    model = Ensemble(args, len(vocab))
    warmup = min(args.warmup_iters, args.max_iters - 1)  # optax needs it below max_iters
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.max_iters)
    # AdamW also subtracts lr * weight_decay * w from matrices: the embeddings of rare words, which
    # seldom have a gradient, stay near zero.
    matrices = [p.ndim == 2 for p in model.parameters()]
    tx = optax.adamw(schedule, weight_decay=args.weight_decay, mask=matrices)
    optimizer = OptaxOptimizer(model.parameters(), tx)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["learning_rate"] = float(schedule(iter_num))
            record |= evaluate(model, val_set, "val") | evaluate(model, test_set, "test")
            record |= baselines
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        # Each network has a loss of its own: together they would learn to share the work, alone
        # they make different mistakes, which the mean of their logits evens out.
        losses = [F.cross_entropy(network(x), y) for network in model.networks]
        loss = torch.stack(losses).mean()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    draw_words(args, model, test_set, vocab)
    print(f"test accuracy, in % of {len(test_set)} verses, after {record['seconds']:.0f} s:")
    for name in ("majority_", "words_", "bigrams_", ""):
        p = record[f"{name}test_accuracy"]
        error = math.sqrt(p * (1 - p) / len(test_set))  # the standard error
        print(f"  {name.strip('_') or 'transformer':11} {100 * p:.2f} +- {100 * error:.2f}")
    print(f"picture: {plot_run(args.out_dir)}")
    return record


# ---------- command line ----------
def number(kind, low, high=1e9):
    """Return an argparse type: an int or float (kind) from low to high."""

    def convert(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise ValueError

    convert.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse's error shows it
    return convert


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("data").add_argument
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[2] / "data")
    flag("--data_dir", type=Path, default=data_dir, help="directory with kjv/kjv.txt")
    flag("--run_length", type=number(int, 1, 3000), default=1, help="verses held out in a row")
    flag("--batch_size", type=number(int, 1), default=64, help="verses per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=102, help="maximum number of words")
    flag("--n_layer", type=number(int, 0), default=2, help="number of blocks")
    flag("--n_head", type=number(int, 1), default=4, help="attention heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), default=64, help="size of an embedding")
    flag("--dropout", type=number(float, 0, 0.99), default=0, help="usually 0 to 0.5")
    flag("--word_dropout", type=number(float, 0, 0.99), default=0.5, help="usually 0 to 0.5")
    flag("--n_models", type=number(int, 1), default=3, help="networks whose logits are averaged")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=1e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=200, help="linear warm-up; usually 1-10%%")
    flag("--weight_decay", type=number(float, 0), default=2, help="of matrices; usually 0.01-1")
    flag("--max_iters", type=number(int, 1), default=3000, help="number of parameter updates")
    flag = parser.add_argument_group("logistic regression").add_argument
    penalties = [1e-4, 3e-5, 1e-5, 3e-6]
    flag("--penalties", type=number(float, 1e-9), nargs="+", default=penalties, help="of L2")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=1000, help="iterations per evaluation")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    args = parser.parse_args(argv)
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    return args


if __name__ == "__main__":
    try:
        train(parse_args())
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
