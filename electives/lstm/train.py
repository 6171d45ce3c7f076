"""Elective lstm: recurrent networks, from the plain cell to the LSTM.

Parent:  12_sampling
New:     rnn_cell, gru_cell, lstm_cell, RecurrentLayer, WordRNN, gradient_norms
Changed: minibatches, evaluate, generate, sample, train, parse_args
Gone:    windows, WordMLP

A recurrent network reads one word at a time and keeps what it has read in a state of fixed size.
Gates decide what enters the state, what it keeps and what it outputs, so that the gradient reaches
words far back, where a plain RNN's vanishes: in the right panel of loss.png, gradient_k shows how
much the loss of a word depends on the word that was read k words earlier. Backpropagation through
time is truncated to windows of block_size words; the state is carried on from window to window.

Try:     --cell rnn, --cell gru (then gradients.py RUN RUN RUN compares the three)
         --block_size 2 --batch_size 256 (what is lost when gradients go back two words only?)
Source:  Hochreiter and Schmidhuber 1997, "Long short-term memory"; Gers et al. 2000, "Learning to
         forget" (the forget gate); Cho et al. 2014, "Learning phrase representations using RNN
         encoder-decoder for statistical machine translation" (the gated recurrent unit); Pascanu et
         al. 2013, "On the difficulty of training recurrent neural networks".
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
from itertools import count
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
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


def minibatches(ids, batch_size, block_size):
    """Yield x (B, T) and y (B, T), the words after them, forever; B rows read the text in parallel.

    Row b of a minibatch continues row b of the one before, so that its state can be carried on.
    The rows start at equal distances, and after the last word of the text comes the first again.
    """
    starts = torch.arange(batch_size) * len(ids) // batch_size  # (B,)
    for offset in count(0, block_size):
        places = starts[:, None] + offset + torch.arange(block_size + 1)  # (B, T + 1)
        chunks = ids[places % len(ids)]
        yield chunks[:, :-1], chunks[:, 1:]


# ---------- model ----------
# B batch, T words, C n_embd, H n_hidden, V vocab_size
def rnn_cell(x, u, state):
    """Return the next state (h,) of a plain RNN; x = W x_t + b and u = U h + b' are (B, H)."""
    return (torch.tanh(x + u),)


def gru_cell(x, u, state):
    """Return the next state (h,) of a gated recurrent unit; x and u are (B, 3H)."""
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, dim=1)  # (B, H) each
    u_r, u_z, u_n = u.chunk(3, dim=1)
    r = torch.sigmoid(x_r + u_r)  # reset gate: how much of the past the candidate sees
    z = torch.sigmoid(x_z + u_z)  # update gate: how much of the state stays as it is
    n = torch.tanh(x_n + r * u_n)  # candidate; r acts after the product with U, as in nn.GRU
    return ((1 - z) * n + z * h,)


def lstm_cell(x, u, state):
    """Return the next state (h, c) of an LSTM: output and memory cell; x and u are (B, 4H)."""
    _, c = state
    i, f, g, o = (x + u).chunk(4, dim=1)  # (B, H) each
    i = torch.sigmoid(i)  # input gate: how much of the candidate enters the cell
    f = torch.sigmoid(f)  # forget gate: how much of the cell stays
    g = torch.tanh(g)  # candidate
    o = torch.sigmoid(o)  # output gate: how much of the cell is output
    # The cell changes by addition. The gates aside, its derivative with respect to its old value is
    # f: where f is near 1, the gradient reaches far back. A plain RNN multiplies the gradient by U
    # and by the derivative of tanh, at most 1, for every word: it tends to vanish, or to explode.
    c = f * c + i * g
    return o * torch.tanh(c), c


# Per cell: its function, the number of chunks of x and u (gates and candidate), of state tensors.
CELLS = {"rnn": (rnn_cell, 1, 1), "gru": (gru_cell, 3, 1), "lstm": (lstm_cell, 4, 2)}


class RecurrentLayer(nn.Module):
    """Maps x (B, T, C) and a state, tensors (B, H), to outputs h (B, T, H) and the last state."""

    def __init__(self, cell, n_embd, n_hidden):
        super().__init__()
        self.cell, n_chunks, self.n_states = CELLS[cell]
        self.x2h = nn.Linear(n_embd, n_chunks * n_hidden)
        self.h2h = nn.Linear(n_hidden, n_chunks * n_hidden)
        if cell == "lstm":  # the forget gate starts near sigmoid(1) = 0.73: most of the cell stays
            nn.init.ones_(self.x2h.bias[n_hidden : 2 * n_hidden])

    def forward(self, x, state=None):
        if state is None:
            state = (x.new_zeros(len(x), self.h2h.in_features),) * self.n_states
        x = self.x2h(x)  # (B, T, 4H): all words in one matrix product; only U h must wait for h
        outputs = []
        for x_t in x.unbind(dim=1):  # (B, 4H)
            state = self.cell(x_t, self.h2h(state[0]), state)
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), state  # (B, T, H)


