"""What a degradation takes away is gone, what it keeps stays where it was, and its header is honest."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmed.degrade import (
    Degraded,
    bias_field,
    coarser,
    crop,
    curve,
    gamma,
    gaussian_noise,
    inverted,
    keep_slices,
    lying_header,
    missing_block,
    rician_noise,
    slice_profile,
    tent,
    thicker,
)  # fmt: skip
from genmed.errors import GenMedError
from genmed.space import apply_matrices
from genmed.tasks.view import View
from genmed.volume import Volume, read

PLAN = replace(tiny.PLAN, labels=("background", "front"), label_values=(0, 1))

Generator = Callable[[Volume | Degraded], Degraded]
SAME_GRID: dict[str, Generator] = {
    "keep_slices": partial(keep_slices, count=3, axis=1),
    "missing_block": partial(missing_block, share=0.3, axis=0),
    "gaussian_noise": partial(gaussian_noise, sd=0.3),
    "rician_noise": partial(rician_noise, sd=0.3),
    "bias_field": partial(bias_field, strength=0.5),
    "inverted": inverted,
    "gamma": partial(gamma, exponent=2.0),
    "tent": tent,
    "curve": curve,
}
OTHER_GRID: dict[str, Generator] = {
    "coarser": partial(coarser, mm=2),
    "thicker": partial(thicker, mm=2, axis=2),
    "thicker with gaps": partial(thicker, mm=4, axis=1, gap=0.5),
    "crop": partial(crop, share=0.8, shift=(-1.0, 0.3, 1.0)),
    "lying_header": partial(lying_header, factor=1.5, axis=1),
}
ALL = SAME_GRID | OTHER_GRID
RANDOM: dict[str, Callable[..., Degraded]] = {
    "gaussian_noise": partial(gaussian_noise, sd=0.3),
    "rician_noise": partial(rician_noise, sd=0.3),
    "bias_field": partial(bias_field, strength=0.5),
    "curve": curve,
}

shapes = st.tuples(*[st.integers(2, 12)] * 3)
spacings = st.tuples(*[st.floats(0.4, 3)] * 3)
orders = st.sampled_from(list(permutations(range(3))))
signs = st.sampled_from(list(product((-1, 1), repeat=3)))


def scan(shape: tuple[int, int, int] = (8, 12, 10), channels: int = 1) -> Volume:
    data = np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)
    return Volume(data, np.eye(4))


def turned(spacing: tuple[float, ...], order: tuple[int, ...], sign: tuple[int, ...]) -> np.ndarray:
    """An oblique affine (4, 4) with these spacings, axes in any order and direction."""
    angle = 0.3
    tilt = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.eye(3)[list(order)] * np.array(sign) * np.array(spacing)
    affine[:3, 3] = 11, -7, 3
    return affine


def world(volume: Volume) -> np.ndarray:
    """World coordinates (3, x, y, z) of the voxel centres."""
    index = np.indices(volume.grid.shape).reshape(3, -1)
    return (volume.affine[:3, :3] @ index + volume.affine[:3, 3:]).reshape(3, *volume.grid.shape)


def same_corners(a: Volume, b: Volume) -> bool:
    gaps = np.linalg.norm(a.grid.corners_mm()[:, None] - b.grid.corners_mm()[None], axis=-1)
    return bool((gaps.min(axis=0) < 1e-6).all() and (gaps.min(axis=1) < 1e-6).all())


# Resolution


def test_coarser_voxels_are_block_means_over_the_same_field_of_view() -> None:
    fine = scan((8, 12, 4))
    coarse = coarser(fine, 4).scan
    blocks = fine.data[0].reshape(2, 4, 3, 4, 1, 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(coarse.data[0], blocks, atol=1e-6)
    assert coarse.spacing_mm == (4.0, 4.0, 4.0)
    assert coarse.affine[:3, 3].tolist() == [1.5, 1.5, 1.5]


@given(shapes, spacings, orders, signs, st.floats(0, 1), st.integers(0, 2))
def test_averages_conserve_the_mean_and_the_field_of_view(
    shape: tuple[int, int, int],
    spacing: tuple[float, ...],
    order: tuple[int, ...],
    sign: tuple[int, ...],
    share: float,
    axis: int,
) -> None:
    fine = Volume(scan(shape).data + 3, turned(spacing, order, sign))
    extents = [n * s for n, s in zip(shape, fine.spacing_mm, strict=True)]
    room = min(extents) - min(fine.spacing_mm)
    coarse = coarser(fine, min(fine.spacing_mm) + share * room * (1 - 1e-9))
    thick = thicker(fine, fine.spacing_mm[axis] * (1 + share * (shape[axis] - 1) * (1 - 1e-9)), axis)
    for worse in (coarse, thick):
        assert worse.scan.data.mean(dtype=float) == pytest.approx(fine.data.mean(dtype=float), rel=1e-5)
        assert same_corners(worse.scan, fine)
        assert worse.scan.data.size <= fine.data.size
        assert worse.observed is None and worse.slice_thickness_mm is None


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.sampled_from((0.0, 0.3, 0.6)), spacings, orders, signs
)  # fmt: skip
def test_a_slice_lies_where_its_header_says(
    factor: int,
    count: int,
    axis: int,
    gap: float,
    spacing: tuple[float, ...],
    order: tuple[int, ...],
    sign: tuple[int, ...],
) -> None:
    """The average of world coordinates is the world coordinate of the slice, also where it has gaps around it."""
    shape = [2, 3, 2]
    shape[axis] = factor * count
    fine = Volume(np.zeros((1, *shape)), turned(spacing, order, sign))
    fine = replace(fine, data=world(fine).astype(np.float32))
    gap = gap if (1 - gap) * factor >= 1 else 0.0
    worse = thicker(fine, factor * fine.spacing_mm[axis], axis, gap)
    assert worse.scan.grid.shape[axis] == count
    np.testing.assert_allclose(worse.scan.data, world(worse.scan), atol=1e-4)
    assert worse.scan.spacing_mm[axis] == pytest.approx(factor * fine.spacing_mm[axis])
    expected = pytest.approx((1 - gap) * worse.scan.spacing_mm[axis]) if gap else None
    assert worse.slice_thickness_mm == expected


def test_gaps_between_slices_are_not_looked_at() -> None:
    fine = scan((4, 12, 3))
    worse = thicker(fine, 4, axis=1, gap=0.5)
    middles = fine.data[:, :, [1, 2, 5, 6, 9, 10]].reshape(1, 4, 3, 2, 3).mean(axis=3)
    np.testing.assert_allclose(worse.scan.data, middles, atol=1e-6)
    assert worse.slice_thickness_mm == 2.0
    other = fine.data.copy()
    other[:, :, [0, 3, 4, 7, 8, 11]] = 1e6
    assert thicker(fine.like(other), 4, axis=1, gap=0.5).scan.data.tobytes() == worse.scan.data.tobytes()


@pytest.mark.parametrize(("period", "width"), [(p, w) for p in range(2, 10) for w in range(2 - p % 2, p, 2)])
def test_rounding_opens_no_view_into_a_gap(period: int, width: int) -> None:
    fine = scan((2, 2, 4 * period))
    looked_at = np.abs(np.arange(4 * period) % period - (period - 1) / 2) < width / 2
    other = fine.like(np.where(looked_at, fine.data, np.float32(1e30)))
    for gap in (1 - width / period, round(1 - width / period, 12)):
        one, same = (thicker(volume, period, 2, gap).scan.data for volume in (fine, other))
        assert one.tobytes() == same.tobytes()
    np.testing.assert_allclose(one, fine.data[..., looked_at].reshape(1, 2, 2, 4, width).mean(axis=-1), atol=1e-6)


@settings(max_examples=30)
@given(st.integers(12, 24), st.integers(2, 7), st.floats(0, 0.4))
def test_segment_is_told_the_profile_that_made_the_slices(size: int, count: int, gap: float) -> None:
    """What `segment` believes to have averaged the working grid is what did, matrix by matrix and through `View`."""
    fine = scan((4, 3, size))
    worse = thicker(fine, 1.03 * size / count, axis=2, gap=gap)  # "about": the field of view holds whole slices
    assert worse.scan.grid.shape == (4, 3, count)
    profile = slice_profile(size, count, 1 - gap)
    np.testing.assert_allclose(worse.scan.data, fine.data @ profile.T, atol=1e-5)
    view = View.of(PLAN, worse.scan, **worse.options)
    y = apply_matrices(torch.from_numpy(fine.data), view.matrices).numpy()
    np.testing.assert_allclose(view.intensity.restore(view.y[0].numpy()), y, atol=1e-5)


def test_coarser_leaves_axes_that_are_coarse_already() -> None:
    thick = thicker(scan((8, 12, 10)), 5, axis=2)
    both = coarser(thick, 4).scan
    assert both.spacing_mm == (4.0, 4.0, 5.0)
    np.testing.assert_allclose(both.data[0], thick.scan.data[0].reshape(2, 4, 3, 4, 2).mean(axis=(1, 3)), atol=1e-6)


def test_an_average_of_anything_hidden_is_hidden() -> None:
    seen = np.ones((1, 4, 4, 6), np.uint8)
    seen[0, 0, 3, 5] = 0
    fine = scan((4, 4, 6))
    coarse, thick, gaps = (
        worse(Degraded(fine, fine.like(seen)))
        for worse in (partial(coarser, mm=2), partial(thicker, mm=3, axis=2), partial(thicker, mm=3, axis=2, gap=2 / 3))
    )
    assert np.argwhere(~coarse.seen).tolist() == [[0, 1, 2]]
    assert np.argwhere(~thick.seen).tolist() == [[0, 3, 1]]
    assert gaps.seen.all()  # the hidden voxel lies in the gap


# Missing voxels


def test_dropped_slices_are_gone_from_the_data_too() -> None:
    kept = keep_slices(scan(), 3, axis=1)
    seen = kept.seen.any(axis=(0, 2))
    assert seen.nonzero()[0].tolist() == [2, 6, 10]
    assert not kept.scan.data[:, :, ~seen].any()
    assert np.array_equal(kept.scan.data[:, :, seen], scan().data[:, :, seen])


@given(st.integers(3, 12), st.floats(0.01, 0.99), st.integers(0, 2))
def test_missing_block_is_in_the_middle_and_leaves_both_ends(size: int, share: float, axis: int) -> None:
    shape = [2, 2, 2]
    shape[axis] = size
    worse = missing_block(scan((shape[0], shape[1], shape[2])), share, axis)
    seen = worse.seen.any(axis=tuple(a for a in range(3) if a != axis))
    hidden = np.flatnonzero(~seen)
    before, after = hidden[0], size - 1 - hidden[-1]
    assert np.array_equal(hidden, np.arange(hidden[0], hidden[-1] + 1))
    assert before >= 1 and after >= 1 and after - before in (0, 1)
    assert abs(len(hidden) - share * size) <= 0.5 or len(hidden) in (1, size - 2)
    assert not worse.scan.data[:, ~worse.seen].any() and worse.scan.data[:, worse.seen].all()


@given(shapes, spacings, orders, signs, st.floats(0.05, 0.95), st.tuples(*[st.floats(-1, 1)] * 3))
def test_crop_keeps_the_world_coordinates_of_its_voxels(
    shape: tuple[int, int, int],
    spacing: tuple[float, ...],
    order: tuple[int, ...],
    sign: tuple[int, ...],
    share: float,
    shift: tuple[float, float, float],
) -> None:
    whole = Volume(np.zeros((1, *shape)), turned(spacing, order, sign))
    whole = replace(whole, data=world(whole).astype(np.float32))
    box = crop(whole, share, shift).scan
    assert box.grid.shape == tuple(max(1, round(share * n)) for n in shape)
    np.testing.assert_allclose(box.data, world(box), atol=1e-4)
    assert not np.shares_memory(box.data, whole.data)  # nobody can look beyond the box


def test_crop_goes_as_far_as_both_ends_and_carries_the_mask() -> None:
    whole = scan()
    first, last = crop(whole, 0.5, -1).scan, crop(whole, 0.5, 1).scan
    assert np.array_equal(first.data, whole.data[:, :4, :6, :5])
    assert np.array_equal(last.data, whole.data[:, 4:, 6:, 5:])
    kept = keep_slices(whole, 3, axis=1)
    box = crop(kept, 0.5, (0.0, -1.0, 0.0))
    assert np.array_equal(box.seen, kept.seen[2:6, :6, 2:7])
    with pytest.raises(GenMedError, match="no observed voxel"):
        crop(keep_slices(whole, 1, axis=1), 0.25, -1)


# Leaks


@pytest.mark.parametrize("name", ALL)
def test_hidden_voxels_leak_nowhere(name: str) -> None:
    """Whatever they held, also what is no number, the outcome is the same to the last byte."""
    before = missing_block(scan(channels=2), 0.4, axis=2)
    assert before.observed is not None
    expected = ALL[name](before)
    for value in (1e6, -1e6, np.nan):
        other = np.where(before.seen, before.scan.data, np.float32(value))
        found = ALL[name](Degraded(before.scan.like(other), before.observed))
        assert found.scan.data.tobytes() == expected.scan.data.tobytes()
        assert found.observed is not None and expected.observed is not None
        assert found.observed.data.tobytes() == expected.observed.data.tobytes()
    assert not expected.scan.data[:, ~expected.seen].any()


@pytest.mark.parametrize("name", SAME_GRID)
def test_what_is_hidden_stays_hidden(name: str) -> None:
    before = missing_block(scan(), 0.4, axis=2)
    after = SAME_GRID[name](before)
    assert not (after.seen & ~before.seen).any() and after.seen.any()
    assert (~after.seen).sum() >= (~before.seen).sum() > 0


@pytest.mark.parametrize("name", SAME_GRID)
def test_zeros_of_hidden_voxels_are_no_intensities(name: str) -> None:
    """Adding a constant to the scan adds it to the outcome: the zeros that stand for hidden voxels do not count."""
    mask = missing_block(scan(), 0.4, axis=2).observed
    low, high = (SAME_GRID[name](Degraded(Volume(scan().data + add, np.eye(4)), mask)) for add in (0, 64))
    np.testing.assert_allclose(high.scan.data[:, high.seen] - 64, low.scan.data[:, low.seen], atol=1e-3)


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_degradations_compose(first: str, second: str) -> None:
    if first == "thicker with gaps" and second in ("coarser", "thicker", "thicker with gaps"):
        with pytest.raises(GenMedError, match="slices with gaps"):
            ALL[second](ALL[first](scan()))
    elif first == "keep_slices" and second in ("coarser", "thicker with gaps"):
        with pytest.raises(GenMedError, match="no observed voxel"):
            ALL[second](ALL[first](scan()))
    else:
        worse = ALL[second](ALL[first](scan()))
        assert worse.seen.shape == worse.scan.grid.shape
        assert np.isfinite(worse.scan.data).all() and np.ptp(worse.scan.data[:, worse.seen]) > 0
        assert (worse.slice_thickness_mm is None) == ("thicker with gaps" not in (first, second))


@pytest.mark.parametrize("name", ALL)
def test_the_scan_that_was_given_is_left_alone(name: str) -> None:
    given_scan = scan()
    ALL[name](given_scan)
    assert given_scan.data.tobytes() == scan().data.tobytes() and np.array_equal(given_scan.affine, np.eye(4))


# Noise and bias


@pytest.mark.parametrize("name", RANDOM)
def test_same_seed_same_bytes_and_other_seed_other_bytes(name: str) -> None:
    one, again, other = (RANDOM[name](scan(), seed=seed).scan.data.tobytes() for seed in (3, 3, 4))
    assert one == again != other


def test_noise_of_one_seed_differs_between_kinds() -> None:
    flat = Volume(np.repeat([0.0, 1000.0], 500).reshape(1, 10, 10, 10), np.eye(4))
    normal = gaussian_noise(flat, 0.01).scan.data - flat.data
    bright = rician_noise(flat, 0.01).scan.data - flat.data
    assert abs(np.corrcoef(normal.ravel()[500:], bright.ravel()[500:])[0, 1]) < 0.2


@settings(max_examples=5)
@given(st.floats(0.05, 2), st.floats(0.1, 100), st.floats(-50, 50))
def test_gaussian_noise_has_the_given_share_of_the_standard_deviation(sd: float, scale: float, offset: float) -> None:
    clean = Volume(scan((40, 40, 40)).data * scale + offset, np.eye(4))
    noise = gaussian_noise(clean, sd).scan.data - clean.data
    assert noise.std() == pytest.approx(sd * clean.data.std(), rel=0.01)
    assert abs(noise.mean()) < 0.02 * sd * clean.data.std()


@settings(max_examples=5)
@given(st.floats(0.05, 2), st.floats(-50, 50))
def test_rician_noise_without_signal_has_the_mean_of_rayleigh(sd: float, floor: float) -> None:
    data = np.full((1, 60, 60, 40), floor, np.float32)
    data[:, :, :, 20:] += 100  # half of the voxels: the standard deviation is 50
    noisy = rician_noise(Volume(data, np.eye(4)), sd).scan.data
    dark = noisy[..., :20] - floor
    assert dark.mean() == pytest.approx(50 * sd * np.sqrt(np.pi / 2), rel=0.01)
    assert dark.std() == pytest.approx(50 * sd * np.sqrt(2 - np.pi / 2), rel=0.01)
    assert dark.min() >= -1e-3


def test_rician_noise_is_nearly_normal_where_signal_is_strong() -> None:
    data = np.zeros((1, 40, 40, 40), np.float32)
    data[..., 20:] = 100
    bright = rician_noise(Volume(data, np.eye(4)), 0.2).scan.data[..., 20:]
    assert bright.mean() == pytest.approx(100 + 10**2 / (2 * 100), abs=0.2)  # second moment: A² + 2 sd²
    assert bright.std() == pytest.approx(10, rel=0.02)


@given(st.tuples(*[st.integers(1, 12)] * 3).filter(lambda s: np.prod(s) > 2), st.floats(0.05, 1.5), st.integers(0, 99))
def test_bias_field_is_smooth_positive_and_as_strong_as_said(
    shape: tuple[int, int, int], strength: float, seed: int
) -> None:
    data = np.ones((2, *shape), np.float32)
    data[0, 0, 0, 0] = 0  # no signal; all else is 1, so that the outcome is the field
    data[1].flat[-1] = 0
    found = bias_field(Volume(data, np.eye(4)), strength, seed).scan.data
    assert found[0, 0, 0, 0] == 0 and found[1].flat[-1] == 0
    log = np.log(np.where(data > 0, found, found[::-1]))
    assert log[0].tobytes() == log[1].tobytes()  # one field for both channels
    assert log.max() == pytest.approx(strength, rel=1e-4) and log.min() == pytest.approx(-strength, rel=1e-4)
    for one, other in product((1, 2, 3), repeat=2):  # a polynomial of total degree 3: its fourth differences vanish
        assert np.abs(np.diff(np.diff(log, 2, axis=one), 2, axis=other)).max(initial=0) < 1e-4


# Appearance


def test_inverting_twice_changes_nothing() -> None:
    image = scan(channels=2)
    np.testing.assert_allclose(inverted(inverted(image)).scan.data, image.data, atol=1e-6)
    for after, before in zip(inverted(image).scan.data, image.data, strict=True):
        assert np.corrcoef(after.ravel(), before.ravel())[0, 1] == pytest.approx(-1)
        assert (after.min(), after.max()) == (before.min(), before.max())
    whole = Volume(np.random.default_rng(0).integers(-900, 3000, (1, 5, 6, 7)).astype(np.int16), np.eye(4))
    assert np.array_equal(inverted(inverted(whole)).scan.data, whole.data)
    kept = keep_slices(image, 3, axis=1)
    np.testing.assert_allclose(inverted(inverted(kept)).scan.data, kept.scan.data, atol=1e-6)


def ramp() -> Volume:
    """0 to 1000 in whole steps, long enough that percentiles are exact values of it."""
    return Volume(np.arange(1001, dtype=np.float32).reshape(1, 7, 11, 13), np.eye(4))


def shares() -> np.ndarray:
    return np.clip((np.arange(1001) - 5) / 990, 0, 1)


def test_gamma_and_tent_are_the_functions_they_are_named_after() -> None:
    for exponent in (0.5, 1.0, 2.5):
        found = gamma(ramp(), exponent).scan.data.ravel()
        np.testing.assert_allclose(found, 5 + 990 * shares() ** exponent, atol=1e-3)
    folded = tent(ramp()).scan.data.ravel()
    np.testing.assert_allclose(folded, 5 + 990 * np.minimum(2 * shares(), 2 - 2 * shares()), atol=1e-3)
    assert folded.argmax() == 500 and folded[0] == folded[-1] == folded.min()


def test_curves_are_smooth_span_the_range_and_are_mostly_not_monotone() -> None:
    falling = 0
    for seed in range(20):
        heights = curve(ramp(), seed).scan.data.ravel()
        assert heights.min() == pytest.approx(5, abs=0.1) and heights.max() == pytest.approx(995, abs=0.1)
        assert np.abs(np.diff(heights)).max() < 30  # a lookup at random would jump by hundreds
        steps = np.sign(np.diff(heights[5:-5]))
        falling += bool((steps > 0).any() and (steps < 0).any())
    assert falling >= 12


def test_a_curve_is_a_lookup_of_its_own_for_every_channel() -> None:
    both = np.concatenate([ramp().data, ramp().data[:, ::-1, ::-1, ::-1]])
    one, other = curve(Volume(both, np.eye(4))).scan.data
    assert not np.allclose(one, other[::-1, ::-1, ::-1])
    shuffled = np.random.default_rng(0).permutation(1001)
    mixed = curve(Volume(ramp().data.ravel()[shuffled].reshape(1, 7, 11, 13), np.eye(4))).scan.data
    assert np.array_equal(mixed.ravel(), one.ravel()[shuffled])  # equal intensities stay equal, wherever they lie


def test_one_outlier_does_not_move_the_middle_of_the_range() -> None:
    data = ramp().data.copy()
    data.flat[-1] = 1e6
    np.testing.assert_allclose(tent(ramp().like(data)).scan.data, tent(ramp()).scan.data, atol=1e-3)


# Headers


@pytest.mark.parametrize(("axis", "factors"), [(None, (2.5, 2.5, 2.5)), (1, (1.0, 2.5, 1.0))])
def test_lying_header_changes_the_claimed_spacing_alone(axis: int | None, factors: tuple[float, ...]) -> None:
    true = Volume(scan().data, turned((1.0, 2.0, 0.5), (2, 0, 1), (1, -1, 1)))
    lie = lying_header(true, 2.5, axis).scan
    assert lie.data.tobytes() == true.data.tobytes()
    np.testing.assert_allclose(np.array(lie.spacing_mm) / true.spacing_mm, factors)
    np.testing.assert_allclose(lie.affine[:3, :3] / lie.spacing_mm, true.affine[:3, :3] / true.spacing_mm)
    np.testing.assert_allclose(lie.grid.corners_mm().mean(axis=0), true.grid.corners_mm().mean(axis=0))
    np.testing.assert_allclose(lying_header(lie, 1 / 2.5, axis).scan.affine, true.affine, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_degraded_scans_survive_a_file_with_their_source_header(name: str, tmp_path: Path) -> None:
    Volume(scan().data, turned((1.0, 1.0, 1.0), (0, 1, 2), (1, 1, 1))).save(tmp_path / "fine.nii.gz")
    worse = ALL[name](read(tmp_path / "fine.nii.gz")).scan
    worse.save(tmp_path / "worse.nii.gz")
    again = read(tmp_path / "worse.nii.gz")
    assert np.array_equal(again.data, worse.data)
    np.testing.assert_allclose(again.affine, worse.affine, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        (partial(coarser, mm=11), "larger than the scan"),
        (partial(coarser, mm=0.3), "finer than the scan's; choose at least 1 mm"),
        (partial(coarser, mm=float("nan")), "positive"),
        (partial(thicker, mm=13, axis=1), "thicker than the scan, 12 mm"),
        (partial(thicker, mm=0.5, axis=1), "thinner than the scan's; choose at least 1 mm"),
        (partial(thicker, mm=4, axis=3), "axis 3 does not exist"),
        (partial(thicker, mm=4, axis=1, gap=1.0), "gap 1 is no share"),
        (partial(thicker, mm=4, axis=1, gap=-0.1), "gap -0.1 is no share"),
        (partial(thicker, mm=4, axis=1, gap=0.9), "leaves 0.4 mm of a slice.*at most 0.75"),
        (partial(keep_slices, count=20, axis=1), "cannot keep 20 of 12"),
        (partial(keep_slices, count=0, axis=1), "cannot keep 0 of 12"),
        (partial(keep_slices, count=2, axis=-1), "axis -1 does not exist"),
        (partial(missing_block, share=1.0, axis=0), "missing block of 1 is no share"),
        (partial(missing_block, share=0.0, axis=0), "missing block of 0 is no share"),
        (partial(crop, share=1.2), "field of view of 1.2 is no share"),
        (partial(crop, share=0.5, shift=1.5), "choose -1 to 1"),
        (partial(gaussian_noise, sd=-1), "choose a positive number"),
        (partial(gaussian_noise, sd=1, seed=-1), "seed -1 is negative"),
        (partial(rician_noise, sd=float("inf")), "choose a positive number"),
        (partial(bias_field, strength=0), "choose a positive number"),
        (partial(gamma, exponent=0), "choose a positive number"),
        (partial(lying_header, factor=0), "choose a positive number"),
        (partial(lying_header, factor=2, axis=5), "axis 5 does not exist"),
    ],
)
def test_impossible_degradations_are_refused_in_one_line(worse: Generator, message: str) -> None:
    with pytest.raises(GenMedError, match=message) as caught:
        worse(scan())
    assert "\n" not in str(caught.value)


def test_a_scan_without_contrast_or_without_middle_is_refused() -> None:
    flat = Volume(np.ones((1, 4, 4, 4)), np.eye(4))
    for worse in (partial(gaussian_noise, sd=0.1), partial(bias_field, strength=0.1), inverted, tent):
        with pytest.raises(GenMedError, match="channel 0 is 1 wherever it was observed"):
            worse(flat)
    with pytest.raises(GenMedError, match="no middle"):
        missing_block(scan((2, 5, 5)), 0.5, axis=0)
    dot = flat.data.copy()
    dot[0, 0, 0, 0] = 2
    with pytest.raises(GenMedError, match="no intensity range"):
        tent(Volume(np.concatenate([dot] + [flat.data] * 9, axis=3), np.eye(4)))


def test_a_mask_must_lie_on_the_grid_of_the_scan() -> None:
    with pytest.raises(GenMedError, match="voxels, but"):
        Degraded(scan(), scan((4, 4, 4)))
