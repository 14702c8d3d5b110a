"""Every bad input is one clear line: which file, what is wrong, what to do."""

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from test_volume import nifti, oblique_affine, scan, write_dicom_series, write_enhanced_dicom

from genmed.errors import GenMedError
from genmed.volume import Volume, check_image, read, read_labels, require_3d, require_same_grid


def complaint(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the `GenMedError` that an action must raise, checked to be one line with advice."""
    with pytest.raises(GenMedError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and ";" in message
    return message


def test_missing_path_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere.nii.gz") in complaint(read, tmp_path / "nowhere.nii.gz")


def test_no_path_at_all_is_an_error() -> None:
    assert "no image given" in complaint(read, [])


@pytest.mark.parametrize(
    "name", ["notes.txt", "scan", "a.nii", "a.nii.gz", "a.nrrd", "a.dcm", "a.png", "a.tiff"]
)
@pytest.mark.parametrize("content", [b"", b"hello world, this is no image\n" * 40])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = complaint(read, tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ")
    assert any(word in message for word in ("not a", "unreadable", "damaged"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tiff", ".mgz"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, share: float) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".mgz":
        nib.save(nib.MGHImage(scan((30, 30, 30)), np.eye(4)), whole)
    else:
        flat = suffix in (".png", ".tiff")
        data = scan((1, 90, 90, 1) if flat else (1, 30, 30, 30))
        Volume(data.astype("uint8") if flat else data, np.eye(4)).save(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    message = complaint(read, cut)
    assert str(cut) in message
    assert any(word in message for word in ("truncated", "not a readable"))


def test_garbled_gzip_is_named(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", scan((30, 30, 30)), np.eye(4))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(bytes(content))
    assert "damaged" in complaint(read, path)


def test_an_uncompressed_file_called_gz_is_named(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", scan(), np.eye(4)).rename(tmp_path / "a.nii.gz")
    assert str(path) in complaint(read, path)


def test_unreadable_files_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "a.nii", scan(), np.eye(4))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "permission" in complaint(read, path)


def test_nan_and_infinite_voxels_are_counted(tmp_path: Path) -> None:
    data = scan()
    data[0, 0, :2], data[1, 1, 1] = np.nan, np.inf
    path = nifti(tmp_path / "a.nii.gz", data, np.eye(4))
    message = complaint(read, path)
    assert str(path) in message and "3 of 210 voxels" in message
    assert np.isnan(read(path, finite=False).data).sum() == 2


def test_numbers_beyond_float32_are_reported_as_infinite(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.full((2, 2, 2), 1e300), np.eye(4))
    assert "8 of 8 voxels" in complaint(read, path)


@pytest.mark.parametrize("value", [0.0, -1000.0])
def test_a_constant_image_is_called_empty(tmp_path: Path, value: float) -> None:
    volume = read(nifti(tmp_path / "a.nii.gz", np.full((3, 4, 5), value, np.float32), np.eye(4)))
    message = complaint(check_image, volume)
    assert str(tmp_path / "a.nii.gz") in message and f"every voxel is {value:g}" in message
    check_image(volume.like(scan((3, 4, 5))))


def test_an_empty_channel_is_named() -> None:
    volume = Volume(np.stack([scan(), np.zeros((5, 6, 7), np.float32)]), np.eye(4))
    assert "channel 1" in complaint(check_image, volume)


@pytest.mark.parametrize("shape", [(6, 5, 1), (1, 6, 5), (6, 1, 5)])
def test_a_slice_given_to_a_3d_model_is_an_error(shape: tuple[int, ...]) -> None:
    assert "single slice" in complaint(require_3d, Volume(scan(shape)[None], np.eye(4)))
    require_3d(Volume(scan()[None], np.eye(4)))


def test_time_series_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(scan((3, 4, 5, 12)), np.eye(4)), path)
    message = complaint(read, path)
    assert str(path) in message and "12 time points" in message and "pick one" in message


def test_mismatched_channels_are_named(tmp_path: Path) -> None:
    first = nifti(tmp_path / "a.nii", scan((5, 6, 7)), np.eye(4))
    smaller = nifti(tmp_path / "b.nii", scan((5, 6, 6)), np.eye(4))
    moved = nifti(tmp_path / "c.nii", scan((5, 6, 7)), np.diag([1.0, 1, 1.2, 1]))
    message = complaint(read, [first, smaller])
    assert str(first) in message and str(smaller) in message and "5 × 6 × 6" in message
    assert "1.3 mm" in complaint(read, [first, moved])  # the far edge, at 6.5 voxels


def test_a_label_map_on_another_grid_is_an_error_and_rounding_is_not() -> None:
    image = Volume(scan((50, 60, 70))[None], oblique_affine())
    rounded = Volume(image.data, image.affine.astype(np.float32))
    require_same_grid(image, rounded)
    shift = np.eye(4)
    shift[0, 3] = 0.5
    assert "0.35 mm" in complaint(require_same_grid, image, Volume(image.data, image.affine @ shift))
    flipped = image.affine @ np.diag([-1.0, 1, 1, 1])
    assert "affine" in complaint(require_same_grid, image, Volume(image.data, flipped))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ([[0, 0, 0], [0, 1, 0], [0, 0, 1]], "spacing 0 × 1 × 1 mm"),
        ([[1, 1, 0], [0, 0, 0], [0, 0, 1]], "singular affine"),
        ([[np.nan, 0, 0], [0, 1, 0], [0, 0, 1]], "NaN"),
    ],
)
def test_an_affine_without_inverse_is_an_error(tmp_path: Path, columns: list[Any], problem: str) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((3, 4, 5))
    header.set_data_dtype(np.float32)
    header["sform_code"] = 1
    for name, row in zip(("srow_x", "srow_y", "srow_z"), columns, strict=True):
        header[name] = [*row, 0.0]
    header["vox_offset"], header["magic"] = 352, b"n+1"
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + scan((3, 4, 5)).tobytes())
    message = complaint(read, tmp_path / "a.nii")
    assert str(tmp_path / "a.nii") in message and problem in message


def test_colour_nifti_is_an_error(tmp_path: Path) -> None:
    rgb = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "a.nii.gz")
    assert "RGB colour" in complaint(read, tmp_path / "a.nii.gz")


def test_complex_nifti_is_an_error(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.complex64), np.eye(4)), tmp_path / "a.nii.gz")
    assert "complex64" in complaint(read, tmp_path / "a.nii.gz")


def test_fractions_are_no_labels(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.full((2, 2, 2), 1.5), np.eye(4))
    message = complaint(read_labels, path)
    assert str(path) in message and "1.5" in message


def test_several_channels_are_no_label_map(tmp_path: Path) -> None:
    Volume(np.ones((2, 3, 3, 3), np.uint8), np.eye(4)).save(tmp_path / "a.nii")
    assert "2 channels" in complaint(read_labels, tmp_path / "a.nii")


# --- DICOM ---


def test_several_dicom_series_are_listed(tmp_path: Path) -> None:
    one = write_dicom_series(tmp_path, scan((6, 5, 4), dtype="int16"), description="T1 axial")
    two = write_dicom_series(tmp_path, scan((6, 5, 3), dtype="int16"), description="Localizer")
    message = complaint(read, tmp_path)
    assert str(tmp_path) in message and "2 series" in message and "choose one with series=" in message
    assert f"'T1 axial' (CT, 4 slices, UID {one})" in message
    assert f"'Localizer' (CT, 3 slices, UID {two})" in message
    assert "'T3'" in complaint(read, tmp_path, series="T3")


def test_a_folder_without_dicom_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert f"{tmp_path}: no DICOM" in complaint(read, tmp_path)


def test_missing_dicom_slices_are_noticed(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, scan((6, 5, 9), dtype="int16"), skip=(4,))
    message = complaint(read, tmp_path)
    assert "5 mm after slice 4" in message and "usually 2.5 mm" in message


def test_repeated_dicom_positions_are_noticed(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, scan((6, 5, 4), dtype="int16"), description="echo")
    write_dicom_series(
        tmp_path, scan((6, 5, 4), dtype="int16"), description="echo 2", SeriesDescription="echo"
    )
    uid_of_all = "1.2.3"
    for file in tmp_path.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID = uid_of_all
        dataset.save_as(file)
    assert "4 of 8 slices" in complaint(read, tmp_path)


def test_dicom_slices_of_different_direction_are_noticed(tmp_path: Path) -> None:
    uid = "1.2.3"
    write_dicom_series(tmp_path, scan((6, 5, 2), dtype="int16"), SeriesInstanceUID=uid)
    sagittal = (0, 1, 0, 0, 0, -1)
    write_dicom_series(
        tmp_path, scan((6, 5, 2), dtype="int16"), description="B", rows_along=sagittal, SeriesInstanceUID=uid
    )
    assert "direction" in complaint(read, tmp_path)


@pytest.mark.parametrize("heights_mm", [(0, 2, 4, 10), (0, 2, 0, 2)])
def test_enhanced_dicom_that_is_not_one_even_stack_is_an_error(
    tmp_path: Path, heights_mm: tuple[float, ...]
) -> None:
    write_enhanced_dicom(tmp_path / "a.dcm", np.ones((6, 5, 4), np.uint16), heights_mm)
    assert "not one even stack" in complaint(read, tmp_path / "a.dcm")


def test_truncated_dicom_slices_are_noticed(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, scan((60, 50, 3), dtype="int16"))
    file = sorted(tmp_path.iterdir())[1]
    file.write_bytes(file.read_bytes()[:-3000])
    assert str(tmp_path) in complaint(read, tmp_path)


# --- pictures and writing ---


def test_multi_page_tiff_is_an_error(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((4, 5), k, np.uint8)) for k in range(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    assert "3 pages" in complaint(read, tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.nii.bz2"])
def test_unknown_output_types_are_an_error(tmp_path: Path, name: str) -> None:
    assert "cannot write this file type" in complaint(Volume(scan()[None], np.eye(4)).save, tmp_path / name)


def test_what_does_not_fit_a_picture_is_an_error(tmp_path: Path) -> None:
    assert "one 2D slice" in complaint(Volume(scan()[None], np.eye(4)).save, tmp_path / "a.png")
    assert "whole numbers" in complaint(Volume(scan((1, 4, 5, 1)), np.eye(4)).save, tmp_path / "a.png")
    negative = np.full((1, 4, 5, 1), -1, np.int16)
    assert "0 to 65535" in complaint(Volume(negative, np.eye(4)).save, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    old = Volume(scan()[None], np.eye(4))
    old.save(path)
    monkeypatch.setattr(gzip.GzipFile if suffix == ".nii.gz" else nib.Nifti1Image, *_breaking(suffix))
    message = complaint(Volume(scan(seed=5)[None], np.eye(4)).save, path)
    monkeypatch.undo()
    assert str(path) in message and "No space left" in message
    assert os.listdir(tmp_path) == [path.name]
    assert np.array_equal(read(path).data, old.data)


def _breaking(suffix: str) -> tuple[str, Callable[..., None]]:
    return ("write" if suffix == ".nii.gz" else "to_filename"), full_disk


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Volume(scan()[None], np.eye(4)).save(tmp_path / "a.nii.gz")
    assert os.listdir(tmp_path) == []


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for name in ("a.nii.gz", "a.nrrd"):
        assert "cannot be written" in complaint(Volume(scan()[None], np.eye(4)).save, tmp_path / "out" / name)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room; to run it: Linux")
@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".tiff"])
def test_a_really_full_device_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import genmed.volume as module

    monkeypatch.setattr(module.uuid, "uuid4", lambda: type("Fixed", (), {"hex": "fixed"}))
    (tmp_path / f".fixed.tmp{suffix}").symlink_to("/dev/full")
    shape = (1, 64, 64, 1) if suffix == ".tiff" else (1, 32, 32, 32)
    assert "cannot be written" in complaint(Volume(scan(shape), np.eye(4)).save, tmp_path / f"a{suffix}")
    assert os.listdir(tmp_path) == []
