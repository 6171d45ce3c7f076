"""Step 16: nanoGPT's character model of Shakespeare, in less time.

Parent:  13_transformer + 15_imagenet
New:     MLP, GPT, capture, check_finite
Changed: load_data
Gone:    none

GPT-2's blocks on characters. The default recipe orthogonalises the updates of the hidden matrices
(Muon), which needs far fewer iterations than AdamW; --optimizer adamw is nanoGPT's recipe. Compare
val_loss, which counts the whole validation text, with nanoGPT's, the dashed line.

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
import platform
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
    """Return the ids (N,) of the characters of a text that a flag gave."""
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


def draw_batch(ids, args):
    """Return a batch x, y (B, T) from random places, without leaving the device."""
    first = torch.randint(len(ids) - args.block_size, (args.batch_size, 1), device=ids.device)
    window = ids[first + torch.arange(args.block_size + 1, device=ids.device)]  # (B, T + 1)
    return window[:, :-1], window[:, 1:]


# ---------- model ----------
# B sequences, T characters, C = n_embd, H heads of D = C / H, V characters in the vocabulary


class CausalSelfAttention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.dropout = args.dropout
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)
        future = torch.ones(args.block_size, args.block_size, dtype=torch.bool).triu(1)
        self.register_buffer("mask", torch.zeros(1).masked_fill(future, -math.inf), False)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache  # (B, H, T so far, D)
        dropout = self.dropout if self.training else 0.0
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        else:  # twice as fast here as the fused kernel, as long as the context is short
            scores = q * q.shape[-1] ** -0.5 @ k.mT  # (B, H, T, T)
            scores = scores + self.mask[:T, :T].to(scores.dtype) if T > 1 else scores
            y = F.dropout(scores.softmax(-1), dropout) @ v
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return F.dropout(self.c_proj(y), dropout)


class MLP(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.dropout = args.dropout
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd, bias=args.bias)
        self.attn = CausalSelfAttention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd, bias=args.bias)
        self.mlp = MLP(args)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with nanoGPT's initialisation; the head is the embedding."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.dropout = args.dropout
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.ln_f = nn.LayerNorm(args.n_embd, bias=args.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the residual stream adds up 2 * n_layer of these
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, cache=None):
        """Return the logits (B, T, V) of the characters after x (B, T); cache: one list a block."""
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        x = self.wte(x) + self.wpe.weight[start : start + x.shape[1]]  # (B, T) -> (B, T, C)
        x = F.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return F.linear(self.ln_f(x), self.wte.weight)  # (B, T, C) -> (B, T, V)

    def load_state_dict(self, weights):
        """Take weights, also those of a longer context: its last positions are cropped."""
        positions = weights["wpe.weight"][: self.wpe.num_embeddings]
        return super().load_state_dict(weights | {"wpe.weight": positions})


def loss_fn(logits, y, reduction="mean"):
    """Return the cross-entropy in nats of logits (B, T, V) against y (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)


# ---------- optimizer ----------


