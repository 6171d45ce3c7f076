"""Make stand-in data, so that every step runs offline: python tests/standins.py DIR

Small generated files in the real formats and at the real places under DIR: drawn digits for MNIST,
a synthetic play for Shakespeare, verses for the King James Bible, small JPEG folders for ImageNet,
documents for OpenWebText. A file that is already there is never touched.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import torch
from torchvision.io import encode_jpeg

# Seven-segment strokes, ends as (x, y) in a box 1 wide and 2 high, and the segments of each digit.
STROKES = [
    ((0, 0), (1, 0)),
    ((0, 0), (0, 1)),
    ((1, 0), (1, 1)),
    ((0, 1), (1, 1)),
    ((0, 1), (0, 2)),
    ((1, 1), (1, 2)),
    ((0, 2), (1, 2)),
]
DIGITS = ["012456", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356"]


def write(path, content):
    """Write bytes to path unless there is a file already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def draw_digits(labels, rng):
    """Return uint8 images (N, 28, 28) of the labels (N,), slanted, moved and noisy."""
    yy, xx = np.mgrid[:28, :28]
    images = np.zeros((len(labels), 28, 28))
    for image, label in zip(images, labels):
        size, slant = rng.uniform(6.5, 8.5), rng.uniform(-0.25, 0.25)
        left, top, width = rng.uniform(8, 11), rng.uniform(5, 8), rng.uniform(0.9, 1.5)
        for segment in DIGITS[label]:
            (x0, y0), (x1, y1) = STROKES[int(segment)]
            for t in np.linspace(0, 1, 12):
                x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
                px, py = left + size * x + slant * size * (1 - y), top + size * y
                blot = np.exp(-((xx - px) ** 2 + (yy - py) ** 2) / width**2)
                np.maximum(image, blot, out=image)
    images = 255 * images + rng.normal(scale=12, size=images.shape) * (images > 0.05)
    return images.clip(0, 255).astype(np.uint8)


def write_mnist(folder, n_train=2000, n_test=400):
    """Write MNIST's four idx files, of drawn digits, under folder/MNIST/raw."""
    rng = np.random.default_rng(0)
    raw = folder / "MNIST" / "raw"
    for name, n in (("train", n_train), ("t10k", n_test)):
        labels = rng.integers(10, size=n)
        images = draw_digits(labels, rng)
        header = struct.pack(">4i", 0x803, n, 28, 28)
        write(raw / f"{name}-images-idx3-ubyte", header + images.tobytes())
        header = struct.pack(">2i", 0x801, n)
        write(raw / f"{name}-labels-idx1-ubyte", header + labels.astype(np.uint8).tobytes())


def write_shakespeare(folder, n_speeches=1500):
    """Write a synthetic play, shakespeare/input.txt, from a small grammar."""
    rng = np.random.default_rng(0)
    names = ["FIRST LORD", "ISABEL", "The DUKE", "CLOWN", "OLD NURSE", "Messenger"]
    nouns = "king crown night sword heart daughter grave moon letter horse fool storm".split()
    verbs = "loves fears follows breaks forgives betrays buries answers".split()
    adjectives = "gentle bloody noble weary silver foul sweet".split()
    pick = rng.choice

    def line():
        subject = f"the {pick(adjectives)} {pick(nouns)}"
        text = f"{subject} {pick(verbs)} {pick(['my', 'thy', 'her'])} {pick(nouns)}"
        if rng.random() < 0.4:
            text += f", and 'tis {pick(['I', 'thou', 'he'])} that {pick(verbs)} the {pick(nouns)}"
        return text[0].upper() + text[1:] + str(pick([".", "!", "?", ";"]))

    speeches = []
    for _ in range(n_speeches):
        lines = [line() for _ in range(rng.integers(1, 4))]
        speeches.append(f"{pick(names)}:\n" + "\n".join(lines) + "\n")
    write(folder / "shakespeare" / "input.txt", "\n".join(speeches).encode())


def write_bible(folder, n_verses=31102, n_old=23145):
    """Write kjv/kjv.txt, as many verses as the Bible has; those of the Old Testament come first."""
    rng = np.random.default_rng(0)
    old, new = "Moses David Israel Judah Saul".split(), "Jesus Paul Peter Israel David".split()
    verbs = "saw heard blessed feared followed".split()
    nouns = "king house mountain river temple sheep vineyard bread".split()
    verses = [
        f"And {(old if i < n_old else new)[a]} {verbs[b]} the {nouns[c]}"
        + f" of {nouns[d]}" * (d < 5)
        for i, (a, b, c, d) in enumerate(rng.integers((5, 5, 8, 8), size=(n_verses, 4)).tolist())
    ]
    write(folder / "kjv" / "kjv.txt", ".\n".join([*verses, ""]).encode())


def write_imagenet(folder, n_classes=4, n_train=16, n_val=4, sides=(48, 97)):
    """Write JPEGs, a square on a class's own ground, under folder/imagenet/{train,val}/.

    n_train and n_val are per class; sides: least height and width, in pixels, and their limit.
    """
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("val", n_val)):
        for label in range(n_classes):
            ground = 40 + 60 * np.array([label % 3, label // 3, label % 2], np.uint8)
            for i in range(n):
                height, width = rng.integers(*sides, 2)
                pixels = np.broadcast_to(ground[:, None, None], (3, height, width)).copy()
                top, left = rng.integers(height - 24), rng.integers(width - 24)
                pixels[:, top : top + 24, left : left + 24] = 220 - 40 * label
                pixels += rng.integers(20, size=pixels.shape, dtype=np.uint8)
                image = torch.from_numpy(pixels[: 1 if i == 1 else 3])  # one is greyscale
                path = folder / "imagenet" / split / f"n{label:08d}" / f"n{label:08d}_{i}.JPEG"
                write(path, encode_jpeg(image, quality=90).numpy().tobytes())


def write_openwebtext(folder, n_documents=400):
    """Write documents of a small grammar: as text, openwebtext/documents.jsonl, and as token ids.

    train.bin and val.bin are uint16 and below 50257, as GPT-2's are, but they stand for no text.
    """
    rng = np.random.default_rng(0)
    words = [
        f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "re") for b in ("lan", "sor", "nik", "ved")
    ]
    ids = rng.choice(50256, size=len(words), replace=False)
    texts, tokens = [], []
    for _ in range(n_documents):
        word, text = rng.integers(len(words)), []
        for _ in range(rng.integers(5, 60)):  # every word has three that may follow it
            word = (3 * word + rng.integers(3) + 1) % len(words)
            text.append(word)
        texts.append(json.dumps({"text": " ".join(words[word] for word in text)}))
        tokens += [*ids[text], 50256]
    tokens = np.array(tokens, dtype=np.uint16)
    cut = len(tokens) - 1000
    write(folder / "openwebtext" / "documents.jsonl", ("\n".join(texts) + "\n").encode())
    write(folder / "openwebtext" / "train.bin", tokens[:cut].tobytes())
    write(folder / "openwebtext" / "val.bin", tokens[cut:].tobytes())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data folder to fill")
    folder = parser.parse_args(argv).folder
    write_mnist(folder)
    write_shakespeare(folder)
    write_bible(folder)
    write_imagenet(folder)
    write_openwebtext(folder)
    print(f"stand-ins are in {folder}; train on them with --data_dir {folder}")


if __name__ == "__main__":
    main()
