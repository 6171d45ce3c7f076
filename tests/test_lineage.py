"""The docstrings say what each step changes; here they are held against the code."""

import ast
import re
import shlex

import pytest
from steps import FOLDERS, ROOT, STEPS, definitions, load_step, source

# Readers learn the field's language here, so the project writes the terms that a textbook has and
# a search finds, and American spelling. These words of earlier drafts are not to come back.
NOT_THE_FIELDS_TERMS = [
    # British spelling
    r"\b(learnt|spelt|burnt|whilst|grey|artefacts?|catalogues?|programmes?)\b",
    r"grey(scale|ed)|colour|behaviour|neighbour|favour|honour|\blabour|\bcentre|\b(kilo)?metres?\b",
    r"(normal|initial|regular|general|optim|minim|maxim|memor|summar|organ|recogn|synchron)is(e|ing)",
    r"(serial|parallel|token|quant|visual|real|random|final|factor|orthogonal|vector|penal)is(e|ing)",
    r"(normal|initial|regular|general|optim|minim|maxim|memor|organ|parallel|token|quant)isation",
    r"\banalys(e|ed|ing)\b|(label|model|travel|signal)l(ed|ing)\b|\bfulfil\b",
    # learning rate, update, iteration
    r"step downhill|share of a step|share of units|rising rate|at its highest|speeds? the descent",
    r"\b(training|gradient|optimizer|update|residual|warm-?up|descent|Adam|SGD) steps?\b",
    r"\bsteps? (of|by) (SGD|Adam|Muon|training|gradient|the optimizer)\b|\bsteps to train\b",
    r"minibatches to train on|pull (of|on) (the )?(matrices|weights)",
    # per, not a
    r"\bnats an? \w",
    r"\b(images|tokens|words|examples|seconds|iterations) an? (second|day|word|token|GPU|epoch)",
    r"\b(seconds?|ms|minutes?|kernels|updates|passes) an? (image|iteration|update|batch|epoch)",
    # prediction, sampling
    r"\bguess|likeliest|less: safer|draws? a word|ask again|is no word|before it reads",
    r"\bthe model wants\b|as often as it occurs|cross_entropy does not look",
    # what a model and its layers do
    r"luck of the draw|give or take|comes? to rest|by heart|bends? its|before it scores",
    r"becomes a sum of products|back through the record|holds the gap|keeps the numbers",
    r"also to forget|vectors side by side|what it gathered|but for a few strokes",
    r"each word of a window teaches|faster than for its|float ends|as name_loss",
    # machinery
    r"tells what made|leave with one line|whole and checked|for every way a network|whoever many",
    r"keep of metrics|what it cannot compile|hands its blocks|repeats what failed|what was so",
    r"in a hurry|goes on after a kill|nothing else is said",
    # what is still to be filled in
    r"\b(AAA|BBB|CCC|XXX|TODO|FIXME|TBD)\b",
]
OLD_NAMES = set(
    "best_loss train_part made_by OptaxAdam start_run log_interval talks whole turned sharded_like "
    "asked wave made about".split()
)
PROGRAMS = [*ROOT.glob("[0-9][0-9]_*/*.py"), *ROOT.glob("electives/*/*.py")]
READ = [*sorted(PROGRAMS), ROOT / "README.md"]

HEADERS = re.compile(r"^(Parent|New|Changed|Gone): +(.*(?:\n {9}\S.*)*)", re.M)


def header(step):
    """Return {"Parent": [...], "New": [...], ...} from the docstring of a step."""
    doc = ast.get_docstring(ast.parse(source(step)))
    found = {name: re.split(r"[\s,+]+", text.strip()) for name, text in HEADERS.findall(doc)}
    return {name: found.get(name, []) for name in ("Parent", "New", "Changed", "Gone")}


def test_the_steps_are_numbered_without_a_gap():
    assert [int(step[:2]) for step in STEPS] == list(range(1, len(STEPS) + 1))


@pytest.mark.parametrize("step", FOLDERS)
def test_docstring_tells_the_truth_about_the_parent(step):
    told = header(step)
    if step.startswith("01"):
        assert told == {"Parent": ["none"], "New": [], "Changed": [], "Gone": []}
        return
    assert told["Parent"], f"{step} declares no parent"
    assert all(parent in FOLDERS and parent < step for parent in told["Parent"])
    mine, theirs = definitions(step), [definitions(parent) for parent in told["Parent"]]
    inherited = {name for name in mine if any(name in parent for parent in theirs)}
    copied = {n for n in inherited if any(parent.get(n) == mine[n] for parent in theirs)}
    assert sorted(told["New"]) == sorted(mine.keys() - inherited)
    assert sorted(told["Changed"]) == sorted(inherited - copied)
    assert sorted(told["Gone"]) == sorted(theirs[0].keys() - mine.keys())


