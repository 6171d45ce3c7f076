"""Step 17: data that any number of processes share, exact resume, and Hugging Face's weights."""

import argparse
import contextlib
import errno
import functools
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from steps import folder_of, load_step, run_main
from torch.utils._python_dispatch import TorchDispatchMode

STEP = "17_gpt2_multigpu"
step = load_step(STEP)


@contextlib.contextmanager
def imports_of_the_step():
    """Let the scripts of this step import its train.py and each other."""
    own = ("train", "sample")
    sys.path.insert(0, str(folder_of(STEP)))
    try:
        for name in own:
            sys.modules.pop(name, None)
        sys.modules["train"] = step
        yield
    finally:
        sys.path.remove(str(folder_of(STEP)))
        for name in own:
            sys.modules.pop(name, None)


@functools.cache
def load_script(name):
    """Import prepare.py, sample.py, ... as a module."""
    with imports_of_the_step():
        sys.modules.pop(name, None)
        module = importlib.import_module(name)
        sys.modules.pop(name)
    return module


def run_script(name, *flags):
    """Run a script as a program, as run_main does: (exit code, stderr)."""
    with imports_of_the_step():
        return run_main(STEP, *flags, script=f"{name}.py")


CPU = ["--device", "cpu", "--dtype", "float32"]
SMALL = (
    "--vocab_size 300 --n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2"
    " --total_batch_tokens 128 --max_iters 6 --eval_interval 3 --warmup_iters 2 --max_new_tokens 0"
    " --device cpu --dtype float32 --learning_rate 1e-2"
).split()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing would take much of the time; test_smoke.py has the pictures."""
    monkeypatch.setattr(step, "plot_run", lambda out_dir: out_dir / "loss.png")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder whose openwebtext/ holds 4,000 and 500 tokens of a small vocabulary."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "openwebtext").mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 4000), ("val", 500)):
        ids = np.cumsum(rng.integers(1, 4, size=n)) % 300
        ids.astype(np.uint16).tofile(folder / "openwebtext" / f"{name}.bin")
    return folder


def parse(*flags):
    args = step.parse_args([*SMALL, *map(str, flags)])
    args.rank, args.world_size = 0, 1
    return args


def run(data, out_dir, *flags):
    return step.train(parse("--data_dir", data, "--out_dir", out_dir, *flags))


def command(data, out_dir, *flags, processes=1, restarts=0):
    """Return the command line of a run, under torchrun if there is more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun += [f"--max-restarts={restarts}"]
    script = [str(folder_of(STEP) / "train.py"), *SMALL, "--data_dir", str(data)]
    script += ["--out_dir", str(out_dir), *map(str, flags)]
    return [sys.executable, *(torchrun if processes > 1 or restarts else []), *script]


