"""The docstrings say what each step changes; here they are held against the code."""

import ast
import re
import shlex

import pytest
from steps import ROOT, STEPS, definitions, load_step, source

HEADERS = re.compile(r"^(Parent|New|Changed|Gone): +(.*(?:\n {9}\S.*)*)", re.M)


def header(step):
    """Return {"Parent": [...], "New": [...], ...} from the docstring of a step."""
    doc = ast.get_docstring(ast.parse(source(step)))
    found = {name: re.split(r"[\s,+]+", text.strip()) for name, text in HEADERS.findall(doc)}
    return {name: found.get(name, []) for name in ("Parent", "New", "Changed", "Gone")}


def test_the_steps_are_numbered_without_a_gap():
    assert [int(step[:2]) for step in STEPS] == list(range(1, len(STEPS) + 1))


@pytest.mark.parametrize("step", STEPS)
def test_docstring_tells_the_truth_about_the_parent(step):
    told = header(step)
    if step.startswith("01"):
        assert told == {"Parent": ["none"], "New": [], "Changed": [], "Gone": []}
        return
    assert told["Parent"], f"{step} declares no parent"
    assert all(parent in STEPS and parent < step for parent in told["Parent"])
    mine, theirs = definitions(step), [definitions(parent) for parent in told["Parent"]]
    inherited = {name for name in mine if any(name in parent for parent in theirs)}
    copied = {n for n in inherited if any(parent.get(n) == mine[n] for parent in theirs)}
    assert sorted(told["New"]) == sorted(mine.keys() - inherited)
    assert sorted(told["Changed"]) == sorted(inherited - copied)
    assert sorted(told["Gone"]) == sorted(theirs[0].keys() - mine.keys())


@pytest.mark.parametrize("step", STEPS)
def test_definitions_keep_their_parents_order(step):
    names = list(definitions(step))
    for parent in header(step)["Parent"][:1]:
        shared = [name for name in definitions(parent) if name in names] if parent != "none" else []
        assert [name for name in names if name in shared] == shared


@pytest.mark.parametrize("step", STEPS)
def test_sections_stand_in_the_fixed_order(step):
    order = "data model optimizer evaluation checkpoint training command line".replace(
        "command line", "command_line"
    ).split()
    sections = re.findall(r"^# -{10} (.+) -{10}$", source(step), re.M)
    places = [order.index(name.replace(" ", "_")) for name in sections]
    assert places == sorted(set(places))
    assert {"data", "model", "training", "command line"} <= set(sections)


@pytest.mark.parametrize("step", STEPS)
def test_plot_is_the_same_but_for_title_and_panels(step):
    def common(name):
        text = (ROOT / name / "plot.py").read_text()
        return re.sub(r"^(TITLE|PANELS) = (.*?)\n(?=#|\n|PANELS)", r"\1\n", text, flags=re.M | re.S)

    assert common(step) == common(STEPS[0])


@pytest.mark.parametrize("step", STEPS)
def test_every_flag_is_read(step):
    flags = re.findall(r'flag\(\s*"--(\w+)"', source(step))
    tree = ast.parse(source(step))
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "parse_args"]
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"
    }
    assert flags
    assert set(flags) <= read | {"recipe"}  # which is a name for values of other flags


@pytest.mark.parametrize("step", STEPS)
def test_what_the_docstring_says_to_try_is_a_command_line(step):
    doc = ast.get_docstring(ast.parse(source(step)))
    flag = r"--\w[\w-]*(?: (?!--)[\w.\":]+)?"
    text = " ".join(re.search(r"^Try: (.*?)^Source:", doc, re.M | re.S)[1].split())
    groups = [match[0] for match in re.finditer(rf"{flag}(?: {flag})*", text)]
    assert groups or step.startswith("02")  # there a line is to be taken out
    for group in groups:
        load_step(step).parse_args(shlex.split(group))  # leaves with an error where it is none


@pytest.mark.parametrize("step", STEPS)
def test_a_step_imports_nothing_from_the_repository(step):
    tree = ast.parse(source(step))
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    own = {"tests", "steps", "standins", "conftest", *STEPS}
    assert not own & {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("step", STEPS)
def test_the_picture_is_there_and_small(step):
    picture = (ROOT / step / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) <= 60 * 1024
