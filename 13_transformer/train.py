"""Step 13: a causal transformer.

Parent:  12_sampling
New:     scored_windows, CausalSelfAttention, MLP, Block, GPT
Changed: windows, load_data, evaluate, generate, sample, train, parse_args
Gone:    WordMLP

N words in, N next words out: every position guesses the word after it, in one pass. Attention lets
a position gather from all positions before it, at weights that it works out from the words; the
mask, a triangle, hides what comes later. So a far longer context costs little, and each word of a
window teaches. Compare the test loss with step 12's.

Try:     --no-sdpa (attention written out; the same numbers)
         --n_layer 1, or --block_size 8 --eval_stride 4 (what do depth and context give?)
Source:  Vaswani et al. 2017, "Attention is all you need"; Radford et al. 2019, "Language models are
         unsupervised multitask learners" (GPT-2, whose names these are).
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


def join_words(words):
    """Return the words as text: no space before a comma, none around a newline or a hyphen."""
    text = re.sub(r" ?([\n-]) ?", r"\1", " ".join(words))
    text = re.sub(r" ([,.;:!?])", r"\1", text)
    text = re.sub(r"\b(th|o|i) '", r"\1'", text)  # o' the
    return re.sub(r"(?<!\S)' (?=\w)", "'", text)  # 'tis


def windows(ids, block_size):
    """Return a TensorDataset of every x (T,), T = block_size words, and y (T,), the ones after."""
    parts = ids.unfold(0, block_size + 1, 1)  # (len(ids) - T, T + 1)
    return TensorDataset(parts[:, :-1], parts[:, 1:])


def scored_windows(ids, block_size, stride):
    """Return windows that begin stride words apart, each to be scored on its last stride words.

    The first T - stride + 1 ids are only read; every later one is scored once, with at least
    T - stride words before it. Where y is -100, cross_entropy does not look.
    """
    parts = F.pad(ids, (0, stride), value=-100).unfold(0, block_size + 1, stride)  # (N, T + 1)
    x, y = parts[:, :-1].clamp(min=0), parts[:, 1:].clone()
    y[:, :-stride] = -100
    return TensorDataset(x, y)


def load_data(args):
    """Return windows to train on, to score in training and in test text, and the vocabulary.

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
    context = args.block_size - args.eval_stride + 1
    if len(train_words) <= args.block_size or len(test_words) <= context:
        n_words = f"{len(train_words)} words to train on, {len(test_words)} to test"
        fail(f"--input {path}: {n_words}, too few for --block_size {args.block_size}")
    counts = Counter(train_words)
    vocab = ["<unk>", *sorted(word for word in counts if counts[word] >= 2)]
    if len(vocab) == 1:
        fail(f"--input {path}: no word occurs twice")
    train_ids, test_ids = encode(train_words, vocab), encode(test_words, vocab)
    # The first test words are guessed from the training words before them: each counts once.
    train_part = scored_windows(train_ids[: len(test_ids)], args.block_size, args.eval_stride)
    test_ids = torch.cat([train_ids[-context:], test_ids])
    test_set = scored_windows(test_ids, args.block_size, args.eval_stride)
    return windows(train_ids, args.block_size), train_part, test_set, vocab


def minibatches(dataset, batch_size):
    """Yield batches (x, y) without end, reshuffled every epoch; an incomplete one is skipped."""
    # The dataset is asked for a whole batch at a time: much faster than for its examples singly.
    batches = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    loader = DataLoader(dataset, sampler=batches, batch_size=None)
    while True:
        yield from loader


# ---------- model ----------


# B batch, T words, C n_embd, H n_head, D = C / H, V vocab_size


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and the positions before it, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.sdpa = args.sdpa
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            # A sum of D products grows like sqrt(D); divided by it, the softmax starts out soft.
            scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)
            mask = torch.ones(T, T, dtype=torch.bool).tril()  # row t may look at columns 0 to t
            y = scores.masked_fill(~mask, -math.inf).softmax(dim=3) @ v  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Every position works on what it gathered, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, T, 4C) inside


