"""Step 16: nanoGPT's character-level model of Shakespeare, in less time.

Parent:  13_transformer + 15_imagenet
New:     orthogonalize, Muon, make_optimizers
Changed: encode, load_data, minibatches, CausalSelfAttention, MLP, Block, GPT, schedule,
         evaluate, generate, sample, log_sample, train, parse_args
Gone:    split_words, join_words, windows, OptaxOptimizer

The same transformer on characters, with nanoGPT's initialization and without biases. Muon
orthogonalizes the momentum of every hidden matrix: all singular values of its update are about
equal, and far fewer iterations are needed than with AdamW (--optimizer adamw: nanoGPT's recipe). On
a GPU, SDPA, torch's scaled_dot_product_attention, computes step 13's attention in one kernel that
never stores the T x T matrix of scores. Sampling keeps the keys and values of earlier positions in
a cache. Compare val_loss, over the whole validation text, with nanoGPT's: the dashed line is its
recipe for CPUs, the dotted one its recipe for GPUs, on an A100. The README has the command that
goes below the dotted line on two CPU cores.

Try:     --optimizer adamw (how many more iterations does it need?)
         python sample.py --prompt "ROMEO:" --num_samples 3 --temperature 0.5
Source:  Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2);
         Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al.
         2025, "Muon is scalable for LLM training" (its scale); Dao et al. 2022, "FlashAttention".
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import fcntl
import json
import math
import time
from functools import partial
from pathlib import Path

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


def encode(text, vocab, flag):
    """Return the ids (N,) of the characters of a text, which is the value of flag."""
    ids = {character: i for i, character in enumerate(vocab)}
    unknown = sorted(set(text) - ids.keys())
    if unknown:
        raise argparse.ArgumentTypeError(f"{flag}: {unknown[0]!r} is not one of {vocab!r}")
    return torch.tensor([ids[character] for character in text], dtype=torch.long)


def load_data(args):
    """Return the ids (N,) of the training and the validation text, and the vocabulary, a string.

    The first 90% of the characters are the training text.
    """
    text = read_text(args)
    split = int(0.9 * len(text))
    if len(text) - split <= args.block_size:
        problem = f"--input: {len(text)} characters: too few for --block_size {args.block_size}"
        raise argparse.ArgumentTypeError(problem)
    vocab = "".join(sorted(set(text)))
    ids = encode(text, vocab, "--input")
    return ids[:split], ids[split:], vocab


def minibatches(args, ids):
    """Yield minibatches x, y (B, T) forever, from random positions, on the device of ids."""
    offsets = torch.arange(args.block_size + 1, device=ids.device)
    while True:
        starts = torch.randint(len(ids) - args.block_size, (args.batch_size, 1), device=ids.device)
        chunks = ids[starts + offsets]  # (B, T + 1)
        yield chunks[:, :-1], chunks[:, 1:]


# ---------- model ----------
# B batch, T tokens (here: characters), C n_embd, H n_head, D = C / H, V vocab_size
class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it, (B, T, C) to (B, T, C).

    Linear maps give each position a query q, a key k and a value v. The dot product of position i's
    query with position j's key scores how relevant j is to i; softmax turns the scores into weights
    of a mean over the values. Each of H heads has its own q, k, v: a position can attend in H ways.
    """

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.sdpa = args.sdpa
        self.dropout = args.attn_dropout
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:  # [], or the keys and values of earlier positions
            cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache  # (B, H, S, D), S positions so far
        p = self.dropout if self.training else 0.0
        if self.sdpa or cache is not None:  # a single new position sees all positions in the cache
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        else:
            # If q and k have variance 1, q . k has variance D: unscaled, softmax saturates.
            scores = q @ k.mT / math.sqrt(C // self.n_head)  # (B, H, T, T)
            mask = x.new_ones(T, T, dtype=torch.bool).tril()  # position t sees positions 0 to t
            y = F.dropout(scores.masked_fill(~mask, -math.inf).softmax(dim=3), p) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Position-wise feed-forward network, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, T, 4C) inside


