"""What `Volume` promises: geometry, types, names and codes survive every file format."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from genmed.volume import Grid, Volume, read, read_labels

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rotation(seed: int) -> np.ndarray:
    """A proper rotation (3, 3)."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.linalg.det(q)


def oblique_affine(seed: int = 0, spacing: tuple[float, ...] = (0.7, 1.3, 5.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed) * spacing
    affine[:3, 3] = (-31.5, 12.25, 104.0)
    return affine


def scan(shape: tuple[int, ...] = (5, 6, 7), seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 100).astype(dtype)


def write_dicom_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    description: str = "Ax",
    rows_along: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    step_mm: tuple[float, ...] = (0, 0, 2.5),
    origin_mm: tuple[float, ...] = (-100.5, 20.0, 7.25),
    skip: tuple[int, ...] = (),
    slope: tuple[float, ...] = (1.0,),
    intercept: float = 0.0,
    **tags: object,
) -> str:
    """Write int16 voxels (x, y, z) as one file per slice with shuffled names; gives the series UID."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    names = np.random.default_rng(len(description)).permutation(voxels.shape[2])
    for k in range(voxels.shape[2]):
        if k in skip:
            continue
        dataset = pydicom.Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = uid, generate_uid()
        dataset.SeriesDescription, dataset.SeriesNumber, dataset.Modality = description, 7, "CT"
        dataset.Columns, dataset.Rows = voxels.shape[:2]
        dataset.PixelSpacing, dataset.SliceThickness = [0.9, 0.6], 2.5  # between rows, between columns
        dataset.ImageOrientationPatient = list(rows_along)
        dataset.ImagePositionPatient = [o + k * s for o, s in zip(origin_mm, step_mm, strict=True)]
        dataset.InstanceNumber = int(names[k])
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept = slope[k % len(slope)], intercept
        dataset.PixelData = np.ascontiguousarray(voxels[:, :, k].T, dtype="<i2").tobytes()
        for name, value in tags.items():
            setattr(dataset, name, value)
        dataset.save_as(folder / f"{description}_{names[k]:03d}", enforce_file_format=True)
    return str(uid)


def write_enhanced_dicom(path: Path, voxels: np.ndarray, heights_mm: Sequence[float]) -> None:
    """Write uint16 voxels (x, y, z) as one enhanced MR file with a frame at every height."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = EnhancedMRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    dataset.Columns, dataset.Rows, dataset.NumberOfFrames = voxels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.Modality = 15, 0, "MR"
    direction, spacing, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    direction.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    spacing.PixelSpacing, spacing.SliceThickness = [0.9, 0.6], 2.5
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [direction], [spacing]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for height in heights_mm:
        position, frame = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = [10, 20, height]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = np.ascontiguousarray(voxels.T, dtype="<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


def nifti(path: Path, data: np.ndarray, affine: np.ndarray, sform: int = 1, qform: int = 1) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


# --- NIfTI ---


@quick
@given(seed=st.integers(0, 10_000), sform=st.integers(0, 4), qform=st.integers(0, 4))
def test_output_grid_is_bit_equal_to_input(tmp_path: Path, seed: int, sform: int, qform: int) -> None:
    source = nifti(tmp_path / "in.nii.gz", scan(seed=seed), oblique_affine(seed), sform, qform)
    volume = read(source)
    volume.like(volume.data > 0).save(tmp_path / "out.nii.gz")
    before, after = nib.load(source), nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(before.affine, after.affine)
    assert np.array_equal(read(tmp_path / "out.nii.gz").affine, volume.affine)
    for name in ("sform_code", "qform_code", "xyzt_units"):
        assert before.header[name] == after.header[name]
    for name in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "pixdim"):
        assert np.array_equal(before.header[name], after.header[name])


def test_differing_qform_and_sform_both_survive(tmp_path: Path) -> None:
    image = nib.Nifti1Image(scan(), None)
    image.set_sform(oblique_affine(1), 2)
    image.set_qform(oblique_affine(2), 1)
    nib.save(image, tmp_path / "in.nii")
    volume = read(tmp_path / "in.nii")
    volume.like(volume.data).save(tmp_path / "out.nii.gz")
    after = nib.load(tmp_path / "out.nii.gz").header
    assert np.array_equal(after.get_sform(), image.header.get_sform())
    assert np.array_equal(after.get_qform(), image.header.get_qform())
    assert (int(after["sform_code"]), int(after["qform_code"])) == (2, 1)


