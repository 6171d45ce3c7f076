"""Step 16: nanoGPT's character model of Shakespeare, in less time.

Parent:  13_transformer + 15_imagenet
New:     make_optimizers, write_samples
Changed: encode, load_data, minibatches, CausalSelfAttention, MLP, Block, GPT, schedule,
         evaluate, generate, sample, log_sample, train, parse_args
Gone:    split_words, join_words, windows, scored_windows, OptaxAdam

GPT-2's blocks on characters. The default recipe makes all singular values of a hidden matrix's
update equal (Muon) and needs far fewer iterations than AdamW; --optimizer adamw is nanoGPT's
recipe. Compare val_loss, over the whole validation text, with nanoGPT's, the dashed line.

Try:     --optimizer adamw (how many more iterations does it need?)
         --sample_only --prompt "ROMEO:" --num_samples 3 --temperature 0.5
Source:  Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2);
         Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

import argparse
import gzip
import hashlib
import http.client
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
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


def encode(text, vocab, flag):
    """Return the ids (N,) of the characters of a text, which a flag gave."""
    ids = {character: i for i, character in enumerate(vocab)}
    unknown = sorted(set(text) - ids.keys())
    if unknown:
        fail(f"{flag}: the model never saw {unknown[0]!r}; it knows {vocab!r}")
    return torch.tensor([ids[character] for character in text], dtype=torch.long)


def load_data(args):
    """Return the ids (N,) of the training and the validation part, and the vocabulary, a string.

    The first 90% of the characters train.
    """
    path = args.input or args.data_dir / "shakespeare" / "input.txt"
    if args.input is None:
        download(TEXT_URL, TEXT_SHA256, path, args.data_dir)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--input {path}: not a readable UTF-8 text ({error})")
    cut = int(0.9 * len(text))
    if len(text) - cut <= args.block_size:
        fail(f"--input {path}: {len(text)} characters, too few for --block_size {args.block_size}")
    vocab = "".join(sorted(set(text)))
    ids = encode(text, vocab, "--input")
    return ids[:cut], ids[cut:], vocab


def minibatches(ids, args):
    """Yield batches x, y (B, T) from random places, without end and without leaving the device."""
    steps = torch.arange(args.block_size + 1, device=ids.device)
    while True:
        first = torch.randint(len(ids) - args.block_size, (args.batch_size, 1), device=ids.device)
        parts = ids[first + steps]  # (B, T + 1)
        yield parts[:, :-1], parts[:, 1:]


# ---------- model ----------


# B batch, T tokens (here: characters), C n_embd, H n_head, D = C / H, V vocab_size


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and the positions before it, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.sdpa = args.sdpa
        self.dropout = args.dropout
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache  # (B, H, S, D), S positions so far
        p = self.dropout if self.training else 0.0
        if self.sdpa or cache is not None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        else:
            scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)
            hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # what comes after
            y = F.dropout(scores.masked_fill(hidden, -math.inf).softmax(dim=3), p) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Every position works on what it gathered, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, T, 4C) inside


class Block(nn.Module):
    """Two residual steps, each on normalised input: attention, then the MLP."""

    def __init__(self, args):
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd, bias=args.bias)
        self.attn = CausalSelfAttention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd, bias=args.bias)
        self.mlp = MLP(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Maps x (B, T) to the logits (B, T, V) of the token after each.

    With a cache, a list for every block, x is the beginning, or the one that follows what came
    before; up to block_size in all.
    """

    def __init__(self, args, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.ln_f = nn.LayerNorm(args.n_embd, bias=args.bias)
        self.lm_head = nn.Linear(args.n_embd, vocab_size, bias=False)
        self.dropout = nn.Dropout(args.dropout)
        self.lm_head.weight = self.wte.weight  # tied: one vector a token, to read and to write it
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            if name.endswith("c_proj.weight"):  # small: every block begins near the identity
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))

    def forward(self, x, cache=None):
        first = cache[0][0].shape[2] if cache and cache[0] else 0
        x = self.dropout(self.wte(x) + self.wpe.weight[first : first + x.shape[1]])  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.lm_head(self.ln_f(x))  # (B, T, V)

    def load_state_dict(self, weights):
        """Take weights, also a longer context's: its last positions are cropped."""
        positions = weights["wpe.weight"][: self.wpe.num_embeddings]
        return super().load_state_dict(weights | {"wpe.weight": positions})


