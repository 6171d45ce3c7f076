"""Step 17's plan.py beside published runs, torch's own objects and brute force."""

import contextlib
import importlib
import io
import re
import sys

import pytest
import torch
from steps import folder_of, load_step, run_main

STEP = "17_gpt2_multigpu"
step = load_step(STEP)
SMALL = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --vocab_size 96".split()
SMALL += ["--total_batch_tokens", "512", "--gpus", "2"]


@contextlib.contextmanager
def imports_of_the_step():
    """Let plan.py import the train.py beside it."""
    sys.path.insert(0, str(folder_of(STEP)))
    sys.modules["train"] = step
    try:
        yield
    finally:
        sys.path.remove(str(folder_of(STEP)))
        sys.modules.pop("train")


with imports_of_the_step():
    script = importlib.import_module("plan")
sys.modules.pop("plan")


def plan(*flags):
    return script.plan(script.parse_args([str(flag) for flag in flags]))


def deviation(ours, published):
    return ours / published - 1


# ---------- published runs ----------
NANOGPT = "--tokens 294.912e9 --gpus 8 --gpu A100 --no-bias".split()  # 600,000 x 491,520 tokens


def test_nanogpts_run_takes_four_days():
    """nanoGPT, README: about 4 days on 8 A100; transformer_sizing.ipynb: 124,337,664 parameters,
    a checkpoint of 1,542,470,366 bytes, and 30% MFU assumed (one GPU was measured at 37%)."""
    found = plan(*NANOGPT, "--mfu", 0.3, "--vocab_size", 50257)
    assert found["parameters"] == 124_337_664
    assert found["updates"] == 600_000
    assert abs(deviation(found["hours"] / 24, 4)) < 0.03  # measured here: -2.7%
    # The published file is 3.4% larger: it holds more than parameters and averages.
    assert -0.04 < deviation(found["checkpoint"], 1_542_470_366) < -0.03


def test_llmc_trains_124m_in_90_minutes():
    """llm.c, scripts/run_gpt2_124M.sh: 18,865 updates of 524,288 tokens, about 300 ms each on 8
    A100, 94.3 minutes, about $20 at $14 per hour; discussion 481: up to about 60% MFU."""
    flags = ["--total_batch_tokens", 524_288, "--tokens", 18_865 * 524_288, "--batch_size", 64]
    found = plan(*flags, "--gpu", "A100", "--mfu", 0.6, "--price", 14 / 8)
    assert abs(deviation(found["update_seconds"], 0.3)) < 0.01  # -0.3%
    assert abs(deviation(60 * found["hours"], 94.3)) < 0.01  # -0.3%
    assert 0.05 < deviation(found["cost"], 20) < 0.12  # +10%: 94.3 minutes at $14 are $22


def test_llmc_trains_1558m_in_a_day():
    """llm.c, scripts/run_gpt2_1558M.sh: 32,000 updates of 1,048,576 tokens on 8 H100, 2.80 s each,
    about 24 hours, about $672 at $28 per hour. The MFU is what 2.80 s imply, 48.6%."""
    flags = ["--model", "gpt2-xl", "--total_batch_tokens", 1_048_576, "--batch_size", 16]
    found = plan(*flags, "--tokens", 32_000 * 1_048_576, "--mfu", 0.486, "--price", 28 / 8)
    assert abs(deviation(found["parameters"], 1558e6)) < 0.001
    assert abs(deviation(found["update_seconds"], 2.8)) < 0.01
    assert 0.02 < deviation(found["hours"], 24) < 0.05  # +4%: 32,000 times 2.8 s are 24.9 hours
    assert 0.02 < deviation(found["cost"], 672) < 0.05


@pytest.mark.parametrize(
    "tokens, published",
    [(294.912e9, 2.85), (18_865 * 524_288, 3.28)],  # nanoGPT; llm.c's run, by modded-nanogpt
)
def test_predicted_losses_are_six_to_nine_percent_below_the_published(tokens, published):
    """They are of OpenWebText and FineWeb in GPT-2's tokens, the law of other text and tokens."""
    found = plan("--tokens", tokens)["loss"]
    for loss in found.values():  # -7.2 and -5.7%; -8.4 and -8.1%
        assert -0.09 < deviation(loss, published) < -0.05


def test_chinchilla_has_twenty_tokens_per_parameter():
    """Besiroglu et al. 2024: their fit agrees with Chinchilla's 20 at 5.76e23 FLOPs."""
    n_params, tokens = script.compute_optimal(script.CHINCHILLA["Besiroglu et al. 2024"], 5.76e23)
    assert 6 * n_params * tokens == pytest.approx(5.76e23)
    assert 15 < tokens / n_params < 25


