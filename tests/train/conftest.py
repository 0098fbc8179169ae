import pytest

from tests.train import runs


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """The workdir of a run with dropout and evaluation settings, and the text that it printed; for reading only."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, runs.train_here(runs.load(text, runs.TRAINED), workdir)
