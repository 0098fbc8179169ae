import json
import shutil
from pathlib import Path

import pytest

from tests.train import runs

SHORT = {
    "train.steps": 6,
    "checkpoint.every": 2,
    "eval.every": 2,
    "eval.batches": 8,
    "eval.sample": 8,
}
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def workdir(text, tmp_path_factory):
    """The workdir of a short run, with checkpoints of the steps 4 and 6; for reading only."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    printed = runs.train_here(runs.load(text, SHORT), workdir)
    assert "sample, as PROMPT|CONTINUATION:" in printed
    return workdir


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny Mistral with a tokenizer that begins texts with <s>."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("huggingface") / "mistral"
    shutil.copytree(GOLDEN / "mistral_sliding", folder)
    write_tokenizer(tokenizers, folder / "tokenizer.json", 80)
    return folder


def write_tokenizer(tokenizers, path, size):
    """Writes a tokenizer of words w0, w1, ... and the special tokens <unk>, <s> and </s>."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(size - 3))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    assert json.loads(path.read_text())["model"]["vocab"]["w0"] == 3
