"""Scans and label maps on disk: `read(path)` gives a `Volume`, `Volume.save(path)` writes one back.

Arrays are (c, x, y, z); affines map voxel indices to world millimetres, RAS+. Reads NIfTI, NRRD/MetaImage,
DICOM series and PNG/TIFF slices; every bad input is a `GenMedError` of one line.
"""

from __future__ import annotations

import gzip
import os
import re
import uuid
import xml.etree.ElementTree as ElementTree
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from .errors import GenMedError

if TYPE_CHECKING:
    import SimpleITK

PathLike = str | os.PathLike[str]
FourthAxis = Literal["time", "channels"]

NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh")
GZIP_SUFFIXES = (".nii.gz", ".mgz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SAVE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", *PICTURE_SUFFIXES)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CHANNELS_INTENT = "channels"  # marks our own multi-channel NIfTI files, which are not time series


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxel grid of a scan: `shape` (x, y, z) and `affine` (4, 4), voxel index -> world mm, RAS+."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ValueError(f"a grid has three axes, not {len(self.shape)}")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along every axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def corners_mm(self) -> np.ndarray:
        """World positions (8, 3) of the field of view's corners, at the outer edges of the outer voxels."""
        edges = [(-0.5, n - 0.5) for n in self.shape]
        index = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1).reshape(-1, 3)
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]


