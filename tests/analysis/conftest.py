import pytest

from tests.train import runs


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of small text files."""
    return runs.write_text(tmp_path_factory.mktemp("text"))
