"""Random hybrids of every mixer that can be sharded, on random meshes."""

import dataclasses
import random
from typing import Any

from sparsejax.config import ModelConfig
from sparsejax.layers import ExpertsConfig
from sparsejax.layers.remat import POLICIES
from tests.check.models import ATTENTION, BLOCK, EXPERTS, MIXERS, NORM, SIDE, VARIANTS, build

MESHES = [  # data, fsdp, sequence, tensor; at most eight devices
    (1, 1, 2, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 2),
    (1, 1, 4, 1),
    (2, 1, 4, 1),
    (1, 1, 4, 2),
    (1, 1, 8, 1),
]
PATTERNS = (
    "causal",
    "causal & window({a})",
    "causal & (window({a}) | sink({s}))",
    "causal & chunk({a})",
    "causal & (dilated({s}, 0, stride=3) | sink(1))",
    "causal & (strided({s}) | window({a}))",
    "causal & fixed({s}, 1)",
    "causal & (window({s}) | globals(0))",
    "causal & (window({s}) | random(2, tile=8, seed={a}))",
    "per_head(causal & window({a}), causal & chunk({s}))",
)
TWO_SIDED = (
    "full",
    "window({a}, {s})",
    "window({s}) | globals([0, {s}])",
    "prefix({a}) | causal",
    "window({s}) | random(1, tile=8, seed={a})",
    "per_head(full, causal & window({a}))",
)
SELECTING = ("tiles", "moba", "infllm", "indexed", "pooled", "selected", "routing", "nsa", "compressed")
RECURRENT = ("conv", "mamba", "mamba2", "lightning", "delta", "rglru")
SELECTIONS = (
    {"kind": "tokens", "count": 5},
    {"kind": "tokens", "count": 9, "mass": 0.5},
    {"kind": "tiles", "count": 3, "block": 4, "pooling": "mean"},
    {"kind": "tiles", "count": 2, "block": 8, "pooling": "logsumexp"},
    {"kind": "moba", "count": 2, "block": 6},
)
INDEXERS = (
    {"heads": 2, "width": 8, "top_k": 5, "loss_weight": 0.1},
    {"heads": 2, "width": 8, "top_k": 6, "loss_weight": 0.1, "dense": True},
    {"heads": 2, "width": 8, "top_k": 2, "block": 4, "local": 1, "loss_weight": 0.1},
    {"heads": 2, "width": 8, "top_k": 2, "block": 4, "pool": "keys", "weights": False, "loss_weight": 0.1},
)
MLPS = (
    None,
    {"kind": "gated", "width": 16, "activation": "gelu"},
    {"kind": "plain", "width": 16, "activation": "relu"},
    EXPERTS | {"balance_weight": 0.1, "router_z_weight": 0.01},
    EXPERTS | {"router": "sigmoid", "selection_bias": True, "renormalize": True, "shared_width": 8}
    | {"balance_weight": 0.1, "balance": "sequence"},
    EXPERTS | {"by_token": True},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its rows and the mesh that shares them."""

    model: ModelConfig
    length: int
    mesh: tuple[int, int, int, int]
    packed: bool
    dtype: str
    dropout: float


def draw_pattern(draw: random.Random, length: int, causal: bool) -> str:
    sizes = {"a": draw.randint(1, length), "s": draw.randint(2, min(12, length - 1))}
    return draw.choice(PATTERNS if causal else TWO_SIDED).format(**sizes)


def draw_attention(draw: random.Random, length: int, causal: bool) -> dict[str, Any]:
    """Attention; its pattern is causal if it selects keys."""
    heads, kv_heads = draw.choice(((2, 1), (2, 2), (4, 2)))
    pattern = draw_pattern(draw, length, causal)
    attention = ATTENTION | {
        "pattern": pattern,
        "heads": 2 if "per_head" in pattern else heads,
        "kv_heads": 1 if "per_head" in pattern else kv_heads,
        "impl": draw.choice(("auto", "gather", "ring", "ring", "segment", "dense")),
        "rope": draw.choice((None, {"base": 100.0}, {"base": 10.0, "interleaved": True})),
        "qk_norm": draw.choice((None, NORM)),
        "sinks": draw.random() < 0.4,
        "gate": draw.random() < 0.3,
        "alibi": draw.random() < 0.2,
        "softcap": draw.choice((None, 5.0)),
        "growth": draw.choice((0.0, 0.1)),
        "growth_period": 8,
    }
    choice = draw.random()
    if causal and choice < 0.2:
        select = draw.choice([select for select in SELECTIONS if select.get("block", 1) <= length])
        attention |= {"pattern": draw.choice(("causal", f"causal & window({length // 2})")), "select": select}
    elif causal and choice < 0.4:
        indexer = draw.choice([x for x in INDEXERS if x["top_k"] * x.get("block", 1) < length])
        attention |= {"pattern": "causal", "alibi": False, "indexer": indexer}
    elif choice < 0.5:
        attention |= {"rope": None, "alibi": False, "relative": 8}
    if causal and choice < 0.4 and attention["impl"] == "ring":
        attention["impl"] = "auto"  # selected keys do not travel in a ring
    return attention


def draw_mixer(draw: random.Random, length: int, causal: bool) -> dict[str, Any]:
    attention = draw_attention(draw, length, causal)
    if not causal:
        return attention
    latent = VARIANTS["latent"] | {
        "pattern": draw_pattern(draw, length, True),
        "impl": draw.choice(("auto", "ring", "dense")),
    }
    selecting = [name for name in SELECTING if fits(MIXERS[name], length)]
    mixer = draw.choice((attention, latent, MIXERS[draw.choice(selecting)], *[MIXERS[draw.choice(RECURRENT)]] * 2))
    if "chunk" in mixer:
        mixer = mixer | {"chunk": draw.choice((4, 16))}
    if mixer["kind"] == "delta":
        mixer = mixer | {"channel_decay": draw.random() < 0.5, "negative": draw.random() < 0.5}
    if draw.random() < 0.2:
        return {"kind": "parallel", "branches": {"a": {"mixer": attention}, "b": {"mixer": mixer, "scale_out": 0.5}}}
    return mixer


def fits(mixer: dict[str, Any], length: int) -> bool:
    """Whether the blocks of a mixer are not longer than a sequence."""
    sizes = (mixer, mixer.get("select", {}), mixer.get("indexer", {}))
    names = ("block", "select_block", "compress_length", "window")
    return all(section.get(name, 1) <= length for section in sizes for name in names)


def draw_case(seed: int) -> Case:
    draw = random.Random(seed)
    causal, mesh = draw.random() < 0.8, draw.choice(MESHES)
    length = mesh[2] * draw.choice((1, 2, 3, 5, 7, 8, 11, 16))
    length = max(length, 12 // mesh[2] * mesh[2] + mesh[2])  # selections need a few blocks
    norm = draw.choice((NORM, NORM | {"kind": "layer", "bias": True}))
    reversible = draw.random() < 0.1
    side = not reversible and draw.random() < 0.15
    hyper = {"kind": "sinkhorn", "streams": 2, "eps": 1e-6, "steps": 3, "floor": 1e-6}
    hyper = hyper if not (side or reversible) and draw.random() < 0.1 else None

    def draw_layer() -> dict[str, Any]:
        layer = {"mixer": draw_mixer(draw, length, causal), "mlp": draw.choice((None, *MLPS)), "norm": norm}
        layer["norm_position"] = "pre" if reversible or hyper else draw.choice(("pre", "post", "both"))
        layer["remat"] = draw.choice(("none", "none", *POLICIES))
        return layer | {"side": SIDE if side and causal and draw.random() < 0.5 else None}

    schedule = draw.choice(("a", "a", "a", "a", "2x(a)", "a b"))
    model = build(
        "conv",
        schedule,
        layers={name: draw_layer() for name in "ab"},
        shared={"block": BLOCK} if side else {},
        vocab=11,
        norm=norm,
        tied=draw.random() < 0.5 and not reversible,
        scan=True,
        causal=causal,
        reversible=reversible,
        hyper=hyper,
        embedding=draw.choice(({}, {"positions": length}, {"scale": 4.0})),
        allow_leaks=True,
    )
    dtype = "float64" if makes_choices(model) else draw.choice(("float64", "float64", "float32"))
    return Case(model, length, mesh, draw.random() < 0.6, dtype, draw.choice((0.0, 0.0, 0.1)))


def makes_choices(model: ModelConfig) -> bool:
    """Whether rounding can change which keys or experts are chosen."""
    mixers = [layer.mixer for layer in model.layers.values() if layer.mixer is not None]
    mixers += [branch.mixer for mixer in mixers for branch in getattr(mixer, "branches", {}).values()]
    experts = any(isinstance(layer.mlp, ExpertsConfig) for layer in model.layers.values())
    return experts or any(mixer.selects or mixer.indexers for mixer in mixers)