@dataclass(frozen=True, eq=False)
class Volume:
    """Image or label map with its geometry.

    `data` is (c, x, y, z): images of any real type, label maps integer with c = 1. `label_names` maps label
    values to names. `header` is the source's NIfTI header: sform/qform codes and units survive a round trip.
    `slice_thickness_mm` is what a slice along the third axis averages, where a DICOM header tells.
    """

    data: np.ndarray
    affine: np.ndarray
    label_names: dict[int, str] = field(default_factory=dict)
    header: nib.nifti1.Nifti1Header | None = None
    path: Path | None = None
    slice_thickness_mm: float | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise ValueError(f"volume data is (c, x, y, z), not {self.data.shape}")
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))

    @property
    def grid(self) -> Grid:
        return Grid(self.data.shape[1:], self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.grid.spacing_mm

    @property
    def name(self) -> str:
        """What error messages call this volume: its path where it has one."""
        return str(self.path) if self.path else "the volume"

    def like(self, data: np.ndarray, label_names: Mapping[int, str] | None = None) -> Volume:
        """New data, (c, x, y, z) or (x, y, z), on the same grid and with the same header."""
        data = data if data.ndim == 4 else data[None]
        if data.shape[1:] != self.data.shape[1:]:
            raise ValueError(f"data of shape {data.shape[1:]} does not lie on the grid {self.data.shape[1:]}")
        return replace(self, data=data, label_names=dict(label_names or {}), path=None)

    def save(self, path: PathLike) -> None:
        """Write .nii, .nii.gz, .nrrd, .mha, or a 2D slice as .png/.tiff; the file appears whole or never.

        A label map (integers with `label_names`) is stored in the smallest integer type that holds it.
        Several channels become the fourth axis of a NIfTI file or the vector of an NRRD file.
        """
        path = Path(path).expanduser()
        suffix = _suffix(path, SAVE_SUFFIXES)
        if suffix is None:
            raise GenMedError(f"{path}: cannot write this file type; name it {', '.join(SAVE_SUFFIXES)}")
        write = _write_nifti if suffix.startswith(".nii") else _write_itk
        if suffix in PICTURE_SUFFIXES:
            write = _write_picture
        volume = replace(self, data=_storable(self.data, is_label=bool(self.label_names)))
        with _whole_file(path, suffix) as temporary:
            write(volume, temporary)


def read(
    path: PathLike | Sequence[PathLike],
    *,
    finite: bool = True,
    series: str | None = None,
    fourth_axis: FourthAxis = "time",
) -> Volume:
    """Read a scan or label map: one path, or several paths that become the channels.

    A folder is a DICOM series; `series` chooses one by description, number or UID where there are several.
    Integer files keep their type, everything else is float32 with the file's scaling applied. Raises
    `GenMedError` for every bad input, with `finite` also for NaN and infinite voxels. A 4D NIfTI file is an
    error unless `fourth_axis="channels"` says that its last axis is channels (Medical Segmentation
    Decathlon).
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise GenMedError("no image given; name at least one file or DICOM folder")
    volumes = [_read_one(Path(p).expanduser(), series, fourth_axis) for p in paths]
    for volume in volumes:
        if finite:
            _require_finite(volume)
        require_same_grid(volumes[0], volume)
    return volumes[0] if len(volumes) == 1 else replace(volumes[0], data=_stack([v.data for v in volumes]))


def read_labels(path: PathLike, *, series: str | None = None) -> Volume:
    """Read a label map as integers (1, x, y, z), also from a file that stores whole numbers as floats."""
    volume = read(path, series=series)
    if volume.data.shape[0] != 1:
        raise GenMedError(
            f"{path}: {volume.data.shape[0]} channels; a label map has one, an integer per class"
        )
    if volume.data.dtype.kind in "iu":
        return volume
    labels = np.rint(volume.data)
    if not np.array_equal(labels, volume.data):
        raise GenMedError(
            f"{path}: values such as {_first_fraction(volume.data)} are not labels; save whole numbers"
        )
    return replace(volume, data=_smallest_integer(labels.astype(np.int64)))


def check_image(volume: Volume) -> None:
    """Raise `GenMedError` where a channel holds nothing to look at: the same value everywhere."""
    for number, channel in enumerate(volume.data):
        low, high = channel.min(), channel.max()
        if low == high:
            where = volume.name if len(volume.data) == 1 else f"{volume.name}: channel {number}"
            raise GenMedError(
                f"{where}: empty image, every voxel is {low:g}; check how the file was exported"
            )


def require_3d(volume: Volume) -> None:
    """Raise `GenMedError` for a single slice given where a stack of slices is needed."""
    if 1 in volume.grid.shape:
        raise GenMedError(
            f"{volume.name}: a single slice of {_size(volume.grid)} voxels, but this model needs a 3D scan;"
            " give the whole stack of slices or use a 2D model"
        )


def require_same_grid(first: Volume, second: Volume) -> None:
    """Raise `GenMedError` unless both volumes lie on one grid: same shape, corners within 1% of a voxel."""
    advice = "resample one onto the other's grid"
    a, b = first.grid, second.grid
    if a.shape != b.shape:
        raise GenMedError(f"{second.name}: {_size(b)} voxels, but {first.name} has {_size(a)}; {advice}")
    shift_mm = float(np.linalg.norm(a.corners_mm() - b.corners_mm(), axis=1).max())
    if not shift_mm <= max(1e-3, 0.01 * min(a.spacing_mm)):
        raise GenMedError(
            f"{second.name}: lies up to {shift_mm:.3g} mm off {first.name} (different affine); {advice}"
        )


def _read_one(path: Path, series: str | None, fourth_axis: FourthAxis) -> Volume:
    """Choose the reader by folder, file name or DICOM signature."""
    if not path.exists():
        raise GenMedError(f"{path}: no such file or folder; check the path")
    if not os.access(path, os.R_OK):
        raise GenMedError(f"{path}: no permission to read; ask its owner or copy it to your own folder")
    if path.is_dir() or _suffix(path, DICOM_SUFFIXES):
        volume = _read_dicom(path, series)
    elif _suffix(path, NIBABEL_SUFFIXES):
        volume = _read_nibabel(path, fourth_axis)
    elif _suffix(path, ITK_SUFFIXES):
        volume = _read_itk(path)
    elif _suffix(path, PICTURE_SUFFIXES):
        volume = _read_picture(path)
    elif _is_dicom(path):
        volume = _read_dicom(path, series)
    else:
        raise GenMedError(f"{path}: not a medical image; give NIfTI, NRRD, a DICOM folder, PNG or TIFF")
    _check_volume(volume)
    return volume


def _check_volume(volume: Volume) -> None:
    """Raise `GenMedError` for an affine without inverse, no voxels, or numbers that are not real."""
    if 0 in volume.data.shape:
        raise GenMedError(f"{volume.name}: no voxels ({_size(volume.grid)}); export the scan again")
    if volume.data.dtype.kind not in "iuf":
        raise GenMedError(f"{volume.name}: voxels of type {volume.data.dtype}; save it as real numbers")
    advice = "repair the header's geometry or export the scan again"
    if not np.isfinite(volume.affine).all():
        raise GenMedError(f"{volume.name}: affine with NaN or infinite entries; {advice}")
    spacing = volume.spacing_mm
    if min(spacing) < 1e-6:
        raise GenMedError(
            f"{volume.name}: voxel spacing {' × '.join(f'{s:g}' for s in spacing)} mm; {advice}"
        )
    if abs(np.linalg.det(volume.affine[:3, :3] / spacing)) < 1e-4:
        raise GenMedError(f"{volume.name}: singular affine (two voxel axes run along one line); {advice}")


def _require_finite(volume: Volume) -> None:
    if volume.data.dtype.kind != "f":
        return
    slabs = (volume.data[:, :, :, z] for z in range(volume.data.shape[3]))
    bad = sum(slab.size - int(np.count_nonzero(np.isfinite(slab))) for slab in slabs)
    if bad:
        share = f"{bad} of {volume.data.size}"
        raise GenMedError(f"{volume.name}: {share} voxels are NaN or infinite; replace them with a number, or "
            "hide them with --observed, a mask that is 0 there")


def _stack(channels: list[np.ndarray]) -> np.ndarray:
    """Concatenate channels: integer types widen among themselves, any float makes all of them float32."""
    floats = any(c.dtype.kind == "f" for c in channels)
    return np.concatenate(channels, dtype=np.float32 if floats else np.result_type(*channels))


def _first_fraction(data: np.ndarray) -> float:
    return float(data.flat[np.argmax(data != np.rint(data))])


def _size(grid: Grid) -> str:
    return " × ".join(str(n) for n in grid.shape)


def _suffix(path: Path, suffixes: Sequence[str]) -> str | None:
    """The longest of `suffixes` that the file name ends in."""
    return max((s for s in suffixes if path.name.lower().endswith(s)), key=len, default=None)


# --- NIfTI --------------------------------------------------------------------------------------------------


def _read_nibabel(path: Path, fourth_axis: FourthAxis) -> Volume:
    try:
        image: Any = nib.load(path, mmap=False)
        data = _checked_gzip(image, path) if _suffix(path, GZIP_SUFFIXES) else _scaled(image.dataobj, path)
    except (ImageFileError, HeaderDataError) as error:
        raise GenMedError(
            f"{path}: not a readable NIfTI file ({_one_line(error)}); export it again"
        ) from error
    except (EOFError, OSError, ValueError, zlib.error) as error:
        reason = _one_line(error)
        raise GenMedError(f"{path}: truncated or damaged ({reason}); copy or download it again") from error
    header = image.header if isinstance(image.header, nib.nifti1.Nifti1Header) else None
    affine = image.affine * np.array([[_unit_mm(header)]] * 3 + [[1.0]])
    names = _read_label_names(header) if header is not None else {}
    return Volume(_channels_first(data, header, path, fourth_axis), affine, names, header, path)


def _checked_gzip(image: Any, path: Path) -> np.ndarray:
    """`_scaled` voxels of a gzip file read to its very end: only there does gzip verify its checksum."""
    with gzip.open(path) as stream:
        data = _scaled(type(image).from_stream(stream).dataobj, path)
        while stream.read(1 << 20):
            pass
    return data


def _scaled(proxy: Any, path: Path) -> np.ndarray:
    """Voxels in the file's own integer type, or float32 where the file is float or has a scale factor."""
    if proxy.dtype.kind not in "iufb":
        kind = "RGB colour" if proxy.dtype.kind == "V" else str(proxy.dtype)
        raise GenMedError(f"{path}: {kind} voxels; save a grey-scale image (one number per voxel)")
    slope, inter = float(getattr(proxy, "slope", 1.0)), float(getattr(proxy, "inter", 0.0))
    raw = np.asarray(proxy.get_unscaled())
    if raw.dtype.kind in "iu" and (slope, inter) == (1.0, 0.0):
        return raw.astype(raw.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which read() reports
        data = raw.astype(np.float32, copy=False)
        if (slope, inter) != (1.0, 0.0):
            data = data * np.float32(slope)
            data += np.float32(inter)
    return data


def _channels_first(data: Any, header: Any, path: Path, fourth_axis: FourthAxis) -> np.ndarray:
    """Bring (x, y[, z[, t]]) or a NIfTI vector (x, y, z, 1, c) to (c, x, y, z)."""
    intent, _, intent_name = header.get_intent() if header is not None else ("none", (), "")
    data = data.reshape(data.shape + (1,) * (3 - data.ndim), order="F")
    if data.ndim == 5 and data.shape[3] == 1 and intent == "vector":
        return np.moveaxis(data[:, :, :, 0], -1, 0)
    while data.ndim > 4 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim == 3:
        return data[None]
    is_channels = fourth_axis == "channels" or intent_name == CHANNELS_INTENT
    if data.ndim == 4 and (data.shape[3] == 1 or is_channels):
        return np.moveaxis(data, -1, 0)
    points = int(np.prod(data.shape[3:]))
    raise GenMedError(f"{path}: 4D series with {points} time points; pick one and save it as a 3D file")


def _unit_mm(header: Any) -> float:
    """Millimetres in one spatial unit of a NIfTI header; unknown units count as millimetres."""
    unit = int(header["xyzt_units"]) & 0x07 if header is not None else 0
    return {1: 1000.0, 3: 0.001}.get(unit, 1.0)


def _write_nifti(volume: Volume, path: Path) -> None:
    header = _nifti_header(volume)
    image_class = nib.Nifti2Image if isinstance(header, nib.nifti2.Nifti2Header) else nib.Nifti1Image
    data = volume.data[0] if len(volume.data) == 1 else np.moveaxis(volume.data, 0, -1)
    header.set_data_dtype(data.dtype)
    image = image_class(data, None, header, dtype=data.dtype)
    nib.save(image, path)


def _nifti_header(volume: Volume) -> Any:
    """The source's header with its codes and units, or a fresh one in scanner coordinates."""
    header = volume.header.copy() if volume.header is not None else nib.Nifti1Header()
    header.extensions.clear()
    header.set_intent("none", name=CHANNELS_INTENT if len(volume.data) > 1 else "")
    header["cal_min"], header["cal_max"], header["descrip"] = 0, 0, b""
    header.set_data_shape(volume.data.shape[1:] + volume.data.shape[:1] * (len(volume.data) > 1))
    unit = np.array([[_unit_mm(header)]] * 3 + [[1.0]])
    if volume.header is None:
        header.set_xyzt_units("mm")
    if not np.array_equal(header.get_best_affine() * unit, volume.affine):
        header.set_qform(volume.affine / unit, code=int(header["qform_code"]) or 1)
        header.set_sform(volume.affine / unit, code=int(header["sform_code"]) or 1)
    if volume.label_names:
        header.extensions.append(_label_extension(volume.label_names))
    return header


def _label_extension(names: Mapping[int, str]) -> nib.nifti1.Nifti1Extension:
    """Label names as the Caret XML that TotalSegmentator, MITK and other viewers read (extension code 0)."""
    rows = [
        f'<Label Key="{value}" Red="{red:.3f}" Green="{green:.3f}" Blue="{blue:.3f}" Alpha="1">'
        f"<![CDATA[{name.replace(']]>', '')}]]></Label>"
        for value, name in names.items()
        for red, green, blue in [_colour(value)]
    ]
    table = "\n".join(rows)
    text = (
        '<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>\n'
        f"{table}\n</LabelTable><StudyMetaDataLinkSet></StudyMetaDataLinkSet>"
        "<VolumeType><![CDATA[Label]]></VolumeType></VolumeInformation></CaretExtension>"
    )
    return nib.nifti1.Nifti1Extension(0, text.encode("utf-8"))


def _colour(value: int) -> tuple[float, float, float]:
    """Well separated colours by turning the hue with the golden ratio."""
    import colorsys

    return colorsys.hsv_to_rgb(value * 0.618034 % 1.0, 0.65, 0.95)


def read_label_names(path: PathLike) -> dict[int, str]:
    """Label names by value in the header of a NIfTI file, no voxel read; {} where it has none or cannot be read."""
    try:
        header = nib.load(path).header
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error):
        return {}
    return _read_label_names(header) if isinstance(header, nib.nifti1.Nifti1Header) else {}


def _read_label_names(header: Any) -> dict[int, str]:
    """Label names from a Caret XML extension; {} where there is none or it cannot be parsed."""
    for extension in header.extensions:
        raw = getattr(extension, "content", b"") if not hasattr(extension, "text") else extension.text
        text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
        if "<LabelTable" not in text:
            continue
        try:
            root = ElementTree.fromstring(text.strip("\0 \n"))
            return {int(label.attrib["Key"]): label.text or "" for label in root.iter("Label")}
        except (ElementTree.ParseError, KeyError, ValueError):
            return {}
    return {}


# --- NRRD and MetaImage -------------------------------------------------------------------------------------


def _read_itk(path: Path) -> Volume:
    image = _itk_read(path, str(path))
    if image.GetDimension() > 3 and image.GetSize()[3] > 1:
        points = image.GetSize()[3]
        raise GenMedError(f"{path}: 4D series with {points} time points; pick one and save it as a 3D file")
    return Volume(_itk_array(image), _itk_affine(image), _read_segment_names(image), None, path)


def _itk_read(path: Path, source: Any, *arguments: Any) -> SimpleITK.Image:
    """`SimpleITK.ReadImage` whose failure is a `GenMedError` about `path`."""
    import SimpleITK as sitk

    try:
        return sitk.ReadImage(source, *arguments)
    except RuntimeError as error:
        reason = _last_line(error)
        raise GenMedError(f"{path}: unreadable or truncated ({reason}); export or copy it again") from error


def _itk_array(image: SimpleITK.Image) -> np.ndarray:
    """Voxels (c, x, y, z) of a SimpleITK image; vector components are channels."""
    import SimpleITK as sitk

    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() == 1:
        array = array[..., None]
    while array.ndim < 4:
        array = array[None]
    return _lean(array.reshape(array.shape[-4:]).T)


def _itk_affine(image: SimpleITK.Image) -> np.ndarray:
    """ITK's origin, direction and spacing (LPS) as an affine (RAS); a 2D image gets a third axis of 1 mm."""
    size = image.GetDimension()
    kept = min(size, 3)
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(size, size) * np.array(image.GetSpacing())
    affine[:kept, :kept] = direction[:kept, :kept]
    affine[:kept, 3] = image.GetOrigin()[:kept]
    return LPS_TO_RAS @ affine


def _write_itk(volume: Volume, path: Path) -> None:
    import SimpleITK as sitk

    several = len(volume.data) > 1
    data = volume.data.T if several else volume.data[0].T
    image = sitk.GetImageFromArray(np.ascontiguousarray(data), isVector=several)
    spacing = np.array(volume.spacing_mm)
    lps = LPS_TO_RAS @ volume.affine
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    for number, (value, name) in enumerate(volume.label_names.items()):
        image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        image.SetMetaData(f"Segment{number}_Name", name)
    sitk.WriteImage(image, str(path), useCompression=True)


def _read_segment_names(image: SimpleITK.Image) -> dict[int, str]:
    """Label names in 3D Slicer's NRRD keys, Segment0_LabelValue and Segment0_Name."""
    names = {}
    for key in image.GetMetaDataKeys():
        match = re.fullmatch(r"Segment(\d+)_LabelValue", key)
        name = f"Segment{match[1]}_Name" if match else ""
        if match and image.HasMetaDataKey(name) and image.GetMetaData(key).strip().isdigit():
            names[int(image.GetMetaData(key))] = image.GetMetaData(name)
    return dict(sorted(names.items()))


# --- DICOM --------------------------------------------------------------------------------------------------

DICOM_TAGS = [
    *("SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "RescaleSlope", "RescaleIntercept"),
    *("PixelSpacing", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient"),
]


@dataclass(frozen=True)
class _Slice:
    path: Path
    tags: Any


def _read_dicom(path: Path, series: str | None) -> Volume:
    slices = _choose_series(_find_series(path), path, series)
    if int(slices[0].tags.get("SamplesPerPixel") or 1) != 1:
        raise GenMedError(f"{path}: DICOM with RGB colour; export a grey-scale series")
    if len(slices) == 1 and int(slices[0].tags.get("NumberOfFrames") or 1) > 1:
        return _read_multi_frame(slices[0].path, path)
    slices, affine = _stack_geometry(slices, path)
    thickness_mm = _thickness([s.tags for s in slices], float(np.linalg.norm(affine[:3, 2])))
    return Volume(_dicom_voxels(slices, path), affine, path=path, slice_thickness_mm=thickness_mm)


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _find_series(path: Path) -> dict[str, list[_Slice]]:
    """DICOM images under a folder (or the one file), grouped by series UID."""
    import pydicom

    found = defaultdict(list)
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        try:
            tags = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=DICOM_TAGS)
        except (pydicom.errors.InvalidDicomError, EOFError, OSError, ValueError, KeyError, AttributeError):
            continue
        if "Rows" in tags:
            found[str(tags.get("SeriesInstanceUID", "no UID"))].append(_Slice(file, tags))
    if not found:
        problem = "no DICOM image in this folder" if path.is_dir() else "not a readable DICOM image"
        raise GenMedError(f"{path}: {problem}; give an image file or the folder of a DICOM series")
    return dict(found)


def _choose_series(found: dict[str, list[_Slice]], path: Path, wanted: str | None) -> list[_Slice]:
    """The only series, or the one whose description, number or UID is `wanted`."""
    chosen = [uid for uid, slices in found.items() if wanted is None or wanted in _series_names(uid, slices)]
    if len(chosen) == 1:
        return found[chosen[0]]
    listing = "; ".join(_describe(uid, slices) for uid, slices in found.items())
    problem = f"{len(found)} series"
    if wanted is not None:
        problem = f"{len(chosen)} of {len(found)} series are called '{wanted}'"
    raise GenMedError(f"{path}: {problem}: {listing}; choose one with series=, by description, number or UID")


def _describe(uid: str, slices: list[_Slice]) -> str:
    tags = slices[0].tags
    count = sum(int(s.tags.get("NumberOfFrames") or 1) for s in slices)
    description = tags.get("SeriesDescription") or "no description"
    return f"'{description}' ({tags.get('Modality') or 'DICOM'}, {count} slices, UID {uid})"


def _series_names(uid: str, slices: list[_Slice]) -> set[str]:
    tags = slices[0].tags
    return {uid, str(tags.get("SeriesDescription", "")), str(tags.get("SeriesNumber", ""))} - {"", "None"}


def _stack_geometry(slices: list[_Slice], path: Path) -> tuple[list[_Slice], np.ndarray]:
    """Sort slices along their normal and derive the affine from their positions (also for a tilted gantry).

    Errors: slices of different size or direction, without position, doubled, or unevenly spaced.
    """
    tags = slices[0].tags
    if not all(_same_frame(tags, s.tags) for s in slices):
        raise GenMedError(
            f"{path}: slices of different size, spacing or direction; export one stack per series"
        )
    row_mm, column_mm = (float(v) for v in tags.get("PixelSpacing") or (1.0, 1.0))
    if "ImagePositionPatient" not in tags or "ImageOrientationPatient" not in tags:
        if len(slices) > 1:
            raise GenMedError(f"{path}: DICOM slices without position; export the series as NIfTI")
        return slices, LPS_TO_RAS @ np.diag([column_mm, row_mm, 1.0, 1.0])
    along_x, along_y = _numbers(tags, "ImageOrientationPatient").reshape(2, 3)
    normal = np.cross(along_x, along_y)
    slices = sorted(slices, key=lambda s: float(normal @ _numbers(s.tags, "ImagePositionPatient")))
    positions = np.stack([_numbers(s.tags, "ImagePositionPatient") for s in slices])
    step = normal * float(tags.get("SliceThickness") or 1.0)
    if len(slices) > 1:
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _require_even_steps(positions @ normal, path)
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_x * column_mm, along_y * row_mm, step, positions[0]])
    return slices, LPS_TO_RAS @ affine


