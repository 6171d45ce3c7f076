"""Plan a training run on paper: python plan.py [--model gpt2-xl --tokens 33.6e9 --gpus 8 ...]

Prints what train.py would need: FLOPs, hours and cost, memory per GPU with DDP and with FSDP, the
bytes that the GPUs exchange, checkpoints, and the loss that scaling laws predict. --mfu, --price,
--network and --disk are assumptions: measure them in a short run. Memory is that of eager mode.
Source:  Hoffmann et al. 2022, "Training compute-optimal large language models" (Chinchilla);
         Besiroglu et al. 2024, "Chinchilla scaling: a replication attempt"; Korthikanti et al.
         2022, "Reducing activation recomputation" (memory); Thakur et al. 2005 (ring all-reduce).
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse

import torch
from train import GPT, PEAK_TFLOPS, count_micro_batches, flops_per_token, number

MODELS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
# loss = E + A / parameters^alpha + B / tokens^beta, in nats per token of DeepMind's own text and
# vocabulary of 32,000: on another text the loss differs, while comparisons of two plans hold.
CHINCHILLA = {  # E, A, alpha, B, beta
    "Hoffmann et al. 2022": (1.6934, 406.4, 0.3392, 410.7, 0.2849),  # unrounded, as in their TeX
    "Besiroglu et al. 2024": (1.8172, 482.01, 0.3478, 2085.43, 0.3658),
}


def predict_loss(fit, n_params, tokens):
    """Return the loss that a fit of Chinchilla's law (approach 3) predicts, in nats per token."""
    E, A, alpha, B, beta = fit
    return E + A / n_params**alpha + B / tokens**beta


def compute_optimal(fit, flops):
    """Return the number of parameters and of tokens with the lowest loss for 6 N D = flops."""
    _, A, alpha, B, beta = fit
    n_params = (alpha * A / (beta * B) * (flops / 6) ** beta) ** (1 / (alpha + beta))
    return n_params, flops / 6 / n_params


def memory_by_part(args, sizes, parallel):
    """Return {part: bytes} on one GPU, when the backward pass begins, with "ddp" or "fsdp".

    sizes: how many parameters there are, in one block, in products of matrices, updated by Muon.
    They are float32, and matrices are multiplied in bfloat16, or float16.
    """
    n_params, block, matrices, muon = sizes
    shards = args.gpus if parallel == "fsdp" else 1
    memory = {"parameters": 4 * n_params / shards}
    if parallel == "ddp":  # autocast casts every matrix once per forward pass
        memory["parameters in 16 bits"] = 2 * matrices
    else:  # those outside the blocks stay gathered; of the blocks, the next one is fetched early
        memory["parameters in 16 bits"] = 2 * (n_params - args.n_layer * block + 2 * block)
    # Between the micro-batches of an update, FSDP, too, accumulates whole gradients.
    memory["gradients"] = 4 * n_params / (shards if args.micro_batches == 1 else 1)
    # AdamW keeps two averages, Muon one.
    memory["optimizer states"] = (8 * n_params - 4 * muon) / shards
    # Kept for the backward pass, in bytes per token and n_embd: the float32 inputs of two layer
    # norms (8) and, in 16 bits, their outputs (4), q, k and v (6), what attention returns (2) and
    # the hidden layer before and after GELU (16); at the end, one layer norm (6). FlashAttention
    # keeps no T x T matrix.
    tokens = args.batch_size * args.block_size
    kept = 36 * args.n_layer + 6
    if args.recompute:  # the inputs of all blocks, and all of the block that is computed again
        kept = 4 * (args.n_layer - 1) + 36 + 6
    memory["activations"] = kept * tokens * args.n_embd
    memory["logits"] = 2 * tokens * args.vocab_size  # in 16 bits; their gradient takes their place
    return memory


def plan(args):
    """Return the numbers of a plan, a dict: bytes, seconds, hours, dollars, nats per token."""
    with torch.device("meta"):  # shapes without memory
        model = GPT(args, args.vocab_size)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    del matrices["wpe.weight"]  # it is only added
    hidden = sum(n for name, n in matrices.items() if name.startswith("h."))
    n_params, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.h[0]))
    sizes = n_params, block, sum(matrices.values()), hidden if args.optimizer == "muon" else 0
    flops = flops_per_token(args) * args.tokens
    flops_per_second = args.gpus * args.peak_tflops * 1e12 * args.mfu
    update_seconds = flops_per_token(args) * args.total_batch_tokens / flops_per_second
    hours = flops / flops_per_second / 3600
    memory = {key: memory_by_part(args, sizes, key) for key in ("ddp", "fsdp")}
    # In a ring, every GPU sends and receives (W - 1) / W of the data for an all-gather or for a
    # reduce-scatter; an all-reduce is both. DDP all-reduces float32 gradients once per update.
    ring = (args.gpus - 1) / args.gpus
    # FSDP gathers the blocks in 16 bits for the forward and again for the backward pass of every
    # micro-batch, the rest once, and reduce-scatters the gradients once per update.
    gathered = 2 * (n_params + args.n_layer * block) * args.micro_batches
    sent = {"ddp": 2 * ring * 4 * n_params, "fsdp": ring * (gathered + 4 * n_params)}
    checkpoint = 4 * n_params + memory["ddp"]["optimizer states"]
    return {
        "parameters": n_params,
        "flops": flops,
        "updates": args.tokens / args.total_batch_tokens,
        "micro_batches": args.micro_batches,
        "tokens_per_second": args.tokens / hours / 3600,
        "update_seconds": update_seconds,
        "hours": hours,
        "cost": hours * args.gpus * args.price,
        "memory": memory,
        "sent": sent,
        "sent_seconds": {key: n / (args.network * 1e9) for key, n in sent.items()},
        "checkpoint": checkpoint,
        "checkpoint_seconds": checkpoint / (args.disk * 1e9),
        "loss": {who: predict_loss(fit, n_params, args.tokens) for who, fit in CHINCHILLA.items()},
        "optimal": {who: compute_optimal(fit, flops) for who, fit in CHINCHILLA.items()},
    }


