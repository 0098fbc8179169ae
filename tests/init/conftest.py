import shutil

import pytest

from tests.init.origins import GOLDEN
from tests.train import runs


@pytest.fixture(scope="session")
def workdir(text, tmp_path_factory):
    """The workdir of a short run; for reading only."""
    folder = tmp_path_factory.mktemp("source") / "run"
    runs.train_here(runs.load(text, {"train.steps": 10}), folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    """A copy of a Hugging Face folder."""
    return shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