class Block(nn.Module):
    """Two residual steps, each on normalised input: attention, then the MLP."""

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
        self.dropout = nn.Dropout(args.dropout)
        nn.init.normal_(self.wte.weight, std=0.05)
        nn.init.normal_(self.wpe.weight, std=0.05)
        for name, p in self.h.named_parameters():
            if name.endswith("c_proj.weight"):  # small: every block begins near the identity
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
        self.lm_head.weight = self.wte.weight  # tied: one vector a word, to read and to write it

    def forward(self, x):
        x = self.dropout(self.wte(x) + self.wpe.weight[: x.shape[1]])  # (B, T, C)
        x = self.dropout(self.ln_f(self.h(x)))  # (B, T, C)
        return self.lm_head(x)  # (B, T, V)


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
    """Return the mean loss (nats) over every scored y of a TensorDataset as name_loss."""
    model.eval()
    loss = 0.0
    for x, y in zip(*(tensor.split(16) for tensor in dataset.tensors)):
        loss += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return {f"{name}_loss": loss / (dataset.tensors[1] >= 0).sum().item()}


@torch.no_grad()
def generate(args, model, ids):
    """Return ids (1, N) and max_new_tokens more, each drawn from the model's guess."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)  # training draws from another one
    for _ in range(args.max_new_tokens):
        logits = model(ids[:, -args.block_size :])[:, -1]  # (1, V)
        logits[:, 0] = -math.inf  # <unk> is no word to write
        if args.top_k:
            kth = logits.topk(args.top_k).values[:, -1:]  # (1, 1)
            logits[logits < kth] = -math.inf
        p = (logits / args.temperature).softmax(dim=1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    model.train()
    return ids


def sample(args, model, vocab):
    """Return a text that begins with --prompt and that the model goes on with."""
    ids = generate(args, model, encode(split_words(args.prompt) or ["\n"], vocab)[None])
    return join_words(vocab[i] for i in ids[0])


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
    train_set, train_part, test_set, vocab = load_data(args)
    if args.batch_size > len(train_set):
        fail(f"--batch_size {args.batch_size} is over the {len(train_set)} training windows")
    if args.top_k > len(vocab):
        fail(f"--top_k {args.top_k} is over the {len(vocab)} words of the vocabulary")
    unknown = sorted(set(split_words(args.prompt)) - set(vocab))
    if unknown:
        print(f"--prompt: not in the vocabulary, read as <unk>: {unknown}")
    batches = minibatches(train_set, args.batch_size)
    model = GPT(args, len(vocab))
    # Before it reads a word, the model guesses each one as often as it occurs.
    counts = torch.bincount(train_set.tensors[1][:, 0], minlength=len(vocab)) + 0.5
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
            log_sample(args, record, sample(args, model, vocab))
            if iter_num == args.max_iters:
                break

        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
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
    flag("--batch_size", type=number(int, 1), default=16, help="examples in a minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=32, help="words that the model sees")
    flag("--n_layer", type=number(int, 1), default=2, help="blocks")
    flag("--n_head", type=number(int, 1), default=4, help="heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), default=128, help="length of a word's vector")
    flag("--dropout", type=number(float, 0, 0.99), default=0.2, help="share of units dropped")
    sdpa = argparse.BooleanOptionalAction
    flag("--sdpa", action=sdpa, default=True, help="torch's attention, not the one written out")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 1e-9), default=3e-3, help="Adam's, at its highest")
    flag("--warmup_iters", type=number(int, 0), default=300, help="iterations of rising rate")
    flag("--weight_decay", type=number(float, 0), default=0.5, help="pull of matrices to 0")
    flag("--max_iters", type=number(int, 1), default=4000, help="minibatches to train on")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="the samples' beginning; unknown words become <unk>")
    flag("--max_new_tokens", type=number(int, 0), default=100, help="words in a sample")
    flag("--temperature", type=number(float, 1e-6), default=0.8, help="1: as guessed; less: safer")
    flag("--top_k", type=number(int, 0), default=40, help="of the k likeliest only; 0: of all")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_stride", type=number(int, 1), default=16, help="words a test window is scored on")
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=10, help="iterations between bar updates")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    args = parser.parse_args(argv)
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.eval_stride > args.block_size:
        parser.error(f"--eval_stride {args.eval_stride} is over --block_size {args.block_size}")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        train(args)
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
