"""One suite for every implementation of `attend`, against attention written out in float64.

An implementation that refuses a call skips its case, which those in `SERVES_ALL` must never do. One that does
not run on this machine is run in interpret mode.
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

from sparsejax.ops import IMPLEMENTATIONS, Implementation, ImplementationError, attend, decode_attend, merge_lse
from sparsejax.ops.gather import MOST_GROUPS, group_rows
from sparsejax.patterns import Pattern, parse
from sparsejax.patterns.library import NAMES
from tests.patterns.strategies import patterns_with_heads, shared_patterns
from tests.tolerances import assert_close, assert_norm_close

IMPLS = [one.name for one in IMPLEMENTATIONS if one.name != "cudnn"]  # that has tests of its own, and runs nowhere else
SERVES_ALL = {"dense", "gather", "segment"}
# Compiling is what these tests spend their time on: leave out what only makes the code faster.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


class Case(NamedTuple):
    """What is asked: shapes, options and dtype. `segments`: one array for both sides, or a pair of them."""

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

    @property
    def slopes(self) -> np.ndarray | None:
        """A slope for each head, none like another."""
        return 0.3 / np.arange(1, self.heads[0] + 1, dtype=np.float32) if self.alibi else None


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sink: np.ndarray | None
    segments: np.ndarray | tuple[np.ndarray, np.ndarray] | None
    d_out: np.ndarray  # cotangents
    d_lse: np.ndarray


def wide(dtype: str) -> str:
    """The dtype of sums, of the softmax and of what is not in the dtype of the inputs."""
    return "float64" if dtype == "float64" else "float32"


def draw_inputs(case: Case, batch: int = 2, width: int = 8) -> Inputs:
    random = np.random.default_rng(case.t * 1000 + case.s)
    (h, g), t, s = case.heads, case.t, case.s

    def normal(*shape, dtype=case.dtype):
        return random.standard_normal(shape).astype(jnp.dtype(dtype))

    segments = None
    if case.segments is not None:  # packed documents of other lengths in each row, and ids that do not count up
        segments = tuple(np.sort(random.integers(-1, 3, (batch, n)))[:, ::-1] for n in (t, s))
        segments = segments[0] if case.segments == "one" else segments
    return Inputs(
        q=normal(batch, t, h, width),
        k=normal(batch, s, g, width),
        v=normal(batch, s, g, case.values),
        sink=normal(h, dtype=wide(case.dtype)) if case.sink else None,
        segments=segments,
        d_out=normal(batch, t, h, case.values),
        d_lse=normal(batch, t, h, dtype=wide(case.dtype)),
    )


class Result(NamedTuple):
    """Output and log-sum-exp, and the gradients for given cotangents of both."""

    out: np.ndarray
    lse: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sink: np.ndarray | None


def oracle(case: Case, inputs: Inputs, counts: np.ndarray) -> Result:
    """Attention in which a key counts so many times [b, h, t, s], forward and backward, written out."""
    q, k, v, sink, _, d_out, d_lse = (None if x is None or isinstance(x, tuple) else np.float64(x) for x in inputs)
    b, s, g, d = k.shape
    share = q.shape[2] // g
    k, v, d_lse = k.repeat(share, axis=2), v.repeat(share, axis=2), d_lse.transpose(0, 2, 1)
    scale = d**-0.5 if case.scale is None else case.scale
    raw = scale * np.einsum("bthd,bshd->bhts", q, k)
    capped = raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)
    if case.alibi:
        capped = capped - case.slopes[:, None, None] * abs(np.arange(case.t)[:, None] - np.arange(s))
    terms = np.where(counts, capped + np.log(np.maximum(counts, 1)), -np.inf)
    if sink is not None:
        sink = np.broadcast_to(sink[:, None], terms.shape[:-1])
        terms = np.concatenate([terms, sink[..., None]], axis=-1)
    lse = np.logaddexp.reduce(terms, axis=-1)
    normaliser = np.where(np.isfinite(lse), lse, 0.0)
    weights = np.where(counts, counts * np.exp(capped - normaliser[..., None]), 0.0)

    d_weights = np.einsum("bthd,bshd->bhts", d_out, v)
    slope = d_lse - (weights * d_weights).sum(axis=-1)  # the gradient of a score is weight * (d_weight + slope)
    d_scores = weights * (d_weights + slope[..., None])
    if case.softcap is not None:
        d_scores *= 1 - np.tanh(raw / case.softcap) ** 2
    d_k, d_v = (np.einsum("bhts,bthd->bshd", a, x) for a, x in ((scale * d_scores, q), (weights, d_out)))
    return Result(
        out=np.einsum("bhts,bshd->bthd", weights, v),
        lse=lse.transpose(0, 2, 1),
        q=scale * np.einsum("bhts,bshd->bthd", d_scores, k),
        k=d_k.reshape(b, s, g, share, d).sum(axis=3),
        v=d_v.reshape(b, s, g, share, -1).sum(axis=3),
        sink=None if sink is None else (np.exp(sink - lse) * slope).sum(axis=(0, 2)),
    )


def counts_of(case: Case, inputs: Inputs) -> np.ndarray:
    q, k = np.arange(case.t)[:, None], np.arange(case.s)[None, :]
    counts = parse(case.pattern).counts(q, k, case.t, case.s)
    counts = np.broadcast_to(counts, (len(inputs.q), case.heads[0], case.t, case.s))
    if inputs.segments is None:
        return counts
    queries, keys = inputs.segments if isinstance(inputs.segments, tuple) else (inputs.segments,) * 2
    return counts * (queries[:, :, None] == keys[:, None, :])[:, None]


def serve(impl: str, *arguments, **options):
    """`attend` by one implementation, in interpret mode if that is the only way here."""
    try:
        return attend(*arguments, impl=impl, **options)
    except ImplementationError:
        if impl in SERVES_ALL:
            raise
        return attend(*arguments, impl=impl, interpret=True, **options)


def compute(impl: str, case: Case, inputs: Inputs, transform=lambda function: function) -> Result:
    pattern = parse(case.pattern)

    def everything(q, k, v, sink, segments, d_out, d_lse):
        def forward(q, k, v, sink):
            options = {"softcap": case.softcap, "scale": case.scale, "alibi_slopes": case.slopes}
            arrays = {"sink_logits": sink, "segment_ids": segments}
            return serve(impl, q, k, v, pattern, return_lse=True, **options, **arrays)

        (out, lse), backward = jax.vjp(transform(forward), q, k, v, sink)
        return Result(out, lse, *backward((d_out, d_lse)))

    return jax.jit(everything, compiler_options=QUICK)(*inputs)


def check(impl: str, case: Case, inputs: Inputs | None = None, **how):
    inputs = draw_inputs(case) if inputs is None else inputs
    mask = counts_of(case, inputs)
    expected, found = oracle(case, inputs, mask), compute(impl, case, inputs, **how)
    assert (found.sink is None) == (not case.sink)
    for name, one, other in zip(Result._fields, found, expected, strict=True):
        if one is not None:
            assert one.dtype == (wide(case.dtype) if name in ("lse", "sink") else case.dtype), name
            # Of inputs in few bits the log-sum-exp is still exact; a sink's gradient goes through the values.
            assert_close(name, one, other, wide(case.dtype) if name == "lse" else case.dtype)
            if impl not in SERVES_ALL and name != "sink":  # a few sums that nearly cancel
                assert_norm_close(name, one, other, wide(case.dtype) if name == "lse" else case.dtype)

    lonely = ~mask.any(axis=-1).transpose(0, 2, 1)
    assert (np.asarray(found.out)[lonely] == 0).all()
    assert (np.asarray(found.q)[lonely] == 0).all()
    floor = np.broadcast_to(-np.inf if inputs.sink is None else inputs.sink, lonely.shape)
    np.testing.assert_array_equal(np.asarray(found.lse)[lonely], floor[lonely])
    (h, g), (b, _, _, s) = case.heads, mask.shape
    unseen = ~mask.reshape(b, g, h // g, case.t, s).any(axis=(2, 3)).transpose(0, 2, 1)
    assert (np.asarray(found.k)[unseen] == 0).all()
    assert (np.asarray(found.v)[unseen] == 0).all()


@contextlib.contextmanager
def unless_refused(impl: str, otherwise):
    try:
        yield
    except ImplementationError as refusal:
        if impl in SERVES_ALL:
            raise
        otherwise(str(refusal))


# Lengths that no tile divides; options are spread over the patterns, as each case is compiled.
CASES = [
    Case("full", 1, 1),
    Case("full", 7, 129, heads=(4, 4), sink=True),
    Case("full", 7, 7, scale=0.0),
    Case("causal", 391, 391),
    Case("causal", 129, 65, heads=(4, 2), softcap=3.0, sink=True),
    Case("window(63)", 300, 300, heads=(4, 1), segments="one", sink=True),
    Case("window(5, 70)", 65, 200, heads=(4, 2), softcap=2.0),
    Case("chunk(100)", 300, 129, segments="pair"),
    Case("sink(3)", 129, 7, dtype="float16", softcap=5.0),
    Case("globals([0, 130, -1])", 200, 300, scale=-0.7),
    Case("causal & (window(64) | sink(4))", 391, 391, heads=(4, 2), sink=True, dtype="bfloat16"),
    Case("window(20, 20) | globals(2)", 300, 300, heads=(2, 2), dtype="float16", sink=True, segments="one"),
    Case("per_head(causal, globals([70]), causal, causal)", 129, 129, heads=(4, 2), sink=True, segments="pair"),
    Case("per_head(full, causal & chunk(50)) | sink(1)", 65, 129, heads=(2, 2), softcap=4.0, dtype="bfloat16"),
    Case("per_head(window(70), window(70))", 129, 129, heads=(2, 1)),
    Case("dilated(9, 4, stride=7)", 200, 129, sink=True),
    Case("causal & (window(30) | strided(30))", 300, 300, heads=(4, 2)),
    Case("causal & (chunk(40) | fixed(40, 3))", 300, 300, segments="one"),
    Case("causal | prefix(70)", 129, 129, softcap=3.0),
    Case("global_keys([3, -1]) | global_queries([70])", 129, 200),
    Case("random(2, tile=16, seed=1) - sink(2)", 200, 150, heads=(2, 2), sink=True),
    Case("bigbird_random(2, tile=16, seed=1) | window(3, 3)", 200, 200, dtype="bfloat16"),
    Case("tiles([[0, 1, 3], [0, 1, 2], [1, 2, 3], [0, 2, 3]])", 250, 250),
    Case("causal & shift(window(70, 20), 90)", 250, 250, sink=True),
    Case("multiset(causal, window(30), sink(9), sink(2))", 130, 130, heads=(4, 2), sink=True, softcap=3.0),
    Case("per_head(multiset(full, chunk(20)), causal)", 70, 70, segments="pair"),
    Case("causal & window(90)", 129, 129, heads=(4, 2), values=12, sink=True),
    Case("window(20, 20) | globals(2)", 129, 200, values=3, softcap=2.0, segments="pair"),
    Case("per_head(full, window(9, 9)) | sink(1)", 70, 129, heads=(2, 2), values=16, alibi=True, dtype="bfloat16"),
    Case("full", 128, 128, heads=(4, 2), alibi=True),  # no tile needs a mask
    Case("multiset(causal, sink(9))", 130, 130, heads=(4, 2), alibi=True, softcap=3.0, sink=True, segments="one"),
    Case("window(30, 70)", 200, 129, heads=(4, 1), alibi=True, values=5),
]

# Rows that see no key, and keys that no row sees.
LONELY = [
    Case("globals([])", 70, 65),
    Case("globals([])", 70, 65, sink=True, heads=(4, 2)),
    Case("sink(1) & window(2)", 129, 129, softcap=2.0),
    Case("window(3)", 200, 65, sink=True, segments="pair"),
    Case("per_head(globals([]), causal)", 70, 70, segments="pair", dtype="bfloat16"),
]


# What interpreted kernels compute every day; the rest is `pytest -m nightly`, and so are all of the kernels for GPUs,
# whose interpreter takes seconds for each block of threads.
EVERYDAY = {
    Case("causal", 129, 65, heads=(4, 2), softcap=3.0, sink=True),
    Case("window(63)", 300, 300, heads=(4, 1), segments="one", sink=True),
    Case("per_head(causal, globals([70]), causal, causal)", 129, 129, heads=(4, 2), sink=True, segments="pair"),
    Case("dilated(9, 4, stride=7)", 200, 129, sink=True),
    Case("causal & window(90)", 129, 129, heads=(4, 2), values=12, sink=True),
    Case("full", 7, 129, heads=(4, 4), sink=True),
    Case("sink(3)", 129, 7, dtype="float16", softcap=5.0),
    *LONELY[1:2],
}


def each_day(impl: str, case: Case):
    everyday = impl in SERVES_ALL or (case in EVERYDAY and impl != "gpu")
    name = f"{impl}-{case.pattern}-{case.t}x{case.s}-{case.dtype}"
    return pytest.param(impl, case, id=name, marks=() if everyday else pytest.mark.nightly)


@pytest.mark.parametrize(("impl", "case"), [each_day(impl, case) for impl in IMPLS for case in CASES + LONELY])
def test_values_and_gradients(impl, case):
    with unless_refused(impl, pytest.skip):
        check(impl, case)


def test_the_cases_cover_the_library():
    assert set(CASES + LONELY) >= EVERYDAY
    for name in NAMES:
        assert any(name in re.findall(r"\w+", case.pattern) for case in CASES), name
    for case in LONELY:
        assert not counts_of(case, draw_inputs(case)).any(axis=-1).all()


@st.composite
def cases(draw) -> Case:
    pattern: Pattern = draw(shared_patterns(longest=130) | patterns_with_heads(2, longest=130))
    t, s = draw(st.sampled_from([(65, 65), (70, 130)]))
    segments = draw(st.sampled_from([None, "pair"]))
    softcap, sink, alibi = draw(st.sampled_from([None, 1.5])), draw(st.booleans()), draw(st.booleans())
    return Case(str(pattern), t, s, (2, 1), softcap=softcap, sink=sink, segments=segments, alibi=alibi)


@pytest.mark.parametrize(
    "impl", [pytest.param(impl, marks=() if impl in SERVES_ALL else pytest.mark.nightly) for impl in IMPLS]
)
@settings(max_examples=6)
@given(case=cases())
def test_any_pattern(impl, case):
    with unless_refused(impl, lambda _: reject()):
        check(impl, case)


@pytest.mark.parametrize("impl", IMPLS)
def test_float64(impl):
    pattern = "causal & window(9) | globals(1)"
    case = Case(pattern, 70, 70, (4, 2), softcap=2.0, sink=True, segments="one", dtype="float64")
    with unless_refused(impl, pytest.skip), jax.enable_x64(True):
        check(impl, case)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_beyond_the_range_of_exp(impl):
    # Small integers and one large: scores are exact in float32, so that the tolerance need not grow with them.
    case = Case("causal", 70, 70, scale=4.0, sink=True)
    inputs = draw_inputs(case)
    q, k = (np.round(2 * x) for x in (inputs.q, inputs.k))
    q[..., 0], k[..., 0] = [1, -1], 100_000  # one head far above, one far below
    sink = np.array([400_300, -400_300], np.float32)
    inputs = inputs._replace(q=q, k=k, sink=sink)
    expected = oracle(case, inputs, counts_of(case, inputs))
    with unless_refused(impl, pytest.skip):
        found = compute(impl, case, inputs)
    assert_close("out", found.out, expected.out, "float32")
    assert_close("lse", found.lse, expected.lse, "float32")
    assert all(np.isfinite(gradient).all() for gradient in found[2:])


@pytest.mark.parametrize("impl", IMPLS)
def test_products_beyond_the_range_of_float16(impl):
    case = Case("window(20, 5)", 70, 70, scale=2.0**-14, dtype="float16")
    inputs = draw_inputs(case)
    q, k = (np.round(60 * x) for x in (inputs.q, inputs.k))
    q[..., 0], k[..., 0] = 400, 400  # 400 * 400 > 65504
    with unless_refused(impl, pytest.skip):
        check(impl, case, inputs._replace(q=q, k=k))


PLAIN = Case("causal & window(20)", 70, 70, (4, 2), sink=True, segments="one")


@pytest.fixture
def callbacks_under_checkpoint(monkeypatch):
    """The interpreter of kernels for GPUs has callbacks, in order, of which `jax.checkpoint` takes none."""
    effects, callback = (importlib.import_module(f"jax._src.{name}") for name in ("effects", "callback"))
    refused = effects.remat_allowed_effects.filter_not_in
    others = lambda found: [one for one in refused(found) if not isinstance(one, callback.OrderedIOEffect)]  # noqa: E731
    monkeypatch.setattr(effects.remat_allowed_effects, "filter_not_in", others)


@pytest.mark.usefixtures("callbacks_under_checkpoint")
@pytest.mark.parametrize("impl", IMPLS)
def test_under_checkpoint(impl):
    with unless_refused(impl, pytest.skip):
        check(impl, PLAIN, transform=jax.checkpoint)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_jit(impl):
    inputs = draw_inputs(PLAIN)
    expected = oracle(PLAIN, inputs, counts_of(PLAIN, inputs))
    options = {"sink_logits": inputs.sink, "segment_ids": inputs.segments}
    with unless_refused(impl, pytest.skip):
        out, lse = serve(impl, *map(jnp.asarray, inputs[:3]), parse(PLAIN.pattern), return_lse=True, **options)
    assert_close("out", out, expected.out, "float32")
    assert_close("lse", lse, expected.lse, "float32")


@pytest.mark.parametrize("impl", IMPLS)
def test_under_vmap(impl):
    inputs = draw_inputs(PLAIN)._replace(sink=None)
    inputs = inputs._replace(d_lse=np.zeros_like(inputs.d_lse))
    pattern = parse(PLAIN.pattern)

    def attend_sequence(q, k, v, segments):
        arrays = (x[None] for x in (q, k, v))
        return serve(impl, *arrays, pattern, segment_ids=segments[None])[0]

    def gradients(q, k, v, segments, d_out):
        return jax.vjp(lambda *x: attend_sequence(*x, segments), q, k, v)[1](d_out)

    q, k, v, _, segments, d_out, _ = inputs
    with unless_refused(impl, pytest.skip):
        each = jax.jit(jax.vmap(gradients), compiler_options=QUICK)(q, k, v, segments, d_out)
        one_memory = jax.jit(jax.vmap(attend_sequence, in_axes=(0, None, None, None)))(q, k[0], v[0], segments[0])
    expected = oracle(PLAIN, inputs, counts_of(PLAIN, inputs))
    for name, found in zip("qkv", each, strict=True):
        assert_close(name, found, getattr(expected, name), "float32")
    repeated = inputs._replace(k=k[[0, 0]], v=v[[0, 0]], segments=segments[[0, 0]])
    assert_close("out", one_memory, oracle(PLAIN, repeated, counts_of(PLAIN, repeated)).out, "float32")


SHARDED = """
import re, sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sparsejax.ops import attend
from sparsejax.patterns import parse

mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
spread = NamedSharding(mesh, PartitionSpec("batch", None, "heads", None))
random = np.random.default_rng(0)
arrays = [random.standard_normal((4, 130, heads, 8), np.float32) for heads in (4, 2, 2, 4)]
pattern = parse("causal & window(20)")

def gradients(q, k, v, d_out):
    out, backward = jax.vjp(lambda *x: attend(*x, pattern, impl=impl), q, k, v)
    return out, *backward(d_out)

def compiled(**shardings):
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(gradients, compiler_options=quick, **shardings).lower(*arrays).compile()

for impl in sys.argv[1:]:
    sharded = compiled(in_shardings=spread, out_shardings=spread)
    moves = re.findall(r"(?:all|collective|reduce)-[a-z-]+\\(", sharded.as_text())
    assert not moves, (impl, moves)
    found = sharded(*(jax.device_put(x, spread) for x in arrays))
    for one, other in zip(found, compiled()(*arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
"""


def test_batch_and_heads_on_eight_devices_need_no_exchange():
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SHARDED, *sorted(SERVES_ALL)]
    run = subprocess.run(command, env=os.environ | devices, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def largest_array(impl: str, length: int) -> int:
    """Elements of the largest array anywhere in the compiled forward and backward pass."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    loss = lambda q, k, v: serve(impl, q, k, v, parse("window(64)")).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile(QUICK)
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "dense"])
def test_no_array_of_all_pairs(impl):
    length = 2048
    assert largest_array("dense", length) >= length * length
    with unless_refused(impl, pytest.skip):
        assert largest_array(impl, length) < length * length / 2