@pytest.mark.parametrize("image_class", [nib.Nifti2Image, nib.Nifti1Pair])
def test_other_nifti_kinds_keep_their_grid_and_codes(tmp_path: Path, image_class: type) -> None:
    image = image_class(scan(), oblique_affine(3))
    image.set_sform(oblique_affine(3), 3)
    image.set_qform(oblique_affine(3), 2)
    path = tmp_path / ("in.img" if image_class is nib.Nifti1Pair else "in.nii")
    nib.save(image, path)
    volume = read(path)
    volume.like(volume.data).save(tmp_path / "out.nii.gz")
    after = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(after.affine, nib.load(path).affine)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (3, 2)
    assert np.array_equal(read(tmp_path / "out.nii.gz").data, image.get_fdata(dtype=np.float32)[None])


def test_volume_without_header_is_saved_in_scanner_millimetres(tmp_path: Path) -> None:
    Volume(scan()[None], oblique_affine()).save(tmp_path / "out.nii")
    header = nib.load(tmp_path / "out.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    assert np.allclose(header.get_sform(), oblique_affine(), atol=1e-5)
    assert np.allclose(header.get_qform(), oblique_affine(), atol=1e-4)


def test_new_affine_under_an_old_header_wins(tmp_path: Path) -> None:
    source = read(nifti(tmp_path / "in.nii", scan(), oblique_affine(1), 2, 3))
    Volume(source.data, oblique_affine(5), header=source.header).save(tmp_path / "out.nii")
    header = nib.load(tmp_path / "out.nii").header
    assert np.allclose(header.get_sform(), oblique_affine(5), atol=1e-5)
    assert np.allclose(header.get_qform(), oblique_affine(5), atol=1e-4)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 3)


def test_micrometre_headers_are_read_in_millimetres_and_kept(tmp_path: Path) -> None:
    image = nib.Nifti1Image(scan(), oblique_affine(1, (50.0, 50.0, 80.0)))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "in.nii")
    volume = read(tmp_path / "in.nii")
    assert np.allclose(volume.spacing_mm, (0.05, 0.05, 0.08))
    assert np.allclose(sitk.ReadImage(str(tmp_path / "in.nii")).GetSpacing(), volume.spacing_mm)
    volume.like(volume.data).save(tmp_path / "out.nii")
    assert np.array_equal(nib.load(tmp_path / "out.nii").affine, nib.load(tmp_path / "in.nii").affine)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_voxel_type_and_values_survive_a_round_trip(tmp_path: Path, dtype: str, suffix: str) -> None:
    data = np.abs(scan()).astype(dtype)[None]
    Volume(data, oblique_affine()).save(tmp_path / f"a{suffix}")
    after = read(tmp_path / f"a{suffix}").data
    assert after.dtype == dtype and after.dtype.isnative
    assert np.array_equal(after, data)
    assert after.flags.writeable


@pytest.mark.parametrize(
    ("largest", "stored"), [(1, "uint8"), (255, "uint8"), (256, "int16"), (70_000, "int32")]
)
def test_labels_are_stored_in_the_smallest_type(tmp_path: Path, largest: int, stored: str) -> None:
    data = np.zeros((1, 3, 4, 5), dtype=np.int64)
    data[0, 1, 2, 3] = largest
    Volume(data, np.eye(4), {largest: "organ"}).save(tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == stored
    assert np.array_equal(read(tmp_path / "a.nii.gz").data, data)


def test_file_scaling_is_applied_once(tmp_path: Path) -> None:
    raw = scan(dtype="int16")
    image = nib.Nifti1Image(raw, oblique_affine())
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "in.nii.gz")
    volume = read(tmp_path / "in.nii.gz")
    assert volume.data.dtype == np.float32
    assert np.allclose(volume.data[0], nib.load(tmp_path / "in.nii.gz").get_fdata())
    volume.save(tmp_path / "out.nii.gz")
    assert np.array_equal(read(tmp_path / "out.nii.gz").data, volume.data)


