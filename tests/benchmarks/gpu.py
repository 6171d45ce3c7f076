"""Steps 14 to 17 on a GPU: are they right, and how fast are they?

    python tests/benchmarks/gpu.py [--only check,14] [--minutes 9] [--data_dir DIR] [--out DIR]

Prints a table (ours, the published figure, the ratio) and writes it to --out: gpu.md and gpu.json.
No network is needed: data are generated; --data_dir takes real MNIST (its four files, also as .gz)
and tiny Shakespeare. Every group has its share of --minutes; what does not fit is reported as
skipped, so run the groups in two or three parts. --device cpu runs every row at tiny sizes, which
shows that the script works; its ratios mean nothing. The exit code is 1 if a row failed.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from steps import ROOT, STEPS, TINY, load_step

PUBLISHED = {  # by the end of a row's text: the figure and where it is from
    "seconds to 99%, without start-up": (0.762, "tuomaso/train_mnist_fast, GTX 1660 Ti"),
    "images/s at 224 pixels": (2470, "NVIDIA DeepLearningExamples, A100, AMP"),
    "images/s per core, full size": (740, "decoding alone: 621 to 864, arXiv 2605.08731"),
    "val_loss": (1.4697, "nanoGPT"),
    "seconds with start-up": (180, "nanoGPT, A100: about 3 minutes"),
    "seconds, compiled code cached": (180, "nanoGPT, A100: about 3 minutes"),
    "TFLOP/s": (989, "H100's peak, NVIDIA"),
    "tokens/s": (465_000, "llm.c, H100: 462,000 to 468,000"),
    "MFU": (0.41, "llm.c, H100"),
}
# Runs of step 14 whose accuracy on MNIST's test images, on a CPU, is over the target.
SHORT = "--n_channel 16 --rotate 6 --scale 0.06 --weight_decay 1e-3"
TARGETS = {99: f"--max_iters 300 {SHORT}", 99.5: f"--max_iters 650 {SHORT}", 99.6: ""}
SCRIPTS = {name[:2]: ROOT / name / "train.py" for name in STEPS}
FLAGS = {name[:2]: flags.split() for name, flags in TINY.items()}  # runs of about a second
FAST = ["--n_layer", "1"]  # compiles in half the time
# Small runs, the same on every device, of the steps that write checkpoints.
COMMON = "--no-compile --learning_rate 1e-3 --warmup_iters 5 --max_new_tokens 5".split()
SMALL = {"15": [*FLAGS["15"], "--learning_rate", "0.05"]}
SMALL["16"] = [*FLAGS["16"], *COMMON, "--dropout", "0", "--sdpa"]
SMALL["17"] = [*FLAGS["17"], *COMMON, "--min_lr", "1e-4", "--vocab_size", "50257", "--no-bias"]
SIZES = {"16": "--n_layer 6 --n_head 6 --n_embd 384 --block_size 256".split()}  # those of a GPU
SIZES["17"] = "--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024".split()


# ---------- the table ----------
class Bench:
    """The flags, a scratch folder, the clock, and the rows measured so far."""

    def __init__(self, args, folder):
        self.args, self.folder, self.rows, self.group = args, folder, [], ""
        self.device, self.tiny = args.device, args.device == "cpu"
        self.deadline = self.group_deadline = time.monotonic() + 60 * args.minutes
        self.machine = describe_machine(args.device)
        self.head = [", ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        self.head += ["Tiny sizes: the ratios mean nothing.", ""] if self.tiny else []
        self.head += [
            "| step | what | ours | published | ratio | note |",
            "|---|---|---|---|---|---|",
        ]

    def measure(self, wanted, function, *args):
        """Add rows with the texts wanted. function(self, *args) returns a value for each: a number,
        None if there is none, or (number, note)."""
        values, problem = [None] * len(wanted), ""
        try:
            if time.monotonic() > self.group_deadline:
                raise TimeoutError("no time left")
            values = function(self, *args)
        except (ImportError, MemoryError, TimeoutError, torch.OutOfMemoryError) as error:
            problem = f"skipped: {error}"
        except Exception as error:  # whatever it is, the other rows are to be measured
            problem = f"failed: {str(error).strip() or type(error).__name__}"
        for text, value in zip(wanted, values):
            found = (figure for end, figure in PUBLISHED.items() if text.endswith(end))
            published, source = next(found, (None, ""))
            value, note = value if isinstance(value, tuple) else (value, "")
            row = {"step": self.group, "what": text, "ours": value, "published": published}
            row["ratio"] = value / published if value is not None and published else None
            row["note"] = problem or "; ".join(filter(None, (note, source)))
            self.rows.append(row)
            print(markdown(row), flush=True)
        table = [*self.head, *map(markdown, self.rows), ""]
        (self.args.out / "gpu.md").write_text("\n".join(table))
        found = {"machine": self.machine, "rows": self.rows}
        (self.args.out / "gpu.json").write_text(json.dumps(found, indent=1))

    def run(self, name, *flags, torchrun=False):
        """Run train.py in a process of its own; return its seconds and its metrics.jsonl."""
        torch.cuda.empty_cache()  # of this process, which keeps what it has used
        out_dir, start = self.new_folder(), time.perf_counter()
        # A run may end somewhat after its group's time; timeout ends torchrun's processes, too.
        seconds = max(1, min(self.deadline, self.group_deadline + 60) - time.monotonic())
        command = ["timeout", "--kill-after=9", str(seconds), sys.executable]
        if torchrun:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        command += map(str, (SCRIPTS[name], *flags, "--out_dir", out_dir))
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode in (124, 137):
            raise TimeoutError("no time left")
        if "out of GPU memory" in result.stderr:
            raise MemoryError("out of GPU memory")
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["?"]
            reasons = [line for line in lines if "Error" in line or "error:" in line] or lines
            raise RuntimeError(f"exit code {result.returncode}: {reasons[-1]}")
        found, seconds = records(out_dir), time.perf_counter() - start
        shutil.rmtree(out_dir)  # its checkpoints are large
        return seconds, found

    def new_folder(self):
        return Path(tempfile.mkdtemp(dir=self.folder))


def train(name, flags):
    """Run a step in this process, silently; return the last record."""
    step = load_step(name)
    with contextlib.redirect_stdout(io.StringIO()):
        return step.train(step.parse_args(list(map(str, flags))))


def markdown(row):
    """Return a row of the table."""
    shown = []
    for value in (row["ours"], row["published"], row["ratio"]):
        shown += ["" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"]
    note = row["note"].replace("\n", " ").replace("|", "/")[:160]
    return f"| {row['step']} | {row['what']} | {' | '.join(shown)} | {note} |"


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def describe_machine(device):
    """Return what is measured on: GPU, driver, versions."""
    found = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "cores": os.cpu_count()}
    found |= {"device": platform.machine(), "Python": platform.python_version()}
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
        found["GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["cuDNN"] = torch.backends.cudnn.version()
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        found["driver"] = subprocess.getoutput(query).strip()
    for name in ("torch", "torchvision", "triton", "numpy", "tiktoken"):
        found[name] = version(name) if find_spec(name) else "missing"
    return found


# ---------- data ----------
def write_data(bench):
    """Write data/ into the scratch folder: copies of the real files, else generated ones."""
    data = bench.folder / "data"
    for pattern, folder in (("*idx?-ubyte*", "MNIST/raw"), ("input.txt", "shakespeare")):
        for path in bench.args.data_dir.rglob(pattern) if bench.args.data_dir else []:
            content, name = path.read_bytes(), path.name.replace(".idx", "-idx")
            (data / folder).mkdir(parents=True, exist_ok=True)
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            (data / folder / name.removesuffix(".gz")).write_bytes(content)
    bench.digits = "MNIST" if (data / "MNIST").exists() else "drawn digits"
    bench.text = "tiny Shakespeare" if (data / "shakespeare").exists() else "synthetic play"
    (data / "openwebtext").mkdir(parents=True)
    for name, n in (("train", 10_000 if bench.tiny else 4_000_000), ("val", 5000)):
        ids = np.random.default_rng(0).integers(50257, size=n, dtype=np.uint16)
        ids.tofile(data / "openwebtext" / f"{name}.bin")
    if find_spec("torchvision"):  # the stand-ins need it, as do steps 14 and 15
        import standins

        few = bench.tiny or "14" not in bench.args.only
        standins.write_mnist(data, *((600, 100) if few else (12_000, 2_000)))
        standins.write_shakespeare(data)  # like the others, it leaves the real file alone
        standins.write_imagenet(data)
    return data


# ---------- correctness ----------
def within(value, limit):
    """Return value, or raise an error if it exceeds the limit, or is not a number."""
    if not value <= limit:
        raise RuntimeError(f"{value:.3g} exceeds {limit:g}")
    return value, f"at most {limit:g}"


def difference(a, b):
    """Return the norm of a - b relative to that of b."""
    return ((a - b).norm() / b.norm()).item()


def one_update(bench, name, device, dtype):
    """Return the logits of a step's model and how an update changes its parameters, on a device."""
    step = load_step(name)
    flags = SMALL.get(name, []) + ([] if bench.tiny else SIZES.get(name, []))
    args = step.parse_args([*flags, "--dtype", dtype, "--device", device])
    args.rank, args.world_size = 0, 1
    torch.manual_seed(0)
    if name == "14":
        model, x, y = step.ResNet(16, 1, 10), torch.rand(4, 1, 28, 28), torch.arange(4)
    elif name == "15":
        model = step.ResNet(18 if bench.tiny else 50, 10)
        x, y = torch.rand(4, 3, 64, 64), torch.arange(4)
    else:
        model = step.GPT(args, args.vocab_size if name == "17" else 65)
        x, y = torch.randint(65, (2, 4, args.block_size))
    before = [p.detach().clone() for p in model.parameters()]
    model.to(device)
    make = step.make_optimizers if name in ("16", "17") else step.make_optimizer
    optimizers = make(args, model)
    with step.autocast(args):
        logits = model(x.to(device)).float()
    F.cross_entropy(logits.flatten(0, -2), y.to(device).flatten()).backward()
    for optimizer in optimizers.values() if isinstance(optimizers, dict) else [optimizers]:
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    changes = [(p.detach().cpu() - old).flatten() for p, old in zip(model.parameters(), before)]
    return logits.detach().cpu(), torch.cat(changes)


