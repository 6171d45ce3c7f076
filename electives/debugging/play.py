"""Learning by debugging: find the bug that is planted in a step: python play.py 09

It copies a step to debugging/09 (see --dir), plants one bug in its train.py, and prints its symptom
as a user of the step would report it. Find the bug and fix it in the copy; --check then runs the
tests of the step's ideas on it. Do not look at the step itself or at bugs.py: they have the answer.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import difflib
import json
import random
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

from bugs import BUGS

ROOT = Path(__file__).resolve().parents[2]
STATE = ".bug.json"  # in the copy: which bug it has, and how many hints were given


def bugs_of(step):
    """Return the bugs of a step; a bug's number is its place in this list, from 1 on."""
    return [bug for bug in BUGS if bug.step == step]


def find_step(text):
    """Return the step whose name begins with text, such as 09."""
    steps = list(dict.fromkeys(bug.step for bug in BUGS))
    found = [step for step in steps if step.startswith(text) and text[:2].isdigit()]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no step: 01 to {steps[-1][:2]}")
    return found[0]


def planted_source(bug):
    """Return the step's train.py with the bug in it."""
    source = (ROOT / bug.step / "train.py").read_text(encoding="utf-8")
    if source.count(bug.original) != 1:
        raise OSError(f"{bug.step}/train.py has changed: the bug {bug.name!r} does not fit")
    return source.replace(bug.original, bug.planted)


def plant(bug, folder):
    """Copy the bug's step to a folder, without what runs left there, and plant the bug."""
    source = planted_source(bug)
    leave = shutil.ignore_patterns("out", "cache", "__pycache__", ".*")
    shutil.copytree(ROOT / bug.step, folder, ignore=leave, dirs_exist_ok=True)
    (folder / "train.py").write_text(source, encoding="utf-8")


def read_state(folder):
    """Return the bug in a copy and the content of its state file."""
    try:
        state = json.loads((folder / STATE).read_text())
        return bugs_of(state["step"])[state["bug"] - 1], state
    except FileNotFoundError as error:
        problem = f"{folder} holds no copy of a step with a bug: python {shown(__file__)} NN"
        raise OSError(f"{problem} makes one, --dir says where") from error
    except (LookupError, TypeError, ValueError) as error:
        raise OSError(f"{folder / STATE} is damaged; --overwrite begins anew") from error


def write_state(folder, state):
    (folder / STATE).write_text(json.dumps(state))


