"""How far probabilities, intervals and warnings may be believed, and how tuning cases mend the first two."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from genmed.errors import GenMedError

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
TOLERANCE = 1e-3  # by how much probabilities may miss 0, 1 and a sum of 1


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often claims made with some confidence were right; claims are binned by their confidence.

    `edges` are the bins + 1 limits of the bins, each of which holds its upper limit. `confidence` and `accuracy`
    are means over a bin's `count` claims, NaN where there are none. `a + b` is what all claims of both give.
    """

    edges: Float[np.ndarray, " bins_plus_1"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    count: Int[np.ndarray, " bins"]

    def __add__(self, other: "Reliability") -> "Reliability":
        if not np.array_equal(self.edges, other.edges):
            raise GenMedError(f"{len(self.count)} and {len(other.count)} bins cannot be added; use one number of bins.")
        sums = sum(r.count * np.nan_to_num([r.confidence, r.accuracy]) for r in (self, other))
        return _means(self.edges, sums[0], sums[1], self.count + other.count)


class Coverage(NamedTuple):
    """Share of intervals that hold the truth, and the Wilson 95 % interval of that share."""

    share: float
    low: float
    high: float


# Probabilities --------------------------------------------------------------------------------------------


def reliability(
    probabilities: Float[np.ndarray, " k *grid"],
    truth: Int[np.ndarray, "*grid"],
    bins: int = 15,
    *,
    label: int | None = None,
    where: Bool[np.ndarray, "*grid"] | None = None,
) -> Reliability:
    """Bin the claims that class probabilities make about every voxel, beside how often they are right.

    Args:
        probabilities: of the k classes; they add up to 1.
        truth: class index of every voxel.
        bins: of equal width, 0 to 1.
        label: judge "this voxel is `label`"; without it, "this voxel is its most probable class" (Guo et al.
            2017, arXiv 1706.04599).
        where: voxels that count; most voxels are plain background, and would hide all others.

    Raises `GenMedError` for shapes that differ, and for what are no probabilities.
    """
    probabilities, truth = np.asarray(probabilities), np.asarray(truth)
    _check_probabilities(probabilities, truth, bins, label, where)
    if label is None:
        confidence, right = probabilities.max(axis=0), probabilities.argmax(axis=0) == truth
    else:
        confidence, right = probabilities[label], truth == label
    chosen = np.ones(truth.shape, dtype=bool) if where is None else np.asarray(where, dtype=bool)
    edges, claims = np.linspace(0, 1, bins + 1), confidence[chosen].astype(np.float64).clip(0, 1)
    place = np.digitize(claims, edges[1:-1], right=True)
    count, sums, hits = (np.bincount(place, w, bins) for w in (None, claims, right[chosen]))
    return _means(edges, sums, hits, count)


def ece(found: Reliability) -> float:
    """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their counts; 0 to 1.

    Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning". NaN without any claim.
    """
    gaps, total = found.count * np.nan_to_num(found.accuracy - found.confidence), found.count.sum()
    return float(np.abs(gaps).sum() / total) if total else math.nan


def ece_interval(
    cases: Sequence[Reliability], groups: Sequence[Hashable], seed: int = 0, n: int = 10_000
) -> tuple[float, float]:
    """95 % percentile interval of `ece` over all cases, from `n` resamples of whole groups (such as persons).

    The error of few cases is too large on average, since chance alone opens gaps; so are its resamples. Resamples
    without any claim are left out.
    """
    if len(groups) != len(cases) or not any(case.count.any() for case in cases):
        raise GenMedError(f"{len(groups)} groups for {len(cases)} cases; give one each, and at least one claim.")
    gaps = np.stack([case.count * np.nan_to_num(case.accuracy - case.confidence) for case in cases])
    counts = np.stack([case.count for case in cases])
    (members,), drawn = _resamples((groups,), seed, n)
    errors, totals = np.abs(drawn @ members @ gaps).sum(axis=1), (drawn @ members @ counts).sum(axis=1)
    low, high = np.percentile(errors[totals > 0] / totals[totals > 0], (2.5, 97.5))
    return float(low), float(high)


def near_boundary(
    classes: Int[np.ndarray, "*grid"], spacing_mm: Sequence[float], distance_mm: float
) -> Bool[np.ndarray, "*grid"]:
    """Voxels that have one of another class within `distance_mm`, from centre to centre.

    Empty for a map of one class. A distance below the smallest spacing holds no voxel, and is refused.
    """
    from scipy.ndimage import distance_transform_edt

    if not min(spacing_mm) <= distance_mm < math.inf:
        raise GenMedError(f"{distance_mm:g} mm from a boundary is below the spacing, {min(spacing_mm):g} mm; raise it.")
    near = np.zeros(classes.shape, dtype=bool)
    present = np.unique(classes)
    for value in present if len(present) > 1 else ():
        mask = classes == value
        near |= mask & (distance_transform_edt(mask, sampling=spacing_mm) <= distance_mm + 1e-6)
    return near


def _check_probabilities(
    probabilities: np.ndarray, truth: np.ndarray, bins: int, label: int | None, where: np.ndarray | None
) -> None:
    if probabilities.shape[1:] != truth.shape or (where is not None and where.shape != truth.shape):
        shapes = (probabilities.shape, truth.shape, *(() if where is None else (where.shape,)))
        raise GenMedError(f"shapes {', '.join(map(str, shapes))} do not agree; give (k, x, y, z) and (x, y, z).")
    if bins < 1 or (label is not None and not 0 <= label < len(probabilities)):
        raise GenMedError(f"{bins} bins, label {label} of {len(probabilities)} classes; give a bin and a known class.")
    sums = probabilities.sum(axis=0, dtype=np.float64)
    if not (probabilities.min(initial=0) >= -TOLERANCE and np.abs(sums - 1).max(initial=0) <= TOLERANCE):
        raise GenMedError("the class probabilities are negative or do not add up to 1; give softmaxed ones.")


def _means(edges: np.ndarray, confidences: np.ndarray, hits: np.ndarray, count: np.ndarray) -> Reliability:
    """From sums over bins to means, NaN in empty bins."""
    weight = np.where(count > 0, count, np.nan)
    return Reliability(edges, confidences / weight, hits / weight, count)


def tempered(soft: Float[np.ndarray, " k *grid"], temperature: float) -> Float[np.ndarray, " k *grid"]:
    """Class probabilities to the power of 1 / temperature, made to add up to 1 again (Guo et al., arXiv 1706.04599).

    Above 1 they are less sure. The most probable class stays, and voxels without any class stay without.
    """
    if temperature == 1:
        return soft
    powers = soft ** (1 / temperature)
    return np.asarray(powers / np.maximum(powers.sum(axis=0), np.finfo(powers.dtype).tiny))


# Intervals ------------------------------------------------------------------------------------------------


def coverage(intervals: Sequence[tuple[float, float]], truths: Sequence[float]) -> Coverage:
    """How often (low, high) holds the truth, limits included, with the interval of Wilson 1927.

    Wilson's interval takes the cases as independent: with several of one person it is too narrow.
    """
    limits, true = _intervals(intervals, truths)
    n = len(true)
    share = float(np.mean((limits[:, 0] <= true) & (true <= limits[:, 1])))
    centre, shrink = share + Z95**2 / (2 * n), 1 + Z95**2 / n
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Coverage(share, max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink))


