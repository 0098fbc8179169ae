"""Images: contours are traced pixel by pixel; digits equal those of scikit-learn."""

import sys
from collections import deque

import numpy as np
import pytest

from sparsejax.data import DataError
from sparsejax.data.probes import Digits, Pathfinder, images
from tests.messages import rejects

pytestmark = pytest.mark.quick


def trace(image, link):
    """Labels the components of white pixels that are linked by steps of at most `link` pixels."""
    labels, count = np.zeros_like(image), 0
    for start in zip(*np.nonzero(image), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start], queue = count, deque([start])
        while queue:
            rows, columns = (slice(max(i - link, 0), i + link + 1) for i in queue.popleft())
            for row, column in np.argwhere((image[rows, columns] == 1) & (labels[rows, columns] == 0)):
                pixel = row + rows.start, column + columns.start
                labels[pixel] = count
                queue.append(pixel)
    return labels, count


def find_dots(image):
    """Centres of white squares of 3 x 3 pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    return np.argwhere(windows.all(axis=(2, 3))) + 1


@pytest.mark.parametrize("probe", [Pathfinder(), Pathfinder(side=20, dashes=3, distractors=2)])
def test_pathfinder_answer_is_whether_the_dots_are_connected(probe):
    answers = []
    for index in range(60):
        example = probe.example(0, index)
        image = example["inputs"].reshape(probe.side, probe.side)
        labels, count = trace(image, link=probe.gap + 1)
        assert count == 2 + probe.distractors
        first, second = find_dots(image)
        answers.append(int(labels[tuple(first)] == labels[tuple(second)]))
        assert example["targets"][-1] == answers[-1]
        assert example["weights"].sum() == example["weights"][-1] == 1
    assert 15 < sum(answers) < 45


def test_pathfinder_ink_does_not_predict_the_answer():
    examples = [Pathfinder().example(0, index) for index in range(600)]
    classes = np.array([example["targets"][-1] for example in examples])
    ink = np.array([example["inputs"].sum() for example in examples])
    assert abs(classes.mean() - 0.5) < 0.08
    assert abs(ink[classes == 0].mean() - ink[classes == 1].mean()) < 4 * ink.std() / 150**0.5


def test_pathfinder_without_room():
    with rejects(DataError, "data.probe.side"):
        Pathfinder(side=13, dashes=3, distractors=9).example(0, 0)


def test_digits_visit_every_training_image_once_per_epoch():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, classes = datasets.load_digits(return_X_y=True)
    known = {image.astype(np.int32).tobytes(): label for image, label in zip(pixels, classes, strict=True)}
    assert len(known) == len(pixels)
    probe = Digits()
    training = [probe.example(0, index) for index in range(len(pixels) - probe.held_out)]
    held_out = [probe.example(0, index, True) for index in range(probe.held_out)]
    visited = [example["inputs"].tobytes() for example in training + held_out]
    assert sorted(visited) == sorted(known)
    for example in training + held_out:
        assert example["inputs"].shape == (probe.length,)
        assert example["inputs"].max() < probe.vocab
        assert example["targets"][-1] == known[example["inputs"].tobytes()]
    np.testing.assert_array_equal(probe.example(9, probe.held_out, True)["inputs"], held_out[0]["inputs"])
    second_epoch = [probe.example(0, len(training) + index)["inputs"].tobytes() for index in range(20)]
    assert second_epoch != visited[:20]


def test_digits_without_scikit_learn(monkeypatch):
    images._load_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with rejects(DataError, "data.task"):
        Digits().example(0, 0)
