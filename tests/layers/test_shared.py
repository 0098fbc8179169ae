"""Shared blocks with adapters per layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.layers import (
    BranchConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    ParallelConfig,
    RopeConfig,
    SharedConfig,
    SideConfig,
)
from sparsejax.model import Functional
from tests.layers import reference
from tests.layers.test_mixers import MIXED, attention, decode
from tests.messages import rejects
from tests.tolerances import assert_close

NORM = NormConfig(kind="rms", eps=1e-6)
BLOCK = SharedConfig(
    mixer=dataclasses.replace(attention("causal"), rope=RopeConfig(base=50.0)),
    mlp=MlpConfig(kind="gated", width=10, activation="gelu"),
    norm=NORM,
)
SSM = LayerConfig(mixer=MIXED["mamba"]["mamba"], mlp=None, norm=NORM, norm_position="pre", remat="full")
CONFIG = ModelConfig(
    vocab=11,
    width=6,
    schedule="ssm 2x(a b)",
    layers={
        "ssm": SSM,
        "a": dataclasses.replace(SSM, side=SideConfig(shared="one", mixer_rank=2, mlp_rank=3)),
        "b": dataclasses.replace(SSM, side=SideConfig(shared="two")),
    },
    norm=NORM,
    tied=True,
    dtype="float32",
    scan=True,
    shared={"one": BLOCK, "two": BLOCK},
)
TOKENS = np.random.default_rng(0).integers(0, 11, size=(2, 9))


def fill(config: ModelConfig) -> dict:
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0.4 if len(leaf.shape) == 1 else 0, 0.4, leaf.shape), jnp.float32),
        Functional(config).shapes,
    )


def expected_logits(parameters: dict) -> np.ndarray:
    """The model in float64: the block reads [x, embedding], and adapters are separate linear maps."""
    w = jax.tree.map(np.float64, parameters)
    x = start = w["embedding"]["tokens"][TOKENS]
    repetitions = [jax.tree.map(lambda leaf, i=i: leaf[i], w["period"]) for i in range(2)]
    layers = [
        ("ssm", w["before"][0]),
        *((name, repetition[k]) for repetition in repetitions for k, name in enumerate("ab")),
    ]
    for name, layer_w in layers:
        side = CONFIG.layers[name].side
        extra = (
            0 if side is None else run_block(w["shared"][side.shared], layer_w["side"], np.concatenate([x, start], -1))
        )
        read = reference.norm(NORM, layer_w["mixer_residual"]["before"], x + extra)
        x = x + reference.mamba(SSM.mixer, layer_w["mixer"], read)
    return reference.norm(NORM, w["norm"], x) @ w["embedding"]["tokens"].T


def run_block(w: dict, layer_w: dict, x: np.ndarray) -> np.ndarray:
    def adapt(part: str, name: str, number: int, key: str) -> dict:
        adapter = layer_w["adapters"].get(key) if "adapters" in layer_w else None
        update = 0 if adapter is None else adapter["down"] @ adapter["up"][number]
        return w[part][name] | {"weight": w[part][name]["weight"] + update}

    mixer = w["mixer"] | {name: adapt("mixer", name, 0, name) for name in ("query", "key", "value")}
    mlp = w["mlp"] | {name: adapt("mlp", name, i, "mlp") for i, name in enumerate(("gate", "up"))}
    y = reference.attention(BLOCK.mixer, mixer, reference.norm(NORM, w["mixer_norm"], x))
    y = reference.norm(NORM, w["mlp_norm"], y)
    gate = y @ mlp["gate"]["weight"]
    erf = np.vectorize(math.erf)
    hidden = gate / 2 * (1 + erf(gate / np.sqrt(2))) * (y @ mlp["up"]["weight"])
    return hidden @ mlp["down"]["weight"] @ layer_w["out"]["weight"]


def test_equals_the_reference_whole_and_in_steps():
    parameters = fill(CONFIG)
    model = Functional(CONFIG).bind(parameters)
    logits, steps = jax.jit(lambda tokens: (model(tokens), decode(model, tokens, 9)))(TOKENS)
    expected = expected_logits(parameters)
    assert_close("logits", logits, expected, "float32")
    assert_close("steps", steps, expected, "float32")


def test_every_layer_adds_to_the_gradient_of_what_it_shares():
    parameters = fill(CONFIG)
    gradient = jax.jit(jax.grad(lambda p: Functional(CONFIG).bind(p)(jnp.asarray(TOKENS))[..., 3].sum()))(parameters)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["shared"]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["period"]))


def test_rejects_an_unknown_block_a_side_without_a_mixer_and_a_block_that_looks_ahead():
    layers = CONFIG.layers | {"a": dataclasses.replace(SSM, side=SideConfig(shared="three"))}
    with rejects(InputError, "layers.a.side.shared"):
        dataclasses.replace(CONFIG, layers=layers)
    with rejects(InputError, "side"):
        dataclasses.replace(SSM, mixer=None, mlp=BLOCK.mlp, side=SideConfig(shared="one"))
    ahead = dataclasses.replace(BLOCK, mixer=dataclasses.replace(BLOCK.mixer, pattern="full"))
    with rejects(InputError, "shared.two.mixer.pattern"):
        dataclasses.replace(CONFIG, shared=CONFIG.shared | {"two": ahead})


def test_a_pattern_of_a_branch_or_a_block_must_fit_the_length():
    outside = attention("causal & (window(1) | globals([999]))")
    with rejects(InputError, "mixer.pattern"):
        dataclasses.replace(BLOCK, mixer=outside).check(256)
    parallel = ParallelConfig(branches={"ssm": BranchConfig(mixer=SSM.mixer), "global": BranchConfig(mixer=outside)})
    with rejects(InputError, "mixer.branches.global.mixer.pattern"):
        dataclasses.replace(SSM, mixer=parallel).check(256)
    dataclasses.replace(SSM, mixer=parallel).check(1000)
