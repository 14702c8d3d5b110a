"""`convert`: public data sets, in the folders their authors publish, to nnU-Net v2 folders.

To add a set, write a function that yields its cases and add a row to `SETS`.
"""

import csv
import difflib
import gzip
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genmed.data.split import Split, write_split
from genmed.errors import GenMedError
from genmed.files import write_json
from genmed.progress import track
from genmed.volume import Volume, read, read_labels, require_same_grid

RECORD = "converted.json"
STAGING = ".converting-"
ENDING = ".nii.gz"

LabelMaker = Callable[[Volume], Volume]
"""The label map of an image, on its grid. A volume that still has its path is stored as that file is."""


@dataclass(frozen=True)
class Source:
    """One case as its authors publish it; the files need not exist."""

    id: str
    image: Path
    label: LabelMaker


@dataclass(frozen=True)
class PublicLayout:
    """How a public data set lies on disk.

    `cases` gets the folder, the modality and the names of the labels. `channels` maps modalities to channel
    names; the first one is the default. `labels` names the values 1, 2, ... unless the user chooses; none: a mask
    for each of many structures.
    """

    cases: Callable[[Path, str, Sequence[str]], Iterator[Source]]
    files: str
    channels: dict[str, str]
    labels: tuple[str, ...]
    licence: str
    reference: str


@dataclass(frozen=True)
class Outcome:
    """Ids of the cases converted now and before; failed ids with the reason, in one line."""

    folder: Path
    converted: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]


# The sets ---------------------------------------------------------------------------------------------------

HEART_V1 = (
    "heart_myocardium",
    "heart_atrium_left",
    "heart_ventricle_left",
    "heart_atrium_right",
    "heart_ventricle_right",
)
HEART_V2 = ("heart", "aorta", "inferior_vena_cava")
KITS_VALUES = {1: "kidney", 2: "tumor", 3: "cyst"}
ACDC_VALUES = {1: "RV", 2: "MYO", 3: "LV"}
MMWHS_VALUES = {500: "LV", 600: "RV", 420: "LA", 421: "LA", 550: "RA", 205: "MYO", 820: "AO", 850: "PA"}
MSCMR_VALUES = {600: "RV", 200: "MYO", 500: "LV"}
MSCMR_NAMES = {"lge": ("LGE", "DE"), "c0": ("C0",), "t2": ("T2",)}


def totalsegmentator(src: Path, modality: str, structures: Sequence[str]) -> Iterator[Source]:
    """TotalSegmentator: sNNNN/ct.nii.gz (MR set: mri.nii.gz) and a mask per structure in sNNNN/segmentations.

    Where masks overlap, the later structure wins, as in the authors' own resources/convert_dataset_to_nnunet.py
    (https://github.com/wasserth/TotalSegmentator). CT: https://zenodo.org/records/10047292 (v2) and 6802614 (v1);
    MR: https://zenodo.org/records/14710732.
    """
    for folder in _folders(src, "s[0-9]*"):
        masks = [_nifti(folder / "segmentations" / structure) for structure in structures]
        yield Source(folder.name, _nifti(folder / {"ct": "ct", "mr": "mri"}[modality]), combined(masks))


def mmwhs(src: Path, modality: str, labels: Sequence[str]) -> Iterator[Source]:
    """MM-WHS 2017: ct_train/ct_train_1001_image.nii.gz with _label.nii.gz, and mr_train alike.

    Some copies of the set are in several folders, ct_train1 and ct_train2. Label values as in Zhuang et al., Medical
    Image Analysis 58 (2019) 101537; they stand at http://www.zmic.org.cn/care_2024/track5/. One MR label map has some
    voxels of 421 for 420.
    """
    pattern = rf"({modality}_train_\d+)_(?:image|label)\.nii(?:\.gz)?"
    files = [path for folder in (src, *_folders(src, f"{modality}_train*")) for path in folder.glob("*")]
    for folder, id in sorted({(path.parent, match[1]) for path, match in _named(files, pattern)}):
        label = recoded(_nifti(folder / f"{id}_label"), numbered(MMWHS_VALUES, labels))
        yield Source(id, _nifti(folder / f"{id}_image"), label)


