"""Images as sequences of pixels, row by row; the class is asked for at the last pixel."""

import functools
from dataclasses import dataclass

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.probes.example import Example, Probe, ask, open_stream, pick, require

CANDIDATES = 32  # contours drawn at a time
MOST_DRAWS = 200  # of whole images for one example
TURN = 0.25  # standard deviation of a contour's turn from pixel to pixel, in radians
STRAY = 4  # points of a contour that are so many steps apart ...
CLEARANCE = 2.5  # ... keep this distance in pixels, so that it does not meet itself


@dataclass(frozen=True)
class Pathfinder(Probe):
    """Two dots among dashed contours: are they the two ends of one contour (1), or ends of different ones (0)?

    The Pathfinder of arXiv:1805.08315 in the form of Long Range Arena (arXiv:2011.04006), section 2.2.5. An image
    has two long contours and `distractors` of a third of their dashes; the dots are on both ends of a long one, or
    on one end of each. Simplified: pixels are black or white (tokens 0 and 1) without smoothing; a contour is a walk
    of unit steps that turns a little at each, its dashes rounded to pixels; a dot is a square of 3 pixels. Of the
    pairs of ends that would do for answer 0, the one is taken whose distance is closest to that of a contour's own
    ends: whether the dots are far apart tells the answer in 60 % of the images.

    Outcome on LRA's images (32 x 32, 2 classes): Transformer 71.4 %, BigBird 74.9 %, Longformer 69.7 %; S4 94.2 %
    (arXiv:2111.00396).
    """

    side: int = 32  # pixels
    dashes: int = 6  # of a long contour
    dash: int = 3  # pixels of a dash
    gap: int = 1  # pixels between dashes
    distractors: int = 4
    margin: int = 3  # pixels that stay black between contours; above `gap`

    def __post_init__(self):
        require(self, dashes=1, dash=1, gap=0, distractors=0, margin=self.gap + 1)
        require(self, side=self._steps(self.dashes) + 2)

    @property
    def vocab(self) -> int:
        return 2

    @property
    def length(self) -> int:
        return self.side**2

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng = open_stream(seed, index, validation)
        connected = int(rng.integers(2))
        dashes = [self.dashes] * 2 + [-(-self.dashes // 3)] * self.distractors
        for _ in range(MOST_DRAWS):
            contours = self._draw_contours(rng, [self._steps(count) for count in dashes])
            if contours is not None:
                break
        else:
            raise DataError(
                f"data.probe.side: {MOST_DRAWS} times the contours found no room; it takes fewer, or a larger side"
            )
        image = np.zeros((self.side, self.side), np.int32)
        for contour in contours:
            image[tuple(contour[np.arange(len(contour)) % (self.dash + self.gap) < self.dash].T)] = 1
        for row, column in self._choose_ends(contours[0], contours[1], connected):
            image[row - 1 : row + 2, column - 1 : column + 2] = 1
        return ask(image.ravel(), -1, connected)

    def _steps(self, dashes: int) -> int:
        return dashes * (self.dash + self.gap) - self.gap

    def _draw_contours(self, rng: np.random.Generator, steps: list[int]) -> list[np.ndarray] | None:
        """Pixels int [n, 2] of each contour in order, or None if there was no room for one of them."""
        margin = self.margin
        free = np.pad(np.ones((self.side, self.side), bool), margin)
        around = np.mgrid[: 2 * margin + 1, : 2 * margin + 1].reshape(2, 1, -1)
        contours = []
        for count in steps:
            walks = _draw_walks(rng, self.side, count)
            pixels = walks.astype(np.int64) + margin
            walks = walks[free[pixels[..., 0], pixels[..., 1]].all(axis=1)]
            walks = walks[_find_open(walks)]
            if not len(walks):
                return None
            contours.append(walks[0].astype(np.int64))
            rows, columns = contours[-1].T[:, :, None] + around
            free[rows, columns] = False
        return contours

    def _choose_ends(self, one: np.ndarray, other: np.ndarray, connected: int) -> np.ndarray:
        """The pixels of the two dots, [2, 2]."""
        if connected:
            return one[[0, -1]]
        pairs = np.array([(a, b) for a in one[[0, -1]] for b in other[[0, -1]]])
        distances = np.hypot(*(pairs[:, 0] - pairs[:, 1]).T)
        return pairs[np.argmin(np.abs(distances - np.hypot(*(one[0] - one[-1]))))]


def _draw_walks(rng: np.random.Generator, side: int, steps: int) -> np.ndarray:
    """Random walks that stay off the border of the image: float64 [n, steps, 2]; n may be 0."""
    turns = rng.normal(0, TURN, (CANDIDATES, steps))
    turns[:, 0] = rng.uniform(0, 2 * np.pi, CANDIDATES)
    angles = np.cumsum(turns, axis=1)
    moves = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    points = np.cumsum(moves, axis=1) - moves[:, :1] + rng.uniform(1, side - 1, (CANDIDATES, 1, 2))
    return points[((points >= 1) & (points < side - 1)).all(axis=(1, 2))]


def _find_open(walks: np.ndarray) -> np.ndarray:
    """Which of the walks [n, steps, 2] do not meet themselves: bool [n]."""
    rows, columns = np.triu_indices(walks.shape[1], STRAY)
    return (np.square(walks[:, rows] - walks[:, columns]).sum(axis=-1) >= CLEARANCE**2).all(axis=1)


@dataclass(frozen=True)
class Digits(Probe):
    """Which digit is it? Handwritten digits of 8 x 8 pixels, 17 levels of grey, a token each; 10 classes.

    Pixel-level image classification as in Long Range Arena (arXiv:2011.04006), section 2.2.4, which takes CIFAR-10;
    here the 1,797 images of the UCI set of handwritten digits that scikit-learn ships (`pip install scikit-learn`).
    Training goes through them in a new order each epoch; every fifth is held out, and validation goes through those
    in order.

    Outcome on CIFAR-10 in grey: Transformer 42.4 %, S4 88.7 % (arXiv:2111.00396). On these digits, nearest neighbour
    reaches about 98 %, guessing 10 %.
    """

    @property
    def vocab(self) -> int:
        return 17

    @property
    def length(self) -> int:
        return 64

    @property
    def held_out(self) -> int:
        return len(_load_digits()[0][::5])

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        images, classes = _load_digits()
        if validation:
            number = 5 * (index % self.held_out)
        else:
            others, place = divmod(pick(len(images) - self.held_out, seed, index), 4)
            number = 5 * others + 1 + place
        return ask(images[number], -1, classes[number])


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "data.probe: the digits come with scikit-learn (the extra digits): pip install scikit-learn"
        ) from error
    images, classes = load_digits(return_X_y=True)
    return images.astype(np.int32), classes.astype(np.int32)