class WordRNN(nn.Module):
    """Maps x (B, T) and a state to the logits (B, T, V) of the word after each, and the state."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.rnn = RecurrentLayer(args.cell, args.n_embd, args.n_hidden)
        self.c_proj = nn.Linear(args.n_hidden, args.n_embd)
        self.ln_f = nn.LayerNorm(args.n_embd)
        self.lm_head = nn.Linear(args.n_embd, vocab_size)
        self.dropout = nn.Dropout(args.dropout)  # zeroes this fraction of its input in training
        nn.init.normal_(self.wte.weight, std=0.05)  # with torch's std of 1, logits would be large
        self.lm_head.weight = self.wte.weight  # weight tying: logit = x . embedding + bias

    def forward(self, x, state=None):
        x = self.dropout(self.wte(x))  # (B, T, C)
        x, state = self.rnn(x, state)  # (B, T, H)
        x = self.dropout(self.ln_f(self.c_proj(self.dropout(x))))  # (B, T, C)
        return self.lm_head(x), state  # (B, T, V)


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
DISTANCES = (1, 2, 4, 8, 16, 32, 64)  # in words


@torch.no_grad()
def evaluate(args, model, ids, name):
    """Return {name}_loss, the mean loss in nats per word, over all but the first block_size ids.

    The text is cut into 32 chunks, which are read in parallel. Each is preceded by block_size words
    of context, which bring the state up to date and are not scored.
    """
    model.eval()  # no dropout
    size = math.ceil((len(ids) - args.block_size) / 32)
    padding = -(len(ids) - args.block_size) % size
    ids = F.pad(ids, (0, padding), value=-100)  # cross_entropy's ignore_index
    chunks = ids.unfold(0, args.block_size + size, size)  # (32, T + size)
    inputs, targets = chunks[:, :-1].clamp(min=0), chunks[:, 1:].clone()  # the chunks overlap
    targets[:, : args.block_size - 1] = -100
    loss, state = 0.0, None
    for x, y in zip(inputs.split(16, dim=1), targets.split(16, dim=1)):
        logits, state = model(x, state)
        loss += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return {f"{name}_loss": loss / (targets >= 0).sum().item()}


def gradient_norms(model, ids):
    """Return {gradient_k: norm}: how much the loss of a word depends on the word k words earlier.

    The loss is that of the word after a window, its gradient that with respect to the embedding of
    the word k words before the window's last; the norm, a mean over 64 windows of the text ids, is
    relative to that of the last word, k = 0.
    """
    model.eval()
    x, y = next(minibatches(ids, 64, DISTANCES[-1] + 1))  # (B, T) each
    embeddings = []
    hook = model.wte.register_forward_hook(lambda module, x, output: embeddings.append(output))
    logits, _ = model(x)
    hook.remove()
    loss = F.cross_entropy(logits[:, -1], y[:, -1], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, embeddings)  # (B, T, C)
    norms = gradient.norm(dim=2).mean(dim=0).flip(0)  # (T,), from the last word backwards
    model.train()
    return {f"gradient_{k}": (norms[k] / norms[0]).item() for k in DISTANCES}


@torch.no_grad()
def generate(args, model, ids):
    """Return ids (1, N) followed by max_new_tokens ids sampled from the model."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)  # not the generator of training
    logits, state = model(ids)
    for _ in range(args.max_new_tokens):
        logits = logits[:, -1]  # (1, V)
        logits[:, 0] = -math.inf  # never sample <unk>
        if args.top_k:
            kth = logits.topk(min(args.top_k, logits.shape[1])).values[:, -1:]  # (1, 1)
            logits[logits < kth] = -math.inf
        p = (logits / args.temperature).softmax(dim=1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)  # (1, N + 1)
        logits, state = model(ids[:, -1:], state)  # one word: the state stands for those before it
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
    batches = minibatches(train_ids, args.batch_size, args.block_size)
    model = WordRNN(args, len(vocab))
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

    state = None  # zeros: nothing has been read
    bar = tqdm(range(args.max_iters + 1), total=args.max_iters, disable=None)
    for iter_num in bar:
        if iter_num % args.eval_interval == 0 or iter_num == args.max_iters:
            record = {"iter": iter_num, "seconds": time.perf_counter() - start}
            record["learning_rate"] = float(schedule(iter_num))
            record |= evaluate(args, model, train_eval, "train")
            record |= evaluate(args, model, test_ids, "test")
            record |= gradient_norms(model, train_ids)
            log_metrics(args, record)
            log_sample(args, record, sample(args, model, vocab))
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        x, y = next(batches)
        logits, state = model(x, state)
        # Truncated backpropagation through time: the next window starts from the state's values,
        # cut off from the computation graph that led to them.
        state = [s.detach() for s in state]
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
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[2] / "data")
    flag("--data_dir", type=Path, default=data_dir, help="directory with shakespeare/input.txt")
    flag("--input", type=Path, help="UTF-8 text file to train on instead of tiny Shakespeare")
    flag("--batch_size", type=number(int, 1), default=32, help="rows read in parallel")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=16, help="words that gradients go back")
    flag("--cell", choices=CELLS, default="lstm", help="kind of recurrent layer")
    flag("--n_embd", type=number(int, 1), default=128, help="size of an embedding")
    flag("--n_hidden", type=number(int, 1), default=512, help="units of the recurrent layer")
    flag("--dropout", type=number(float, 0, 0.99), default=0.15, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=4e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=300, help="linear warm-up; usually 1-10%%")
    flag("--weight_decay", type=number(float, 0), default=0.5, help="of matrices; usually 0.01-0.5")
    flag("--max_iters", type=number(int, 1), default=4500, help="number of parameter updates")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="start of the samples, by default a newline")
    flag("--max_new_tokens", type=number(int, 0), default=100, help="words per sample")
    flag("--temperature", type=number(float, 1e-6), default=0.8, help="usually 0.5 to 1")
    flag("--top_k", type=number(int, 0), default=40, help="sample from the k most likely; 0: all")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=500, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    return parser.parse_args(argv)


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