@pytest.mark.parametrize("step", FOLDERS)
def test_definitions_keep_their_parents_order(step):
    names = list(definitions(step))
    for parent in header(step)["Parent"][:1]:
        shared = [name for name in definitions(parent) if name in names] if parent != "none" else []
        assert [name for name in names if name in shared] == shared


@pytest.mark.parametrize("step", FOLDERS)
def test_sections_stand_in_the_fixed_order(step):
    order = ["data", "model", "optimizer", "evaluation", "checkpoint", "training", "command line"]
    sections = re.findall(r"^# -{10} (.+) -{10}$", source(step), re.M)
    places = [order.index(name) for name in sections]
    assert places == sorted(set(places))
    assert {"data", "model", "training", "command line"} <= set(sections)
    below = re.findall(r"^# -{10} .+ -{10}\n(.*)", source(step), re.M)
    assert all(re.match(r"\S", line) for line in below)  # a section starts under its ruler


@pytest.mark.parametrize("step", FOLDERS)
def test_plot_is_the_same_but_for_title_and_panels(step):
    def common(name):
        text = (ROOT / name / "plot.py").read_text()
        return re.sub(r"^(TITLE|PANELS) = (.*?)\n(?=#|\n|PANELS)", r"\1\n", text, flags=re.M | re.S)

    assert common(step) == common(STEPS[0])


@pytest.mark.parametrize("step", FOLDERS)
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


@pytest.mark.parametrize("step", FOLDERS)
def test_what_the_docstring_says_to_try_is_a_command_line(step):
    doc = ast.get_docstring(ast.parse(source(step)))
    flag = r"--\w[\w-]*(?: (?!--)[\w\":]+(?:\.\w+)*)?"
    text = " ".join(re.search(r"^Try: (.*?)^Source:", doc, re.M | re.S)[1].split())
    groups = [match[0] for match in re.finditer(rf"{flag}(?: {flag})*", text)]
    assert groups or re.search("delete|remove", text)  # of the code
    for group in groups:
        load_step(step).parse_args(shlex.split(group))  # leaves with an error where it is none


@pytest.mark.parametrize("step", FOLDERS)
def test_ctrl_c_is_handled_before_the_slow_imports(step):
    def head(name):
        body = ast.parse(source(name)).body
        n = next(i for i, node in enumerate(body) if isinstance(node, ast.If))
        return [ast.unparse(node) for node in body[1 : n + 1]]

    *imports, guard = head(step)
    # The steps from 07 on run on several threads, and say how long these wait for each other.
    parents = [] if step.startswith(("01", "07")) else header(step)["Parent"]
    assert all([*imports, guard] == head(parent) for parent in parents)
    assert ("GOMP_SPINCOUNT" in guard) == (min([step, *parents]) >= "07")
    assert set(imports) <= {"import os", "import signal", "import sys"}
    assert guard.startswith("if __name__ == '__main__':\n    signal.signal(signal.SIGINT, ")


def test_ctrl_c_is_handled_in_the_scripts_beside_train_too():
    scripts = {path for step in STEPS for path in (ROOT / step).glob("*.py")}
    beside = [path for path in scripts if path.stem not in ("train", "plot")]
    assert len(beside) >= 7
    for path in beside:
        before_the_slow_imports = path.read_text().split("\nimport argparse\n")[0]
        assert "signal.signal(signal.SIGINT, lambda *_: os._exit(130))" in before_the_slow_imports


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_the_fields_own(path):
    text = re.sub(r"\s+(#\s)?\s*", " ", path.read_text())  # a phrase may be broken over two lines
    found = {
        text[max(0, match.start() - 30) : match.end() + 20]
        for phrase in NOT_THE_FIELDS_TERMS
        for match in re.finditer(phrase, text, re.I if phrase.islower() else 0)
    }
    assert not found
    if path.suffix == ".py":
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {getattr(n, key, None) for n in nodes for key in ("id", "arg", "name")}
        assert not names & OLD_NAMES


@pytest.mark.parametrize("step", FOLDERS)
def test_a_step_imports_nothing_from_the_repository(step):
    tree = ast.parse(source(step))
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    own = {"tests", "steps", "standins", "conftest", "electives", *STEPS}
    assert not own & {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("step", FOLDERS)
def test_the_picture_is_there_and_small(step):
    assert (ROOT / step / "loss.png").exists()
    for path in (ROOT / step).glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size <= 60 * 1024
