"""Make scans worse on purpose, for demonstrations and tables: what is taken away is really gone."""

import numpy as np

from genmed.errors import GenMedError
from genmed.space import Space
from genmed.volume import Volume


def coarser(scan: Volume, mm: float) -> Volume:
    """Voxels of about `mm` along every axis, averages over the same field of view; axes turned to RAS."""
    if any(mm > n * s for n, s in zip(scan.grid.shape, scan.spacing_mm, strict=True)):
        raise GenMedError(f"voxels of {mm:g} mm are larger than the scan; choose smaller ones.")
    space = Space.fit(scan.grid, (mm, mm, mm))
    return Volume(space.to_model(scan.data), space.model.affine)


def keep_slices(scan: Volume, count: int, axis: int) -> tuple[Volume, Volume]:
    """Keep `count` evenly spread slices of an array axis: the scan with zeros elsewhere, and the mask."""
    size = scan.grid.shape[axis]
    if not 1 <= count <= size:
        raise GenMedError(f"cannot keep {count} of {size} slices; choose 1 to {size}.")
    kept = np.floor((np.arange(count) + 0.5) * size / count).astype(int)
    mask = np.zeros(scan.grid.shape, np.uint8)
    mask[(slice(None),) * axis + (kept,)] = 1
    return scan.like(scan.data * mask), scan.like(mask[None])


def inverted(scan: Volume) -> Volume:
    """Bright becomes dark."""
    values = scan.data.astype(np.float32)
    return scan.like(values.max() + values.min() - values)