# ---------- the same by other means ----------
@pytest.mark.parametrize("fit", script.CHINCHILLA.values(), ids=script.CHINCHILLA)
def test_the_optimal_plan_has_the_lowest_loss(fit):
    best = script.predict_loss(fit, *script.compute_optimal(fit, 1e21))
    sizes = torch.logspace(7, 12, 1001, dtype=torch.float64)
    losses = script.predict_loss(fit, sizes, 1e21 / 6 / sizes)
    assert best <= losses.min()
    assert best == pytest.approx(losses.min().item(), abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_is_that_of_the_tensors(optimizer):
    args = script.parse_args([*SMALL, "--optimizer", optimizer])
    memory = script.plan(args)["memory"]
    made = step.parse_args(["--device", "cpu", "--optimizer", optimizer])
    model = step.GPT(args, args.vocab_size)
    optimizers = step.make_optimizers(made, model).values()
    model(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
    for each in optimizers:
        each.step()
    params = list(model.parameters())
    states = [v for each in optimizers for p in each.state.values() for v in p.values()]
    states = [v for v in states if isinstance(v, torch.Tensor) and v.dim()]  # not the step counts
    for part, tensors in (
        ("parameters", params),
        ("gradients", [p.grad for p in params]),
        ("optimizer states", states),
    ):
        assert memory["ddp"][part] == sum(tensor.nbytes for tensor in tensors)
    for part in ("parameters", "optimizer states"):
        assert memory["fsdp"][part] == memory["ddp"][part] / 2


def test_activations_are_what_backward_keeps():
    flags = "--n_layer 1 --n_embd 128 --block_size 64 --batch_size 1 --vocab_size 512".split()
    args = script.parse_args([*SMALL, *flags])
    model, x, kept = step.GPT(args, args.vocab_size), torch.zeros(1, 64, dtype=torch.long), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        step.CrossEntropy.apply(logits.flatten(0, 1), x.flatten())
    storages = [tensor.untyped_storage() for tensor in kept]  # q, k and v share one
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for p in model.parameters():
        sizes.pop(p.untyped_storage().data_ptr(), None)
    memory = script.plan(args)["memory"]["ddp"]
    planned = memory["parameters in 16 bits"] + memory["activations"] + memory["logits"]
    assert -0.01 < deviation(planned, sum(sizes.values())) < 0  # without statistics of layer norms


def test_recomputing_keeps_the_input_of_every_block():
    args = script.parse_args([*SMALL, "--n_layer", "5", "--n_embd", "128", "--recompute"])
    made, kept = step.parse_args(["--device", "cpu", "--recompute", "--dtype", "bfloat16"]), []
    model = step.GPT(args, args.vocab_size)
    forward = step.parallelize(made, model, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            forward(torch.zeros(4, 16, dtype=torch.long))
    kept = [tensor for tensor in kept if tensor.numel() == 4 * 16 * 128]
    saved = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values())
    again = (36 - 4) * 4 * 16 * 128  # what is computed again in one block, without its input
    assert script.plan(args)["memory"]["ddp"]["activations"] == saved + again


def test_bytes_sent_are_those_of_a_ring():
    one, two, many = (plan(*SMALL, "--gpus", n)["sent"] for n in (1, 2, 8))
    n_params = plan(*SMALL)["parameters"]
    assert one == {"ddp": 0, "fsdp": 0}
    assert two["ddp"] == 4 * n_params  # of float32: half is sent to the other, half comes back
    assert many["ddp"] == 2 * 4 * n_params * 7 / 8


def test_fsdp_gathers_blocks_twice_per_micro_batch_and_holds_two():
    flags = [*SMALL, "--total_batch_tokens", 3 * 4 * 16 * 2, "--network", 2, "--disk", 4]
    found = plan(*flags)
    args = script.parse_args([str(flag) for flag in flags])
    weights = dict(step.GPT(args, args.vocab_size).named_parameters())
    sizes = {name: p.numel() for name, p in weights.items()}
    rest = sum(n for name, n in sizes.items() if not name.startswith("h."))
    blocks = sum(sizes.values()) - rest
    assert found["micro_batches"] == 3
    gathered = 3 * 2 * (rest + blocks + blocks)  # in 16 bits; from the other GPU comes a half
    assert found["sent"]["fsdp"] == (gathered + 4 * sum(sizes.values())) / 2
    assert found["sent_seconds"]["fsdp"] == found["sent"]["fsdp"] / 2e9
    assert found["checkpoint_seconds"] == found["checkpoint"] / 4e9
    assert found["memory"]["fsdp"]["parameters in 16 bits"] == 2 * (rest + 2 * blocks / 2)


def test_fsdp_keeps_shards_unless_it_accumulates():
    tokens = 4 * 16 * 2
    whole, shards = (plan(*SMALL, "--total_batch_tokens", n * tokens)["memory"] for n in (2, 1))
    assert whole["fsdp"]["gradients"] == whole["ddp"]["gradients"]
    assert shards["fsdp"]["gradients"] == shards["ddp"]["gradients"] / 2


@pytest.mark.parametrize("model", script.MODELS)
def test_every_head_of_gpt2_has_64_numbers(model):
    args = script.parse_args(["--model", model])
    assert args.n_embd == 64 * args.n_head


def test_the_table_shows_the_numbers():
    """Every row of it, read back, against the plan."""
    flags = ["--model", "gpt2-xl", "--mfu", 0.5, "--price", 3, "--network", 50, "--disk", 2]
    with contextlib.redirect_stdout(io.StringIO()) as text, imports_of_the_step():
        assert run_main(STEP, *flags, script="plan.py") == (0, "")
    found = plan(*flags)
    assert found["hours"] == pytest.approx(found["flops"] / (8 * 989e12 * 0.5) / 3600)
    memory, sent, seconds = found["memory"], found["sent"], found["sent_seconds"]
    tokens, n_params, best = 300e9, found["parameters"], found["optimal"]
    law = script.CHINCHILLA
    expected = [
        ("parameters", [n_params]),
        ("tokens", [tokens]),
        ("tokens per parameter", [tokens / n_params]),
        ("FLOPs", [found["flops"]]),
        ("updates", [tokens / 491_520]),
        ("micro-batches per update", [found["micro_batches"]]),
        ("hours at 50% MFU", [found["hours"]]),
        ("tokens per second", [tokens / found["hours"] / 3600]),
        ("seconds per update", [found["hours"] * 3600 / (tokens / 491_520)]),
        ("cost at $3 per GPU and hour", [found["hours"] * 8 * 3]),
        ("checkpoint", [found["checkpoint"] / 1e9]),
        ("written at 2 GB/s in", [found["checkpoint"] / 2e9]),
        *((part, [memory[key][part] / 2**30 for key in memory]) for part in memory["ddp"]),
        ("memory in all", [sum(parts.values()) / 2**30 for parts in memory.values()]),
        ("sent per update", [n / 1e9 for n in sent.values()]),
        ("seconds at 50 GB/s", [n / 50e9 for n in sent.values()]),
        (
            "the same, share of an update",
            [100 * s / found["update_seconds"] for s in seconds.values()],
        ),
        ("loss, nats per token", [*found["loss"].values()]),
        ("best for these FLOPs: parameters", [n for n, _ in best.values()]),
        ("tokens", [n for _, n in best.values()]),
        ("loss", [script.predict_loss(law[who], *best[who]) for who in best]),
    ]
    lines = text.getvalue().splitlines()
    headings = ("GPT with", "per GPU", "(it overlaps", "predicted by")
    rows = [line for line in lines if line and not line.startswith(headings)]
    rows = [(line[:32].strip(), re.findall(r"\d[\d.,e+]*", line[32:])) for line in rows]
    rows = [(name, [float(cell.replace(",", "")) for cell in cells]) for name, cells in rows]
    assert [name for name, _ in rows] == [name for name, _ in expected]
    for (name, cells), (_, values) in zip(rows, expected):
        assert cells == pytest.approx(values, rel=0.02), name
    sizes = "48 layers of 1600, 1024 tokens of context, on 8 GPUs of 989 TFLOP/s"
    assert lines[0] == f"GPT with {sizes}"
    for words in ("per GPU DDP FSDP", f"predicted by the fit of {' '.join(law)}"):
        assert words in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize(
    "flags, word", [(["--n_head", 5], "--n_embd"), (["--total_batch_tokens", 1000], "--batch_size")]
)
def test_flags_that_do_not_fit(flags, word):
    with imports_of_the_step():
        code, errors = run_main(STEP, *flags, script="plan.py")
    assert code == 2
    assert word in errors
    assert errors.count("\n") == 1
