"""Fixtures: stand-in data for every step, and real data where DATA_DIR has it."""

import os
import shutil
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the steps do, before torch is imported

import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
import standins as standins_script
import tiktoken
import torch
from steps import ROOT, load_step, run_alone, tiny_flags

N_THREADS = min(2, torch.get_num_threads())


@pytest.fixture(autouse=True)
def process_wide_settings():
    """Every test begins with the same settings of the process: a step may change them for a run."""
    torch.set_num_threads(N_THREADS)
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    """A data folder with small stand-ins in the real formats."""
    folder = tmp_path_factory.mktemp("standins")
    standins_script.main([str(folder)])
    return folder


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DATA_DIR names no folder of real data")
    return Path(folder)


@pytest.fixture
def bytes_as_bpe(monkeypatch):
    """Instead of GPT-2's encoding, which needs a network: bytes, and 256 that ends a text."""
    bpe = tiktoken.Encoding(
        name="bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bpe)
    load_step("17_gpt2_multigpu").load_bpe.cache_clear()
    yield bpe
    load_step("17_gpt2_multigpu").load_bpe.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What JAX compiles is kept for later runs of the same sizes, in other processes, too."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("jax"))}
        settings["jax_persistent_cache_min_compile_time_secs"] = 0.1
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails at once."""

    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


@pytest.fixture(scope="session", autouse=True)
def runs_alone(request, standins, compiled_once, tmp_path_factory):
    """Run every step under test in a folder of its own, beside the other tests: {step: future}."""

    def run(step, folder):
        alone, elsewhere = folder / "alone", folder / "elsewhere"
        shutil.copytree(ROOT / step, alone, ignore=shutil.ignore_patterns("out", "__pycache__"))
        elsewhere.mkdir()
        flags = tiny_flags(step, standins, alone / "out")
        del flags[flags.index("--out_dir") : flags.index("--out_dir") + 2]  # it is beside train.py
        return run_alone(alone, *flags, cwd=elsewhere), alone, elsewhere

    mine = [i for i in request.session.items if "copied_alone" in i.name]
    steps = [item.callspec.params["step"] for item in mine]
    pool = ThreadPoolExecutor(1)
    folders = {step: tmp_path_factory.mktemp(Path(step).name) for step in steps}
    yield {step: pool.submit(run, step, folder) for step, folder in folders.items()}
    pool.shutdown(cancel_futures=True)
