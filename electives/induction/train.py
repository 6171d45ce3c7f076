"""Elective induction: copying takes two layers of attention.

Parent:  13_transformer
New:     make_sequences, head_scores, draw_attention
Changed: minibatches, CausalSelfAttention, evaluate, train, parse_args
Gone:    read_text, split_words, encode, join_words, windows, load_data, generate, sample,
         log_sample

Random tokens cannot be predicted, unless they repeat: then the next token is the one that followed
an earlier occurrence of the current token. Finding it takes two attention heads, one after the
other: a previous-token head in the first layer writes to each position which token precedes it; an
induction head in the second layer attends to the positions whose preceding token is the current
one, and copies the token there. One layer learns little more than which tokens occur. The loss
drops abruptly when the two heads form; attention.png shows them. Periods shorter than in training
are copied as well, longer ones are not: the previous-token head has learned to look one position
back only where training needed it. In ascending integers, every token has one successor: the
weights can store it, no context is needed.

Try:     --n_layer 1 (what is left to learn?)
         --task ascending --n_layer 1
         --period_max 8 (which periods are copied now?)
Source:  Elhage et al. 2021, "A mathematical framework for transformer circuits"; Olsson et al.
         2022, "In-context learning and induction heads".
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
import time
from pathlib import Path

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from plot import plot_run, plt


# ---------- data ----------
def make_sequences(args, n, period_min, period_max):
    """Return x (n, T), n new sequences of tokens, and y (n, T), the tokens after them.

    A sequence starts with `period` different tokens and then repeats them cyclically, beginning
    with a random one, so that its position does not tell the next token. y is -100, cross_entropy's
    ignore_index, where earlier tokens do not tell it either: in the first period, and after the
    period's last token, which the random one followed at first.
    With --task ascending, integers ascend from a random one instead; 0 follows the largest.
    """
    t = torch.arange(args.block_size + 1)  # (T + 1,), the positions
    if args.task == "ascending":
        tokens = (torch.randint(args.vocab_size, (n, 1)) + t) % args.vocab_size  # (n, T + 1)
        return tokens[:, :-1], tokens[:, 1:]
    period = torch.randint(period_min, period_max + 1, (n, 1))
    start = (torch.rand(n, 1) * period).long()
    index = torch.where(t < period, t, (t - period + start) % period)  # (n, T + 1)
    tokens = torch.rand(n, args.vocab_size).argsort(dim=1).gather(1, index)  # of permutations
    is_known = (t >= period) & (index < period - 1)  # (n, T + 1)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(~is_known[:, :-1], -100)


def minibatches(args):
    """Yield minibatches (x, y) of new sequences forever."""
    while True:
        yield make_sequences(args, args.batch_size, args.period_min, args.period_max)


# ---------- model ----------
# B batch, T tokens, C n_embd, H n_head, D = C / H, V vocab_size
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
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=3)  # (B, H, T, T)
        self.weights = weights.detach()  # kept for head_scores, draw_attention
        y = weights @ v  # (B, H, T, D)
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
def evaluate(model, x, y, name):
    """Return {name}_loss in nats per token and {name}_accuracy, where y is not ignored."""
    model.eval()  # no dropout
    logits = model(x)  # (n, T, V)
    model.train()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    accuracy = (logits.argmax(dim=2) == y).sum() / (y >= 0).sum()
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy.item()}


@torch.no_grad()
def head_scores(model, x, y):
    """Return two scores (n_layer, H) of every head: mean attention weights, from 0 to 1.

    previous: the weight of the position before. induction, where y is not ignored: the weight of
    the positions whose preceding token is the current one.
    """
    model.eval()
    model(x)
    model.train()
    weights = torch.stack([block.attn.weights for block in model.h], dim=1)  # (n, L, H, T, T)
    previous = weights.diagonal(-1, dim1=3, dim2=4).mean(dim=(0, 3))  # (L, H)
    before = F.pad(x[:, :-1], (1, 0), value=-1)  # (n, T), the token before each
    is_match = (before[:, None, :] == x[:, :, None]) & (y >= 0)[:, :, None]  # (n, T, T)
    induction = (weights * is_match[:, None, None]).sum(dim=(0, 3, 4)) / (y >= 0).sum()  # (L, H)
    return previous, induction


def draw_attention(args, model, x, y):
    """Write attention.png: two heads' weights on the first sequence of x, and losses by period."""
    scores = head_scores(model, x, y)
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for axis, name, score in zip(axes, ("previous-token", "induction"), scores):
        layer, head = divmod(score.argmax().item(), args.n_head)
        axis.imshow(model.h[layer].attn.weights[0, head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"best {name} head: layer {layer + 1}, score {score.max():.2f}")
        axis.set(xlabel="position attended to", ylabel="position")
    periods = range(2, min(args.vocab_size, args.block_size - 1) + 1)
    sequences = [make_sequences(args, 64, period, period) for period in periods]
    losses = [evaluate(model, *pair, "period")["period_loss"] for pair in sequences]
    axes[2].plot(periods, losses, label="loss")
    chance = [math.log(period - 1) for period in periods]  # any other token of the period
    axes[2].plot(periods, chance, "--", color="gray", label="log(period - 1): chance")
    axes[2].axvspan(args.period_min, args.period_max, alpha=0.15, label="periods in training")
    axes[2].set(xlabel="period (tokens)", ylabel="loss (nats per token)", ylim=(0, None))
    axes[2].legend()
    figure.savefig(args.out_dir / "attention.png", dpi=60)
    plt.close(figure)


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
    test_set = make_sequences(args, 256, args.period_min, args.period_max)
    longer_set = make_sequences(args, 256, args.period_max + 1, 2 * args.period_max)
    batches = minibatches(args)
    model = GPT(args, args.vocab_size)
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
            record |= evaluate(model, *test_set, "test") | evaluate(model, *longer_set, "longer")
            previous, induction = head_scores(model, *test_set)
            record |= {"previous": previous.max().item(), "induction": induction.max().item()}
            log_metrics(args, record)
            if iter_num == args.max_iters:
                break  # the last pass only evaluates

        x, y = next(batches)
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())  # the mean where y >= 0
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    draw_attention(args, model, *test_set)
    print(f"test loss {record['test_loss']:.4f} nats per token after {record['seconds']:.0f} s")
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
    flag("--task", choices=["repeat", "ascending"], default="repeat", help="sequences")
    flag("--vocab_size", type=number(int, 4), default=32, help="number of different tokens")
    flag("--period_min", type=number(int, 2), default=8, help="shortest in training, in tokens")
    flag("--period_max", type=number(int, 2), default=15, help="longest in training, in tokens")
    flag("--batch_size", type=number(int, 1), default=64, help="sequences per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--block_size", type=number(int, 1), default=32, help="tokens per sequence")
    flag("--n_layer", type=number(int, 1), default=2, help="number of blocks")
    flag("--n_head", type=number(int, 1), default=4, help="attention heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), default=64, help="size of an embedding")
    flag("--dropout", type=number(float, 0, 0.99), default=0, help="usually 0 to 0.5")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=number(float, 0), default=3e-3, help="peak; usually 1e-4 to 1e-2")
    flag("--warmup_iters", type=number(int, 0), default=100, help="linear warm-up; usually 1-10%%")
    flag("--weight_decay", type=number(float, 0), default=0.1, help="of matrices; usually 0.01-0.5")
    flag("--max_iters", type=number(int, 1), default=1000, help="number of parameter updates")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=50, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    args = parser.parse_args(argv)
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.period_min > args.period_max:
        parser.error(f"--period_min {args.period_min} is over --period_max {args.period_max}")
    if 2 * args.period_max > min(args.vocab_size, args.block_size - 1):
        sizes = f"--vocab_size {args.vocab_size} and --block_size {args.block_size}"
        parser.error(f"--period_max {args.period_max}: twice as many tokens must fit into {sizes}")
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
