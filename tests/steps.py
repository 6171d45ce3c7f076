"""What the tests share: steps and electives found on disk, how to import one, how to run one."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.parent.name for path in ROOT.glob("[0-9][0-9]_*/train.py"))
ELECTIVES = sorted(f"electives/{path.parent.name}" for path in ROOT.glob("electives/*/train.py"))
FOLDERS = STEPS + ELECTIVES

# Flags that make a run last about a second. A folder without a line here fails its tests.
TINY = {
    "01_linreg_numpy": "--n_examples 500 --max_iters 20 --eval_interval 10",
    "02_linreg_torch": "--n_examples 500 --max_iters 20 --eval_interval 10",
    "03_vector_linreg": "--n_examples 500 --max_iters 20 --eval_interval 10",
    "04_softmax_classify": "--n_examples 500 --max_iters 20 --eval_interval 10",
    "05_mlp_manual": "--n_examples 500 --max_iters 20 --eval_interval 10 --n_hidden 16",
    "06_mlp_nn": "--n_examples 500 --max_iters 20 --eval_interval 10 --n_hidden 16",
    "07_mnist_mlp": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_hidden 16",
    "08_mnist_adam": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_hidden 16"
    " --warmup_iters 2",
    "09_mnist_convnet": "--max_iters 4 --eval_interval 2 --batch_size 32 --warmup_iters 1",
    "10_mnist_resnet": "--max_iters 4 --eval_interval 2 --batch_size 32 --warmup_iters 1"
    " --n_channel 4",
    "11_shakespeare_ffn": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_embd 16",
    "12_sampling": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_embd 16"
    " --max_new_tokens 10",
    "13_transformer": "--max_iters 6 --eval_interval 3 --batch_size 4 --n_embd 16 --block_size 16"
    " --eval_stride 16 --max_new_tokens 10",
    "14_resnet_gpu": "--max_iters 4 --eval_interval 2 --batch_size 32 --n_channel 4",
    "15_imagenet": "--recipe tiny --batch_size 8 --max_iters 4 --eval_interval 2 --num_workers 0"
    " --train_size 16 --test_size 16",
    "16_nanogpt_shakespeare": "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4"
    " --max_iters 6 --eval_interval 3 --max_new_tokens 10",
    "17_gpt2_multigpu": "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2"
    " --total_batch_tokens 64 --max_iters 4 --eval_interval 2 --max_new_tokens 5",
    "electives/classify_text": "--max_iters 6 --eval_interval 3 --batch_size 8 --n_embd 16"
    " --warmup_iters 2 --penalties 1e-4",
    "electives/critical_batch": "--target 0.1 --n_seeds 1 --batch_sizes 16 64 --learning_rates 0.1"
    " --max_iters 4 --eval_interval 2",
    "electives/dropout": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_hidden 16"
    " --n_train 100 --n_seeds 2",
    "electives/induction": "--max_iters 6 --eval_interval 3 --batch_size 8 --n_embd 16"
    " --vocab_size 16 --block_size 16 --period_min 3 --period_max 7",
    "electives/lstm": "--max_iters 6 --eval_interval 3 --batch_size 8 --n_embd 16 --n_hidden 16"
    " --block_size 8 --max_new_tokens 10",
    "electives/made": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_hidden 16"
    " --warmup_iters 2",
    "electives/scaling_laws": "--max_iters 64 --batch_size 4 --n_seeds 1 --growth 1",
    "electives/vae": "--max_iters 6 --eval_interval 3 --batch_size 32 --n_hidden 16"
    " --warmup_iters 2 --eval_k 5",
    "electives/vpg": "--max_iters 6 --eval_interval 3 --n_envs 4 --n_frames 64 --n_hidden 16"
    " --eval_episodes 5",
}


def folder_of(step):
    """Return a step's folder, or that of a copy to test instead: STEP_09=DIR in the environment."""
    return Path(os.environ.get(f"STEP_{step[:2]}") or ROOT / step)


def source(step):
    return (ROOT / step / "train.py").read_text()


def tiny_flags(step, data_dir, out_dir):
    """Return the command line of a run of about a second: a list of strings."""
    flags = [*TINY[step].split(), "--out_dir", str(out_dir)]
    if '"--data_dir"' in source(step):
        own = "imagenet" if step == "15_imagenet" else ""  # --data_dir is the folder with train/
        flags += ["--data_dir", str(data_dir / own)]
    return flags


@contextlib.contextmanager
def plot_of(folder):
    """Let `from plot import ...` find the folder's own plot.py, as when its script is run."""
    sys.modules.pop("plot", None)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("plot", None)


@functools.cache
def load_step(step):
    """Import a step's train.py as a module of its own; "07" is enough of a step's name."""
    if step not in ELECTIVES:
        (step,) = [name for name in STEPS if name.startswith(step)]
    spec = importlib.util.spec_from_file_location(f"step_{step}", folder_of(step) / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with plot_of(folder_of(step)):
        spec.loader.exec_module(module)
    return module


def load_plot(step):
    """Import a step's plot.py as a module of its own."""
    with plot_of(folder_of(step)):
        return importlib.import_module("plot")


def run_main(step, *flags, script="train.py"):
    """Run a step as `python train.py FLAGS` does, in this process: (exit code, stderr)."""
    errors, argv, on_interrupt = io.StringIO(), sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, flags)]
    with plot_of(folder_of(step)), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(str(folder_of(step) / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = argv
            signal.signal(signal.SIGINT, on_interrupt)  # the script installs a handler of its own
    return code, errors.getvalue()


def run_alone(folder, *flags, cwd, timeout=300):
    """Run a folder's train.py in a process of its own, away from the repository."""
    env = {k: v for k, v in os.environ.items() if k not in ("DATA_DIR", "PYTHONPATH")}
    env["OMP_NUM_THREADS"] = "1"  # it runs beside other tests
    command = [sys.executable, str(folder / "train.py"), *map(str, flags)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


def definitions(step):
    """Return {name: source text} of a train.py's top-level functions and classes."""
    lines, found = source(step).splitlines(), {}
    for node in ast.parse(source(step)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def distinct(folders, text):
    """Return the first of the folders for every text(folder): its copies would fail together."""
    found = {}
    for folder in folders:
        found.setdefault(text(folder), folder)
    return list(found.values())


def main_guard(step):
    """Return the last lines of a train.py: what runs when it is started as a program."""
    return source(step).rpartition("\nif __name__")[2]