def spawn(*args, **more):
    """Run two processes with the variables that torchrun sets, without waiting for torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    jobs = [subprocess.Popen(command(*args), env=env | rank, **pipes) for rank in ranks]
    outputs = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    return ["".join(texts) for texts in zip(*outputs)]


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out_dir, name="last.pt"):
    found = torch.load(out_dir / name, weights_only=True)
    for times in (found["state"], found["state"]["record"]):
        for key in ("seconds", "tokens_per_second", "memory_gib", "log_sizes"):
            times.pop(key, None)
    return found


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def losses_of(out_dir):
    return [[r.get("train_loss", 0), r["val_loss"]] for r in records(out_dir)]


# ---------- data ----------


def blocks_seen(n, world_size, n_tokens=1000, start=0, **sizes):
    """Return the first tokens of the next n sequences of a run on the tokens 0, 1, 2, ..."""
    args = parse("--total_batch_tokens", 16 * 2 * world_size, "--vocab_size", 65536)
    vars(args).update(sizes)
    args.world_size, loaders = world_size, []
    for args.rank in range(world_size):
        mine = type(args)(**vars(args))
        tokens = np.arange(n_tokens, dtype=np.uint16)
        loaders.append(step.minibatches(mine, tokens, start, torch.device("cpu")))
    seen = []
    while len(seen) < n:
        for loader in loaders:
            x, y = next(loader)
            assert x.shape == y.shape == (2, 16)
            assert torch.equal(y, x + 1)
            assert torch.equal(x, x[:, :1] + torch.arange(16))
            seen += x[:, 0].tolist()
    return seen[:n]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_block_comes_twice_in_an_epoch(world_size):
    n_blocks = 1000 // 16 - 1
    seen = blocks_seen(5 * n_blocks, world_size)
    epochs = [seen[i * n_blocks : (i + 1) * n_blocks] for i in range(5)]
    for epoch in epochs:
        assert len(set(epoch)) == n_blocks
        assert len({first % 16 for first in epoch}) == 1
        assert max(epoch) + 16 < 1000
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert len({epoch[0] % 16 for epoch in epochs}) > 1  # the borders shift


def test_the_data_do_not_depend_on_the_number_of_processes():
    assert blocks_seen(150, 1) == blocks_seen(150, 2) == blocks_seen(150, 3)


def test_the_place_in_the_data_is_the_iteration():
    assert blocks_seen(200, 2)[4 * 30 :] == blocks_seen(80, 2, start=30)


def test_another_seed_another_order():
    assert blocks_seen(50, 1) != blocks_seen(50, 1, seed=1)


def test_every_token_is_checked_before_it_is_used():
    args, tokens = parse("--vocab_size", 980), np.arange(1000, dtype=np.uint16)
    with pytest.raises(argparse.ArgumentTypeError, match=r"vocab_size 980: train\.bin has token 9"):
        for _ in zip(range(200), step.minibatches(args, tokens, 0, torch.device("cpu"))):
            pass
    model = step.make_model(args)
    with pytest.raises(argparse.ArgumentTypeError, match=r"vocab_size 980: val\.bin has token 9"):
        step.evaluate(args, model, tokens, lambda x, y, reduction: 0, torch.device("cpu"))


def test_nanogpts_files_are_read_as_they_are(small_data):
    train, val = step.load_data(parse("--data_dir", small_data))
    assert (len(train), len(val)) == (4000, 500)
    expected = np.fromfile(small_data / "openwebtext" / "val.bin", dtype=np.uint16)
    assert np.array_equal(val, expected)
    assert isinstance(val, np.memmap)  # a file may be larger than the memory


def test_the_smallest_sizes_that_fit_the_data(small_data):
    with_all = ["--data_dir", small_data, "--vocab_size", 300, "--block_size", 250]
    assert len(step.load_data(parse(*with_all))) == 2
    for flags in (("--vocab_size", 299), ("--block_size", 251)):
        with pytest.raises(argparse.ArgumentTypeError, match=" ".join(map(str, flags))):
            step.load_data(parse(*with_all, *flags))


def test_the_prompt_may_hold_the_end_of_a_text_but_no_token_beyond_the_vocabulary(bytes_as_bpe):
    ids = step.encode(parse(), "ab<|endoftext|>c", "--prompt")
    assert ids.tolist() == [97, 98, 256, 99]
    with pytest.raises(argparse.ArgumentTypeError, match="--vocab_size 98: --prompt has token 98"):
        step.encode(parse("--vocab_size", 98), "ab", "--prompt")
    assert step.encode(parse("--vocab_size", 99), "ab", "--prompt").dtype == torch.int64


def test_the_encoding_is_loaded_once(bytes_as_bpe, monkeypatch):
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or bytes_as_bpe)
    assert step.load_bpe() is step.load_bpe() is bytes_as_bpe
    assert asked == ["gpt2"]


def shard(path, ids):
    """Write tokens as llm.c does (256 numbers, then the tokens) or as build-nanogpt does (.npy)."""
    if path.suffix == ".npy":
        np.save(path, ids.astype(np.uint16))
    else:
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(ids)
        path.write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_fineweb_shards_are_the_tokens_of_one_file(suffix, small_data, tmp_path):
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    train, val = (
        np.fromfile(small_data / f"openwebtext/{n}.bin", np.uint16) for n in ("train", "val")
    )
    cuts = np.split(train, [1, 777, 778, 3000])
    for i, ids in reversed(list(enumerate(cuts))):
        shard(folder / f"fineweb_train_{i + 1:06d}.{suffix}", ids)
    shard(folder / f"fineweb_val_000000.{suffix}", val)
    found, found_val = step.load_data(parse("--data_dir", tmp_path))
    assert np.array_equal(found_val, val)
    assert len(found) == len(train)
    assert all(isinstance(part, np.memmap) for part in [found_val, *found.parts])
    for window in (slice(0, 4000), slice(0, 1), slice(770, 780), slice(2990, 9999), slice(5, 5)):
        assert np.array_equal(found[window], train[window])
    a = run(small_data, tmp_path / "a")
    b = run(tmp_path, tmp_path / "b")
    assert a["val_loss"] == b["val_loss"] and a["train_loss"] == b["train_loss"]


def test_a_damaged_shard_is_named(small_data, tmp_path):
    (tmp_path / "openwebtext").mkdir()
    for name in ("train", "val"):
        shard(tmp_path / "openwebtext" / f"fineweb_{name}_000000.bin", np.arange(200))
    path = tmp_path / "openwebtext" / "fineweb_val_000000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")  # after the number of tokens that the header says
    assert np.array_equal(step.load_data(parse("--data_dir", tmp_path))[1], np.arange(200))
    path.write_bytes(whole[:-2])
    assert_one_line(bad(tmp_path, tmp_path / "out"), path, "damaged")
    path.write_bytes(whole)
    meta = tmp_path / "openwebtext" / "meta.json"
    meta.write_text("{")
    assert_one_line(bad(tmp_path, tmp_path / "out"), meta, "damaged; delete it")
    assert not (tmp_path / "out").exists()


def prepare_flags(tmp_path, *flags):
    known = ["--data_dir", tmp_path, "--cache_dir", tmp_path / "made", "--num_proc", 1]
    return [str(flag) for flag in [*known, *flags]]


def prepare(tmp_path, *flags):
    script = load_script("prepare")
    script.prepare(script.parse_args(prepare_flags(tmp_path, *flags)))
    return [np.fromfile(tmp_path / "made" / f"{n}.bin", dtype=np.uint16) for n in ("train", "val")]


def write_corpus(tmp_path, kind="jsonl", n=60):
    texts = [f"document {i} says {i * i}." for i in range(n)]
    path = tmp_path / f"corpus.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts))
        return ["\n".join(texts)], path
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        import datasets

        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return texts, path


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_prepare_keeps_every_document_once(kind, tmp_path, bytes_as_bpe):
    texts, path = write_corpus(tmp_path, kind)
    train, val = prepare(tmp_path, "--corpus", path, "--val_fraction", 0.1)
    tokens = np.concatenate([train, val])
    found = bytes_as_bpe.decode(tokens.tolist()).split("<|endoftext|>")
    assert found.pop() == ""
    assert sorted(found) == sorted(texts)
    assert len(val) == len(tokens) // 10
    if kind == "jsonl":
        assert found != texts
        shutil.rmtree(tmp_path / "made")
        again = np.concatenate(prepare(tmp_path, "--corpus", path, "--val_fraction", 0.2))
        assert np.array_equal(tokens, again)
        shutil.rmtree(tmp_path / "made")
        other = np.concatenate(prepare(tmp_path, "--corpus", path, "--seed", 1))
        assert not np.array_equal(tokens, other)


def test_prepare_says_what_it_made(tmp_path, bytes_as_bpe, monkeypatch, capsys):
    texts, path = write_corpus(tmp_path)
    script, bars = load_script("prepare"), []

    class Bar(script.tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options | {"disable": False})
            bars.append(self)

    monkeypatch.setattr(script, "tqdm", Bar)
    flags = prepare_flags(tmp_path, "--corpus", path, "--val_fraction", 0.1, "--dataset", "mine")
    sizes = script.prepare(script.parse_args(flags))
    made = tmp_path / "made"
    found = {name: (made / f"{name}.bin").stat().st_size // 2 for name in ("train", "val")}
    assert found.items() <= sizes.items() and sizes["documents"] == len(texts)
    assert found["train"] + found["val"] == sum(len(text) + 1 for text in texts)
    assert json.loads((made / "meta.json").read_text()) == sizes
    said = capsys.readouterr().out.splitlines()
    numbers = f"{found['train']:,} training and {found['val']:,} validation tokens"
    assert said == [f"{made}: {numbers}", "python train.py --dataset mine trains on them"]
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(60, 60, "doc")]
    assert (made / "datasets").is_dir()  # not in the home directory
    assert script.prepare(script.parse_args(flags)) == sizes
    assert capsys.readouterr().out == f"{made} has these tokens already\n"


def test_every_kind_of_text_column_is_read(tmp_path, bytes_as_bpe):
    import datasets

    path = tmp_path / "corpus[1].jsonl"  # no pattern
    path.write_text('{"text": "a", "id": 1}\n{"text": null, "id": 2}\n')
    tokens = np.concatenate(prepare(tmp_path, "--corpus", path))
    assert sorted(tokens.tolist()) == [97, 256, 256]
    shutil.rmtree(tmp_path / "made")
    column = datasets.Features({"text": datasets.Value("large_string")})
    datasets.Dataset.from_dict({"text": ["b"]}, column).to_parquet(tmp_path / "large.parquet")
    tokens = np.concatenate(prepare(tmp_path, "--corpus", tmp_path / "large.parquet"))
    assert tokens.tolist() == [98, 256]


def test_tokens_are_those_of_a_corpus_and_its_settings(tmp_path, bytes_as_bpe, monkeypatch):
    """Any of them changed, what is there already is another corpus; a lock comes before all."""
    _, path = write_corpus(tmp_path)
    prepare(tmp_path, "--corpus", path)
    time_ns, other = path.stat().st_mtime_ns, tmp_path / "other.jsonl"
    same = [path.read_text(), (time_ns, time_ns)]
    variants = [
        (other, *same, []),
        (path, same[0] + "\n", same[1], []),
        (path, same[0], (1, 1), []),
    ]
    variants += [(path, *same, ["--seed", 1]), (path, *same, ["--val_fraction", 0.1])]
    for file, text, times, flags in variants:
        file.write_text(text)
        os.utime(file, ns=times)
        with pytest.raises(OSError, match="another corpus"):
            prepare(tmp_path, "--corpus", file, *flags)
    os.utime(path, ns=same[1])
    prepare(tmp_path, "--corpus", path)

    def locked(folder):
        raise OSError(f"{folder} is locked")

    monkeypatch.setattr(load_script("prepare"), "lock_folder", locked)
    with pytest.raises(OSError, match="made is locked"):
        prepare(tmp_path, "--corpus", path)


def test_prepared_tokens_are_not_replaced(tmp_path, bytes_as_bpe):
    _, path = write_corpus(tmp_path)
    prepare(tmp_path, "--corpus", path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "made").glob("*.*")}
    prepare(tmp_path, "--corpus", path)  # says that they are there already
    assert not list((tmp_path / "made").glob("chunks*"))
    path.write_text(path.read_text() * 2)
    for more in (["--corpus", path], ["--corpus", path, "--seed", 1]):
        assert_one_line(run_script("prepare", *prepare_flags(tmp_path, *more)), "--dataset")
    assert {file: file.stat().st_mtime_ns for file in files} == files
    args = load_script("prepare").parse_args(["--corpus", str(path), "--data_dir", "data"])
    assert args.cache_dir == Path("data/cache/corpus")  # not openwebtext's


def test_prepare_goes_on_where_it_was(tmp_path, bytes_as_bpe, monkeypatch):
    texts, path = write_corpus(tmp_path, n=25_000)
    tokens = np.concatenate(prepare(tmp_path, "--corpus", path))
    assert len(tokens) == sum(len(text) + 1 for text in texts)  # in three chunks
    assert (tokens == 256).sum() == len(texts)
    whole, script = (tmp_path / "made/train.bin").read_bytes(), load_script("prepare")
    for name in ("train.bin", "meta.json"):
        (tmp_path / "made" / name).unlink()

    def fall(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "memmap", fall)  # killed when the chunks are there
        prepare(tmp_path, "--corpus", path)
    chunks = sorted((tmp_path / "made").glob("chunks-*/*.bin"))
    assert len(chunks) == 3
    chunks[0].unlink()
    times = [chunk.stat().st_mtime_ns for chunk in chunks[1:]]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "memmap", fall)
        prepare(tmp_path, "--corpus", path)
    assert times == [chunk.stat().st_mtime_ns for chunk in chunks[1:]]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "write_file", fall)  # killed before meta.json is there
        patch.setattr(script.multiprocessing, "get_context", lambda method: Processes)
        prepare(tmp_path, "--corpus", path, "--num_proc", 2)
    assert (tmp_path / "made/train.bin").read_bytes() == whole
    prepare(tmp_path, "--corpus", path)
    assert (tmp_path / "made/train.bin").read_bytes() == whole
    (tmp_path / "made/meta.json").unlink()
    with pytest.raises(OSError, match="another corpus"):
        prepare(tmp_path, "--corpus", path)


class Processes:
    """Stands for multiprocessing's Pool: the jobs are finished in another order."""

    Pool = staticmethod(lambda n: Processes() if n == 2 else 1 / 0)
    close = staticmethod(lambda: None)

    @staticmethod
    def imap_unordered(function, jobs):
        return [function(job) for job in reversed(jobs)]