def make_optimizers(args, model):
    """Return the optimizers by name; matrices and embeddings decay, biases and norms do not."""
    decay = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    optimizers = {}
    if args.optimizer == "muon":
        hidden = [decay.pop(name) for name in list(decay) if name.startswith("h.")]
        # Scaled to the size of AdamW's updates (Liu et al. 2025): one learning rate serves both.
        optimizers["muon"] = torch.optim.Muon(
            hidden, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
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
    done = (iter_num - args.warmup_iters) / max(1, args.lr_decay_iters - args.warmup_iters)
    wave = (1 + math.cos(math.pi * min(done, 1))) / 2
    return args.min_lr + (args.learning_rate - args.min_lr) * wave


# ---------- evaluation ----------


@torch.no_grad()
def evaluate(args, model, ids):
    """Return the mean loss over the whole text ids (N,), each character once.

    Windows of block_size lie side by side, the last one is shorter. The first character has
    nothing before it and is not counted.
    """
    model.eval()
    whole = (len(ids) - 1) // args.block_size * args.block_size
    x = [*ids[:whole].view(-1, args.block_size).split(64), ids[None, whole:-1]]
    y = [*ids[1 : whole + 1].view(-1, args.block_size).split(64), ids[None, whole + 1 :]]
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for x_batch, y_batch in zip(x, y):
        with autocast(args):
            total += loss_fn(model(x_batch), y_batch, reduction="sum")
    model.train()
    return total.item() / (len(ids) - 1)


@torch.no_grad()
def generate(args, model, ids, stop=(), use_cache=True):
    """Return ids (B, T) and up to max_new_tokens more; it ends when every row has had stop.

    Keys and values of earlier characters are cached. Positions are absolute, so a full block
    cannot slide: it starts anew from its last half, once in block_size / 2 characters.
    """
    model.eval()
    generator = torch.Generator(ids.device).manual_seed(args.seed)
    start, end, cache = max(0, ids.shape[1] - args.block_size), ids.shape[1], None
    for _ in range(args.max_new_tokens):
        if ids.shape[1] - start > args.block_size:
            start, cache = ids.shape[1] - (args.block_size + 1) // 2, None
        fresh = ids[:, start:] if cache is None else ids[:, -1:]
        cache = cache or [[] for _ in model.h]
        with autocast(args):
            logits = model(fresh, cache)[:, -1].float()  # (B, V)
        cache = cache if use_cache else None
        if args.top_k:
            kth = logits.topk(min(args.top_k, logits.shape[1])).values[:, -1:]
            logits[logits < kth] = -math.inf
        if args.temperature == 0:
            new = logits.argmax(1, keepdim=True)  # (B, 1)
        else:
            p = (logits / args.temperature).softmax(1)
            new = torch.multinomial(p, 1, generator=generator)  # (B, 1)
        ids = torch.cat((ids, new), dim=1)
        if len(stop) and ids.shape[1] >= end + len(stop):
            windows = ids[:, end:].unfold(1, len(stop), 1)  # (B, ..., len(stop))
            if (windows == stop.to(ids.device)).all(2).any(1).all():
                break
    model.train()
    return ids


def sample(args, model, vocab):
    """Return --num_samples texts that go on from --prompt, each up to --stop."""
    prompt = encode(args.prompt, vocab, "--prompt").to(args.device)
    ids = generate(
        args, model, prompt.repeat(args.num_samples, 1), encode(args.stop, vocab, "--stop")
    )
    texts = ["".join(vocab[i] for i in row) for row in ids.tolist()]
    ends = [text.find(args.stop, len(prompt)) if args.stop else -1 for text in texts]
    texts = [text[: end + len(args.stop)] if end >= 0 else text for text, end in zip(texts, ends)]
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
    """Make out_dir and args.json; keep of metrics.jsonl what lies before iter_num."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    metrics = args.out_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if iter_num and metrics.is_file() else []
    metrics.write_text("".join(line for line in lines if json.loads(line)["iter"] < iter_num))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made_by = {"python": platform.python_version(), "torch": torch.__version__, "made_on": name}
    (args.out_dir / "args.json").write_text(json.dumps(vars(args) | made_by, default=str))


def log_metrics(args, record):
    """Append a record to metrics.jsonl and print it above the progress bar."""
    with open(args.out_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {value:.5g}" for key, value in record.items()))


def check_finite(loss, iter_num, args):
    """Stop the run where the loss is no number any more; the last checkpoint stays."""
    if not math.isfinite(loss):
        fail(f"loss {loss} at iteration {iter_num}, --learning_rate {args.learning_rate}")


def capture(step):
    """Return a function that repeats the GPU work of step() at the cost of one launch.

    Without this CUDA graph the CPU would need longer to launch the hundreds of small kernels than
    the GPU to run them.
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):  # the libraries allocate what they need
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


