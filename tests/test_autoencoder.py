import pytest
import torch

from genmed.nets.autoencoder import LinearAutoencoder, from_bytes, lower, principal_components, to_bytes

SIDE = 4


def rows(count: int = 400, kinds: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data of a linear model with a few orthonormal modes of deviation 4, 2, 1; codes and modes."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.linalg.qr(torch.randn(SIDE**3, kinds, generator=generator))[0].T
    codes = torch.randn(count, kinds, generator=generator)
    scaled = codes * torch.tensor([4.0, 2.0, 1.0])[:kinds]
    return scaled @ modes + 3.0, codes, modes


def test_a_linear_model_is_found_with_its_modes_and_deviations() -> None:
    x, _, modes = rows()
    model = principal_components(x.clone(), torch.ones(len(x)), modes=10)
    assert len(model.modes) == 3  # what is left is rounding
    overlap = (model.modes @ modes.T).abs()
    torch.testing.assert_close(overlap, torch.eye(3), atol=0.1, rtol=0)
    torch.testing.assert_close(model.deviation, torch.tensor([4.0, 2.0, 1.0]), atol=0.25, rtol=0)
    codes = model.encode(x.view(-1, 1, SIDE, SIDE, SIDE))
    torch.testing.assert_close(codes.var(dim=0), torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(model.decode(codes).flatten(1), x, atol=0.06, rtol=0)  # modes in bytes


def test_weights_count_as_repetitions() -> None:
    x, _, _ = rows(60)
    repeated = torch.cat([x, x[:20], x[:20]])
    weights = torch.ones(60)
    weights[:20] = 3
    first = principal_components(x.clone(), weights, 3)
    second = principal_components(repeated, torch.ones(100), 3)
    torch.testing.assert_close(first.mean, second.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(first.deviation, second.deviation, atol=1e-3, rtol=0)


def test_the_same_rows_give_the_same_modes() -> None:
    x, _, _ = rows()
    torch.manual_seed(1)
    first = principal_components(x.clone(), torch.ones(len(x)), 3)
    torch.manual_seed(2)
    second = principal_components(x.clone(), torch.ones(len(x)), 3)
    assert torch.equal(first.modes, second.modes)


@pytest.mark.parametrize("size", [None, 4, 8])
def test_decoding_gives_the_size_asked_for(size: int | None) -> None:
    x, _, _ = rows()
    model = principal_components(x, torch.ones(len(x)), 3)
    n = size or SIDE
    decoded = model.decode(torch.randn(2, 3), size)
    assert decoded.shape == (2, 1, n, n, n)
    assert lower(decoded, SIDE).shape == (2, 1, SIDE, SIDE, SIDE)


def test_finer_distances_are_averaged_before_encoding() -> None:
    model = LinearAutoencoder(2, 1)
    model.modes.fill_(8**-0.5)
    fine = torch.randn(3, 1, 4, 4, 4)
    torch.testing.assert_close(model.encode(fine)[:, 0], fine.mean(dim=(1, 2, 3, 4)) * 8**0.5)


def test_bytes_hold_rows_to_half_a_step_and_keep_what_they_hold() -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-2, 3)[:, None]
    rows[2] = 0.0
    ints, scale = to_bytes(rows)
    assert ints.dtype == torch.int8 and ints.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127]
    once = from_bytes(ints, scale)
    assert ((once - rows).abs() <= 0.5001 * scale[:, None]).all()
    again, _ = to_bytes(once)
    assert torch.equal(again, ints)