def compare_updates(bench, name):
    """Return the differences of logits and of the update, in float32 and bfloat16, from the CPU."""
    expected = one_update(bench, name, "cpu", "float32")
    rows = []
    # Adam and Muon amplify the rounding of small gradients.
    for dtype, limits in (("float32", (1e-3, 5e-2)), ("bfloat16", (5e-2, 0.5))):
        found = one_update(bench, name, bench.device, dtype)
        rows += [within(difference(*pair), limit) for *pair, limit in zip(found, expected, limits)]
    return rows


def small_flags(bench, name, device, out_dir, max_iters, *more):
    data_dir = bench.data / "imagenet" if name == "15" else bench.data
    flags = [*SMALL[name], "--device", device, "--dtype", "float32", "--data_dir", data_dir]
    flags += ["--max_iters", max_iters, "--eval_interval", max_iters // 2, "--out_dir", out_dir]
    return list(map(str, (*flags, *more)))


def kill_and_resume(bench, name):
    """Return how a run's weights, killed in its middle, differ from those of an unbroken one."""
    whole, broken, n = bench.new_folder(), bench.new_folder(), 24 if name == "15" else 200
    n *= 1 if bench.tiny else 2  # a GPU is faster
    train(name, small_flags(bench, name, bench.device, whole, n))
    flags = [name, bench.device, broken, n]
    command = [sys.executable, SCRIPTS[name], *small_flags(bench, *flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = broken / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.01)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"it ended with exit code {process.returncode} before it was killed")
    train(name, small_flags(bench, *flags, "--init_from", "resume"))
    saved = [torch.load(run / "last.pt", map_location="cpu")["model"] for run in (broken, whole)]
    weights = [torch.cat([v.flatten().float() for v in part.values()]) for part in saved]
    return [within(difference(*weights), 1e-2)]


def move_checkpoint(bench, name, source, target):
    """Return how the losses differ when a run of source goes on, on source and on target."""
    out_dir, losses = bench.new_folder(), []
    train(name, small_flags(bench, name, source, out_dir, 6))
    for device in (source, target):
        copied = bench.new_folder()
        shutil.copytree(out_dir, copied, dirs_exist_ok=True)
        flags = small_flags(bench, name, device, copied, 8, "--init_from", "resume")
        losses.append(train(name, flags)["val_loss"])
    return [within(abs(losses[0] - losses[1]) / losses[0], 1e-3)]


def check(bench):
    """Measure whether the device computes what the CPU computes."""
    torch.backends.cudnn.allow_tf32 = False  # or convolutions have 10 bits of precision
    values = [f"{what}, {dtype}" for dtype in ("float32", "bf16") for what in ("logits", "update")]
    for name in ("14", "15", "16", "17"):
        bench.group = name
        bench.measure([f"{v}: difference from the CPU" for v in values], compare_updates, name)
        if name not in SMALL:
            continue
        bench.measure(["killed, resumed: difference of the weights"], kill_and_resume, name)
        for source, target in ((bench.device, "cpu"), ("cpu", bench.device)):
            row = f"checkpoint of {source} continued on {target}: difference of the loss"
            bench.measure([row], move_checkpoint, name, source, target)
    torch.backends.cudnn.allow_tf32 = True


# ---------- speed ----------
def per_second(bench, function):
    """Return how often function() runs per second, after a warm-up."""
    n_warm, seconds = (1, 0.3) if bench.tiny else (10, 4)
    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    for _ in range(n_warm):
        function()
    wait()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(n_warm):
            function()
        wait()
        n += n_warm
    return n / (time.perf_counter() - start)


def train_to(bench, target):
    """Return median seconds without start-up, those of one process, accuracy (%), data share."""
    flags = FLAGS["14"] if bench.tiny else TARGETS[target].split()
    flags = [*flags, "--data_dir", bench.data, "--device", bench.device]
    flags += ["--eval_interval", 100_000]  # evaluate before and after training only
    whole, runs, now = bench.run("14", *flags)[0], [], time.monotonic()
    share = (bench.group_deadline - now) / (3 - list(TARGETS).index(target))  # of the time left
    for seed in range(2 if bench.tiny else bench.args.seeds):
        if runs and time.monotonic() > now + share:
            break
        out_dir = bench.new_folder()
        last = train("14", [*flags, "--out_dir", out_dir, "--seed", seed])
        seconds = last["seconds"] - records(out_dir)[0]["seconds"]
        runs.append((seconds, 100 * last["test_accuracy"], last["data_share"]))
    accuracies = [accuracy for _, accuracy, _ in runs]
    n_reached = sum(accuracy >= target for accuracy in accuracies)
    note = f"{bench.digits}, {len(runs)} seeds, {n_reached} of them reach it"
    seconds, accuracy, data_share = map(statistics.median, zip(*runs))
    spread = f"from {min(accuracies):.2f} to {max(accuracies):.2f}"
    return [(seconds, note), whole, (accuracy, spread), data_share]


def speed_14(bench):
    """Measure step 14: seconds to an accuracy, and the share of data and augmentation."""
    for target in TARGETS:
        rows = [
            f"seconds to {target}%, {what}" for what in ("without start-up", "with Python's start")
        ]
        rows += [f"the run to {target}%: {what}" for what in ("accuracy (%)", "share of the data")]
        bench.measure(rows, train_to, target)


def resnet_speed(bench, size):
    """Return images/s in training ResNet-50, the images of size x size being on the device."""
    step, batch = load_step("15"), 4 if bench.tiny else 256
    args = step.parse_args(["--device", bench.device, "--dtype", "bfloat16"])
    model = step.ResNet(18 if bench.tiny else 50, 1000)
    model = model.to(bench.device, memory_format=torch.channels_last)
    averages, values = (
        [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
        for net in (copy.deepcopy(model), model)
    )
    optimizer, stats = step.make_optimizer(args, model), step.STATS.to(bench.device)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=bench.device)
    labels = torch.randint(1000, (batch,), device=bench.device)

    def iterate():  # as step 15's train does
        x, y = step.augment(args, images, labels, stats, 1000)
        with step.autocast(args):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step.update_ema(averages, values, 0.999)

    return [batch * per_second(bench, iterate)]


def write_photos(bench):
    """Return a folder with JPEGs about as high and wide as ImageNet's, in train/ and val/."""
    import standins

    folder = bench.folder / "photos"
    standins.write_imagenet(folder, n_train=8 if bench.tiny else 256, sides=(300, 600))
    return folder / "imagenet"


def decode_speed(bench, pack_size):
    """Return images/s that one thread reads, decodes and crops for step 15."""
    step, threads = load_step("15"), torch.get_num_threads()
    flags = ["--data_dir", write_photos(bench), "--cache_dir", bench.folder / f"pack{pack_size}"]
    flags += ["--pack_size", pack_size, "--num_workers", 0 if bench.tiny else os.cpu_count() // 2]
    args = step.parse_args(list(map(str, flags)))
    images = step.list_images(args, "train")[1]
    dataset = step.PackedImages(args, *step.pack_images(args, "train", images))
    items = ((i % len(images), i) for i in range(10**6))
    torch.set_num_threads(1)
    try:
        return [per_second(bench, lambda: dataset[next(items)])]
    finally:
        torch.set_num_threads(threads)


def loader_speed(bench):
    """Return images/s and the share of waiting of step 15's train.py."""
    flags = ["--data_dir", write_photos(bench), "--cache_dir", bench.folder / "cache"]
    flags += ["--device", bench.device, "--dtype", "bfloat16"]
    sizes = ["--batch_size", 256, "--max_iters", 60, "--eval_interval", 30]
    flags += FLAGS["15"] if bench.tiny else sizes
    last = bench.run("15", *flags)[1][-1]
    return [last["images_per_second"], last["data_share"]]


def speed_15(bench):
    """Measure step 15: images/s of the GPU, of the loader, and of both together."""
    torch.backends.cudnn.benchmark = True  # as train.py does
    for size in (32, 48) if bench.tiny else (176, 224):
        row = f"ResNet-50, data on the device: images/s at {size} pixels"
        bench.measure([row], resnet_speed, size)
    for what, pack_size in (("full size", 0), ("packed at 256 pixels", 256)):
        bench.measure([f"images/s per core, {what}"], decode_speed, pack_size)
    rows = ["train.py with its loader: images/s", "the same: share of waiting for images"]
    bench.measure(rows, loader_speed)


def train_shakespeare(bench, flag, n_seeds):
    """Return the median val_loss, ms per iteration, seconds of the first and of the last seed."""
    flags = ["--data_dir", bench.data, "--device", bench.device, flag]
    flags += FLAGS["16"] + FAST if bench.tiny else []
    runs = [bench.run("16", *flags, "--seed", 1337 + i) for i in range(n_seeds)]
    losses = [found[-1]["val_loss"] for _, found in runs]
    note = f"{bench.text}, from {min(losses):.4f} to {max(losses):.4f}"
    args = load_step("16").parse_args(list(map(str, flags)))
    ms = 1000 * args.batch_size * args.block_size / runs[-1][1][-1]["tokens_per_second"]
    return [(statistics.median(losses), note), ms, runs[0][0], runs[-1][0]]


def speed_16(bench):
    """Measure step 16: seeds to the end, with and without compilation."""
    names = ["val_loss", "ms per iteration", "seconds with start-up"]
    for flag, n_seeds in (("--compile", 2 if bench.tiny else 3), ("--no-compile", 1)):
        more = ["seconds, compiled code cached"] if n_seeds > 1 else []
        rows = [f"{flag}, median of {n_seeds}: {name}" for name in names + more]
        bench.measure(rows, train_shakespeare, flag, n_seeds)


def matmul_speed(bench):
    """Return the bfloat16 TFLOP/s of the device in a product of two large matrices."""
    n = 512 if bench.tiny else 8192
    a, b = torch.randn(2, n, n, device=bench.device, dtype=torch.bfloat16)
    return [2 * n**3 * per_second(bench, lambda: a @ b) / 1e12]


def gpt2_speed(bench, batch, flags):
    """Return tokens/s, MFU and GiB of memory of step 17's train.py, 124M unless tiny."""
    n_iters, block = (4, 16) if bench.tiny else (20, 1024)
    flags = [*(FLAGS["17"] + FAST if bench.tiny else []), *flags.split()]
    flags += ["--data_dir", bench.data, "--device", bench.device, "--dtype", "bfloat16"]
    flags += ["--max_iters", n_iters, "--eval_interval", n_iters, "--batch_size", batch]
    flags += ["--total_batch_tokens", batch * block, "--max_new_tokens", 0]
    flags += ["--peak_tflops", 0.1] if bench.tiny else []
    last = bench.run("17", *flags, torchrun="--parallel" in flags)[1][-1]
    return [last["tokens_per_second"], last.get("mfu"), last["memory_gib"]]


def speed_17(bench):
    """Measure step 17: tokens/s, MFU and memory of the 124M model, on one GPU."""
    bench.measure(["product of large matrices in bf16: TFLOP/s"], matmul_speed)
    a, b, c = (2, 2, 2) if bench.tiny else (32, 64, 16)
    plans = [(a, "--compile"), (a, "--no-compile"), (a, "--compile --optimizer muon")]
    plans += [(a, f"--compile --parallel {kind}") for kind in ("ddp", "fsdp")]
    plans += [(b, "--compile"), (c, "--compile"), (c, "--no-compile")]
    for batch, flags in dict.fromkeys(plans):  # without duplicates
        names = ("tokens/s", "MFU", "memory (GiB)")
        rows = [f"GPT-2, batch of {batch}, {flags}: {name}" for name in names]
        bench.measure(rows, gpt2_speed, batch, flags)


GROUPS = {"check": check, "17": speed_17, "16": speed_16, "14": speed_14, "15": speed_15}


# ---------- command line ----------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ",".join(GROUPS)
    parser.add_argument("--only", default=groups, help=f"some of {groups}")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which rows are skipped")
    parser.add_argument("--seeds", type=int, default=20, help="runs of step 14 per accuracy")
    parser.add_argument("--data_dir", type=Path, help="real MNIST and Shakespeare, if given")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu.md and gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if not set(args.only) <= GROUPS.keys():
        parser.error(f"--only {','.join(args.only)}: choose from {groups}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --device cpu runs every row at tiny sizes")
    return args


def main(argv=None):
    """Measure, print and write the table; return the rows."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    shm = Path("/dev/shm")  # checkpoints are written to memory where there is enough
    roomy = args.device == "cuda" and shm.is_dir() and shutil.disk_usage(shm).free > 30e9
    with tempfile.TemporaryDirectory(dir=shm if roomy else None) as name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/inductor"  # the first run compiles anew
        bench = Bench(args, Path(name))
        print(*bench.head, sep="\n", flush=True)
        bench.data = write_data(bench)
        wanted = [name for name in GROUPS if name in args.only]
        for i, name in enumerate(wanted):
            share = (bench.deadline - time.monotonic()) / (1 if bench.tiny else len(wanted) - i)
            bench.group, bench.group_deadline = name, time.monotonic() + share
            GROUPS[name](bench)
    return bench.rows


if __name__ == "__main__":
    sys.exit(any(row["note"].startswith("failed") for row in main()))
