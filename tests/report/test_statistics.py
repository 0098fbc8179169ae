"""Means and paired differences, compared with hand calculations and with SciPy."""

import math
import random

import pytest
from scipy import stats

from sparsejax.report.statistics import estimate, paired_difference, pool_deviations

pytestmark = pytest.mark.quick


def test_an_estimate_by_hand():
    result = estimate([1.0, 2.0, 6.0])
    # Deviations -2, -1, 3: a sample variance of 14 / 2, a standard error of sqrt(7 / 3).
    assert (result.mean, result.count) == (3.0, 3)
    assert result.error == pytest.approx(math.sqrt(7 / 3), rel=1e-15)


def test_one_value_has_no_error():
    assert estimate([2.5]) == (estimate([2.5]))
    assert estimate([2.5]).error is None


def test_a_difference_by_hand():
    result = paired_difference({0: 1.0, 1: 2.0, 2: 6.0}, {2: 4.0, 0: 0.0, 1: 2.0})
    # Differences 1, 0, 2: mean 1, sample deviation 1, standard error 1 / sqrt(3), t = sqrt(3).
    assert (result.mean, result.pairs) == (1.0, 3)
    assert result.error == pytest.approx(1 / math.sqrt(3), rel=1e-15)
    # With two degrees of freedom the tail beyond t is 1 - t / sqrt(2 + t**2), both sides together.
    assert result.p == pytest.approx(1 - math.sqrt(3) / math.sqrt(5), rel=1e-12)
    assert result.below_noise  # 1 < 2 / sqrt(3)


def test_a_difference_is_scipys_paired_test():
    draw = random.Random(0)
    values, others = ({seed: draw.gauss(0, 1) for seed in range(7)} for _ in range(2))
    expected = stats.ttest_rel(list(values.values()), list(others.values()))
    result = paired_difference(values, others)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert result.mean / result.error == pytest.approx(expected.statistic, rel=1e-12)


def test_only_common_seeds_are_compared():
    assert paired_difference({0: 1.0, 1: 3.0, 5: 99.0}, {1: 1.0, 0: 0.0, 7: -99.0}) == paired_difference(
        {0: 1.0, 1: 3.0}, {0: 0.0, 1: 1.0}
    )


def test_fewer_than_two_common_seeds_have_no_p():
    single = paired_difference({0: 3.0, 1: 2.0}, {0: 1.0})
    assert (single.mean, single.error, single.p, single.pairs, single.below_noise) == (2.0, None, None, 1, None)
    none = paired_difference({0: 3.0}, {1: 1.0})
    assert (none.mean, none.error, none.p, none.pairs, none.below_noise) == (None, None, None, 0, None)


def test_equal_differences_have_no_p():
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.mean, same.error, same.p, same.below_noise) == (0.0, 0.0, None, True)
    shifted = paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert (shifted.mean, shifted.error, shifted.p, shifted.below_noise) == (1.0, 0.0, None, False)


def test_deviations_are_pooled_by_degrees_of_freedom():
    # Squares 2 of one degree of freedom, 14 of two; a group of one value says nothing.
    assert pool_deviations([[1.0, 3.0], [1.0, 2.0, 6.0], [100.0]]) == pytest.approx(math.sqrt(16 / 3), rel=1e-15)
    assert pool_deviations([[1.0], [2.0]]) is None
