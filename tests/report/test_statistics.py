"""Means and differences, compared with hand calculations, with least squares and with SciPy."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from sparsejax.report.statistics import compare_groups, estimate

pytestmark = pytest.mark.quick


def test_an_estimate_by_hand():
    result = estimate([1.0, 2.0, 6.0])
    # Deviations -2, -1, 3: a sample variance of 14 / 2, a standard error of sqrt(7 / 3).
    assert (result.mean, result.count) == (3.0, 3)
    assert result.error == pytest.approx(math.sqrt(7 / 3), rel=1e-15)


def test_one_value_has_no_error():
    assert estimate([2.5]) == (estimate([2.5]))
    assert estimate([2.5]).error is None


def test_two_groups_are_scipys_paired_test():
    draw = random.Random(0)
    values, others = ({seed: draw.gauss(0, 1) for seed in range(7)} for _ in range(2))
    expected = stats.ttest_rel(list(values.values()), list(others.values()))
    (baseline, result), noise = compare_groups([others, values], 0)
    assert baseline is None
    assert result.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert result.mean / result.error == pytest.approx(expected.statistic, rel=1e-9)
    assert (result.seeds, result.pooled, noise.degrees) == (7, True, 6)


def test_noise_is_pooled_over_groups_by_hand():
    # Group effects 0, 1, 2 and seed effects 0, 1, 5; the deviations add up to zero in every group and seed.
    deviations = [[0.1, -0.1, 0.0], [-0.1, 0.0, 0.1], [0.0, 0.1, -0.1]]
    groups = [{seed: group + (0, 1, 5)[seed] + deviations[group][seed] for seed in (2, 0, 1)} for group in range(3)]
    (_, first, second), noise = compare_groups(groups, 0)
    # The squares are 0.06, with (3 - 1) x (3 - 1) degrees of freedom.
    assert (noise.deviation, noise.degrees) == (pytest.approx(math.sqrt(0.015), rel=1e-9), 4)
    error = math.sqrt(0.015 * 2 / 3)
    assert (first.mean, second.mean) == (pytest.approx(1), pytest.approx(2))
    assert first.error == pytest.approx(error) == second.error
    # Holm: the smaller of two p counts twice, the larger once.
    assert second.p == pytest.approx(2 * 2 * stats.t.sf(2 / error, 4), rel=1e-6)
    assert first.p == pytest.approx(2 * stats.t.sf(1 / error, 4), rel=1e-6)


def test_the_fit_is_that_of_least_squares():
    groups = [{0: 1.0, 1: 2.0, 2: 6.0, 5: 1.5}, {2: 4.0, 0: 0.0, 1: 2.5}, {0: 3.0, 1: 1.0, 2: 4.0, 7: 9.0}]
    cells = [(i, seed, value) for i, values in enumerate(groups) for seed, value in values.items()]
    # Dummy variables of groups 1 and 2 and of all seeds but the first.
    design = np.array([[1, i == 1, i == 2, *(seed == s for s in (1, 2, 5, 7))] for i, seed, _ in cells], float)
    observed = np.array([value for *_, value in cells])
    effects, squares, rank, _ = np.linalg.lstsq(design, observed, rcond=None)
    (_, first, second), noise = compare_groups(groups, 0)
    assert (first.mean, second.mean) == (pytest.approx(effects[1]), pytest.approx(effects[2]))
    assert noise.degrees == len(cells) - rank == 4
    assert noise.deviation == pytest.approx(math.sqrt(squares[0] / 4))
    covariance = np.linalg.inv(design.T @ design) * noise.deviation**2
    assert first.error == pytest.approx(math.sqrt(covariance[1, 1]))
    assert (first.seeds, second.seeds) == (3, 3)


@pytest.mark.parametrize("seeds", [3, 4, 8])
def test_larger_differences_at_equal_noise_never_have_larger_p(seeds):
    draw = random.Random(seeds)
    for _ in range(20):
        groups = [{seed: draw.gauss(0.3 * i, 1) for seed in range(seeds)} for i in range(8)]
        tested = [d for d in compare_groups(groups, 0)[0] if d is not None and d.pooled]
        tested.sort(key=lambda d: abs(d.mean))
        assert [d.p for d in tested] == sorted((d.p for d in tested), reverse=True)
        assert len({round(d.error, 12) for d in tested}) <= 1


def test_false_alarms_are_as_rare_as_they_should_be():
    draw = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        seed_effects = draw.normal(0, 3, 3)
        groups = [dict(enumerate(seed_effects + draw.normal(0, 1, 3))) for _ in range(6)]
        alarms += any(d.p < 0.05 for d in compare_groups(groups, 0)[0] if d is not None)
    assert 10 < alarms < 70  # of 1,000 tables without any difference, at most 5 % have a verdict


def test_fewer_than_three_common_seeds_have_no_p():
    groups = [{0: 1.0, 1: 2.0, 2: 6.0}, {0: 3.0, 1: 2.0, 9: 1.0}, {0: 2.5}, {8: 1.0, 9: 1.0, 10: 2.0}]
    (_, second, single, none), _ = compare_groups(groups, 0)
    assert (second.mean, second.error, second.p, second.seeds) == (1.0, None, None, 2)
    assert (single.mean, single.error, single.p, single.seeds) == (1.5, None, None, 1)
    assert (none.mean, none.error, none.p, none.seeds) == (None, None, None, 0)


def test_equal_differences_are_certain():
    groups = [{0: 0.1, 1: 0.2, 2: 0.7}, {0: 0.1, 1: 0.2, 2: 0.7}, {0: 0.4, 1: 0.5, 2: 1.0}]
    (_, same, shifted), noise = compare_groups(groups, 0)
    assert noise.deviation == pytest.approx(0, abs=1e-12)
    assert (same.mean, same.p) == (pytest.approx(0, abs=1e-12), 1.0)
    assert (shifted.mean, shifted.p) == (pytest.approx(0.3), 0.0)


def test_a_much_noisier_group_is_not_pooled():
    quiet = [{0: 1.0 + i, 1: 1.01 + i, 2: 0.99 + i + 0.002 * i} for i in range(4)]
    noisy = {0: 2.0, 1: 6.0, 2: 3.0}
    (_, *others, loud), noise = compare_groups([*quiet, noisy], 0)
    (_, *expected), alone = compare_groups(quiet, 0)
    assert (noise.degrees, noise.deviation) == (alone.degrees, pytest.approx(alone.deviation))
    assert [other.error for other in others] == pytest.approx([other.error for other in expected])
    welch = stats.ttest_ind(list(noisy.values()), list(quiet[0].values()), equal_var=False)
    assert not loud.pooled
    assert loud.mean / loud.error == pytest.approx(welch.statistic)
    assert loud.p == pytest.approx(welch.pvalue)  # the largest of all p counts once
    assert all(d is None or not d.pooled for d in compare_groups([*quiet, noisy], 4)[0])  # as the baseline


def test_no_noise_without_degrees_of_freedom():
    assert compare_groups([{0: 1.0}, {0: 2.0}], 0)[1] is None
    assert compare_groups([{0: 1.0, 1: 2.0, 2: 3.0}], 0) == ([None], None)
