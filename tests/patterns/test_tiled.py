"""Plans of the released BigBird against draws of its code (transformers 5.23.0, `modeling_big_bird.py`)."""

import hashlib

import numpy as np
import pytest

from sparsejax.patterns import parse
from sparsejax.patterns.tiled import released_plan

pytestmark = pytest.mark.quick

# length, tile, r, heads, seed, longest: the first and last row of the first head, and the SHA-256 of the plan as int64.
RECORDED = {
    (4096, 64, 3, 12, 0, 4096): ([9, 14, 7], [6, 12, 5], "c82ec3b78fbaa5d3"),
    (4096, 64, 3, 12, 1, 4096): ([5, 6, 7], [3, 11, 13], "8e91b61573cc6749"),
    (1024, 64, 3, 4, 0, 4096): ([9, 14, 7], [2, 6, 5], "ed010e38280fd62d"),
    (2048, 64, 3, 4, 0, 2048): ([4, 6, 7], [2, 7, 1], "11ba0343a4b5cd85"),
    (256, 16, 3, 4, 2, 256): ([4, 5, 7], [3, 4, 1], "30aa78abf9d14e2e"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_plans_equal_those_of_the_released_code(case):
    first, last, digest = RECORDED[case]
    plan = np.array(released_plan(*case), np.int64)
    assert plan.shape == (case[3], case[0] // case[1] - 2, case[2])
    assert (plan[0, 0].tolist(), plan[0, -1].tolist()) == (first, last)
    assert hashlib.sha256(plan.tobytes()).hexdigest()[:16] == digest


def test_long_sequences_draw_from_the_first_1024_tokens():
    mask = parse("bigbird_random(3, tile=64, seed=0)").dense(4096)
    assert not mask[:, 1024:].any()
    assert mask[64:-64].reshape(62, 64, -1)[:, 0].sum(1).tolist() == [3 * 64] * 62
    assert not mask[:64].any()
    assert not mask[-64:].any()