def test_prepared_text_is_trained_on(tmp_path, bytes_as_bpe, capsys):
    _, path = write_corpus(tmp_path, n=300)
    prepare(tmp_path, "--corpus", path, "--val_fraction", 0.1)
    flags = ["--cache_dir", tmp_path / "made", "--max_iters", 40, "--eval_interval", 20]
    run(tmp_path, tmp_path / "out", *flags, "--max_new_tokens", 5, "--prompt", "document")
    val = [r["val_loss"] for r in records(tmp_path / "out")]
    assert val[0] == pytest.approx(math.log(300), rel=0.02)
    assert val[2] < val[1] < val[0] - 1
    assert (tmp_path / "out/samples.txt").read_text().count("document") == 3
    question = {"ctx": "document 1", "endings": [" says", "zz"], "label": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    flags = [tmp_path / "questions.jsonl", "--out_dir", tmp_path / "out", *CPU]
    assert load_script("hellaswag").main([str(flag) for flag in flags]) == 1
    said = capsys.readouterr().out
    assert said.endswith("\nHellaSwag accuracy 100.00% on 1 questions\n")


def test_prepared_text_comes_before_a_finished_data_set(small_data, tmp_path, bytes_as_bpe):
    _, path = write_corpus(tmp_path, n=300)
    train, _ = prepare(tmp_path, "--corpus", path, "--val_fraction", 0.1)
    args = parse("--data_dir", small_data, "--cache_dir", tmp_path / "made")
    assert np.array_equal(step.load_data(args)[0], train)


# ---------- model ----------


def test_gpt2_has_its_124439808_parameters():
    with torch.device("meta"):
        sizes = "--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024".split()
        model = step.GPT(step.parse_args(sizes), 50257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def other_weights(model):
    """Make all weights large and different, so that mistakes show."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def test_weights_from_hugging_face_give_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 99}
    theirs = other_weights(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    theirs.save_pretrained(tmp_path)
    args = parse("--init_from", tmp_path, "--block_size", 24)
    mine = step.make_model(args).eval()
    x = torch.randint(99, (2, 24))
    assert torch.allclose(mine(x), theirs(x).logits, atol=1e-4)
    assert (args.n_layer, args.n_embd, args.vocab_size) == (3, 32, 99)
    args = parse("--init_from", tmp_path, "--block_size", 10)  # cropped
    assert torch.allclose(
        step.make_model(args).eval()(x[:, :10]), theirs(x[:, :10]).logits, atol=1e-4
    )


def test_published_data_and_weights_are_pinned(tmp_path, bytes_as_bpe, monkeypatch):
    """A commit names them: what is downloaded tomorrow is what was downloaded today."""
    asked = []

    def download(repo, revision, allow_patterns):
        assert allow_patterns == ["config.json", "*.safetensors"]  # of several formats
        asked.append((repo, revision))
        return tmp_path / "nowhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        with pytest.raises(OSError, match=f"--init_from {name}"):
            step.make_model(parse("--init_from", name))
        assert asked[-1][0] == f"openai-community/{name}"
    assert all(len(bytes.fromhex(revision)) == 20 for _, revision in asked)
    assert len(set(asked)) == 4

    def load_dataset(kind, data_files, **_):
        asked.extend(data_files)
        raise OSError("no network")

    asked.clear()
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"--corpus hf://.*'text' \(no network\)"):
        prepare(tmp_path)
    start = r"hf://datasets/Skylion007/openwebtext@[0-9a-f]{40}/plain_text/train-000"
    assert len(asked) == 80
    assert all(re.fullmatch(start + rf"{i:02d}-of-00080\.parquet", x) for i, x in enumerate(asked))


def test_files_as_openai_published_them_are_read(tmp_path):
    """Their tensors' names have no prefix, and among them are the causal masks."""
    torch_files = pytest.importorskip("safetensors.torch")
    args = parse()
    mine = other_weights(step.make_model(args))
    load_script("export_hf").export_hf(args, mine, tmp_path)
    tensors = torch_files.load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): v for name, v in tensors.items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    first = {name: v for name, v in tensors.items() if name.startswith("h.0.")}
    rest = {name: v for name, v in tensors.items() if name not in first}
    (tmp_path / "model.safetensors").unlink()
    for i, part in enumerate((first, rest)):
        torch_files.save_file(part, tmp_path / f"model-{i}.safetensors")
    args = parse("--init_from", tmp_path, "--no-bias", "--n_layer", 7, "--n_head", 1)
    again = step.make_model(args)
    assert_equal(dict(again.state_dict()), dict(mine.state_dict()))
    assert again.lm_head.weight is again.wte.weight
    assert (args.n_layer, args.n_head, args.bias) == (2, 2, True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 3}))
    with pytest.raises(OSError, match="3 heads do not divide 16"):
        step.make_model(parse("--init_from", tmp_path))


def test_attention_weights_are_dropped_out_in_training_only(monkeypatch):
    real, rates = F.scaled_dot_product_attention, []

    def sdpa(q, k, v, dropout_p=0.0, is_causal=False):
        rates.append(dropout_p)
        return real(q, k, v, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    model = step.make_model(parse("--dropout", 0.5))
    x = torch.randint(300, (2, 16))
    model(x), model.eval()(x)
    assert rates == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("bias", ["--bias", "--no-bias"])
def test_exported_weights_give_transformers_the_same_logits(bias, tmp_path):
    transformers = pytest.importorskip("transformers")
    args = parse(bias)
    mine = other_weights(step.make_model(args))
    folder = tmp_path / "new" / "hf"
    for _ in range(2):  # made, and there already
        load_script("export_hf").export_hf(args, mine, folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 16}
    config |= {"activation_function": "gelu_new", "layer_norm_epsilon": mine.ln_f.eps}
    config |= {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300}
    config |= {"bos_token_id": 50256, "eos_token_id": 50256}  # <|endoftext|>
    assert json.loads((folder / "config.json").read_text()) == config
    x = torch.randint(300, (2, 16))
    assert torch.allclose(mine(x), theirs(x).logits, atol=1e-4)
    again = step.make_model(parse("--init_from", folder))
    assert torch.equal(mine(x), again.eval()(x))


def test_a_run_is_exported_and_the_export_scores_the_same(small_data, tmp_path, capsys):
    run(small_data, tmp_path / "a")
    best = min(r["val_loss"] for r in records(tmp_path / "a"))
    code, errors = run_script("export_hf", tmp_path / "hf", "--out_dir", tmp_path / "a", *CPU)
    assert code == 0, errors
    flags = ["--init_from", tmp_path / "hf", "--eval_only"]
    capsys.readouterr()
    found = run(small_data, tmp_path / "b", *flags)
    assert found == {"iter": 0, "val_loss": pytest.approx(best)}
    assert capsys.readouterr().out == f"val_loss {best:.4f}\n\n"  # and no sample
    again = run(small_data, tmp_path / "a", "--init_from", "resume", "--eval_only")
    assert again == {"iter": 6, "val_loss": records(tmp_path / "a")[-1]["val_loss"]}
    assert not (tmp_path / "b").exists()  # --eval_only writes nothing


def test_sample_takes_the_sizes_from_the_checkpoint(small_data, tmp_path, bytes_as_bpe, capsys):
    run(small_data, tmp_path)
    capsys.readouterr()
    (tmp_path / "prompt.txt").write_text("Good night", encoding="utf-8")
    flags = ["--out_dir", tmp_path, "--max_new_tokens", 3, *CPU]
    flags += ["--prompt", f"FILE:{tmp_path / 'prompt.txt'}"]
    assert run_script("sample", *flags) == (0, "")
    assert capsys.readouterr().out.startswith("Good night")
    best = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    args = parse("--prompt", "Good night", "--max_new_tokens", 3)
    model = step.make_model(args)
    model.load_state_dict(best)
    for source in ("scratch", "resume"):
        assert run_script("sample", *flags, "--init_from", source) == (0, "")
        assert capsys.readouterr().out == step.sample(args, model) + "\n"
    load_script("export_hf").export_hf(args, model, tmp_path / "hf")
    assert run_script("sample", *flags, "--init_from", tmp_path / "hf", "--block_size", 16)[0] == 0
    assert capsys.readouterr().out == step.sample(args, model) + "\n"
    (tmp_path / "prompt.txt").write_text("")
    assert_one_line(run_script("sample", *flags), f"FILE:{tmp_path / 'prompt.txt'} is empty")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks_is_torchs_cross_entropy(dtype):
    torch.manual_seed(0)
    values, targets = (
        (5 * torch.randn(150, 40)).to(dtype),
        torch.randint(40, (150,)),
    )  # 64 + 64 + 22
    targets[[3, 70, 149]] = -100  # do not count
    expected, logits = (values.clone().requires_grad_() for _ in range(2))
    loss = F.cross_entropy(expected.float(), targets, reduction="sum")
    found = step.CrossEntropy.apply(logits * 1, targets)
    torch.testing.assert_close(found, loss)
    (loss * 0.3).backward()
    (found * 0.3).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(logits.grad, expected.grad, **tolerance)


def test_loss_in_chunks_makes_no_other_tensor_of_the_logits_size():
    made = []  # number of elements and memory of each tensor

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), options=None):
            out = operation(*given, **(options or {}))
            if isinstance(out, torch.Tensor):
                made.append((out.numel(), out.untyped_storage().data_ptr()))
            return out

    logits, targets = torch.randn(1000, 50, requires_grad=True) * 1, torch.randint(50, (1000,))
    with Record():
        (grad,) = torch.autograd.grad(step.CrossEntropy.apply(logits, targets), logits)
    assert grad.data_ptr() == logits.data_ptr()  # the gradient is where the logits were
    assert max(n for n, memory in made if memory != logits.data_ptr()) == 64 * 50


# ---------- evaluation ----------