def _read_multi_frame(file: Path, path: Path) -> Volume:
    """An enhanced DICOM file whose frames are one even stack; cines and several stacks are errors."""
    import pydicom

    tags = pydicom.dcmread(file, stop_before_pixels=True)
    groups = tags.get("PerFrameFunctionalGroupsSequence") or []
    planes = [plane for group in groups for plane in group.get("PlanePositionSequence") or []]
    positions = np.array([plane.ImagePositionPatient for plane in planes], dtype=np.float64)
    image = _itk_read(path, str(file))
    volume = Volume(_itk_array(image), _itk_affine(image), path=path)
    steps = np.arange(volume.data.shape[3])[:, None]
    lps = LPS_TO_RAS @ volume.affine
    expected = lps[:3, 3] + steps * lps[:3, 2]
    if positions.shape != expected.shape or np.abs(positions - expected).max() > 0.1 * volume.spacing_mm[2]:
        raise GenMedError(f"{path}: DICOM frames are not one even stack of slices; export one stack as NIfTI")
    groups = [*(tags.get("SharedFunctionalGroupsSequence") or []), *groups]
    measures = [one for group in groups for one in group.get("PixelMeasuresSequence") or []]
    return replace(volume, slice_thickness_mm=_thickness(measures, volume.spacing_mm[2]))