def volume_error(found: Float[np.ndarray, "cases k"], true: Float[np.ndarray, "cases k"]) -> tuple[float, ...]:
    """Standard error of the logarithm of every structure's volume, in voxels and with one added; 0 where none has it.

    The root mean square over the cases that have the structure or were given it, larger by as much as the 97.5 %
    quantile of Student's t with so many degrees of freedom exceeds the normal one: few cases may agree by chance.
    """
    from scipy.stats import t

    here = (found > 0) | (true > 0)
    squares = np.where(here, np.log((found + 1) / (true + 1)) ** 2, 0).sum(axis=0)
    counts = here.sum(axis=0)
    return tuple(
        round(float(np.sqrt(square / n) * t.ppf(0.975, n) / Z95), 4) if n else 0.0
        for square, n in zip(squares, counts, strict=True)
    )


def volume_interval(voxels: Float[np.ndarray, " samples"], error: float) -> tuple[float, float]:
    """95 % interval of a volume: samples differ in what a scan leaves open, all of them err by `volume_error`.

    Both count as independent errors of the logarithm of the volume, in voxels and with one added, so that nothing may
    have been found.
    """
    logarithms = np.log(voxels + 1)
    variance = error**2 + (logarithms.var(ddof=1) if len(voxels) > 1 else 0.0)
    low, high = logarithms.mean() + Z95 * math.sqrt(variance) * np.array([-1, 1])
    return max(0.0, math.exp(low) - 1), max(0.0, math.exp(high) - 1)


