"""Checkpoints: which are kept, and that a damaged checkpoint is never restored."""

import dataclasses
import gc
import os
import random
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.config import CheckpointConfig
from sparsejax.data import train_batches
from sparsejax.runs import CheckpointError, Checkpoints, TrainState
from sparsejax.runs.statistics import init_losses
from tests.messages import rejects

TEXT = np.arange(4000, dtype=np.uint8)
NAN = float("nan")


def batches(read=0):
    iterator = train_batches(TEXT, 32, 4, seed=0)
    for _ in range(read):
        next(iterator)
    return iterator


def build_state(step, width=8, dtype=jnp.float32):
    parameters = {"norm": {"scale": jnp.ones(width)}, "out": {"weight": jnp.full((width, 4), step, dtype)}}
    moments = optax.adamw(1e-3).init(parameters)
    return TrainState(
        jnp.int32(step),
        jnp.int32(1),
        init_losses()._replace(row_loss=jnp.float32(2.5)),
        jax.random.key(step),
        parameters,
        moments,
    )


def shapes_of(state):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def open_folder(folder, *, last=2, best=0, corpus="a text", losses=None):
    config = CheckpointConfig(every=1, keep_last=last, keep_best=best)
    return Checkpoints(folder, config, {"config": {}, "corpus": corpus}, losses)


def save(folder, losses, *, first=1, known=None, **keep):
    """Saves a checkpoint per loss, which becomes known after the save; None stays unknown."""
    with open_folder(folder, losses=known, **keep) as checkpoints:
        for step, loss in enumerate(losses, first):
            checkpoints.save(build_state(step), batches(step))
            if loss is not None:
                checkpoints.rank(step, loss)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def restore(folder, expected=None, **options):
    """Restores the newest checkpoint; leaves the iterator alone if that fails."""
    iterator = batches()
    try:
        with open_folder(folder, **options) as checkpoints:
            return checkpoints.restore(shapes_of(expected or build_state(0)), iterator).state
    except CheckpointError:
        assert iterator.get_state() == batches().get_state()
        raise


def assert_restores(folder, step):
    iterator = batches()
    with open_folder(folder) as checkpoints:
        assert checkpoints.latest == step
        state = checkpoints.restore(shapes_of(build_state(0)), iterator).state
    expected = build_state(step)
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(expected.key))
    for restored, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert restored.dtype == leaf.dtype
            np.testing.assert_array_equal(restored, leaf)
    np.testing.assert_array_equal(next(iterator)["inputs"], next(batches(step))["inputs"])


@pytest.mark.parametrize(
    ("losses", "last", "best", "kept"),
    [
        ([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], 2, 0, [5, 6]),
        ([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], 2, 1, [2, 5, 6]),
        ([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], 1, 2, [2, 4, 6]),
        ([6.0, 5.0, 4.0, 3.0], 1, 2, [3, 4]),
        ([5.0, 1.0, None, None, 3.0, 6.0], 1, 1, [2, 6]),  # None: saved when the run was stopped
        ([None, None, None], 1, 1, [3]),
        ([5.0, 1.0, NAN, 4.0, NAN, 6.0], 1, 1, [2, 6]),
        ([NAN, 3.0, 1.0, float("inf"), 6.0], 1, 1, [3, 5]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, losses, last, best, kept):
    save(tmp_path, losses, last=last, best=best)
    assert steps(tmp_path) == kept


def test_the_best_is_still_known_after_a_restart(tmp_path):
    save(tmp_path, [5.0, 1.0, 4.0], last=1, best=1)
    save(tmp_path, [3.0, 2.0], first=4, known={1: 5.0, 2: 1.0, 3: None}, last=1, best=1)
    assert steps(tmp_path) == [2, 5]


def test_an_existing_step_is_not_saved_again(tmp_path):
    save(tmp_path, [5.0])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save(tmp_path, [4.0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    # The training step writes its output to the buffers of its input while the save still runs.
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
    state = build_state(3, width=2**18)
    expected = np.full((2**18, 4), 3, np.float32)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(state, batches(3))
        parameters = state.parameters
        for _ in range(5):
            parameters = overwrite(parameters)
        parameters["out"]["weight"].block_until_ready()
    with open_folder(tmp_path) as checkpoints:
        restored = checkpoints.restore(shapes_of(build_state(0, width=2**18)), batches()).state
    np.testing.assert_array_equal(restored.parameters["out"]["weight"], expected)


def test_a_save_that_was_cut_off_is_not_a_checkpoint(tmp_path):
    save(tmp_path, [5.0, 4.0])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    (tmp_path / "3.orbax-checkpoint-tmp" / "meta" / "metadata").write_text('{"corp')
    assert_restores(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "changed", [pytest.param({"width": 16}, id="shape"), pytest.param({"dtype": jnp.bfloat16}, id="dtype")]
)
def test_a_state_that_does_not_fit(tmp_path, changed):
    save(tmp_path, [5.0])
    expected = dataclasses.replace(build_state(0), parameters=build_state(0, **changed).parameters)
    with rejects(CheckpointError, str(tmp_path / "1")):
        restore(tmp_path, expected)


def test_a_parameter_that_only_one_side_has(tmp_path):
    save(tmp_path, [5.0])
    larger, smaller = build_state(0), build_state(0)
    larger.parameters["out"]["bias"] = jnp.zeros(4)
    del smaller.parameters["norm"]
    for expected, path in ((larger, "parameters.out.bias"), (smaller, "parameters.norm.scale")):
        with rejects(CheckpointError, path):
            restore(tmp_path, expected)


def test_a_run_does_not_resume_on_another_text(tmp_path):
    save(tmp_path, [5.0])
    with rejects(CheckpointError, "data.files"):
        restore(tmp_path, corpus="another")


@pytest.fixture
def quiet(monkeypatch):
    """When several reads fail, nothing waits for the errors of all but the first."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    gc.collect()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def garble(path):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def flip_a_bit(path):
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("damage", [os.remove, truncate, garble, flip_a_bit])
def test_a_damaged_file_is_noticed_or_does_not_matter(tmp_path, damage):
    save(tmp_path / "whole", [5.0, 4.0], best=1)
    noticed = {}
    for file in [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file.relative_to(tmp_path / "whole"))
        try:
            assert_restores(folder, 2)
        except CheckpointError as error:
            noticed[file.parent.name] = error
            shutil.rmtree(folder / "2")
            assert_restores(folder, 1)
        shutil.rmtree(folder)
    assert noticed.keys() >= {"d", "state", "data"}
    for error in noticed.values():
        assert error.argument == str(folder / "2")
        assert "\n" not in str(error)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("item", ["", "state", "data", "meta", "state/d"])
def test_a_missing_folder_is_noticed(tmp_path, item):
    save(tmp_path, [5.0, 4.0])
    shutil.rmtree(tmp_path / "2" / item)
    (tmp_path / "2" / item).mkdir()
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path)
    assert caught.value.argument == str(tmp_path / "2")
    assert steps(tmp_path) == [1, 2]


def test_a_full_disk_is_noticed_before_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with rejects(CheckpointError, str(tmp_path)), open_folder(tmp_path) as checkpoints:
        checkpoints.save(build_state(1), batches())
    assert steps(tmp_path) == []