def kits23(src: Path, modality: str, labels: Sequence[str]) -> Iterator[Source]:
    """KiTS23: case_NNNNN/imaging.nii.gz and segmentation.nii.gz, in dataset/ of https://github.com/neheller/kits23."""
    for folder in _folders(_inside(src, "dataset"), "case_*"):
        label = recoded(_nifti(folder / "segmentation"), numbered(KITS_VALUES, labels))
        yield Source(folder.name, _nifti(folder / "imaging"), label)


def acdc(src: Path, modality: str, labels: Sequence[str]) -> Iterator[Source]:
    """ACDC: patientNNN/patientNNN_frameNN.nii.gz with _gt.nii.gz, also below training/ and testing/.

    Info.cfg numbers the end-diastolic (ED) and end-systolic (ES) frame, which must both be there. The 4D
    series beside them is left out. https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html; Bernard et
    al., IEEE TMI 37 (2018) 2514.
    """
    for folder in [patient for part in (".", "training", "testing") for patient in _folders(src / part, "patient*")]:
        pattern = rf"({folder.name}_frame\d+)(?:_gt)?\.nii(?:\.gz)?"
        frames = {match[1] for _, match in _named(folder.glob("*"), pattern)}
        info = folder / "Info.cfg"
        text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
        frames |= {f"{folder.name}_frame{int(k):02d}" for k in re.findall(r"^E[DS]:\s*(\d+)", text, re.MULTILINE)}
        for frame in sorted(frames):
            label = recoded(_nifti(folder / f"{frame}_gt"), numbered(ACDC_VALUES, labels))
            yield Source(frame, _nifti(folder / frame), label)


def mscmrseg(src: Path, modality: str, labels: Sequence[str]) -> Iterator[Source]:
    """MS-CMRSeg 2019: subjectN_DE.nii.gz (late enhancement), _C0, _T2 and subjectN_DE_manual.nii.gz, in any folders.

    The challenge's own archive has patientN_LGE instead (c0t2lge/, lgegt/, ...). Images without a manual label
    map, most of them by design, are left out. https://zmiclab.github.io/mscmrseg19/; Zhuang et al., Medical
    Image Analysis 81 (2022) 102528.
    """
    pattern = rf"((?:subject|patient)\d+_(?:{'|'.join(MSCMR_NAMES[modality])}))(_manual)?\.nii(?:\.gz)?"
    found = _named(sorted(src.rglob("*.nii*")), pattern)
    for path, match in found:
        if match[2]:
            id = match[1]
            images = [image for image, other in found if other[1] == id and not other[2]]
            if len(images) > 1:
                raise GenMedError(f"{images[0]}: is also {images[1]}; give the folder of one of them.")
            label = recoded(path, numbered(MSCMR_VALUES, labels))
            yield Source(id, [*images, path.with_name(f"{id}{ENDING}")][0], label)


def la2018(src: Path, modality: str, labels: Sequence[str]) -> Iterator[Source]:
    """2018 atrial challenge: <ID>/lgemri.nrrd and laendo.nrrd (255 inside), also below "Training Set" and the like.

    https://www.cardiacatlas.org/atriaseg2018-challenge/atria-seg-data/; Xiong et al., arXiv:2004.12314.
    """
    patterns = [f"{depth}/{name}" for depth in ("*", "*/*") for name in ("lgemri.nrrd", "laendo.nrrd")]
    for folder in sorted({path.parent for pattern in patterns for path in src.glob(pattern)}):
        yield Source(folder.name, folder / "lgemri.nrrd", recoded(folder / "laendo.nrrd", {255: 1}))


