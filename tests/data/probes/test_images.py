"""Images: contours are traced again pixel by pixel; digits are those of scikit-learn."""

import sys
from collections import deque

import numpy as np
import pytest

from sparsejax.data import DataError
from sparsejax.data.probes import Digits, Pathfinder, images


def trace(image, link):
    """A number for each white pixel, the same for those that are linked by steps of at most `link` pixels."""
    part, parts = np.zeros_like(image), 0
    for start in zip(*np.nonzero(image), strict=True):
        if part[start]:
            continue
        parts += 1
        part[start], queue = parts, deque([start])
        while queue:
            row, column = queue.popleft()
            rows, columns = (slice(max(at - link, 0), at + link + 1) for at in (row, column))
            for r, c in np.argwhere((image[rows, columns] == 1) & (part[rows, columns] == 0)):
                at = r + rows.start, c + columns.start
                part[at] = parts
                queue.append(at)
    return part, parts


def find_dots(image):
    """The pixels whose 3 x 3 surroundings are white."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    return np.argwhere(windows.all(axis=(2, 3))) + 1


@pytest.mark.parametrize("probe", [Pathfinder(), Pathfinder(side=20, dashes=3, distractors=2)])
def test_pathfinder_answer_is_whether_the_dots_are_connected(probe):
    answers = []
    for index in range(60):
        example = probe.example(0, index)
        image = example["inputs"].reshape(probe.side, probe.side)
        part, parts = trace(image, link=probe.gap + 1)
        assert parts == 2 + probe.distractors
        one, other = find_dots(image)
        answers.append(int(part[tuple(one)] == part[tuple(other)]))
        assert example["targets"][-1] == answers[-1]
        assert example["weights"].sum() == example["weights"][-1] == 1
    assert 15 < sum(answers) < 45


def test_pathfinder_ink_does_not_tell():
    examples = [Pathfinder().example(0, index) for index in range(600)]
    classes = np.array([example["targets"][-1] for example in examples])
    ink = np.array([example["inputs"].sum() for example in examples])
    assert abs(classes.mean() - 0.5) < 0.08
    assert abs(ink[classes == 0].mean() - ink[classes == 1].mean()) < 4 * ink.std() / 150**0.5


def test_pathfinder_without_room_says_so():
    with pytest.raises(DataError, match=r"^data.probe.side: [^\n]+$"):
        Pathfinder(side=13, dashes=3, distractors=9).example(0, 0)


def test_digits_are_each_seen_once_an_epoch_and_held_out_ones_never():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, classes = datasets.load_digits(return_X_y=True)
    known = {image.astype(np.int32).tobytes(): label for image, label in zip(pixels, classes, strict=True)}
    assert len(known) == len(pixels)
    probe = Digits()
    trained = [probe.example(0, index) for index in range(len(pixels) - probe.held_out)]
    held_out = [probe.example(0, index, True) for index in range(probe.held_out)]
    seen = [example["inputs"].tobytes() for example in trained + held_out]
    assert sorted(seen) == sorted(known)
    for example in trained + held_out:
        assert example["inputs"].shape == (probe.length,)
        assert example["inputs"].max() < probe.vocab
        assert example["targets"][-1] == known[example["inputs"].tobytes()]
    np.testing.assert_array_equal(probe.example(9, probe.held_out, True)["inputs"], held_out[0]["inputs"])
    later = [probe.example(0, len(trained) + index)["inputs"].tobytes() for index in range(20)]
    assert later != seen[:20]


def test_digits_without_their_package_say_how_to_get_it(monkeypatch):
    images._load_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        Digits().example(0, 0)
