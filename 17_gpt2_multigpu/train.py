"""Step 17: GPT-2 124M on OpenWebText, on one GPU or on many machines.

Parent:  16_nanogpt_shakespeare
New:     load_bpe, tokenise, prepare, check_ids, to_device, flops_per_token, turned,
         load_hf, make_model, export_hf, all_sum, hellaswag, whole, sharded_like,
         join_processes, keep_memory, parallelise, average_gradients, measure_speed
Changed: encode, load_data, minibatches, MLP, evaluate, sample, save_checkpoint,
         load_checkpoint, setup_device, autocast, train, write_samples, parse_args
Gone:    download, compile_model

torchrun starts one process a GPU. Each walks through its own part of the shuffled data, their
gradients are averaged, and every number is the same as if one process had done it all. A run can
be killed at any moment: --init_from resume, or torchrun --max-restarts, goes on (on a CPU bit for
bit; some kernels of a GPU add up in any order).

Try:     --prepare --corpus FILE.jsonl (your own text), then a run that learns it
         --init_from gpt2 --eval_only (what do OpenAI's weights score on this text?)
Source:  Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2);
         Li et al. 2020, "PyTorch distributed: experiences on accelerating data parallel..."
"""

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record as show_error
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from plot import plot_run

# ---------- data ----------


NO_BPE = "GPT-2's BPE needs a network once, or its cache in TIKTOKEN_CACHE_DIR"
OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@refs%2Fconvert%2Fparquet/plain_text/train/"