def shown(path):
    """Return a path as a user in the current directory would write it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def start(args):
    """Make the copy, with a bug that --bug or --seed chooses, and print the symptom."""
    numbers = list(range(1, len(bugs_of(args.step)) + 1))
    if args.bug is not None and args.bug not in numbers:
        raise argparse.ArgumentTypeError(f"--bug {args.bug}: {args.step} has 1 to {numbers[-1]}")
    if args.dir.exists():
        if not args.overwrite:
            problem = f"{args.dir} is there already: --overwrite replaces it, --dir names another"
            raise OSError(problem)
        if not (args.dir / STATE).is_file():  # it may be anything, such as --dir ~
            raise OSError(f"--overwrite: {args.dir} holds no copy that play.py made")
        with contextlib.suppress(OSError, ValueError):  # another bug than before
            numbers.remove(read_state(args.dir)[1]["bug"])
    number = args.bug or random.Random(args.seed).choice(numbers)
    bug = bugs_of(args.step)[number - 1]
    planted_source(bug)  # an error here costs no earlier copy
    if args.dir.exists():
        shutil.rmtree(args.dir)
    args.dir.mkdir(parents=True)
    write_state(args.dir, {"step": args.step, "bug": number, "hints": 0})
    plant(bug, args.dir)

    flags = f" {bug.flags}" if bug.flags else ""
    if '"--data_dir"' in planted_source(bug) and "DATA_DIR" not in os.environ:
        own = "data/imagenet" if bug.step.startswith("15") else "data"
        flags += f" --data_dir {shown(ROOT / own)}"
    play = f"python {shown(__file__)} {args.step[:2]}"
    play += f" --dir {args.dir}" if args.dir != default_dir(args.step) else ""
    print(f"{args.dir} is a copy of {args.step}, with one bug in its train.py. A user reports:\n")
    print(wrapped(bug.symptom))
    print(f"\nSee it:        python {args.dir / 'train.py'}{flags}")
    print(f"Need a hint?   {play} --hint")
    print(f"Fixed it?      {play} --check")
    print(f"Give up?       {play} --solution")


def wrapped(text):
    """Return a text in indented lines."""
    return textwrap.indent(textwrap.fill(text, 80, break_on_hyphens=False), "    ")


def hint(args):
    """Print the next hint."""
    bug, state = read_state(args.dir)
    n = state["hints"]
    if n == len(bug.hints):
        print("There are no more hints. --solution prints the fix.")
        return
    write_state(args.dir, state | {"hints": n + 1})
    print(f"Hint {n + 1} of {len(bug.hints)}:\n{wrapped(bug.hints[n])}")


def solution(args):
    """Print the diff that fixes the copy, and the lesson."""
    bug, _ = read_state(args.dir)
    path = args.dir / "train.py"
    fixed = (ROOT / bug.step / "train.py").read_text(encoding="utf-8").splitlines()
    lines = planted_source(bug).splitlines()
    diff = difflib.unified_diff(lines, fixed, str(path), "fixed", lineterm="")
    print("\n".join(diff))
    print(f"\nThe bug: {bug.name}.\n{wrapped(bug.lesson)}")


def check(args):
    """Run the tests of the step's ideas on the copy; return whether they pass."""
    bug, _ = read_state(args.dir)
    path = args.dir / "train.py"
    try:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or "?"
        print(f"Not yet: line {line} of {path} is no valid Python ({error.args[0]}).")
        return False
    # The test that catches this bug comes first; the others notice what was broken meanwhile.
    tests = dict.fromkeys(f"tests/{b.test}" for b in [bug, *bugs_of(bug.step)])
    print(f"Running {len(tests)} tests of the ideas of {bug.step} on {path} ...", flush=True)
    variable = f"STEP_{bug.step[:2]}"  # tells tests/steps.py where the copy is
    env = os.environ | {variable: str(args.dir.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    env["COLUMNS"] = "400"  # or pytest would leave out the reason of a failure
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--color=no", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *tests], cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode == 0:
        print(f"Fixed, congratulations! All tests pass. The bug: {bug.name}.")
        print(wrapped(bug.lesson))
        return True
    failed = re.search(r"^FAILED (\S+::test_(\w+)\S*) - (.*)$", run.stdout, re.M)
    if failed:
        idea = re.sub(r"^\d\d_", "", failed[2]).replace("_", " ")
        print(f"Not yet: {idea!r} fails ({failed[3]:.100}).")
        test = shlex.quote(shown(ROOT / failed[1]))
        print(f"All of it:     {variable}={args.dir.resolve()} python -m pytest {test}")
        return False
    reasons = re.findall(r"^E +(.+)", run.stdout, re.M) or [f"{run.stdout}{run.stderr}"[-300:]]
    raise OSError(f"the tests do not run on {path}: {' '.join(reasons[-1].split())}")


def default_dir(step):
    return Path("debugging") / step[:2]


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("step", type=find_step, help="01 to 17")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--hint", action="store_true", help="print the next hint")
    what.add_argument("--check", action="store_true", help="test the copy: is the bug fixed?")
    what.add_argument("--solution", action="store_true", help="print the diff that fixes it")
    parser.add_argument("--bug", type=int, help="number of the bug; None: a random one")
    parser.add_argument("--seed", type=int, help="of the random choice; None: another every time")
    parser.add_argument("--dir", type=Path, help="folder of the copy; None: debugging/NN")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier copy")
    args = parser.parse_args(argv)
    args.dir = args.dir or default_dir(args.step)
    return args


def main(argv=None):
    """Do what the flags say; return the exit code: 1 if a check fails."""
    args = parse_args(argv)
    if args.check:
        return 0 if check(args) else 1
    (hint if args.hint else solution if args.solution else start)(args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (argparse.ArgumentTypeError, OSError, UnicodeDecodeError) as error:
        print(f"play.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
