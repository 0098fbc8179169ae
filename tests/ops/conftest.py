import jaxtyping
import pytest

from sparsejax.ops import verification


@pytest.fixture(autouse=True)
def _empty_user_cache(monkeypatch, tmp_path):
    """Tests neither read nor write the record of the user who runs them."""
    monkeypatch.setenv(verification.CACHE_VARIABLE, str(tmp_path / "user-cache"))
    verification.suggest_doctor.cache_clear()


@pytest.fixture
def unchecked_types():
    """Turns off the type checker of the test session, so that a function's own check sees the error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