class Block(nn.Module):
    """Transformer block: attention and MLP, each with layer norm before and a skip connection."""

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
    """Maps x (B, T), T up to block_size, to the logits (B, T, V) of the token after each.

    With a cache, one list per block, x holds only the tokens after those that are cached already.
    """

    def __init__(self, args, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.ln_f = nn.LayerNorm(args.n_embd, bias=args.bias)
        self.lm_head = nn.Linear(args.n_embd, vocab_size, bias=False)
        self.dropout = nn.Dropout(args.dropout)  # zeroes this fraction of its input in training
        self.lm_head.weight = self.wte.weight  # weight tying: logit = x . embedding
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            if name.endswith("c_proj.weight"):  # the 2 n_layer residuals add up: start them small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))

    def forward(self, x, cache=None):
        # A weighted mean ignores order: the position embeddings wpe say where each token stands.
        n = cache[0][0].shape[2] if cache and cache[0] else 0  # cached positions
        x = self.dropout(self.wte(x) + self.wpe.weight[n : n + x.shape[1]])  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.lm_head(self.ln_f(x))  # (B, T, V)

    def load_state_dict(self, weights):
        """Load weights; the last positions of a longer context are cropped."""
        positions = weights["wpe.weight"][: self.wpe.num_embeddings]
        return super().load_state_dict(weights | {"wpe.weight": positions})


def compile_model(args, model):
    """Return the model compiled if --compile asks for it; without a compiler, as it is."""
    if not args.compile:
        return model
    try:  # compilation happens at the first call: try it on a small function
        torch.compile(lambda x: x + 1)(torch.ones(1, device=args.device))
    except Exception as error:  # no C++ compiler, no Triton, an old GPU, ...
        print(f"--compile falls back to eager mode: {error!r:.100}")
        return model
    return torch.compile(model)


# ---------- optimizer ----------
def orthogonalize(x):
    """Return matrices x (N, rows, columns) with all their singular values near 1, in bfloat16.

    If x = U S V', it is about U V'. A decomposition would be slow: five Newton-Schulz iterations
    apply 3.4445 s - 4.775 s^3 + 2.0315 s^5 to every singular value s, which takes 0 < s <= 1 close
    to 1, unless s is tiny (Jordan et al. 2024).
    """
    if x.shape[1] > x.shape[2]:  # the smaller Gram matrix is cheaper
        return orthogonalize(x.mT).mT
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # now the singular values are <= 1
    for _ in range(5):
        gram = torch.bmm(x, x.mT)  # (N, rows, rows)
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Gradient descent with an orthogonalized Nesterov momentum, for matrices.

    Those of one shape are stacked: a GPU takes longer to start a kernel than to run a small one.
    """

    def __init__(self, params, momentum, weight_decay):
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for p in params:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            updates = [p.grad for p in params]  # the gradients, which turn into the updates
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            # _foreach: for all tensors at once. lerp(a, b, w) = a + w (b - a); Nesterov momentum.
            torch._foreach_lerp_(buffers, updates, 1 - momentum)
            torch._foreach_lerp_(updates, buffers, momentum)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for shape in dict.fromkeys(p.shape for p in params):
                same = [i for i, p in enumerate(params) if p.shape == shape]
                x = orthogonalize(torch.stack([updates[i] for i in same])).to(params[0].dtype)
                scale = 0.2 * math.sqrt(max(shape))  # RMS 0.2, like AdamW's: one learning rate
                torch._foreach_add_([params[i] for i in same], x.unbind(), alpha=-lr * scale)


def make_optimizers(args, model):
    """Return {name: optimizer}; weight decay is for matrices, not for biases and layer norms."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers = {}
    if args.optimizer == "muon":
        hidden = [matrices.pop(name) for name in list(matrices) if name.startswith("h.")]
        # The momentum is often 0.95. c_attn holds q, k and v, but is orthogonalized as one matrix.
        optimizers["muon"] = Muon(hidden, args.beta1, args.weight_decay)
    groups = [{"params": list(matrices.values())}, {"params": vectors, "weight_decay": 0.0}]
    options = {"betas": (args.beta1, args.beta2), "weight_decay": args.weight_decay}
    optimizers["adamw"] = torch.optim.AdamW(groups, fused=True, **options)
    return optimizers


def schedule(args, iter_num):
    """Return an iteration's learning rate: linear warm-up, then cosine decay to min_lr."""
    if iter_num < args.warmup_iters:
        return args.learning_rate * (iter_num + 1) / (args.warmup_iters + 1)
    decay_iters = args.lr_decay_iters or args.max_iters
    progress = (iter_num - args.warmup_iters) / max(1, decay_iters - args.warmup_iters)
    cosine = (1 + math.cos(math.pi * min(progress, 1))) / 2  # 1 to 0
    return args.min_lr + (args.learning_rate - args.min_lr) * cosine


# ---------- evaluation ----------
@torch.no_grad()
def evaluate(args, model, ids):
    """Return the mean loss in nats per character over the whole text ids (N,).

    The windows do not overlap: each character but the first is predicted once.
    """
    model.eval()  # no dropout
    ids = F.pad(ids, (0, args.block_size), value=-100)  # cross_entropy's ignore_index
    chunks = ids.unfold(0, args.block_size + 1, args.block_size)  # (N, T + 1)
    inputs, targets = chunks[:, :-1].clamp(min=0), chunks[:, 1:]
    loss = torch.zeros((), dtype=torch.float64, device=ids.device)
    for x, y in zip(inputs.split(64), targets.split(64)):
        with autocast(args):
            logits = model(x)
        loss += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
    model.train()
    return loss.item() / (targets >= 0).sum().item()


@torch.no_grad()
def generate(args, model, ids, use_cache=True):
    """Return ids (B, N) followed by max_new_tokens ids sampled from the model.

    The keys and values of earlier positions are cached. Position embeddings are absolute, so the
    context cannot slide: once it is full, its last half is read anew, into an empty cache. There is
    no autocast: for one token at a time, casting the weights takes longer than it saves.
    """
    model.eval()
    generator = torch.Generator(ids.device).manual_seed(args.seed)  # not the generator of training
    start, cache = max(0, ids.shape[1] - args.block_size), None
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
        p = (logits / max(args.temperature, 1e-6)).softmax(dim=1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)  # (B, N + 1)
    model.train()
    return ids


def sample(args, model, vocab):
    """Return num_samples continuations of --prompt, as text; each ends after its first --stop."""
    prompt = encode(args.prompt, vocab, "--prompt").to(args.device)
    texts = []
    for row in generate(args, model, prompt.repeat(args.num_samples, 1)).tolist():
        text = "".join(vocab[i] for i in row[len(prompt) :])
        if args.stop:
            text = "".join(text.partition(args.stop)[:2])
        texts.append(args.prompt + text)
    return "\n---------------\n".join(texts)


# ---------- checkpoint ----------
def write_file(path, write):
    """Call write(file) on a new file, flush it to disk and rename it to path.

    At every moment path has either its old content or all of the new one.
    """
    temporary = path.with_name("unfinished.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        with open(temporary, "xb") as file:  # x: a new file, never one that a link points to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error!r:.100})") from error


def save_checkpoint(path, parts, state):
    """Save the state_dict of every part and the plain values in state.

    Random number generators need not be saved: train seeds them anew in every iteration.
    """
    checkpoint = {name: part.state_dict() for name, part in parts.items()} | {"state": state}
    write_file(path, partial(torch.save, checkpoint))


def read_checkpoint(path, template):
    """Return the checkpoint in a file; its state must have the keys and types of template."""
    if not path.is_file():
        raise OSError(f"{path} is missing: a run with --init_from scratch writes it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state"]
        assert all(type(state[key]) is type(value) for key, value in template.items())
    except Exception as error:  # torch.load raises many types, one for every kind of damage
        raise OSError(f"{path} is damaged, or no checkpoint of this step") from error
    return checkpoint


def load_checkpoint(path, parts, template):
    """Load a checkpoint into the parts; return its state, which is like template."""
    checkpoint = read_checkpoint(path, template)
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (LookupError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise OSError(f"{path} is of another model or optimizer ({name}: {reason})") from error
    return checkpoint["state"]


def lock_folder(folder):
    """Create a folder if it is missing, and lock it until this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"{folder}: another process is writing there") from error


def open_out_dir(args, device, logs, log_sizes):
    """Lock out_dir and write args.json; checkpoints there are an error without --overwrite.

    Logs are cut to their sizes at the checkpoint: a resumed run writes the rest again.
    """
    old = [] if args.init_from == "resume" else sorted(args.out_dir.glob("*.pt"))
    if old and not args.overwrite:
        raise OSError(f"--out_dir: {old[-1]} would be lost; add --init_from resume or --overwrite")
    lock_folder(args.out_dir)
    for path in old:
        path.unlink()
    for log, size in zip(logs, log_sizes):
        if log.exists() and log.stat().st_size > size:
            os.truncate(log, size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "device": name}
    text = json.dumps(vars(args) | versions, default=str)
    write_file(args.out_dir / "args.json", lambda file: file.write(text.encode()))


def catch_signals(signals):
    """Let SIGTERM and Ctrl-C append their number to signals: the loop then saves and ends."""

    def on_signal(number, frame):
        if number == signal.SIGINT and number in signals:
            sys.exit(130)  # a second Ctrl-C ends the run at once; a second SIGTERM may not
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


# ---------- training ----------
def setup_device(args):
    """Return the torch.device; replace "auto" in args.device and args.dtype by what is there."""
    has_gpu = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    if args.device == "cuda" and not has_gpu:
        raise argparse.ArgumentTypeError("--device cuda: torch finds no GPU here; use --device cpu")
    if args.dtype == "auto":  # bfloat16 where the hardware has it: emulated, it would be slow
        if args.device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = torch.cpu.get_capabilities()
            native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        args.dtype = "bfloat16" if native else "float32"
    return torch.device(args.device)


def autocast(args):
    """Return the context of mixed precision: convolutions and matrix products run in --dtype.

    bfloat16 has the range of float32, so that gradients need no loss scaling, but only 8 bits of
    precision: the parameters stay float32, or small updates would be rounded away.
    """
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


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
        file.write(f"=== iter {record['iter']}, val_loss {record['val_loss']:.4f}\n{text}\n\n")
    tqdm.write(f"{text}\n")


def train(args, signals=None):
    """Run the whole step; return the last record of metrics.jsonl.

    If signals is a list, SIGTERM and Ctrl-C make the run save a checkpoint and end.
    """
    start = time.perf_counter()
    device = setup_device(args)
    train_ids, val_ids, vocab = load_data(args)
    encode(args.prompt, vocab, "--prompt")  # an error here costs no training
    batches = minibatches(args, train_ids.to(device))
    val_ids = val_ids.to(device)
    torch.manual_seed(args.seed)
    model = GPT(args, len(vocab)).to(device)
    compiled = compile_model(args, model)
    optimizers = make_optimizers(args, model)
    parts = {"model": model, **optimizers}
    state = {"iter_num": 0, "seconds": 0.0, "best": math.inf, "record": {}, "log_sizes": []}
    state |= {"vocab": vocab, "loss_sum": torch.zeros((), device=device)}
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    logs = [args.out_dir / "metrics.jsonl", args.out_dir / "samples.txt"]
    if args.init_from == "resume":
        state = load_checkpoint(last, parts, state)
        if state["vocab"] != vocab:
            raise argparse.ArgumentTypeError(f"--input: {last} was trained on other characters")
        for p, averages in optimizers["adamw"].state.items():  # cropped like the weights
            averages |= {k: v[: len(p)] for k, v in averages.items() if v.ndim}
    sizes = ("block_size", "n_layer", "n_head", "n_embd", "bias")
    state["args"] = {name: getattr(args, name) for name in sizes}
    start_iter, record = state["iter_num"], state["record"]
    n_params = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    print(f"{n_params:,} parameters without positions, {args.device}, {args.dtype}")
    if args.eval_only:
        record = {"iter": start_iter, "val_loss": evaluate(args, model, val_ids)}
        print(f"val_loss {record['val_loss']:.4f}\n{sample(args, model, vocab)}")
        return record
    start -= state["seconds"]  # of the runs before this one
    open_out_dir(args, device, logs, state["log_sizes"])
    state["loss_sum"] = state["loss_sum"].to(device)  # a checkpoint is loaded to the CPU
    since, since_iter = time.perf_counter(), start_iter
    if signals is not None:
        catch_signals(signals)

    iters = range(start_iter, args.max_iters + 1)
    bar = tqdm(iters, total=args.max_iters, initial=start_iter, disable=None)
    for iter_num in bar:
        state |= {"iter_num": iter_num, "seconds": time.perf_counter() - start}
        if signals:
            if state["loss_sum"].isfinite():  # otherwise the last good checkpoint is kept
                save_checkpoint(last, parts, state)
            print(f"stopped at iteration {iter_num}; --init_from resume continues from {last}")
            break
        eval_due = iter_num % args.eval_interval == 0 or iter_num == args.max_iters
        last_eval = record.get("iter")
        if eval_due and iter_num != last_eval:
            record = {"iter": iter_num, "seconds": state["seconds"]}
            record["learning_rate"] = schedule(args, iter_num)
            if iter_num > 0:
                record["train_loss"] = state["loss_sum"].item() / (iter_num - last_eval)
            if iter_num > start_iter:
                tokens = (iter_num - since_iter) * args.batch_size * args.block_size
                record["tokens_per_second"] = tokens / (time.perf_counter() - since)
            record["val_loss"] = evaluate(args, model, val_ids)
            log_metrics(args, record)
            log_sample(args, record, sample(args, model, vocab))
            state["log_sizes"] = [log.stat().st_size for log in logs]
            state |= {"record": record, "seconds": time.perf_counter() - start}
            state["loss_sum"].zero_()
            if record["val_loss"] < state["best"]:
                state["best"] = record["val_loss"]
                save_checkpoint(best, parts, state)
            save_checkpoint(last, parts, state)
            since, since_iter = time.perf_counter(), iter_num
        if iter_num == args.max_iters:
            break

        # Random minibatches give unbiased estimates of the full gradient at a fraction of its cost.
        torch.manual_seed(args.seed * 1_000_003 + iter_num)  # the same numbers in a resumed run
        x, y = next(batches)
        with autocast(args):
            logits = compiled(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        if iter_num % 100 == 0:  # not always: to read the loss, the CPU has to wait for the GPU
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        loss.backward()
        if args.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = schedule(args, iter_num)
            optimizer.step()
            optimizer.zero_grad()
        state["loss_sum"] += loss.detach()

    if record.get("iter", -1) >= args.max_iters:
        print(f"val_loss {record['val_loss']:.4f} after {record['seconds']:.0f} s")
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


# Defaults by device, by optimizer and by both; the later ones override the earlier.
DEFAULTS = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0}
    | {"compile": False, "sdpa": False},  # in bfloat16, SDPA takes 20 to 45% more time here
    "cuda": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}
    | {"compile": True, "sdpa": True},
    "adamw": {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "beta2": 0.99}
    | {"weight_decay": 0.1, "grad_clip": 1.0},
    "muon": {"learning_rate": 0.015, "min_lr": 0.0, "warmup_iters": 20, "beta2": 0.95}
    | {"weight_decay": 0.05, "grad_clip": 0.0},
    ("cpu", "adamw"): {"batch_size": 12, "max_iters": 2000},
    ("cpu", "muon"): {"batch_size": 16, "block_size": 128, "max_iters": 1300},
    ("cuda", "adamw"): {"batch_size": 64, "max_iters": 5000},
    ("cuda", "muon"): {"batch_size": 64, "max_iters": 2000, "learning_rate": 0.005},
}


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
    flag("--batch_size", type=number(int, 1), help="windows per minibatch")
    flag = parser.add_argument_group("model").add_argument
    flag("--init_from", choices=("scratch", "resume"), default="scratch", help="out_dir/last.pt")
    flag("--block_size", type=number(int, 1), help="characters of context")
    flag("--n_layer", type=number(int, 1), help="number of blocks")
    flag("--n_head", type=number(int, 1), help="attention heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), help="size of an embedding")
    flag("--dropout", type=number(float, 0, 0.99), help="usually 0 to 0.5")
    flag("--attn_dropout", type=number(float, 0, 0.99), help="of attention weights; None: dropout")
    switch = argparse.BooleanOptionalAction
    flag("--bias", action=switch, default=False, help="in linear layers and layer norms, as GPT-2")
    flag("--sdpa", action=switch, help="torch's fused attention kernel")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", choices=("muon", "adamw"), default="muon", help="adamw: nanoGPT's recipe")
    flag("--learning_rate", type=number(float, 0), help="peak; usually 1e-4 to 1e-2")
    flag("--min_lr", type=number(float, 0), help="end of the schedule; usually learning_rate / 10")
    flag("--warmup_iters", type=number(int, 0), help="linear warm-up; usually 1-10%%")
    flag("--lr_decay_iters", type=number(int, 0), default=0, help="updates to min_lr; 0: max_iters")
    flag("--max_iters", type=number(int, 1), help="number of parameter updates")
    flag("--weight_decay", type=number(float, 0), help="of matrices; usually 0.01-0.5")
    flag("--beta1", type=number(float, 0, 0.9999), default=0.9, help="momentum; also Muon's")
    flag("--beta2", type=number(float, 0, 0.9999), help="of AdamW's mean squared gradient")
    flag("--grad_clip", type=number(float, 0), help="maximum gradient norm; 0: no clipping")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="start of the samples, by default a newline")
    flag("--stop", default="", help="text after which a sample ends")
    flag("--num_samples", type=number(int, 1), default=1, help="samples, written in one batch")
    flag("--max_new_tokens", type=number(int, 0), default=200, help="characters per sample")
    flag("--temperature", type=number(float, 0), default=0.8, help="usually 0.5 to 1; 0: greedy")
    flag("--top_k", type=number(int, 0), default=40, help="sample from the k most likely; 0: all")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_only", action="store_true", help="only evaluate and print samples")
    flag("--eval_interval", type=number(int, 1), default=250, help="iterations between evaluations")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag("--overwrite", action="store_true", help="delete the checkpoints of an earlier run there")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fastest")
    flag("--compile", action=switch, help="slow to start, then faster on a GPU")
    args = parser.parse_known_args(argv)[0]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for key in (args.device, args.optimizer, (args.device, args.optimizer)):
        parser.set_defaults(**DEFAULTS[key])
    saved_args = {}
    if args.init_from == "resume":  # the default sizes are those of the saved model
        saved_args = read_checkpoint(args.out_dir / "last.pt", {"args": {}})["state"]["args"]
        parser.set_defaults(**saved_args)
    args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"device": args.device})
    args.attn_dropout = args.dropout if args.attn_dropout is None else args.attn_dropout
    if not args.prompt:
        parser.error("--prompt is empty: the model needs at least one character to continue")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.n_head != saved_args.get("n_head", args.n_head):  # no weight's shape depends on it
        parser.error(f"--n_head {args.n_head}: the saved model has {saved_args['n_head']}")
    return args


if __name__ == "__main__":
    if sys.stdout:  # None if closed; its encoding may lack characters of a sample
        sys.stdout.reconfigure(errors="replace")
    signals = []
    try:
        train(parse_args(), signals)
    except torch.OutOfMemoryError:
        print("train.py: error: out of GPU memory: lower --batch_size", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    if signals:
        sys.exit(128 + signals[0])  # by convention: 130 after Ctrl-C, 143 after SIGTERM
