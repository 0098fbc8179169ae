"""The program of a device against sizes that are computed by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sparsejax.plan.program import OUTSIDE, shard_program
from sparsejax.sharding import MESH_AXES

FLOAT = 4  # bytes


def make_mesh(data=1, fsdp=1, sequence=1, tensor=1):
    return AbstractMesh((data, fsdp, sequence, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def shard(function, mesh, *arrays, parameters=(), **options):
    """The program of a device; `arrays` are pairs of a shape and the mesh axis of each axis."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in arrays]
    placements = [NamedSharding(mesh, PartitionSpec(*axes)) for _, axes in arrays]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(function)(*shapes)
    known = [(arrays[i][0], placements[i]) for i in parameters]
    return shard_program(traced, placements, known, **options)


def test_a_product_of_sharded_rows_exchanges_nothing():
    program = shard(jnp.matmul, make_mesh(data=4), ((16, 8), ("data", None)), ((8, 32), (None, None)))
    assert program.work[OUTSIDE].flops == 2 * 4 * 8 * 32
    assert not program.received
    assert program.memory.peak == 4 * 32 * FLOAT


def test_a_contracted_axis_ends_in_an_all_reduce():
    program = shard(jnp.matmul, make_mesh(tensor=4), ((16, 8), (None, "tensor")), ((8, 32), ("tensor", None)))
    assert program.work[OUTSIDE].flops == 2 * 16 * 2 * 32
    assert program.received == {"all-reduce": 2 * 3 / 4 * 16 * 32 * FLOAT}


def test_a_parameter_is_gathered_where_the_tokens_have_its_axis():
    program = shard(jnp.matmul, make_mesh(fsdp=4), ((16, 8), ("fsdp", None)), ((8, 32), ("fsdp", None)))
    assert program.work[OUTSIDE].flops == 2 * 4 * 8 * 32
    assert program.received == {"all-gather": 3 / 4 * 8 * 32 * FLOAT}
    assert program.memory.peak == (8 * 32 + 4 * 32) * FLOAT


def test_a_parameter_that_is_needed_twice_is_gathered_once():
    def loss(x, w):
        return jnp.square(jnp.einsum("td,wd->tw", jnp.tanh(x @ w), w)).sum()

    arrays = ((16, 8), ("fsdp", None)), ((8, 32), ("fsdp", None))
    program = shard(jax.value_and_grad(loss), make_mesh(fsdp=4), *arrays)
    assert program.received["all-gather"] == 3 / 4 * 8 * 32 * FLOAT


def test_a_gradient_is_scattered_over_the_axis_of_its_parameter():
    def loss(x, w):
        return jnp.square(x @ w).sum()

    rows, weights = ((16, 8), (("data", "fsdp"), None)), ((8, 32), ("fsdp", None))
    program = shard(jax.grad(loss, 1), make_mesh(data=2, fsdp=4), rows, weights, parameters=(1,))
    size = 8 * 32 * FLOAT
    assert program.received["all-gather"] == 3 / 4 * size  # the weights, before the product
    assert program.received["reduce-scatter"] == 3 / 4 * size
    assert program.received["all-reduce"] == 2 * 1 / 2 * size / 4
    assert program.work[OUTSIDE].flops == 2 * 2 * (2 * 8 * 32)  # forward, and the gradient of the weights


def test_a_loop_counts_as_often_as_it_runs():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, x), x, w)

    program = shard(run, make_mesh(tensor=2), ((16, 8), (None, None)), ((5, 8, 8), (None, "tensor", None)))
    assert program.work[OUTSIDE].flops == 5 * 2 * 16 * 4 * 8
    assert program.received == {"all-reduce": 5 * 16 * 8 * FLOAT}


def test_a_loop_keeps_its_stacked_outputs():
    def run(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), x), x, None, length=6)

    program = shard(run, make_mesh(data=2), ((16, 8), ("data", None)))
    assert program.memory.peak == (6 + 1) * 8 * 8 * FLOAT


def test_stated_collectives_count_as_they_are():
    def run(x):
        def shift(x):
            return jax.lax.ppermute(x, "sequence", [(i, i + 1) for i in range(3)])

        spec = PartitionSpec(None, "sequence")
        return jax.shard_map(shift, in_specs=spec, out_specs=spec, axis_names={"sequence"}, check_vma=False)(x)

    program = shard(run, make_mesh(data=2, sequence=4), ((16, 8), ("data", "sequence")))
    assert program.received == {"collective-permute": 8 * 2 * FLOAT}


def test_elementwise_operations_are_fused():
    chain = shard(lambda x: (jnp.sin(x) * 2 + 1).sum(), make_mesh(), ((64, 64), (None, None)))
    assert chain.memory.peak == FLOAT
    product = shard(lambda x: (x * 2) @ (x + 1), make_mesh(), ((64, 64), (None, None)))
    assert product.memory.peak == 3 * 64 * 64 * FLOAT


def test_what_the_backward_pass_reads_is_an_activation():
    def loss(w, x):
        return jnp.sin(x @ w).sum()

    program = shard(jax.grad(loss), make_mesh(data=4), ((8, 32), (None, None)), ((16, 8), ("data", None)))
    assert program.memory.activations == 4 * 32 * FLOAT  # x w; x itself is an input


def test_merged_axes_keep_their_sharding():
    def run(x, w):
        return x.reshape(16, 32) @ w

    heads = ((16, 4, 8), ("data", "tensor", None))
    program = shard(run, make_mesh(data=2, tensor=4), heads, ((32, 8), ("tensor", None)))
    assert program.work[OUTSIDE].flops == 2 * 8 * 8 * 8
    assert program.received == {"all-reduce": 2 * 3 / 4 * 8 * 8 * FLOAT}


def test_rows_of_a_table_that_is_split_are_added_up():
    def read(table, ids):
        return table[ids.astype(jnp.int32)]

    table, ids = ((64, 8), ("tensor", None)), ((16,), ("data",))
    program = shard(read, make_mesh(data=2, tensor=4), table, ids)
    assert program.received == {"all-reduce": 2 * 3 / 4 * 8 * 8 * FLOAT}


@pytest.mark.parametrize("policy", ["none", "full"])
def test_recomputation_trades_flops_for_activations(policy):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(w, x):
        run = jax.checkpoint(layer) if policy == "full" else layer
        return jax.lax.scan(lambda x, _: (run(x, w), None), x, None, length=8)[0].sum()

    program = shard(jax.grad(loss), make_mesh(), ((32, 32), (None, None)), ((64, 32), (None, None)))
    product = 2 * 64 * 32 * 32
    size = 64 * 32 * FLOAT
    if policy == "full":
        assert program.work[OUTSIDE].flops == 8 * 8 * product  # two, the same again, and twice as many backward
        assert program.memory.activations == 8 * size
    else:
        assert program.work[OUTSIDE].flops == 8 * 6 * product
        assert program.memory.activations >= 8 * 2 * size


@pytest.mark.parametrize(("platform", "width"), [("cpu", 8), ("tpu", 16), ("cuda", 32), ("", 32)])
def test_the_form_of_the_platform_is_counted(platform, width):
    def multiply(x):
        forms = {name: lambda x, n=n: (x @ jnp.ones((8, n))).sum() for name, n in (("cpu", 8), ("tpu", 16))}
        return jax.lax.platform_dependent(x, **forms, default=lambda x: (x @ jnp.ones((8, 32))).sum())

    program = shard(multiply, make_mesh(), ((4, 8), (None, None)), platform=platform)
    assert program.work[OUTSIDE].flops == 2 * 4 * 8 * width
