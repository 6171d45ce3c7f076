"""Step 17: GPT-2 124M on OpenWebText, on one GPU or on many machines.

Parent:  16_nanogpt_shakespeare
New:     load_bpe, map_tokens, Shards, check_ids, read_batch, to_device, CrossEntropy,
         flops_per_token, transpose_conv1d, make_model, all_sum, gather_full, reshard_like,
         join_processes, count_micro_batches, parallelize, measure_speed, resume_if_restarted,
         accumulate_gradients, should_skip
Changed: encode, load_data, minibatches, CausalSelfAttention, MLP, evaluate, sample,
         save_checkpoint, load_checkpoint, setup_device, autocast, train, parse_args
Gone:    read_text

Data parallelism: torchrun starts one process per GPU, each computes the gradient on its own part of
the batch, and the gradients are averaged: up to rounding, every number is that of one process with
the whole batch. Gradient accumulation makes a batch of any size from micro-batches that fit into
memory. A run may be killed at any moment: --init_from resume, or torchrun --max-restarts, continues
it (on a CPU bit for bit; some kernels of a GPU add in no fixed order). prepare.py tokenizes the
text to train on; sample.py, hellaswag.py and export_hf.py use the trained model. nanoGPT's recipe,
which reaches a loss of 2.85, trains with --no-bias --skip_zscore 0. On a CPU, a run is a quarter
shorter if glibc keeps freed memory: set the environment variables MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=2147483647.

Try:     --init_from gpt2 --eval_only (what is the loss of OpenAI's weights on this text?)
         your own text (python prepare.py -h), then --init_from gpt2 --learning_rate 0.00003
Source:  Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2);
         Li et al. 2020, "PyTorch distributed: experiences on accelerating data parallel training".
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads soon leave the core to others

import argparse
import fcntl
import functools
import json
import math
import resource
import socket
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record as report_error
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------
NO_BPE = "GPT-2's BPE has to be downloaded once, or found in TIKTOKEN_CACHE_DIR"


@functools.cache
def load_bpe():
    """Return GPT-2's byte pair encoding, or None where it is neither cached nor downloadable."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # tiktoken raises many types without a network
        return None


def encode(args, text, flag):
    """Return the token ids (N,) of a text, which is the value of flag."""
    ids = np.array(load_bpe().encode(text, allowed_special="all"), dtype=np.int64)
    check_ids(args, ids, flag)
    return torch.from_numpy(ids)


