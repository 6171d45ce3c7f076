"""Losses of nanoGPT and of steps 16 and 17, update by update: nanogpt_parity.py --nanogpt DIR

Both get the same initial weights and the same minibatches, in float32 on the CPU, with AdamW,
warm-up, cosine decay and clipping; step 17 also accumulates gradients. nanoGPT's part is its
model.py, its configure_optimizers and its get_lr, in the loop of its train.py. One thing differs by
design: step 17 has the tanh approximation of GELU, as OpenAI's GPT-2, nanoGPT the exact function;
here nanoGPT gets step 17's.
"""

import argparse
import ast
import contextlib
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import standins
from steps import load_step
from table import row

MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 32, "bias": True}
RECIPE = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 10, "max_iters": 50}
RECIPE |= {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.5}


def ours(name, data_dir, *flags):
    """Train a step; return its initial weights, the minibatches of each update and the losses."""
    step, weights, batches = load_step(name), {}, []
    real_batches, make_optimizers = step.minibatches, step.make_optimizers

    def minibatches(*args):
        for x, y in real_batches(*args):
            batches.append((x.clone(), y.clone()))
            yield x, y

    def spy(args, model):
        weights.update({name: value.clone() for name, value in model.state_dict().items()})
        return make_optimizers(args, model)

    sizes = [f"--{key}={value}" for key, value in (MODEL | RECIPE).items() if key != "bias"]
    flags = [*sizes, "--bias", "--eval_interval=1", "--max_new_tokens=0", *flags]
    losses, all_sum = [], getattr(step, "all_sum", None)

    def summed(values, device):
        totals = all_sum(values, device)
        losses.extend(totals[:1] * (len(totals) == 4))  # the first of an update's is its loss
        return totals

    step.minibatches, step.make_optimizers = minibatches, spy
    step.evaluate, step.plot_run = lambda *args: 0.0, lambda *args: None
    if all_sum:  # step 17
        step.all_sum = summed
    silent = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as out_dir, silent:
        step.train(step.parse_args([*flags, "--data_dir", data_dir, "--out_dir", out_dir]))
        if not all_sum:  # step 16 records, at this interval, the loss of each update
            lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
            losses = [json.loads(line)["train_loss"] for line in lines[1:]]
    return weights, batches, losses


def nanogpt(folder, weights, batches, accumulation, vocab_size, gelu):
    """Train nanoGPT's model from the same weights on the same minibatches; return its losses."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    tree = ast.parse((folder / "train.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "get_lr"]
    scope = RECIPE | {"math": math, "lr_decay_iters": RECIPE["max_iters"]}
    exec(compile(tree, "train.py", "exec"), scope)
    model = GPT(GPTConfig(**MODEL, vocab_size=vocab_size, dropout=0.0))
    own = model.state_dict()
    for name in own:
        own[name] = weights[name.removeprefix("transformer.")]
    model.load_state_dict(own)
    for block in model.transformer.h:
        block.mlp.gelu = nn.GELU(gelu)
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    optimizer = model.configure_optimizers(RECIPE["weight_decay"], 0.0, betas, "cpu")
    losses, batches = [], iter(batches)
    for iter_num in range(RECIPE["max_iters"]):
        for group in optimizer.param_groups:
            group["lr"] = scope["get_lr"](iter_num)
        total = 0.0
        for _ in range(accumulation):
            loss = model(*next(batches))[1] / accumulation
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a copy of nanoGPT")
    args = parser.parse_args()
    common = "--device cpu --dtype float32 --optimizer adamw".split()
    with tempfile.TemporaryDirectory() as data:
        standins.main([data])
        folder = Path(data) / "random"
        folder.mkdir()
        for name, n in (("train", 100_000), ("val", 200)):
            ids = np.cumsum(np.random.default_rng(0).integers(1, 9, size=n)) % 512
            ids.astype(np.uint16).tofile(folder / f"{name}.bin")
        tokens = ["--dataset=random", "--vocab_size=512", "--batch_size=4", "--skip_zscore=0"]
        tokens += [f"--total_batch_tokens={4 * 4 * MODEL['block_size']}"]
        cases = {
            "16": (["--batch_size=8"], 1, "none"),
            "17": (tokens, 4, "tanh"),
        }
        for name, (flags, accumulation, gelu) in cases.items():
            weights, batches, mine = ours(name, data, *common, *flags)
            vocab_size = len(weights["wte.weight"])
            theirs = nanogpt(args.nanogpt, weights, batches, accumulation, vocab_size, gelu)
            print(f"step {name}\nupdate    ours       nanoGPT    difference")
            for i in range(0, len(mine), 7):
                print(f"{i:6} {mine[i]:10.6f} {theirs[i]:10.6f} {mine[i] - theirs[i]:12.1e}")
            differences = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
            print(f"largest difference of {len(mine)} updates: {max(differences):.1e} nats\n")
            row(f"step {name} as nanoGPT: loss of the last update", mine[-1], theirs[-1])


if __name__ == "__main__":
    main()
