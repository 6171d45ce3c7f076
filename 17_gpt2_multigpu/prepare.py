"""Tokenize text for train.py: python prepare.py [--corpus FILE ...]

Turns OpenWebText, or your own jsonl (with a field "text"), txt or parquet files, into train.bin and
val.bin in nanoGPT's format: GPT-2 tokens as uint16, with <|endoftext|> after every document. The
documents are shuffled. A run that was killed continues where it was when started again.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import hashlib
import json
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from train import NO_BPE, load_bpe, number

OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@refs%2Fconvert%2Fparquet/plain_text/train/"
FORMATS = {".jsonl": "json", ".txt": "text", ".parquet": "parquet"}


def load_documents(args):
    """Return the documents of --corpus, or of OpenWebText, as a datasets.Dataset."""
    files = [str(path) for path in args.corpus]
    files = files or [f"{OPENWEBTEXT}{i:04d}.parquet" for i in range(80)]
    formats = {FORMATS.get(Path(file).suffix) for file in files}
    named = f"--corpus {' '.join(files[:5])}"
    if len(formats) > 1 or None in formats:
        problem = "all files must end in .jsonl, all in .txt or all in .parquet"
        raise argparse.ArgumentTypeError(f"{named}: {problem}")
    options = {"sample_by": "document"} if formats == {"text"} else {}
    options |= {"cache_dir": str(args.cache_dir / "datasets"), "split": "train"}
    try:
        documents = datasets.load_dataset(*formats, data_files=files, **options)
        return documents.select_columns("text")
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise OSError(f"{named}: no documents with a column 'text' ({reason})") from error


def tokenize(job):
    """Write the tokens of some documents to a file; return the number of documents.

    job is (documents, their rows, path). A file that exists is complete: nothing is done.
    """
    documents, rows, path = job
    if not path.exists():
        bpe = load_bpe()
        ids = []
        for text in documents.select(rows)[:]["text"]:
            ids += [*bpe.encode_ordinary(text), bpe.eot_token]
        np.array(ids, dtype=np.uint16).tofile(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return len(rows)


def prepare(args):
    """Write train.bin, val.bin and meta.json into --cache_dir; return the numbers in meta.json."""
    if load_bpe() is None:
        raise OSError(NO_BPE)
    documents = load_documents(args)
    # The chunks of this corpus and seed: a run that is started again finds those it has finished.
    corpus = [args.seed, *((path.name, path.stat().st_size) for path in args.corpus)]
    fingerprint = hashlib.sha256(repr(corpus).encode()).hexdigest()[:8]
    folder = args.cache_dir / f"chunks-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(args.seed).permutation(len(documents))
    starts = range(0, len(order), 10_000)
    jobs = [(documents, order[i : i + 10_000], folder / f"{i:09d}.bin") for i in starts]
    n_proc = min(args.num_proc, len(jobs))
    pool = multiprocessing.get_context("spawn").Pool(n_proc) if n_proc > 1 else None
    with tqdm(total=len(order), unit="doc") as bar:
        for n_done in pool.imap_unordered(tokenize, jobs) if pool else map(tokenize, jobs):
            bar.update(n_done)
    if pool:
        pool.close()

    chunks = [np.memmap(path, np.uint16, "r") for *_, path in jobs]
    n_tokens = sum(map(len, chunks))
    n_train = n_tokens - int(n_tokens * args.val_fraction)
    for name, first, end in (("train", 0, n_train), ("val", n_train, n_tokens)):
        with open(args.cache_dir / f"{name}.tmp", "wb") as file:
            position = 0
            for chunk in chunks:
                file.write(chunk[max(first - position, 0) : max(end - position, 0)].tobytes())
                position += len(chunk)
        (args.cache_dir / f"{name}.tmp").replace(args.cache_dir / f"{name}.bin")
    sizes = {"train": n_train, "val": n_tokens - n_train, "documents": len(order)}
    (args.cache_dir / "meta.json").write_text(json.dumps(sizes))
    for *_, path in jobs:
        path.unlink()
    print(f"{args.cache_dir}: {n_train:,} training and {n_tokens - n_train:,} validation tokens")
    return sizes


def parse_args(argv=None):
    """Return the command-line flags (by default of this process), checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    data_dir = os.environ.get("DATA_DIR", Path(__file__).parents[1] / "data")
    flag("--corpus", type=Path, nargs="+", default=[], help="jsonl, txt or parquet files")
    flag("--val_fraction", type=number(float, 0, 0.5), default=0.0005, help="of all tokens")
    flag("--data_dir", type=Path, default=data_dir, help="directory of the data sets")
    flag("--dataset", default="openwebtext", help="name of the result, as for train.py")
    flag("--cache_dir", type=Path, help="the result; None: cache/DATASET in --data_dir")
    flag("--num_proc", type=number(int, 1), default=os.cpu_count(), help="tokenizing processes")
    flag("--seed", type=number(int, 0), default=1337, help="seed of the shuffling")
    args = parser.parse_args(argv)
    args.cache_dir = args.cache_dir or args.data_dir / "cache" / args.dataset
    return args


if __name__ == "__main__":
    try:
        prepare(parse_args())
    except (argparse.ArgumentTypeError, MemoryError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
