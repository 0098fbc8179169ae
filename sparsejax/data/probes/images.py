"""Images as sequences of pixels in row-major order; the class is predicted at the last pixel."""

import functools
from dataclasses import dataclass

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.probes.example import Example, Probe, build_example, open_stream, pick, require

CANDIDATES = 32  # contours per draw
MAX_DRAWS = 200  # images per example
CURVATURE = 0.25  # standard deviation of the change of direction per pixel, in radians
MIN_STEPS = 4  # points of a contour at least this many steps apart ...
CLEARANCE = 2.5  # ... are at least this many pixels apart, so the contour does not cross itself


@dataclass(frozen=True)
class Pathfinder(Probe):
    """Whether two dots among dashed contours are the ends of the same contour (1) or of different contours (0).

    Pathfinder (arXiv:1805.08315) in the form of Long Range Arena (arXiv:2011.04006), section 2.2.5. An image has two
    long contours and `distractors` short ones with a third of the dashes; the dots mark both ends of one long contour,
    or one end of each. Simplifications: pixels are black or white (tokens 0 and 1) without smoothing; a contour is a
    random walk of unit steps with small changes of direction, rounded to pixels; a dot is a square of 3 x 3 pixels. For
    answer 0 the pair of ends is chosen whose distance is closest to that of the ends of one contour: the distance of
    the dots alone predicts the answer in 60 % of the images.

    Published results on LRA's images (32 x 32, 2 classes): Transformer 71.4 %, BigBird 74.9 %, Longformer 69.7 %; S4
    94.2 % (arXiv:2111.00396).
    """

    side: int = 32  # height and width of the image in pixels
    dashes: int = 6  # dashes per long contour
    dash: int = 3  # length of a dash in pixels
    gap: int = 1  # pixels between two dashes
    distractors: int = 4  # number of short contours
    margin: int = 3  # black pixels between two contours, more than `gap`

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
        for _ in range(MAX_DRAWS):
            contours = self._draw_contours(rng, [self._steps(count) for count in dashes])
            if contours is not None:
                break
        else:
            raise DataError(
                "data.probe.side",
                f"{self.side}: the contours did not fit in {MAX_DRAWS} draws; use fewer, or a larger side",
            )
        image = np.zeros((self.side, self.side), np.int32)
        for contour in contours:
            image[tuple(contour[np.arange(len(contour)) % (self.dash + self.gap) < self.dash].T)] = 1
        for row, column in self._choose_ends(contours[0], contours[1], connected):
            image[row - 1 : row + 2, column - 1 : column + 2] = 1
        return build_example(image.ravel(), -1, connected)

    def _steps(self, dashes: int) -> int:
        return dashes * (self.dash + self.gap) - self.gap

    def _draw_contours(self, rng: np.random.Generator, steps: list[int]) -> list[np.ndarray] | None:
        """Pixels of each contour in order, int [n, 2]; None if a contour does not fit."""
        margin = self.margin
        free = np.pad(np.ones((self.side, self.side), bool), margin)
        around = np.mgrid[: 2 * margin + 1, : 2 * margin + 1].reshape(2, 1, -1)
        contours = []
        for count in steps:
            walks = _draw_walks(rng, self.side, count)
            pixels = walks.astype(np.int64) + margin
            walks = walks[free[pixels[..., 0], pixels[..., 1]].all(axis=1)]
            walks = walks[_is_simple(walks)]
            if not len(walks):
                return None
            contours.append(walks[0].astype(np.int64))
            rows, columns = contours[-1].T[:, :, None] + around
            free[rows, columns] = False
        return contours

    def _choose_ends(self, first: np.ndarray, second: np.ndarray, connected: int) -> np.ndarray:
        """Pixels of the two dots, [2, 2]."""
        if connected:
            return first[[0, -1]]
        pairs = np.array([(a, b) for a in first[[0, -1]] for b in second[[0, -1]]])
        distances = np.hypot(*(pairs[:, 0] - pairs[:, 1]).T)
        return pairs[np.argmin(np.abs(distances - np.hypot(*(first[0] - first[-1]))))]


def _draw_walks(rng: np.random.Generator, side: int, steps: int) -> np.ndarray:
    """Random walks inside the border of the image: float64 [n, steps, 2], where n may be 0."""
    changes = rng.normal(0, CURVATURE, (CANDIDATES, steps))
    changes[:, 0] = rng.uniform(0, 2 * np.pi, CANDIDATES)
    angles = np.cumsum(changes, axis=1)
    moves = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    points = np.cumsum(moves, axis=1) - moves[:, :1] + rng.uniform(1, side - 1, (CANDIDATES, 1, 2))
    return points[((points >= 1) & (points < side - 1)).all(axis=(1, 2))]


def _is_simple(walks: np.ndarray) -> np.ndarray:
    """Whether each of the walks [n, steps, 2] does not cross itself: bool [n]."""
    rows, columns = np.triu_indices(walks.shape[1], MIN_STEPS)
    return (np.square(walks[:, rows] - walks[:, columns]).sum(axis=-1) >= CLEARANCE**2).all(axis=1)


@dataclass(frozen=True)
class Digits(Probe):
    """Handwritten digits of 8 x 8 pixels with 17 grey levels, one token per pixel; 10 classes.

    Pixel-level image classification as in Long Range Arena (arXiv:2011.04006), section 2.2.4, which uses CIFAR-10;
    here the 1,797 images of the UCI handwritten digits that ship with scikit-learn (`pip install scikit-learn`).
    Every fifth image is held out; training images are reshuffled every epoch.

    Published results on CIFAR-10 in grey: Transformer 42.4 %, S4 88.7 % (arXiv:2111.00396). On these digits a
    nearest-neighbour classifier reaches about 98 %, chance is 10 %.
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
            group, offset = divmod(pick(len(images) - self.held_out, seed, index), 4)
            number = 5 * group + 1 + offset
        return build_example(images[number], -1, classes[number])


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data.task", "digits needs scikit-learn; pip install 'sparsejax[digits]'") from error
    images, classes = load_digits(return_X_y=True)
    return images.astype(np.int32), classes.astype(np.int32)
