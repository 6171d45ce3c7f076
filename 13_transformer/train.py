"""Step 13: a causal transformer.

Parent:  12_sampling
New:     CausalSelfAttention, MLP, Block, GPT
Changed: windows, load_data, evaluate, generate, sample, train, parse_args
Gone:    WordMLP

T words in, T next words out: 16 windows of T = 32 words hold 512 examples, as step 11's minibatch
does. In self-attention a position takes a weighted mean over itself and the positions before it
(later ones hold the words to predict), with weights computed from the words: a longer context adds
no parameters to a block. The model needs less dropout than step 11's, and a higher learning rate.

Try:     --n_layer 1 (what does depth give?)
         --block_size 8 --eval_stride 4 --batch_size 64 (what does context give?)
Source:  Vaswani et al. 2017, "Attention is all you need"; Radford et al. 2019, "Language models are
         unsupervised multitask learners" (GPT-2, whose names and normalization these are).
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


def join_words(words):
    """Return the words as text: no space before a comma, none around a newline or a hyphen."""
    text = re.sub(r" ?([\n-]) ?", r"\1", " ".join(words))
    text = re.sub(r" ([,.;:!?])", r"\1", text)
    text = re.sub(r"\b(th|o|i) '", r"\1'", text)  # o' the
    return re.sub(r"(?<!\S)' (?=\w)", "'", text)  # 'tis


def windows(ids, block_size):
    """Return a TensorDataset of all windows x (T,), T = block_size words, and next words y (T,)."""
    chunks = ids.unfold(0, block_size + 1, 1)  # (len(ids) - T, T + 1)
    return TensorDataset(chunks[:, :-1], chunks[:, 1:])


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
    context = args.block_size - args.eval_stride + 1
    return train_ids, torch.cat([train_ids[-context:], test_ids]), vocab


def minibatches(dataset, batch_size):
    """Yield minibatches (x, y) forever, reshuffled every epoch; an epoch's last may be smaller."""
    while True:  # a whole minibatch at once: a DataLoader would fetch its examples one by one
        for batch in torch.randperm(len(dataset)).split(batch_size):
            yield dataset[batch]


# ---------- model ----------
# B batch, T words, C n_embd, H n_head, D = C / H, V vocab_size
class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it, (B, T, C) to (B, T, C).

    Linear maps give each position a query q, a key k and a value v. The dot product of position i's
    query with position j's key scores how relevant j is to i; softmax turns the scores into weights
    of a mean over the values. Each of H heads has its own q, k, v: a position can attend in H ways.
    """

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # If q and k have variance 1, q . k has variance D: divide by sqrt(D), or softmax saturates.
        scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)
        mask = torch.ones(T, T, dtype=torch.bool).tril()  # position t sees positions 0 to t
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
        self.attn = CausalSelfAttention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd)
        self.mlp = MLP(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Maps x (B, T), T up to block_size, to the logits (B, T, V) of the word after each."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.Sequential(*(Block(args) for _ in range(args.n_layer)))
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.lm_head = nn.Linear(args.n_embd, vocab_size)
        self.dropout = nn.Dropout(args.dropout)  # zeroes this fraction of its input in training
        nn.init.normal_(self.wte.weight, std=0.05)  # with torch's std of 1, logits would be large
        nn.init.normal_(self.wpe.weight, std=0.05)
        for name, p in self.h.named_parameters():
            if name.endswith("c_proj.weight"):  # the 2 n_layer residuals add up: start them small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
        self.lm_head.weight = self.wte.weight  # weight tying: logit = x . embedding + bias

    def forward(self, x):
        # A weighted mean ignores order: the position embeddings wpe say where each word stands.
        x = self.dropout(self.wte(x) + self.wpe.weight[: x.shape[1]])  # (B, T, C)
        return self.lm_head(self.dropout(self.ln_f(self.h(x))))  # (B, T, V)


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
def evaluate(args, model, ids, name):
    """Return {name}_loss, the mean loss in nats per word: sliding-window evaluation.

    A window's first words have little context. So windows start eval_stride words apart and count
    only their last eval_stride targets, each after T - eval_stride + 1 words of context or more.
    """
    model.eval()  # no dropout
    ids = F.pad(ids, (0, args.eval_stride), value=-100)  # cross_entropy's ignore_index
    chunks = ids.unfold(0, args.block_size + 1, args.eval_stride)  # (N, T + 1)
    inputs, targets = chunks[:, :-1].clamp(min=0), chunks[:, 1:].clone()  # chunks share memory
    targets[:, : -args.eval_stride] = -100
    loss = 0.0
    for x, y in zip(inputs.split(16), targets.split(16)):
        loss += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return {f"{name}_loss": loss / (targets >= 0).sum().item()}


@torch.no_grad()
def generate(args, model, ids):
    """Return ids (1, N) followed by max_new_tokens ids sampled from the model."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)  # not the generator of training
    for _ in range(args.max_new_tokens):
        logits = model(ids[:, -args.block_size :])[:, -1]  # (1, V)
        logits[:, 0] = -math.inf  # never sample <unk>
        if args.top_k:
            kth = logits.topk(min(args.top_k, logits.shape[1])).values[:, -1:]  # (1, 1)
            logits[logits < kth] = -math.inf
        p = (logits / args.temperature).softmax(dim=1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)  # (1, N + 1)
    model.train()
    return ids