SETS: dict[str, PublicLayout] = {
    "totalsegmentator": PublicLayout(
        totalsegmentator,
        files="sNNNN/ct.nii.gz (with --modality mr: sNNNN/mri.nii.gz)",
        channels={"ct": "CT", "mr": "MRI"},
        labels=(),
        licence="CT: CC-BY-4.0; MR: CC-BY-NC-SA-2.0",
        reference="CT: https://doi.org/10.1148/ryai.230024; MR: https://arxiv.org/abs/2405.19492",
    ),
    "mmwhs": PublicLayout(
        mmwhs,
        files="ct_train/ct_train_NNNN_image.nii.gz (with --modality mr: mr_train/...)",
        channels={"ct": "CT", "mr": "MRI"},
        labels=("LV", "RV", "LA", "RA", "MYO", "AO", "PA"),
        licence="terms of the MM-WHS challenge; not for redistribution",
        reference="https://doi.org/10.1016/j.media.2019.101537",
    ),
    "kits23": PublicLayout(
        kits23,
        files="case_NNNNN/imaging.nii.gz",
        channels={"ct": "CT"},
        labels=("kidney", "tumor", "cyst"),
        licence="CC-BY-NC-SA-4.0",
        reference="https://github.com/neheller/kits23",
    ),
    "acdc": PublicLayout(
        acdc,
        files="patientNNN/patientNNN_frameNN.nii.gz",
        channels={"mr": "cine MRI"},
        labels=("RV", "MYO", "LV"),
        licence="terms of the ACDC challenge, for non-commercial research",
        reference="https://doi.org/10.1109/TMI.2018.2837502",
    ),
    "mscmrseg": PublicLayout(
        mscmrseg,
        files="subjectN_DE.nii.gz with subjectN_DE_manual.nii.gz (with --modality c0 or t2: _C0 or _T2)",
        channels={"lge": "LGE MRI", "c0": "bSSFP MRI", "t2": "T2 MRI"},
        labels=("RV", "MYO", "LV"),
        licence="terms of the MS-CMRSeg challenge; not for redistribution",
        reference="https://doi.org/10.1016/j.media.2022.102528",
    ),
    "la2018": PublicLayout(
        la2018,
        files="ID/lgemri.nrrd",
        channels={"mr": "LGE MRI"},
        labels=("left atrium",),
        licence="terms of the 2018 Atrial Segmentation Challenge; not for redistribution",
        reference="https://arxiv.org/abs/2004.12314",
    ),
}


# Label makers -----------------------------------------------------------------------------------------------


def numbered(names: Mapping[int, str], labels: Sequence[str]) -> dict[int, int]:
    """Published value -> value 1, 2, ... of its name among the labels; names that are not wanted become 0."""
    return {value: labels.index(name) + 1 if name in labels else 0 for value, name in names.items()}


def recoded(path: Path, values: Mapping[int, int]) -> LabelMaker:
    """A label file whose values are replaced; 0 stays, and a value without a replacement is an error."""

    def label(image: Volume) -> Volume:
        found = _labels_on(image, path)
        known = np.isin(found.data, [0, *values])
        if not known.all():
            strange = ", ".join(str(value) for value in np.unique(found.data[~known])[:5])
            expected = ", ".join(str(value) for value in sorted({0, *values}))
            raise GenMedError(f"{path}: unknown label values {strange}, not {expected}; download the file again.")
        if all(old == new for old, new in values.items()):
            return found
        data = np.zeros(found.data.shape, np.uint8)
        for old, new in values.items():
            data[found.data == old] = new
        return image.like(data)

    return label


def combined(masks: Sequence[Path]) -> LabelMaker:
    """The masks as the values 1, 2, ... of one label map; where they overlap, the later one wins."""

    def label(image: Volume) -> Volume:
        data = np.zeros(image.grid.shape, np.uint8)
        for value, path in enumerate(masks, start=1):
            data[_labels_on(image, path).data[0] > 0] = value
        return image.like(data)

    return label


def _labels_on(image: Volume, path: Path) -> Volume:
    """The label file, which must lie on the image's grid."""
    _require_file(path)
    labels = read_labels(path)
    try:
        require_same_grid(image, labels)
    except GenMedError as error:
        if labels.grid.shape != image.grid.shape:
            raise
        what = str(error).rpartition("; ")[0]
        raise GenMedError(f"{what}; the voxels agree, so correct the wrong header in a copy of the set.") from error
    return labels


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise GenMedError(f"{path}: is missing; download it again or leave the case out.")


# Conversion -------------------------------------------------------------------------------------------------


