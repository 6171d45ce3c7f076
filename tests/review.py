"""Write review.html, one self-contained page that shows every step as a lesson beside its parent.

    python tests/review.py [OUTPUT]     (default: review.html at the root of the repository)

A train.py is cut into pieces: its top-level functions and classes, each with the comments directly
above it, and the statements between them. Every piece is compared with those of the same name in
the parents that the docstring declares. It is new, copied (equal to that of any parent) or changed,
and then it is shown beside the most similar one. A piece of the first parent that has no successor
is gone.
"""

import ast
import base64
import re
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES
from steps import ROOT

RULER = re.compile(r"# -{10} (.+) -{10}$")
FIELD = re.compile(r"(Parent|New|Changed|Gone|Try|Source): +(.*)", re.S)
COLORED = re.compile(r"[ckms]|n[cdf]$|fm|ow")  # Pygments' short names of the token types colored
CONTEXT = 3  # equal lines that stay visible on each side of a change
MIN_FOLD = 8  # fewer equal lines than this are not folded


# ---------- a train.py and its pieces ----------
@dataclass
class Piece:
    """A definition with the comments above it, or the statements between two definitions."""

    names: list  # the definition's name; otherwise "imports", "main guard", names assigned to
    section: str  # the text of the ruler above it
    first: int  # line number, from 1
    lines: list
    n_comments: int = 0  # so many of the lines are the comments above a definition


@dataclass
class Lesson:
    """A step or an elective."""

    folder: str  # relative to the root
    source: str
    pictures: dict  # {file name: content}, loss.png first
    scripts: dict  # {file name: source} of the other programs beside train.py

    def __post_init__(self):
        self.name = self.folder.split("/")[-1]
        self.anchor = f"step-{self.name}"
        self.docstring = ast.get_docstring(ast.parse(self.source)) or self.name
        self.pieces = split(self.source)
        self.tokens = highlight(self.source)
        self.parents = []  # Lessons: find_lessons fills the list

    def size(self):
        """Return (lines added, lines removed, share kept), measured against the first parent."""
        return size(self.parents[0].source.splitlines(), self.source.splitlines())


def find_lessons(root):
    """Return {name: Lesson}: the numbered steps in order, then the electives."""
    lessons = {}
    for pattern in ("[0-9][0-9]_*", "electives/*"):
        for path in sorted(root.glob(f"{pattern}/train.py")):
            folder = path.parent
            pictures = sorted(folder.glob("*.png"), key=lambda p: (p.name != "loss.png", p.name))
            others = sorted({*folder.glob("*.py")} - {path, path.with_name("plot.py")})
            lessons[folder.name] = Lesson(
                folder.relative_to(root).as_posix(),
                path.read_text(encoding="utf-8"),
                {picture.name: picture.read_bytes() for picture in pictures},
                {other.name: other.read_text(encoding="utf-8") for other in others},
            )
    for lesson in lessons.values():
        declared = re.search(r"^Parent: +(.*)", lesson.docstring, re.M)
        names = re.findall(r"\w+", declared[1]) if declared else []
        lesson.parents = [lessons[name] for name in names if name in lessons]
    return lessons


def split(source):
    """Cut a module into pieces, in file order: all lines but docstring, rulers, blanks between."""
    lines, body = source.splitlines(), ast.parse(source).body
    owner = {i: "ruler" for i, line in enumerate(lines, 1) if RULER.match(line)}
    comments = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = code = min([node.lineno] + [d.lineno for d in node.decorator_list])
            while lines[first - 2].startswith("#") and first - 1 not in owner:
                first -= 1
            owner |= dict.fromkeys(range(first, node.end_lineno + 1), node)
            comments[node] = code - first
    if body and isinstance(body[0], ast.Expr):
        owner |= dict.fromkeys(range(1, body[0].end_lineno + 1), "docstring")

    pieces, section = [], ""
    for who, numbers in groupby(range(1, len(lines) + 1), owner.get):
        numbers = list(numbers)
        if who == "ruler":
            section = RULER.match(lines[numbers[0] - 1])[1]
        while not lines[numbers[0] - 1].strip() and len(numbers) > 1:
            del numbers[0]
        while not lines[numbers[-1] - 1].strip() and len(numbers) > 1:
            del numbers[-1]
        text = lines[numbers[0] - 1 : numbers[-1]]
        if who is None and any(text):
            names = statement_names([node for node in body if node.lineno in numbers])
            pieces.append(Piece(names, section, numbers[0], text))
        elif who in comments:
            pieces.append(Piece([who.name], section, numbers[0], text, comments[who]))
    return pieces


