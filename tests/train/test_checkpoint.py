"""Checkpoints: which are kept, and that a damaged one is never taken for a whole one."""

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
from sparsejax.train import CheckpointError, Checkpoints, TrainState

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
    return TrainState(jnp.int32(step), jnp.int32(1), jnp.float32(2.5), jax.random.key(step), parameters, moments)


def shapes_of(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def open_folder(folder, *, last=2, best=0, corpus="a text"):
    return Checkpoints(folder, CheckpointConfig(every=1, keep_last=last, keep_best=best), {"corpus": corpus})


def save(folder, losses, *, first=1, **keep):
    with open_folder(folder, **keep) as checkpoints:
        for step, loss in enumerate(losses, first):
            checkpoints.save(build_state(step), batches(step), loss)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def refusal(folder, wanted=None, **changed):
    iterator = batches()
    with pytest.raises(CheckpointError) as caught, open_folder(folder, **changed) as checkpoints:
        checkpoints.restore(shapes_of(wanted or build_state(0)), iterator)
    assert len(str(caught.value).splitlines()) == 1
    assert iterator.get_state() == batches().get_state()
    return str(caught.value)


def assert_restores(folder, step):
    iterator = batches()
    with open_folder(folder) as checkpoints:
        assert checkpoints.latest == step
        state = checkpoints.restore(shapes_of(build_state(0)), iterator)
    expected = build_state(step)
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(expected.key))
    for found, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert found.dtype == leaf.dtype
            np.testing.assert_array_equal(found, leaf)
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
    save(tmp_path, [3.0, 2.0], first=4, last=1, best=1)
    assert steps(tmp_path) == [2, 5]


def test_a_step_that_is_there_is_not_saved_again(tmp_path):
    save(tmp_path, [5.0])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save(tmp_path, [4.0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_saved_state_may_be_given_up_at_once(tmp_path):
    # The training step takes its input's memory for its output while the save still runs.
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
    state = build_state(3, width=2**18)
    expected = np.full((2**18, 4), 3, np.float32)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(state, batches(3), None)
        parameters = state.parameters
        for _ in range(5):
            parameters = overwrite(parameters)
        parameters["out"]["weight"].block_until_ready()
    with open_folder(tmp_path) as checkpoints:
        found = checkpoints.restore(shapes_of(build_state(0, width=2**18)), batches())
    np.testing.assert_array_equal(found.parameters["out"]["weight"], expected)


def test_a_save_that_was_cut_off_is_not_a_checkpoint(tmp_path):
    save(tmp_path, [5.0, 4.0])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    (tmp_path / "3.orbax-checkpoint-tmp" / "metrics" / "metrics").write_text('{"eval')
    assert_restores(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (
            build_state(0, width=16),
            "parameters.norm.scale is float32[8] in the checkpoint and float32[16] in the configuration",
        ),
        (
            build_state(0, dtype=jnp.bfloat16),
            "parameters.out.weight is float32[8, 4] in the checkpoint and bfloat16[8, 4] in the configuration",
        ),
    ],
)
def test_a_state_that_does_not_fit(tmp_path, wanted, problem):
    save(tmp_path, [5.0])
    wanted = TrainState(**{**vars(build_state(0)), "parameters": wanted.parameters})
    assert refusal(tmp_path, wanted) == f"checkpoint {tmp_path / '1'} does not fit this configuration: {problem}"


def test_a_parameter_that_only_one_side_has(tmp_path):
    save(tmp_path, [5.0])
    more = build_state(0)
    more.parameters["out"]["bias"] = jnp.zeros(4)
    assert refusal(tmp_path, more).endswith("parameters.out.bias is only in the configuration")
    less = build_state(0)
    del less.parameters["norm"]
    assert refusal(tmp_path, less).endswith("parameters.norm.scale is only in the checkpoint")


def test_a_run_does_not_go_on_with_another_text(tmp_path):
    save(tmp_path, [5.0])
    assert refusal(tmp_path, corpus="another").startswith("data.files: ")


@pytest.fixture
def quiet(monkeypatch):
    """Of several reads that fail, all but the first have nobody left to tell."""
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
def test_any_damaged_file_is_noticed_or_does_not_matter(tmp_path, damage):
    save(tmp_path / "whole", [5.0, 4.0], best=1)
    noticed = {}
    for file in [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file.relative_to(tmp_path / "whole"))
        try:
            assert_restores(folder, 2)
        except CheckpointError as error:
            noticed[file.parent.name] = str(error)
            shutil.rmtree(folder / "2")
            assert_restores(folder, 1)
        shutil.rmtree(folder)
    assert noticed.keys() >= {"d", "state", "data"}
    for message in noticed.values():
        assert message.startswith(f"checkpoint {folder / '2'} is damaged (")
        assert message.endswith("; delete that folder to go on from the one before it")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("item", ["", "state", "data", "meta", "state/d"])
def test_a_missing_folder_is_noticed(tmp_path, item):
    save(tmp_path, [5.0, 4.0])
    shutil.rmtree(tmp_path / "2" / item)
    (tmp_path / "2" / item).mkdir()
    message = refusal(tmp_path)
    assert message.startswith(f"checkpoint {tmp_path / '2'} is damaged (")
    assert steps(tmp_path) == [1, 2]


def test_no_room_is_noticed_before_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    expected = r"^no space left on the workdir's disk: a checkpoint needs 1\.0 MiB, "
    with pytest.raises(CheckpointError, match=expected), open_folder(tmp_path) as checkpoints:
        checkpoints.save(build_state(1), batches(), None)
    assert steps(tmp_path) == []