@functools.cache
def load_bpe():
    """Return GPT-2's byte pair encoding, or None where it is neither cached nor to be had."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # many kinds, one for every way a network can be absent
        return None


def encode(args, text, flag):
    """Return the tokens (N,) of the text that a flag gave."""
    ids = np.array(load_bpe().encode(text, allowed_special="all"), dtype=np.int64)
    check_ids(args, ids, flag)
    return torch.from_numpy(ids)


def tokenise(job):
    """Write the tokens of some documents, each with end-of-text behind it; return their number.

    job is (documents, the rows wanted, the file). A file that exists is whole: nothing is done.
    """
    documents, rows, path = job
    if not path.exists():
        bpe = load_bpe()
        ids = []
        for text in documents.select(rows)[:]["text"]:
            ids += [*bpe.encode_ordinary(text), bpe.eot_token]
        np.array(ids, dtype=np.uint16).tofile(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return len(rows)


def prepare(args):
    """Turn --corpus, or OpenWebText, into train.bin and val.bin under --cache_dir.

    They are nanoGPT's: GPT-2 tokens as uint16. --seed shuffles the documents, the last
    --val_fraction of all tokens validates. Killed and started again, it goes on where it was.
    """
    import datasets  # takes seconds, and only preparing needs it

    if load_bpe() is None:
        fail(f"--prepare: {NO_BPE}")
    files = [str(path) for path in args.corpus]
    files = files or [f"{OPENWEBTEXT}{i:04d}.parquet" for i in range(80)]
    kinds = {".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
    kind = {kinds.get(Path(file).suffix) for file in files}
    if len(kind) > 1 or None in kind:
        fail(f"--corpus {' '.join(files[:5])}: all must end in .jsonl, all in .txt or .parquet")
    options = {"sample_by": "document"} if kind == {"text"} else {}
    options |= {"cache_dir": str(args.cache_dir / "datasets"), "split": "train"}
    try:
        documents = datasets.load_dataset(*kind, data_files=files, **options).select_columns("text")
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        fail(f"--corpus {' '.join(files[:5])}: no column 'text' can be read ({reason})")

    about = [args.seed, *((path.name, path.stat().st_size) for path in args.corpus)]
    parts = args.cache_dir / f"parts-{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}"
    parts.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(args.seed).permutation(len(documents))
    starts = range(0, len(order), 10_000)
    jobs = [(documents, order[i : i + 10_000], parts / f"{i:09d}.bin") for i in starts]
    n_proc = min(args.num_proc, len(jobs))
    pool = multiprocessing.get_context("spawn").Pool(n_proc) if n_proc > 1 else None
    with tqdm(total=len(order), unit="doc") as bar:
        for done in pool.imap_unordered(tokenise, jobs) if pool else map(tokenise, jobs):
            bar.update(done)
    if pool:
        pool.close()
    pieces = [np.memmap(path, np.uint16, "r") for *_, path in jobs]
    n_tokens = sum(map(len, pieces))
    n_train = n_tokens - int(n_tokens * args.val_fraction)
    for name, first, last in (("train", 0, n_train), ("val", n_train, n_tokens)):
        with open(args.cache_dir / f"{name}.tmp", "wb") as out:
            at = 0
            for piece in pieces:
                out.write(piece[max(first - at, 0) : max(last - at, 0)].tobytes())
                at += len(piece)
        (args.cache_dir / f"{name}.tmp").replace(args.cache_dir / f"{name}.bin")
    sizes = {"train": n_train, "val": n_tokens - n_train, "documents": len(order)}
    (args.cache_dir / "meta.json").write_text(json.dumps(sizes))
    for *_, path in jobs:
        path.unlink()
    print(f"{args.cache_dir}: {n_train:,} tokens to train, {n_tokens - n_train:,} to validate")
    return sizes


def load_data(args):
    """Return the ids of the training and of the validation tokens, as files mapped to memory."""
    folder = args.data_dir / args.dataset
    folder = folder if (folder / "train.bin").is_file() else args.cache_dir
    meta = folder / "meta.json"
    sizes = json.loads(meta.read_text()) if meta.is_file() else {}
    data = []
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        if not path.is_file():
            fail(
                f"no {name}.bin in {args.data_dir / args.dataset} or {args.cache_dir}: --prepare "
                "makes it from OpenWebText (25 GB to download, 100 GB of disk meanwhile, then 18), "
                "--prepare --corpus FILES from your text, python tests/standins.py DIR from none"
            )
        size = path.stat().st_size
        if size % 2 or size != 2 * sizes.get(name, size // 2):
            fail(f"{path} is damaged, it has {size:,} bytes: --prepare makes it again")
        if size < 4 * args.block_size:
            fail(
                f"{path}: {size // 2:,} tokens, but two of --block_size {args.block_size} must fit"
            )
        data.append(np.memmap(path, np.uint16, "r"))
        check_ids(args, data[-1][:1_000_000], path)
    return data


def check_ids(args, ids, name):
    """Leave with an error if a token is not in the vocabulary."""
    if ids.size and ids.max() >= args.vocab_size:
        fail(f"{name} holds token {ids.max()}, over --vocab_size {args.vocab_size}")


def minibatches(args, tokens, iter_num, device):
    """Yield this process's micro-batches x, y (B, T) for ever, from iteration iter_num on.

    Sequence p of the run is a function of (seed, p) alone: an epoch is a shuffled list of blocks,
    and all processes walk through it together. So no block comes twice in an epoch, however many
    they are, the data do not depend on their number, and the place to resume at is iter_num.
    """
    n_blocks = len(tokens) // args.block_size - 1  # one less: their borders shift every epoch
    p = iter_num * args.total_batch_tokens // args.block_size + args.rank * args.batch_size
    block = np.empty((args.batch_size, args.block_size + 1), dtype=np.int64)  # (B, T + 1)
    epoch = None
    while True:
        for row in range(args.batch_size):
            if (p + row) // n_blocks != epoch:
                epoch = (p + row) // n_blocks
                rng = np.random.default_rng([args.seed, epoch])
                first, order = rng.integers(args.block_size), rng.permutation(n_blocks)
            start = first + order[(p + row) % n_blocks] * args.block_size
            block[row] = tokens[start : start + args.block_size + 1]
        check_ids(args, block, "train.bin")
        yield to_device(block[:, :-1], device), to_device(block[:, 1:], device)
        p += args.world_size * args.batch_size


def to_device(ids, device):
    """Return a copy of numpy's ids on the device; on a GPU nobody waits for it."""
    ids = torch.tensor(ids)
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids


# ---------- model ----------


# B batch, T tokens, C n_embd, H n_head, D = C / H, V vocab_size


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

    def forward(self, x):  # GPT-2's GELU is the approximate one
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, 4C) inside


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


