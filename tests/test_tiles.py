"""Patches cover everything, leave no seam, and cost the memory of one patch."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genmed.fields import Field, Fields
from genmed.guide import guided
from genmed.observe import Identity, Observation
from genmed.tiles import tile_starts, tiled, tiled_logits


def pointwise(z: Tensor, sigma: float) -> Tensor:
    return z.tanh() / (1 + sigma**2)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.floats(0, 0.9))
def test_patches_cover_every_voxel_and_overlap_at_least_as_asked(size: int, patch: int, overlap: float) -> None:
    starts = tile_starts(size, patch, overlap)
    patch = min(patch, size)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    stride = max(1, int(patch * (1 - overlap)))
    assert all(0 < following - start <= stride for start, following in pairwise(starts))


def test_overlap_of_one_or_more_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        tile_starts(10, 4, 1.0)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(1, 13)] * 3), st.tuples(*[st.integers(1, 8)] * 3), st.sampled_from([0, 0.5, 0.8]))
def test_pointwise_denoiser_gives_what_it_gives_for_the_whole(
    shape: tuple[int, ...], patch: tuple[int, ...], overlap: float
) -> None:
    z = random(2, 3, *shape)
    torch.testing.assert_close(tiled(pointwise, patch, overlap)(z, 0.7), pointwise(z, 0.7), rtol=0, atol=1e-12)


def test_patches_that_disagree_are_blended_without_a_seam() -> None:
    offsets = iter(torch.linspace(0, 1, 7).tolist())
    z = torch.zeros(1, 1, 32, 1, 1)
    starts = tile_starts(32, 8, 0.5)
    assert len(starts) == 7
    fused = tiled(lambda part, sigma: part + next(offsets), (8, 1, 1))(z, 1.0)[0, 0, :, 0, 0]
    assert fused.diff().abs().max() < 0.1
    assert fused[0] == 0
    assert fused[-1] == pytest.approx(1)


def test_scan_smaller_than_a_patch_is_evaluated_once_and_whole() -> None:
    seen: list[torch.Size] = []

    def denoise(z: Tensor, sigma: float) -> Tensor:
        seen.append(z.shape)
        return z

    z = random(1, 2, 5, 6, 7)
    torch.testing.assert_close(tiled(denoise, (8, 8, 8))(z, 1.0), z)
    assert seen == [z.shape]


def test_the_network_sees_one_patch_at_a_time_and_its_channels_may_differ() -> None:
    sizes: set[tuple[int, ...]] = set()

    def network(part: Tensor) -> Tensor:
        sizes.add(tuple(part.shape))
        return torch.cat([part, -part, part], dim=1)

    x = random(1, 1, 20, 9, 8)
    torch.testing.assert_close(tiled_logits(network, x, 3, (8, 4, 8)), network(x))
    assert sizes == {(1, 1, 8, 4, 8), tuple(x.shape)}


def test_gradient_through_patches_is_that_of_the_whole_and_keeps_no_activations() -> None:
    z = random(1, 1, 12, 6, 5).requires_grad_()
    weights = random(1, 1, 12, 6, 5)
    evaluations = 0

    def denoise(part: Tensor, sigma: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return pointwise(part, sigma)

    estimate = tiled(denoise, (6, 6, 5))(z, 0.7)
    first = evaluations
    (ours,) = torch.autograd.grad((estimate * weights).sum(), z)
    (whole,) = torch.autograd.grad((pointwise(z, 0.7) * weights).sum(), z)
    torch.testing.assert_close(ours, whole)
    assert evaluations == 2 * first


def test_guidance_works_through_patches() -> None:
    fields = Fields(Field("image", "continuous", ("image",)))
    observation = Observation("image", random(1, 1, 12, 6, 5), Identity(), 0.1)
    z = random(1, 1, 12, 6, 5) * 2
    whole = guided(pointwise, fields, [observation])(z, 1.0)
    patches = guided(tiled(pointwise, (6, 4, 5)), fields, [observation])(z, 1.0)
    torch.testing.assert_close(patches, whole)