def map_tokens(path):
    """Return the tokens in a file, memory-mapped: nanoGPT's .bin, llm.c's, build-nanogpt's .npy."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r")
        magic, version, n_tokens = np.fromfile(path, np.int32, 3).tolist()
        if (magic, version) == (20240520, 1):  # llm.c: a header of 256 numbers before the tokens
            return np.memmap(path, np.uint16, "r", offset=1024, shape=(n_tokens,))
        return np.memmap(path, np.uint16, "r")
    except ValueError as error:  # fewer tokens than it should have, or half a token
        raise OSError(f"{path} is damaged, it has {path.stat().st_size:,} bytes") from error


class Shards:
    """The tokens of several files as one sequence: tokens[start:end] may span several."""

    def __init__(self, parts):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, window):
        start, end, _ = window.indices(len(self))
        pieces, i = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            offset = start - int(self.ends[i]) + len(self.parts[i])
            pieces.append(self.parts[i][offset : offset + end - start])
            start, i = start + len(pieces[-1]), i + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint16)


def load_data(args):
    """Return the ids of the training and the validation tokens, in memory-mapped files."""
    given = args.data_dir / args.dataset
    folder = args.cache_dir if (args.cache_dir / "train.bin").is_file() else given
    meta = folder / "meta.json"
    try:
        sizes = json.loads(meta.read_text()) if meta.is_file() else {}
    except ValueError as error:
        raise OSError(f"{meta} is damaged; delete it to train all the same") from error
    data = []
    for name in ("train", "val"):
        paths = [folder / f"{name}.bin"]
        if not paths[0].is_file():  # FineWeb's shards, in order: fineweb_train_000001.bin, ...
            paths = sorted(folder.glob(f"*_{name}_*.bin")) or sorted(folder.glob(f"*_{name}_*.npy"))
        if not paths:
            raise OSError(
                f"no {name}.bin in {args.cache_dir} or {given}: python prepare.py makes it from "
                "OpenWebText (25 GB to download, 100 GB of disk meanwhile, then 18), prepare.py "
                "--corpus FILES from your text; stand-ins: python tests/standins.py DIR"
            )
        parts = [map_tokens(path) for path in paths]
        tokens = parts[0] if len(parts) == 1 else Shards(parts)
        if len(tokens) != sizes.get(name, len(tokens)):
            raise OSError(f"{paths[0]} is damaged, it has {len(tokens):,} tokens: prepare.py again")
        if len(tokens) < 2 * args.block_size:
            problem = f"{paths[0]}: {len(tokens):,} tokens, fewer than two of --block_size"
            raise argparse.ArgumentTypeError(f"{problem} {args.block_size}")
        check_ids(args, tokens[:1_000_000], paths[0])
        data.append(tokens)
    return data


def check_ids(args, ids, name):
    """Raise an error if a token id is not in the vocabulary."""
    if ids.size and ids.max() >= args.vocab_size:
        problem = f"--vocab_size {args.vocab_size}: {name} has token {ids.max()}"
        raise argparse.ArgumentTypeError(problem)


def minibatches(args, tokens, iter_num, device):
    """Yield this process's micro-batches x, y (B, T) forever, from iteration iter_num on.

    The p-th sequence of a run depends on (seed, p) alone: every epoch is a random permutation of
    all blocks of T tokens, divided among the processes. So no block is repeated in an epoch, the
    data do not depend on the number of processes, and iter_num tells where to resume.
    """
    n_blocks = len(tokens) // args.block_size - 1  # one less: every epoch has another offset
    p = iter_num * args.total_batch_tokens // args.block_size + args.rank * args.batch_size
    epoch = None
    while True:
        starts = []
        for i in range(p, p + args.batch_size):
            if i // n_blocks != epoch:
                epoch = i // n_blocks
                rng = np.random.default_rng([args.seed, epoch])
                offset, order = rng.integers(args.block_size), rng.permutation(n_blocks)
            starts.append(offset + order[i % n_blocks] * args.block_size)
        yield read_batch(args, tokens, starts, device, "train.bin")
        p += args.world_size * args.batch_size


def read_batch(args, tokens, starts, device, name):
    """Return the sequences that begin at starts as x, y (B, T); beyond the end, y is -100."""
    chunks = np.full((len(starts), args.block_size + 1), -100)  # cross_entropy's ignore_index
    for chunk, start in zip(chunks, starts):
        sequence = tokens[start : start + args.block_size + 1]
        chunk[: len(sequence)] = sequence
    check_ids(args, chunks, name)
    return to_device(chunks[:, :-1].clip(0), device), to_device(chunks[:, 1:], device)


def to_device(ids, device):
    """Return a copy of a numpy array on the device; the copy to a GPU is asynchronous."""
    ids = torch.tensor(ids)
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids


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
        self.dropout = args.dropout
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
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Position-wise feed-forward network, (B, T, C) to (B, T, C)."""

    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x):  # GPT-2 has the tanh approximation of GELU
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, 4C) inside


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


class CrossEntropy(torch.autograd.Function):
    """Sum of the losses of logits (N, V) with targets (N,); a target of -100 does not count.

    F.cross_entropy makes several float32 tensors of the logits' size, of which it keeps one for
    backward. Here they exist for a few rows at a time, and the gradient replaces the logits.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        ctx.n = 64 if logits.is_cpu else 1024  # rows that fit into a cache; few kernels on a GPU
        chunks = zip(logits.split(ctx.n), targets.split(ctx.n))
        return sum(F.cross_entropy(z.float(), y, reduction="sum") for z, y in chunks)

    @staticmethod
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        for z, y in zip(logits.split(ctx.n), targets.split(ctx.n)):
            dz = z.softmax(1, dtype=torch.float32)
            dz[torch.arange(len(y), device=y.device), y.clip(0)] -= 1  # softmax - one-hot
            z.copy_(dz * (grad * (y >= 0))[:, None])
        return logits, None


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


def flops_per_token(args):
    """Return the floating-point operations per token, forward and backward (PaLM, appendix B)."""
    n_params = 12 * args.n_layer * args.n_embd**2 + args.vocab_size * args.n_embd  # in matrices
    return 6 * n_params + 12 * args.n_layer * args.n_embd * args.block_size


GPT2_REVISIONS = {  # the Hugging Face Hub's commits of the published weights
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}


def transpose_conv1d(name, tensor):
    """Return a weight in the other layout: Hugging Face's GPT-2 has Conv1D, a transposed Linear."""
    return tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