def interval_score(
    intervals: Sequence[tuple[float, float]], truths: Sequence[float], level: float = 0.95
) -> Float[np.ndarray, " n"]:
    """Width of each central interval plus 2 / (1 - level) times what it misses the truth by; less is better.

    Honest intervals minimise it on average: neither width nor coverage alone does (Gneiting & Raftery 2007,
    "Strictly proper scoring rules, prediction, and estimation", equation 43). In the unit of the truth.
    """
    if not 0 < level < 1:
        raise GenMedError(f"level must lie between 0 and 1, not {level:g}.")
    limits, true = _intervals(intervals, truths)
    low, high = limits.T
    missed = np.maximum(low - true, 0) + np.maximum(true - high, 0)
    return np.asarray(high - low + 2 / (1 - level) * missed)


def _intervals(
    intervals: Sequence[tuple[float, float]], truths: Sequence[float]
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    limits, true = np.asarray(intervals, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    if limits.shape != (len(true), 2) or not len(true):
        raise GenMedError(f"{len(limits)} intervals for {len(true)} truths; give one (low, high) each, at least one.")
    if not (np.isfinite(true).all() and (limits[:, 0] <= limits[:, 1]).all()):
        raise GenMedError("an interval ends before it starts, or a number is NaN; check the intervals.")
    return limits, true


# Warnings -------------------------------------------------------------------------------------------------


def roc_auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive value exceeds a negative one, ties counted half: area under the ROC curve.

    Exact: the rank of every positive value among the negative ones (Mann & Whitney 1947), in n log n. Raises
    `GenMedError` for empty lists and NaN.
    """
    _check_values(positive, negative)
    ordered = np.sort(np.asarray(negative, dtype=np.float64))
    below, not_above = (np.searchsorted(ordered, positive, side=side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(ordered)))


def roc_auc_interval(
    positive: Sequence[float],
    negative: Sequence[float],
    positive_groups: Sequence[Hashable],
    negative_groups: Sequence[Hashable],
    seed: int = 0,
    n: int = 10_000,
) -> tuple[float, float]:
    """95 % percentile interval of `roc_auc`, from `n` resamples of whole groups, such as persons.

    A group named on both sides is drawn on both at once, because it is one person. Resamples without any
    positive or negative value are left out.
    """
    _check_values(positive, negative)
    if len(positive_groups) != len(positive) or len(negative_groups) != len(negative):
        raise GenMedError("every value needs its group; give lists of equal length.")
    left, right = np.asarray(positive, dtype=np.float64)[:, None], np.asarray(negative, dtype=np.float64)
    wins = (left > right) + 0.5 * (left == right)
    (a, b), drawn = _resamples((positive_groups, negative_groups), seed, n)
    pairs = (drawn @ a.sum(axis=1)) * (drawn @ b.sum(axis=1))
    won = ((drawn @ (a @ wins @ b.T)) * drawn).sum(axis=1)
    low, high = np.percentile(won[pairs > 0] / pairs[pairs > 0], (2.5, 97.5))
    return float(low), float(high)


def _check_values(*lists: Sequence[float]) -> None:
    if any(len(values) == 0 or np.isnan(values).any() for values in lists):
        raise GenMedError("a list of values is empty or holds NaN; give at least one number on each side.")


def _resamples(
    lists: Sequence[Sequence[Hashable]], seed: int, n: int
) -> tuple[list[Float[np.ndarray, "groups items"]], Float[np.ndarray, "n groups"]]:
    """Which items of every list belong to each group (1 or 0), and how often each resample draws each group."""
    number = {group: k for k, group in enumerate(dict.fromkeys(group for groups in lists for group in groups))}
    members = [np.eye(len(number))[:, [number[group] for group in groups]] for groups in lists]
    drawn = np.random.default_rng(seed).multinomial(len(number), np.full(len(number), 1 / len(number)), size=n)
    return members, drawn.astype(np.float64)
