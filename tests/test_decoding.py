"""Models extend caches by chunks of any sizes, in rows at different positions, as they read the whole sequence.

The models are the tiny form of every causal preset and the golden folders from Hugging Face, whose weights are those of
the reference implementation. Parameters of presets are random, those that start at zero included.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import config as configs
from sparsejax.account import account_model, count_bytes
from sparsejax.config import ModelConfig
from sparsejax.interop import huggingface
from sparsejax.layers import ExpertsConfig
from sparsejax.model import Functional
from sparsejax.patterns import drawing
from sparsejax.presets import find_preset, list_presets

GOLDEN = Path(__file__).parent / "golden"
LENGTH = 300  # tokens of the longest row, which crosses the edges of tiles and wraps every ring
ROWS = 3
TILE = 128
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}  # largest difference, relative to the largest logit


def preset_path(name: str) -> str:
    """The tiny form, where a preset has one."""
    return f"preset:{name}:tiny" if inspect.signature(find_preset(name).get_config).parameters else f"preset:{name}"


def is_decoder(folder: Path) -> bool:
    """Whether a folder holds a causal model whose outputs depend on earlier tokens only."""
    config, _ = huggingface.describe(folder / "config.json")
    return config.causal and not any(layer.mixer and layer.mixer.leaks for layer in config.layers.values())


def makes_choices(config: ModelConfig) -> bool:
    """Whether rounding can change which experts a token takes or which keys a query selects."""
    layers = config.layers.values()
    return any(isinstance(layer.mlp, ExpertsConfig) or getattr(layer.mixer, "indexer", None) for layer in layers)


PRESETS = [name for name in list_presets() if configs.check(configs.load(preset_path(name))).model.causal]
GOLDENS = [f"golden/{path.parent.name}" for path in sorted(GOLDEN.glob("*/config.json")) if is_decoder(path.parent)]

# Sinks; rings of several sizes; latent attention and the delta rule; shared blocks; gated linear attention; RG-LRU.
QUICK = ("gpt_oss", "gemma3_text", "kimi_linear", "zamba2", "minimax_text01", "griffin")
MODELS = [
    pytest.param(name, marks=() if name.removeprefix("golden/") in QUICK else pytest.mark.nightly)
    for name in [*PRESETS, *GOLDENS]
]


@functools.cache
def load(name: str) -> tuple[ModelConfig, dict]:
    """Config and parameters."""
    if name in GOLDENS:
        model = huggingface.load(GOLDEN.parent / name)
        return model.config, model.parameters
    config = configs.check(configs.load(preset_path(name))).model
    random = np.random.default_rng(0)
    initial = Functional(config).init(jax.random.key(0))
    return config, jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(x.dtype), initial)


class Case:
    """A model in a dtype, its sequences, and the logits of the forward pass of each.

    Attributes:
      window: Largest window of its patterns, or another number if there is none.
      lengths: Tokens per row, of which the first has all.
    """

    def __init__(self, name: str, dtype: str = "float32"):
        config, parameters = load(name)
        self.config = dataclasses.replace(config, dtype=dtype)
        self.parameters = jax.tree.map(lambda x: x.astype(dtype), parameters)
        self.model = Functional(self.config)
        scales = [scale for _, pattern in config.connectivity for scale in drawing.list_scales(pattern)]
        self.window = max([*scales, 0]) + 1 if any(scales) else 32
        self.length = min(config.embedding.max_length or LENGTH, LENGTH)
        self.lengths = np.array([self.length, self.length - 7, 1])
        self.tokens = np.random.default_rng(1).integers(1, config.vocab, (ROWS, self.length))
        self.logits = np.asarray(jax.jit(lambda p, x: self.model.bind(p)(x))(self.parameters, self.tokens))
        self.extend = jax.jit(lambda p, *chunk: self.model.bind(p).extend(*chunk[:3], self.length, chunk[3]))

    def init_cache(self):
        return self.model.bind(self.parameters).init_cache(ROWS, self.length)

    def decode(self, chunks: Iterable[np.ndarray], size: int) -> np.ndarray:
        """Logits of rows that advance by `chunks` tokens [b] of a chunk of `size`; the cache keeps its shapes."""
        cache, at, logits = self.init_cache(), np.zeros(ROWS, int), np.zeros_like(self.logits)
        shapes = jax.tree.map(jnp.shape, cache)
        for counts in chunks:
            counts = np.minimum(counts, self.lengths - at)
            where = np.minimum(at[:, None] + np.arange(size), self.length - 1)
            chunk = np.take_along_axis(self.tokens, where, axis=1)
            y, cache = self.extend(self.parameters, chunk, cache, at, counts)
            for row, count in enumerate(counts):
                logits[row, at[row] : at[row] + count] = y[row, :count]
            at = at + counts
            assert jax.tree.map(jnp.shape, cache) == shapes
        assert (at == self.lengths).all()
        return logits

    def compare(self, chunks: Iterable[np.ndarray], size: int) -> float:
        """Largest difference between decoding and the forward pass, relative to the largest logit."""
        return self.difference(self.decode(chunks, size))

    def difference(self, decoded: np.ndarray) -> float:
        """Largest difference between decoded logits and those of the forward pass, relative to the largest logit."""
        return np.abs(self.join(decoded - self.logits)).max() / np.abs(self.logits).max()

    def rms(self, x: np.ndarray) -> float:
        """Root mean square over the tokens of all rows."""
        return float(np.sqrt((self.join(x) ** 2).mean()))

    def join(self, x: np.ndarray) -> np.ndarray:
        """The tokens of all rows, without padding."""
        return np.concatenate([row[:n] for row, n in zip(x, self.lengths, strict=True)])


@functools.cache
def build(name: str, dtype: str = "float32") -> Case:
    return Case(name, dtype)


def cut(length: int, size: int) -> list[np.ndarray]:
    """Chunks of `size` tokens in every row."""
    return [np.full(ROWS, size)] * -(-length // size)


def stagger(length: int, size: int, seed: int) -> Iterable[np.ndarray]:
    """Chunks of 0 to `size` tokens, another number in each row."""
    random, left = np.random.default_rng(seed), np.full(ROWS, length)
    while (left > 0).any():
        counts = random.integers(0, size + 1, ROWS)
        left = left - counts
        yield counts


@pytest.mark.parametrize("name", MODELS)
def test_staggered_chunks_equal_the_forward_pass(name):
    case = build(name)
    size = case.window + 1
    assert case.compare(stagger(case.length, size, seed=0), size) <= TOLERANCES["float32"]


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_of_a_cache_are_those_of_the_account(name):
    case = build(name)
    rows, _ = account_model(case.config, case.length)
    assert count_bytes(jax.eval_shape(case.init_cache)) == ROWS * sum(row.cache_bytes for row in rows)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 3, "window - 1", "window", "window + 1", TILE - 1, TILE, TILE + 1, "all"])
def test_chunks_of_any_size_equal_the_forward_pass(name, size):
    case = build(name)
    sizes = {"window - 1": case.window - 1, "window": case.window, "window + 1": case.window + 1, "all": case.length}
    size = min(max(sizes.get(size, size), 1), case.length)
    assert case.compare(cut(case.length, size), size) <= TOLERANCES["float32"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10)
@given(size=st.sampled_from([1, 2, 5, 16, 33, 130]), seed=st.integers(0, 2**32 - 1))
def test_any_split_equals_the_forward_pass(name, size, seed):
    case = build(name)
    size = min(size, case.length)
    assert case.compare(stagger(case.length, size, seed), size) <= TOLERANCES["float32"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    """Decoding is as close to float32 as the forward pass.

    Unless the model makes choices, it is also close to the forward pass: to 5 % of the largest logit or, in a model
    that amplifies rounding by more, as close as the forward pass is to float32.
    """
    case, exact = build(name, "bfloat16"), build(name).logits
    decoded = case.decode(stagger(case.length, 17, seed=0), 17)
    assert case.rms(decoded - exact) <= 1.5 * case.rms(case.logits - exact)
    if not makes_choices(case.config):
        rounding = case.difference(exact)
        assert case.difference(decoded) <= max(TOLERANCES["bfloat16"], rounding)