def sample(args, model, vocab):
    """Return --prompt and its continuation by the model, as text."""
    ids = generate(args, model, encode(split_words(args.prompt) or ["\n"], vocab)[None])
    return join_words(vocab[i] for i in ids[0])


# ---------- training ----------
def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it; a loss that is inf or nan ends the run."""
    if not all(map(math.isfinite, record.values())):
        problem = f"the loss is no longer finite at iteration {record['iter']}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    with open(args.out_dir / "metrics.jsonl", "a" if record["iter"] else "w") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def log_sample(args, record, text):
    """Append a sample to samples.txt, under its iteration and loss, and print it."""
    mode = "a" if record["iter"] else "w"
    with open(args.out_dir / "samples.txt", mode, encoding="utf-8") as file:
        file.write(f"=== iter {record['iter']}, test_loss {record['test_loss']:.4f}\n{text}\n\n")
    tqdm.write(f"{text}\n")


def train(args):
    """Run the whole step; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    train_ids, test_ids, vocab = load_data(args)
    train_eval = train_ids[: len(test_ids)]  # as many words as the test set has
    batches = minibatches(windows(train_ids, args.block_size), args.batch_size)
    model = GPT(args, len(vocab))
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
            record |= evaluate(args, model, train_eval, "train")
            record |= evaluate(args, model, test_ids, "test")
            log_metrics(args, record)
            log_sample(args, record, sample(args, model, vocab))
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())  # the mean over B * T words
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
    flag("--batch_size", type=number(int, 1), default=16, help="windows per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=32, help="words of context")
    flag("--n_layer", type=number(int, 1), default=2, help="number of blocks")
    flag("--n_head", type=number(int, 1), default=8, help="attention heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), default=128, help="size of an embedding")
    flag("--dropout", type=number(float, 0, 0.99), default=0.15, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=3e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=300, help="linear warm-up; usually 1-10%%")
    flag("--weight_decay", type=number(float, 0), default=0.5, help="of matrices; usually 0.01-0.5")
    flag("--max_iters", type=number(int, 1), default=6000, help="number of parameter updates")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="start of the samples, by default a newline")
    flag("--max_new_tokens", type=number(int, 0), default=100, help="words per sample")
    flag("--temperature", type=number(float, 1e-6), default=0.8, help="usually 0.5 to 1")
    flag("--top_k", type=number(int, 0), default=40, help="sample from the k most likely; 0: all")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_stride", type=number(int, 1), default=16, help="words between evaluation windows")
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    args = parser.parse_args(argv)
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.eval_stride > args.block_size:
        parser.error(f"--eval_stride {args.eval_stride} is over --block_size {args.block_size}")
    return args


if __name__ == "__main__":
    if sys.stdout:  # None if closed; its encoding may lack characters of a sample
        sys.stdout.reconfigure(errors="replace")
    try:
        train(parse_args())
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