def test_auto_computes_the_same():
    case = Case("causal & window(16)", 300, 300)
    inputs = draw_inputs(case)
    out = jax.jit(lambda *x: attend(*x, parse(case.pattern)), compiler_options=QUICK)(*inputs[:3])
    assert isinstance(out, jax.Array), "the log-sum-exp comes on demand only"
    assert_close("out", out, oracle(case, inputs, counts_of(case, inputs)).out, "float32")


@pytest.mark.parametrize(
    ("pattern", "length", "ranking"),
    [
        ("globals([])", 40, "dense gather segment"),  # so short that one product is quickest
        ("window(0)", 40, "dense gather segment"),
        ("globals([])", 2000, "gather segment dense"),
        ("causal & window(16)", 2000, "gather segment dense"),
        ("full", 65, "gather segment dense"),
        ("full", 2000, "gather segment dense"),
        ("per_head(full, full, full, window(16))", 2000, "gather segment dense"),
        ("window(0)", 2000, "segment gather dense"),  # a 64th of the pairs in the tiles it touches
        ("globals([5, 900, 1500]) | window(0)", 2000, "segment gather dense"),
        ("per_head(window(0), window(0), window(0), window(40))", 2000, "gather segment dense"),
    ],
)
def test_auto_takes_the_best_that_serves(monkeypatch, pattern, length, ranking):
    check_ranking(monkeypatch, pattern, length, ranking)