def compile_model(args, model):
    """Return the model compiled, if --compile asks for it and a C++ compiler is there."""
    if not args.compile:
        return model
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        print("--compile: there is no C++ compiler here, going on without")
        return model
    torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it is
    return torch.compile(model, mode="reduce-overhead" if args.device == "cuda" else "default")


# ---------- optimizer ----------


def make_optimizers(args, model):
    """Return the optimizers by name; matrices and embeddings decay, biases and norms do not."""
    decay = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    optimizers = {}
    if args.optimizer == "muon":
        hidden = [decay.pop(name) for name in list(decay) if name.startswith("h.")]
        # Scaled to the size of AdamW's updates (Liu et al. 2025): one learning rate serves both.
        optimizers["muon"] = torch.optim.Muon(
            hidden,
            momentum=args.beta1,
            weight_decay=args.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": list(decay.values())}, {"params": rest, "weight_decay": 0.0}]
    optimizers["adamw"] = torch.optim.AdamW(
        groups, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True
    )
    return optimizers


def schedule(args, iter_num):
    """Return the learning rate of an iteration: a linear warm-up, then half a cosine to min_lr."""
    if iter_num < args.warmup_iters:
        return args.learning_rate * (iter_num + 1) / (args.warmup_iters + 1)
    decay_iters = args.lr_decay_iters or args.max_iters
    done = (iter_num - args.warmup_iters) / max(1, decay_iters - args.warmup_iters)
    wave = (1 + math.cos(math.pi * min(done, 1))) / 2
    return args.min_lr + (args.learning_rate - args.min_lr) * wave


# ---------- evaluation ----------


@torch.no_grad()
def evaluate(args, model, ids):
    """Return the mean loss (nats) over the whole text ids (N,), each character once.

    Windows of block_size lie side by side, the last one is shorter. The first character, with
    nothing before it, is not counted.
    """
    model.eval()
    whole = (len(ids) - 1) // args.block_size * args.block_size
    x = [*ids[:whole].view(-1, args.block_size).split(64), ids[None, whole:-1]]
    y = [*ids[1 : whole + 1].view(-1, args.block_size).split(64), ids[None, whole + 1 :]]
    loss = torch.zeros((), dtype=torch.float64, device=ids.device)
    for x_part, y_part in zip(x, y):
        with autocast(args):
            logits = model(x_part)
        loss += F.cross_entropy(logits.float().flatten(0, 1), y_part.flatten(), reduction="sum")
    model.train()
    return loss.item() / (len(ids) - 1)


@torch.no_grad()
def generate(args, model, ids, stop=(), use_cache=True):
    """Return ids (B, N) and max_new_tokens more; fewer, once every row has had stop.

    Keys and values of earlier tokens are cached. Positions are absolute, so a full block
    cannot slide: it starts anew from its last half, once in block_size / 2 tokens. There is no
    autocast: for one token at a time, casting the weights takes longer than it saves.
    """
    model.eval()
    generator = torch.Generator(ids.device).manual_seed(args.seed)  # training has another one
    start, end, cache = max(0, ids.shape[1] - args.block_size), ids.shape[1], None
    for _ in range(args.max_new_tokens):
        if ids.shape[1] - start > args.block_size:
            start, cache = ids.shape[1] - (args.block_size + 1) // 2, None
        new = ids[:, start:] if cache is None else ids[:, -1:]
        cache = cache or [[] for _ in model.h]
        logits = model(new, cache)[:, -1].float()  # (B, V)
        cache = cache if use_cache else None
        if args.top_k:
            kth = logits.topk(min(args.top_k, logits.shape[1])).values[:, -1:]  # (B, 1)
            logits[logits < kth] = -math.inf
        if args.temperature == 0:
            new = logits.argmax(dim=1, keepdim=True)  # (B, 1)
        else:
            p = (logits / args.temperature).softmax(dim=1)
            new = torch.multinomial(p, 1, generator=generator)
        ids = torch.cat([ids, new], dim=1)
        if len(stop) and ids.shape[1] >= end + len(stop):
            parts = ids[:, end:].unfold(1, len(stop), 1)  # (B, places, len(stop))
            if (parts == stop).all(dim=2).any(dim=1).all():
                break
    model.train()
    return ids


def sample(args, model, vocab):
    """Return num_samples texts that begin with --prompt and that end with --stop, if it comes."""
    prompt = encode(args.prompt, vocab, "--prompt").to(args.device)
    stop = encode(args.stop, vocab, "--stop").to(args.device)
    rows = generate(args, model, prompt.repeat(args.num_samples, 1), stop).tolist()
    texts = ["".join(vocab[i] for i in row) for row in rows]
    if args.stop:
        for i, text in enumerate(texts):
            written, found, _ = text[len(prompt) :].partition(args.stop)
            texts[i] = args.prompt + written + found
    return "\n---------------\n".join(texts)


# ---------- checkpoint ----------


def save_checkpoint(path, parts, state):
    """Write the state_dict of every part, the plain numbers in `state` and the random generators.

    Written beside, forced to disk and renamed: whoever kills the run leaves the old file or the
    new one, whole.
    """
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"state": state, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state()
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_checkpoint(path):
    """Return the checkpoint in a file."""
    if not path.is_file():
        fail(f"there is no {path}: a run with --init_from scratch leaves it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint.keys() >= {"state", "rng"}
    except Exception:  # torch.load raises many kinds, one for every way a file can be damaged
        fail(f"{path} is not a whole checkpoint of this step")
    return checkpoint


def load_checkpoint(path, parts):
    """Put a checkpoint back into the parts and the random generators; return its `state`."""
    checkpoint = read_checkpoint(path)
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (LookupError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            fail(f"{path} is of another shape ({name}: {reason})")
    torch.set_rng_state(checkpoint["rng"])
    if torch.cuda.is_available() and "cuda_rng" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    return checkpoint["state"]


def catch_signals():
    """Return an event that SIGTERM or Ctrl-C sets: the loop then saves and leaves."""
    stop = threading.Event()

    def ask(number, frame):
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


# ---------- training ----------


def setup_device(args):
    """Return the device; settle args.dtype."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is none; --device cpu goes on without")
    if args.dtype == "auto":
        cpu = torch.cpu.get_capabilities() if args.device == "cpu" else {}
        fast = args.device == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        args.dtype = "bfloat16" if fast else "float32"
    return torch.device(args.device)


def autocast(args):
    """Return the context in which matrix products run in --dtype; the weights stay float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def start_run(args, device, iter_num):
    """Make out_dir and args.json; keep of metrics.jsonl what was so at iter_num."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    metrics = args.out_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if iter_num and metrics.is_file() else []
    metrics.write_text("".join(line for line in lines if json.loads(line)["iter"] <= iter_num))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made_by = {"python": sys.version.split()[0], "torch": torch.__version__, "made_on": name}
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
        file.write(f"=== iter {record['iter']}, val_loss {record['val_loss']:.4f}\n{text}\n\n")
    tqdm.write(f"{text}\n")


def train(args, stop=None):
    """Run the whole step, until the event stop is set; return the last record of metrics.jsonl."""
    device = setup_device(args)
    start = time.perf_counter()
    train_ids, val_ids, vocab = load_data(args)
    for flag in ("prompt", "stop"):
        encode(getattr(args, flag), vocab, f"--{flag}")
    batches = minibatches(train_ids.to(device), args)
    val_ids = val_ids.to(device)
    torch.manual_seed(args.seed)
    model = GPT(args, len(vocab)).to(device)
    optimizers = make_optimizers(args, model)
    parts = {"model": model, **optimizers}
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    state = {"iter_num": 0, "seconds": 0.0, "loss_sum": 0.0, "val_loss": math.inf, "record": {}}
    state["vocab"] = vocab

    forward = compile_model(args, model)
    if args.init_from == "resume":
        state = load_checkpoint(last, parts)
        if state["vocab"] != vocab:
            fail(f"{last}: trained on a text of other characters")
        for p, averages in optimizers["adamw"].state.items():  # are cropped as the weights were
            averages |= {k: v[: len(p)] for k, v in averages.items() if v.ndim}
    first, record = state["iter_num"], state["record"]
    start -= state["seconds"]
    start_run(args, device, first)
    n_params = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    print(f"{n_params:,} parameters without positions, {args.device}, {args.dtype}")
    loss_sum = torch.tensor(state["loss_sum"], device=device)
    since, since_iter = time.perf_counter(), first

    iters = range(first, args.max_iters + 1)
    for iter_num in (bar := tqdm(iters, total=iters.stop, initial=first, disable=None)):
        stopping = stop is not None and stop.is_set()
        done = iter_num == args.max_iters or args.eval_only
        evaluating = iter_num % args.eval_interval == 0 or done
        if stopping or evaluating:
            state |= {"iter_num": iter_num, "loss_sum": loss_sum.item()}  # waits for the device
            state["seconds"] = time.perf_counter() - start
            if not math.isfinite(state["loss_sum"]):
                fail(f"loss not finite by iteration {iter_num}: {args.learning_rate=}")
        if stopping:
            save_checkpoint(last, parts, state)
            print(f"stopped at iteration {iter_num}: --init_from resume goes on from there")
            break
        if evaluating and (iter_num != record.get("iter") or args.eval_only):
            record = {"iter": iter_num, "seconds": 0.0, "learning_rate": schedule(args, iter_num)}
            if iter_num > since_iter:
                record["train_loss"] = state["loss_sum"] / ((iter_num - 1) % args.eval_interval + 1)
                tokens = (iter_num - since_iter) * args.batch_size * args.block_size
                record["tokens_per_second"] = tokens / (time.perf_counter() - since)
            record["val_loss"] = evaluate(args, model, val_ids)
            record["seconds"] = time.perf_counter() - start
            log_metrics(args, record)
            log_sample(args, record, sample(args, model, vocab))
            state |= {"record": record, "loss_sum": 0.0}
            if not args.eval_only:
                if record["val_loss"] < state["val_loss"]:
                    state["val_loss"] = record["val_loss"]
                    save_checkpoint(best, parts, state)
                save_checkpoint(last, parts, state)
            loss_sum.zero_()
            since, since_iter = time.perf_counter(), iter_num
        if done:
            break

        x, y = next(batches)
        with autocast(args):
            logits = forward(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        if iter_num % args.log_interval == 0:
            bar.set_postfix(loss=f"{loss:.4f}")
        learning_rate = schedule(args, iter_num)
        loss.backward()
        if args.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.detach()

    if record:
        print(f"val_loss {record['val_loss']:.4f} after {record['seconds']:.0f} s")
    print(f"picture: {plot_run(args.out_dir)}")
    return record


def write_samples(args):
    """Print samples of the model in out_dir/best.pt."""
    device = setup_device(args)
    path = args.out_dir / "best.pt"
    vocab = load_checkpoint(path, {})["vocab"]
    model = GPT(args, len(vocab)).to(device)
    load_checkpoint(path, {"model": model})
    print(sample(args, model, vocab))


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


# The defaults: first by the device, then by the optimizer, then by both.
DEFAULTS = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0}
    | {"compile": False, "sdpa": False},  # torch's attention is slower on so short a context
    "cuda": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}
    | {"compile": True, "sdpa": True},
    "adamw": {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "beta2": 0.99}
    | {"weight_decay": 0.1, "grad_clip": 1.0},
    "muon": {"learning_rate": 0.015, "min_lr": 0.0, "warmup_iters": 20, "beta2": 0.95}
    | {"weight_decay": 0.05, "grad_clip": 0.0},
    ("cpu", "adamw"): {"batch_size": 12, "max_iters": 2000},
    ("cpu", "muon"): {"batch_size": 32, "max_iters": 1000},
    ("cuda", "adamw"): {"batch_size": 64, "max_iters": 5000},
    ("cuda", "muon"): {"batch_size": 64, "max_iters": 2000, "learning_rate": 0.005},
}


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
    flag("--batch_size", type=number(int, 1), help="windows in a minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--init_from", choices=("scratch", "resume"), default="scratch", help="out_dir/last.pt")
    flag("--block_size", type=number(int, 1), help="characters that the model sees")
    flag("--n_layer", type=number(int, 1), help="blocks")
    flag("--n_head", type=number(int, 1), help="heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), help="length of a character's vector")
    flag("--dropout", type=number(float, 0, 0.99), help="share of units dropped")
    switch = argparse.BooleanOptionalAction
    flag("--bias", action=switch, default=False, help="in linear layers and norms, as in GPT-2")
    flag("--sdpa", action=switch, help="torch's attention, not the one written out")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", choices=("muon", "adamw"), default="muon", help="adamw: nanoGPT's recipe")
    flag("--learning_rate", type=number(float, 1e-9), help="at its highest")
    flag("--min_lr", type=number(float, 0), help="at the end")
    flag("--warmup_iters", type=number(int, 0), help="iterations of rising rate")
    flag("--lr_decay_iters", type=number(int, 0), default=0, help="until min_lr; 0: max_iters")
    flag("--max_iters", type=number(int, 1), help="minibatches to train on")
    flag("--weight_decay", type=number(float, 0), help="pull of matrices to 0")
    flag("--beta1", type=number(float, 0, 1), default=0.9, help="memory of gradients")
    flag("--beta2", type=number(float, 0, 1), help="AdamW's memory of squared ones")
    flag("--grad_clip", type=number(float, 0), help="longest gradient; 0: any")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="the samples' beginning, or FILE:name of a file with it")
    flag("--stop", default="", help="the samples' end")
    flag("--num_samples", type=number(int, 1), default=1, help="samples, written side by side")
    flag("--max_new_tokens", type=number(int, 0), default=200, help="characters in a sample")
    flag("--temperature", type=number(float, 0), default=0.8, help="1: as guessed; 0: likeliest")
    flag("--top_k", type=number(int, 0), default=40, help="of the k likeliest only; 0: of all")
    flag("--sample_only", action="store_true", help="write samples of out_dir/best.pt and leave")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_only", action="store_true", help="evaluate, sample and leave")
    flag("--eval_interval", type=number(int, 1), default=250, help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=50, help="iterations between bar updates")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPU if any")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fastest")
    flag("--compile", action=switch, help="takes a while, then runs faster on a GPU")
    args = parser.parse_known_args(argv)[0]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for key in (args.device, args.optimizer, (args.device, args.optimizer)):
        parser.set_defaults(**DEFAULTS[key])
    made = args.out_dir / "args.json"
    if (args.sample_only or args.init_from == "resume") and made.is_file():
        sizes = ("block_size", "n_layer", "n_head", "n_embd", "bias")  # the checkpoint's
        parser.set_defaults(**{k: v for k, v in json.loads(made.read_text()).items() if k in sizes})
    args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"device": args.device})
    if args.prompt.startswith("FILE:"):
        try:
            args.prompt = Path(args.prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompt {args.prompt}: {error}")
    if not args.prompt:
        parser.error("--prompt is empty: the model goes on from at least one character")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        write_samples(args) if args.sample_only else train(args, catch_signals())
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except torch.OutOfMemoryError:
        fail(f"--batch_size {args.batch_size} does not fit into the GPU's memory")
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
