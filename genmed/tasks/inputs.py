"""What `segment` was pointed at: one scan, a DICOM folder, or a folder of cases."""

import glob
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from genmed.errors import GenMedError
from genmed.volume import DICOM_SUFFIXES, PICTURE_SUFFIXES, Volume, read

DETACHED, VOXELS = (".mhd", ".nhdr", ".hdr"), (".raw", ".zraw", ".img", ".raw.gz", ".img.gz")  # headers, their voxels
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".mgz", ".mgh")


@dataclass(frozen=True)
class ScanCase:
    """One scan to work on: its files in channel order, or one DICOM folder."""

    id: str
    paths: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file behind the case, sorted within a folder; voxels beside their header, too."""
        return tuple(
            file for path in self.paths for file in (_files_below(path) if path.is_dir() else [path, *_voxels_of(path)])
        )

    def read(self, channels: int, *, finite: bool = True, series: str | None = None) -> Volume:
        """The scan. For a model of several channels, a single 4D file holds them along its last axis."""
        several = channels > 1 and len(self.paths) == 1
        paths = self.paths if len(self.paths) > 1 else self.paths[0]
        return read(paths, finite=finite, series=series, fourth_axis="channels" if several else "time")


def _voxels_of(header: Path) -> list[Path]:
    """Files of the same name that hold the voxels of a header without any."""
    if header.suffix.lower() not in DETACHED:
        return []
    return sorted(path for path in header.parent.glob(f"{glob.escape(header.stem)}.*") if _holds_voxels(path))


def _holds_voxels(path: Path) -> bool:
    return path.name.lower().endswith(VOXELS) and path.is_file()


def find_cases(source: Path, channels: int, series: str | None = None) -> tuple[list[ScanCase], bool]:
    """The cases behind a path, and whether the path is a folder of cases rather than one case.

    Files `ID_0000`, `ID_0001`, … are the channels of case ID, as nnU-Net names them. Raises `GenMedError`
    for a path that is not there, a folder without scans, and two scans that would get one name.
    """
    if not source.exists():
        raise GenMedError(f"{source}: no such file or folder; check the path.")
    if source.is_file():
        return [_file_case(source, channels)], False
    if series is not None or any(_is_dicom(path) for path in source.iterdir()):
        return [ScanCase(source.resolve().name, (source,))], False
    cases = [*_image_cases(source), *_dicom_cases(source)]
    if not cases:
        hint = (
            "give its folder imagesTr or imagesTs"
            if (source / "dataset.json").is_file()
            else "check the path"
        )
        raise GenMedError(f"{source}: holds no scans (NIfTI, NRRD, PNG, TIFF or DICOM); {hint}.")
    by_id: dict[str, ScanCase] = {}
    for case in sorted(cases, key=lambda case: case.id):
        other = by_id.setdefault(case.id, case)
        if other is not case:
            raise GenMedError(
                f"{case.paths[0]}: gets the same name as {other.paths[0]}; rename or remove one."
            )
    return list(by_id.values()), True


def stem(path: Path) -> tuple[str, str]:
    """File name without its image ending, and the ending (empty for other files)."""
    suffixes = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES)
    suffix = next((s for s in suffixes if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)], path.name[len(path.name) - len(suffix) :]


def _file_case(path: Path, channels: int) -> ScanCase:
    """One file; for a model of several channels also its neighbours `_0001`, `_0002`, …"""
    name, suffix = stem(path)
    if not suffix and _is_dicom(path):
        name = path.stem
    id = name.removesuffix("_0000")
    if channels == 1 or id == name:
        return ScanCase(id, (path,))
    neighbours = (path.with_name(f"{id}_{number:04d}{suffix}") for number in range(channels))
    return ScanCase(id, tuple(neighbour for neighbour in neighbours if neighbour.exists()))


def _image_cases(folder: Path) -> Iterator[ScanCase]:
    """Image files of a folder, channels joined. Pictures count only where there are no volumes."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    volumes = [path for path in files if stem(path)[1].lower() in VOLUME_SUFFIXES]
    groups: dict[tuple[str, str], dict[int, Path]] = defaultdict(dict)
    for path in volumes or [path for path in files if stem(path)[1]]:
        name, suffix = stem(path)
        numbered = re.fullmatch(r"(.+)_(\d{4})", name)
        if numbered and path.with_name(f"{numbered[1]}_0000{suffix}").exists():
            groups[numbered[1], suffix][int(numbered[2])] = path
        else:
            groups[name, suffix][0] = path
    for (id, _), paths in groups.items():
        yield ScanCase(id, tuple(paths[number] for number in sorted(paths)))


def _dicom_cases(folder: Path) -> Iterator[ScanCase]:
    """Subfolders that hold DICOM files, at any depth."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and any(map(_is_dicom, _files_below(path))):
            yield ScanCase(path.name, (path,))


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_dicom(path: Path) -> bool:
    """By its name, or by the letters DICM behind the preamble."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
