import numpy as np
import pytest

from genmed.degrade import coarser, inverted, keep_slices
from genmed.errors import GenMedError
from genmed.volume import Volume


def scan(shape: tuple[int, int, int] = (8, 12, 10)) -> Volume:
    return Volume(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32), np.eye(4))


def test_coarser_voxels_are_block_means_over_the_same_field_of_view() -> None:
    fine = scan((8, 12, 4))
    coarse = coarser(fine, 4)
    blocks = fine.data[0].reshape(2, 4, 3, 4, 1, 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(coarse.data[0], blocks, atol=1e-6)
    assert coarse.spacing_mm == (4.0, 4.0, 4.0)
    assert coarse.affine[:3, 3].tolist() == [1.5, 1.5, 1.5]


def test_dropped_slices_are_gone_from_the_data_too() -> None:
    kept, mask = keep_slices(scan(), 3, axis=1)
    seen = mask.data[0].any(axis=(0, 2))
    assert seen.nonzero()[0].tolist() == [2, 6, 10]
    assert not kept.data[:, :, ~seen].any()
    assert np.array_equal(kept.data[:, :, seen], scan().data[:, :, seen])


def test_inverting_twice_changes_nothing() -> None:
    image = scan()
    np.testing.assert_allclose(inverted(inverted(image)).data, image.data, atol=1e-6)
    assert np.corrcoef(inverted(image).data.ravel(), image.data.ravel())[0, 1] == pytest.approx(-1)


def test_impossible_degradations_are_refused() -> None:
    with pytest.raises(GenMedError, match="larger than the scan"):
        coarser(scan(), 11)
    with pytest.raises(GenMedError, match="cannot keep 20 of 12"):
        keep_slices(scan(), 20, axis=1)
