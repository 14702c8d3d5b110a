import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genmed.calibration import (
    coverage,
    ece,
    ece_interval,
    interval_score,
    near_boundary,
    reliability,
    roc_auc,
    roc_auc_interval,
    tempered,
    volume_error,
    volume_interval,
)
from genmed.errors import GenMedError

VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


def two_classes(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p])


def drawn(n: int = 200_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of three classes, and truths that were drawn with them."""
    rng = np.random.default_rng(seed)
    soft = rng.dirichlet((0.6, 0.5, 0.4), n).T
    return soft, (rng.random(n) > soft.cumsum(axis=0)[:2]).sum(axis=0)


# Probabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [None, 0, 1, 2])
def test_truths_drawn_with_their_probabilities_are_calibrated(label: int | None) -> None:
    soft, truth = drawn()
    found = reliability(soft, truth, label=label)
    assert found.count.sum() == truth.size
    assert ece(found) < 0.004
    assert ece(reliability(soft, np.roll(truth, 1), label=label)) > 0.05


def test_reliability_of_a_few_claims_is_exact() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.9, 0.5])
    truth = np.array([0, 1, 0, 1, 1])
    found = reliability(two_classes(p), truth, bins=2, label=1)  # 0.5 belongs to the lower bin
    assert found.edges.tolist() == [0, 0.5, 1]
    assert found.count.tolist() == [4, 1]
    assert found.confidence == pytest.approx([1.1 / 4, 0.9])
    assert found.accuracy == pytest.approx([0.5, 1.0])
    assert ece(found) == pytest.approx(4 / 5 * (0.5 - 0.275) + 1 / 5 * 0.1)


def test_most_probable_class_is_judged_by_its_own_probability() -> None:
    soft = np.array([[0.6, 0.2, 0.1], [0.3, 0.7, 0.1], [0.1, 0.1, 0.8]])
    found = reliability(soft, np.array([0, 1, 0]), bins=1)
    assert found.confidence == pytest.approx([0.7]) and found.accuracy == pytest.approx([2 / 3])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 0.9, 1.0])
def test_known_miscalibration_has_its_known_error(share: float) -> None:
    truth = np.arange(1000) < 1000 * share
    claimed = np.full(1000, 0.9)
    assert ece(reliability(two_classes(claimed), truth.astype(int), label=1)) == pytest.approx(abs(0.9 - share))


def test_overconfidence_and_underconfidence_do_not_cancel() -> None:
    p = np.repeat([0.25, 0.75], 100)
    truth = np.tile(np.arange(100) < 50, 2).astype(int)
    assert ece(reliability(two_classes(p), truth, label=1)) == pytest.approx(0.25)


def test_background_swamps_what_is_wrong_near_the_boundary() -> None:
    truth = np.zeros((40, 40, 40), int)
    truth[18:22, 18:22, 18:22] = 1
    near = near_boundary(truth, (1, 1, 1), 2.0)
    p = np.where(near, 0.5, truth.astype(float))
    p[near & (truth == 1)] = 0.9
    everywhere, close = (ece(reliability(two_classes(p), truth, label=1, where=w)) for w in (None, near))
    assert close == pytest.approx(everywhere * truth.size / near.sum())
    assert everywhere < 0.005 < 0.3 < close


@given(
    p=arrays(float, 30, elements=st.floats(0, 1)),
    truth=arrays(int, 30, elements=st.integers(0, 1)),
    cut=st.integers(0, 30),
)
def test_parts_add_up_to_the_whole(p: np.ndarray, truth: np.ndarray, cut: int) -> None:
    soft = two_classes(p)
    whole = reliability(soft, truth, label=1)
    parts = reliability(soft[:, :cut], truth[:cut], label=1) + reliability(soft[:, cut:], truth[cut:], label=1)
    assert np.array_equal(parts.count, whole.count)
    np.testing.assert_allclose(parts.confidence, whole.confidence, atol=1e-12)
    np.testing.assert_allclose(parts.accuracy, whole.accuracy, atol=1e-12)
    assert np.array_equal(np.isnan(whole.confidence), whole.count == 0)
    assert 0 <= ece(whole) <= 1 and ece(parts) == pytest.approx(ece(whole), abs=1e-12)
    used = whole.count > 0
    assert (whole.edges[:-1][used] <= whole.confidence[used] + 1e-12).all()
    assert (whole.confidence[used] <= whole.edges[1:][used] + 1e-12).all()


def test_where_keeps_voxels_out() -> None:
    soft, truth = drawn(1000)
    where = np.arange(1000) < 300
    as_it_is, changed_outside = (
        reliability(soft, labels, where=where) for labels in (truth, np.where(where, truth, 2 - truth))
    )
    np.testing.assert_array_equal(as_it_is.accuracy, changed_outside.accuracy)
    assert as_it_is.count.sum() == 300
    assert math.isnan(ece(reliability(soft, truth, where=np.zeros(1000, bool))))


def test_error_of_all_cases_lies_in_its_interval_and_equal_cases_leave_no_doubt() -> None:
    cases = [reliability(*drawn(300, seed)) for seed in range(12)]
    low, high = ece_interval(cases, [seed // 2 for seed in range(12)])
    assert 0 < low < high < 0.2
    same = ece(cases[0])
    assert ece_interval([cases[0]] * 4, "abab") == pytest.approx((same, same))
    empty = reliability(*drawn(10), where=np.zeros(10, bool))
    assert ece_interval([cases[0], empty], "ab") == pytest.approx((same, same))
    for wrong in (cases, [empty, empty]):
        with pytest.raises(GenMedError, match="give one each, and at least one claim"):
            ece_interval(wrong, "ab")


def test_intervals_resample_whole_persons() -> None:
    right = reliability(two_classes(np.full(10, 0.9)), np.ones(10, int), label=1)
    wrong = reliability(two_classes(np.full(10, 0.9)), np.zeros(10, int), label=1)
    assert ece_interval([right, wrong], "ab") == pytest.approx((0.1, 0.9))
    assert ece_interval([right, wrong], "aa") == pytest.approx((0.4, 0.4))


def test_voxels_near_a_boundary_are_those_within_the_distance() -> None:
    classes = np.zeros((9, 6, 4), int)
    classes[5:] = 2
    for distance_mm, layers in ((1.5, 1), (3.0, 2), (4.4, 2), (4.5, 3)):
        near = near_boundary(classes, (1.5, 0.5, 3.0), distance_mm)
        assert np.flatnonzero(near.all(axis=(1, 2))).tolist() == list(range(5 - layers, 5 + layers))
        assert near.any(axis=(1, 2)).sum() == 2 * layers
    assert not near_boundary(np.ones((4, 4, 4), int), (1, 1, 1), 2.0).any()
    with pytest.raises(GenMedError, match="below the spacing"):
        near_boundary(classes, (1.5, 1.5, 3.0), 1.0)


def test_boundary_between_two_structures_counts() -> None:
    classes = np.array([1, 1, 1, 1, 2, 2, 2, 2])[:, None, None]
    assert np.flatnonzero(near_boundary(classes, (1, 1, 1), 1.0)).tolist() == [3, 4]


def test_what_are_no_probabilities_is_refused() -> None:
    truth = np.zeros(4, int)
    for soft in (np.ones((2, 4)), np.array([[1.5] * 4, [-0.5] * 4]), np.full((2, 4), np.nan)):
        with pytest.raises(GenMedError, match="do not add up to 1"):
            reliability(soft, truth)
    with pytest.raises(GenMedError, match="do not agree"):
        reliability(np.full((2, 5), 0.5), truth)
    with pytest.raises(GenMedError, match="a known class"):
        reliability(np.full((2, 4), 0.5), truth, label=2)
    with pytest.raises(GenMedError, match="one number of bins"):
        reliability(np.full((2, 4), 0.5), truth, 5) + reliability(np.full((2, 4), 0.5), truth, 6)


# Intervals ------------------------------------------------------------------------------------------------


def test_coverage_is_the_share_with_wilsons_interval() -> None:
    found = coverage([(0.0, 1.0)] * 10, [0.0, 1.0, 0.5, 0.1, 0.2, 0.3, 0.4, 0.6, -0.1, 1.1])
    assert found.share == 0.8
    assert found[1:] == pytest.approx((0.490162, 0.943318), abs=1e-6)  # as published tables give for 8 of 10
    assert coverage([(0.0, 1.0)] * 10, [0.5] * 10) == pytest.approx((1.0, 0.722467, 1.0), abs=1e-6)
    assert coverage([(0.0, 1.0)] * 10, [2.0] * 10) == pytest.approx((0.0, 0.0, 0.277533), abs=1e-6)


def test_simulated_intervals_cover_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=20_000)
    truths = rng.normal(centre)
    for half, expected in ((1.959964, 0.95), (0.674490, 0.5)):
        found = coverage(np.stack([centre - half, centre + half], axis=1), truths)
        assert found.low < expected < found.high
        assert found.high - found.low < 0.02


def test_tempered_probabilities_are_those_of_divided_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (3, 5, 6))
    soft = np.exp(logits) / np.exp(logits).sum(axis=0)
    softer = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum(axis=0)
    np.testing.assert_allclose(tempered(soft, 1.5), softer, rtol=1e-9)
    np.testing.assert_allclose(tempered(softer, 1 / 1.5), soft, rtol=1e-9)
    assert tempered(soft, 1.0) is soft
    assert not tempered(np.zeros((2, 3), np.float32), 2.0).any()  # beyond a region of interest


@pytest.mark.parametrize("cases", [4, 40])
def test_volume_intervals_hold_the_share_of_true_volumes_that_they_claim(cases: int) -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(4000):
        true = rng.lognormal(7, 0.5, cases + 1)
        found = true * rng.lognormal(0, 0.1, cases + 1)
        (error,) = volume_error(found[1:, None], true[1:, None])
        low, high = volume_interval(found[:1], error)
        held.append(low <= true[0] <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_what_samples_leave_open_widens_an_interval() -> None:
    samples = np.exp([6.0, 7.0, 8.0]) - 1
    assert np.log1p(volume_interval(samples, 0.0)) == pytest.approx([7 - 1.96, 7 + 1.96], abs=1e-3)
    assert np.log1p(volume_interval(samples, 2.0)) == pytest.approx([7 - 1.96 * 5**0.5, 7 + 1.96 * 5**0.5], abs=1e-3)
    assert volume_interval(np.zeros(3), 0.5)[0] == 0


def test_only_structures_that_cases_have_are_measured() -> None:
    true, found = np.array([[0.0, 99, 0], [0, 0, 0]]), np.array([[0.0, 99, 9], [0, 0, 0]])
    none, right, wrong = volume_error(found, true)
    assert none == right == 0 and wrong == pytest.approx(math.log(10) * 12.7062 / 1.95996, abs=1e-3)


def test_interval_score_is_width_and_penalty_and_best_for_the_true_quantiles() -> None:
    assert interval_score([(1.0, 3.0)] * 3, [2.0, 0.5, 4.0]) == pytest.approx([2, 2 + 40 * 0.5, 2 + 40])
    truths = np.random.default_rng(0).normal(size=50_000)
    means = [interval_score([(-h, h)] * len(truths), truths).mean() for h in (1.5, 1.96, 2.5)]
    assert means[1] < means[0] and means[1] < means[2]


def test_broken_intervals_are_refused() -> None:
    for intervals, truths in (([(1.0, 0.0)], [0.5]), ([(0.0, math.nan)], [0.5]), ([(0.0, 1.0)], [math.nan])):
        with pytest.raises(GenMedError, match="ends before it starts"):
            coverage(intervals, truths)
    for intervals, truths in (([], []), ([(0.0, 1.0)], [0.5, 0.6])):
        with pytest.raises(GenMedError, match="at least one"):
            interval_score(intervals, truths)


# Warnings -------------------------------------------------------------------------------------------------


def test_auc_counts_won_pairs_and_halves_ties() -> None:
    assert roc_auc([2, 3], [0, 1]) == 1.0
    assert roc_auc([0, 1], [2, 3]) == 0.0
    assert roc_auc([1, 1, 1], [1, 1]) == 0.5
    assert roc_auc([1, 2], [1, 0]) == (0.5 + 1 + 1 + 1) / 4
    assert roc_auc([math.inf, 1], [1, 0]) == (1 + 1 + 0.5 + 1) / 4


@given(positive=VALUES, negative=VALUES)
def test_auc_is_the_mean_over_pairs(positive: list[float], negative: list[float]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert roc_auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert roc_auc(positive, negative) == pytest.approx(1 - roc_auc(negative, positive))
    assert roc_auc(np.exp(positive), np.exp(negative)) == roc_auc(positive, negative)


@given(positive=VALUES, negative=VALUES)
def test_auc_of_one_group_has_no_spread(positive: list[float], negative: list[float]) -> None:
    auc, groups = roc_auc(positive, negative), ("a" * len(positive), "a" * len(negative))
    assert roc_auc_interval(positive, negative, *groups, n=20) == pytest.approx((auc, auc))


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=3, max_size=8))
def test_repeated_measurements_of_a_person_add_no_certainty(pairs: list[tuple[float, float]]) -> None:
    positive, negative = (list(values) for values in zip(*pairs, strict=True))
    assume(len(set(positive + negative)) > 2)
    people = list(range(len(pairs)))
    once = roc_auc_interval(positive, negative, people, people, n=500)
    twice = roc_auc_interval(positive * 2, negative * 2, people * 2, people * 2, n=500)
    assert twice == pytest.approx(once)


def test_auc_interval_has_the_width_that_theory_gives() -> None:
    rng = np.random.default_rng(1)
    positive, negative = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    low, high = roc_auc_interval(positive, negative, list(range(200)), list(range(200, 400)), n=2000)
    a = roc_auc(positive, negative)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)  # Hanley & McNeil 1982
    deviation = math.sqrt((a * (1 - a) + 199 * (q1 - a**2) + 199 * (q2 - a**2)) / 200**2)
    assert low < a < high
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_empty_or_unequal_lists_are_refused() -> None:
    for positive, negative in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(GenMedError, match="at least one number on each side"):
            roc_auc(positive, negative)
    with pytest.raises(GenMedError, match="needs its group"):
        roc_auc_interval([1.0], [0.0], ["a", "b"], ["a"])


def test_resamples_are_a_function_of_the_seed() -> None:
    cases = [reliability(*drawn(300, seed)) for seed in range(5)]
    first, again, other = (ece_interval(cases, "abcde", seed=seed, n=50) for seed in (1, 1, 2))
    assert first == again != other