def _thickness(tags: Sequence[Any], spacing_mm: float) -> float | None:
    """The one SliceThickness that all slices tell; None where they tell none or several, or where slices overlap."""
    told = {float(one.get("SliceThickness") or 0) for one in tags}
    thickness_mm = told.pop() if len(told) == 1 else 0.0
    return min(thickness_mm, spacing_mm) if 0 < thickness_mm <= 1.01 * spacing_mm else None


def _numbers(tags: Any, name: str) -> np.ndarray:
    return np.array(tags.get(name) or [], dtype=np.float64)


def _same_frame(first: Any, second: Any) -> bool:
    """Both slices have the same size, pixel spacing and direction (to 1e-3) and a position, or both none."""
    same = (first.Rows, first.Columns) == (second.Rows, second.Columns)
    for name in ("PixelSpacing", "ImageOrientationPatient"):
        a, b = _numbers(first, name), _numbers(second, name)
        same = same and a.shape == b.shape and np.allclose(a, b, atol=1e-3)
    return same and ("ImagePositionPatient" in first) == ("ImagePositionPatient" in second)


def _require_even_steps(heights_mm: np.ndarray, path: Path) -> None:
    steps = np.diff(heights_mm)
    usual = float(np.median(steps))
    if steps.min() < 1e-3:
        doubled = int(np.count_nonzero(steps < 1e-3))
        raise GenMedError(
            f"{path}: {doubled} of {len(heights_mm)} slices lie where another one lies (time points, echoes);"
            " export each as its own series"
        )
    expected = heights_mm[0] + np.arange(len(heights_mm)) * steps.mean()
    if np.abs(heights_mm - expected).max() > 0.1 * usual:
        worst = int(np.argmax(np.abs(steps - usual)))
        raise GenMedError(
            f"{path}: slices are not evenly spaced ({steps[worst]:.3g} mm after slice {worst + 1}, usually"
            f" {usual:.3g} mm); slices are missing, export the whole series"
        )


