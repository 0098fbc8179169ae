"""Windows cover the text, training batches resume and shard exactly, validation scores every byte once."""

import subprocess
import sys
from itertools import islice

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparsejax.data import DataError, train_batches, validation_batches
from sparsejax.data.batches import Windows
from tests.messages import rejects

LENGTH, BATCH = 8, 6
TEXT = np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8)  # 24 windows, 4 batches per epoch
UNEVEN = TEXT[: 23 * LENGTH + 1]  # 23 windows: epochs end inside batches


def starts(batches, text=TEXT):
    """Offset of each row in the text, by its bytes."""
    offsets = {text[i : i + LENGTH].tobytes(): i for i in range(len(text))}
    return [[offsets[row.astype(np.uint8).tobytes()] for row in batch["inputs"]] for batch in batches]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_windows_predict_every_byte_but_the_first_once():
    windows = Windows(TEXT[:193], LENGTH)
    targets = np.concatenate([windows[i][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(targets, TEXT[1:193])
    assert {len(windows[i]) for i in range(len(windows))} == {LENGTH + 1}
    assert [len(Windows(TEXT[:n], LENGTH)) for n in (0, 8, 9, 16, 17)] == [0, 0, 1, 1, 2]


def test_a_training_batch():
    batch = next(train_batches(TEXT, LENGTH, BATCH, seed=0))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "inputs": ((BATCH, LENGTH), np.int32),
        "targets": ((BATCH, LENGTH), np.int32),
        "weights": ((BATCH, LENGTH), np.float32),
    }
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert batch["weights"].min() == 1


@pytest.mark.parametrize("text", [TEXT, UNEVEN])
def test_every_epoch_is_a_new_permutation_of_the_windows(text):
    count = len(Windows(text, LENGTH))
    rows = np.concatenate(starts(islice(train_batches(text, LENGTH, BATCH, seed=3), 12), text))
    epochs = [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
    assert all(sorted(epoch) == list(range(0, count * LENGTH, LENGTH)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) >= 3


def test_batches_are_a_function_of_seed_and_step():
    first, repeated, other = (list(islice(train_batches(TEXT, LENGTH, BATCH, seed), 9)) for seed in (0, 0, 1))
    assert_same(first, repeated)
    # The second epoch of a seed is not the first epoch of another seed.
    epochs = [np.concatenate(starts(run[i : i + 4])).tolist() for run in (first, other) for i in (0, 4)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_resuming_continues_across_epochs(steps):
    running = train_batches(UNEVEN, LENGTH, BATCH, seed=5)
    list(islice(running, steps))
    state = running.get_state()
    expected = list(islice(running, 8))
    fresh = train_batches(UNEVEN, LENGTH, BATCH, seed=5)
    fresh.set_state(state)
    assert_same(list(islice(fresh, 8)), expected)
    running.set_state(state)
    assert_same(list(islice(running, 8)), expected)


def test_orbax_saves_and_restores_the_iterator(tmp_path):
    running = train_batches(UNEVEN, LENGTH, BATCH, seed=5)
    list(islice(running, 5))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(running)))
        manager.wait_until_finished()
        fresh = train_batches(UNEVEN, LENGTH, BATCH, seed=5)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_same(list(islice(fresh, 6)), list(islice(running, 6)))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_the_global_batch(count):
    whole = list(islice(train_batches(UNEVEN, LENGTH, BATCH, seed=2), 7))
    shares = [
        islice(train_batches(UNEVEN, LENGTH, BATCH, 2, process_index=i, process_count=count), 7) for i in range(count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize(("size", "batch"), [(9, 1), (9, 4), (17, 1), (100, 64)])
def test_small_texts_and_batches(size, batch):
    batches = list(islice(train_batches(TEXT[:size], LENGTH, batch, seed=0), 3))
    assert [b["inputs"].shape for b in batches] == [(batch, LENGTH)] * 3


def test_no_thread_outlives_the_iterator():
    script = (
        "import threading, numpy as np; from sparsejax.data import train_batches;"
        "it = train_batches(np.zeros(99, np.uint8), 8, 4, 0); next(it); next(it);"
        "print([t.name for t in threading.enumerate()])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['MainThread']"


@pytest.mark.parametrize("size", [9, 16, 17, 18, 97, 200])
@pytest.mark.parametrize("batch", [1, 5])
def test_validation_scores_every_byte_but_the_first_once_in_order(size, batch):
    text = TEXT[:size]
    batches = list(validation_batches(text, LENGTH, batch))
    assert {array.shape for b in batches for array in b.values()} == {(batch, LENGTH)}
    assert {name: array.dtype for name, array in batches[0].items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "weights": np.float32,
    }
    inputs, targets, weights = (
        np.concatenate([b[name].ravel() for b in batches]) for name in ("inputs", "targets", "weights")
    )
    assert weights.sum() == size - 1
    np.testing.assert_array_equal(targets[weights == 1], text[1:])
    np.testing.assert_array_equal(inputs[weights == 1], text[:-1])
    assert not targets[weights == 0].any()
    assert batches[-1]["weights"].any()


def test_validation_can_be_read_again():
    assert_same(list(validation_batches(TEXT, LENGTH, 5)), list(validation_batches(TEXT, LENGTH, 5)))


def test_limit_spreads_windows_over_the_text():
    batches = list(validation_batches(TEXT, LENGTH, 2, limit=3))
    assert np.concatenate(starts(batches)).tolist() == [0, 32, 64, 96, 128, 160]  # every fourth of 25 windows
    assert_same(batches, list(validation_batches(TEXT, LENGTH, 2, limit=3)))
    everything = list(validation_batches(TEXT, LENGTH, 2))
    for limit in (0, 13, 99):
        assert_same(list(validation_batches(TEXT, LENGTH, 2, limit=limit)), everything)
    scored = np.concatenate(starts(validation_batches(TEXT, LENGTH, 2, limit=12)))
    assert len(set(scored)) == 24


def test_invalid_sizes():
    with rejects(DataError, "data.length"):
        train_batches(TEXT[:8], 8, 1, 0)
    with rejects(DataError, "data.length"):
        validation_batches(TEXT[:8], 8, 1)
    with rejects(DataError, "data.length"):
        train_batches(TEXT, 0, 1, 0)
    with rejects(DataError, "train.batch"):
        train_batches(TEXT, 8, 6, 0, process_count=4)
