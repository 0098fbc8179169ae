"""One suite for every implementation of `attend`, against the NumPy reference in float64.

An implementation that does not support a case skips it, which those in `SUPPORT_ALL` never do. An implementation that
does not run on this machine runs in interpret mode.
"""

import contextlib
import functools
import importlib
import itertools
import math
import os
import re
import subprocess
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from sparsejax.errors import InputError
from sparsejax.ops import IMPLEMENTATIONS, Implementation, ImplementationError, attend, attend_cached, merge_lse
from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.gather import MAX_GROUPS, group_rows
from sparsejax.ops.reference import Attention, attend_reference
from sparsejax.ops.selection import Selection
from sparsejax.ops.verification import write_record
from sparsejax.patterns import Pattern, parse
from sparsejax.patterns.library import NAMES
from tests.devices import simulate
from tests.messages import check_message, rejects
from tests.patterns.strategies import patterns_with_heads, shared_patterns
from tests.tolerances import assert_close, assert_norm_close

IMPLS = [impl.name for impl in IMPLEMENTATIONS if impl.name != "cudnn"]  # test_cudnn.py: it runs on NVIDIA GPUs only
SUPPORT_ALL = {"dense", "gather", "segment"}


class Case(NamedTuple):
    """Shapes, options and dtype.

    `segments`: "one" array for queries and keys, or a "pair" of arrays. `choice`: number of scopes, blocks that each
    query chooses at random, and keys per block; blocks are counted from the start of each segment.
    """

    pattern: str
    t: int
    s: int
    heads: tuple[int, int] = (2, 1)  # of queries, of keys and values
    softcap: float | None = None
    scale: float | None = None
    sink: bool = False
    segments: str | None = None
    alibi: bool = False
    values: int = 8  # width of values
    dtype: str = "float32"
    q_offset: int | None = None
    choice: tuple[int, int, int] | None = None

    @property
    def slopes(self) -> jax.Array | None:
        """Slope per head, all different."""
        return jnp.float32(0.3) / jnp.arange(1, self.heads[0] + 1, dtype=jnp.float32) if self.alibi else None


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sink: np.ndarray | None
    segments: np.ndarray | tuple[np.ndarray, np.ndarray] | None
    d_out: np.ndarray  # cotangents
    d_lse: np.ndarray
    selection: Selection | None = None


def wide(dtype: str) -> str:
    """The dtype of sums, of the softmax and of what is not in the dtype of the inputs."""
    return "float64" if dtype == "float64" else "float32"


def draw_inputs(case: Case, batch: int = 2, width: int = 8) -> Inputs:
    random = np.random.default_rng(case.t * 1000 + case.s)
    (h, g), t, s = case.heads, case.t, case.s

    def normal(*shape, dtype=case.dtype):
        return random.standard_normal(shape).astype(jnp.dtype(dtype))

    segments = None
    if case.segments is not None:  # packed documents whose lengths differ by row, and whose ids descend
        segments = tuple(np.sort(random.integers(-1, 3, (batch, n)))[:, ::-1] for n in (t, s))
        segments = segments[0] if case.segments == "one" else segments
    selection = None if case.choice is None else draw_choice(case, batch, segments)
    return Inputs(
        q=normal(batch, t, h, width),
        k=normal(batch, s, g, width),
        v=normal(batch, s, g, case.values),
        sink=normal(h, dtype=wide(case.dtype)) if case.sink else None,
        segments=segments,
        d_out=normal(batch, t, h, case.values),
        d_lse=normal(batch, t, h, dtype=wide(case.dtype)),
        selection=selection,
    )