def convert(
    name: str,
    src: str | Path,
    out: str | Path,
    modality: str | None = None,
    structures: Sequence[str] = (),
) -> Outcome:
    """Turn the folder of a public data set into an nnU-Net v2 folder that `read_dataset` reads.

    Args:
        name: a key of `SETS`.
        modality: for sets with several; default: the first one of the set.
        structures: the labels, in this order, as the values 1, 2, ...; others become background. Default: all of
            the set's, and for totalsegmentator, whose masks are combined, the heart.

    Images, and labels whose values stay, are copied byte for byte. Converted cases are skipped when run again; a
    case that cannot be converted is told in `Outcome.failed` and does not stop the others. dataset.json comes
    last. Where TotalSegmentator's meta.csv divides the cases, split.json divides those that show a structure.
    Nothing is written to `src`.
    Raises `GenMedError` for an unknown set or option, a wrong folder, or an `out` that holds something else.
    """
    src, out = Path(src), Path(out)
    layout, modality = _choose(name, modality)
    if not src.is_dir():
        raise GenMedError(f"{src}: no such folder; give the folder of the data set {name}.")
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise GenMedError(f"{out}: lies in {src}, which is never changed; choose another folder.")
    labels = _choose_structures(layout, src, structures)
    cases = _find(layout, src, modality, labels)
    _claim(out, {"set": name, "modality": modality, "labels": list(labels)})
    outcome = _convert_all(cases, out)
    ids = sorted(path.name.removesuffix(ENDING) for path in (out / "labelsTr").glob(f"*{ENDING}"))
    if ids:
        _write_split(src / "meta.csv", out, name, ids)
        _write_json(out / "dataset.json", name, layout, modality, labels, len(ids))
    return outcome


def _choose(name: str, modality: str | None) -> tuple[PublicLayout, str]:
    if name not in SETS:
        raise GenMedError(f"data set '{name}' is unknown; choose one of: {', '.join(SETS)}.")
    modalities = list(SETS[name].channels)
    if modality is not None and modality not in modalities:
        raise GenMedError(f"--modality {modality}: {name} has {' and '.join(modalities)}; choose one of them.")
    return SETS[name], modality or modalities[0]