def make_model(args):
    """Return the model before training: new, or with the weights that --init_from names.

    They are a published GPT-2, or a directory in the same format. Its sizes become those of args.
    """
    if args.init_from in ("scratch", "resume"):
        return GPT(args, args.vocab_size)
    folder = Path(args.init_from)
    try:
        from safetensors.torch import load_file  # needed only here and by export_hf.py

        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            repo, revision = f"openai-community/{folder}", GPT2_REVISIONS.get(args.init_from)
            wanted = ["config.json", "*.safetensors"]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        config = json.loads((folder / "config.json").read_text())
        if args.block_size > config["n_positions"]:
            raise ValueError(f"--block_size {args.block_size} is over {config['n_positions']}")
        if config["n_embd"] % config["n_head"]:
            raise ValueError(f"{config['n_head']} heads do not divide {config['n_embd']}")
        vars(args).update({k: config[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")})
        args.bias = True
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        tensors = {name.removeprefix("transformer."): v for name, v in tensors.items()}
        masks = (".attn.bias", ".attn.masked_bias")  # in old files, the causal mask, not weights
        weights = {k: transpose_conv1d(k, v) for k, v in tensors.items() if not k.endswith(masks)}
        model = GPT(args, args.vocab_size)
        model.load_state_dict(weights | {"lm_head.weight": weights["wte.weight"]})
        return model
    except Exception as error:  # the hub raises types of its own, damaged files many others
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise OSError(f"--init_from {args.init_from}: no GPT-2 to load ({reason[0]})") from error


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
def all_sum(values, device):
    """Return numbers summed over the processes, in float64; this waits for the device, once."""
    total = torch.zeros(len(values), dtype=torch.float64, device=device)
    for i, value in enumerate(values):
        total[i] = value  # torch.tensor(value, device=device) would wait for a GPU
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(args, model, ids, batch_loss, device):
    """Return the mean loss in nats per token over all of ids (N,), which the processes share.

    The windows do not overlap: each token but the first is predicted once.
    """
    model.eval()  # no dropout
    n, batch_tokens = len(ids) - 1, args.batch_size * args.block_size
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, n, args.world_size * batch_tokens):
        starts = first + args.rank * batch_tokens + np.arange(0, batch_tokens, args.block_size)
        x, y = read_batch(args, ids, starts, device, "val.bin")
        with autocast(args):
            loss += batch_loss(x, y, reduction="sum")
    model.train()
    return all_sum([loss], device)[0] / n


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


def sample(args, model):
    """Return num_samples continuations of --prompt, as text; each ends after its first --stop."""
    if args.max_new_tokens == 0 or load_bpe() is None:
        return f"(no sample: {NO_BPE})" if args.max_new_tokens else ""
    bpe, prompt = load_bpe(), encode(args, args.prompt, "--prompt").to(args.device)
    use_cache = not isinstance(model, FSDPModule)  # which copies forward's arguments
    texts = []
    for row in generate(args, model, prompt.repeat(args.num_samples, 1), use_cache).tolist():
        text = bpe.decode([i for i in row[len(prompt) :] if i < bpe.n_vocab])  # others are padding
        if args.stop:
            text = "".join(text.partition(args.stop)[:2])
        texts.append(args.prompt + text)
    return "\n---------------\n".join(texts)


# ---------- checkpoint ----------
def gather_full(value):
    """Return a tensor or state_dict with FSDP's shards gathered; all processes must call it.

    Only the first process gets the tensors of a state_dict, in the CPU's memory.
    """
    if isinstance(value, dict):
        return {key: gather_full(v) for key, v in value.items()}
    if isinstance(value, DTensor):
        value = value.full_tensor()
        if value.dim():
            value = value.cpu() if dist.get_rank() == 0 else None
    return value


def reshard_like(value, old):
    """Return the tensor value, cropped and sharded like old, which it is to replace."""
    if value.dim() and value.dim() == old.dim():
        value = value[: len(old)]  # the last positions of a longer context are cropped
    if isinstance(old, DTensor) and value.shape == old.shape:
        value = distribute_tensor(value.to(old.device), old.device_mesh, old.placements)
    return value


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


def save_checkpoint(args, paths, parts, state):
    """Save the state_dict of every part and the plain values in state; all processes call it.

    Random number generators need not be saved: train seeds them anew in every iteration.
    """
    checkpoint = {name: gather_full(part.state_dict()) for name, part in parts.items()}
    if args.rank > 0:
        return
    write_file(paths[0], functools.partial(torch.save, checkpoint | {"state": state}))
    for path in paths[1:]:  # other names of the same file
        temporary = path.with_name("unfinished.tmp")
        os.link(paths[0], temporary)
        os.replace(temporary, path)
    if args.keep:
        for path in sorted(args.out_dir.glob("iter_*.pt"))[: -args.keep]:
            path.unlink()


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
    """Load a checkpoint, of any number of processes, into the parts; return its state."""
    checkpoint = read_checkpoint(path, template)
    for name, part in parts.items():
        try:
            saved = checkpoint[name]
            if isinstance(part, nn.Module):
                own = part.state_dict()
                saved = {k: reshard_like(v, own[k]) for k, v in saved.items()}
            elif isinstance(part, torch.optim.Optimizer):
                params = [p for group in part.param_groups for p in group["params"]]
                for i, averages in saved["state"].items():
                    saved["state"][i] = {k: reshard_like(v, params[i]) for k, v in averages.items()}
            if saved:  # it is empty if the run's dtype needed no GradScaler
                part.load_state_dict(saved)
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
SAVE_SECONDS = 900  # at most between two checkpoints


def join_processes(backend):
    """Join the processes that torchrun started.

    torchrun's store of addresses outlives a restart, with those of dead processes in it. So the
    first process opens a new store, and the others try its port until they reach it.
    """
    old_store, rank, world_size = next(dist.rendezvous("env://"))
    host, store = os.environ["MASTER_ADDR"], None
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True)
        old_store.set("port", str(store.port))
    deadline = time.monotonic() + 300
    while store is None:
        port = int(old_store.get("port"))  # perhaps still that of a dead process
        try:
            socket.create_connection((host, port), timeout=10).close()
            store = dist.TCPStore(host, port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"the first process, at {host}:{port}: {error}") from error
            time.sleep(0.1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def setup_device(args):
    """Join the other processes; return the torch.device; replace "auto" in args.dtype."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("--device cuda: torch finds no GPU here; use --device cpu")
    device = torch.device(args.device)
    if args.device == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise argparse.ArgumentTypeError("fewer GPUs than processes: lower --nproc_per_node")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if by_torchrun and not dist.is_initialized():
        join_processes("nccl" if args.device == "cuda" else "gloo")
    args.rank = dist.get_rank() if dist.is_initialized() else 0
    args.world_size = dist.get_world_size() if dist.is_initialized() else 1
    if args.dtype == "auto":  # bfloat16 where the hardware has it: emulated, it would be slow
        if args.device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = torch.cpu.get_capabilities()
            native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        fallback = "float16" if args.device == "cuda" else "float32"
        args.dtype = "bfloat16" if native else fallback
    return device


def autocast(args):
    """Return the context of mixed precision: matrix products run in --dtype.

    bfloat16 has the range of float32, so that gradients need no loss scaling, but only 8 bits of
    precision: the parameters stay float32, or small updates would be rounded away. In float16 small
    gradients would become 0: a GradScaler multiplies the loss before backward.
    """
    dtype = getattr(torch, args.dtype)
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def count_micro_batches(args):
    """Return how many micro-batches per process make up the batch of an update."""
    unit = args.block_size * args.world_size
    if args.total_batch_tokens % (unit * args.batch_size) == 0:
        return args.total_batch_tokens // (unit * args.batch_size)
    sizes = [b for b in range(1, args.batch_size) if args.total_batch_tokens % (unit * b) == 0]
    near = max(1, round(args.total_batch_tokens / unit / args.batch_size)) * unit * args.batch_size
    advice = f"--total_batch_tokens {near}" + (f" or --batch_size {sizes[-1]}" if sizes else "")
    raise argparse.ArgumentTypeError(
        f"--total_batch_tokens {args.total_batch_tokens} is not divisible by --batch_size "
        f"{args.batch_size} x --block_size {args.block_size} x {args.world_size} processes; "
        f"{advice} is possible"
    )


def parallelize(args, model, device):
    """Return the model to train with, wrapped so that the processes average their gradients.

    With DDP every process has a copy of the parameters, gradients and optimizer state. FSDP shards
    them over the processes, and gathers the parameters of one block at a time.
    """
    if args.parallel == "fsdp" and args.dtype == "float16":
        raise argparse.ArgumentTypeError("--parallel fsdp needs --dtype bfloat16 or float32")
    if args.recompute:  # activation checkpointing: backward computes each block's activations again
        for block in model.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if args.parallel == "fsdp" and dist.is_initialized():
        policy = MixedPrecisionPolicy(getattr(torch, args.dtype), torch.float32)
        mesh = init_device_mesh(args.device, (args.world_size,))
        for block in model.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy).to(device)
    model.to(device)
    if dist.is_initialized():
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


# Dense bfloat16 TFLOP/s (V100, T4: float16), from NVIDIA's data sheets; the first match counts.
PEAK_TFLOPS = {"B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835}
PEAK_TFLOPS |= {"H100": 989, "H200": 989, "GH200": 989, "A100": 312}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "V100": 125, "T4": 65}


def measure_speed(args, tokens, seconds, device):
    """Return tokens_per_second, memory_gib and, where known, mfu (model FLOPs utilization)."""
    tflops = args.peak_tflops
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
        known = [peak for kind, peak in PEAK_TFLOPS.items() if set(kind.split()) <= words]
        if args.dtype != "float32" and known:
            tflops = tflops or known[0]
    else:
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {"tokens_per_second": tokens / seconds, "memory_gib": memory / 2**30}
    if tflops:
        flops = flops_per_token(args) * record["tokens_per_second"] / args.world_size
        record["mfu"] = flops / (tflops * 1e12)
    return record


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


def resume_if_restarted(args, last, device):
    """Set args.init_from to resume if torchrun or Slurm has restarted the job of checkpoint last.

    Each machine counts its own restarts only, so the processes decide together. The id of the job
    is in args.json: the checkpoint of another job is never resumed unasked.
    """
    args.job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or ""
    old_args = args.out_dir / "args.json"
    is_own = old_args.is_file() and f'"job": {json.dumps(args.job)}' in old_args.read_text()
    counts = [os.environ.get(f"{who}_RESTART_COUNT", "0") for who in ("TORCHELASTIC", "SLURM")]
    is_restarted = is_own and any(count not in ("", "0") for count in counts)
    n_restarted, n_found = all_sum([is_restarted, last.is_file()], device)
    if 0 < n_found < args.world_size:
        problem = f"only {n_found:g} of {args.world_size} processes find {last}"
        raise argparse.ArgumentTypeError(f"--out_dir must be shared: {problem}")
    if n_restarted and n_found:
        args.init_from = "resume"


def accumulate_gradients(args, forward, batch_loss, scaler, batch, batches):
    """Add up the gradients of an update's micro-batches; return its loss and the next micro-batch.

    The processes average their gradients once, in the last backward pass.
    """
    loss = torch.zeros((), device=batch[0].device)
    for i in range(args.n_micro_batches):
        is_last = i == args.n_micro_batches - 1
        if isinstance(forward, FSDPModule):
            forward.set_requires_gradient_sync(is_last)
        elif isinstance(forward, DistributedDataParallel):
            forward.require_backward_grad_sync = is_last  # has to be set before the forward pass
        with autocast(args):
            micro_loss = batch_loss(*batch) / args.n_micro_batches
        batch = next(batches)  # while the GPU computes
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    return loss, batch


def should_skip(args, iter_num, loss, grad_norm, losses):
    """Return whether to skip an update, and print why: a loss spike or an infinite gradient.

    A spike is more than --skip_zscore standard deviations above the mean of the last 100 losses.
    """
    if not math.isfinite(loss):
        problem = f"the loss is no longer finite at iteration {iter_num}"
        raise FloatingPointError(f"{problem}: lower --learning_rate {args.learning_rate}")
    z = (loss - np.mean(losses)) / (np.std(losses) + 1e-9) if len(losses) == 100 else 0.0
    skip = z > args.skip_zscore > 0 or not math.isfinite(grad_norm)
    if skip and args.rank == 0:
        problem = f"loss {loss:.4f}, z-score {z:.1f}, gradient norm {grad_norm:.3g}"
        tqdm.write(f"update {iter_num} skipped: {problem}")
    return skip


def train(args, signals=None):
    """Run the whole step; return the last record of metrics.jsonl.

    If signals is a list, SIGTERM and Ctrl-C make the run save a checkpoint and end.
    """
    start, parent = time.perf_counter(), os.getppid()
    device = setup_device(args)
    is_main_process = args.rank == 0  # the one that prints and writes
    args.n_micro_batches = count_micro_batches(args)
    torch.manual_seed(args.seed)
    model = make_model(args)
    train_ids, val_ids = load_data(args)
    if args.max_new_tokens and load_bpe():
        encode(args, args.prompt, "--prompt")  # an error here costs no training
    n_params = sum(p.numel() for p in model.parameters())
    forward = parallelize(args, model, device)

    def batch_loss(x, y, reduction="mean"):
        logits, y = forward(x).flatten(0, 1), y.flatten()  # (B * T, V), (B * T,)
        if torch.compiler.is_compiling():  # it fuses these operations
            return F.cross_entropy(logits.float(), y, reduction=reduction)
        loss = CrossEntropy.apply(logits, y)
        return loss / len(y) if reduction == "mean" else loss

    batch_loss = compile_model(args, batch_loss)
    optimizers = make_optimizers(args, model)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    parts = {"model": model, **optimizers, "scaler": scaler}
    state = {"iter_num": 0, "seconds": 0.0, "losses": [], "best": math.inf, "record": {}}
    state |= {"log_sizes": []}
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    logs = [args.out_dir / "metrics.jsonl", args.out_dir / "samples.txt"]
    resume_if_restarted(args, last, device)
    if args.init_from == "resume":
        state = load_checkpoint(last, parts, state)
    sizes = ("block_size", "n_layer", "n_head", "n_embd", "bias", "vocab_size")
    state["args"] = {name: getattr(args, name) for name in sizes}
    start_iter, record, losses = state["iter_num"], state["record"], state["losses"]
    if args.eval_only:
        val_loss = evaluate(args, model, val_ids, batch_loss, device)
        text = sample(args, model)
        if is_main_process:
            print(f"val_loss {val_loss:.4f}\n{text}")
        return {"iter": start_iter, "val_loss": val_loss}
    start -= state["seconds"]  # of the runs before this one
    if is_main_process:
        print(f"{n_params:,} parameters, {args.world_size} processes, {args.device}, {args.dtype}")
        print(f"micro-batches per process and update: {args.n_micro_batches}")
        open_out_dir(args, device, logs, state["log_sizes"])
    batches = minibatches(args, train_ids, start_iter, device)
    batch = next(batches)
    since, since_iter, speed = time.perf_counter(), start_iter, {}
    stop_requested = save_due = False
    if signals is not None:
        catch_signals(signals)

    iters = range(start_iter, args.max_iters + 1)
    disable = None if is_main_process else True  # None: shown on a terminal
    bar = tqdm(iters, total=args.max_iters, initial=start_iter, disable=disable)
    for iter_num in bar:
        state |= {"iter_num": iter_num, "seconds": time.perf_counter() - start}
        eval_due = iter_num % args.eval_interval == 0 or iter_num == args.max_iters
        paths = [last] if stop_requested or save_due else []  # of the checkpoints to write
        if eval_due and iter_num != record.get("iter") and not stop_requested:
            record = {"iter": iter_num, "seconds": 0.0, "learning_rate": schedule(args, iter_num)}
            if losses:  # of the last 100 updates
                record |= {"train_loss": sum(losses) / len(losses), **speed}
            record["val_loss"] = evaluate(args, model, val_ids, batch_loss, device)
            record["seconds"] = time.perf_counter() - start
            text = sample(args, model)
            if is_main_process:
                log_metrics(args, record)
                log_sample(args, record, text)
                state["log_sizes"] = [log.stat().st_size for log in logs]
                plot_run(args.out_dir)
            state |= {"record": record, "seconds": record["seconds"]}
            paths = [args.out_dir / f"iter_{iter_num:08d}.pt", last] if args.keep else [last]
            if record["val_loss"] < state["best"]:
                state["best"] = record["val_loss"]
                paths.insert(0, best)
        if paths:
            save_checkpoint(args, paths, parts, state)
            since, since_iter = time.perf_counter(), iter_num
        if stop_requested and is_main_process:
            print(f"stopped at iteration {iter_num}; --init_from resume continues from {last}")
        if stop_requested or iter_num == args.max_iters:
            break

        # For dropout: each process has its own random numbers, a resumed run the same again.
        torch.manual_seed(args.seed * 1_000_003 + iter_num * args.world_size + args.rank)
        loss, batch = accumulate_gradients(args, forward, batch_loss, scaler, batch, batches)
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        orphaned = dist.is_initialized() and os.getppid() != parent  # torchrun was killed
        # One all-reduce and one wait for the GPU per update.
        requests = [bool(signals) or orphaned, time.perf_counter() - since > SAVE_SECONDS]
        totals = all_sum([loss, gather_full(grad_norm), *requests], device)
        loss, grad_norm, stop_requested, save_due = (total / args.world_size for total in totals)
        skip = should_skip(args, iter_num, loss, grad_norm, losses)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = schedule(args, iter_num)
            if not skip:
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        losses[:] = [*losses[-99:], loss]  # in place: the list is part of state
        tokens = (iter_num + 1 - since_iter) * args.total_batch_tokens
        speed = measure_speed(args, tokens, time.perf_counter() - since, device)
        if iter_num == start_iter:  # its time includes compilation
            since, since_iter = time.perf_counter(), iter_num + 1
        shown = {key: f"{value:.4g}" for key, value in speed.items()}
        bar.set_postfix(loss=f"{loss:.4f}", **shown, refresh=False)

    if is_main_process and record.get("iter", -1) >= args.max_iters:
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


# Defaults by device: GPT-2 124M, or a model small enough for a CPU.
DEFAULTS = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 16}
    | {"learning_rate": 2e-3, "min_lr": 2e-4, "warmup_iters": 50, "max_iters": 500}
    | {"total_batch_tokens": 4096, "eval_interval": 50, "compile": False, "vocab_size": 50257},
    "cuda": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 30}
    | {"learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 2000, "max_iters": 600_000}
    | {"total_batch_tokens": 491_520, "eval_interval": 1000, "compile": True}
    | {"vocab_size": 50304},  # multiples of 64 are faster on a GPU
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
    flag("--data_dir", type=Path, default=data_dir, help="directory of the data sets")
    flag("--dataset", default="openwebtext", help="directory in --data_dir with train.bin")
    flag("--cache_dir", type=Path, help="as for prepare.py; None: cache/DATASET in --data_dir")
    flag("--batch_size", type=number(int, 1), help="sequences per micro-batch and process")
    flag("--total_batch_tokens", type=number(int, 1), help="tokens per update, in all processes")
    flag = parser.add_argument_group("model").add_argument
    sources = "scratch, resume (out_dir/last.pt), gpt2, gpt2-medium, ... or a directory like these"
    flag("--init_from", default="scratch", help=sources)
    flag("--vocab_size", type=number(int, 2, 65536), help="GPT-2's BPE has 50257 tokens")
    flag("--block_size", type=number(int, 1), help="tokens of context")
    flag("--n_layer", type=number(int, 1), help="number of blocks")
    flag("--n_head", type=number(int, 1), help="attention heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), help="size of an embedding")
    flag("--dropout", type=number(float, 0, 0.99), default=0.0, help="usually 0 to 0.5")
    switch = argparse.BooleanOptionalAction
    flag("--bias", action=switch, default=True, help="as in GPT-2; nanoGPT trains without")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", choices=("muon", "adamw"), default="adamw", help="adamw: nanoGPT's recipe")
    flag("--learning_rate", type=number(float, 0), help="peak; usually 1e-4 to 1e-2")
    flag("--min_lr", type=number(float, 0), help="end of the schedule; usually learning_rate / 10")
    flag("--warmup_iters", type=number(int, 0), help="linear warm-up; usually 1-10%%")
    flag("--lr_decay_iters", type=number(int, 0), default=0, help="updates to min_lr; 0: max_iters")
    flag("--max_iters", type=number(int, 1), help="number of parameter updates")
    flag("--weight_decay", type=number(float, 0), default=0.1, help="of matrices; usually 0.01-0.5")
    flag("--beta1", type=number(float, 0, 0.9999), default=0.9, help="momentum; also Muon's")
    flag("--beta2", type=number(float, 0, 0.9999), default=0.95, help="AdamW's second moment")
    flag("--grad_clip", type=number(float, 0), default=1.0, help="maximum gradient norm; 0: off")
    flag("--skip_zscore", type=number(float, 0), default=6.0, help="skip loss spikes; 0: never")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="start of the samples, by default a newline")
    flag("--stop", default="<|endoftext|>", help="text after which a sample ends")
    flag("--num_samples", type=number(int, 1), default=1, help="samples, written in one batch")
    flag("--max_new_tokens", type=number(int, 0), default=100, help="tokens per sample")
    flag("--temperature", type=number(float, 0), default=0.8, help="usually 0.5 to 1; 0: greedy")
    flag("--top_k", type=number(int, 0), default=200, help="sample from the k most likely; 0: all")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_only", action="store_true", help="only evaluate and print samples")
    flag("--eval_interval", type=number(int, 1), help="iterations between evaluations")
    flag("--keep", type=number(int, 0), default=0, help="older checkpoints to keep: iter_*.pt")
    flag("--out_dir", type=Path, default=Path(__file__).parent / "out", help="output directory")
    flag("--overwrite", action="store_true", help="delete the checkpoints of an earlier run there")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="seed of the random numbers")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    flag("--dtype", choices=dtypes, default="auto", help="auto: fastest")
    flag("--compile", action=switch, help="slow to start, then faster on a GPU")
    flag("--recompute", action="store_true", help="activation checkpointing: less memory, slower")
    flag("--parallel", choices=("ddp", "fsdp"), default="ddp", help="fsdp: for large models")
    flag("--peak_tflops", type=number(float, 0), default=0.0, help="for mfu; 0: by the GPU's name")
    args = parser.parse_known_args(argv)[0]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.set_defaults(**DEFAULTS[args.device])
    if args.device == "cuda" and torch.cuda.is_available():
        if torch.cuda.get_device_properties(0).total_memory < 30e9:  # 30 sequences may not fit
            parser.set_defaults(batch_size=15)
    saved_args = {}
    if args.init_from == "resume":  # the default sizes are those of the saved model
        saved_args = read_checkpoint(args.out_dir / "last.pt", {"args": {}})["state"]["args"]
        parser.set_defaults(**saved_args)
    args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"device": args.device})
    args.cache_dir = args.cache_dir or args.data_dir / "cache" / args.dataset
    if not args.prompt:
        parser.error("--prompt is empty: the model needs at least one token to continue")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.n_head != saved_args.get("n_head", args.n_head):  # no weight's shape depends on it
        parser.error(f"--n_head {args.n_head}: the saved model has {saved_args['n_head']}")
    return args


if __name__ == "__main__":
    if sys.stdout:  # None if closed; its encoding may lack characters of a sample
        sys.stdout.reconfigure(errors="replace")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    signals = []
    try:
        report_error(train)(parse_args(), signals)  # torchrun reports the first failure
    except torch.OutOfMemoryError:
        print("train.py: error: out of GPU memory: lower --batch_size", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        mistakes = (argparse.ArgumentTypeError, FloatingPointError, MemoryError, OSError)
        if not isinstance(error, mistakes) and "allocate memory" not in str(error):
            raise  # a bug: the traceback shows where
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line per machine
            print(f"train.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    exit_code = 128 + signals[0] if signals else 0  # by convention: 130 after Ctrl-C
    if dist.is_initialized():  # not after a failure: NCCL would wait here for the other processes
        dist.destroy_process_group()
        # Caches of DTensor keep gloo's threads alive, which can crash Python's cleanup: skip it.
        print(end="", flush=True)
        os._exit(exit_code)
    sys.exit(exit_code)