def test_big_endian_files_read_as_native_numbers(tmp_path: Path) -> None:
    for dtype in (">i2", ">f4"):
        data = scan(dtype=dtype)
        image = nib.Nifti1Image(data, np.eye(4), nib.Nifti1Header(endianness=">"))
        image.header.set_data_dtype(dtype)
        nib.save(image, tmp_path / "big.nii")
        volume = read(tmp_path / "big.nii")
        assert volume.data.dtype.isnative and np.array_equal(volume.data[0], data)
        volume.like(volume.data).save(tmp_path / "out.nii")
        assert np.array_equal(read(tmp_path / "out.nii").data[0], data)


def test_label_names_travel_in_the_header(tmp_path: Path) -> None:
    names = {1: "left kidney", 2: "tumour <high & wide>", 7: "Knöchel"}
    data = np.array([0, 1, 2, 7], dtype=np.uint8).reshape(1, 2, 2, 1)
    for path in (tmp_path / "a.nii.gz", tmp_path / "a.nrrd"):
        Volume(data, np.eye(4), names).save(path)
        assert read(path).label_names == names


def test_label_names_are_totalsegmentators_xml_in_extension_code_0(tmp_path: Path) -> None:
    Volume(np.ones((1, 2, 2, 2), np.uint8), np.eye(4), {1: "liver"}).save(tmp_path / "a.nii.gz")
    (extension,) = nib.load(tmp_path / "a.nii.gz").header.extensions
    assert extension.get_code() == 0
    content = extension.get_content()
    text = content if isinstance(content, str) else content.decode()
    assert '<Label Key="1"' in text and "<![CDATA[liver]]></Label>" in text
    assert text.index("<CaretExtension>") < text.index("<VolumeInformation") < text.index("<LabelTable>")


def test_label_names_written_by_totalsegmentator_are_read(tmp_path: Path) -> None:
    colour = 'Red="1.0" Green="0.0" Blue="0.0" Alpha="1"'
    xml = (  # the layout of totalsegmentator/nifti_ext_header.py
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  '
        "<Date><![CDATA[2013-07-14T05:45:09]]></Date>   "
        '<VolumeInformation Index="0">   <LabelTable>\n'
        f'<Label Key="1" {colour}><![CDATA[spleen]]></Label>\n'
        f'<Label Key="2" {colour}><![CDATA[kidney_right]]></Label>\n\n'
        "  </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  "
        "<VolumeType><![CDATA[Label]]></VolumeType>   </VolumeInformation></CaretExtension>\n              "
    )
    image = nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    nib.save(image, tmp_path / "a.nii.gz")
    assert read(tmp_path / "a.nii.gz").label_names == {1: "spleen", 2: "kidney_right"}


def test_an_image_saved_like_a_label_map_carries_no_label_names(tmp_path: Path) -> None:
    Volume(np.ones((1, 2, 2, 2), np.uint8), np.eye(4), {1: "liver"}).save(tmp_path / "a.nii.gz")
    labels = read(tmp_path / "a.nii.gz")
    labels.like(labels.data * 0.5).save(tmp_path / "b.nii.gz")
    assert read(tmp_path / "b.nii.gz").label_names == {}


def test_broken_label_names_are_ignored(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, b"<LabelTable><Label Key='1'>x"))
    nib.save(image, tmp_path / "a.nii.gz")
    assert read(tmp_path / "a.nii.gz").label_names == {}


def test_label_maps_stored_as_floats_become_integers(tmp_path: Path) -> None:
    data = np.arange(8, dtype=np.float64).reshape(2, 2, 2)
    labels = read_labels(nifti(tmp_path / "a.nii", data, np.eye(4)))
    assert labels.data.dtype == np.uint8 and np.array_equal(labels.data[0], data)


def test_several_files_become_the_channels(tmp_path: Path) -> None:
    first = nifti(tmp_path / "a.nii", scan(seed=1), oblique_affine())
    second = nifti(tmp_path / "b.nii", scan(seed=2, dtype="int16"), oblique_affine())
    volume = read([first, second])
    assert volume.data.dtype == np.float32
    assert np.array_equal(volume.data, np.stack([scan(seed=1), scan(seed=2, dtype="int16")]))
    assert volume.path == first


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_channels_survive_a_round_trip(tmp_path: Path, suffix: str) -> None:
    data = scan((3, 4, 5, 6))
    Volume(data, oblique_affine()).save(tmp_path / f"a{suffix}")
    after = read(tmp_path / f"a{suffix}")
    assert np.array_equal(after.data, data)
    assert np.allclose(after.affine, oblique_affine(), atol=1e-5)


