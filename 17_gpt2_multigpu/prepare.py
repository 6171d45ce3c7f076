"""Tokenize text for train.py: python prepare.py [--corpus FILE ...]

Turns OpenWebText, or your own jsonl (with a field "text"), txt or parquet files, into train.bin and
val.bin in nanoGPT's format: GPT-2 tokens as uint16, with <|endoftext|> after every document. The
documents are shuffled. A run that was killed continues where it was when started again. Tokens of
another corpus are never replaced: choose another --dataset, and train with the same.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the run with exit code 130, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import glob
import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from train import NO_BPE, load_bpe, lock_folder, number, write_file

OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/"
FORMATS = {".jsonl": "json", ".txt": "text", ".parquet": "parquet"}


def load_documents(args):
    """Return the documents of --corpus, or of OpenWebText, as a datasets.Dataset."""
    files = [glob.escape(str(path)) for path in args.corpus]
    shards = (f"{OPENWEBTEXT}plain_text/train-{i:05d}-of-00080.parquet" for i in range(80))
    files = files or list(shards)
    formats = {FORMATS.get(Path(file).suffix) for file in files}
    named = f"--corpus {' '.join(files[:5])}"
    if len(formats) > 1 or None in formats:
        problem = "all files must end in .jsonl, all in .txt or all in .parquet"
        raise argparse.ArgumentTypeError(f"{named}: {problem}")
    options = {"sample_by": "document"} if formats == {"text"} else {}
    options |= {"cache_dir": str(args.cache_dir / "datasets"), "split": "train"}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    try:
        documents = datasets.load_dataset(*formats, data_files=files, **options)
        documents = documents.select_columns("text")
        kind = getattr(documents.features["text"], "dtype", "list")
        if kind not in ("string", "large_string") or not len(documents):
            raise ValueError(f"{len(documents)} values of type {kind}")
        return documents
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
            ids += [*bpe.encode_ordinary(text or ""), bpe.eot_token]
        np.array(ids, dtype=np.uint16).tofile(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return len(rows)


def prepare(args):
    """Write train.bin, val.bin and meta.json into --cache_dir; return the numbers in meta.json."""
    if load_bpe() is None:
        raise OSError(NO_BPE)
    for path in args.corpus:
        if not path.is_file() or path.stat().st_size == 0:
            raise OSError(f"--corpus {path} is missing or empty")
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in args.corpus]
    fingerprint = repr([args.seed, args.val_fraction, *stats])
    fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()[:8]  # of what is to be tokenized
    lock_folder(args.cache_dir)
    meta, folder = args.cache_dir / "meta.json", args.cache_dir / f"chunks-{fingerprint}"
    if (args.cache_dir / "train.bin").exists():
        finished = meta.read_text("utf-8", "replace") if meta.exists() else ""
        if fingerprint in finished:
            print(f"{args.cache_dir} has these tokens already")
            return json.loads(finished)
        if finished or not folder.exists():
            raise OSError(f"{args.cache_dir} has tokens of another corpus: choose a new --dataset")
    documents = load_documents(args)
    folder.mkdir(exist_ok=True)  # a run that is started again finds the chunks it has finished
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
    sizes["fingerprint"] = fingerprint
    write_file(meta, lambda file: file.write(json.dumps(sizes).encode()))
    shutil.rmtree(folder)
    print(f"{args.cache_dir}: {n_train:,} training and {n_tokens - n_train:,} validation tokens")
    print(f"python train.py --dataset {args.dataset} trains on them")
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
    flag("--dataset", help="name of the result, as for train.py; None: of the first --corpus file")
    flag("--cache_dir", type=Path, help="the result; None: cache/DATASET in --data_dir")
    flag("--num_proc", type=number(int, 1), default=os.cpu_count(), help="tokenizing processes")
    flag("--seed", type=number(int, 0), default=1337, help="seed of the shuffling")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or (args.corpus[0].stem if args.corpus else "openwebtext")
    args.cache_dir = args.cache_dir or args.data_dir / "cache" / args.dataset
    return args


if __name__ == "__main__":
    try:
        prepare(parse_args())
    except (argparse.ArgumentTypeError, MemoryError, OSError, UnicodeDecodeError) as error:
        print(f"prepare.py: error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
