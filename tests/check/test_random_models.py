"""Random hybrids of all mixers, patterns and options: none is refused."""

import random
from typing import Any

import pytest

from sparsejax.check import check_model
from sparsejax.layers.remat import POLICIES
from tests.check.models import ATTENTION, EXPERTS, MIXERS, NORM, VARIANTS, build

SEEDS = 24
PATTERNS = (
    "causal",
    "causal & window({0})",
    "causal & (window({0}) | sink({1}))",
    "causal & chunk({0})",
    "causal & (dilated({1}, 0, stride=3) | sink(1))",
    "causal & (strided({0}) | window({1}))",
    "causal & fixed({0}, 1)",
    "causal & (window({0}) | globals(0))",
    "causal & (window({1}) | random(2, tile=8, seed={0}))",
    "per_head(causal & window({0}), causal & chunk({1}))",
)
TWO_SIDED = ("full", "window({0}, {1})", "window({1}) | globals(0)", "bigbird(8, 1, seed={0})", "prefix({0}) | causal")
MLPS = (
    None,
    {"kind": "gated", "width": 16, "activation": "gelu"},
    {"kind": "plain", "width": 16, "activation": "relu"},
    EXPERTS,
    EXPERTS | {"router": "sigmoid", "selection_bias": True, "renormalize": True, "shared_width": 8},
)


def draw_mixer(draw: random.Random, length: int, causal: bool) -> dict[str, Any] | None:
    two_sided = TWO_SIDED if length > 24 else [pattern for pattern in TWO_SIDED if "bigbird" not in pattern]
    pattern = draw.choice(PATTERNS if causal else two_sided).format(draw.randint(1, 80), draw.randint(1, 12))
    attention = ATTENTION | {
        "pattern": pattern,
        "kv_heads": draw.choice((1, 2)),
        "impl": draw.choice(("auto", "gather", "segment", "dense")),
        "rope": draw.choice((None, {"base": 100.0}, {"base": 10.0, "interleaved": True})),
        "qk_norm": draw.choice((None, NORM)),
        "sinks": draw.random() < 0.3,
        "gate": draw.random() < 0.3,
        "alibi": draw.random() < 0.2,
        "softcap": draw.choice((None, 5.0)),
    }
    if not causal:
        return attention if draw.random() < 0.7 else VARIANTS["lsh"] | {"causal": False, "after": 1}
    recurrent = [mixer for mixer in MIXERS.values() if mixer["kind"] not in ("attention", "parallel")]
    mixer = draw.choice((attention, draw.choice(recurrent)))
    if draw.random() < 0.15:
        return {"kind": "parallel", "branches": {"a": {"mixer": attention}, "b": {"mixer": mixer, "scale_out": 0.5}}}
    return mixer


def draw_model(seed: int) -> tuple[Any, int]:
    """A model and a length."""
    draw = random.Random(seed)
    causal, width, reversible = draw.random() < 0.8, draw.choice((8, 16, 24)), draw.random() < 0.15
    length = draw.choice((24, 64, 96, 150))
    norm = draw.choice((NORM, NORM | {"kind": "layer", "bias": True}))

    def draw_layer() -> dict[str, Any]:
        mixer, mlp = draw_mixer(draw, length, causal), draw.choice(MLPS)
        if mlp is not None and draw.random() < 0.1:
            mixer = None
        position = "pre" if reversible else draw.choice(("pre", "post", "both"))
        remat = draw.choice(("none", *POLICIES))
        return {"mixer": mixer, "mlp": mlp, "norm": norm, "norm_position": position, "remat": remat}

    embedding = draw.choice(({}, {"positions": length}, {"positions": length + 9, "padding": 1}, {"scale": 4.0}))
    config = build(
        "conv",
        draw.choice(("a", "a b", "3x(a)", "2x(a b)", "a 2x(b c)", "2x(a b) c")),
        layers={name: draw_layer() for name in "abc"},
        vocab=draw.choice((2, 3, 50)),
        width=width,
        norm=norm,
        tied=draw.random() < 0.5 and not reversible,
        scan=draw.random() < 0.7,
        dtype=draw.choice(("float32", "bfloat16")),
        causal=causal,
        reversible=reversible,
        dropout=draw.choice((0.0, 0.2)),
        embedding=embedding,
    )
    return config, length


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_false_alarm(seed):
    config, length = draw_model(seed)
    certificate = check_model(config, length, seed=seed)
    assert certificate.passed, (list(certificate.failures), config)