def _choose_structures(layout: PublicLayout, src: Path, wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted labels; else those of the set. TotalSegmentator: the chambers of the heart (v1), or what v2 has."""
    masks = (path for folder in _folders(src, "s[0-9]*") for path in (folder / "segmentations").glob("*.nii*"))
    known = set(layout.labels) or {match[1] for _, match in _named(masks, r"(\w.*)\.nii(?:\.gz)?")}
    if not wanted:
        return layout.labels or (HEART_V1 if known.issuperset(HEART_V1) else HEART_V2)
    for structure in wanted:
        if wanted.count(structure) > 1:
            raise GenMedError(f"--structures: '{structure}' is named twice; name it once.")
        if known and structure not in known:
            close = difflib.get_close_matches(structure, sorted(known), n=3, cutoff=0.4) or sorted(known)[:3]
            what = "the set has no label" if layout.labels else "no case has a mask"
            raise GenMedError(f"--structures: {what} '{structure}'; there are {', '.join(close)}, ...")
    return tuple(wanted)


def _find(layout: PublicLayout, src: Path, modality: str, labels: Sequence[str]) -> list[Source]:
    """All cases, sorted by id. Raises unless at least one image is there."""
    cases = sorted(layout.cases(src, modality, labels), key=lambda case: case.id)
    if not any(case.image.is_file() for case in cases):
        raise GenMedError(f"{src}: holds no {layout.files}; give the folder that does.")
    for first, second in itertools.pairwise(cases):
        if first.id == second.id:
            raise GenMedError(f"{src}: has the case {first.id} twice; remove one from a copy of the set.")
    return cases


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Note what the folder holds, and refuse one that holds something else."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and _recorded(out) != record)):
        raise GenMedError(f"{out}: holds something else than this conversion; choose another folder.")
    write_json(out / RECORD, record)
    for rest in out.glob(f"{STAGING}*"):
        shutil.rmtree(rest, ignore_errors=True)


def _recorded(out: Path) -> Any:
    try:
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _convert_all(cases: Sequence[Source], out: Path) -> Outcome:
    converted, skipped, failed = [], [], {}
    for case in track(cases, "Converting"):
        image, label = out / "imagesTr" / f"{case.id}_0000{ENDING}", out / "labelsTr" / f"{case.id}{ENDING}"
        if image.is_file() and label.is_file():
            skipped.append(case.id)
            continue
        try:
            _convert_case(case, out, image, label)
            converted.append(case.id)
        except GenMedError as error:
            failed[case.id] = str(error)
    return Outcome(out, tuple(converted), tuple(skipped), failed)


def _convert_case(case: Source, out: Path, image: Path, label: Path) -> None:
    """Both files appear, or none: they are complete before the first one is moved to its place."""
    _require_file(case.image)
    scan = read(case.image, finite=False)
    labels = case.label(scan)
    with tempfile.TemporaryDirectory(dir=out, prefix=STAGING) as folder:
        staged = [Path(folder) / path.name for path in (image, label)]
        _store(scan, staged[0])
        _store(labels, staged[1])
        image.parent.mkdir(exist_ok=True)
        label.parent.mkdir(exist_ok=True)
        try:
            os.replace(staged[0], image)
            os.replace(staged[1], label)
        except BaseException:
            image.unlink(missing_ok=True)
            raise


def _store(volume: Volume, path: Path) -> None:
    """As .nii.gz: a NIfTI file as it is, anything else written anew."""
    source = volume.path.name.lower() if volume.path else ""
    if volume.path and source.endswith(ENDING):
        shutil.copyfile(volume.path, path)
    elif volume.path and source.endswith(".nii"):
        with volume.path.open("rb") as plain, path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, 0) as packed:
            shutil.copyfileobj(plain, packed)
    else:
        volume.save(path)


def _write_json(
    path: Path, name: str, layout: PublicLayout, modality: str, labels: Sequence[str], count: int
) -> None:
    values = {label: value for value, label in enumerate(("background", *labels))}
    entries = {
        "name": name,
        "channel_names": {"0": layout.channels[modality]},
        "labels": values,
        "file_ending": ENDING,
        "numTraining": count,
        "reference": layout.reference,
        "licence": layout.licence,
    }
    write_json(path, entries)


def _write_split(meta: Path, out: Path, name: str, ids: Sequence[str]) -> None:
    """train, val and test of the column "split" of meta.csv as train, tune and report of the cases that show anything.

    The CT set divides 1082, 57 and 89 cases; the MR set 561 and 55, none to val, so that every tenth of its training
    cases is for tuning (https://github.com/wasserth/TotalSegmentator/issues/511). No split without training or test
    cases.
    """
    if not meta.is_file():
        return
    text = meta.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    rows = csv.DictReader(text, delimiter=";" if text and ";" in text[0] else ",")
    part_of = {row.get("image_id"): row.get("split") for row in rows}
    shown = [id for id in ids if id in part_of and read_labels(out / "labelsTr" / f"{id}{ENDING}").data.any()]
    train, tune, report = ([id for id in shown if part_of[id] == part] for part in ("train", "val", "test"))
    if not tune:
        tune, train = train[::10], [id for k, id in enumerate(train) if k % 10]
    if train and tune and report:
        subjects = "one per case; the parts are those of meta.csv, without empty label maps"
        write_split(out / "split.json", Split(name, tuple(train), tuple(tune), tuple(report), subjects))


# Folders ----------------------------------------------------------------------------------------------------


def _inside(src: Path, name: str) -> Path:
    """The subfolder `name`, or the folder itself where it has none: users name either."""
    return src / name if (src / name).is_dir() else src


def _folders(src: Path, pattern: str) -> list[Path]:
    return sorted(path for path in src.glob(pattern) if path.is_dir())


def _named(paths: Iterable[Path], pattern: str) -> list[tuple[Path, re.Match[str]]]:
    """The paths whose whole file name matches, with the match."""
    matches = ((path, re.fullmatch(pattern, path.name)) for path in paths)
    return [(path, match) for path, match in matches if match]


def _nifti(stem: Path) -> Path:
    """STEM.nii.gz, or STEM.nii where only that is there."""
    packed, plain = stem.with_name(f"{stem.name}{ENDING}"), stem.with_name(f"{stem.name}.nii")
    return plain if plain.is_file() and not packed.is_file() else packed