def test_a_fourth_axis_can_be_taken_as_channels(tmp_path: Path) -> None:
    data = scan((4, 5, 6, 2))
    volume = read(nifti(tmp_path / "a.nii", data, np.eye(4)), fourth_axis="channels")
    assert np.array_equal(volume.data, np.moveaxis(data, -1, 0))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_missing_and_trailing_axes_of_length_one_do_not_matter(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    image = nib.Nifti1Image(scan(shape), np.eye(4))
    nib.save(image, tmp_path / "a.nii")
    data = read(tmp_path / "a.nii").data
    assert np.array_equal(data, scan(shape).reshape(1, 4, 5, -1))


def test_freesurfer_volumes_are_read(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(scan(), oblique_affine()), tmp_path / "a.mgz")
    volume = read(tmp_path / "a.mgz")
    assert np.array_equal(volume.data[0], scan())
    assert np.allclose(volume.affine, oblique_affine(), atol=1e-4)
    volume.like(volume.data).save(tmp_path / "b.nii")
    assert np.allclose(read(tmp_path / "b.nii").affine, volume.affine, atol=1e-5)


# --- NRRD ---


@quick
@given(seed=st.integers(0, 10_000), mirror=st.booleans())
def test_nrrd_keeps_oblique_anisotropic_geometry(tmp_path: Path, seed: int, mirror: bool) -> None:
    affine = oblique_affine(seed) @ np.diag([-1.0 if mirror else 1.0, 1, 1, 1])
    Volume(scan(seed=seed)[None], affine).save(tmp_path / "a.nrrd")
    after = read(tmp_path / "a.nrrd")
    assert np.allclose(after.affine, affine, atol=1e-9)
    assert np.array_equal(after.data[0], scan(seed=seed))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_files_agree_with_itks_own_nifti(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(scan((4, 5, 6)))
    image.SetSpacing((0.5, 1.5, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(rotation(4).ravel().tolist())
    for name in (f"a{suffix}", "a.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))
    ours, itks = read(tmp_path / f"a{suffix}"), read(tmp_path / "a.nii.gz")
    assert np.allclose(ours.affine, itks.affine, atol=1e-4)
    assert np.array_equal(ours.data, itks.data)


def test_nrrd_written_here_lies_in_itk_where_nifti_does(tmp_path: Path) -> None:
    volume = Volume(scan()[None], oblique_affine(8))
    volume.save(tmp_path / "a.nrrd")
    volume.save(tmp_path / "a.nii")
    nrrd, nii = (sitk.ReadImage(str(tmp_path / name)) for name in ("a.nrrd", "a.nii"))
    assert np.array_equal(sitk.GetArrayFromImage(nrrd), sitk.GetArrayFromImage(nii))
    index = (3, 2, 5)
    there = nii.TransformIndexToPhysicalPoint(index)
    assert np.allclose(nrrd.TransformIndexToPhysicalPoint(index), there, atol=1e-3)
    x, y, z = (volume.affine @ [*index, 1])[:3]
    assert np.allclose(there, (-x, -y, z), atol=1e-3)


# --- DICOM ---


@pytest.mark.parametrize(
    ("rows_along", "step"),
    [
        ((1, 0, 0, 0, 1, 0), (0, 0, 2.5)),  # axial
        ((0, 1, 0, 0, 0, -1), (-2.5, 0, 0)),  # sagittal
        ((1, 0, 0, 0, 0, -1), (0, 2.5, 0)),  # coronal
        ((0.8, 0.6, 0, -0.6, 0.8, 0), (0, 0, 2.5)),  # oblique in plane
    ],
)
def test_dicom_series_agrees_with_itk(
    tmp_path: Path, rows_along: tuple[float, ...], step: tuple[float, ...]
) -> None:
    voxels = scan((6, 5, 4), dtype="int16")
    write_dicom_series(tmp_path, voxels, rows_along=rows_along, step_mm=step)
    volume = read(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    sitk.WriteImage(reader.Execute(), str(tmp_path / "itk.nii"))
    itks = read(tmp_path / "itk.nii")
    assert np.allclose(volume.affine, itks.affine, atol=1e-4)
    assert np.array_equal(volume.data, itks.data)
    assert volume.data.dtype == np.int16
    assert np.allclose(volume.spacing_mm, (0.6, 0.9, 2.5))


def test_dicom_slices_are_sorted_by_position_not_by_name(tmp_path: Path) -> None:
    voxels = scan((6, 5, 9), dtype="int16")
    write_dicom_series(tmp_path, voxels, origin_mm=(-1.0, -2.0, 3.0))
    volume = read(tmp_path)
    assert np.array_equal(volume.data[0], voxels)
    assert np.allclose(volume.affine @ [0, 0, 0, 1], (1.0, 2.0, 3.0, 1.0))
    assert np.allclose(volume.affine @ [5, 4, 8, 1], (1 - 5 * 0.6, 2 - 4 * 0.9, 3 + 8 * 2.5, 1.0))


@pytest.mark.parametrize(("told", "expected"), [(1.5, 1.5), (2.5, 2.5), (2.51, 2.5), (4.0, None), (None, None)])
def test_the_slice_thickness_of_a_dicom_header_is_kept_unless_slices_overlap(
    tmp_path: Path, told: float | None, expected: float | None
) -> None:
    write_dicom_series(tmp_path, scan((6, 5, 4), dtype="int16"), SliceThickness=told)
    volume = read(tmp_path)
    assert volume.slice_thickness_mm == (None if expected is None else pytest.approx(expected))
    assert volume.like(volume.data).slice_thickness_mm == volume.slice_thickness_mm


def test_slices_that_tell_several_thicknesses_tell_none(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, scan((6, 5, 4), dtype="int16"))
    tags = pydicom.dcmread(file := next(tmp_path.iterdir()))
    tags.SliceThickness = 2.0
    tags.save_as(file)
    assert read(tmp_path).slice_thickness_mm is None


def test_the_slice_thickness_of_an_enhanced_file_is_kept(tmp_path: Path) -> None:
    write_enhanced_dicom(tmp_path / "a.dcm", scan((6, 5, 4), dtype="uint16"), [0, 3, 6, 9])
    assert read(tmp_path / "a.dcm").slice_thickness_mm == 2.5


def test_one_of_several_dicom_series_can_be_chosen(tmp_path: Path) -> None:
    first, second = scan((6, 5, 4), 1, "int16"), scan((6, 5, 3), 2, "int16")
    write_dicom_series(tmp_path / "1", first, description="T1 axial")
    uid = write_dicom_series(tmp_path / "2", second, description="T2 axial", SeriesNumber=11)
    for name in ("T2 axial", "11", uid):
        assert np.array_equal(read(tmp_path, series=name).data[0], second)
    assert np.array_equal(read(tmp_path, series="T1 axial").data[0], first)


def test_dicom_rescaling_that_differs_between_slices_is_applied(tmp_path: Path) -> None:
    voxels = scan((6, 5, 4), dtype="int16")
    write_dicom_series(tmp_path, voxels, slope=(1.0, 0.25), intercept=-10.0)
    expected = voxels * np.array([1.0, 0.25, 1.0, 0.25]) - 10
    volume = read(tmp_path)
    assert volume.data.dtype == np.float32
    assert np.allclose(volume.data[0], expected)


def test_dicom_hounsfield_units_stay_integers(tmp_path: Path) -> None:
    voxels = np.abs(scan((6, 5, 4), dtype="int16"))
    write_dicom_series(tmp_path, voxels, intercept=-1024.0)
    volume = read(tmp_path)
    assert volume.data.dtype.kind == "i" and np.array_equal(volume.data[0], voxels - 1024)


def test_tilted_gantry_gives_a_sheared_affine(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, scan((6, 5, 4), dtype="int16"), step_mm=(0, 0.5, 2.5), origin_mm=(0, 0, 0))
    assert np.allclose(read(tmp_path).affine[:3, 2], (0, -0.5, 2.5))


@pytest.mark.parametrize("step_mm", [2.5, 4.0, -2.5])
def test_enhanced_dicom_is_read_frame_by_frame(tmp_path: Path, step_mm: float) -> None:
    voxels = np.abs(scan((6, 5, 4))).astype(np.uint16)
    write_enhanced_dicom(tmp_path / "a.dcm", voxels, [30 + k * step_mm for k in range(4)])
    volume = read(tmp_path / "a.dcm")
    assert np.array_equal(volume.data[0], voxels)
    assert np.allclose(volume.affine @ [5, 4, 3, 1], (-10 - 5 * 0.6, -20 - 4 * 0.9, 30 + 3 * step_mm, 1))


def test_a_single_dicom_file_is_one_slice(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, scan((6, 5, 1), dtype="int16"))
    (file,) = tmp_path.iterdir()
    volume = read(file)
    assert volume.data.shape == (1, 6, 5, 1)
    assert np.allclose(volume.spacing_mm, (0.6, 0.9, 2.5))


def test_other_files_in_a_dicom_folder_do_not_matter(tmp_path: Path) -> None:
    voxels = scan((6, 5, 4), dtype="int16")
    write_dicom_series(tmp_path, voxels)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty").touch()
    assert np.array_equal(read(tmp_path).data[0], voxels)


# --- PNG and TIFF ---


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pictures_survive_a_round_trip_and_agree_with_itk(tmp_path: Path, suffix: str, dtype: str) -> None:
    rows = np.abs(scan((6, 9))).astype(dtype)
    Image.fromarray(rows).save(tmp_path / f"a{suffix}")
    volume = read(tmp_path / f"a{suffix}")
    assert volume.data.shape == (1, 9, 6, 1) and volume.data.dtype == dtype
    assert np.array_equal(volume.data[0, :, :, 0].T, rows)
    volume.save(tmp_path / f"b{suffix}")
    assert np.array_equal(np.array(Image.open(tmp_path / f"b{suffix}")), rows)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"b{suffix}"))), rows)
    assert np.array_equal(volume.affine, np.diag([-1, -1, 1, 1]))


def test_float_slices_fit_into_tiff(tmp_path: Path) -> None:
    data = scan((1, 9, 6, 1))
    Volume(data, np.eye(4)).save(tmp_path / "a.tif")
    assert np.array_equal(read(tmp_path / "a.tif").data, data)


def test_grey_pictures_saved_in_colour_have_one_channel(tmp_path: Path) -> None:
    rows = np.abs(scan((6, 9))).astype("uint8")
    Image.fromarray(rows).convert("RGBA").save(tmp_path / "grey.png")
    assert np.array_equal(read(tmp_path / "grey.png").data[0, :, :, 0].T, rows)
    Image.fromarray(np.stack([rows, rows // 2, rows], -1)).save(tmp_path / "colour.png")
    assert read(tmp_path / "colour.png").data.shape == (3, 9, 6, 1)


def test_palette_label_maps_keep_their_indices(tmp_path: Path) -> None:
    rows = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    picture = Image.fromarray(rows).convert("P")
    picture.putdata(rows.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "labels.png")
    assert np.array_equal(read_labels(tmp_path / "labels.png").data[0, :, :, 0].T, rows)


# --- Volume and Grid ---


def test_spacing_and_corners_are_in_millimetres() -> None:
    grid = Grid((10, 20, 4), np.diag([2.0, 3.0, 5.0, 1.0]))
    assert grid.spacing_mm == (2.0, 3.0, 5.0)
    assert np.array_equal(grid.corners_mm().min(axis=0), (-1.0, -1.5, -2.5))
    assert np.array_equal(grid.corners_mm().max(axis=0), (19.0, 58.5, 17.5))


def test_like_refuses_data_of_another_shape() -> None:
    with pytest.raises(ValueError, match="does not lie on the grid"):
        Volume(scan()[None], np.eye(4)).like(scan((2, 2, 2)))


def test_saving_leaves_one_file_and_makes_the_folder(tmp_path: Path) -> None:
    Volume(scan()[None], np.eye(4)).save(tmp_path / "new" / "folder" / "a.nii.gz")
    assert os.listdir(tmp_path / "new" / "folder") == ["a.nii.gz"]


def test_same_volume_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        Volume(scan()[None], np.eye(4)).save(tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_importing_volume_loads_no_heavy_library() -> None:
    code = "import sys, genmed.space, genmed.volume; print({'torch', 'SimpleITK'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