def _dicom_voxels(slices: list[_Slice], path: Path) -> np.ndarray:
    """Voxels (1, x, y, z) with the rescale slope and intercept applied.

    Float where these are fractions or differ between slices (PET): ITK takes the type of the first slice.
    """
    import SimpleITK as sitk

    scales = {
        (float(s.tags.get("RescaleSlope") or 1), float(s.tags.get("RescaleIntercept") or 0)) for s in slices
    }
    whole = len(scales) == 1 and all(value.is_integer() for value in next(iter(scales)))
    files = [str(s.path) for s in slices]
    return _itk_array(_itk_read(path, files, sitk.sitkUnknown if whole else sitk.sitkFloat32))


# --- PNG and TIFF -------------------------------------------------------------------------------------------


def _read_picture(path: Path) -> Volume:
    """A picture as (c, columns, rows, 1) with 1 mm pixels, to the patient's left and back as in ITK."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pages, array = getattr(picture, "n_frames", 1), np.array(picture)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise GenMedError(f"{path}: not a readable picture ({_one_line(error)}); export it again") from error
    if pages > 1:
        raise GenMedError(f"{path}: {pages} pages; save the stack as NIfTI with its voxel spacing")
    array = array[:, :, None] if array.ndim == 2 else array[:, :, : 1 if array.shape[2] == 2 else 3]
    if (array == array[:, :, :1]).all():
        array = array[:, :, :1]
    return Volume(_lean(array.T[..., None]), LPS_TO_RAS, path=path)


def _write_picture(volume: Volume, path: Path) -> None:
    from PIL import Image

    data = volume.data
    if data.shape[0] != 1 or data.shape[3] != 1:
        size = f"{data.shape[0]} × {_size(volume.grid)}"
        raise GenMedError(f"{path}: a picture holds one 2D slice, not {size} voxels; save as .nii.gz")
    if _suffix(path, (".png",)) and data.dtype.kind == "f":
        raise GenMedError(f"{path}: PNG holds whole numbers only; save as .tiff or .nii.gz")
    picture = np.ascontiguousarray(data[0, :, :, 0].T)
    if picture.dtype.kind != "f":
        picture = _smallest_integer(picture)
        if picture.dtype not in (np.uint8, np.uint16):
            values = f"{data.min()} to {data.max()}"
            raise GenMedError(f"{path}: a picture holds 0 to 65535, not {values}; save as .nii.gz")
    Image.fromarray(picture.astype(np.float32) if picture.dtype.kind == "f" else picture).save(path)


# --- Storage ------------------------------------------------------------------------------------------------


def _lean(data: np.ndarray) -> np.ndarray:
    """Keep integers, bool as uint8, floats as float32."""
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    return data.astype(np.float32, copy=False) if data.dtype.kind == "f" else data


def _storable(data: np.ndarray, *, is_label: bool) -> np.ndarray:
    """A type every image format knows; labels and 64-bit integers in the smallest type that holds them."""
    data = _lean(data)
    if data.dtype.kind in "iu" and (is_label or data.dtype.itemsize == 8):
        return _smallest_integer(data)
    return data


def _smallest_integer(data: np.ndarray) -> np.ndarray:
    low, high = (int(data.min()), int(data.max())) if data.size else (0, 0)
    for kind in (np.uint8, np.int16, np.uint16, np.int32, np.uint32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return data.astype(kind, copy=False)
    return data


@contextmanager
def _whole_file(path: Path, suffix: str) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to `path` on success, remove it on any failure."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _last_line(error)
        message = f"{path}: cannot be written ({reason}); free some space or choose another folder"
        raise GenMedError(message) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _last_line(error: object) -> str:
    """ITK's messages run over several lines and end with the reason."""
    lines = str(error).strip().splitlines()
    return _one_line(lines[-1] if lines else error)
