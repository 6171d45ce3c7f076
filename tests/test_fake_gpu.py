"""Steps 14 to 17 on a simulated GPU, which is good for devices but computes nothing.

torch's FakeTensors have shapes, types and devices, but no values. An operation on tensors of
different devices fails as it would on a GPU, and so does one whose result has a shape that depends
on values (such as x[mask]): on a GPU it would wait. Numbers that train reads are 0 or 1.
"""

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # imported before torch.Generator is replaced
import torch.distributed.fsdp  # likewise
from steps import ROOT, load_step, run_main, tiny_flags
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
aten = torch.ops.aten
REAL = SimpleNamespace(to=torch.Tensor.to, Generator=torch.Generator, tolist=FakeTensor.tolist)


class FakeGPU(FakeTensorMode):
    """Counts how often the CPU waits for the GPU: to read a number, or to copy a tensor."""

    n_waits = 0

    def dispatch(self, func, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, FakeTensor):
                value.constant = None  # a small tensor's values, which would need a real GPU
        if func is aten._local_scalar_dense.default:
            self.n_waits += args[0].is_cuda
            return {torch.bool: True, torch.float32: 1.0, torch.float64: 0.0}.get(
                args[0].dtype, int(args[0].is_cuda)
            )
        if func is aten._pin_memory.default:
            assert not args[0].is_cuda
            return args[0].clone()
        if func is aten._fused_sgd_.default:  # it has no fake implementation
            assert len({tensor.device for tensors in args for tensor in tensors}) == 1
            return None
        if func is aten._to_copy.default:
            target = kwargs.get("device", args[0].device)
            self.n_waits += target.type != args[0].device.type and not kwargs.get("non_blocking")
        if func is aten.index.Tensor:  # indices on the CPU are copied to the GPU
            self.n_waits += any(i is not None and i.is_cuda != args[0].is_cuda for i in args[1])
        return super().dispatch(func, types, args, kwargs)

    def __deepcopy__(self, memo):
        return self


def tensor_to(self, *args, **kwargs):
    """Tensor.to, with an index for "cuda": torch would ask the driver for it."""

    def index(value):
        is_device = isinstance(value, str | torch.device)
        is_gpu = is_device and torch.device(value) == torch.device("cuda")
        return torch.device("cuda", 0) if is_gpu else value

    return REAL.to(self, *map(index, args), **{key: index(v) for key, v in kwargs.items()})


def tolist(self):
    """Tensor.tolist, of one or two dimensions: a single copy to the CPU."""
    n_waits = self.fake_mode.n_waits
    values = REAL.tolist(self)
    self.fake_mode.n_waits = n_waits + self.is_cuda
    return values


def module_to(self, device, memory_format=None):
    """Module.to, which cannot replace the values of FakeTensors."""
    new = {None: None}
    for module in self.modules():
        for name, p in module._parameters.items():
            if p not in new:
                layout = memory_format if p.ndim == 4 else None
                moved = p.detach().to(device, memory_format=layout or torch.preserve_format)
                new[p] = torch.nn.Parameter(moved)
            module._parameters[name] = new[p]
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device)
    return self


def backward(self):
    """Add a gradient to every parameter that self depends on: autograd itself needs a driver."""
    nodes, seen = [self.grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if (p := getattr(node, "variable", None)) is not None:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad + torch.zeros_like(p)


@pytest.fixture
def gpu(monkeypatch):
    """A simulated H100; what is saved is kept in memory."""
    event, saved = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0), []

    def save(value, file):
        file.write(b"%d" % len(saved))
        saved.append(tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value))

    def load(path, map_location, weights_only):
        value = copy.deepcopy(saved[int(path.read_text())])
        return tree_map(lambda v: v.to(map_location) if isinstance(v, torch.Tensor) else v, value)

    # torch before 2.14 would create a CUDA context.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
    with FakeGPU() as mode:
        functions = {
            "is_available": lambda: True,
            "_lazy_init": lambda: None,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_device_name": lambda device=None: "NVIDIA H100",
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=80 * 2**30),
            "max_memory_allocated": lambda device=None: 2**30,
            "device_count": lambda: 1,
            "is_current_stream_capturing": lambda: False,
            "set_device": lambda device: None,
            "synchronize": lambda: None,
            "Event": lambda enable_timing: event,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch, "Generator", lambda device="cpu": REAL.Generator())
        monkeypatch.setattr(torch, "save", save)
        monkeypatch.setattr(torch, "load", load)
        monkeypatch.setattr(torch.Tensor, "to", tensor_to)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(FakeTensor, "tolist", tolist)
        monkeypatch.setattr(
            torch.Tensor, "__format__", lambda self, spec: format(self.item(), spec)
        )
        monkeypatch.setattr(torch.nn.Module, "to", module_to)
        yield mode


@pytest.fixture(scope="module")
def data(standins):
    """Return the folder of stand-ins, and step 15's data sets, read without FakeTensors."""
    step = load_step("15_imagenet")
    return standins, step.load_data(step.parse_args(tiny_flags("15_imagenet", standins, "out")))


def run(name, data, out_dir, monkeypatch, *flags):
    """Train a step on the simulated GPU for as long as its tiny flags say."""
    step, (folder, images) = load_step(name), data

    def load_batches(args, images, batches):  # instead of worker processes that decode images
        for batch in batches:
            x = torch.zeros(len(batch), 3, args.train_size, args.train_size, dtype=torch.uint8)
            yield x.pin_memory(), torch.zeros(len(batch), dtype=torch.long).pin_memory()

    def load_digits(args, device):
        digits = TensorDataset(torch.zeros(600, 1, 28, 28).byte(), torch.zeros(600).long())
        return 2 * [TensorDataset(*(tensor.to(device) for tensor in digits.tensors))]

    monkeypatch.setattr(step, "plot_run", lambda out_dir: "no picture")
    if name == "14_resnet_gpu":
        monkeypatch.setattr(step, "load_data", load_digits)
    if name == "15_imagenet":
        monkeypatch.setattr(step, "load_data", lambda args: images)
        monkeypatch.setattr(step, "load_batches", load_batches)
        monkeypatch.setattr(step, "STATS", torch.ones(2, 3, 1, 1))
    flags = [*tiny_flags(name, folder, out_dir), *MORE.get(name, []), "--device", "cuda", *flags]
    return step.train(step.parse_args(list(map(str, flags))))


MORE = {  # so that evaluation and sampling are short
    "16_nanogpt_shakespeare": ["--max_new_tokens", 2],
    "17_gpt2_multigpu": "--batch_size 16 --total_batch_tokens 512 --max_new_tokens 2".split(),
}
RUNS = [
    ("14_resnet_gpu", "", 0),
    ("15_imagenet", "--mixup 0.2 --micro_batch_size 4", 0),
    ("16_nanogpt_shakespeare", "--no-compile", 0),
    ("16_nanogpt_shakespeare", "--no-compile --optimizer adamw --no-sdpa --dropout 0.1", 0),
    ("17_gpt2_multigpu", "--no-compile --optimizer muon", 1),
    ("17_gpt2_multigpu", "--no-compile --dtype float16 --recompute", 1),
]


@pytest.mark.parametrize(("name", "flags", "n_waits"), RUNS)
def test_everything_is_on_the_gpu(
    name, flags, n_waits, data, gpu, bytes_as_bpe, tmp_path, monkeypatch
):
    """A run, and one that goes on from its checkpoint; an update makes the CPU wait n_waits times.

    train calls schedule once per update. No evaluation lies between the first two calls.
    """
    step, waits, first = load_step(name), {}, []
    schedule, evaluate = step.schedule, step.evaluate

    def spy(args, iter_num):
        waits[iter_num] = gpu.n_waits
        first.append(gpu.n_waits)
        return schedule(args, iter_num)

    def evaluate_without_count(*args):
        n, result = gpu.n_waits, evaluate(*args)
        gpu.n_waits = n
        return result

    monkeypatch.setattr(step, "schedule", spy)
    monkeypatch.setattr(step, "evaluate", evaluate_without_count)
    record = run(name, data, tmp_path, monkeypatch, *flags.split())
    assert record["iter"] == max(waits)
    assert waits[1] - waits[0] == n_waits
    if name == "14_resnet_gpu":
        assert waits[record["iter"]] == first[0]  # minibatches, too, are made without waiting
    else:
        more = ["--max_iters", record["iter"] + 2, "--init_from", "resume"]
        assert run(name, data, tmp_path, monkeypatch, *flags.split(), *more)["iter"] == more[1]


def test_the_gradient_of_the_loss_of_step_17_is_computed_on_the_gpu(gpu):
    """The backward pass of step 17's loss, which the tests above leave out."""
    logits = torch.zeros(2050, 8, device="cuda:0", dtype=torch.bfloat16)
    targets = torch.zeros(2050, device="cuda:0", dtype=torch.long)
    context = SimpleNamespace(saved_tensors=(logits, targets), n=1024)
    one = torch.ones((), device="cuda:0")
    gradient, _ = load_step("17_gpt2_multigpu").CrossEntropy.backward(context, one)
    assert gradient is logits
    assert gpu.n_waits == 0


@pytest.mark.parametrize("folder", ["16_nanogpt_shakespeare", "17_gpt2_multigpu"])
def test_the_trained_model_is_used_on_the_gpu(
    folder, data, gpu, bytes_as_bpe, tmp_path, monkeypatch
):
    """sample.py, and hellaswag.py of step 17."""
    run(folder, data, tmp_path, monkeypatch, "--no-compile")
    flags = [*tiny_flags(folder, data[0], tmp_path), "--device", "cuda"]
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"ctx": "document 1", "endings": [" says", "zz"], "label": 0}')
    scripts = {"sample.py": flags, "hellaswag.py": [questions, *flags]}
    for script in scripts if folder.startswith("17") else ["sample.py"]:
        for name in ("train", "sample"):  # each step has others
            monkeypatch.delitem(sys.modules, name, raising=False)
        before = gpu.n_waits
        assert run_main(folder, *scripts[script], script=script) == (0, "")
        assert gpu.n_waits > before
    for name in ("train", "sample"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["14", "15", "16", "17"])
def test_the_benchmark_compares_an_update_on_the_gpu(name, gpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    benchmark = importlib.import_module("gpu")
    monkeypatch.setattr(benchmark.torch.backends.cudnn, "version", lambda: 0)
    bench = benchmark.Bench(benchmark.parse_args(["--out", str(tmp_path)]), tmp_path)
    logits, changes = benchmark.one_update(bench, name, "cuda", "bfloat16")
    assert len(logits) == 4
    assert not logits.is_cuda
    assert changes.ndim == 1