def print_plan(args, found):
    """Print the numbers of plan as a table."""

    def row(name, *values):
        print(f"{name:32s}" + "".join(f"{value:>22s}" for value in values))

    sizes = f"{args.n_layer} layers of {args.n_embd}, {args.block_size} tokens of context"
    print(f"GPT with {sizes}, on {args.gpus} GPUs of {args.peak_tflops:g} TFLOP/s\n")
    row("parameters", f"{found['parameters']:,}")
    row("tokens", f"{args.tokens:,.0f}")
    row("tokens per parameter", f"{args.tokens / found['parameters']:,.1f}")
    row("FLOPs", f"{found['flops']:.3g}")
    row("updates", f"{found['updates']:,.0f}")
    row("micro-batches per update", f"{found['micro_batches']}")
    row(f"hours at {args.mfu:.0%} MFU", f"{found['hours']:,.1f}")
    row("tokens per second", f"{found['tokens_per_second']:,.0f}")
    row("seconds per update", f"{found['update_seconds']:.3g}")
    row(f"cost at ${args.price:g} per GPU and hour", f"${found['cost']:,.0f}")
    row("checkpoint", f"{found['checkpoint'] / 1e9:.2f} GB")
    row(f"written at {args.disk:g} GB/s in", f"{found['checkpoint_seconds']:.1f} s")
    print(f"\n{'per GPU':32s}{'DDP':>22s}{'FSDP':>22s}")
    memory = found["memory"]
    for part in memory["ddp"]:
        row(part, *(f"{memory[key][part] / 2**30:.2f} GiB" for key in memory))
    row("memory in all", *(f"{sum(memory[key].values()) / 2**30:.2f} GiB" for key in memory))
    row("sent per update", *(f"{n / 1e9:.2f} GB" for n in found["sent"].values()))
    row(f"seconds at {args.network:g} GB/s", *(f"{s:.3g}" for s in found["sent_seconds"].values()))
    shares = (s / found["update_seconds"] for s in found["sent_seconds"].values())
    row("the same, share of an update", *(f"{share:.1%}" for share in shares))
    print("(it overlaps with the computation: with DDP, with the last backward pass)")
    print(f"\n{'predicted by the fit of':32s}" + "".join(f"{who:>22s}" for who in CHINCHILLA))
    row("loss, nats per token", *(f"{loss:.3f}" for loss in found["loss"].values()))
    best = found["optimal"]
    row("best for these FLOPs: parameters", *(f"{n:.3g}" for n, _ in best.values()))
    row("tokens", *(f"{tokens:.3g}" for _, tokens in best.values()))
    row("loss", *(f"{predict_loss(CHINCHILLA[who], *best[who]):.3f}" for who in best))


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=MODELS, default="gpt2", help="a published size")
    flag("--n_layer", type=number(int, 1), help="number of blocks; None: that of --model")
    flag("--n_head", type=number(int, 1), help="attention heads; None: that of --model")
    flag("--n_embd", type=number(int, 1), help="size of an embedding; None: that of --model")
    flag("--vocab_size", type=number(int, 2), default=50304, help="as in train.py")
    flag("--block_size", type=number(int, 1), default=1024, help="tokens of context")
    flag("--bias", action=argparse.BooleanOptionalAction, default=True, help="as in GPT-2")
    flag = parser.add_argument_group("training").add_argument
    flag("--tokens", type=number(float, 1, 1e18), default=300e9, help="to train on, with repeats")
    flag("--batch_size", type=number(int, 1), default=30, help="sequences per micro-batch and GPU")
    flag("--total_batch_tokens", type=number(int, 1), default=491_520, help="tokens per update")
    flag("--optimizer", choices=("muon", "adamw"), default="adamw", help="as in train.py")
    flag("--recompute", action="store_true", help="as in train.py; it lowers the MFU")
    flag = parser.add_argument_group("hardware").add_argument
    flag("--gpus", type=number(int, 1), default=8, help="in all machines together")
    flag("--gpu", choices=PEAK_TFLOPS, default="H100", help="gives the peak")
    flag("--peak_tflops", type=number(float, 1e-9), help="None: dense, in 16 bits, of --gpu")
    flag("--mfu", type=number(float, 1e-6, 1), default=0.4, help="model FLOPs utilization")
    flag("--price", type=number(float, 0), default=2.5, help="dollars per GPU and hour")
    help_text = "GB/s that a GPU sends: NVLink 300-450, a 400 Gbit/s network card 50"
    flag("--network", type=number(float, 1e-6), default=300, help=help_text)
    flag("--disk", type=number(float, 1e-6), default=1.0, help="GB/s of a checkpoint")
    args = parser.parse_args(argv)
    for name, size in MODELS[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    args.peak_tflops = args.peak_tflops or PEAK_TFLOPS[args.gpu]
    args.dropout, args.world_size = 0.0, args.gpus
    args.micro_batches = count_micro_batches(args)
    return args


if __name__ == "__main__":
    try:
        args = parse_args()
        print_plan(args, plan(args))
    except argparse.ArgumentTypeError as error:
        print(f"plan.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
