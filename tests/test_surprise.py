import math

import pytest
import torch
from torch import Tensor

from genmed.fields import image_and_label
from genmed.surprise import SIGMA, features, surprise, typical

FIELDS = image_and_label(("T1",), ("background", "front"))
SIZE = (4, 5, 6)


def test_errors_of_a_denoiser_that_knows_nothing_but_the_average() -> None:
    """Zero image and even chances: the errors are ln of the mean square and of the entropy."""
    image = torch.full((1, 1, *SIZE), 2.0)
    soft = torch.rand(1, 2, *SIZE)
    found = features(lambda z, sigma: torch.zeros_like(z), FIELDS, image, soft)
    voxels = int((soft[:, 1] > soft[:, 0]).sum())
    label = math.log(image.numel() * math.log(2.0)) - 2 / 3 * math.log(voxels + 1)
    expected = [math.log(4.0), label, math.log(voxels + 1), *[2.0] * 9]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_neither_size_nor_field_of_view_makes_a_label_surprising() -> None:
    """Of a denoiser that is unsure along the border alone."""

    def denoise(z: Tensor, sigma: float) -> Tensor:
        inside = clean[:, 1:].clamp(min=0)
        near = torch.nn.functional.avg_pool3d(inside[:, 1:], 3, stride=1, padding=1)
        return torch.cat([clean[:, :1], 1 - 2 * near, 2 * near - 1], dim=1)

    errors = []
    for side, edge in ((24, 48), (12, 48), (12, 20)):
        inside = torch.zeros(1, 1, edge, edge, edge)
        inside[..., 4 : 4 + side, 4 : 4 + side, 4 : 4 + side] = 1
        soft = torch.cat([1 - inside, inside], dim=1)
        clean = torch.cat([inside, 2 * soft - 1], dim=1)
        errors.append(float(features(denoise, FIELDS, inside, soft, draws=1)[0, 1]))
    assert errors[1] == pytest.approx(errors[2], abs=1e-5)
    assert errors[0] == pytest.approx(errors[1], abs=0.05)


def test_surroundings_are_shown_to_the_denoiser_but_not_judged() -> None:
    asked: list[torch.Size] = []

    def denoise(z: Tensor, sigma: float) -> Tensor:
        asked.append(z.shape[2:])
        return torch.zeros_like(z)

    def inside(values: Tensor) -> Tensor:
        return values[:, :, 1:-1, 2:, :-3]

    image, soft = torch.rand(2, 1, *SIZE), torch.rand(2, 2, *SIZE)
    found = features(denoise, FIELDS, image, soft, draws=2, inside=inside)
    alone = features(denoise, FIELDS, inside(image), inside(soft), draws=2)
    assert torch.allclose(found, alone, atol=1e-6)
    assert asked == [SIZE] * 2 + [inside(image).shape[2:]] * 2


def test_a_denoiser_is_shown_the_pair_in_noise_of_the_known_level() -> None:
    seen: list[Tensor] = []

    def denoise(z: Tensor, sigma: float) -> Tensor:
        assert sigma == SIGMA
        seen.append(z)
        return torch.zeros_like(z)

    image, soft = torch.randn(1, 1, 12, 12, 12), torch.rand(1, 2, 12, 12, 12)
    features(denoise, FIELDS, image, soft, draws=3)
    clean = torch.cat([image, 2 * torch.eye(2)[soft.argmax(1)].movedim(-1, 1) - 1], dim=1)
    drawn = torch.stack(seen) - clean
    assert len(seen) == 3 and float(drawn.std()) == pytest.approx(SIGMA, rel=0.05)
    assert not torch.equal(seen[0], seen[1])


def test_a_pair_does_not_depend_on_the_rest_of_its_batch() -> None:
    def denoise(z: Tensor, sigma: float) -> Tensor:
        return (z / (1 + sigma**2)).clamp(-0.9, 0.9)

    image, soft = torch.randn(3, 1, *SIZE), torch.rand(3, 2, *SIZE)
    together = features(denoise, FIELDS, image, soft)
    alone = torch.cat([features(denoise, FIELDS, image[i : i + 1], soft[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_quantiles_of_every_channel_stand_for_the_histogram() -> None:
    two = image_and_label(("T1", "T2"), ("background", "front"))
    even = torch.linspace(0, 1, 1001).reshape(1, 1, 7, 11, 13)
    image = torch.cat([even, 10 * even.flip(4)], dim=1)
    found = features(lambda z, sigma: torch.zeros_like(z), two, image, torch.rand(1, 2, 7, 11, 13))
    share = torch.linspace(0.05, 0.95, 9)
    assert torch.allclose(found[0, 3:], torch.cat([share, 10 * share]), atol=1e-4)


def test_a_changed_histogram_surprises_by_its_mean_deviation() -> None:
    clean = typical([torch.tensor([[0.0, 0, 0, value, 2 * value, 0]]) for value in (-1.0, 0.0, 1.0)])
    worse = torch.tensor([[0.0, 0, 0, 3.0, 0, 0], [0.0, 0, 0, 2.0, -4.0, 2 * 0.03]])
    assert surprise(worse, clean, 1).contrast.tolist() == pytest.approx([4 / 3 * 3**0.5, 4 / 3 * 2], abs=1e-3)


def test_surprise_is_the_worst_of_the_features_in_standard_deviations() -> None:
    clean = typical([torch.tensor([[0.0, 10.0, 5.0, 1.0]]), torch.tensor([[2.0, 14.0, 7.0, 1.0]])])
    root = math.sqrt(2)
    assert clean == pytest.approx((1.0, 12.0, 6.0, 1.0, root, 2 * root, root, 0.03), abs=1e-4)
    rows = [[1, 12, 6], [1 + 3 * root, 12, 6], [-9, 12 + 2 * root, 6], [-9, 0, 6 - 4 * root], [1, 12, 6 + 5 * root]]
    rows = [[*row, 1] for row in rows]
    found = surprise(torch.tensor(rows), clean, 1)
    assert found.most.tolist() == pytest.approx([0, 3, 1, 4, 5], abs=1e-3)
    assert found.layout.tolist() == pytest.approx([0, 3, 1, 4, 5], abs=1e-3)


def test_the_layout_is_judged_by_all_that_is_off_in_it_whatever_the_contrast() -> None:
    clean = (0.0,) * 5 + (1.0,) * 5
    found = surprise(torch.tensor([[3.0, -9, 2, -6, 0], [3.0, -9, 2, -6, 30]]), clean, 2)
    assert found.layout.tolist() == pytest.approx([7, 7])
    assert found.most.tolist() == pytest.approx([6, 40])


def test_a_structure_that_may_be_missing_does_not_surprise_when_it_is() -> None:
    clean = typical([torch.tensor([[0.0, 0.0, volume, 0.0]]) for volume in (0.0, 0.0, 8.0, 8.5)])
    assert surprise(torch.zeros(1, 4), clean, 1).most.item() < 3


def test_cases_that_are_all_alike_leave_some_deviation() -> None:
    assert min(typical([torch.zeros(1, 3)] * 5)[3:]) > 0
    assert min(typical([torch.zeros(1, 3)])[3:]) > 0
