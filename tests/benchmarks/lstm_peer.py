"""The elective lstm beside pytorch/examples' word_language_model: lstm_peer.py --peer DIR [FLAGS]

DIR is word_language_model in a checkout of github.com/pytorch/examples; FLAGS are passed on to its
main.py, an LSTM by default. Both read the same words of tiny Shakespeare with the same vocabulary,
and report the perplexity over the same test words; the peer leaves out up to nine, which do not
fill its ten columns. The peer also needs a validation set, by which it lowers its learning rate:
the last tenth of the training words, on which it does not train.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from steps import ROOT, load_step
from table import row


def write_words(folder):
    """Write train.txt, valid.txt and test.txt as the peer reads them: a newline is a word."""
    step = load_step("12_sampling")
    args = step.parse_args([])
    train_ids, test_ids, vocab = step.load_data(args)
    test_ids = test_ids[args.block_size :]  # without its context, the end of the training words
    end = len(train_ids) * 9 // 10
    parts = {"train": train_ids[:end], "valid": train_ids[end:], "test": test_ids}
    for name, ids in parts.items():
        words = [vocab[i] for i in ids.tolist()]
        # The peer appends <eos> to every line.
        text = "".join(word if word == "\n" else f"{word} " for word in words)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def run(command, pattern, cwd=None):
    """Run a command; return the last number that a line of its output names, and its seconds."""
    start = time.perf_counter()
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}:\n{result.stderr[-2000:]}")
    return float(re.findall(pattern, result.stdout)[-1]), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="word_language_model's directory")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        write_words(Path(folder))
        save = ["--save", str(Path(folder) / "model.pt")]
        command = [sys.executable, "main.py", "--data", folder, *save, *flags]
        peer, peer_seconds = run(command, r"test ppl +([\d.]+)", cwd=args.peer)
        script = str(ROOT / "electives" / "lstm" / "train.py")
        command = [sys.executable, script, "--out_dir", str(Path(folder) / "out")]
        ours, seconds = run(command, r"test perplexity ([\d.]+)")
    row(f"test perplexity, peer {' '.join(flags) or 'with its defaults'}", ours, peer)
    row("seconds, start-up included", seconds, peer_seconds)


if __name__ == "__main__":
    main()