def draw_choice(case: Case, batch: int, segments) -> Selection:
    """Blocks in ascending order. Queries of a tile prefer the same blocks, and some choose none."""
    random, (scopes, count, size) = np.random.default_rng(case.s), case.choice
    k_ids = segments[1] if isinstance(segments, tuple) else segments
    blocks = make_blocks(case.s, size, None if k_ids is None else jnp.asarray(k_ids))
    last = np.broadcast_to(np.asarray(blocks.of_key[:, -1]), (batch,))[:, None, None, None]
    shape = batch, scopes, case.t, blocks.count
    scores = random.random(shape) + random.random(shape)[:, :, : -(-case.t // 64)].repeat(64, axis=2)[:, :, : case.t]
    scores = np.where(np.arange(blocks.count) <= last, scores, -1)
    groups = np.argsort(-scores, axis=-1)[..., :count]
    groups = np.where((groups <= last) & (random.random(shape[:3]) < 0.9)[..., None], groups, blocks.count)
    groups = np.sort(groups, axis=-1)
    return Selection(jnp.asarray(np.where(groups < blocks.count, groups, -1), jnp.int32), blocks)


def reference(case: Case, inputs: Inputs, counts: np.ndarray) -> Attention:
    """The expected result if each key counts `counts` [b, h, t, s] times."""
    q, k, v, sink, _, d_out, d_lse, _ = inputs
    slopes = None if case.slopes is None else np.asarray(case.slopes)
    options = {"scale": case.scale, "softcap": case.softcap, "sink_logits": sink, "alibi_slopes": slopes}
    return attend_reference(q, k, v, counts, d_out, d_lse, q_offset=case.q_offset or 0, **options)


def counts_of(case: Case, inputs: Inputs) -> np.ndarray:
    q, k, t = np.arange(case.t)[:, None], np.arange(case.s)[None, :], case.t
    if case.q_offset is not None:  # the queries continue a sequence that ends with the last key or query
        q, t = q + case.q_offset, max(case.t + case.q_offset, case.s)
    counts = parse(case.pattern).counts(q, k, t, case.s)
    counts = np.broadcast_to(counts, (len(inputs.q), case.heads[0], case.t, case.s))
    if inputs.selection is not None:
        groups, of_key = np.asarray(inputs.selection.groups), np.asarray(inputs.selection.blocks.of_key)
        chosen = (groups[..., None] == of_key[:, None, None, None]).any(axis=3)
        counts = counts * chosen.repeat(case.heads[0] // groups.shape[1], axis=1)
    if inputs.segments is None:
        return counts
    queries, keys = inputs.segments if isinstance(inputs.segments, tuple) else (inputs.segments,) * 2
    return counts * (queries[:, :, None] == keys[:, None, :])[:, None]


def attend_by(impl: str, *arguments, **options):
    """`attend` by one implementation, in interpret mode if it does not run on this machine."""
    try:
        return attend(*arguments, impl=impl, **options)
    except ImplementationError:
        if impl in SUPPORT_ALL:
            raise
        return attend(*arguments, impl=impl, interpret=True, **options)


def compute(impl: str, case: Case, inputs: Inputs, transform=lambda function: function) -> Attention:
    pattern = parse(case.pattern)

    def run(q, k, v, sink, segments, d_out, d_lse, selection):
        def forward(q, k, v, sink):
            options = {"softcap": case.softcap, "scale": case.scale, "alibi_slopes": case.slopes}
            options |= {"q_offset": case.q_offset, "selection": selection}
            arrays = {"sink_logits": sink, "segment_ids": segments}
            return attend_by(impl, q, k, v, pattern, return_lse=True, **options, **arrays)

        (out, lse), backward = jax.vjp(transform(forward), q, k, v, sink)
        return Attention(out, lse, *backward((d_out, d_lse)))

    return jax.jit(run)(*inputs)


def check(impl: str, case: Case, inputs: Inputs | None = None, **how):
    inputs = draw_inputs(case) if inputs is None else inputs
    counts = counts_of(case, inputs)
    expected, actual = reference(case, inputs, counts), compute(impl, case, inputs, **how)
    assert (actual.sink is None) == (not case.sink)
    for name, array, wanted in zip(Attention._fields, actual, expected, strict=True):
        if array is not None:
            assert array.dtype == (wide(case.dtype) if name in ("lse", "sink") else case.dtype), name
            # The log-sum-exp of inputs in few bits is still exact; a sink's gradient depends on the values.
            assert_close(name, array, wanted, wide(case.dtype) if name == "lse" else case.dtype)
            if impl not in SUPPORT_ALL and name != "sink":  # a sum of few terms that nearly cancel
                assert_norm_close(name, array, wanted, wide(case.dtype) if name == "lse" else case.dtype)

    without_keys = ~counts.any(axis=-1).transpose(0, 2, 1)
    assert (np.asarray(actual.out)[without_keys] == 0).all()
    assert (np.asarray(actual.q)[without_keys] == 0).all()
    floor = np.broadcast_to(-np.inf if inputs.sink is None else inputs.sink, without_keys.shape)
    np.testing.assert_array_equal(np.asarray(actual.lse)[without_keys], floor[without_keys])
    (h, g), (b, _, _, s) = case.heads, counts.shape
    unused = ~counts.reshape(b, g, h // g, case.t, s).any(axis=(2, 3)).transpose(0, 2, 1)
    assert (np.asarray(actual.k)[unused] == 0).all()
    assert (np.asarray(actual.v)[unused] == 0).all()


@contextlib.contextmanager
def unless_unsupported(impl: str, otherwise):
    try:
        yield
    except ImplementationError as error:
        if impl in SUPPORT_ALL:
            raise
        otherwise(str(error))


# No tile divides the lengths. Each case is compiled, so options are distributed over the patterns.
CASES = [
    Case("full", 1, 1),
    Case("full", 7, 129, heads=(4, 4), sink=True),
    Case("full", 7, 7, scale=0.0),
    Case("causal", 391, 391),
    Case("causal", 129, 65, heads=(4, 2), softcap=3.0, sink=True),
    Case("window(63)", 300, 300, heads=(4, 1), segments="one", sink=True),
    Case("window(5, 70)", 65, 200, heads=(4, 2), softcap=2.0, q_offset=100),
    Case("chunk(100)", 300, 129, segments="pair"),
    Case("sink(3)", 129, 7, dtype="float16", softcap=5.0),
    Case("globals([0, 130, -1])", 200, 300, scale=-0.7, q_offset=100),
    Case("causal & (window(64) | sink(4))", 391, 391, heads=(4, 2), sink=True, dtype="bfloat16"),
    Case("window(20, 20) | globals(2)", 300, 300, heads=(2, 2), dtype="float16", sink=True, segments="one"),
    Case("per_head(causal, globals([70]), causal, causal)", 129, 129, heads=(4, 2), sink=True, segments="pair"),
    Case("per_head(full, causal & chunk(50)) | sink(1)", 65, 129, (2, 2), softcap=4.0, dtype="bfloat16", q_offset=64),
    Case("per_head(window(70), window(70))", 129, 129, heads=(2, 1)),
    Case("dilated(9, 4, stride=7)", 200, 129, sink=True),
    Case("causal & (window(30) | strided(30))", 300, 300, heads=(4, 2)),
    Case("causal & (chunk(40) | fixed(40, 3))", 300, 300, segments="one"),
    Case("causal | prefix(70)", 129, 129, softcap=3.0),
    Case("global_keys([3, -1]) | global_queries([70])", 129, 200, q_offset=0),
    Case("random(2, tile=16, seed=1) - sink(2)", 200, 150, heads=(2, 2), sink=True),
    Case("bigbird_random(2, tile=16, seed=1) | window(3, 3)", 200, 200, dtype="bfloat16"),
    Case("tiles([[0, 1, 3], [0, 1, 2], [1, 2, 3], [0, 2, 3]])", 250, 250),
    Case("causal & shift(window(70, 20), 90)", 250, 250, sink=True),
    Case("multiset(causal, window(30), sink(9), sink(2))", 130, 130, heads=(4, 2), sink=True, softcap=3.0),
    Case("per_head(multiset(full, chunk(20)), causal)", 70, 70, segments="pair"),
    Case("causal & window(90)", 129, 129, heads=(4, 2), values=12, sink=True),
    Case("window(20, 20) | globals(2)", 129, 200, values=13, softcap=2.0, segments="pair", q_offset=30),
    Case(
        "per_head(full, window(9, 9)) | sink(1)", 70, 129, (2, 2), values=16, alibi=True, dtype="bfloat16", q_offset=59
    ),
    Case("full", 128, 128, heads=(4, 2), alibi=True),  # no tile needs a mask
    Case("multiset(causal, sink(9))", 130, 130, heads=(4, 2), alibi=True, softcap=3.0, sink=True, segments="one"),
    Case("window(30, 70)", 200, 129, heads=(4, 1), alibi=True, values=5),
    Case("causal & (window(64) | sink(4))", 70, 391, heads=(4, 2), sink=True, q_offset=321),  # the next chunk
    Case("causal", 1, 300, heads=(4, 2), alibi=True, q_offset=299),  # decoding
    Case("bigbird_random(2, tile=16, seed=1) | global_queries([-1])", 60, 200, q_offset=140),
    Case("causal & (strided(30) | fixed(20, 3))", 50, 60, q_offset=40, segments="pair"),  # beyond the last key
]

# Rows without keys, and keys that no row attends to.
WITHOUT_KEYS = [
    Case("globals([])", 70, 65),
    Case("globals([])", 70, 65, sink=True, heads=(4, 2)),
    Case("sink(1) & window(2)", 129, 129, softcap=2.0),
    Case("window(3)", 200, 65, sink=True, segments="pair"),
    Case("per_head(globals([]), causal)", 70, 70, segments="pair", dtype="bfloat16"),
]


# Blocks that data choose, counted from the start of the sequence or of each document, one word of bits or several;
# tiles in which all queries chose all blocks, and masks that are looked up.
CHOICES = [
    Case("causal", 300, 300, (4, 2), sink=True, choice=(2, 3, 20)),
    Case("causal & window(150)", 200, 200, (4, 2), segments="one", softcap=3.0, sink=True, choice=(4, 4, 7)),
    Case("full", 70, 300, segments="pair", choice=(1, 40, 1), q_offset=0),
    Case("causal", 300, 300, choice=(1, 2, 150), dtype="bfloat16"),
    Case("window(300, 300)", 300, 260, (2, 2), choice=(1, 3, 128), dtype="bfloat16"),
    Case("causal & (window(70) | random(2, tile=16, seed=1))", 150, 150, choice=(1, 30, 3)),
    Case("causal", 70, 300, (6, 3), choice=(3, 3, 64), q_offset=230, dtype="float16"),
    Case("causal & window(90)", 260, 260, segments="one", choice=(1, 5, 64), dtype="bfloat16"),
]


# Daily cases of interpreted kernels. Other cases are nightly, and so are all cases of the kernels for GPUs, whose
# interpreter takes seconds per block of threads.
DAILY = {
    Case("causal", 129, 65, heads=(4, 2), softcap=3.0, sink=True),
    Case("window(63)", 300, 300, heads=(4, 1), segments="one", sink=True),
    Case("per_head(causal, globals([70]), causal, causal)", 129, 129, heads=(4, 2), sink=True, segments="pair"),
    Case("dilated(9, 4, stride=7)", 200, 129, sink=True),
    Case("causal & window(90)", 129, 129, heads=(4, 2), values=12, sink=True),
    Case("full", 7, 129, heads=(4, 4), sink=True),
    Case("sink(3)", 129, 7, dtype="float16", softcap=5.0),
    *WITHOUT_KEYS[1:2],
    *CHOICES[:2],
}


def mark_nightly(impl: str, case: Case):
    daily = impl in SUPPORT_ALL or (case in DAILY and impl != "gpu")
    name = f"{impl}-{case.pattern}-{case.t}x{case.s}-{case.dtype}" + ("" if case.choice is None else "-choice")
    return pytest.param(impl, case, id=name, marks=() if daily else pytest.mark.nightly)


@pytest.mark.parametrize(
    ("impl", "case"), [mark_nightly(impl, case) for impl in IMPLS for case in CASES + WITHOUT_KEYS + CHOICES]
)
def test_values_and_gradients(impl, case):
    with unless_unsupported(impl, pytest.skip):
        check(impl, case)


def test_the_cases_cover_the_library():
    assert set(CASES + WITHOUT_KEYS + CHOICES) >= DAILY
    for name in NAMES:
        assert any(name in re.findall(r"\w+", case.pattern) for case in CASES), name
    for case in WITHOUT_KEYS:
        assert not counts_of(case, draw_inputs(case)).any(axis=-1).all()


@st.composite
def cases(draw) -> Case:
    pattern: Pattern = draw(shared_patterns(longest=130) | patterns_with_heads(2, longest=130))
    t, s = draw(st.sampled_from([(65, 65), (70, 130)]))
    offset = draw(st.sampled_from([0, 31, s - t])) if t < s else None
    segments = draw(st.sampled_from([None, "pair"]))
    softcap, sink, alibi = draw(st.sampled_from([None, 1.5])), draw(st.booleans()), draw(st.booleans())
    options = {"softcap": softcap, "sink": sink, "segments": segments, "alibi": alibi, "q_offset": offset}
    return Case(str(pattern), t, s, (2, 1), **options)


@pytest.mark.parametrize(
    "impl", [pytest.param(impl, marks=() if impl in SUPPORT_ALL else pytest.mark.nightly) for impl in IMPLS]
)
@settings(max_examples=6)
@given(case=cases())
def test_any_pattern(impl, case):
    with unless_unsupported(impl, lambda _: reject()):
        check(impl, case)


@pytest.mark.parametrize("impl", IMPLS)
def test_float64(impl):
    pattern = "causal & window(9) | globals(1)"
    case = Case(pattern, 70, 70, (4, 2), softcap=2.0, sink=True, segments="one", dtype="float64")
    with unless_unsupported(impl, pytest.skip), jax.enable_x64(True):
        check(impl, case)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_beyond_the_range_of_exp(impl):
    # Small integers and a large one: scores are exact in float32, so that the tolerance need not grow with them.
    case = Case("causal", 70, 70, scale=4.0, sink=True)
    inputs = draw_inputs(case)
    q, k = (np.round(2 * x) for x in (inputs.q, inputs.k))
    q[..., 0], k[..., 0] = [1, -1], 100_000  # one head far above, one far below
    sink = np.array([400_300, -400_300], np.float32)
    inputs = inputs._replace(q=q, k=k, sink=sink)
    expected = reference(case, inputs, counts_of(case, inputs))
    with unless_unsupported(impl, pytest.skip):
        actual = compute(impl, case, inputs)
    assert_close("out", actual.out, expected.out, "float32")
    assert_close("lse", actual.lse, expected.lse, "float32")
    assert all(np.isfinite(gradient).all() for gradient in actual[2:])


@pytest.mark.parametrize("impl", IMPLS)
def test_products_beyond_the_range_of_float16(impl):
    case = Case("window(20, 5)", 70, 70, scale=2.0**-14, dtype="float16")
    inputs = draw_inputs(case)
    q, k = (np.round(60 * x) for x in (inputs.q, inputs.k))
    q[..., 0], k[..., 0] = 400, 400  # 400 * 400 > 65504
    with unless_unsupported(impl, pytest.skip):
        check(impl, case, inputs._replace(q=q, k=k))


PLAIN = Case("causal & window(20)", 70, 70, (4, 2), sink=True, segments="one")


@pytest.fixture
def callbacks_under_checkpoint(monkeypatch):
    """Lets `jax.checkpoint` accept the ordered callbacks of the interpreter of kernels for GPUs."""
    effects, callback = (importlib.import_module(f"jax._src.{name}") for name in ("effects", "callback"))
    filter_not_in = effects.remat_allowed_effects.filter_not_in

    def filter_others(candidates):
        return [effect for effect in filter_not_in(candidates) if not isinstance(effect, callback.OrderedIOEffect)]

    monkeypatch.setattr(effects.remat_allowed_effects, "filter_not_in", filter_others)


@pytest.mark.usefixtures("callbacks_under_checkpoint")
@pytest.mark.parametrize("impl", IMPLS)
def test_under_checkpoint(impl):
    with unless_unsupported(impl, pytest.skip):
        check(impl, PLAIN, transform=jax.checkpoint)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_jit(impl):
    inputs = draw_inputs(PLAIN)
    expected = reference(PLAIN, inputs, counts_of(PLAIN, inputs))
    options = {"sink_logits": jnp.asarray(inputs.sink), "segment_ids": jnp.asarray(inputs.segments)}
    with unless_unsupported(impl, pytest.skip):
        out, lse = attend_by(impl, *map(jnp.asarray, inputs[:3]), parse(PLAIN.pattern), return_lse=True, **options)
    assert_close("out", out, expected.out, "float32")
    assert_close("lse", lse, expected.lse, "float32")


@pytest.mark.parametrize("impl", IMPLS)
def test_under_vmap(impl):
    inputs = draw_inputs(PLAIN)._replace(sink=None)
    inputs = inputs._replace(d_lse=np.zeros_like(inputs.d_lse))
    pattern = parse(PLAIN.pattern)

    def attend_sequence(q, k, v, segments):
        arrays = (x[None] for x in (q, k, v))
        return attend_by(impl, *arrays, pattern, segment_ids=segments[None])[0]

    def gradients(q, k, v, segments, d_out):
        return jax.vjp(lambda *x: attend_sequence(*x, segments), q, k, v)[1](d_out)

    q, k, v, _, segments, d_out, *_ = inputs
    with unless_unsupported(impl, pytest.skip):
        mapped = jax.jit(jax.vmap(gradients))(q, k, v, segments, d_out)
        share_keys = jax.jit(jax.vmap(attend_sequence, in_axes=(0, None, None, None)))
        out = share_keys(q, k[0], v[0], segments[0])
    expected = reference(PLAIN, inputs, counts_of(PLAIN, inputs))
    for name, gradient in zip("qkv", mapped, strict=True):
        assert_close(name, gradient, getattr(expected, name), "float32")
    repeated = inputs._replace(k=k[[0, 0]], v=v[[0, 0]], segments=segments[[0, 0]])
    assert_close("out", out, reference(PLAIN, repeated, counts_of(PLAIN, repeated)).out, "float32")


SHARDED = """
import re, sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sparsejax.ops import attend
from sparsejax.patterns import parse

mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
sharding = NamedSharding(mesh, PartitionSpec("batch", None, "heads", None))
random = np.random.default_rng(0)
arrays = [random.standard_normal((4, 130, heads, 8), np.float32) for heads in (4, 2, 2, 4)]
pattern = parse("causal & window(20)")

def gradients(q, k, v, d_out):
    out, backward = jax.vjp(lambda *x: attend(*x, pattern, impl=impl), q, k, v)
    return out, *backward(d_out)

def compiled(**shardings):
    return jax.jit(gradients, **shardings).lower(*arrays).compile()

for impl in sys.argv[1:]:
    sharded = compiled(in_shardings=sharding, out_shardings=sharding)
    moves = re.findall(r"(?:(?:all|collective)-[a-z-]+|reduce-scatter)\\(", sharded.as_text())
    assert not moves, (impl, moves)
    results = sharded(*(jax.device_put(x, sharding) for x in arrays))
    for result, expected in zip(results, compiled()(*arrays), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
"""


def test_batch_and_heads_on_eight_devices_need_no_exchange():
    command = [sys.executable, "-c", SHARDED, *sorted(SUPPORT_ALL)]
    run = subprocess.run(command, env=os.environ | simulate(8), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def largest_array(impl: str, length: int) -> int:
    """Elements of the largest array in the compiled forward and backward pass."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    loss = lambda q, k, v: attend_by(impl, q, k, v, parse("window(64)")).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "dense"])
def test_no_array_of_all_pairs(impl):
    length = 2048
    assert largest_array("dense", length) >= length * length
    with unless_unsupported(impl, pytest.skip):
        assert largest_array(impl, length) < length * length / 2


def test_auto_computes_the_same():
    case = Case("causal & window(16)", 300, 300)
    inputs = draw_inputs(case)
    out = jax.jit(lambda *x: attend(*x, parse(case.pattern)))(*inputs[:3])
    assert isinstance(out, jax.Array), "the log-sum-exp is returned on request only"
    assert_close("out", out, reference(case, inputs, counts_of(case, inputs)).out, "float32")


@pytest.mark.parametrize(
    ("pattern", "length", "ranking"),
    [
        ("globals([])", 40, "dense gather segment"),  # so short that one product is fastest
        ("window(0)", 40, "dense gather segment"),
        ("globals([])", 2000, "gather segment dense"),
        ("causal & window(16)", 2000, "gather segment dense"),
        ("full", 65, "gather segment dense"),
        ("full", 2000, "gather segment dense"),
        ("per_head(full, full, full, window(16))", 2000, "gather segment dense"),
        ("window(0)", 2000, "segment gather dense"),  # a 64th of the pairs in its live tiles
        ("globals([5, 900, 1500]) | window(0)", 2000, "segment gather dense"),
        ("per_head(window(0), window(0), window(0), window(40))", 2000, "gather segment dense"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_ranking_of_auto_on_cpu(monkeypatch, pattern, length, ranking):
    check_ranking(monkeypatch, pattern, length, ranking)


@pytest.mark.parametrize(
    ("pattern", "ranking"),
    [
        ("full", "dense gather segment"),
        ("per_head(full, full, full, window(16))", "dense gather segment"),
        ("per_head(full, window(16), window(16), window(16))", "gather segment dense"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_ranking_of_auto_on_accelerators(monkeypatch, pattern, ranking):
    monkeypatch.setattr("sparsejax.ops.attention.on_cpu", lambda: False)
    check_ranking(monkeypatch, pattern, 2000, ranking)


class Output(str):
    """The name of an implementation in place of its output."""

    __slots__ = ()

    def astype(self, dtype):
        return self


def check_ranking(monkeypatch, pattern, length, ranking):
    shape, ranking = (1, length, 4, 8), ranking.split()
    unable = set()
    fakes = tuple(
        Implementation(
            name,
            run=lambda call, name=name: (Output(name), None),
            unsupported_reason=lambda call, name=name: f"{name} is unable" if name in unable else None,
        )
        for name in ("other", "segment", "gather", "dense")
    )
    fakes += tuple(
        Implementation(name, run=None, unsupported_reason=lambda call: "not here") for name in ("cudnn", "tpu", "gpu")
    )
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", fakes)
    for name in ranking:
        assert small_attend(shape, shape, pattern=pattern) == name
        unable.add(name)
    assert small_attend(shape, shape, pattern=pattern, impl="other") == "other"
    with pytest.raises(ImplementationError) as error:
        small_attend(shape, shape, pattern=pattern)
    assert all(f"{name}: {name} is unable" in str(error.value) for name in ranking)


H100 = {"device_kind": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
A100 = {"device_kind": "NVIDIA A100-SXM4-40GB", "compute_capability": "8.0"}


@pytest.mark.parametrize(
    ("device", "pattern", "dtype", "kernel", "otherwise"),
    [
        (H100, "causal & (window(90) | sink(4))", "bfloat16", "gpu", "gather"),
        (H100, "window(0) | globals(1)", "float16", "gpu", "segment"),
        (H100, "causal", "bfloat16", "cudnn", "gather"),
        (H100, "causal & window(90)", "float16", "cudnn", "gather"),
        (H100, "causal & window(90)", "float32", "gpu", "gather"),  # cuDNN has no float32
        (H100, "multiset(full, sink(4))", "bfloat16", None, "dense"),
        (H100, "multiset(causal, sink(4))", "bfloat16", None, "gather"),
        (A100, "causal & (window(90) | sink(4))", "bfloat16", None, "gather"),
        ({"device_kind": "TPU v5 lite"}, "causal & window(90)", "bfloat16", "tpu", "gather"),
        ({"device_kind": "TPU v6 lite"}, "causal & (window(90) | sink(4))", "float32", "tpu", "gather"),
        ({"device_kind": "TPU v4"}, "causal & window(90)", "bfloat16", None, "gather"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_auto_uses_a_kernel_only_where_it_is_verified(monkeypatch, caplog, device, pattern, dtype, kernel, otherwise):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(jax, "__version__", "0.11.0")
    named = tuple(impl._replace(run=lambda call, name=impl.name: (Output(name), None)) for impl in IMPLEMENTATIONS)
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", named)
    q, kind = jnp.zeros((1, 1000, 2, 64), dtype), device["device_kind"]
    assert [attend(q, q, q, parse(pattern)) for _ in range(2)] == [otherwise] * 2
    hints = [record for record in caplog.records if record.name == "sparsejax"]
    assert len(hints) == (kernel is not None)
    for record in hints:
        check_message(record.getMessage())
    write_record("another device", ["cudnn", "gpu", "tpu"])
    assert attend(q, q, q, parse(pattern)) == otherwise
    write_record(kind, ["cudnn", "gpu", "tpu"])
    assert attend(q, q, q, parse(pattern)) == (kernel or otherwise)
    monkeypatch.setattr(jax, "__version__", "0.12.0")
    assert attend(q, q, q, parse(pattern)) == otherwise


@pytest.mark.usefixtures("unchecked_types")
def test_auto_uses_a_kernel_with_a_recorded_benchmark(monkeypatch, caplog):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    kernel = next(impl for impl in IMPLEMENTATIONS if impl.name == "tpu")
    recorded = kernel._replace(run=lambda call: (Output("tpu"), None), verified_on=frozenset({"TPU v5 lite"}))
    others = (impl for impl in IMPLEMENTATIONS if impl.name != "tpu")
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", (recorded, *others))
    assert small_attend((1, 1000, 2, 64), (1, 1000, 2, 64)) == "tpu"
    assert not caplog.records


def test_the_kernels_for_gpus_need_a_new_jax(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**H100)])
    kernel = next(impl for impl in IMPLEMENTATIONS if impl.name == "gpu")
    q = jnp.zeros((1, 1000, 2, 64), "bfloat16")
    for version, supported in (((0, 10, 2), False), ((0, 11, 0), True)):
        monkeypatch.setattr(jax, "__version_info__", version)
        call = AttentionCall(q, q, q, parse("causal"), 1.0, None, None, None, False)
        assert (kernel.unsupported_reason(call) is None) == supported


@pytest.mark.parametrize("impl", ["auto", *sorted(SUPPORT_ALL), "flash"])
def test_errors_give_the_reason_of_each_implementation(monkeypatch, impl):
    here = tuple(
        member if member.name in SUPPORT_ALL else member._replace(unsupported_reason=lambda call: "not here")
        for member in IMPLEMENTATIONS
    )
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", here)
    with rejects(ImplementationError, "impl"):
        small_attend(impl=impl, interpret=True)


def small_attend(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=None, pattern="causal", **options):
    shapes = q, k, k if v is None else v
    return attend(*(jnp.zeros(shape) for shape in shapes), parse(pattern), **options)


def ids(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", {"q": (2, 5, 3, 8)}),
        ("q", {"q": (2, 5, 1, 8)}),
        ("q", {"q": (5, 4, 8)}),
        ("q", {"q": (2, 0, 4, 8)}),
        ("k", {"k": (5, 2, 8)}),
        ("k", {"k": (3, 5, 2, 8)}),
        ("k", {"k": (2, 5, 2, 4)}),
        ("k", {"k": (2, 0, 2, 8)}),
        ("v", {"v": (2, 6, 2, 8)}),
        ("v", {"v": (2, 5, 2)}),
        ("v", {"v": (2, 5, 2, 0)}),
        ("pattern", {"pattern": "per_head(full, full)"}),
        ("sink_logits", {"sink_logits": jnp.zeros(2)}),
        ("sink_logits", {"sink_logits": jnp.zeros(())}),
        ("sink_logits", {"sink_logits": jnp.zeros((2, 4))}),
        ("alibi_slopes", {"alibi_slopes": jnp.zeros((2, 4))}),
        ("segment_ids", {"segment_ids": ids(2, 6)}),
        ("segment_ids", {"segment_ids": ids(5)}),
        ("segment_ids", {"segment_ids": ids(1, 5)}),
        ("segment_ids", {"segment_ids": ids(2, 5), "k": (2, 9, 2, 8)}),
        ("segment_ids", {"segment_ids": (ids(2, 9), ids(2, 5)), "k": (2, 9, 2, 8)}),
        ("segment_ids", {"segment_ids": (ids(2, 5),)}),
    ],
)
def test_shapes_that_do_not_agree(argument, change):
    with rejects(InputError, argument):
        small_attend(**change)


@settings(max_examples=60)
@given(shared_patterns(longest=300), st.integers(1, 300), st.integers(1, 300))
def test_group_rows_pads_least(pattern, t, s):
    layout = pattern.layout(t, s, (16, 16))
    groups = group_rows(layout)
    assert len(groups) <= MAX_GROUPS
    assert sorted(row for rows, _ in groups for row in rows) == list(range(layout.grid.rows))
    for rows, columns in groups:
        for row, slots in zip(rows, columns, strict=True):
            live = layout.columns[layout.starts[row] : layout.starts[row + 1]]
            np.testing.assert_array_equal(slots, [*live, *[-1] * (len(slots) - len(live))])

    sorted_degrees = np.sort(layout.degrees)
    values, starts = np.unique(sorted_degrees, return_index=True)
    splits = (
        np.split(sorted_degrees, cuts)
        for count in range(min(MAX_GROUPS, len(values)))
        for cuts in itertools.combinations(starts[1:], count)
    )
    least = min(sum(len(part) * part[-1] for part in split) for split in splits)
    assert sum(len(rows) * layout.degrees[rows].max() for rows, _ in groups) == least


@pytest.mark.parametrize("queries", [1, 7, 300])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("causal & window(90)", {}),
        ("causal", {"sink": True, "softcap": 3.0}),
        ("per_head(causal, window(3), causal & chunk(60), global_keys([260]))", {"alibi": True, "sink": True}),
        ("causal & multiset(window(70), window(1), sink(2))", {"dtype": "bfloat16"}),
    ],
)
def test_attend_cached(pattern, options, queries):
    """Rows at different positions, keys in any order between empty slots, in one block and in several."""
    length, slots, starts = 600, 500, (17, 300)
    case = Case(pattern, queries, length, (4, 2), scale=0.9, **options)
    inputs, random = draw_inputs(case), np.random.default_rng(queries)
    k_at = np.stack([np.where(np.arange(slots) < n, random.permutation(length)[:slots], -1) for n in (500, 280)])
    caches = [np.take_along_axis(x, np.maximum(k_at, 0)[..., None, None], axis=1) for x in (inputs.k, inputs.v)]
    empty = (k_at < 0)[..., None, None]
    k, v = (np.where(empty, fill, x).swapaxes(1, 2).astype(x.dtype) for x, fill in zip(caches, (np.nan, 1e3)))  # noqa: B905
    run = jax.jit(
        functools.partial(attend_cached, pattern=parse(pattern), length=length, scale=0.9, softcap=case.softcap)
    )
    out = run(
        inputs.q,
        k,
        v,
        q_positions=np.array(starts)[:, None] + np.arange(queries),
        k_positions=k_at,
        sink_logits=None if inputs.sink is None else jnp.asarray(inputs.sink),
        alibi_slopes=None if case.slopes is None else jnp.asarray(case.slopes),
    )
    assert out.dtype == case.dtype
    for row, start in enumerate(starts):
        single = Inputs(*(None if x is None else x if x.ndim == 1 else x[row : row + 1] for x in inputs))
        counts = parse(pattern).counts(start + np.arange(queries)[:, None], np.arange(length), length, length)
        counts = np.broadcast_to(counts, (1, 4, queries, length)) * np.isin(np.arange(length), k_at[row])
        expected = reference(case._replace(q_offset=start), single, counts)
        assert_close("out", out[row : row + 1], expected.out, case.dtype)


# Disjoint parts of the keys of a row: all of them in one part, in several, or in none.
PARTS = ("causal & window(5)", "causal - window(9)", "window(0, 3) - window(0)", "globals([])")


def test_merge_lse_of_parts_is_attention_over_the_whole():
    case = Case(" | ".join(f"({part})" for part in PARTS), 40, 37, (4, 2), values=5, sink=True, segments="pair")
    inputs = draw_inputs(case)
    counts = counts_of(case, inputs)
    segments = tuple(map(jnp.asarray, inputs.segments))
    assert (counts.sum(axis=-1) == 0).any()

    @jax.jit
    def gradients(q, k, v, sink, d_out, d_lse):
        def forward(q, k, v, sink):
            parts = [
                attend(q, k, v, parse(part), sink_logits=logits, segment_ids=segments, return_lse=True)
                for part, logits in zip(PARTS, (sink, None, None, None), strict=True)
            ]
            return merge_lse(parts)

        (out, lse), backward = jax.vjp(forward, q, k, v, sink)
        return Attention(out, lse, *backward((d_out, d_lse)))

    actual = gradients(*inputs[:4], inputs.d_out, inputs.d_lse)
    for name, array, expected in zip(Attention._fields, actual, reference(case, inputs, counts), strict=True):
        assert_close(name, array, expected, "float32")


def test_merge_lse_of_parts_without_keys_is_zeros():
    lse = jnp.full((1, 3, 2), -jnp.inf)

    def forward(out, lse):
        return merge_lse([(out, lse), (out, lse)])

    (out, total), backward = jax.vjp(forward, jnp.zeros((1, 3, 2, 4)), lse)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(total) == -np.inf).all()
    assert all(np.isfinite(gradient).all() for gradient in backward((jnp.ones_like(out), jnp.ones_like(total))))


@pytest.mark.parametrize("impl", IMPLS)
def test_slopes_are_constants(impl):
    q, k, v = map(jnp.asarray, draw_inputs(Case("causal", 9, 9, (4, 2)))[:3])
    loss = lambda slopes: attend_by(impl, q, k, v, parse("causal"), alibi_slopes=slopes).sum()  # noqa: E731
    with unless_unsupported(impl, pytest.skip):
        np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(4)), 0)