def statement_names(nodes):
    """Return names for statements outside definitions: what they assign, else what they are."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.append("imports")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
            names += [n.id for n in stored if isinstance(n, ast.Name)]
    kind = "main guard" if any(isinstance(node, ast.If) for node in nodes) else "statements"
    return list(dict.fromkeys(names)) or [kind if nodes else "comment"]


# ---------- comparison with the parents ----------
def compare(piece, parents):
    """Return (status, parent, the parent's piece); the status is new, copied or changed."""
    found = [(p, other) for p in parents for other in p.pieces if {*other.names} & {*piece.names}]
    for parent, other in found:
        if other.lines == piece.lines:
            return "copied", parent, other
    if not found:
        return "new", None, None
    same = [(parent, other) for parent, other in found if same_code(other, piece)]
    closest = max(same or found, key=lambda pair: similarity(pair[1].lines, piece.lines))
    return "changed", *closest


def same_code(old, new):
    """Say whether two pieces differ at most in the comments above the definition."""
    return old.lines[old.n_comments :] == new.lines[new.n_comments :]


def gone(lesson):
    """Return the pieces of the first parent without a successor."""
    names = {name for piece in lesson.pieces for name in piece.names}
    return [p for parent in lesson.parents[:1] for p in parent.pieces if not names & {*p.names}]


def similarity(old, new):
    """Return the share of words, 0 to 1, that two lists of lines have in common, in order."""
    words = [re.findall(r"\w+|[^\w\s]", "\n".join(lines)) for lines in (old, new)]
    return SequenceMatcher(None, *words, autojunk=False).ratio()


def size(old, new):
    """Return (lines added, lines removed, share of the old lines kept)."""
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    kept = sum(block.size for block in blocks)
    return len(new) - kept, len(old) - kept, kept / max(1, len(old))


def align(old, new):
    """Yield hunks (kind, range of the old lines, range of the new lines), in order.

    The kinds: "same" lines; "edit", one line made into a similar one; "other" lines, which are
    removed on one side and added on the other.
    """
    matcher = SequenceMatcher(lambda line: not line.strip(), old, new, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            yield "same", range(i, i_end), range(j, j_end)
            continue
        pairs = [(i + k, j + m) for k, m in similar_pairs(old[i:i_end], new[j:j_end])]
        for k, m in [*pairs, (i_end, j_end)]:
            if i < k or j < m:
                yield "other", range(i, k), range(j, m)
            if k < i_end:
                yield "edit", range(k, k + 1), range(m, m + 1)
            i, j = k + 1, m + 1


def similar_pairs(old, new, threshold=0.5):
    """Return the pairs of indices, rising on both sides, of greatest total similarity."""
    best = [[(0, ())] * (len(new) + 1) for _ in range(len(old) + 1)]  # (total, pairs) by lengths
    for i, old_line in enumerate(old):
        for j, new_line in enumerate(new):
            options = [best[i][j + 1], best[i + 1][j]]
            if (ratio := similarity([old_line], [new_line])) > threshold:
                total, pairs = best[i][j]
                options.append((total + ratio, (*pairs, (i, j))))
            best[i + 1][j + 1] = max(options, key=lambda option: option[0])
    return best[-1][-1][1]


def changed_characters(old, new):
    """Return two sets of indices: the characters of the words that differ between two lines."""
    words = [list(re.finditer(r"\w+|\s+|[^\w\s]", line)) for line in (old, new)]
    texts = [[word[0] for word in side] for side in words]
    marked = set(), set()
    for tag, *bounds in SequenceMatcher(str.isspace, *texts, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            for word in words[side][start:end] if tag != "equal" else []:
                marked[side].update(range(*word.span()))
    return marked


# ---------- HTML ----------
def highlight(source):
    """Return the tokens of every line of a module: lists of (CSS class, text)."""
    lines = [[]]
    for kind, text in PythonLexer(stripnl=False).get_tokens(source):
        short = STANDARD_TYPES.get(kind, "")
        css = short[0] if COLORED.match(short) else ""
        first, *others = text.split("\n")  # a string may go over several lines
        lines[-1].append((css, first))
        lines += [[(css, other)] for other in others]
    return lines


def html_code(tokens, first, n_lines, marked=()):
    """Return lines as HTML, characters in marked emphasized; CSS shows the line numbers."""
    html = ""
    for number in range(first, first + n_lines):
        line = "".join(text for _, text in tokens[number - 1])
        styles = [css for css, text in tokens[number - 1] for _ in text]  # of its characters
        indent = len(line) - len(line.lstrip())  # where a long line is wrapped, it goes on deeper
        html += f"<div data-n={number}" + f' style="--i:{indent + 4}ch"' * (len(line) > 40) + ">"
        for is_marked, run in groupby(range(len(line)), marked.__contains__):
            html += "<mark>" * is_marked
            for css, group in groupby(run, styles.__getitem__):
                text = escape("".join(line[i] for i in group), quote=False)
                html += f"<span class={css}>{text}</span>" if css else text
            html += "</mark>" * is_marked
        html += "</div>"
    return html


def html_diff(old_lesson, old, new_lesson, new):
    """Return two pieces side by side; long runs of equal lines are folded."""

    def hunk(kind, i, j):
        marks = (), ()
        if kind == "edit":
            marks = changed_characters(old.lines[i[0]], new.lines[j[0]])
        left = html_code(old_lesson.tokens, old.first + i.start, len(i), marks[0])
        right = html_code(new_lesson.tokens, new.first + j.start, len(j), marks[1])
        return f"<div class={kind}><div class=old>{left}</div><div class=new>{right}</div></div>"

    html = ""
    for kind, i, j in align(old.lines, new.lines):
        head = CONTEXT if i.start or j.start else 0
        tail = len(i) - (CONTEXT if i.stop < len(old.lines) or j.stop < len(new.lines) else 0)
        if kind != "same" or tail - head < MIN_FOLD:
            html += hunk(kind, i, j)
        else:
            html += hunk(kind, i[:head], j[:head])
            html += f"<details class=fold><summary>{tail - head} equal lines</summary>"
            html += hunk(kind, i[head:tail], j[head:tail]) + "</details>"
            html += hunk(kind, i[tail:], j[tail:])
    return html


def html_count(added, removed):
    return f"<span class=plus>+{added}</span> <span class=minus>&minus;{removed}</span>"


def html_details(lesson, status, names, note, body):
    is_open = " open" * (status in ("new", "changed"))
    return (
        f'<details class="piece {status}" id="{lesson.anchor}.{names[0]}"{is_open}>'
        f"<summary><code>{', '.join(names)}</code><b>{status}</b><small>{note}</small></summary>"
        f"<div class=code>{body}</div></details>\n"
    )


def html_piece(lesson, piece):
    status, parent, other = compare(piece, lesson.parents)
    note = f"line {piece.first}"
    body = html_code(lesson.tokens, piece.first, len(piece.lines))
    if status == "copied":
        note = f"copied from {parent.name}"
    elif status == "changed":
        body = html_diff(parent, other, lesson, piece)
        added, removed, _ = size(other.lines, piece.lines)
        note = f"{html_count(added, removed)} against {parent.name}, {note}"
        note += ": only the comments above it" * same_code(other, piece)
    return html_details(lesson, status, piece.names, note, body)


def html_docstring(lesson, lessons):
    """Return the docstring's fields and paragraphs, with links to the steps and pieces named."""
    anchors = {other.name: other.anchor for other in lessons.values()}
    for piece in lesson.pieces + gone(lesson):
        anchors |= dict.fromkeys(piece.names, f"{lesson.anchor}.{piece.names[0]}")

    def link(match):
        code = f"<code>{match[0]}</code>"
        return f'<a href="#{anchors[match[0]]}">{code}</a>' if match[0] in anchors else code

    html = ""
    paragraphs = re.split(r"\n\s*\n|\n(?=[A-Z][a-z]+: )", lesson.docstring)
    for is_field, group in groupby(paragraphs[1:], lambda text: bool(FIELD.match(text))):
        if not is_field:
            html += "".join(f"<p>{escape(text, quote=False)}</p>" for text in group)
            continue
        html += "<dl>"
        for name, text in (FIELD.match(text).groups() for text in group):
            text = escape(text, quote=False)
            if name == "Try":
                text = re.sub(r"(?<![\w-])--\w[\w-]*", r"<code>\g<0></code>", text)
                text = re.sub(r"\n\s+", "<br>", text)
            elif name != "Source":
                text = re.sub(r"\w+", link, text)
            html += f"<dt>{name}</dt><dd>{text}</dd>"
        html += "</dl>"
    return html


def html_markdown(text, lessons):
    """Return inline Markdown (code, links, bold) as HTML; links to a train.py stay on this page."""
    html = ""
    for part in re.split(r"(`[^`]+`|\[[^\]]*\]\([^)]*\)|\*\*.+?\*\*)", text):
        if code := re.fullmatch(r"`(.+)`", part):
            html += f"<code>{escape(code[1])}</code>"
        elif bold := re.fullmatch(r"\*\*(.+)\*\*", part):
            html += f"<b>{html_markdown(bold[1], lessons)}</b>"
        elif link := re.fullmatch(r"\[(.*)\]\((.*)\)", part):
            label, target = html_markdown(link[1], lessons), link[2]
            name = target.removesuffix("/train.py").split("/")[-1]
            target = f"#step-{name}" if name in lessons else target
            is_linked = target.startswith(("#", "https://", "http://"))
            html += f'<a href="{escape(target)}">{label}</a>' if is_linked else label
        else:
            html += escape(part, quote=False)
    return html


def readme_rows(readme):
    """Return {name of step: {column: Markdown}} from the tables whose rows link to a train.py."""
    rows, columns = {}, None
    for line in readme.splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        cells = [
            cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])
        ]
        columns = columns or [cell.lower() for cell in cells]
        if link := re.search(r"\]\(([^)]*)/train\.py\)", line):
            rows[link[1].split("/")[-1]] = dict(zip(columns, cells))
    return rows


def html_lesson(lesson, lessons, row):
    facts = {"Result": row.get("result") or row.get("measured"), "Known": row.get("known")}
    facts = [f"<dt>{k}</dt><dd>{html_markdown(v, lessons)}</dd>" for k, v in facts.items() if v]
    path = f"{lesson.folder}/train.py, {len(lesson.source.splitlines())} lines"
    if lesson.parents:
        added, removed, kept = lesson.size()
        path += f": {html_count(added, removed)} against {lesson.parents[0].name}, "
        path += f"{kept:.0%} of it kept <meter value={kept:.3f}></meter>"
    pictures = ""
    for name, content in lesson.pictures.items():
        encoded = base64.b64encode(content).decode()
        pictures += f'<img alt="{name}" src="data:image/png;base64,{encoded}">'
    html = (
        f'<section class=lesson id="{lesson.anchor}"><p class=path>{path}</p>'
        f"<h2>{escape(lesson.docstring.splitlines()[0].rstrip('.'))}</h2>"
        f"<p class=idea>{html_markdown(row.get('idea', ''), lessons)}</p>"
        f"<div class=about><div>{html_docstring(lesson, lessons)}"
        f"<dl class=facts>{''.join(facts)}</dl></div><div>{pictures}</div></div>\n"
    )
    for section, pieces in groupby(lesson.pieces, lambda piece: piece.section):
        html += f"<h3>{escape(section)}</h3>\n" if section else ""
        html += "".join(html_piece(lesson, piece) for piece in pieces)
    html += "<h3>gone</h3>\n" if gone(lesson) else ""
    for piece in gone(lesson):
        body = html_code(lesson.parents[0].tokens, piece.first, len(piece.lines))
        note = f"{len(piece.lines)} lines of {lesson.parents[0].name}"
        html += html_details(lesson, "gone", piece.names, note, body)
    html += "<h3>beside train.py</h3>\n" if lesson.scripts else ""
    for name, source in lesson.scripts.items():
        n_lines = len(source.splitlines())
        body = html_code(highlight(source), 1, n_lines)
        html += html_details(lesson, "script", [name], f"{n_lines} lines", body)
    return html + "</section>\n"


def html_menu(lessons):
    html = ""
    for is_elective, group in groupby(lessons.values(), lambda lesson: "/" in lesson.folder):
        html += "<h3>electives</h3>\n" if is_elective else ""
        for lesson in group:
            count = f"<small>{html_count(*lesson.size()[:2])}</small>" if lesson.parents else ""
            html += f'<a href="#{lesson.anchor}"><span>{lesson.name}</span>{count}</a>\n'
    return html


def build(root=ROOT):
    """Return the page for the steps and electives found under root."""
    lessons = find_lessons(root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = readme_rows(readme)
    sections = [
        html_lesson(lesson, lessons, rows.get(name, {})) for name, lesson in lessons.items()
    ]
    return Template(PAGE).substitute(
        title=escape(readme.splitlines()[0].lstrip("# ")),
        menu=html_menu(lessons),
        lessons="".join(sections),
    )


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: the lessons</title>
<style>
:root {
  color-scheme: light dark;
  --back: light-dark(#ffffff, #0f1318); --panel: light-dark(#f5f7f9, #171c23);
  --text: light-dark(#1c2128, #d5dbe2); --soft: light-dark(#59636e, #97a1ac);
  --line: light-dark(#d8dee4, #2c343d); --link: light-dark(#0757ba, #78b4ff);
  --old: light-dark(#ffeeec, #371d20); --new: light-dark(#e7fbec, #12301d);
  --old-mark: light-dark(#ffcdc7, #6a2a2a); --new-mark: light-dark(#aeefbf, #1b5130);
  --plus: light-dark(#116329, #6fd084); --minus: light-dark(#b3201f, #ff938a);
  --bar: 0px; --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
* { box-sizing: border-box; }
html { scroll-padding-top: calc(var(--bar) + 8px); -webkit-text-size-adjust: 100%; }
body { margin: 0; display: grid; grid-template-columns: 240px minmax(0, 1fr); color: var(--text);
  background: var(--back); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
code { font-family: var(--mono); font-size: .88em; }
.about code { white-space: nowrap; }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 16px 8px;
  background: var(--panel); border-right: 1px solid var(--line); font-size: 13px; }
nav h1 { font-size: 16px; line-height: 1.3; margin: 0 8px 8px; }
nav a { display: flex; justify-content: space-between; align-items: baseline; gap: 6px;
  padding: 3px 8px; border-radius: 5px; color: var(--text); }
nav a span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
nav small { font-size: 11px; font-variant-numeric: tabular-nums; white-space: nowrap; }
nav a.current { background: var(--link); color: var(--back); }
nav a.current small * { color: inherit; }
nav h3 { margin: 14px 8px 2px; }
nav p { margin: 12px 8px 0; color: var(--soft); font-size: 12px; line-height: 1.7; }
button { font: inherit; color: var(--text); background: var(--back); padding: 2px 9px;
  border: 1px solid var(--line); border-radius: 5px; cursor: pointer; }
kbd { font: 11px var(--mono); border: 1px solid var(--line); border-radius: 3px; padding: 0 4px;
  background: var(--back); }
#menu { display: none; }
main { padding: 0 20px 60vh; max-width: 1700px; }
.lesson { padding: 28px 0 40px; border-bottom: 1px solid var(--line); }
.path, summary small { color: var(--soft); font-size: 13px; }
.path { margin: 0; } meter { width: 70px; height: 9px; margin-left: 8px; }
h2 { font-size: 25px; line-height: 1.25; margin: 2px 0; } .idea { margin: 0; font-size: 17px; }
h3 { font: 600 12px system-ui, sans-serif; letter-spacing: .07em; text-transform: uppercase;
  color: var(--soft); margin: 22px 0 6px; }
.about { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px;
  margin: 12px 0 20px; align-items: start; }
.about.wide { grid-template-columns: minmax(0, 1fr); }
.about img { width: 100%; max-width: 640px; border: 1px solid var(--line); border-radius: 6px;
  background: #fff; cursor: zoom-in; }
.about.wide img { max-width: none; cursor: zoom-out; }
.about p, dd { max-width: 76ch; } .about > div > p { margin: 12px 0; }
dl { display: grid; grid-template-columns: 5em minmax(0, 1fr); gap: 3px 10px; margin: 12px 0 0; }
dt { color: var(--soft); } dd { margin: 0; } .facts { padding-top: 10px; }
.facts:not(:empty) { border-top: 1px solid var(--line); }
.plus { color: var(--plus); } .minus { color: var(--minus); }
.piece { border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; }
.piece > summary { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline;
  padding: 5px 12px; cursor: pointer; background: var(--panel); border-radius: 6px;
  position: sticky; top: var(--bar); z-index: 1; }
.piece[open] > summary { border-bottom: 1px solid var(--line); border-radius: 6px 6px 0 0; }
.piece > summary::before { content: "▸"; width: 10px; color: var(--soft); }
.piece[open] > summary::before { content: "▾"; }
summary code { font-weight: 600; font-size: 13px; overflow-wrap: anywhere; }
summary b { font-size: 11px; padding: 0 7px; border-radius: 9px; border: 1px solid; }
.new > summary b { color: var(--plus); } .gone > summary b { color: var(--minus); }
.changed > summary b { color: var(--link); }
:is(.copied, .script) > summary b { display: none; }
.piece:not([open]) { border-color: transparent; margin: 1px 0; }
.piece:not([open]) > summary { background: none; padding: 2px 12px; }
.copied > summary code { font-weight: 400; color: var(--soft); }
.code, .diff { font: 12px/1.5 var(--mono); padding: 6px 0; tab-size: 4; }
[data-n] { min-height: 1.5em; padding: 0 6px 0 calc(5ch + 10px + var(--i, 0ch)); position: relative;
  text-indent: calc(-1 * var(--i, 0ch)); white-space: pre-wrap; overflow-wrap: anywhere; }
[data-n]::before { content: attr(data-n); position: absolute; top: 0; left: 0; width: 4ch;
  text-indent: 0; text-align: right; color: var(--soft); opacity: .75; }
.same, .edit, .other { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.old { border-right: 1px solid var(--line); }
:is(.edit, .other) > .old:not(:empty) { background: var(--old); }
:is(.edit, .other) > .new:not(:empty) { background: var(--new); }
:is(.edit, .other) > div:empty { background: var(--panel); }
:is(.edit, .other) > div > [data-n]::after { content: "+"; color: var(--plus);
  position: absolute; top: 0; left: calc(4ch + 5px); text-indent: 0; }
:is(.edit, .other) > .old > [data-n]::after { content: "\\2212"; color: var(--minus); }
mark { color: inherit; background: var(--new-mark); } .old mark { background: var(--old-mark); }
.fold > summary { padding: 1px 0 1px calc(5ch + 10px); background: var(--panel); cursor: pointer;
  color: var(--soft); font: 12px/1.6 system-ui, sans-serif; }
.c { color: light-dark(#525c66, #b4bdc7); font-style: italic; }
.s { color: light-dark(#0a3069, #a9d4ff); } .m { color: light-dark(#0550ae, #8cc4ff); }
.k, .o { color: light-dark(#8a1a6b, #ff9ecb); } .n, .f { color: light-dark(#5a32a3, #d9bcff); }
@media (max-width: 1000px) { .about { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 800px) {
  :root { --bar: 42px; }
  body { display: block; } main { padding: 0 10px 60vh; } .code, .diff { font-size: 11.5px; }
  nav { height: auto; max-height: 100vh; z-index: 2; padding: 6px 4px; border-right: 0;
    border-bottom: 1px solid var(--line); }
  nav h1 { display: inline-block; font-size: 15px; margin: 3px 8px; }
  #menu { display: inline-block; }
  nav > div { display: none; } nav.open > div { display: block; } .keys { display: none; }
  nav a { padding: 6px 8px; } h2 { font-size: 21px; } .idea { font-size: 16px; }
  .same, .edit, .other { display: block; } .same > .old, .fold > .same > .old { display: none; }
  .old { border-right: 0; } .piece { margin: 8px -6px; } .piece > summary { padding: 5px 8px; }
  [data-n] { padding-left: calc(5ch + 8px + var(--i, 0ch)); padding-right: 4px; }
}
@media print {
  nav { display: none; } body { display: block; } .piece > summary { position: static; }
}
</style>
<nav><button id="menu">☰</button><h1>$title</h1><div>
$menu
<p><button id="theme">light / dark</button> <button id="unfold">unfold all</button></p>
<p class="keys"><kbd>j</kbd> <kbd>k</kbd> next, previous step<br>
<kbd>n</kbd> <kbd>p</kbd> next, previous change<br>
<kbd>u</kbd> unfold or fold all, <kbd>t</kbd> light or dark</p></div></nav>
<main>
$lessons</main>
<script>
const all = selector => [...document.querySelectorAll(selector)];
const nav = document.querySelector("nav"), root = document.documentElement;
const links = all("nav a"), lessons = all(".lesson"), changes = all(".new.piece, .changed.piece");
const bar = () => parseInt(getComputedStyle(root).getPropertyValue("--bar")) + 8;
const last = list => list.findLastIndex(e => e.getBoundingClientRect().top < bar() + 2);

function setTheme(theme) {
  root.style.colorScheme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* a page from a file may lack it */ }
}
function switchTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme((root.style.colorScheme || dark) == "dark" ? "light" : "dark");
}
function unfold() {
  const folds = all("details:not(.new, .changed)");
  const open = folds.some(e => !e.open);
  folds.forEach(e => e.open = open);
}
function go(list, by) {
  let i = last(list);
  // Back goes to the start of what is being read, then to the one before.
  if (by < 0 && i >= 0 && list[i].getBoundingClientRect().top < bar() - 12) by = 0;
  const target = list[Math.min(list.length - 1, Math.max(0, i + by))];
  target.scrollIntoView();
  if (target.id) history.replaceState(null, "", "#" + target.id);
  showPlace();
}
function showPlace() {
  const i = last(lessons), link = links[Math.max(0, i)];
  if (link.classList.contains("current")) return;
  links.forEach(e => e.classList.toggle("current", e == link));
  link.scrollIntoView({block: "nearest"});
}
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.tagName == "DETAILS") target.open = true;
}
const keys = {j: () => go(lessons, 1), k: () => go(lessons, -1), n: () => go(changes, 1),
  p: () => go(changes, -1), u: unfold, t: switchTheme};
addEventListener("keydown", e => {
  if (!e.ctrlKey && !e.metaKey && !e.altKey) keys[e.key]?.();
});
document.getElementById("theme").onclick = switchTheme;
document.getElementById("unfold").onclick = unfold;
document.getElementById("menu").onclick = () => nav.classList.toggle("open");
nav.addEventListener("click", e => { if (e.target.closest("a")) nav.classList.remove("open"); });
all(".about img").forEach(e => e.onclick = () => e.closest(".about").classList.toggle("wide"));
addEventListener("scroll", showPlace, {passive: true});
addEventListener("hashchange", openTarget);
const wanted = new URLSearchParams(location.search).get("theme");
let kept;
try { kept = localStorage.getItem("theme"); } catch { /* as above */ }
if (wanted || kept) root.style.colorScheme = wanted || kept;
openTarget();
showPlace();
</script>
</html>
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    path = Path(argv[0]) if argv else ROOT / "review.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build(), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
