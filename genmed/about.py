"""What `genmed info` tells: facts about a scan, a plan or a model, as a dict and as aligned text."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from genmed.plan import Plan
from genmed.volume import Volume, read


def describe(path: Path) -> dict[str, Any]:
    """Geometry and values of a scan or label map, or the entries of a plan.json; ready for JSON."""
    if path.suffix == ".json":
        return {"plan": json.loads(Plan.from_json(path).to_json())}
    return _describe_volume(read(path, finite=False, fourth_axis="channels"), path)


def as_text(facts: dict[str, Any], indent: str = "") -> str:
    """One fact a line, names aligned, groups indented; empty facts are left out."""
    shown = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
    width = max((len(key) for key, value in shown.items() if not isinstance(value, dict)), default=0)
    lines = []
    for key, value in shown.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", as_text(value, indent + "  ")]
        else:
            text = _text(value).replace("\n", f"\n{indent}{' ' * width}  ")
            lines.append(f"{indent}{key:{width}}  {text}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "\n".join("  ".join(f"{number:10.4f}" for number in row) for row in value)
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _describe_volume(volume: Volume, path: Path) -> dict[str, Any]:
    import nibabel

    shape, spacing_mm = volume.grid.shape, volume.spacing_mm
    finite = volume.data[np.isfinite(volume.data)]
    facts: dict[str, Any] = {
        "path": str(path),
        "size": list(shape),
        "channels": len(volume.data),
        "spacing_mm": list(spacing_mm),
        "extent_mm": [n * s for n, s in zip(shape, spacing_mm, strict=True)],
        "axes": "".join(nibabel.aff2axcodes(volume.affine)),
        "affine": volume.affine.tolist(),
        "type": str(volume.data.dtype),
        "lowest": finite.min().item() if finite.size else None,
        "highest": finite.max().item() if finite.size else None,
        "mean": float(finite.mean()) if finite.size else None,
        "not_finite": int(volume.data.size - finite.size),
    }
    if volume.header is not None:
        facts |= {f"{form}_code": int(volume.header[f"{form}_code"]) for form in ("sform", "qform")}
    if volume.label_names:
        facts["labels"] = _label_volumes(volume)
    return facts


def _label_volumes(volume: Volume) -> dict[str, str]:
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    counts = {value: int(np.count_nonzero(volume.data == value)) for value in volume.label_names}
    return {
        name: f"value {value}, {counts[value]} voxels, {counts[value] * voxel_ml:.3f} ml"
        for value, name in volume.label_names.items()
    }
