"""A plan, scans and a data set that are small enough for tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from genmed.denoiser import Denoiser
from genmed.fields import Fields
from genmed.nets.unet import UNet
from genmed.plan import Plan
from genmed.volume import Volume

PLAN = Plan(
    name="tiny",
    channels=("T1",),
    labels=("background", "front", "back"),
    label_values=(0, 1, 2),
    spacing_mm=(1.0, 1.0, 1.0),
    patch=(16, 16, 16),
    widths=(8, 16),
    batch=1,
    steps=1,
    learning_rate=1e-3,
    thick_slices=False,
    extent_mm=(40.0, 40.0, 40.0),
)


def tiny_denoiser(fields: Fields) -> Denoiser:
    levels = len(fields)
    net = UNet(fields.channels + levels, fields.channels, (8, 16), [(2, 2, 2)], conditions=levels)
    return Denoiser(fields, net, sigma_max=40.0)


def blocks(
    rng: np.random.Generator, shape: tuple[int, int, int] = (24, 16, 16), count: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Image and label, (1, x, y, z): touching blocks of 8 voxels a side, each brighter than the last, in noise."""
    label = np.zeros((1, *shape), np.uint8)
    x, y, z = rng.integers(2, 5, 3)
    for value in range(1, count + 1):
        label[0, x + 8 * value - 8 : x + 8 * value, y : y + 8, z : z + 8] = value
    return (100 * label + rng.normal(0, 10, label.shape)).astype(np.float32), label


def write_msd(
    folder: Path, name: str, labels: Sequence[str], cases: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Path:
    """A data set in MSD layout from image and label, (1, x, y, z) of 1 mm voxels, by id."""
    for part, number in (("imagesTr", 0), ("labelsTr", 1)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for id, arrays in cases.items():
            Volume(arrays[number], np.eye(4)).save(folder / part / f"{id}.nii.gz")
    about = {
        "name": name,
        "modality": {"0": "MRI"},
        "labels": {str(value): label for value, label in enumerate(labels)},
        "training": [{"image": f"./imagesTr/{id}.nii.gz", "label": f"./labelsTr/{id}.nii.gz"} for id in cases],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder
