"""electives/debugging: every planted bug fits its step, runs, and is caught by the named test."""

import ast
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import standins as standins_script
import torch
from steps import ROOT, STEPS, load_step, source

FOLDER = ROOT / "electives" / "debugging"
SLOW_IMPORTS = ["matplotlib.pyplot", "optax", "pytest", "tiktoken", "torch.distributed.fsdp"]
SLOW_IMPORTS += ["torch.optim", "torchvision.datasets", "torchvision.transforms.v2"]
sys.path.insert(0, str(FOLDER))
try:
    import play
    from bugs import BUGS
finally:
    sys.path.remove(str(FOLDER))


def name(bug):
    """Return a bug's name in the names of the tests, such as 09-2."""
    return f"{bug.step[:2]}-{play.bugs_of(bug.step).index(bug) + 1}"


# ---------- the table ----------


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_four_bugs_or_more(step):
    assert len(play.bugs_of(step)) >= 4


def test_bugs_are_in_the_order_of_the_steps():
    assert [bug.step for bug in BUGS] == sorted(bug.step for bug in BUGS)
    assert {bug.step for bug in BUGS} <= set(STEPS)


@pytest.mark.parametrize("bug", BUGS, ids=name)
def test_original_text_occurs_once_and_the_planted_file_compiles(bug):
    assert source(bug.step).count(bug.original) == 1
    planted = source(bug.step).replace(bug.original, bug.planted)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source(bug.step)))


@functools.cache
def functions(file):
    return {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=name)
def test_a_bug_has_all_that_a_player_reads(bug):
    assert 1 <= len(bug.hints) <= 2
    for text in (bug.symptom, bug.lesson, *bug.hints):
        assert text[-1] in ".?!)", text
        assert "  " not in text
    assert bug.name[-1] not in ".?!" and len(bug.name) < 70
    file, test = bug.test.split("::")
    assert re.sub(r"\[.*", "", test) in functions(file)
    for flag in re.findall(r"--(\w+)", bug.flags):
        assert f'"--{flag}"' in source(bug.step)


# ---------- ideas that the steps' own tests do not name ----------


def test_09_dropout_is_on_in_training_only():
    torch.manual_seed(0)
    model = load_step("09").ConvNet(10, dropout=0.5)
    torch.nn.init.normal_(model.out.weight)
    x = torch.randn(2, 1, 28, 28)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# ---------- play.py ----------

STUB = """import os, pathlib

def test_01_hand_gradient_equals_central_differences():
    source = pathlib.Path(os.environ["STEP_01"], "train.py").read_text()
    assert "d_y_hat.sum()}" in source

def test_the_examples_are_the_teachers_line_plus_noise():
    pass
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Let play.py see step 01 and, of its tests, short ones; be in an empty folder."""
    step = STEPS[0]
    (tmp_path / "checkout" / step / "out").mkdir(parents=True)
    (tmp_path / "checkout" / step / "train.py").write_text(source(step))
    (tmp_path / "checkout" / "tests").mkdir()
    (tmp_path / "checkout" / "tests" / "test_01_06_synthetic.py").write_text(STUB)
    (tmp_path / "empty").mkdir()
    bug = play.bugs_of(step)[1]
    others = [b._replace(test=re.sub(r"\[.*", "", b.test)) for b in play.bugs_of(step)[:3]]
    assert bug.planted == others[1].planted and "d_y_hat.mean()" in bug.planted
    monkeypatch.setattr(play, "BUGS", others)
    monkeypatch.setattr(play, "ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return tmp_path / "checkout" / step


def test_a_round_trip(checkout, tmp_path, capsys):
    def output(*flags, code=0):
        assert play.main(["01", *flags]) == code
        return capsys.readouterr().out

    bug, copy = play.BUGS[1], tmp_path / "empty" / "debugging" / "01"
    said = output("--bug", "2")
    assert " ".join(bug.symptom.split()) in " ".join(said.split())
    assert bug.lesson[:20] not in said and bug.name not in said
    assert sorted(path.name for path in copy.iterdir()) == [play.STATE, "train.py"]
    original, planted = ((folder / "train.py").read_text() for folder in (checkout, copy))
    assert planted == original.replace(bug.original, bug.planted) != original
    hints = [output("--hint") for _ in range(3)]
    for text, hint in zip(hints, bug.hints):
        assert " ".join(hint.split()) in " ".join(text.split())
    assert "no more hints" in hints[2]
    said = output("--check", code=1)
    assert "Not yet: 'hand gradient equals central differences' fails (assert" in said
    assert bug.name not in said
    said = output("--solution").splitlines()
    assert "-" + bug.planted in said and "+" + bug.original in said
    assert (copy / "train.py").read_text() == planted  # only shown
    (copy / "train.py").write_text(planted + "def (\n")
    assert f"line {len(planted.splitlines()) + 1} of" in output("--check", code=1)
    (copy / "train.py").write_text(original)
    said = output("--check")
    assert "congratulations" in said and bug.name in said
    (checkout.parent / "tests" / "test_01_06_synthetic.py").write_text("import absent")
    with pytest.raises(OSError, match=r"do not run on .*No module named 'absent'"):
        play.main(["01", "--check"])


def test_bug_and_seed_choose(checkout, tmp_path):
    def planted(*flags):
        assert play.main(["01_linreg_numpy", *flags, "--dir", "copy", "--overwrite"]) == 0
        return json.loads((tmp_path / "empty" / "copy" / play.STATE).read_text())["bug"]

    assert [planted("--bug", str(n)) for n in (1, 2, 3)] == [1, 2, 3]
    drawn = [planted() for _ in range(12)]
    assert all(a != b for a, b in zip([3, *drawn], drawn))  # never the same again
    seeds = {planted("--bug", "1") and planted("--seed", str(seed)) for seed in range(12)}
    assert seeds == {2, 3}


def test_mistakes_are_one_line_and_nothing_is_lost(checkout, tmp_path):
    def error_of(*flags):
        command = [sys.executable, FOLDER / "play.py", *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and not result.stdout
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        return result.stderr

    for flags in (["18"], ["1"], [""], ["linreg"], ["../01"]):
        assert "01 to 17" in error_of(*flags)
    for n in ("0", "99"):
        assert f"--bug {n}" in error_of("01", "--bug", n)
    assert "debugging/01" in error_of("01", "--check")
    assert not list((tmp_path / "empty").iterdir())
    mine = tmp_path / "empty" / "debugging" / "01" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "--overwrite replaces" in error_of("01")
    assert "no copy that play.py made" in error_of("01", "--overwrite")
    (mine.parent / play.STATE).write_text("{")
    assert "damaged" in error_of("01", "--hint")
    assert {path.name for path in mine.parent.iterdir()} == {"notes.txt", play.STATE}


# ---------- proof ----------


def run_pytest(argv, env, data, log):
    """Run pytest in this new process, on the copy that env names; its exit code is pytest's."""
    os.environ |= env
    os.chdir(ROOT)
    standins_script.main = lambda argv: shutil.copytree(data, argv[0], dirs_exist_ok=True)  # faster
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *argv]))


def run_tests(tests, folder, data, **env):
    """Run tests in a process of its own, with the stand-ins in data; return {test: None or why}."""
    context = multiprocessing.get_context("forkserver")  # which imports what takes long only once
    context.set_forkserver_preload(SLOW_IMPORTS)
    argv = [*tests, f"--junitxml={folder / 'report.xml'}", f"--basetemp={folder / 'tests'}"]
    process = context.Process(target=run_pytest, args=(argv, env, data, folder / "log"))
    process.start()
    process.join()
    assert process.exitcode in (0, 1), (folder / "log").read_text()[-3000:]
    found = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        file = case.get("classname").removeprefix("tests.")
        reason = None if problem is None else problem.get("message")
        found[f"tests/{file}.py::{case.get('name')}"] = reason
    return found


@pytest.fixture(scope="module")
def healthy(request, tmp_path_factory, standins):
    """What becomes of the named tests of all bugs under test on the steps as they are."""
    bugs = [item.callspec.params["bug"] for item in request.session.items
            if item.originalname == "test_a_planted_bug_runs_and_is_caught"]  # fmt: skip
    tests = dict.fromkeys(f"tests/{bug.test}" for bug in bugs)
    return run_tests(tests, tmp_path_factory.mktemp("healthy"), standins)


@pytest.mark.bugs
@pytest.mark.parametrize("bug", BUGS, ids=name)
def test_a_planted_bug_runs_and_is_caught(bug, healthy, standins, tmp_path):
    test = f"tests/{bug.test}"
    smoke = f"tests/test_smoke.py::test_tiny_run_leaves_what_it_should[{bug.step}]"
    assert healthy[test] is None
    play.plant(bug, tmp_path / "copy")
    copy = {f"STEP_{bug.step[:2]}": str(tmp_path / "copy")}
    found = run_tests([smoke, test], tmp_path, standins, **copy)
    assert found[smoke] is None  # a bug that is seen at once teaches little
    assert re.match("assert|AssertionError|Failed", found[test] or "nothing failed")


@pytest.mark.bugs
def test_check_runs_the_steps_own_tests_on_the_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert play.main(["01", "--bug", "1"]) == 0
    assert play.main(["01", "--check"]) == 1
    said = capsys.readouterr().out
    assert "Not yet: 'hand gradient equals central differences' fails (assert" in said
    assert f"STEP_01={tmp_path / 'debugging' / '01'} python -m pytest {ROOT}/tests/test_01" in said