@pytest.mark.parametrize(
    ("pattern", "ranking"),
    [
        ("full", "dense gather segment"),
        ("per_head(full, full, full, window(16))", "dense gather segment"),
        ("per_head(full, window(16), window(16), window(16))", "gather segment dense"),
    ],
)
def test_auto_prefers_one_product_for_most_pairs_elsewhere_than_on_cpu(monkeypatch, pattern, ranking):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_ranking(monkeypatch, pattern, 2000, ranking)


H100 = {"device_kind": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}


@pytest.mark.parametrize(
    ("device", "pattern", "dtype", "expected"),
    [
        (H100, "causal & (window(90) | sink(4))", "bfloat16", "gpu"),
        (H100, "window(0) | globals(1)", "float16", "gpu"),
        (H100, "causal", "bfloat16", "cudnn"),
        (H100, "causal & window(90)", "float16", "cudnn"),
        (H100, "causal & window(90)", "float32", "gpu"),  # which cuDNN does not take
        (H100, "multiset(full, sink(4))", "bfloat16", "dense"),
        (H100, "multiset(causal, sink(4))", "bfloat16", "gather"),
        (H100 | {"device_kind": "NVIDIA A100-SXM4-40GB"}, "causal & (window(90) | sink(4))", "bfloat16", "gather"),
        ({"device_kind": "TPU v5 lite"}, "causal & window(90)", "bfloat16", "tpu"),
        ({"device_kind": "TPU v6 lite"}, "causal & (window(90) | sink(4))", "float32", "tpu"),
        ({"device_kind": "TPU v4"}, "causal & window(90)", "bfloat16", "gather"),
    ],
)
def test_auto_takes_what_each_machine_has(monkeypatch, device, pattern, dtype, expected):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    named = tuple(one._replace(run=lambda call, name=one.name: (name, None)) for one in IMPLEMENTATIONS)
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", named)
    q = jnp.zeros((1, 1000, 2, 64), dtype)
    assert attend(q, q, q, parse(pattern)) == expected
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))  # whose Pallas cannot do what they need
    assert (attend(q, q, q, parse(pattern)) == expected) == (expected != "gpu")