def flops_per_token(args):
    """Return the operations of forward and backward for a token (PaLM, appendix B)."""
    n_matrices = 12 * args.n_layer * args.n_embd**2 + args.vocab_size * args.n_embd
    return 6 * n_matrices + 12 * args.n_layer * args.n_embd * args.block_size


def turned(name, tensor):
    """Return a weight as the other side keeps it: the published GPT-2's matrices are transposed."""
    return tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


def load_hf(args):
    """Return the weights in the folder, or of the published GPT-2, that --init_from names.

    Its sizes become those of args.
    """
    folder = Path(args.init_from)
    try:
        from safetensors.torch import load_file  # only --init_from and --export_hf need it

        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            wanted = ["config.json", "*.safetensors"]
            folder = Path(snapshot_download(f"openai-community/{folder}", allow_patterns=wanted))
        config = json.loads((folder / "config.json").read_text())
        sizes = {k: config[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")}
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
    except Exception as error:  # the hub's own kinds, and every way a file can be damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"--init_from {args.init_from}: no whole GPT-2 there, no download of one ({reason})")
    n_positions = sizes.pop("n_positions")
    if args.block_size > n_positions:
        fail(f"--block_size {args.block_size} is over the {n_positions} of {args.init_from}")
    vars(args).update(sizes | {"bias": True})
    names = {name: name.removeprefix("transformer.") for name in tensors}
    skipped = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    weights = {k: turned(k, tensors[n]) for n, k in names.items() if not k.endswith(skipped)}
    return weights | {"lm_head.weight": weights["wte.weight"]}


def make_model(args):
    """Return the model before training: new, or with the weights that --init_from names."""
    if args.init_from in ("scratch", "resume"):
        return GPT(args, args.vocab_size)
    weights = load_hf(args)
    model = GPT(args, args.vocab_size)
    try:
        model.load_state_dict(weights)
    except (LookupError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        fail(f"--init_from {args.init_from} is no GPT-2 ({reason})")
    return model


def export_hf(args, weights):
    """Write --export_hf, a folder that transformers' GPT2LMHeadModel.from_pretrained loads."""
    if args.rank > 0:
        return
    from safetensors.torch import save_file

    args.export_hf.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    config |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    config |= {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config |= {"n_positions": args.block_size, "bos_token_id": 50256, "eos_token_id": 50256}
    (args.export_hf / "config.json").write_text(json.dumps(config, indent=2))
    del weights["lm_head.weight"]  # tied to wte there, too
    tensors = {f"transformer.{k}": turned(k, v.cpu()).contiguous() for k, v in weights.items()}
    for k, tensor in weights.items():
        if not args.bias and not k.startswith(("wte", "wpe")):  # biases everywhere there
            tensors[f"transformer.{k.removesuffix('weight')}bias"] = torch.zeros(len(tensor))
    save_file(tensors, args.export_hf / "model.safetensors", metadata={"format": "pt"})


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


def all_sum(values, device):
    """Return numbers summed over the processes, in float64. Waits for the device."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(args, model, ids, batch_loss, device):
    """Return the mean loss over all of ids (N,), each token once, whoever many processes share it.

    Windows of block_size lie side by side. What the last batch lacks is filled with -100, which
    F.cross_entropy does not count. The first token has nothing before it and is not counted.
    """
    model.eval()
    n = len(ids) - 1
    rows = args.batch_size * args.world_size
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, n, rows * args.block_size):
        block = np.full((args.batch_size, args.block_size + 1), -100)  # (B, T + 1)
        for row in range(args.batch_size):
            start = first + (args.rank * args.batch_size + row) * args.block_size
            piece = ids[start : start + args.block_size + 1]
            block[row, : len(piece)] = piece
        check_ids(args, block, "val.bin")
        x, y = to_device(block[:, :-1].clip(0), device), to_device(block[:, 1:], device)
        with autocast(args):
            total += batch_loss(x, y, reduction="sum")
    model.train()
    return all_sum([float(total)], device)[0] / n


@torch.no_grad()
def hellaswag(args, model, device):
    """Return the share of HellaSwag's questions whose true ending has the lowest mean loss."""
    model.eval()
    questions = [json.loads(line) for line in args.hellaswag.read_text("utf-8").splitlines()]
    n_right, bpe = 0, load_bpe()
    rounds = math.ceil(len(questions) / args.world_size)  # as many for every process
    for i in range(args.rank, rounds * args.world_size, args.world_size):
        question = questions[i % len(questions)]
        context = bpe.encode_ordinary(question["ctx"])
        endings = [bpe.encode_ordinary(" " + ending) for ending in question["endings"]]
        y = np.full((len(endings), len(context) + max(map(len, endings))), -100)
        x = y.copy()
        for row, ending in enumerate(endings):
            x[row, : len(context) + len(ending)] = context + ending
            y[row, len(context) : len(context) + len(ending)] = ending
        x, y = x[:, :-1].clip(0)[:, -args.block_size :], y[:, 1:][:, -args.block_size :]
        with autocast(args):
            logits = model(to_device(x, device)).float().mT  # (endings, V, T)
        losses = F.cross_entropy(logits, to_device(y, device), reduction="none")
        losses = losses.sum(1).cpu().numpy() / (y >= 0).sum(1)
        n_right += int(i < len(questions) and losses.argmin() == question["label"])
    model.train()
    return all_sum([n_right], device)[0] / len(questions)


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


def sample(args, model):
    """Return num_samples texts that begin with --prompt and that end with --stop, if it comes."""
    if args.max_new_tokens == 0 or load_bpe() is None:
        return f"(no sample: {NO_BPE})" if args.max_new_tokens else ""
    bpe = load_bpe()
    prompt = encode(args, args.prompt, "--prompt").to(args.device)
    stop = encode(args, args.stop, "--stop").to(args.device)
    cached = not isinstance(model, FSDPModule)  # it hands its blocks copies of the lists
    rows = generate(args, model, prompt.repeat(args.num_samples, 1), stop, cached).tolist()
    rows = [[i for i in row if i < bpe.n_vocab] for row in rows]  # --vocab_size may be padded
    texts = [bpe.decode(row) for row in rows]
    if args.stop:
        for i, row in enumerate(rows):
            written, found, _ = bpe.decode(row[len(prompt) :]).partition(args.stop)
            texts[i] = args.prompt + written + found
    return "\n---------------\n".join(texts)


# ---------- checkpoint ----------


def whole(value):
    """Return a state_dict with its shards put together, for the first process; all must call it."""
    if isinstance(value, dict):
        return {key: whole(v) for key, v in value.items()}
    if isinstance(value, DTensor):
        value = value.full_tensor()
        if value.dim():  # one after the other on the device; the first process keeps them
            value = value.cpu() if dist.get_rank() == 0 else None
    return value


def sharded_like(value, old):
    """Return the tensor value cropped and sharded as old, the one it is to replace."""
    if value.dim() and value.dim() == old.dim():
        value = value[: len(old)]  # a longer context's last positions are cropped
    if isinstance(old, DTensor) and value.shape == old.shape:
        value = distribute_tensor(value.to(old.device), old.device_mesh, old.placements)
    return value


def save_checkpoint(args, paths, parts, state, device):
    """Write the state_dict of every part, the plain values in `state` and all random generators.

    Written beside, forced to disk and renamed: whoever kills the run, or fills the disk, leaves
    the old file or the new one, whole. One process writes what all of them hold together.
    """
    checkpoint = {name: whole(part.state_dict()) for name, part in parts.items()}
    rng = [torch.get_rng_state()]
    if device.type == "cuda":
        rng.append(torch.cuda.get_rng_state())
    all_rng = [rng] * args.world_size
    if dist.is_initialized():
        dist.all_gather_object(all_rng, rng)
    checkpoint |= {"state": state, "rng": all_rng}
    for path in paths if args.rank == 0 else []:
        beside = path.with_suffix(".tmp")
        try:
            with open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            fail(f"{path} cannot be written, the one before is left as it was: {error}")
    if args.rank == 0 and args.keep:
        for path in sorted(args.out_dir.glob("iter_*.pt"))[: -args.keep]:
            path.unlink()


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


def load_checkpoint(args, path, parts):
    """Put a checkpoint back into the parts and the random generators; return its `state`.

    It may come from another number of processes, sharded or not.
    """
    checkpoint = read_checkpoint(path)
    for name, part in parts.items():
        try:
            saved = checkpoint[name]
            if isinstance(part, nn.Module):
                saved = {k: sharded_like(saved[k], old) for k, old in part.state_dict().items()}
            elif isinstance(part, torch.optim.Optimizer):
                params = [p for group in part.param_groups for p in group["params"]]
                for i, averages in saved["state"].items():
                    saved["state"][i] = {k: sharded_like(v, params[i]) for k, v in averages.items()}
            part.load_state_dict(saved)
        except (LookupError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            fail(f"{path} is of another shape ({name}: {reason})")
    if args.rank < len(checkpoint["rng"]):
        rng = checkpoint["rng"][args.rank]
        torch.set_rng_state(rng[0])
        if torch.cuda.is_available() and len(rng) > 1:
            torch.cuda.set_rng_state(rng[1])
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


def join_processes(backend):
    """Join the processes that torchrun started.

    The store in which they find each other survives a restart by torchrun, with the addresses of
    the dead in it. So the first process opens a store of its own; the others wait until its port
    answers.
    """
    rank, world_size, host = (os.environ[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    known, store = next(dist.rendezvous("env://"))[0], None
    if rank == "0":
        store = dist.TCPStore(host, 0, is_master=True)
        known.set("port", str(store.port))
    while store is None:
        port = int(known.get("port"))
        try:
            socket.create_connection((host, port)).close()
            store = dist.TCPStore(host, port)
        except ConnectionRefusedError:
            time.sleep(0.1)
    dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(world_size))


def keep_memory():
    """Let glibc keep what is freed.

    To get large tensors anew from the system, page by page, takes longer than to compute them.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large tensors come from the heap, too,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which never shrinks


def setup_device(args):
    """Return the device; join the other processes; settle dtype and compile."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is none; --device cpu goes on without")
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun started this process
        join_processes("nccl" if args.device == "cuda" else "gloo")
    args.rank = dist.get_rank() if dist.is_initialized() else 0
    args.world_size = dist.get_world_size() if dist.is_initialized() else 1
    if args.device == "cpu":
        keep_memory()
    cpu = torch.cpu.get_capabilities() if args.device == "cpu" else {}
    if not cpu.get("amx_bf16"):  # float32 products: TF32 on a GPU; on a CPU oneDNN's, still exact
        torch.set_float32_matmul_precision("medium")
    if args.dtype == "auto":
        fast = args.device == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        args.dtype = "bfloat16" if fast else "float32"
        if args.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            args.dtype = "float16"
    if args.parallel == "fsdp" and args.dtype == "float16":
        fail("--parallel fsdp does not scale the loss: --dtype bfloat16 or float32")
    if args.compile and not args.sample_only:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
        except Exception as error:  # no C++ compiler, no triton, ...
            args.compile = False
            print(f"going on without torch.compile: {str(error).strip().splitlines()[0]}")
    unit = args.batch_size * args.block_size * args.world_size
    if args.total_batch_tokens % unit:
        near = max(1, round(args.total_batch_tokens / unit)) * unit
        fail(
            f"--total_batch_tokens {args.total_batch_tokens} is no multiple of --batch_size "
            f"{args.batch_size} x --block_size {args.block_size} x {args.world_size} processes; "
            f"{near} is"
        )
    return device


def autocast(args):
    """Return the context in which matrix products run in --dtype; the weights stay float32."""
    dtype = getattr(torch, args.dtype)
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def parallelise(args, model, device):
    """Return the model to train with: wrapped, so that processes average their gradients.

    DDP keeps a copy of everything in every process. FSDP shards weights, gradients and averages,
    and puts one block together at a time.
    """
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


def average_gradients(runner, on):
    """Let the next backward average the gradients over processes, or only add up on each."""
    if isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(on)
    elif isinstance(runner, DistributedDataParallel):
        runner.require_backward_grad_sync = on  # must be set before the forward pass, too


# Dense bfloat16 TFLOP/s (V100, T4: float16) of NVIDIA's data sheets; the first that fits counts.
PEAK_TFLOPS = {"B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989}
PEAK_TFLOPS |= {"GH200": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125, "T4": 65}


def measure_speed(args, tokens, seconds, device):
    """Return tokens_per_second, mfu where the device's peak is known, and the memory used."""
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
    torch.manual_seed(args.seed)
    model = make_model(args)
    train_ids, val_ids = load_data(args)
    if args.max_new_tokens and load_bpe():
        for flag in ("prompt", "stop"):
            encode(args, getattr(args, flag), f"--{flag}")
    if args.hellaswag and not load_bpe():
        fail(f"--hellaswag: {NO_BPE}")
    n_params = sum(p.numel() for p in model.parameters())
    forward = parallelise(args, model, device)
    optimizers = make_optimizers(args, model)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    parts = {"model": model, **optimizers, "scaler": scaler}
    last, best = args.out_dir / "last.pt", args.out_dir / "best.pt"
    state = {"iter_num": 0, "seconds": 0.0, "losses": [], "val_loss": math.inf, "record": {}}

    def batch_loss(x, y, reduction="mean"):
        logits = forward(x).float()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)

    batch_loss = torch.compile(batch_loss, dynamic=False) if args.compile else batch_loss
    torch.manual_seed(args.seed + args.rank)  # every process drops out its own units
    # A job that torchrun or Slurm restarts goes on. torchrun counts restarts on each machine alone.
    restarts = [int(os.environ.get(f"{who}_RESTART_COUNT", 0)) for who in ("TORCHELASTIC", "SLURM")]
    if all_sum([sum(restarts)], device) != [0] and last.is_file():
        args.init_from = "resume"
    if args.init_from == "resume":
        state = load_checkpoint(args, last, parts)
    first, record, losses = state["iter_num"], state["record"], state["losses"]
    start -= state["seconds"]
    accumulation = args.total_batch_tokens // (args.batch_size * args.block_size * args.world_size)
    batches = minibatches(args, train_ids, first, device)
    x, y = next(batches)
    talks = args.rank == 0  # one process prints and writes for all
    if talks:
        start_run(args, device, first)
        sharing = f"{accumulation} micro-batches in {args.world_size} processes"
        print(f"{n_params:,} parameters, {sharing}, {args.device}, {args.dtype}")
    since, since_iter, speed, stopping = time.perf_counter(), first, {}, False

    iters = range(first, args.max_iters + 1)
    bar = tqdm(iters, total=iters.stop, initial=first, disable=None if talks else True)
    for iter_num in bar:
        done = iter_num == args.max_iters or args.eval_only
        evaluating = iter_num % args.eval_interval == 0 or done
        state |= {"iter_num": iter_num, "seconds": time.perf_counter() - start}
        if stopping:
            save_checkpoint(args, [last], parts, state, device)
            if talks:
                print(f"stopped at iteration {iter_num}: --init_from resume goes on from there")
            break
        if evaluating and (iter_num != record.get("iter") or args.eval_only):
            record = {"iter": iter_num, "seconds": 0.0, "learning_rate": schedule(args, iter_num)}
            if losses:
                record |= {"train_loss": sum(losses) / len(losses), **speed}
            record["val_loss"] = evaluate(args, model, val_ids, batch_loss, device)
            if args.hellaswag:
                record["hellaswag"] = hellaswag(args, model, device)
            record["seconds"] = time.perf_counter() - start
            text = sample(args, model)
            if talks:
                log_metrics(args, record)
                log_sample(args, record, text)
                plot_run(args.out_dir)
            paths = [best] * (record["val_loss"] < state["val_loss"]) + [last]
            paths += [args.out_dir / f"iter_{iter_num:08d}.pt"] * (args.keep > 0)
            state["record"] = record
            state["val_loss"] = min(record["val_loss"], state["val_loss"])
            if not args.eval_only:
                save_checkpoint(args, paths, parts, state, device)
            since, since_iter = time.perf_counter(), iter_num
        if done:
            break

        loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            average_gradients(forward, micro_step == accumulation - 1)
            with autocast(args):
                part = batch_loss(x, y) / accumulation
            x, y = next(batches)  # while the device is busy
            scaler.scale(part).backward()
            loss += part.detach()
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        length = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        length = whole(length).item()
        asked = stop is not None and stop.is_set()
        loss, stopping = all_sum([loss.item() / args.world_size, asked], device)
        if not math.isfinite(loss):
            fail(f"loss {loss} at iteration {iter_num}, --learning_rate {args.learning_rate}")
        if iter_num % args.log_interval == 0:
            bar.set_postfix(loss=f"{loss:.4f}", **{k: f"{v:.4g}" for k, v in speed.items()})
        learning_rate = schedule(args, iter_num)
        z = (loss - np.mean(losses)) / (np.std(losses) + 1e-9) if len(losses) == 100 else 0.0
        skip = z > args.skip_zscore > 0 or not math.isfinite(length)
        if skip and talks:
            tqdm.write(
                f"update {iter_num} skipped: loss {loss:.4f}, z {z:.1f}, gradient {length:.3g}"
            )
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if not skip:
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        losses[:] = [*losses[-99:], loss]
        tokens = (iter_num + 1 - since_iter) * args.total_batch_tokens
        speed = measure_speed(args, tokens, time.perf_counter() - since, device)
        if iter_num == first:  # which took the time to compile, too
            since, since_iter = time.perf_counter(), iter_num + 1

    if args.export_hf:
        export_hf(args, whole(model.state_dict()))
    if talks:
        if record:
            print(f"val_loss {record['val_loss']:.4f} after {record['seconds']:.0f} s")
        print(f"picture: {plot_run(args.out_dir)}")
    return record


def write_samples(args):
    """Print samples of the model in out_dir/best.pt, or of the one that --init_from names."""
    device = setup_device(args)
    model = make_model(args).to(device)
    if args.init_from in ("scratch", "resume"):
        load_checkpoint(args, args.out_dir / "best.pt", {"model": model})
    print(sample(args, model))


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


# The defaults by the device: GPT-2 124M, or a toy that a CPU can train.
DEFAULTS = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 16}
    | {"learning_rate": 2e-3, "min_lr": 2e-4, "warmup_iters": 50, "max_iters": 500}
    | {"total_batch_tokens": 4096, "eval_interval": 50, "compile": False, "vocab_size": 50257},
    "cuda": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 30}
    | {"learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 2000, "max_iters": 600_000}
    | {"total_batch_tokens": 491_520, "eval_interval": 1000, "compile": True}
    | {"vocab_size": 50304},  # GPUs multiply matrices faster by multiples of 64
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
    flag("--data_dir", type=Path, default=data_dir, help="holds openwebtext/{train,val}.bin")
    flag("--dataset", default="openwebtext", help="name of that folder")
    flag("--prepare", action="store_true", help="make train.bin and val.bin and leave")
    flag("--corpus", type=Path, nargs="+", default=[], help="prepare these jsonl, txt or parquet")
    flag("--val_fraction", type=number(float, 0, 0.5), default=0.0005, help="of prepared tokens")
    flag("--num_proc", type=number(int, 1), default=os.cpu_count(), help="processes that prepare")
    flag("--cache_dir", type=Path, help="what is prepared (default: cache/DATASET in data_dir)")
    flag("--batch_size", type=number(int, 1), help="sequences in a process's micro-batch")
    flag("--total_batch_tokens", type=number(int, 1), help="in an update, over all processes")
    flag = parser.add_argument_group("model").add_argument
    sources = "scratch, resume (out_dir/last.pt), gpt2, gpt2-medium, ... or a folder of one"
    flag("--init_from", default="scratch", help=sources)
    flag("--export_hf", type=Path, help="folder for the final model, as transformers reads it")
    flag("--vocab_size", type=number(int, 2, 65536), help="tokens in all, of them 50257 GPT-2's")
    flag("--block_size", type=number(int, 1), help="tokens that the model sees")
    flag("--n_layer", type=number(int, 1), help="blocks")
    flag("--n_head", type=number(int, 1), help="heads; divides n_embd")
    flag("--n_embd", type=number(int, 1), help="length of a token's vector")
    flag("--dropout", type=number(float, 0, 0.99), default=0.0, help="share of units dropped")
    switch = argparse.BooleanOptionalAction
    flag("--bias", action=switch, default=True, help="in linear layers and norms, as in GPT-2")
    flag("--sdpa", action=switch, default=True, help="torch's attention, not the one written out")
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", choices=("muon", "adamw"), default="adamw", help="adamw: nanoGPT's recipe")
    flag("--learning_rate", type=number(float, 1e-9), help="at its highest")
    flag("--min_lr", type=number(float, 0), help="at the end")
    flag("--warmup_iters", type=number(int, 0), help="iterations of rising rate")
    flag("--lr_decay_iters", type=number(int, 0), default=0, help="until min_lr; 0: max_iters")
    flag("--max_iters", type=number(int, 1), help="updates to train for")
    flag("--weight_decay", type=number(float, 0), default=0.1, help="pull of matrices to 0")
    flag("--beta1", type=number(float, 0, 1), default=0.9, help="memory of gradients")
    flag("--beta2", type=number(float, 0, 1), default=0.95, help="AdamW's memory of squared ones")
    flag("--grad_clip", type=number(float, 0), default=1.0, help="longest gradient; 0: any")
    flag("--skip_zscore", type=number(float, 0), default=6.0, help="skip higher losses; 0: none")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompt", default="\n", help="the samples' beginning, or FILE:name of a file with it")
    flag("--stop", default="<|endoftext|>", help="the samples' end")
    flag("--num_samples", type=number(int, 1), default=1, help="samples, written side by side")
    flag("--max_new_tokens", type=number(int, 0), default=100, help="tokens in a sample")
    flag("--temperature", type=number(float, 0), default=0.8, help="1: as guessed; 0: likeliest")
    flag("--top_k", type=number(int, 0), default=200, help="of the k likeliest only; 0: of all")
    flag("--sample_only", action="store_true", help="write samples of out_dir/best.pt and leave")
    flag = parser.add_argument_group("logging").add_argument
    flag("--eval_only", action="store_true", help="evaluate, sample and leave")
    flag("--eval_interval", type=number(int, 1), help="iterations between evaluations")
    flag("--log_interval", type=number(int, 1), default=10, help="iterations between bar updates")
    flag("--hellaswag", type=Path, help="its jsonl file, scored at every evaluation")
    flag("--keep", type=number(int, 0), default=0, help="checkpoints beside the last and the best")
    flag("--out_dir", type=Path, default=here / "out", help="everything the run writes")
    flag = parser.add_argument_group("system").add_argument
    flag("--seed", type=number(int, 0), default=1337, help="same seed, same run")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPU if any")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    flag("--dtype", choices=dtypes, default="auto", help="auto: fastest; float16 scales the loss")
    flag("--compile", action=switch, help="takes a while, then runs faster on a GPU")
    flag("--parallel", choices=("ddp", "fsdp"), default="ddp", help="fsdp: large models, adamw")
    flag("--peak_tflops", type=number(float, 0), default=0.0, help="for mfu; 0: by the device")
    args = parser.parse_known_args(argv)[0]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.set_defaults(**DEFAULTS[args.device])
    made = args.out_dir / "args.json"
    if (args.sample_only or args.init_from == "resume") and made.is_file():
        sizes = ("block_size", "n_layer", "n_head", "n_embd", "bias", "vocab_size")
        parser.set_defaults(**{k: v for k, v in json.loads(made.read_text()).items() if k in sizes})
    args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"device": args.device})
    args.cache_dir = args.cache_dir or args.data_dir / "cache" / args.dataset
    if args.prompt.startswith("FILE:"):
        try:
            args.prompt = Path(args.prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompt {args.prompt}: {error}")
    if not args.prompt:
        parser.error("--prompt is empty: the model goes on from at least one token")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.export_hf and importlib.util.find_spec("safetensors") is None:
        parser.error("--export_hf needs safetensors: pip install safetensors")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        if args.prepare:
            prepare(args)
        elif args.sample_only:
            write_samples(args)
        else:
            show_error(train)(args, catch_signals())  # torchrun repeats what failed first
    except KeyboardInterrupt:
        fail("interrupted", exit_code=130)
    except torch.OutOfMemoryError:
        fail(f"--batch_size {args.batch_size} does not fit into the GPU's memory")
    except OSError as error:
        fail(f"cannot write to --out_dir {args.out_dir} or the terminal: {error}")
    if dist.is_initialized():  # after a failure NCCL would wait here for the other processes
        dist.destroy_process_group()
