"""Writes the data set of this folder with the package `datasets` 5.2.0: `python write.py FOLDER`."""

import sys

WORDS = ["sparse", "dense", "window", "sink", "scan", "tile"]


def build(start, count):
    from datasets import ClassLabel, Dataset, Features, Value

    numbers = range(start, start + count)
    columns = {
        "text": [f"{WORDS[i % 6]} ä {i}: " + " ".join(WORDS[(i * j) % 6] for j in range(1, 6)) for i in numbers],
        "title": [f"row {i}" for i in numbers],
        "label": [i % 2 for i in numbers],
    }
    features = Features({"text": Value("string"), "title": Value("string"), "label": ClassLabel(names=["even", "odd"])})
    return Dataset.from_dict(columns, features)


def main(folder):
    from datasets import DatasetDict

    splits = DatasetDict(train=build(0, 10), validation=build(10, 4))
    splits.save_to_disk(folder, num_shards={"train": 2, "validation": 1})


if __name__ == "__main__":
    main(sys.argv[1])