def check_ranking(monkeypatch, pattern, length, ranking):
    shape, ranking = (1, length, 4, 8), ranking.split()
    unable = set()
    fakes = tuple(
        Implementation(
            name,
            run=lambda call, name=name: (name, None),
            unsupported_reason=lambda call, name=name: f"not {name}'s day" if name in unable else None,
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
    with pytest.raises(ImplementationError) as refusal:
        small_attend(shape, shape, pattern=pattern)
    assert all(f"{name}: not {name}'s day" in str(refusal.value) for name in ranking)
    with pytest.raises(ImplementationError, match=r"impl='gather' .*\(gather: not gather's day\)"):
        small_attend(impl="gather")


def test_refusal_names_every_reason(monkeypatch):
    alone = tuple(
        one if one.name in SERVES_ALL else one._replace(unsupported_reason=lambda call: "not here") for one in IMPLEMENTATIONS
    )
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", alone)
    for impl in SERVES_ALL:
        with pytest.raises(ImplementationError, match=f"impl='{impl}' .*{impl}: interpret=True is for Pallas"):
            small_attend(impl=impl, interpret=True)
    with pytest.raises(ImplementationError, match="impl='auto'") as refusal:
        small_attend(interpret=True)
    for impl in SERVES_ALL:
        assert f"{impl}: interpret=True is for Pallas kernels" in str(refusal.value)


def test_unknown_implementation():
    with pytest.raises(ImplementationError) as refusal:
        small_attend(impl="flash")
    assert str(refusal.value) == f"attend: no implementation 'flash'; there are {', '.join(IMPLS)}, cudnn and auto"


def small_attend(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=None, pattern="causal", **options):
    shapes = q, k, k if v is None else v
    return attend(*(jnp.zeros(shape) for shape in shapes), parse(pattern), **options)


def ids(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"q": (2, 5, 3, 8)}, "3 query heads do not divide into 2 key/value heads"),
        ({"q": (2, 5, 1, 8)}, "1 query heads do not divide into 2 key/value heads"),
        ({"q": (5, 4, 8)}, r"q \[b,t,h,d\], k \[b,s,g,d\], v \[b,s,g,e\]; got \[5, 4, 8\]"),
        ({"k": (5, 2, 8)}, r"q \[b,t,h,d\], k \[b,s,g,d\], v \[b,s,g,e\]; got .*\[5, 2, 8\]"),
        ({"v": (2, 6, 2, 8)}, r"v \[b,s,g,e\]; got .*\[2, 6, 2, 8\]"),
        ({"v": (2, 5, 2)}, r"v \[b,s,g,e\]; got .*\[2, 5, 2\]"),
        ({"v": (2, 5, 2, 0)}, "an axis is empty"),
        ({"k": (3, 5, 2, 8)}, "batch and head width of q and k differ"),
        ({"k": (2, 5, 2, 4)}, "batch and head width of q and k differ"),
        ({"k": (2, 0, 2, 8)}, "an axis is empty"),
        ({"q": (2, 0, 4, 8)}, "an axis is empty"),
        ({"pattern": "per_head(full, full)"}, r"pattern is for 2 heads, q has 4: per_head\(full, full\)"),
        ({"sink_logits": jnp.zeros(2)}, r"sink_logits must be \[4\], got \[2\]"),
        ({"alibi_slopes": jnp.zeros((2, 4))}, r"alibi_slopes must be \[4\], got \[2, 4\]"),
        ({"sink_logits": jnp.zeros(())}, r"sink_logits must be \[4\], got \[\]"),
        ({"sink_logits": jnp.zeros((2, 4))}, r"sink_logits must be \[4\], got \[2, 4\]"),
        ({"segment_ids": ids(2, 6)}, r"segment_ids must be \[2,5\] and \[2,5\], got \[2, 6\]"),
        ({"segment_ids": ids(5)}, r"segment_ids must be \[2,5\] and \[2,5\], got \[5\]"),
        ({"segment_ids": ids(1, 5)}, r"segment_ids must be \[2,5\] and \[2,5\], got \[1, 5\]"),
        ({"segment_ids": ids(2, 5), "k": (2, 9, 2, 8)}, r"\[2,5\] and \[2,9\], got \[2, 5\], \[2, 5\]"),
        ({"segment_ids": (ids(2, 9), ids(2, 5)), "k": (2, 9, 2, 8)}, r"\[2,5\] and \[2,9\], got"),
        ({"segment_ids": (ids(2, 5),)}, r"segment_ids must be \[2,5\] and \[2,5\]"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_shapes_that_do_not_fit(impl, change, problem):
    with pytest.raises(ValueError, match=problem):
        small_attend(impl=impl, **change)


@settings(max_examples=60)
@given(shared_patterns(longest=300), st.integers(1, 300), st.integers(1, 300))
def test_rows_are_grouped_with_the_least_padding(pattern, t, s):
    layout = pattern.layout(t, s, (16, 16))
    groups = group_rows(layout)
    assert len(groups) <= MOST_GROUPS
    assert sorted(row for rows, _ in groups for row in rows) == list(range(layout.grid.rows))
    for rows, columns in groups:
        for row, slots in zip(rows, columns, strict=True):
            live = layout.columns[layout.starts[row] : layout.starts[row + 1]]
            np.testing.assert_array_equal(slots, [*live, *[-1] * (len(slots) - len(live))])

    sorted_degrees = np.sort(layout.degrees)
    values, starts = np.unique(sorted_degrees, return_index=True)
    ways = (
        np.split(sorted_degrees, cuts)
        for count in range(min(MOST_GROUPS, len(values)))
        for cuts in itertools.combinations(starts[1:], count)
    )
    least = min(sum(len(part) * part[-1] for part in way) for way in ways)
    assert sum(len(rows) * layout.degrees[rows].max() for rows, _ in groups) == least


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {}),
        (4, {}),
        (4, {"dtype": "bfloat16", "values": 5}),
        (4, {"softcap": 2.0, "values": 11}),
        (4, {"sink": True, "softcap": 3.0}),
    ],
)
def test_one_query_over_a_cache(rows, options):
    case = Case("full", 1, 19, (4, 2), scale=0.9, **options)
    inputs = draw_inputs(case)
    mask = np.random.default_rng(rows).random((rows, case.s)) < 0.4
    mask[2:3] = False  # a head for which nothing is in the cache
    expected = oracle(case, inputs, np.broadcast_to(mask[:, None], (2, 4, 1, case.s)))
    one = jax.jit(functools.partial(decode_attend, scale=0.9, softcap=case.softcap))
    found = one(inputs.q[:, 0], inputs.k, inputs.v, mask, sink_logits=inputs.sink)
    assert found.dtype == case.dtype
    assert_close("out", found, expected.out[:, 0], case.dtype)
    assert (np.asarray(found)[:, 2:3] == 0).all() or rows == 1