@pytest.mark.parametrize("n", [17, 33, 40, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_counts_every_token_once(n, batch_size):
    args = parse("--batch_size", batch_size, "--dropout", 0.5)
    model = other_weights(step.make_model(args))
    ids = np.random.default_rng(0).integers(300, size=n).astype(np.uint16)

    def batch_loss(x, y, reduction):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction=reduction)

    model.register_forward_hook(lambda *given: graphs.append(given[2].grad_fn))
    losses, graphs = [], []
    for i in range(n - 1):
        x = torch.from_numpy(ids[None, i // 16 * 16 : i + 1].astype(np.int64))
        losses.append(F.cross_entropy(model(x)[0, -1], torch.tensor(int(ids[i + 1]))).item())
    model.train()  # evaluation drops nothing out
    graphs.clear()
    for n_processes in (1, 3):  # they share the tokens, and their sums are added up
        found = 0
        for rank in range(n_processes):
            args.rank, args.world_size = rank, n_processes
            found += step.evaluate(args, model, ids, batch_loss, torch.device("cpu"))
            assert model.training
        assert found == pytest.approx(sum(losses) / (n - 1), rel=1e-5)
    assert set(graphs) == {None}  # nothing is kept for a backward pass


def test_sums_are_exact():
    values = [2**24 + 1, True, torch.tensor(0.5, dtype=torch.float16), 1e-9]
    assert step.all_sum(values, torch.device("cpu")) == [2**24 + 1, 1, 0.5, 1e-9]


def test_hellaswag_prefers_the_likelier_ending(bytes_as_bpe, monkeypatch):
    class Successor(torch.nn.Module):
        """Expects every byte to be followed by the next one."""

        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return 9.0 * F.one_hot((x + 1) % 300, 300)

    long = {"ctx": "abc", "endings": ["abcdefgh", "!", "zz", "qq"], "label": 0}  # the mean decides
    short = {"ctx": "zxzx", "endings": ["abab", "!", "zz", "qq"], "label": 1}  # the ending alone
    wrong = {"ctx": "abc", "endings": ["ddd", "d", "qq", '!"#$%&'], "label": 0}
    questions = [long, wrong, short, wrong]
    args, script = parse("--block_size", 64), load_script("hellaswag")
    score = functools.partial(script.evaluate_hellaswag, args, Successor())
    assert score(questions, torch.device("cpu")) == 0.5
    real, shown = script.tqdm, []
    monkeypatch.setattr(script, "tqdm", lambda x, disable: shown.append(disable) or real(x))
    args.world_size = 2  # the second of two processes has the two wrong ones
    for args.rank, expected in ((0, 0.5), (1, 0)):
        assert score(questions, torch.device("cpu")) == expected
    assert shown == [None, True]  # None: on a terminal


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_hellaswag_in_batches_scores_each_ending_alone(batch_size, bytes_as_bpe):
    args = parse("--block_size", 24, "--batch_size", batch_size)
    torch.manual_seed(3)
    model = step.GPT(args, args.vocab_size)
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    model.eval()
    words, questions = "the quick brown fox jumps over lazy dogs".split(), []
    for i in range(7):
        context = " ".join(words[i % 3 :][: 1 + i])  # from 3 characters to more than fit
        question = {"ctx": context, "endings": [words[(i + j) % 8] * (1 + j % 2) for j in range(4)]}
        losses = []
        for ending in question["endings"]:
            ids = torch.tensor([[*f"{context} {ending}".encode()]])[:, -25:]
            each = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")[0]
            losses.append(each[-len(ending) - 1 :].mean().item())
        questions.append(question | {"label": losses.index(min(losses))})
    score, shapes = functools.partial(load_script("hellaswag").evaluate_hellaswag, args, model), []
    hook = model.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    assert score(questions, torch.device("cpu")) == 1
    hook.remove()
    n = max(1, batch_size // 4)  # questions per forward pass
    assert [rows for rows, _ in shapes] == [4 * len(questions[i : i + n]) for i in range(0, 7, n)]
    assert [t for _, t in shapes] == sorted(t for _, t in shapes)  # alike ones: less padding
    questions[4]["label"] = (questions[4]["label"] + 1) % 4
    assert score(questions, torch.device("cpu")) == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    "content",
    [
        *("", "no json", '{"ctx": "a"}', "[]", '{"ctx": "", "label": 0}'),
        *(
            '{"ctx": 3, "endings": ["b"], "label": 0}',
            '{"ctx": "a", "endings": ["b"], "label": -1}',
            '{"ctx": "a", "endings": ["b"], "label": 1}',
            '{"ctx": "a", "endings": ["b", ""], "label": 0}',
            '{"ctx": "a", "endings": ["b", 3], "label": 0}',
            '{"ctx": "", "endings": ["b"], "label": 0}',
        ),
    ],
)
def test_questions_that_cannot_be_used(content, tmp_path, bytes_as_bpe):
    (tmp_path / "h.jsonl").write_text(content)
    assert_one_line(run_script("hellaswag", tmp_path / "h.jsonl"), tmp_path / "h.jsonl")
    assert_one_line(run_script("hellaswag", tmp_path / "absent"), tmp_path / "absent")
    assert_one_line(run_script("hellaswag"), "usage", "hellaswag.py FILE")
    assert_one_line(run_script("hellaswag", "--device", "cpu"), "usage", "hellaswag.py FILE")


def test_a_prompt_that_cannot_be_encoded_costs_no_training(tmp_path, bytes_as_bpe, monkeypatch):
    (tmp_path / "openwebtext").mkdir()
    for name in ("train", "val"):
        np.arange(90, dtype=np.uint16).tofile(tmp_path / f"openwebtext/{name}.bin")
    flags = ["--vocab_size", 90, "--max_iters", 1, "--prompt", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="--prompt has token 97"):
        run(tmp_path, tmp_path / "out", *flags, "--max_new_tokens", 1)
    assert not (tmp_path / "out").exists()
    run(tmp_path, tmp_path / "out", *flags)  # without samples it does not matter
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)  # no network
    step.load_bpe.cache_clear()
    run(tmp_path, tmp_path / "out", *flags, "--max_new_tokens", 1, "--overwrite")
    assert (tmp_path / "out/samples.txt").read_text().count(f"(no sample: {step.NO_BPE})") == 2


def test_sampling_does_not_disturb_training(small_data, tmp_path, bytes_as_bpe):
    a = run(small_data, tmp_path / "a", "--dropout", 0.2)
    b = run(small_data, tmp_path / "b", "--dropout", 0.2, "--max_new_tokens", 9)
    assert a["val_loss"] == b["val_loss"]


def test_operations_of_a_token():
    """Two per weight of a matrix and for each of q k and the weighted v; twice that backward."""
    args = step.parse_args("--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024".split())
    with torch.device("meta"):
        weights = dict(step.GPT(args, args.vocab_size).named_parameters())
    del weights["wpe.weight"]  # it is only added
    n_weights = sum(p.numel() for p in weights.values() if p.ndim == 2)
    attention = 2 * 2 * 12 * 768 * 1024
    assert step.flops_per_token(args) == 3 * (2 * n_weights + attention)


def test_mfu_is_the_share_of_the_peak_and_else_unknown(small_data, tmp_path):
    args = parse("--peak_tflops", 0.5)
    speed = step.measure_speed(args, 3000, 2.0, torch.device("cpu"))
    assert speed["tokens_per_second"] == 1500
    assert speed["mfu"] == pytest.approx(1500 * step.flops_per_token(args) / 0.5e12)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert speed["memory_gib"] == pytest.approx(kib / 2**20, rel=0.05)
    args.world_size = 2  # the tokens of both, the FLOP/s of each
    both = step.measure_speed(args, 3000, 2.0, torch.device("cpu"))
    assert (both["tokens_per_second"], both["mfu"]) == (1500, speed["mfu"] / 2)
    assert "mfu" not in step.measure_speed(parse(), 3000, 2.0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_the_devices(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    args = parse("--dtype", "bfloat16")
    args.device = "cuda"
    speed = step.measure_speed(args, 3000, 2.0, torch.device("cuda"))
    flops = 1500 * step.flops_per_token(args)
    assert speed.get("mfu") == (tflops and pytest.approx(flops / (tflops * 1e12)))
    assert speed["memory_gib"] == 3
    args.dtype = "float32"  # has another peak
    assert "mfu" not in step.measure_speed(args, 3000, 2.0, torch.device("cuda"))
    args.peak_tflops = 50
    speed = step.measure_speed(args, 3000, 2.0, torch.device("cuda"))
    assert speed["mfu"] == pytest.approx(flops / 50e12)


# ---------- training ----------


@pytest.mark.parametrize("native", [True, False])
def test_each_process_has_its_own_gpu_and_the_fastest_dtype(native, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    memory = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    for rank in (None, "3"):
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        args = step.parse_args([])
        assert step.setup_device(args) == torch.device("cuda", int(rank or 0)) == chosen[-1]
        assert args.dtype == ("bfloat16" if native else "float16")  # T4 and V100 emulate bfloat16
        assert (args.rank, args.world_size) == (0, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")  # the fifth would have no GPU
    with pytest.raises(argparse.ArgumentTypeError, match="--nproc_per_node"):
        step.setup_device(args)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    args = step.parse_args([])
    assert step.setup_device(args) == torch.device("cpu")
    assert (args.device, args.dtype) == ("cpu", dtype)
    with warnings.catch_warnings(action="error"), step.autocast(args):
        assert torch.is_autocast_enabled("cpu") == (dtype == "bfloat16")


def test_the_defaults_are_nanogpts_recipe_and_a_small_one_for_a_cpu():
    names = "n_layer n_head n_embd block_size max_iters warmup_iters learning_rate min_lr"
    names += " total_batch_tokens eval_interval batch_size vocab_size compile"
    sizes = {"cuda": (12, 12, 768, 1024, 600_000, 2000, 6e-4, 6e-5, 491_520, 1000)}
    sizes["cpu"] = 4, 4, 128, 128, 500, 50, 2e-3, 2e-4, 4096, 50, 16, 50257, False
    for device, expected in sizes.items():
        args = step.parse_args(["--device", device])
        assert tuple(getattr(args, name) for name in names.split()[: len(expected)]) == expected
        assert (args.beta1, args.beta2, args.weight_decay, args.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert step.parse_args(["--device", "cuda"]).compile
    assert step.SAVE_SECONDS == 15 * 60


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_is_the_recipe(dtype, small_data, tmp_path):
    """Accumulate, clip, update: the same weights as by the loop written out here."""
    flags = ["--data_dir", small_data, "--dropout", 0.3, "--grad_clip", 0.1, "--dtype", dtype]
    args = parse(*flags, "--out_dir", tmp_path, "--warmup_iters", 3, "--max_iters", 8)
    step.train(args)
    torch.manual_seed(args.seed)
    model = step.make_model(args)
    first = {name: p.clone() for name, p in model.state_dict().items()}
    groups = [[p for p in model.parameters() if (p.ndim < 2) == vector] for vector in (0, 1)]
    groups = [{"params": group, "weight_decay": w} for group, w in zip(groups, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    batches = step.minibatches(args, step.load_data(args)[0], 0, torch.device("cpu"))
    for i in range(8):
        torch.manual_seed(args.seed * 1_000_003 + i)
        for _ in range(4):
            x, y = next(batches)
            with step.autocast(args):
                logits = model(x)
            (F.cross_entropy(logits.float().flatten(0, 1), y.flatten()) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        cosine = (1 + math.cos(math.pi * max(0, i - 3) / 5)) / 2
        for group in optimizer.param_groups:
            group["lr"] = min((i + 1) / 4, 1) * (2e-4 + (1e-2 - 2e-4) * cosine)
        optimizer.step()
        optimizer.zero_grad()
    trained = checkpoint(tmp_path)["model"]
    for name, p in model.state_dict().items():
        wrong, way = (trained[name] - p).abs().mean(), (p - first[name]).abs().mean()
        if dtype == "float32":
            assert wrong < 1e-4 * way, name
        elif p.ndim == 2:  # rounding changes signs of the smallest gradients, and of Adam's updates
            assert wrong < 0.1 * way, name


def test_a_run_leaves_the_settings_of_the_process_alone(small_data, tmp_path):
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    run(small_data, tmp_path)
    assert before == (torch.get_float32_matmul_precision(), torch.get_num_threads())


def test_accumulation_changes_nothing(small_data, tmp_path):
    run(small_data, tmp_path / "a", "--batch_size", 8)
    run(small_data, tmp_path / "b", "--batch_size", 1)
    assert np.allclose(losses_of(tmp_path / "a"), losses_of(tmp_path / "b"), atol=1e-5)


THREADS_AT_EXIT = """
import atexit, pathlib, sys
names = lambda: [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: print(*names(), file=sys.stderr))
"""


@pytest.mark.parametrize(
    "flags", [("--optimizer", "adamw"), ("--parallel", "fsdp", "--optimizer", "muon")]
)
def test_two_processes_are_one_with_twice_the_accumulation(flags, small_data, tmp_path):
    run(small_data, tmp_path / "one", *flags[-2:])
    # Each process writes down which threads of its process group are still there when Python exits.
    (tmp_path / "sitecustomize.py").write_text(THREADS_AT_EXIT)
    stdout, stderr = spawn(small_data, tmp_path / "two", *flags, PYTHONPATH=str(tmp_path))
    assert "pt_gloo_runloop" not in stderr  # they would abort the process now and then
    assert np.allclose(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), atol=1e-5)
    assert stdout.count("iter 6") == 1  # one of them speaks
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    # Muon orthogonalizes in bfloat16: rounding alone moves single weights by more than AdamW's.
    most = max((one["model"][name] - two["model"][name]).abs().max() for name in one["model"])
    assert most < (1e-4 if "adamw" in flags else 5e-3)
    # What two sharded processes wrote, one reads.
    again = ["--init_from", "resume", "--max_iters", 7, *flags[-2:]]
    assert run(small_data, tmp_path / "two", *again)["iter"] == 7


def test_fsdp_shards_every_block_and_the_rest_in_mixed_precision(monkeypatch):
    calls = []
    monkeypatch.setattr(step.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(step, "init_device_mesh", lambda *given: given)
    monkeypatch.setattr(step, "fully_shard", lambda net, **given: calls.append((net, given)) or net)
    args = parse("--parallel", "fsdp", "--dtype", "bfloat16")
    model = step.GPT(args, 300)
    step.parallelize(args, model, torch.device("cpu"))
    policy = step.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    given = {"mesh": ("cpu", (1,)), "mp_policy": policy}
    assert calls == [(net, given) for net in (*model.h, model)]


def test_every_process_and_iteration_has_dropout_masks_of_its_own(
    small_data, tmp_path, monkeypatch
):
    seeds, real, setup_device = [], torch.manual_seed, step.setup_device
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))

    def as_one_of_two(args, rank):
        device = setup_device(args)
        args.rank, args.world_size = rank, 2
        return device

    for rank in (0, 1):
        monkeypatch.setattr(step, "setup_device", functools.partial(as_one_of_two, rank=rank))
        for seed in (1, 2):
            run(small_data, tmp_path / f"{rank}{seed}", "--eval_interval", 9, "--seed", seed)
    iterations = [seed % 2**32 for seed in seeds if seed > 2]  # a CPU ignores the higher bits
    assert len(iterations) == len(set(iterations)) == 2 * 2 * 6


@pytest.fixture
def one_process_group():
    """torch.distributed for this process alone, as under torchrun with one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_per_update(
    parallel, small_data, tmp_path, monkeypatch, one_process_group
):
    """With the last of the four micro-batches."""
    real, exchanged = step.parallelize, []

    def spy(forward, inputs):
        if not torch.is_grad_enabled():  # an evaluation
            return
        if parallel == "ddp":
            assert isinstance(forward, step.DistributedDataParallel)
            assert forward.gradient_as_bucket_view  # or there would be two copies of them
            exchanged.append(forward.require_backward_grad_sync)
        else:
            assert all(isinstance(m, step.FSDPModule) for m in [forward, *forward.h])
            state = forward._get_fsdp_state()._fsdp_param_group
            exchanged.append(state.reduce_grads and state.all_reduce_grads)

    def parallelize(*given):
        forward = real(*given)
        forward.register_forward_pre_hook(spy)
        return forward

    monkeypatch.setattr(step, "parallelize", parallelize)
    run(small_data, tmp_path, "--parallel", parallel, "--max_iters", 2, "--eval_interval", 2)
    assert exchanged == [False, False, False, True] * 2


def test_a_process_whose_torchrun_is_gone_saves_and_ends(
    small_data, tmp_path, monkeypatch, one_process_group
):
    parents = iter([7, 7, 7, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    assert run(small_data, tmp_path)["iter"] == 0
    assert checkpoint(tmp_path)["state"]["iter_num"] == 3


def test_float16_has_no_sharded_scaler():
    args = parse("--parallel", "fsdp", "--dtype", "float16")
    with pytest.raises(argparse.ArgumentTypeError, match="--parallel fsdp needs --dtype bfloat16"):
        step.parallelize(args, step.make_model(args), torch.device("cpu"))


def test_a_sharded_model_writes_what_the_full_one_does(bytes_as_bpe, one_process_group):
    args = parse("--parallel", "fsdp", "--max_new_tokens", 40, "--prompt", "ab", "--stop", "")
    torch.manual_seed(0)
    model = step.make_model(args)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    text = step.sample(args, model)
    step.parallelize(args, model, torch.device("cpu"))
    assert isinstance(model, step.FSDPModule)
    assert step.sample(args, model) == text


def test_samples_are_the_prompt_and_what_the_model_continues_it_with(bytes_as_bpe, monkeypatch):
    args = parse("--prompt", "ab", "--stop", "", "--num_samples", 2)
    rows = torch.tensor([[97, 98, 99, 299, 257, 100], [97, 98, 256, 101, 102, 103]])
    prompts = []
    monkeypatch.setattr(step, "generate", lambda args, model, ids, _: prompts.append(ids) or rows)
    args.max_new_tokens = 4
    line = "\n---------------\n"
    assert step.sample(args, None) == f"abcd{line}ab<|endoftext|>efg"  # over 256 is padding
    assert prompts[0].tolist() == [[97, 98], [97, 98]]
    args.stop = "ef"
    assert step.sample(args, None) == f"abcd{line}ab<|endoftext|>ef"
    args.max_new_tokens = 0
    assert step.sample(args, None) == ""
    with monkeypatch.context() as patch:
        patch.setattr(step, "load_bpe", lambda: None)
        assert step.sample(args, None) == ""
        args.max_new_tokens = 1
        assert step.sample(args, None) == f"(no sample: {step.NO_BPE})"


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (8, 2),
        (32, "--total_batch_tokens 983040 or --batch_size 15"),
        (64, "--total_batch_tokens 1966080"),
        (7, "--total_batch_tokens 430080"),  # the nearest
    ],
)
def test_a_batch_that_does_not_divide_gets_a_suggestion(world_size, expected):
    flags = ["--total_batch_tokens", 491520, "--block_size", 1024, "--batch_size", 30]
    args = parse(*flags)
    args.world_size = world_size
    if isinstance(expected, int):
        assert step.count_micro_batches(args) == expected
        return
    with pytest.raises(argparse.ArgumentTypeError) as error:
        step.count_micro_batches(args)
    assert str(error.value).endswith(f"{world_size} processes; {expected} is possible")
    for flag, value in re.findall(r"(--\w+) (\d+)", expected):
        args = parse(*flags, flag, value)
        args.world_size = world_size
        assert step.count_micro_batches(args) > 0


@pytest.mark.parametrize(("gib", "batch_size"), [(16, 15), (24, 15), (40, 30), (80, 30)])
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_the_defaults_fit_the_usual_gpus(processes, gib, batch_size, monkeypatch):
    memory = types.SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    args = step.parse_args([])
    args.world_size = processes
    assert args.batch_size == batch_size and args.vocab_size % 64 == 0
    assert step.count_micro_batches(args) * batch_size * processes == 480
    assert step.parse_args(["--batch_size", "8"]).batch_size == 8


def kill(data, out_dir, *flags, restarts=0):
    """SIGKILL one of a run's two processes after its first checkpoints; exit code, output."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line = command(data, out_dir, *flags, processes=2, restarts=restarts)
    job = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    log = out_dir / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2) and time.time() < deadline:
        time.sleep(0.02)
    stats = [path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat")]
    workers = [int(a.split()[0]) for a, b in stats if int(b.split()[1]) == job.pid]
    os.kill(workers[-1], signal.SIGKILL)
    output = job.communicate(timeout=240)[0].decode()
    return job.returncode, output


LONG = ["--max_iters", 40, "--eval_interval", 4, "--dropout", 0.2, "--optimizer", "muon"]


@pytest.fixture(scope="session")
def unbroken(small_data, tmp_path_factory):
    """The checkpoint of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    spawn(small_data, folder, *LONG)
    return checkpoint(folder)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_killed_and_resumed_is_bit_identical(small_data, tmp_path, unbroken):
    code, output = kill(small_data, tmp_path, *LONG)
    assert code != 0
    assert "SIGKILL" in output  # the job ends and says why
    assert checkpoint(tmp_path)["state"]["iter_num"] < 40
    spawn(small_data, tmp_path, *LONG, "--init_from", "resume")
    assert_equal(checkpoint(tmp_path), unbroken)
    assert [r["iter"] for r in records(tmp_path)] == list(range(0, 41, 4))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_torchrun_restarts_it_unattended(small_data, tmp_path, unbroken):
    code, output = kill(small_data, tmp_path, *LONG, restarts=2)
    assert code == 0, output
    assert output.count("iter 0  seconds") == 1  # it goes on, it does not begin anew
    assert_equal(checkpoint(tmp_path), unbroken)
    assert [r["iter"] for r in records(tmp_path)] == list(range(0, 41, 4))


class Signals:
    """A list of signals that gets its first one after it was asked a few times."""

    def __init__(self, after):
        self.left = after

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_a_signal_saves_and_resume_goes_on(small_data, tmp_path, monkeypatch):
    flags = ["--dropout", 0.2, "--data_dir", small_data, "--out_dir"]
    real, calls, signals = step.measure_speed, [], []

    def measure_speed(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(step, "measure_speed", measure_speed)
    step.train(parse(*flags, tmp_path / "a"), signals)
    assert signals == [signal.SIGTERM]
    assert checkpoint(tmp_path / "a")["state"]["iter_num"] == 4
    step.train(parse(*flags, tmp_path / "a", "--init_from", "resume"))
    step.train(parse(*flags, tmp_path / "b"))
    assert_equal(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))


def test_resume_at_iteration_0_keeps_its_record(small_data, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
        run(small_data, tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:  # half a line, as a full disk leaves it
        file.write('{"iter": 1, "sec')
    run(small_data, tmp_path, "--init_from", "resume")
    assert [r["iter"] for r in records(tmp_path)] == [0, 3, 6]


def test_it_is_also_saved_between_evaluations(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "SAVE_SECONDS", 0)
    real, saved = step.save_checkpoint, []

    def spy(args, paths, parts, state):
        saved.append((state["iter_num"], [path.name for path in paths]))
        real(args, paths, parts, state)

    with monkeypatch.context() as patch:
        patch.setattr(step, "save_checkpoint", spy)
        run(small_data, tmp_path)
    assert [(i, names) for i, names in saved if i in (1, 2, 4, 5)] == [
        (i, ["last.pt"]) for i in (1, 2, 4, 5)
    ]


def test_recomputed_activations_change_nothing(small_data, tmp_path, monkeypatch):
    passes = []
    real = step.MLP.forward
    monkeypatch.setattr(step.MLP, "forward", lambda self, x: passes.append(1) or real(self, x))
    flags = ["--dropout", 0.2, "--max_iters", 2, "--eval_interval", 2]
    a = run(small_data, tmp_path / "a", *flags)
    n = len(passes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, where its default would be used
        b = run(small_data, tmp_path / "b", *flags, "--recompute")
    assert len(passes) - n == n + 2 * 4 * 2  # again in backward: updates, micro-batches, layers
    assert a["train_loss"] == b["train_loss"]
    assert_equal(checkpoint(tmp_path / "a")["model"], checkpoint(tmp_path / "b")["model"])


@pytest.mark.parametrize("distributed", [False, True])
def test_a_second_sigterm_does_not_end_a_save(distributed, small_data, tmp_path):
    """SIGTERM comes again and again, as Slurm and torchrun send it: the checkpoint is written."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    if distributed:  # the only process of a group, started as torchrun does it
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])
        env |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    line = command(small_data, tmp_path, *LONG, "--max_iters", 100_000)
    job = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while not (tmp_path / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    while job.poll() is None and time.time() < deadline:
        job.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    output = job.communicate()[0].decode()
    stopped = re.search(r"stopped at iteration (\d+)", output)
    assert stopped, output
    assert checkpoint(tmp_path)["state"]["iter_num"] == int(stopped[1])
    assert job.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)  # a shell reports both as 143


def test_all_processes_resume_or_none(small_data, tmp_path, monkeypatch):
    run(small_data, tmp_path)
    real = step.all_sum
    flags = ["--data_dir", small_data, "--out_dir", tmp_path, "--max_iters", 8]

    def restarted(values, device):  # a restart that another machine has counted
        return real([values[0] + 1, *values[1:]] if len(values) == 2 else values, device)

    with monkeypatch.context() as patch:
        patch.setattr(step, "all_sum", restarted)
        step.train(parse(*flags))
    assert [r["iter"] for r in records(tmp_path)] == [0, 3, 6, 8]

    def as_one_of_two(args):
        args.rank, args.world_size = 0, 2
        return torch.device("cpu")

    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(step, "setup_device", as_one_of_two)
    with pytest.raises(argparse.ArgumentTypeError, match="--out_dir must be shared: only 1 of 2"):
        step.train(parse(*flags))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_restarted_job_does_not_resume_the_run_of_another(small_data, tmp_path, monkeypatch):
    run(small_data, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # its first attempt was refused
    with pytest.raises(OSError, match="--overwrite"):
        run(small_data, tmp_path, "--max_iters", 8)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(small_data, tmp_path, "--max_iters", 8, "--overwrite")
    again = run(small_data, tmp_path, "--max_iters", 9)  # now it is the job's own
    assert [record["iter"] for record in records(tmp_path)] == [0, 3, 6, 8, 9]
    assert again["iter"] == 9


@pytest.mark.parametrize(("who", "job"), [("TORCHELASTIC", "RUN"), ("SLURM", "JOB")])
def test_a_job_that_was_restarted_resumes(who, job, small_data, tmp_path, monkeypatch):
    monkeypatch.setenv(f"{who}_{job}_ID", "17")
    for count in (None, "", "0"):  # the first attempt
        if count is not None:
            monkeypatch.setenv(f"{who}_RESTART_COUNT", count)
        out_dir = tmp_path / str(count)
        run(small_data, out_dir, "--max_iters", 1)
        with pytest.raises(OSError, match="--overwrite"):
            run(small_data, out_dir, "--max_iters", 2)
    monkeypatch.setenv(f"{who}_RESTART_COUNT", "2")
    run(small_data, out_dir, "--max_iters", 2)
    assert [record["iter"] for record in records(out_dir)] == [0, 1, 2]
    with pytest.raises(OSError, match="--overwrite"):  # there is nothing that could be resumed
        (out_dir / "last.pt").unlink()
        run(small_data, out_dir, "--max_iters", 3)


def test_only_the_main_process_speaks_and_writes(small_data, tmp_path, monkeypatch, capsys):
    bars = []

    def as_second_of_two(args):
        args.rank, args.world_size = 1, 2
        return torch.device("cpu")

    class Bar(step.tqdm):
        def __init__(self, *given, disable=False, **options):
            super().__init__(*given, disable=True, **options)
            bars.append(disable)

    monkeypatch.setattr(step, "setup_device", as_second_of_two)
    monkeypatch.setattr(step, "tqdm", Bar)
    flags = ["--data_dir", small_data, "--out_dir", tmp_path / "out", "--keep", 1]
    final = step.train(parse(*flags), Signals(after=3))
    step.train(parse(*flags, "--eval_only"))
    assert final["iter"] == 3 and bars == [True]
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


def test_a_run_records_and_prints_its_time_and_speed(small_data, tmp_path, monkeypatch, capsys):
    """By a clock that load_data moves by 100 s, an evaluation by 10 s, a minibatch by 0.5 s."""
    now, texts, bars, shown, pictures, saved = [1000.0], [], [], [], [], []

    def takes(seconds, function):
        def call(*given):
            now[0] += seconds
            return function(*given)

        return call

    def minibatches(*given, real=step.minibatches):
        batches = real(*given)
        for i in range(10**6):  # the first update takes longer: it compiles
            yield takes(0.5 if i > 4 else 50, next)(batches)

    def sample(*given):
        texts.append(f"sample {len(texts)}")
        return texts[-1]

    def save_checkpoint(args, paths, parts, state, real=step.save_checkpoint):
        saved.append((state["iter_num"], [path.name for path in paths]))
        real(args, paths, parts, state)

    class Bar(step.tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            bars.append((self.n, self.total, self.disable))

        def set_postfix(self, **values):
            shown.append(values)

    monkeypatch.setattr(step, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(step, "load_data", takes(100, step.load_data))
    monkeypatch.setattr(step, "evaluate", takes(10, step.evaluate))
    monkeypatch.setattr(step, "minibatches", minibatches)
    monkeypatch.setattr(step, "sample", sample)
    monkeypatch.setattr(step, "tqdm", Bar)
    monkeypatch.setattr(step, "plot_run", lambda path: pictures.append(path) or path / "loss.png")
    monkeypatch.setattr(step, "save_checkpoint", save_checkpoint)
    flags = ["--data_dir", small_data, "--out_dir", tmp_path, "--max_iters", 7]
    flags += ["--peak_tflops", 1e-6]
    args = parse(*flags)
    assert step.train(args, Signals(after=3))["iter"] == 3
    said = capsys.readouterr().out
    last = tmp_path / "last.pt"
    stopped = f"stopped at iteration 4; --init_from resume continues from {last}"
    assert stopped in said.splitlines() and "picture" not in said
    # 100 s for the data, 50 for the first micro-batch, 200 for update 0, 2 for each later one.
    state = torch.load(last, weights_only=True)["state"]
    assert state["seconds"] == 100 + 50 + 10 + 200 + 4 + 10 + 2
    for log in (tmp_path / "metrics.jsonl", tmp_path / "samples.txt"):
        log.write_text(log.read_text() + '{"iter": 4, "sec')  # after the last checkpoint
    final = step.train(parse(*flags, "--init_from", "resume"))
    said += capsys.readouterr().out
    logged = records(tmp_path)
    assert logged[-1] == final
    assert [r["iter"] for r in logged] == [0, 3, 6, 7]
    start = state["seconds"] + 100 + 50  # of the second run
    seconds = [160, 374, start + 200 + 2 + 10, start + 200 + 2 + 10 + 2 + 10]
    assert [r["seconds"] for r in logged] == seconds
    # The first update of a run and evaluations do not count.
    assert [r["tokens_per_second"] for r in logged[1:]] == [128 / 2] * 3
    assert all(r["mfu"] == step.flops_per_token(args) * 64 / 1e6 for r in logged[1:])
    assert not {"train_loss", "mfu", "memory_gib"} & logged[0].keys()
    assert [r["learning_rate"] for r in logged] == [step.schedule(args, i) for i in (0, 3, 6, 7)]
    heads = (f"=== iter {r['iter']}, val_loss {r['val_loss']:.4f}" for r in logged)
    written = "".join(f"{head}\n{text}\n\n" for head, text in zip(heads, texts))
    assert (tmp_path / "samples.txt").read_text() == written
    lines = said.splitlines()
    n_params = sum(p.numel() for p in step.GPT(args, 300).parameters())
    assert lines[0] == f"{n_params:,} parameters, 1 processes, cpu, float32"
    assert lines[1] == "micro-batches per process and update: 4"
    for record, text in zip(logged, texts):
        line = "  ".join(f"{key} {value:.5g}" for key, value in record.items())
        assert f"{line}\n{text}\n" in said
    summary = f"val_loss {final['val_loss']:.4f} after {final['seconds']:.0f} s"
    assert lines[-2:] == [summary, f"picture: {tmp_path / 'loss.png'}"]
    assert bars == [(0, 7, True), (4, 7, True)]  # not shown where there is no terminal
    loss = torch.load(last, weights_only=True)["state"]["losses"][-1]
    known = {"loss": f"{loss:.4f}", "tokens_per_second": "64", "mfu": f"{final['mfu']:.4g}"}
    assert len(shown) == 7 and float(shown[-1].pop("memory_gib")) > 0
    assert shown[-1] == known | {"refresh": False}
    assert pictures == [tmp_path] * (4 + 1)  # at every evaluation and at the end
    best = [min(r["val_loss"] for r in logged[:i]) for i in range(1, 5)]  # until each record
    names = [["best.pt"] * (best[i] not in best[:i]) + ["last.pt"] for i in range(4)]
    assert saved == [(0, names[0]), (3, names[1]), (4, ["last.pt"]), (6, names[2]), (7, names[3])]
    # A checkpoint at least every SAVE_SECONDS: more than 9 s after the last one, five updates.
    monkeypatch.setattr(step, "SAVE_SECONDS", 9)
    saved.clear()
    again = parse(*flags, "--init_from", "resume", "--max_iters", 20, "--eval_interval", 16)
    step.train(again)
    assert [i for i, _ in saved] == [8, 13, 16, 20]
    state = torch.load(last, weights_only=True)["state"]
    assert state["record"]["iter"] == state["iter_num"] == 20


def test_spikes_are_skipped_and_nothing_else(small_data, tmp_path, monkeypatch, capsys):
    """100 losses of 1 or 3, then some far from their mean; an infinite gradient norm, too."""
    losses, norms = [2.0 + (-1) ** i for i in range(100)], {104: math.inf}
    for i, z in enumerate([5.9, 6.1, -50, 100]):  # the mean and the deviation of the last 100
        losses.append(float(np.mean(losses[i:]) + z * np.std(losses[i:])))
    losses += [2.0, 2.0]
    real, n = step.all_sum, iter(range(10**6))

    def all_sum(values, device):
        total = real(values, device)
        if len(total) == 4:  # of an update
            i = next(n)
            total[:2] = losses[i], norms.get(i, 1.0)
        return total

    monkeypatch.setattr(step, "all_sum", all_sum)
    monkeypatch.setattr(step, "evaluate", lambda *given: 5.0)
    flags = "--max_iters 106 --eval_interval 106 --n_layer 1 --n_embd 4 --block_size 4"
    flags = [*flags.split(), "--batch_size", 1, "--total_batch_tokens", 4]
    final = run(small_data, tmp_path, *flags)
    skipped = re.findall(r"update (\d+) skipped: (.*)", capsys.readouterr().out)
    z = (2 - np.mean(losses[4:104])) / np.std(losses[4:104])
    assert skipped == [
        ("101", f"loss {losses[101]:.4f}, z-score 6.1, gradient norm 1"),
        ("103", f"loss {losses[103]:.4f}, z-score 100.0, gradient norm 1"),
        ("104", f"loss 2.0000, z-score {z:.1f}, gradient norm inf"),
    ]
    assert final["train_loss"] == pytest.approx(np.mean(losses[6:106]))
    steps = torch.load(tmp_path / "last.pt", weights_only=True)["adamw"]["state"]
    assert {int(state["step"]) for state in steps.values()} == {106 - 3}
    n = iter(range(10**6))
    run(small_data, tmp_path / "never", *flags, "--skip_zscore", 0)
    assert re.findall(r"update (\d+) skipped", capsys.readouterr().out) == ["104"]


def test_older_checkpoints_are_kept(small_data, tmp_path):
    run(small_data, tmp_path, "--keep", 2, "--eval_interval", 2)
    names = ["iter_00000004.pt", "iter_00000006.pt"]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == names
    assert [checkpoint(tmp_path, name)["state"]["iter_num"] for name in names] == [4, 6]
    assert_equal(checkpoint(tmp_path, names[1]), checkpoint(tmp_path))


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(small_data, tmp_path, monkeypatch):
    normal, count = step.all_sum, iter(range(10**6))

    def nan(values, device):
        total = normal(values, device)
        return [math.nan if len(total) == 4 and next(count) == 4 else total[0], *total[1:]]

    monkeypatch.setattr(step, "all_sum", nan)
    with pytest.raises(FloatingPointError, match="iteration 4"):
        run(small_data, tmp_path)
    found = checkpoint(tmp_path)
    assert found["state"]["iter_num"] == 3
    assert all(tensor.isfinite().all() for tensor in found["model"].values())


def test_float16_scales_the_loss(small_data, tmp_path):
    a = run(small_data, tmp_path / "a", "--dtype", "float16")
    b = run(small_data, tmp_path / "b", "--dtype", "bfloat16")
    c = run(small_data, tmp_path / "c", "--dtype", "float32")
    assert checkpoint(tmp_path / "a")["scaler"]["scale"] > 1
    assert a["val_loss"] == pytest.approx(c["val_loss"], rel=0.01)
    assert b["val_loss"] == pytest.approx(c["val_loss"], rel=0.01)


def test_losses_are_computed_in_float32(small_data, tmp_path, monkeypatch):
    """The sum over a batch has more digits than bfloat16 holds."""
    real, dtypes = F.cross_entropy, []

    def spy(logits, *given, **options):
        dtypes.append(logits.dtype)
        return real(logits, *given, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    run(small_data, tmp_path, "--dtype", "bfloat16", "--max_iters", 1)
    assert len(dtypes) > 3 and set(dtypes) == {torch.float32}


def test_one_all_reduce_per_update(small_data, tmp_path, monkeypatch):
    calls, real = [], step.all_sum
    monkeypatch.setattr(step, "all_sum", lambda *args: calls.append(args) or real(*args))
    run(small_data, tmp_path)
    assert len(calls) == 6 + 3 + 1  # updates, evaluations, the decision to resume


def test_a_checkpoint_of_another_dtype_is_resumed(small_data, tmp_path):
    for i, dtype in enumerate(("bfloat16", "float16", "float32")):
        flags = ["--init_from", "resume"] * (i > 0)
        run(small_data, tmp_path, "--dtype", dtype, "--max_iters", 6 + i, *flags)
    assert [r["iter"] for r in records(tmp_path)] == [0, 3, 6, 7, 8]


def test_without_a_compiler_it_says_so_and_goes_on(small_data, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    real, rows = F.cross_entropy, []

    def spy(logits, *given, **options):
        rows.append(len(logits))
        return real(logits, *given, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    assert run(small_data, tmp_path, "--compile", "--batch_size", 8)["iter"] == 6
    assert "no C++ compiler" in capsys.readouterr().out
    assert max(rows) == 64  # of 8 x 16: not all logits in float32 at once


def test_the_compiler_sees_torchs_cross_entropy(small_data, tmp_path, monkeypatch):
    """It is traced, but not compiled, which would take long."""
    expected = run(small_data, tmp_path / "a", "--max_iters", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.delattr(step, "CrossEntropy")
    found = run(small_data, tmp_path / "b", "--max_iters", 1, "--compile")
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_best_is_the_checkpoint_of_the_lowest_loss(small_data, tmp_path, monkeypatch):
    losses = iter([4.0, 2.0, 3.0])
    monkeypatch.setattr(step, "evaluate", lambda *_: next(losses))
    run(small_data, tmp_path)
    states = [checkpoint(tmp_path, name)["state"] for name in ("best.pt", "last.pt")]
    assert [(state["iter_num"], state["best"]) for state in states] == [(3, 2.0), (6, 2.0)]


def test_resume_with_a_cropped_block(small_data, tmp_path):
    run(small_data, tmp_path)
    long = checkpoint(tmp_path)["model"]["wpe.weight"]
    flags = ["--init_from", "resume", "--block_size", 8]
    args = parse("--data_dir", small_data, "--out_dir", tmp_path, *flags)
    step.train(args)
    assert run(small_data, tmp_path, *flags, "--max_iters", 8)["iter"] == 8
    assert long.shape == (16, 16)


def test_resume_takes_the_sizes_from_the_checkpoint(small_data, tmp_path):
    run(small_data, tmp_path, "--no-bias")
    before = checkpoint(tmp_path)["state"]["args"]
    flags = [*CPU, "--data_dir", small_data, "--out_dir", tmp_path, "--init_from", "resume"]
    args = step.parse_args(list(map(str, flags)))
    assert before == {name: getattr(args, name) for name in before}
    assert_one_line(run_main(STEP, *flags, "--n_head", 1), "--n_head 1", "2")


# ---------- bad input ----------


def assert_one_line(result, *words):
    code, errors = result
    lines = [line for line in errors.splitlines() if line.strip() and "it/s]" not in line]
    assert code == 2, errors
    assert len(lines) == 1, errors
    for word in words:
        assert str(word) in lines[0]


def bad(data, out_dir, *flags):
    return run_main(STEP, *SMALL, "--data_dir", data, "--out_dir", out_dir, *flags)


def test_without_data_it_says_what_preparing_would_cost(tmp_path):
    result = bad(tmp_path, tmp_path / "out")
    assert_one_line(result, "prepare.py", "25 GB", "--corpus", "tests/standins.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--total_batch_tokens", "100"], ["--total_batch_tokens 100", "--total_batch_tokens 96"]),
        (["--n_head", "3"], ["--n_head 3"]),
        (["--vocab_size", "200"], ["--vocab_size 200", "train.bin"]),
        (["--block_size", "320"], ["--block_size"]),
        (["--init_from", "resume"], ["last.pt"]),
        (["--init_from", "/nowhere"], ["--init_from /nowhere"]),
        (["--prompt", ""], ["--prompt"]),
        *([(["--device", "cuda"], ["--device cuda"])] if not torch.cuda.is_available() else []),
    ],
)
def test_bad_flags(flags, words, small_data, tmp_path, bytes_as_bpe):
    assert_one_line(bad(small_data, tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl", None, "missing"),
        ("a.jsonl", "", "empty"),
        ("a.csv", "text", "must end in .jsonl"),
        ("a.jsonl b.txt", '{"text": "a"}', "must end in .jsonl"),
        ("a.parquet", "text", "column 'text'"),
        ("a.jsonl", "{x", "column 'text'"),
        ("a.jsonl", '{"body": "a"}', "column 'text'"),
        *(("a.jsonl", f'{{"text": {value}}}', "of type") for value in ("null", "1", '["a"]')),
    ],
)
def test_a_corpus_that_cannot_be_read(name, content, word, tmp_path, bytes_as_bpe, caplog):
    caplog.set_level("WARNING", logger="datasets")  # as it is in a new process
    paths = [tmp_path / file for file in name.split()]
    for path in paths if content is not None else []:
        path.write_text(content)
    code, errors = run_script("prepare", *prepare_flags(tmp_path, "--corpus", *paths))
    assert code == 2 and "Traceback" not in errors
    last = errors.strip().splitlines()[-1]  # after the bar of datasets
    assert last.startswith(f"prepare.py: error: --corpus {paths[0]}") and word in last
    assert not caplog.records  # what datasets logs is in that line


def test_scripts_without_gpt2s_encoding(tmp_path, bytes_as_bpe, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)  # no network
    question = {"ctx": "a", "endings": ["b", "c"], "label": 1}
    (tmp_path / "h.jsonl").write_text(json.dumps(question))
    for name, flags in (
        ("hellaswag", [tmp_path / "h.jsonl"]),
        ("prepare", prepare_flags(tmp_path)),
    ):
        assert_one_line(run_script(name, *flags), f"{name}.py: error: {step.NO_BPE}")
    assert not (tmp_path / "made").exists()


def test_scripts_without_a_checkpoint(tmp_path):
    for name, flags in (("sample", []), ("export_hf", [tmp_path / "hf"])):
        result = run_script(name, *flags, "--out_dir", tmp_path)
        assert_one_line(result, f"{name}.py: error:", tmp_path / "best.pt", "missing")
    assert_one_line(run_script("export_hf"), "usage", "export_hf.py DIR")
    assert_one_line(run_script("export_hf", "--device", "cpu"), "usage", "export_hf.py DIR")
    assert not (tmp_path / "hf").exists()


def test_a_block_longer_than_the_weights_positions(small_data, tmp_path):
    args = parse()
    load_script("export_hf").export_hf(args, step.make_model(args), tmp_path / "hf")
    result = bad(small_data, tmp_path, "--init_from", tmp_path / "hf", "--block_size", 32)
    assert_one_line(result, "--block_size 32", "16")
    whole = (tmp_path / "hf/model.safetensors").read_bytes()
    (tmp_path / "hf/model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_one_line(bad(small_data, tmp_path, "--init_from", tmp_path / "hf"), tmp_path / "hf")


def test_a_corrupt_shard(small_data, tmp_path):
    (tmp_path / "openwebtext").mkdir()
    for name in ("train", "val"):
        content = (small_data / "openwebtext" / f"{name}.bin").read_bytes()
        (tmp_path / "openwebtext" / f"{name}.bin").write_bytes(content)
    path = tmp_path / "openwebtext" / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert_one_line(bad(tmp_path, tmp_path / "out"), path, "damaged")
    path.write_bytes(whole[:-100])  # even, but shorter than prepare.py wrote
    (path.parent / "meta.json").write_text(json.dumps({"train": 4000, "val": 500}))
    assert_one_line(bad(tmp_path, tmp_path / "out"), path, "damaged")


def test_a_full_disk_leaves_the_old_checkpoint(small_data, tmp_path, monkeypatch):
    run(small_data, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    flags = ["--init_from", "resume", "--max_iters", 9]
    assert_one_line(bad(small_data, tmp_path, *flags), "cannot be written", "No space left")
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_checkpoints(small_data, tmp_path):
    run(small_data, tmp_path)
    flags = ["--init_from", "resume"]
    result = bad(small_data, tmp_path, *flags, "--n_embd", 32)
    assert_one_line(result, "last.pt is of another model or optimizer (model: size mismatch for")
    for n_layer in (1, 3):  # other keys are refused, not dropped
        result = bad(small_data, tmp_path, *flags, "--n_layer", n_layer)
        assert_one_line(result, "last.pt", "another model", f"h.{min(n_layer, 2)}.")
    whole = (tmp_path / "last.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        (tmp_path / "last.pt").write_bytes(damaged)
        assert_one_line(bad(small_data, tmp_path, *flags), "last.pt", "damaged")


@pytest.mark.data
def test_real_text_is_prepared_and_learned(real_data, tmp_path):
    step.load_bpe.cache_clear()
    corpus = real_data / "openwebtext" / "webtext-sample.jsonl"
    if step.load_bpe() is None or not corpus.is_file():
        pytest.skip("needs GPT-2's BPE and openwebtext/webtext-sample.jsonl")
    flags = ["--data_dir", tmp_path, "--corpus", corpus, "--val_fraction", 0.1]
    script = load_script("prepare")
    sizes = script.prepare(script.parse_args(list(map(str, flags))))
    assert sizes["documents"] == 4723
    assert sizes["train"] + sizes["val"] == pytest.approx(302_272, abs=10)
    play = ["--corpus", real_data / "shakespeare/input.txt", "--cache_dir", tmp_path / "play"]
    sizes = script.prepare(script.parse_args(list(map(str, [*flags, *play]))))
    assert sizes["train"] + sizes["val"] == 338_025 + 1  # nanoGPT's tokens, and the text's end
    flags = ["--data_dir", tmp_path, "--dataset", "webtext-sample", "--device", "cpu"]
    flags += ["--out_dir", tmp_path / "out", "--max_iters", 60, "--eval_interval", 30]
    # In a process whose C library keeps freed memory, as the docstring advises: twice as fast.
    env = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
    line = [sys.executable, folder_of(STEP) / "train.py", *flags]
    subprocess.run(list(map(str, line)), env=env, check=True, capture_output=True)
    losses = [r["val_loss"] for r in records(tmp_path / "out")]
    assert losses[0] == pytest.approx(math.log(50257), rel=0.02)
    assert 3 < losses[2] < losses[1] < losses[0]
