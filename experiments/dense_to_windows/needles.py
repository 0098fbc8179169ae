"""Writes texts with needles and questions about them, each shorter than a row.

    python experiments/dense_to_windows/needles.py corpora/sympy --out=corpora/needles

A needle is a sentence of `sparsejax analyze MODEL needle`, and a question is the same sentence again. The shorter the
text, the more questions.
"""

import argparse
import json
import random
from pathlib import Path

from sparsejax.analysis.prompts import KEYS, SENTENCE, VALUES

LENGTH = 560  # bytes, which are fewer tokens than a row has
NEEDLES = range(2, 7)
COUNTS = {"train": 30_000, "validation": 500}


def build(text, draw):
    """A text with needles at random places, then questions about them until the row is full."""
    keys = draw.sample(KEYS, draw.choice(NEEDLES))
    sentences = [SENTENCE.format(key=key, value=draw.choice(VALUES)) for key in keys]
    size = draw.randrange(LENGTH - 2 * sum(map(len, sentences)))
    start = draw.randrange(len(text) - size)
    hay = text[start : start + size]
    depths = sorted(draw.randrange(size + 1) for _ in sentences)
    parts = [hay[a:b] for a, b in zip([0, *depths], [*depths, size], strict=True)]
    row = "".join(part + sentence for part, sentence in zip(parts, [*sentences, ""], strict=True))
    while len(row) + len(max(sentences, key=len)) <= LENGTH:
        row += draw.choice(sentences)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed, (side, count) in enumerate(COUNTS.items()):
        lines = (options.corpus / f"{side}.jsonl").read_text().splitlines()
        text = "\n".join(json.loads(line)["text"] for line in lines).encode("ascii", "ignore").decode()
        draw = random.Random(seed)
        texts = "".join(json.dumps({"text": build(text, draw)}) + "\n" for _ in range(count))
        (options.out / f"{side}.jsonl").write_text(texts)


if __name__ == "__main__":
    main()
