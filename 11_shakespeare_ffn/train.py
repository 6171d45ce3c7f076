"""Step 11: the next word of Shakespeare, from the words before it.

Parent:  10_mnist_resnet
New:     split_words, encode, windows, WordMLP
Changed: load_data, OptaxAdam, evaluate, train, parse_args
Gone:    augment, Block, ResNet

The classes are now the words of a vocabulary and x is the block_size words before the one to
guess. Every word gets a vector, learned with the rest: what the model learns about one word serves
all words like it. 263,144 words are few, so the lesson is also to forget: without dropout and
weight decay the model learns them by heart. LayerNorm, and a rate that first rises (warm-up), keep
the first iterations calm. Watch the test loss pass the best n-gram model's.

Try:     --dropout 0 --weight_decay 0 (the curves part: why?)
         --block_size 2 (a trigram model's view); --input FILE (any UTF-8 text)
Source:  Bengio et al. 2003, "A neural probabilistic language model"; Press and Wolf 2017, "Using
         the output embedding to improve language models".
"""

import argparse
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------


TEXT_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download(url, sha256, path, data_dir):
    """Fetch url to path, if it is not there; it appears whole and checked, unpacked from .gz."""
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        content = gzip.decompress(content) if url.endswith(".gz") else content
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError("wrong SHA-256")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        part.rename(path)
    except (OSError, EOFError, http.client.HTTPException) as error:
        fail(
            f"{path} is missing and {url} did not arrive ({error}): put the file there, "
            f"or make a stand-in with: python tests/standins.py {data_dir}"
        )


def split_words(text):
    """Return the words, punctuation marks and newlines of a text in their order, case kept."""
    return re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]|\n", text)


def encode(words, vocab):
    """Return the ids (len(words),) of words; a word outside the vocabulary becomes 0, <unk>."""
    ids = {word: i for i, word in enumerate(vocab)}
    return torch.tensor([ids.get(word, 0) for word in words])


def windows(ids, block_size):
    """Return a TensorDataset of every x (T,), T = block_size words, and y, the word after them."""
    parts = ids.unfold(0, block_size + 1, 1)  # (len(ids) - T, T + 1)
    return TensorDataset(parts[:, :-1], parts[:, -1])


def load_data(args):
    """Return the windows of the training and the test part, and the vocabulary, a list of words.

    The first 90% of the characters train. The vocabulary comes from them alone: <unk>, which
    stands for all other words, and the words seen at least twice.
    """
    path = args.input or args.data_dir / "shakespeare" / "input.txt"
    if args.input is None:
        download(TEXT_URL, TEXT_SHA256, path, args.data_dir)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--input {path}: not a readable UTF-8 text ({error})")
    cut = int(0.9 * len(text))
    train_words, test_words = split_words(text[:cut]), split_words(text[cut:])
    if len(train_words) <= args.block_size or not test_words:
        n_words = f"{len(train_words)} words to train on, {len(test_words)} to test"
        fail(f"--input {path}: {n_words}, too few for --block_size {args.block_size}")
    counts = Counter(train_words)
    vocab = ["<unk>", *sorted(word for word in counts if counts[word] >= 2)]
    if len(vocab) == 1:
        fail(f"--input {path}: no word occurs twice")
    train_ids, test_ids = encode(train_words, vocab), encode(test_words, vocab)
    # The first test words are guessed from the training words before them: each counts once.
    test_ids = torch.cat([train_ids[-args.block_size :], test_ids])
    return windows(train_ids, args.block_size), windows(test_ids, args.block_size), vocab


def minibatches(dataset, batch_size):
    """Yield batches (x, y) without end, reshuffled every epoch; an incomplete one is skipped."""
    # The dataset is asked for a whole batch at a time: much faster than for its examples singly.
    batches = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    loader = DataLoader(dataset, sampler=batches, batch_size=None)
    while True:
        yield from loader


# ---------- model ----------


class WordMLP(nn.Module):
    """Maps x (B, T) to logits (B, V): T vectors side by side through one hidden layer.

    B batch, T block_size, C n_embd, H n_hidden, V vocab_size
    """

    def __init__(self, block_size, n_embd, n_hidden, vocab_size, dropout):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.c_fc = nn.Linear(block_size * n_embd, n_hidden)
        self.ln_1 = nn.LayerNorm(n_hidden)
        self.c_proj = nn.Linear(n_hidden, n_embd)
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wte.weight, std=0.05)
        self.lm_head.weight = self.wte.weight  # tied: one vector a word, to read and to write it

    def forward(self, x):
        x = self.dropout(self.wte(x)).flatten(1)  # (B, T * C)
        x = self.dropout(F.gelu(self.ln_1(self.c_fc(x))))  # (B, H)
        x = self.dropout(self.ln_f(self.c_proj(x)))  # (B, C)
        return self.lm_head(x)  # (B, V)


# ---------- optimizer ----------


