"""Modified Kneser-Ney n-gram models of orders 1 to 5 on the task of steps 11 to 13.

    python tests/benchmarks/kneser_ney.py [--input FILE] [--max_order 5] [--mix]

--mix also trains step 13, with its defaults, and evaluates the mixture of both: the mean of the
probabilities that the transformer and the best n-gram model give to each word.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling"
(interpolated, three discounts per order, estimated from the counts of counts); Bengio et al. 2003,
"A neural probabilistic language model" (the mixture with equal weights).
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from table import row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from steps import ROOT, load_step


def load_words(path):
    """Return (train ids, test ids, vocab_size), split and encoded as in steps 11 to 13."""
    text = Path(path).read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    pattern = r"\w+(?:['\u2019]\w+)*|[^\w\s]|\n"
    words = [re.findall(pattern, part) for part in (text[:split], text[split:])]
    counts = Counter(words[0])
    vocab = ["<unk>", *sorted(word for word, count in counts.items() if count >= 2)]
    index = {word: i for i, word in enumerate(vocab)}
    train, test = (np.array([index.get(word, 0) for word in part]) for part in words)
    return train, test, len(vocab)


def ngram_ids(ids, vocab_size, max_order):
    """grams[k][i] numbers the k words that end at i (0 where fewer than k words precede).

    Equal n-grams get equal numbers; contexts[k][i] numbers the k - 1 words before i.
    """
    grams, contexts = [None, ids], [None, np.zeros_like(ids)]
    for _ in range(2, max_order + 1):
        context = np.concatenate([[-1], grams[-1][:-1]])
        _, gram = np.unique(context * vocab_size + ids, return_inverse=True)
        contexts.append(context + 1)
        grams.append(gram)
    return grams, contexts


def ngram_probabilities(train, test, vocab_size, order):
    """Return the probability of each test word; the first ones see the end of the training text."""
    n = len(train)
    grams, contexts = ngram_ids(np.concatenate([train, test]), vocab_size, order)
    prob = np.full(len(test), 1 / vocab_size)
    for k in range(1, order + 1):
        gram, context = grams[k], contexts[k]
        types, first = np.unique(gram[:n], return_index=True)
        if k == order:  # the highest order counts occurrences
            count = np.bincount(gram[:n], minlength=gram.max() + 1)
        else:  # a lower order counts the different words seen before the n-gram
            _, longer = np.unique(grams[k + 1][:n], return_index=True)
            count = np.bincount(gram[longer], minlength=gram.max() + 1)
        # discounts from how many n-grams were seen once, twice, three and four times
        n1, n2, n3, n4 = (max(1, (count == c).sum()) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discounts = discounts.clip(0, [0, 1, 2, 3])
        discount = discounts[np.minimum(count, 3)]  # of each n-gram
        size = context.max() + 1
        total = np.bincount(context[first], weights=count[types], minlength=size)
        taken = np.bincount(context[first], weights=discount[types], minlength=size)
        c, h = gram[n:], context[n:]
        seen = total[h] > 0
        probability = (count[c] - discount[c]) / np.maximum(total[h], 1)
        backoff = taken[h] / np.maximum(total[h], 1)
        prob = np.where(seen, probability + backoff * prob, prob)
    return prob


def transformer_probabilities(path):
    """Train step 13 on the same text; return the probability of each test word, and seconds."""
    step, models = load_step("13_transformer"), []
    GPT = step.GPT

    def make(*args):
        models.append(GPT(*args))
        return models[-1]

    step.GPT = make  # train returns no model
    with tempfile.TemporaryDirectory() as folder:
        args = step.parse_args(["--input", str(path), "--out_dir", folder])
        seconds = step.train(args)["seconds"]
    cross_entropy, losses = step.F.cross_entropy, []

    def keep(logits, targets, reduction):
        loss = cross_entropy(logits, targets, reduction="none")
        losses.append(loss[targets >= 0])
        return loss.sum()

    step.F.cross_entropy = keep
    step.evaluate(args, models[0], step.load_data(args)[1], "test")
    step.F.cross_entropy = cross_entropy
    return np.exp(-torch.cat(losses).double().numpy()), seconds


def perplexity(probabilities):
    return np.exp(-np.log(probabilities).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data_dir = os.environ.get("DATA_DIR") or ROOT / "data"
    parser.add_argument("--input", default=Path(data_dir) / "shakespeare" / "input.txt")
    parser.add_argument("--max_order", type=int, default=5)
    parser.add_argument("--mix", action="store_true", help="train step 13, and mix it in")
    args = parser.parse_args()
    train, test, vocab_size = load_words(args.input)
    print(f"{len(train):,} training words, {len(test):,} test words, vocabulary {vocab_size:,}")
    print(f"{'model':28s}  ratio to the best n-gram  perplexity  seconds")
    rows, probabilities = [], []
    for order in range(1, args.max_order + 1):
        start = time.perf_counter()
        probabilities.append(ngram_probabilities(train, test, vocab_size, order))
        value = perplexity(probabilities[-1])
        rows.append((f"Kneser-Ney, order {order}", value, time.perf_counter() - start))
    best = min(value for _, value, _ in rows)
    if args.mix:
        probability, seconds = transformer_probabilities(args.input)
        rows.append(("step 13", perplexity(probability), seconds))
        mixture = (probability + min(probabilities, key=perplexity)) / 2
        rows.append(("step 13 and the best n-gram model", perplexity(mixture), seconds))
    for run in sorted(ROOT.glob("1[123]_*/out/metrics.jsonl")):  # finished runs, if there are any
        last = json.loads(run.read_text().splitlines()[-1])
        rows.append((run.parts[-3], math.exp(last["test_loss"]), last["seconds"]))
    for name, value, seconds in rows:
        print(f"{name:28s}  {value / best:24.3f}  {value:10.2f}  {seconds:7.1f}")
    for name, value, _ in rows[args.max_order :] or rows[-1:]:
        row(f"test perplexity: {name}, the best n-gram", value, best)