def train(args, stop=None):
    """Run the whole step, until the event stop is set; return the last record of metrics.jsonl."""
    start = time.perf_counter()
    device = setup_device(args)
    train_ids, val_ids, vocab = load_data(args)
    train_ids, val_ids = train_ids.to(device), val_ids.to(device)
    torch.manual_seed(args.seed)
    model = GPT(args, len(vocab)).to(device)
    optimizers = make_optimizers(args, model)
    parts = {"model": model, **optimizers}
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    state = {"iter_num": 0, "val_loss": math.inf, "seconds": 0.0, "vocab": vocab}

    def backward():
        """Put the gradients of a new batch's loss into the parameters; return the loss."""
        for p in model.parameters():
            p.grad = None
        x, y = draw_batch(train_ids, args)
        with autocast(args):
            loss = loss_fn(model(x), y)
        loss.backward()
        return loss.detach()

    if device.type == "cuda":
        backward = capture(backward)
    torch.manual_seed(args.seed)
    if args.init_from == "resume":
        state = load_checkpoint(last, parts)
        if state["vocab"] != vocab:
            fail(f"{last} was trained on a text of other characters than this one")
        for p, averages in optimizers["adamw"].state.items():  # AdamW's, too, are cropped
            averages |= {k: v[: len(p)] for k, v in averages.items() if v.ndim}
    start -= state["seconds"]
    start_run(args, device, state["iter_num"])
    n_params = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    print(f"{n_params:,} parameters without positions, {args.device}, {args.dtype}")
    since, since_iter, loss = time.perf_counter(), state["iter_num"], None

    bar = tqdm(initial=state["iter_num"], total=args.max_iters, disable=None)
    for iter_num in range(state["iter_num"], args.max_iters + 1):
        stopping = stop is not None and stop.is_set()
        done = iter_num == args.max_iters or args.eval_only
        if stopping:
            state |= {"iter_num": iter_num, "seconds": time.perf_counter() - start}
            save_checkpoint(last, parts, state)
            print(f"stopped at iteration {iter_num}: --init_from resume goes on from there")
            return {"iter": iter_num}
        if iter_num % args.eval_interval == 0 or done:
            record = {"iter": iter_num, "seconds": 0.0, "learning_rate": schedule(args, iter_num)}
            if loss is not None:
                record["train_loss"] = loss.item()  # of one batch; waits for the device
                n_tokens = (iter_num - since_iter) * args.batch_size * args.block_size
                record["tokens_per_second"] = n_tokens / (time.perf_counter() - since)
            record["val_loss"] = evaluate(args, model, val_ids)
            record["seconds"] = time.perf_counter() - start
            check_finite(record["val_loss"], iter_num, args)
            log_metrics(args, record)
            text = sample(args, model, vocab)
            tqdm.write(text)
            with open(args.out_dir / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"=== iteration {iter_num}\n{text}\n")
            state |= {"iter_num": iter_num, "seconds": time.perf_counter() - start}
            if record["val_loss"] < state["val_loss"] and not args.eval_only:
                state["val_loss"] = record["val_loss"]
                save_checkpoint(best, parts, state)
            if not args.eval_only:
                save_checkpoint(last, parts, state)
            if done:
                break
            since, since_iter = time.perf_counter(), iter_num

        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = schedule(args, iter_num)
        loss = backward()
        if args.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
        if iter_num % args.log_interval == 0:
            check_finite(loss.item(), iter_num, args)
            bar.set_postfix(loss=f"{loss:.4f}")
        bar.update()

    print(f"val_loss {record['val_loss']:.4f} after {record['seconds']:.0f} s")
    print(f"picture: {plot_run(args.out_dir)}")
    return record


def write_samples(args):
    """Print samples of the model in out_dir/best.pt."""
    device = setup_device(args)
    vocab = read_checkpoint(args.out_dir / "best.pt")["state"]["vocab"]
    model = GPT(args, len(vocab))
    load_checkpoint(args.out_dir / "best.pt", {"model": model})
    print(sample(args, model.to(device), vocab))


# ---------- command line ----------


