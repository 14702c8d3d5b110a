"""Augmentation: functions of the generator that change what they say and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from genmed.data import augment as augmentation
from genmed.data.augment import (
    KNOTS,
    STRONG,
    UNFOLDED,
    augment,
    augment_intensity,
    augment_randomised,
    bending,
    bspline,
    coarsen,
    drop_slices,
    random_patch,
    remap,
    smooth_field,
    worsen,
)
from genmed.plan import AUGMENTATIONS

SIZE = (14, 18, 11)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def scan(channels: int = 1, beyond: int = 3) -> tuple[Tensor, Tensor]:
    """A smooth patch with texture, whose last `beyond` planes reach out of the scan."""
    generator = seeded(7)
    image = 3 * smooth_field(torch.randn(channels, KNOTS, KNOTS, KNOTS, generator=generator), SIZE)
    image = image + 0.1 * torch.randn(image.shape, generator=generator)
    inside = torch.ones(1, *SIZE)
    inside[:, SIZE[0] - beyond :] = 0
    return image * inside, inside


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_is_a_function_of_its_generator(kind: str) -> None:
    image, inside = scan(channels=2)
    before = image.clone()
    outputs = [augment(image, inside, kind, seeded(seed)) for seed in range(40)]
    again = [augment(image, inside, kind, seeded(seed)) for seed in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(x.shape == image.shape and torch.isfinite(x).all() for x in outputs)
    assert torch.equal(image, before)
    different = {x.double().sum().item() for x in outputs}
    assert len(different) == (1 if kind == "none" else len(different)) and (kind == "none" or len(different) > 10)


def test_kinds_are_what_they_are_called() -> None:
    image, inside = scan()
    assert torch.equal(augment(image, inside, "none", seeded(0)), image)
    degraded = 0
    for seed in range(60):
        plain = augment_intensity(image, seeded(seed))
        assert torch.equal(augment(image, inside, "nnunet", seeded(seed)), plain)
        degraded += not torch.equal(augment(image, inside, "degraded", seeded(seed)), plain)
    assert 18 <= degraded <= 42  # half of the draws
    usual = 0
    for seed in range(60):
        mixed, generator = augment(image, inside, "mixed", seeded(seed)), seeded(seed)
        torch.rand((), generator=generator)  # says which
        usual += torch.equal(mixed, augment_intensity(image, generator))
    assert 18 <= usual <= 42
    with pytest.raises(ValueError, match="typo"):
        augment(image, inside, "typo", seeded(0))


# Random contrast ------------------------------------------------------------------------------------------


def test_curves_rise_fall_and_turn_back() -> None:
    ramp = torch.linspace(-2, 5, 500).reshape(10, 10, 5)
    seen = torch.ones_like(ramp, dtype=torch.bool)
    slopes = [remap(ramp, seen, seeded(seed)).flatten()[5:-5].diff() for seed in range(200)]
    rising = sum(bool((slope > -1e-6).all()) for slope in slopes)
    falling = sum(bool((slope < 1e-6).all()) for slope in slopes)
    assert rising > 20 and falling > 20 and 200 - rising - falling > 40


def test_randomised_contrast_inverts_sometimes_and_not_always() -> None:
    image, inside = scan()
    seen = inside > 0
    pairs = [torch.stack([image[seen], augment_randomised(image, seeded(s), inside)[seen]]) for s in range(80)]
    correlation = torch.tensor([torch.corrcoef(pair)[0, 1] for pair in pairs])
    assert (correlation < -0.8).sum() >= 8 and (correlation > 0.8).sum() >= 8
    assert (correlation.abs() < 0.6).sum() >= 8


def test_randomised_scan_is_normalised_and_zero_beyond() -> None:
    image, inside = scan(channels=2)
    for seed in range(20):
        changed = augment_randomised(image, seeded(seed), inside)
        assert not changed[:, inside[0] == 0].any()
        values = changed[:, inside[0] > 0]
        torch.testing.assert_close(values.mean(dim=1), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(dim=1, correction=0), torch.ones(2), atol=1e-3, rtol=0)


def test_what_lies_beyond_the_scan_does_not_leak_into_a_randomised_one() -> None:
    image, inside = scan()
    garbage = torch.where(inside > 0, image, 1e4)
    for seed in range(30):
        expected = augment_randomised(image, seeded(seed), inside)
        torch.testing.assert_close(augment_randomised(garbage, seeded(seed), inside), expected)


@given(knots=st.integers(4, 12), low=st.floats(-5, 5), step=st.floats(-3, 3))
def test_evenly_rising_knots_give_a_straight_line(knots: int, low: float, step: float) -> None:
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    weights = bspline(t, knots)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones_like(t))
    values = weights @ (low + step * torch.arange(knots, dtype=torch.float64))
    torch.testing.assert_close(values, low + step * (1 + t * (knots - 3)))


# Lower resolution -----------------------------------------------------------------------------------------


def test_half_of_the_scans_keep_their_resolution_and_all_their_contrast() -> None:
    image, inside = scan()
    seen = inside > 0
    worse = [worsen(image, inside, seeded(seed)) for seed in range(200)]
    assert 75 <= sum(torch.equal(x, image) for x in worse) <= 125
    for x in worse:
        torch.testing.assert_close(x[seen].mean(), image[seen].mean(), atol=1e-4, rtol=0)
        torch.testing.assert_close(x[seen].std(), image[seen].std(), atol=1e-3, rtol=0)


def test_neighbours_become_alike_where_resolution_is_taken_away() -> None:
    noise, inside = torch.randn(1, *SIZE, generator=seeded(0)), torch.ones(1, *SIZE)
    alike = []
    for seed in range(100):
        x = worsen(noise, inside, seeded(seed))
        alike.append([float((x.narrow(a, 1, n - 1) * x.narrow(a, 0, n - 1)).mean()) for a, n in enumerate(SIZE, 1)])
    found = torch.tensor(alike)
    assert found.min() > -0.3  # noise alone: about 0
    assert all((found[:, axis] > 0.6).sum() >= 5 for axis in range(3))  # along each axis,
    assert (found > 0.6).all(dim=1).sum() >= 2  # and in some draws along all


def test_coarse_voxels_are_averages_along_their_axes_only() -> None:
    image = torch.randn(1, 16, 6, 5, generator=seeded(0))
    inside = torch.ones_like(image)
    once = coarsen(image, inside, 4.0, (0,))
    blocks = image.reshape(1, 4, 4, 6, 5).mean(dim=2)
    torch.testing.assert_close(once[:, [1, 2]].mean(dim=1), blocks[:, 0] * 0.9375 + blocks[:, 1] * 0.0625)
    ramp = torch.arange(6.0)[None, None, :, None].expand(1, 16, 6, 5)
    torch.testing.assert_close(coarsen(ramp, inside, 8.0, (0, 2)), ramp)


def test_coarse_voxels_average_nothing_beyond_the_scan() -> None:
    inside = torch.ones(1, 16, 8, 8)
    inside[:, :6] = 0
    coarse = coarsen(5 * inside + 99 * (1 - inside), inside, 8.0, (0, 1, 2))
    torch.testing.assert_close(coarse, torch.full_like(coarse, 5))


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_dropped_slices_are_really_gone(axis: int, nearest: bool) -> None:
    image = torch.randn(2, *SIZE, generator=seeded(0))
    kept = list(range(2, SIZE[axis], 5))
    others = [n for n in range(SIZE[axis]) if n not in kept]
    changed = image.clone()
    changed.index_fill_(1 + axis, torch.tensor(others), 7.0)
    found, expected = (drop_slices(x, axis, 5, 2, nearest) for x in (changed, image))
    assert torch.equal(found, expected)
    assert all(torch.equal(found.select(1 + axis, n), image.select(1 + axis, n)) for n in kept)


def test_dropped_slices_are_interpolated_or_copied() -> None:
    ramp = torch.arange(9.0).reshape(1, 9, 1, 1)
    assert drop_slices(ramp, 0, 4, 1, nearest=False).flatten().tolist() == [1, 1, 2, 3, 4, 5, 5, 5, 5]
    assert set(drop_slices(ramp, 0, 4, 1, nearest=True).flatten().tolist()) == {1.0, 5.0}
    assert drop_slices(ramp, 0, 8, 30, nearest=False).flatten().tolist() == [8.0] * 9  # fewer slices than the start


# Patches --------------------------------------------------------------------------------------------------


def test_deformation_is_smooth_bounded_and_never_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = (24, 40, 16)
    monkeypatch.setattr(augmentation, "uniform", lambda low, high, generator: high)  # the strongest
    for seed in range(30):
        shift = bending(patch, False, seeded(seed))
        for axis, side in enumerate(patch):
            assert shift[..., axis].abs().max() <= UNFOLDED * (side - 1) / 2
        columns = [shift.diff(dim=axis)[:23, :39, :15] + torch.eye(3)[axis] for axis in range(3)]
        assert torch.det(torch.stack(columns, dim=-1)).min() > 0
        assert shift.abs().max() > 0.5
    assert not bending(patch, True, seeded(0))[..., 2].any()


@pytest.mark.parametrize("thick", [False, True])
def test_image_and_label_move_together(thick: bool) -> None:
    label = torch.zeros(40, 44, 36, dtype=torch.uint8)
    label[8:30, 10:32, 6:28] = 3
    label[14:24, 16:26, 12:22] = 5
    image = (label > 0).float()[None]
    moved = 0
    for seed in range(20):
        x, y, inside = random_patch(image, label, (32, 32, 32), seeded(seed), thick, STRONG, STRONG)
        assert x.shape[1:] == y.shape == inside.shape[1:] == (32, 32, 32)
        assert set(y.unique().tolist()) <= {0, 3, 5}
        assert ((x[0] > 0.5) == (y > 0)).float().mean() > 0.97
        moved += bool(((x > 0) & (x < 1)).any())
    assert moved >= 15  # 1 - 0.4³ of the draws change more than the place


def test_without_spatial_changes_a_patch_is_a_piece_of_the_scan() -> None:
    label = torch.arange(12 * 13 * 14).reshape(12, 13, 14)
    image = label.float()[None]
    for seed in range(20):
        x, y, inside = random_patch(image, label, (8, 8, 8), seeded(seed), thick_slices=True, spatial=0)
        first = int(y[0, 0, 0])
        i, j, k = first // (13 * 14), first // 14 % 13, first % 14
        assert torch.equal(y, label[i : i + 8, j : j + 8, k : k + 8])
        assert torch.equal(x[0], y.float()) and inside.all()
