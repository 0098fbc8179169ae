import os
import pathlib
import tempfile

from jaxtyping import install_import_hook

from tests.devices import FAST_COMPILATION

# Shapes and types of every annotated function in these packages are checked when tests call it.
CHECKED = ["ops", "layers", "embedding", "model", "inference.evaluation", "runs", "train"]
install_import_hook([f"sparsejax.{name}" for name in CHECKED], "beartype.beartype")

if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):  # which a nightly run sets
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}".strip()

# No test reads or writes the record of `sparsejax doctor` in the user's cache.
os.environ["SPARSEJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparsejax-cache-")

import jax
import pytest
from hypothesis import settings
from ml_collections import ConfigDict

from sparsejax import layers, patterns
from tests import messages

MAPS, MOST_MAPS = pathlib.Path("/proc/self/maps"), 15_000  # regions of memory of this process, where Linux lists them

# The same examples on every machine and in every run; the time of an example is not under test.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


def pytest_addoption(parser):
    parser.addoption("--refresh-messages", action="store_true", help="rewrite tests/golden/messages.txt")


def pytest_configure(config):
    if config.getoption("--refresh-messages"):
        os.environ[messages.REFRESH] = "1"


# XLA reads its number of threads when it starts. Interpreting kernels for GPUs takes more threads than small machines
# have cores; older versions cannot interpret them.
if jax.__version_info__ >= (0, 12):
    os.environ.setdefault("NPROC", "8")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Compiles each program once per session: the workers and the processes that tests start share a cache."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = str(shared / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_runtest_teardown():
    """Frees the compiled programs of a worker before their number crashes LLVM.

    Each maps memory, of which Linux allows 65,530 regions per process (https://github.com/jax-ml/jax/issues/27201).
    """
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def registries(monkeypatch):
    """Forgets the patterns and the mixers that a test registers, and the entry points that it installs."""
    for registry in (patterns.REGISTRY, layers.MIXERS):
        monkeypatch.setattr(registry, "members", dict(registry.members))
        monkeypatch.setattr(registry, "_installed", None)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of small text files, for reading only."""
    from tests.train import runs  # imports the training loop

    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def tiny_config() -> ConfigDict:
    """A complete, fresh configuration of a hybrid model that trains in seconds: every section, every key."""
    return ConfigDict(
        {
            "model": {
                "vocab": 256,
                "width": 32,
                "schedule": "2x(ssm local) full",
                "layers": {
                    "ssm": _layer(_mamba()),
                    "local": _layer(_attention("causal & (window(7) | sink(2))", rope={"base": 10_000.0})),
                    "full": _layer(_attention("causal", rope=None)),
                },
                "norm": _norm(),
                "tied": True,
                "dtype": "float32",
                "scan": True,
            },
            "data": {"task": "text", "files": "", "length": 64},
            "train": {
                "steps": 20,
                "batch": 4,
                "accumulate": 1,
                "seed": 0,
                "log_every": 5,
                "bad_loss": "stop",
                "spike": 0.0,
                "check": False,
            },
            "optimizer": {
                "learning_rate": 3e-3,
                "final_rate": 0.1,
                "warmup": 2,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 1.0,
            },
            "checkpoint": {"every": 10, "keep_last": 2, "keep_best": 1},
            "sharding": {"data": -1, "fsdp": 1, "tensor": 1},
            "eval": {"every": 10, "batch": 4, "batches": 2, "sample": 8},
        }
    )


def _layer(mixer: dict) -> dict:
    mlp = {"kind": "gated", "width": 64, "activation": "silu"}
    return {"mixer": mixer, "mlp": mlp, "norm": _norm(), "norm_position": "pre", "remat": "none"}


def _attention(pattern: str, rope: dict | None) -> dict:
    return {
        "kind": "attention",
        "pattern": pattern,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 8,
        "rope": rope,
        "qk_norm": _norm(),
        "impl": "auto",
    }


def _mamba() -> dict:
    sizes = {"inner": 64, "state": 4, "conv": 4, "dt_rank": 4}
    return {"kind": "mamba", "dt_min": 1e-3, "dt_max": 0.1} | sizes


def _norm() -> dict:
    return {"kind": "rms", "eps": 1e-6}
