"""The page for reviewers: all the source is on it, rightly compared, and it loads nothing."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import review
from steps import FOLDERS, ROOT, STEPS, definitions, source

DOCSTRING = '"""Step {}.\n\nParent:  {}\n\nText.\n"""\n'


class Page(HTMLParser):
    """Reads the page back: the pieces of train.py with their lines of code, and every tag."""

    def __init__(self, html):
        super().__init__()
        self.pieces = {}  # {id: {"status", "text", "new": {number: line}, "old", "marked"}}
        self.tags, self.open, self.ids, self.style, self.side = [], [], [], "", None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag in ("meta", "img", "br"):  # which are never closed
            return
        self.open.append((tag, attributes.get("class", "")))
        if tag == "details" and "piece" in attributes["class"]:
            status = attributes["class"].split()[-1]
            self.piece = {"status": status, "new": {}, "old": {}, "marked": [], "text": ""}
            self.pieces[attributes["id"]] = self.piece
        if "data-n" in attributes:
            self.side = "old" if ("div", "old") in self.open else "new"
            self.number = int(attributes["data-n"])
            self.piece[self.side][self.number] = ""
        if tag == "mark":
            self.piece["marked"].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        self.side = None if tag == "div" else self.side

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            self.style += data
        if ("small", "") in self.open and self.pieces:
            self.piece["text"] += data
        if self.side:
            self.piece[self.side][self.number] += data
            if ("mark", "") in self.open:
                self.piece["marked"][-1] += data


@pytest.fixture(scope="module")
def html():
    return review.build()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture
def plant(tmp_path):
    """Return a function that writes {folder: (parent, code)} and returns the page of that."""

    def write(folders, readme="# Title"):
        (tmp_path / "README.md").write_text(readme)
        for name, (parent, code) in folders.items():
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "train.py").write_text(DOCSTRING.format(name, parent) + code)
        return review.build(tmp_path)

    return write


@pytest.mark.parametrize("step", FOLDERS)
def test_every_line_of_a_step_is_on_the_page(page, step):
    tree, anchor = ast.parse(source(step)), f"step-{Path(step).name}"
    shown = {}
    for name, piece in page.pieces.items():
        if name.startswith(f"{anchor}.") and piece["status"] in ("new", "copied", "changed"):
            shown |= piece["new"]
    for number, line in enumerate(source(step).splitlines(), 1):
        if number > tree.body[0].end_lineno and line and not review.RULER.match(line):
            assert shown[number] == line


@pytest.mark.parametrize("step", FOLDERS)
def test_definitions_are_whole_and_compared_with_the_parents(page, step):
    declared = re.search(r"^Parent: +(.*)", source(step), re.M)[1]
    parents = [definitions(name) for name in declared.split(" + ") if name != "none"]
    anchor = f"step-{Path(step).name}"
    for name, code in definitions(step).items():
        piece = page.pieces[f"{anchor}.{name}"]
        others = [parent[name] for parent in parents if name in parent]
        expected = "new" if not others else "copied" if code in others else "changed"
        if expected == "copied" and "only the comments" in piece["text"]:
            expected = "changed"
        assert piece["status"] == expected
        assert "\n".join(piece["new"].values()).endswith(code)
        if expected == "changed":
            assert "\n".join(piece["old"].values()).endswith(tuple(others))
    missing = set(parents[0]) - set(definitions(step)) if parents else set()
    for name in missing:
        piece = page.pieces[f"{anchor}.{name}"]
        assert piece["status"] == "gone"
        assert "\n".join(piece["new"].values()).endswith(parents[0][name])


def test_two_parents(plant):
    one = "def f():\n    return 1, 2, 3, 4\n\n\ndef g():\n    return 1\n\n\ndef x():\n    pass\n"
    two = "def f():\n    return 1, 2, 3, 5\n\n\ndef g():\n    return 2\n\n\ndef y():\n    pass\n"
    both = "A = 1\n\n\n# Why.\ndef f():\n    return 9, 2, 3, 5\n\n\ndef g():\n    return 2\n"
    html = plant({"01_a": ("none", one), "02_b": ("none", two), "03_c": ("01_a + 02_b", both)})
    pieces = Page(html).pieces
    found = {name[10:]: p["status"] for name, p in pieces.items() if name.startswith("step-03_c.")}
    assert found == {"A": "new", "f": "changed", "g": "copied", "x": "gone"}
    assert "02_b" in pieces["step-03_c.f"]["text"]
    assert "copied from 02_b" in pieces["step-03_c.g"]["text"]
    assert list(pieces["step-03_c.f"]["old"].values()) == two.splitlines()[:2]
    assert list(pieces["step-03_c.f"]["new"].values()) == both.splitlines()[3:6]
    assert pieces["step-03_c.f"]["marked"] == ["1", "9"]


def test_changed_words_are_marked_and_escaped(plant):
    old = 'def f(x):\n    """Return x."""\n    print("<b>", x < 1 & 2)\n    return x + 1\n'
    new = old.replace("<b>", "<i>").replace("return x", "return scale * x")
    new = new.replace("Return x.", "Print something.")
    pieces = Page(plant({"01_a": ("none", old), "02_b": ("01_a", new)})).pieces
    assert pieces["step-02_b.f"]["marked"] == ["Return x", "Print something", "b", "i", "scale * "]
    assert list(pieces["step-02_b.f"]["new"].values()) == new.splitlines()
    assert list(pieces["step-02_b.f"]["old"].values()) == old.splitlines()


def test_statements_between_definitions_are_compared(plant):
    old = (
        "import math\n\nN = 1\n\n\ndef f():\n    pass\n\n\nTABLE = {1: 2}\n\n\ndef g():\n    pass\n"
    )
    new = old.replace("N = 1", "N = 2")
    html = plant({"01_a": ("none", old), "02_b": ("01_a", new)})
    found = {n[10:]: p["status"] for n, p in Page(html).pieces.items() if n.startswith("step-02_b")}
    assert found == {"imports": "changed", "f": "copied", "TABLE": "copied", "g": "copied"}


def test_electives_follow_the_steps(plant, html):
    code = "def f():\n    return {}\n"
    folders = {"01_a": ("none", code.format(1)), "electives/vae": ("01_a", code.format(2))}
    folders |= {"electives/vae_2": ("electives/vae", code.format(2))}
    planted = plant(folders)
    page = Page(planted)
    lessons = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert lessons == ["step-01_a", "step-vae", "step-vae_2"]
    assert page.pieces["step-vae.f"]["status"] == "changed"
    assert page.pieces["step-vae_2.f"]["status"] == "copied"
    assert ">electives<" in planted
    assert (">electives<" in html) == any(ROOT.glob("electives/*/train.py"))


def test_scripts_beside_train_are_shown(plant, tmp_path):
    (tmp_path / "01_a").mkdir()
    (tmp_path / "01_a" / "sample.py").write_text("print(1)\n\nprint(2)\n")
    (tmp_path / "01_a" / "plot.py").write_text("print(3)\n")
    pieces = Page(plant({"01_a": ("none", "x = 1\n")})).pieces
    assert list(pieces) == ["step-01_a.x", "step-01_a.sample.py"]
    assert pieces["step-01_a.sample.py"]["new"] == {1: "print(1)", 2: "", 3: "print(2)"}


@pytest.mark.parametrize("column", ["result", "measured"])
def test_cells_come_from_the_readme(plant, column):
    table = f"# T\n\n| step | idea | {column} | known |\n|---|---|---|---|\n"
    table += "| [01_a](01_a/train.py) [more](x.py) | `a < b` | **9**% [01](01_a/train.py) |"
    table += " [8](x.md) |\n"
    html = plant({"01_a": ("none", "x = 1\n")}, table)
    assert "<p class=idea><code>a &lt; b</code></p>" in html
    assert '<dd><b>9</b>% <a href="#step-01_a">01</a></dd>' in html
    assert "<dd>8</dd>" in html


def test_steps_stand_in_order_with_picture_idea_result_and_size(html, page):
    lessons = re.findall(r'<section class=lesson id="step-(\w+)">(.*?)</section>', html, re.S)
    assert [name for name, _ in lessons] == [Path(folder).name for folder in FOLDERS]
    for folder, (name, text) in zip(FOLDERS, lessons):
        pictures = {path.name for path in (ROOT / folder).glob("*.png")}
        assert set(re.findall('<img alt="(.*?)" src="data:image/png;base64,', text)) == pictures
        assert "<dt>Result</dt>" in text and "<dt>Known</dt>" in text
        assert not re.search("<p class=idea></p>", text)
        assert ("of it kept" in text) == (name != STEPS[0])


def test_the_page_loads_nothing(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes or tag == "a"
    assert "url(" not in page.style and "@import" not in page.style


def test_links_within_the_page_lead_somewhere(page):
    assert len(page.ids) == len(set(page.ids))
    targets = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {target[1:] for target in targets if target.startswith("#")} <= set(page.ids)
    assert all(target.startswith(("#", "http://", "https://")) for target in targets)


def test_the_command_line_writes_the_same_page(html, tmp_path):
    command = [sys.executable, ROOT / "tests" / "review.py", tmp_path / "new" / "page.html"]
    env = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == str(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == html