class OptaxAdam:
    """optax.adamw with a schedule (iteration to learning rate) over torch parameters on the CPU."""

    def __init__(self, params, schedule, weight_decay):
        jax.config.update("jax_platforms", "cpu")  # never take memory on a GPU
        self.params = list(params)
        decay = [p.ndim == 2 for p in self.params]  # the matrices, not biases and scales
        self.tx = optax.adamw(schedule, b2=0.99, weight_decay=weight_decay, mask=decay)
        self.state = self.tx.init([jax.dlpack.from_dlpack(p.detach()) for p in self.params])
        self.update = jax.jit(self._update)

    def _update(self, params, grads, state):
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        # dlpack passes addresses, not numbers: JAX reads torch's memory, then torch reads JAX's.
        params = [jax.dlpack.from_dlpack(p.detach()) for p in self.params]
        grads = [jax.dlpack.from_dlpack(p.grad) for p in self.params]
        params, self.state = self.update(params, grads, self.state)
        for p, new in zip(self.params, jax.block_until_ready(params)):
            p.data = torch.from_dlpack(new)


# ---------- evaluation ----------


@torch.no_grad()
def evaluate(model, dataset, name):
    """Return the mean loss (nats) over every y of a TensorDataset, each once, as name_loss."""
    model.eval()
    loss = 0.0
    for x, y in zip(*(tensor.split(512) for tensor in dataset.tensors)):
        loss += F.cross_entropy(model(x), y, reduction="sum").item()
    model.train()
    return {f"{name}_loss": loss / len(dataset)}


# ---------- training ----------


def start_run(args):
    """Make out_dir with an empty metrics.jsonl, and args.json, which tells what made the run."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / "metrics.jsonl").write_text("")
    made_by = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | made_by, default=str))


def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it above the progress bar; stop at inf or nan."""
    if not all(map(math.isfinite, record.values())):
        fail(f"no longer finite, --learning_rate {args.learning_rate}: {record}")
    with open(args.out_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    train_set, test_set, vocab = load_data(args)
    if args.batch_size > len(train_set):
        fail(f"--batch_size {args.batch_size} is over the {len(train_set)} training windows")
    train_part = TensorDataset(*train_set[: len(test_set)])  # as many as there are test words
    batches = minibatches(train_set, args.batch_size)
    model = WordMLP(args.block_size, args.n_embd, args.n_hidden, len(vocab), args.dropout)
    # Before it reads a word, the model guesses each one as often as it occurs.
    counts = torch.bincount(train_set.tensors[1], minlength=len(vocab)) + 0.5
    model.lm_head.bias.data = torch.log(counts / counts.sum())
    warmup_iters = min(args.warmup_iters, args.max_iters - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0, args.learning_rate, warmup_iters, args.max_iters
    )
    optimizer = OptaxAdam(model.parameters(), schedule, args.weight_decay)
    start_run(args)

    for iter_num in (bar := tqdm(range(args.max_iters + 1), disable=None)):
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["learning_rate"] = float(schedule(iter_num))
            record |= evaluate(model, train_part, "train") | evaluate(model, test_set, "test")
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break

        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if not math.isfinite(loss.item()):
            fail(f"loss {loss} at iteration {iter_num}, --learning_rate {args.learning_rate}")
        if iter_num % args.log_interval == 0:
            bar.set_postfix(loss=f"{loss:.4f}")

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    perplexity = math.exp(min(record["test_loss"], 700))  # a float ends at exp(709)
    print(f"test perplexity {perplexity:.2f} after {record['seconds']:.0f} s")
    print(f"picture: {plot_run(args.out_dir)}")
    return record


# ---------- command line ----------


def fail(message, exit_code=2):
    """Leave with one line on standard error."""
    tqdm.write(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def number(kind, low, high=1e9):
    """Return an argparse type: an int or float (kind) from low to high."""

    def convert(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise ValueError

    convert.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse puts it in its error
    return convert


def parse_args(argv=None):
    """Return the flags of the command line (or of argv), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = Path(__file__).resolve().parent
    flag = parser.add_argument_group("data").add_argument
    data_dir = os.environ.get("DATA_DIR", here.parent / "data")
    flag("--data_dir", type=Path, default=data_dir, help="holds shakespeare/input.txt")
    flag("--input", type=Path, help="train on this UTF-8 text instead")
    flag("--batch_size", type=number(int, 1), default=512, help="examples in a minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=8, help="words that the model sees")
    flag("--n_embd", type=number(int, 1), default=128, help="length of a word's vector")
    flag("--n_hidden", type=number(int, 1), default=512, help="units in the hidden layer")
    flag("--dropout", type=number(float, 0, 0.99), default=0.45, help="share of units dropped")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 1e-9), default=2e-3, help="Adam's, at its highest")
    flag("--warmup_iters", type=number(int, 0), default=300, help="iterations of rising rate")
    flag("--weight_decay", type=number(float, 0), default=0.5, help="pull of matrices to 0")
    flag("--max_iters", type=number(int, 1), default=3500, help="minibatches to train on")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=10, help="iterations between bar updates")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()
    try:
        train(args)
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