def fail(message, exit_code=2):
    """Leave with one line on standard error."""
    tqdm.write(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def number(kind, low, high=1e9):
    """Return an argparse type: an int or float (kind) from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse puts it in its error
    return convert


# Defaults that depend on --device and --optimizer: sizes, recipe.
SIZES = {"cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0}}
SIZES["cuda"] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}
RECIPES = {
    "adamw": {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "weight_decay": 0.1}
    | {"beta2": 0.99, "grad_clip": 1.0, "cpu": (12, 2000), "cuda": (64, 5000)},
    "muon": {"learning_rate": 1.5e-2, "min_lr": 0.0, "warmup_iters": 20, "weight_decay": 0.05}
    | {"beta2": 0.95, "grad_clip": 0.0, "cpu": (32, 1100), "cuda": (64, 2000)},
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
    flag("--init_from", default="scratch", choices=("scratch", "resume"), help="resume: last.pt")
    flag("--n_layer", type=number(int, 1), help="blocks")
    flag("--n_head", type=number(int, 1), help="heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), help="width")
    flag("--block_size", type=number(int, 2), help="characters of context")
    flag("--bias", action=argparse.BooleanOptionalAction, default=False, help="as in GPT-2")
    flag("--dropout", type=number(float, 0, 0.99), help="more where a long run overfits")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", choices=("muon", "adamw"), default="muon", help="adamw: nanoGPT's recipe")
    flag("--learning_rate", type=number(float, 1e-9), help="the highest")
    flag("--min_lr", type=number(float, 0), help="the last")
    flag("--warmup_iters", type=number(int, 0), help="iterations of linear warm-up")
    flag("--lr_decay_iters", type=number(int, 1), help="end of the cosine (default: max_iters)")
    flag("--max_iters", type=number(int, 0), help="updates")
    flag("--weight_decay", type=number(float, 0), help="of matrices and embeddings")
    flag("--beta1", type=number(float, 0, 1), default=0.9, help="AdamW's")
    flag("--beta2", type=number(float, 0, 1), help="AdamW's")
    flag("--grad_clip", type=number(float, 0), help="largest gradient norm; 0: none")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_interval", type=number(int, 1), default=250, help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=50, help="iterations between bar updates")
    flag("--eval_only", action="store_true", help="evaluate, sample and leave")
    flag("--sample_only", action="store_true", help="sample from best.pt and leave")
    flag("--prompt", default="\n", help="the samples' beginning; FILE:name reads it from a file")
    flag("--max_new_tokens", type=number(int, 0), default=300, help="characters in a sample")
    flag("--num_samples", type=number(int, 1), default=1, help="samples, written at once")
    flag("--temperature", type=number(float, 0), default=0.8, help="0: always the likeliest")
    flag("--top_k", type=number(int, 0), default=200, help="of the k likeliest only; 0: of all")
    flag("--stop", default="", help="text that ends a sample")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: GPU if any")
    flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: fastest")
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    args, _ = parser.parse_known_args(argv)
    device = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(args.device, args.device)
    recipe = dict(RECIPES[args.optimizer])
    recipe["batch_size"], recipe["max_iters"] = recipe[device]
    defaults = SIZES[device] | recipe
    made = args.out_dir / "args.json"
    if (args.sample_only or args.init_from == "resume") and made.is_file():
        shape = ("n_layer", "n_head", "n_embd", "block_size", "bias")  # the checkpoint's, then
        defaults |= {k: v for k, v in json.loads(made.read_text()).items() if k in shape}
    parser.set_defaults(**{k: v for k, v in defaults.items() if k in vars(args)})
    args = parser.parse_args(argv)
    args.device = device
    args.lr_decay_iters = args.lr_decay_iters or max(1, args.max_iters)
    if args.prompt.startswith("FILE:"):
        try:
            args.prompt = Path(args.prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompt {args.prompt}: {error}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        write_samples(args) if args.sample_only else train(args, catch_signals())
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except OSError as error:
        fail(f"--out_dir {args.out_dir}: {error}")
