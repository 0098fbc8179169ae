"""Low-rank updates of matrices (LoRA, arXiv:2106.09685), as a model with more parameters."""

from __future__ import annotations

import fnmatch
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sparsejax.config import LoraConfig, OptimizerConfig
from sparsejax.errors import InputError
from sparsejax.model import Functional, Model, check_parameters, path_of
from sparsejax.runs.groups import LORA, split_patterns

Path = tuple[Any, ...]


def adapt(model: Functional, config: OptimizerConfig) -> Functional:
    """Returns the model that an optimizer trains: with the factors of `config.lora`, if there are any."""
    return model if config.lora is None else LowRank(model, config.lora)


class LowRank(Functional):
    """A model whose matrices W [..., i, o] are W + alpha / rank * a @ b, with factors a [..., i, r] and b [..., r, o].

    The parameters are those of the model, and under `LORA` the dicts {"a", "b"} at the paths of the matrices. The
    matrices of a scanned period or of experts have stacked factors. `b` is initially zero, so that the first step
    starts from the model itself.

    Args:
      base: The model.
      config: The matrices and the rank.

    Raises:
      InputError: A pattern matches no parameter, or a parameter that is no matrix of a linear map; or the rank exceeds
        a size of a matrix.
    """

    def __init__(self, base: Functional, config: LoraConfig):
        self.base, self.config, self.lora = base, base.config, config
        self.matrices = _find_matrices(base, config)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Returns initial parameters, of which those of the model do not depend on the factors."""
        return self.add_factors(self.base.init(key), key)

    def add_factors(self, parameters: dict[str, Any], key: Key[Array, ""]) -> dict[str, Any]:
        """Adds initial factors to the parameters of the model: `a` from N(0, 1 / i), and `b` zero."""

        def draw(path: Path, leaf: jax.ShapeDtypeStruct, name: str) -> Array:
            if name == "b":
                return jnp.zeros(leaf.shape)
            draw_key = jax.random.fold_in(key, zlib.crc32(path_of(path).encode()))
            return jax.random.normal(draw_key, leaf.shape) * leaf.shape[-2] ** -0.5

        parameters = self.base.round(parameters)
        return parameters | {LORA: self._nest(lambda path, pair: {name: draw(path, pair[name], name) for name in pair})}

    def merge(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the model, in which the products of the factors are added to their matrices."""
        factors = {
            path: functools.reduce(lambda tree, key: tree[key.key], path, parameters[LORA]) for path in self.matrices
        }
        return jax.tree.map_with_path(
            lambda path, leaf: self.add_product(leaf, factors[path]) if path in factors else leaf,
            {key: tree for key, tree in parameters.items() if key != LORA},
        )

    def add_product(
        self, matrix: Float[Array, "*stack i o"], factors: Mapping[str, Array]
    ) -> Float[Array, "*stack i o"]:
        """Returns a matrix with the product of its factors."""
        return matrix + (self.lora.alpha / self.lora.rank) * (factors["a"] @ factors["b"])

    def bind(self, parameters: dict[str, Any]) -> Model:
        """Returns the model with merged parameters."""
        check_parameters(parameters, self.shapes)
        return self.base.bind(self.merge(parameters))

    @property
    def shapes(self) -> dict[str, Any]:
        """Shape and dtype per parameter."""
        return self.base.shapes | {LORA: self._nest(lambda _, pair: pair)}

    def shapes_in(self, dtype: str) -> dict[str, Any]:
        """As `Functional.shapes_in`, with the factors and their matrices in float32, in which they are merged."""
        shapes = jax.tree.map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if path in self.matrices else leaf,
            self.base.shapes_in(dtype),
        )
        return shapes | {LORA: self.shapes[LORA]}

    @property
    def axes(self) -> dict[str, Any]:
        """A tuple of logical axis names per parameter; None for the rank."""
        axes = dict(jax.tree.leaves_with_path(self.base.axes, is_leaf=lambda tree: isinstance(tree, tuple)))

        def of_factors(path: Path, _: Any) -> dict[str, Any]:
            *stack, rows, columns = axes[path]
            return {"a": (*stack, rows, None), "b": (*stack, None, columns)}

        return self.base.axes | {LORA: self._nest(of_factors)}

    @property
    def decay(self) -> dict[str, Any]:
        """Whether weight decay applies, per parameter; it does to the factors."""
        return self.base.decay | {LORA: self._nest(lambda _, pair: dict.fromkeys(pair, True))}

    def _nest(self, build: Callable[[Path, dict[str, jax.ShapeDtypeStruct]], Any]) -> dict[str, Any]:
        """The tree with `build(path, shapes of the factors)` at the path of each matrix."""
        root: dict[str, Any] = {}
        for path, pair in self.matrices.items():
            *keys, last = (entry.key for entry in path)
            parent = functools.reduce(lambda tree, key: tree.setdefault(key, {}), keys, root)
            parent[last] = build(path, pair)
        return root


def _find_matrices(model: Functional, config: LoraConfig) -> dict[Path, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes of the factors of each matrix that a pattern matches, by its path."""
    leaves = jax.tree.leaves_with_path(model.shapes)
    matrices = {path_of(path) for path, decays in jax.tree.leaves_with_path(model.decay) if decays}
    names = [path_of(path) for path, _ in leaves]
    matched: set[str] = set()
    for pattern in split_patterns(config.match):
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise InputError("optimizer.lora.match", f"{pattern!r} matches no parameter, such as {names[0]}")
        for name in hits:
            if name not in matrices:
                problem = f"{pattern!r} matches {name}, which is not the matrix of a linear map; match matrices only"
                raise InputError("optimizer.lora.match", problem)
        matched.update(hits)
    factors = {}
    for path, leaf in leaves:
        if path_of(path) in matched:
            *stack, rows, columns = leaf.shape
            if config.rank > min(rows, columns):
                problem = f"{config.rank} exceeds {path_of(path)} of shape {[rows, columns]}; reduce the rank"
                raise InputError("optimizer.lora.rank", problem)
            shapes = {"a": (*stack, rows, config.rank), "b": (*stack, config.rank, columns)}
            factors[path] = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return factors
