"""Step 11: the next word of Shakespeare, from the words before it.

Parent:  08_mnist_adam
New:     read_text, split_words, encode, windows, WordMLP
Changed: load_data, minibatches, evaluate, train, parse_args
Gone:    MLP

A language model predicts the next word: the classes are the words of a vocabulary, x the block_size
words before it. Each word has a learned vector, its embedding, and similar words get similar ones.
A text of 263,144 words is easily memorized, so regularization is part of the idea: more dropout,
weight tying, and decoupled weight decay (AdamW), which shrinks the weights at every update instead
of adding a penalty to the loss. Layer norm keeps the scale of the activations. Perplexity is
exp(loss): the model is as uncertain as between that many equally likely words.

Try:     --dropout 0 --weight_decay 0 (the curves part: why?), --block_size 2 (a trigram's context)
Source:  Bengio et al. 2003, "A neural probabilistic language model"; Loshchilov and Hutter 2019
         (AdamW); Press and Wolf 2017, "Using the output embedding to improve language models".
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
from collections import Counter
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(args):
    """Return the text of --input, by default tiny Shakespeare, which is downloaded if missing."""
    path = args.input or args.data_dir / "shakespeare" / "input.txt"
    try:
        if args.input is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, path, SHA256, progress=False)
        return path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        problem = f"--input {path}: missing or not UTF-8 text ({error!r:.99}); put a text there, or"
        raise OSError(f"{problem} stand-ins: python tests/standins.py {args.data_dir}") from error


def split_words(text):
    """Return the words, punctuation marks and newlines of a text in order, case kept."""
    return re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]|\n", text)


def encode(words, vocab):
    """Return the ids (len(words),) of words; a word outside the vocabulary becomes 0, <unk>."""
    ids = {word: i for i, word in enumerate(vocab)}
    return torch.tensor([ids.get(word, 0) for word in words])


def windows(ids, block_size):
    """Return a TensorDataset of all windows x (T,), T = block_size words, and the next word y."""
    chunks = ids.unfold(0, block_size + 1, 1)  # (len(ids) - T, T + 1)
    return TensorDataset(chunks[:, :-1], chunks[:, -1])


def load_data(args):
    """Return the ids of the training and the test words, and the vocabulary, a list of words.

    The first 90% of the characters are the training text. It alone determines the vocabulary: the
    words that occur at least twice, and <unk>, which stands for all others.
    """
    text = read_text(args)
    split = int(0.9 * len(text))
    train_words, test_words = split_words(text[:split]), split_words(text[split:])
    counts = Counter(train_words)
    vocab = ["<unk>", *sorted(word for word in counts if counts[word] >= 2)]
    if len(train_words) <= args.block_size or not test_words or len(vocab) == 1:
        n = f"--input: {len(train_words)} training, {len(test_words)} test, {len(vocab)} known"
        raise argparse.ArgumentTypeError(f"{n} words: too few for --block_size {args.block_size}")
    train_ids, test_ids = encode(train_words, vocab), encode(test_words, vocab)
    # The context of the first test words is the end of the training text: each is scored once.
    return train_ids, torch.cat([train_ids[-args.block_size :], test_ids]), vocab


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    while True:  # a whole minibatch at once: a DataLoader would fetch its examples one by one
        for batch in torch.randperm(len(dataset)).split(batch_size):
            yield dataset[batch]


# ---------- model ----------
# B batch, T words, C n_embd, H n_hidden, V vocab_size
class WordMLP(nn.Module):
    """Maps x (B, T) to logits (B, V): the T words' embeddings, concatenated, and a hidden layer."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.c_fc = nn.Linear(args.block_size * args.n_embd, args.n_hidden)
        self.ln_1 = nn.LayerNorm(args.n_hidden)  # normalizes each example over its units
        self.c_proj = nn.Linear(args.n_hidden, args.n_embd)
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.lm_head = nn.Linear(args.n_embd, vocab_size)
        self.dropout = nn.Dropout(args.dropout)  # zeroes this fraction of its input in training
        nn.init.normal_(self.wte.weight, std=0.05)  # with torch's std of 1, logits would be large
        self.lm_head.weight = self.wte.weight  # weight tying: logit = x . embedding + bias

    def forward(self, x):
        x = self.dropout(self.wte(x)).flatten(1)  # (B, T * C)
        x = self.dropout(F.gelu(self.ln_1(self.c_fc(x))))  # (B, H); GELU is a smooth ReLU
        x = self.dropout(self.ln_f(self.c_proj(x)))  # (B, C)
        return self.lm_head(x)  # (B, V)


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
    """Return {name}_loss, the mean loss in nats per word, over a TensorDataset."""
    model.eval()  # no dropout
    loss = 0.0
    for x, y in zip(*(tensor.split(512) for tensor in dataset.tensors)):
        loss += F.cross_entropy(model(x), y, reduction="sum").item()
    model.train()
    return {f"{name}_loss": loss / len(dataset)}


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
    train_ids, test_ids, vocab = load_data(args)
    train_set, test_set = (windows(ids, args.block_size) for ids in (train_ids, test_ids))
    train_eval = TensorDataset(*train_set[: len(test_set)])  # as many words as the test set has
    batches = minibatches(train_set, args.batch_size)
    model = WordMLP(args, len(vocab))
    # The output bias starts at the log unigram frequencies: they need not be learned.
    counts = torch.bincount(train_ids, minlength=len(vocab)) + 0.5  # <unk> may not occur
    model.lm_head.bias.data = torch.log(counts / counts.sum())
    warmup = min(args.warmup_iters, args.max_iters - 1)  # optax needs it below max_iters
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.max_iters)
    # AdamW also subtracts lr * weight_decay * w from matrices; b2 = 0.99 adapts faster than 0.999.
    matrices = [p.ndim == 2 for p in model.parameters()]
    tx = optax.adamw(schedule, b2=0.99, weight_decay=args.weight_decay, mask=matrices)
    optimizer = OptaxOptimizer(model.parameters(), tx)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | versions, default=str))

    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["learning_rate"] = float(schedule(iter_num))
            record |= evaluate(model, train_eval, "train") | evaluate(model, test_set, "test")
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    perplexity = math.exp(min(record["test_loss"], 700))  # math.exp overflows above 709
    print(f"test perplexity {perplexity:.2f} after {record['seconds']:.0f} s")
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
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[1] / "data")
    flag("--data_dir", type=Path, default=data_dir, help="directory with shakespeare/input.txt")
    flag("--input", type=Path, help="UTF-8 text file to train on instead of tiny Shakespeare")
    flag("--batch_size", type=number(int, 1), default=512, help="windows per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=8, help="words of context")
    flag("--n_embd", type=number(int, 1), default=128, help="size of an embedding")
    flag("--n_hidden", type=number(int, 1), default=512, help="units of the hidden layer")
    flag("--dropout", type=number(float, 0, 0.99), default=0.4, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=2e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=300, help="linear warm-up; usually 1-10%%")
    flag("--weight_decay", type=number(float, 0), default=0.5, help="of matrices; usually 0.01-0.5")
    flag("--max_iters", type=number(int, 1), default=6000, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        train(parse_args())
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