# Disjoint parts of what a row sees: all of it in one part, in several, or in none.
PARTS = ("causal & window(5)", "causal - window(9)", "window(0, 3) - window(0)", "globals([])")


def test_parts_of_the_keys_merge_to_the_whole():
    case = Case(" | ".join(f"({part})" for part in PARTS), 40, 37, (4, 2), values=5, sink=True, segments="pair")
    inputs = draw_inputs(case)
    counts = counts_of(case, inputs)
    assert (counts.sum(axis=-1) == 0).any()

    @jax.jit
    def gradients(q, k, v, sink, d_out, d_lse):
        def forward(q, k, v, sink):
            parts = [
                attend(q, k, v, parse(part), sink_logits=one, segment_ids=inputs.segments, return_lse=True)
                for part, one in zip(PARTS, (sink, None, None, None), strict=True)
            ]
            return merge_lse(parts)

        (out, lse), backward = jax.vjp(forward, q, k, v, sink)
        return Result(out, lse, *backward((d_out, d_lse)))

    found = gradients(*inputs[:4], *inputs[5:])
    for name, one, other in zip(Result._fields, found, oracle(case, inputs, counts), strict=True):
        assert_close(name, one, other, "float32")


def test_parts_without_any_key_merge_to_nothing():
    lse = jnp.full((1, 3, 2), -jnp.inf)

    def forward(out, lse):
        return merge_lse([(out, lse), (out, lse)])

    (out, total), backward = jax.vjp(forward, jnp.zeros((1, 3, 2, 4)), lse)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(total) == -np.inf).all()
    assert all(np.isfinite(gradient).all() for gradient in backward((jnp.ones_like(out), jnp.ones_like(total))))


@pytest.mark.parametrize("impl", IMPLS)
def test_slopes_are_constants(impl):
    q, k, v = draw_inputs(Case("causal", 9, 9, (4, 2)))[:3]
    loss = lambda slopes: serve(impl, q, k, v, parse("causal"), alibi_slopes=slopes).sum()  # noqa: E731
    with unless_refused(impl, pytest.skip):
        np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(4)), 0)
