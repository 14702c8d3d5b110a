import pytest
import torch
from tiny import tiny_denoiser
from torch import Tensor

from genmed.denoiser import Denoiser
from genmed.fields import image_and_label, probabilities

FIELDS = image_and_label(("T1",), ("background", "front", "back"))


@pytest.fixture
def trained() -> Denoiser:
    """A denoiser whose weights are all random: as good as trained for every property tested here."""
    torch.manual_seed(0)
    denoiser = tiny_denoiser(FIELDS)
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return denoiser.eval().requires_grad_(False)


def draw(batch: int = 2, size: tuple[int, int, int] = (6, 7, 5)) -> Tensor:
    return torch.randn(batch, FIELDS.channels, *size, generator=torch.Generator().manual_seed(1))


def test_untrained_image_estimate_is_the_wiener_filter_of_unit_variance() -> None:
    z, sigma = draw(), 0.7
    estimate = tiny_denoiser(FIELDS)(z, torch.full((2, 2), sigma))
    torch.testing.assert_close(estimate[:, :1], z[:, :1] / (1 + sigma**2))


def test_without_a_network_the_label_estimate_is_bayes_rule_with_equal_priors() -> None:
    z, sigma = draw(), 0.7
    denoiser = tiny_denoiser(FIELDS)
    torch.nn.init.zeros_(denoiser.net.head.weight)
    estimate = denoiser(z, torch.full((2, 2), sigma))
    codes = 2 * torch.eye(3) - 1
    likelihood = torch.exp(-((z[:, None, 1:] - codes[None, :, :, None, None, None]) ** 2).sum(2) / (2 * sigma**2))
    expected = likelihood / likelihood.sum(dim=1, keepdim=True)
    torch.testing.assert_close(probabilities(estimate[:, 1:]), expected)


def test_clean_fields_are_returned_unchanged(trained: Denoiser) -> None:
    z = draw()
    estimate = trained(z, torch.tensor([[0.0, 40.0], [0.0, 3.0]]))
    assert torch.equal(estimate[:, :1], z[:, :1])
    label = torch.nn.functional.one_hot(torch.randint(3, (2, 6, 7, 5)), 3).movedim(-1, 1) * 2.0 - 1
    z[:, 1:] = label
    torch.testing.assert_close(trained(z, torch.tensor([[5.0, 0.0]] * 2))[:, 1:], label)


def test_a_hidden_field_cannot_influence_anything(trained: Denoiser) -> None:
    z = draw()
    other = torch.cat([z[:, :1], 1e3 * torch.randn_like(z[:, 1:])], dim=1)
    sigma = torch.tensor([[0.0, 40.0]] * 2)
    assert torch.equal(trained.net(*_seen(trained, z, sigma)), trained.net(*_seen(trained, other, sigma)))


def _seen(denoiser: Denoiser, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    caught: list[tuple[Tensor, Tensor]] = []
    handle = denoiser.net.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    denoiser(z, sigma)
    handle.remove()
    return caught[0]


def test_a_batch_of_two_equals_two_single_runs(trained: Denoiser) -> None:
    z, sigma = draw(), torch.tensor([[0.3, 2.0], [5.0, 0.1]])
    both = trained(z, sigma)
    for i in range(2):
        torch.testing.assert_close(trained(z[i : i + 1], sigma[i : i + 1]), both[i : i + 1], atol=1e-5, rtol=0)


def test_a_constant_noise_map_is_the_same_as_a_noise_level(trained: Denoiser) -> None:
    z, sigma = draw(), torch.tensor([[0.3, 2.0], [5.0, 0.1]])
    maps = sigma[..., None, None, None].expand(-1, -1, *z.shape[2:])
    assert torch.equal(trained(z, sigma), trained(z, maps))


def test_padding_of_a_patch_hides_what_lies_there(trained: Denoiser) -> None:
    z, sigma = draw(size=(8, 8, 8)), torch.full((2, 2), 0.5)
    inside = torch.ones(2, 1, 8, 8, 8)
    inside[..., 5:] = 0
    changed = z.clone()
    changed[..., 5:] = 100.0
    first, second = (trained.outputs(x, sigma, inside) for x in (z, changed))
    for name in FIELDS.names:
        assert torch.equal(first[name][..., :5], second[name][..., :5])


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 9, 3), (1, 7, 2)])
def test_any_size_comes_back_as_it_went_in(trained: Denoiser, size: tuple[int, int, int]) -> None:
    assert trained(draw(1, size), torch.ones(1, 2)).shape == (1, FIELDS.channels, *size)


def test_a_scan_of_one_voxel_at_the_coarsest_level_is_seen_there(trained: Denoiser) -> None:
    z = draw(1, (2, 2, 2)).requires_grad_(False)
    deepest = trained.net.down[-1]
    seen: list[Tensor] = []
    deepest.register_forward_hook(lambda module, inputs, output: seen.append(output))
    trained(z, torch.ones(1, 2))
    trained(z + draw(1, (2, 2, 2)).flip(1), torch.ones(1, 2))
    assert not torch.allclose(seen[0], seen[1])  # a norm of single values would be the same for every scan
