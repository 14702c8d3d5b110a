"""Source folders in every layout, made here; surfaces in them are never opened."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from real import real_set

from genmed.data.shapes import sources
from genmed.data.shapes.sources import find_items, plain, sided
from genmed.errors import GenMedError
from genmed.volume import Volume


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(folder: Path) -> list[tuple[str, str, str, str]]:
    return [(item.source, item.subject, item.category, item.side) for item in find_items(folder).items]


def test_medshapenet_as_its_api_leaves_it(tmp_path: Path) -> None:
    for name in ("FLARE/000001_liver.stl", "FLARE/000001_kidney_left.stl", "KITS/000001_kidney_tumor.stl"):
        touch(tmp_path / "medshapenetcore" / name)
    touch(tmp_path / "medshapenetcore/FLARE/FLARE_licence.txt", "Licence: CC BY 4.0 (https://...)")
    touch(tmp_path / "medshapenetcore/FLARE/FLARE_cite.txt", "Please cite")
    assert names(tmp_path) == [
        ("MedShapeNet FLARE", "000001", "kidney", "left"),
        ("MedShapeNet FLARE", "000001", "liver", ""),
        ("MedShapeNet KITS", "000001", "kidney tumor", ""),
    ]
    assert [item.licence for item in find_items(tmp_path).items] == ["CC BY 4.0", "CC BY 4.0", "see MedShapeNet"]


def test_medshapenet_as_its_link_list_leaves_it(tmp_path: Path) -> None:
    files = ("s0238_femur_right.nii.g_1.stl", "s0677_vertebrae_L3.nii.g_1.stl", "000000_tumoredbrain.stl", "odd.stl")
    for name in files:
        touch(tmp_path / name)
    listing = find_items(tmp_path)
    assert names(tmp_path) == [
        ("MedShapeNet", "000000", "tumoredbrain", ""),
        ("MedShapeNet TotalSegmentator", "s0238", "femur", "right"),
        ("MedShapeNet TotalSegmentator", "s0677", "vertebra L3", ""),
    ]
    assert [(path.name, reason[:9]) for path, reason in listing.left_out] == [("odd.stl", "not named")]
    assert listing.items[1].licence == "CC BY 4.0"


def test_plain_folders_of_surfaces(tmp_path: Path) -> None:
    for name in ("bones/Left Femur/a.ply", "bones/Left Femur/b.VTP", "bones/skull/c_right.obj"):
        touch(tmp_path / name)
    found = names(tmp_path / "bones")
    assert found == [("bones", "a", "femur", "left"), ("bones", "b", "femur", "left"), ("bones", "c", "skull", "right")]
    assert names(tmp_path / "bones" / "Left Femur")[0] == ("Left Femur", "a", "femur", "left")


def index(folder: Path, rows: str, **described: object) -> None:
    touch(folder / "index.csv", "path,category,side,subject,extra,split,index,label\n" + rows)
    touch(folder / "dataset.json", json.dumps({"name": folder.name, "licence": "CC0", **described}))


def test_an_index_of_label_maps_names_values_or_takes_all(tmp_path: Path) -> None:
    rows = "m/1.nii.gz,Caudate,left,p1,label=9;shifted,,,9\n"
    rows += "m/2.nii.gz,kidney,both,p2,,,,\nm/3.nii.gz,kidney,joined,p3,,,,\n"
    index(tmp_path / "set", rows, labels={"background": 0, "kidney": 1, "tumour": 2, "cyst": 3})
    listing = find_items(tmp_path / "set")
    caudate, left, right = listing.items
    assert (caudate.category, caudate.values, caudate.parts, caudate.both) == ("caudate", (9,), (), False)
    assert (left.side, right.side, left.values, left.both) == ("left", "right", (), True)
    assert left.parts == (("tumour", 2), ("cyst", 3)) and left.licence == "CC0"
    assert [reason for _, reason in listing.left_out] == ["side 'joined': not one structure"]


def test_an_index_of_arrays_keeps_its_split_and_reports_on_its_validation_part(tmp_path: Path) -> None:
    rows = "".join(f"a.npz,adrenal,unknown,t{k:02d},array=train_images,train,{k},{k % 2}\n" for k in range(30))
    rows += "".join(f"a.npz,adrenal,unknown,v{k},array=val_images,val,{k},1\n" for k in range(4))
    index(tmp_path / "adrenal", rows)
    items = find_items(tmp_path / "adrenal").items
    assert [sum(item.part == part for item in items) for part in ("train", "tune", "report")] == [27, 3, 4]
    assert all((item.part == "report") == (item.array == "val_images") for item in items)
    assert items[1].facts == (("mass or hyperplasia", "yes"),) and items[1].index == 1
    assert items[0].category == "adrenal gland" and items[0].side == ""


def test_a_data_set_gives_a_shape_per_class(tmp_path: Path) -> None:
    touch(tmp_path / "labelsTr/c1.nii.gz")
    touch(tmp_path / "imagesTr/c1_0000.nii.gz")
    labels = {"background": 0, "kidney_left": 1, "heart_atrium_right": 2, "CSF": 3}
    about = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 1, "name": "x"}
    touch(tmp_path / "dataset.json", json.dumps(about))
    found = [(item.category, item.side, item.values) for item in find_items(tmp_path).items]
    assert found == [("cerebrospinal fluid", "", (3,)), ("heart atrium", "right", (2,)), ("kidney", "left", (1,))]


@pytest.mark.parametrize("names", [{"0": "background", "7": "kidney_left", "2": "CSF"}, {"CSF": 2, "kidney_left": 7}])
def test_label_maps_with_names_give_a_shape_per_class_and_a_subject_per_file(tmp_path: Path, names: dict) -> None:
    for name in ("a.nii.gz", "b.x.nii", "notes.txt"):
        touch(tmp_path / name)
    touch(tmp_path / "labels.json", json.dumps(names))
    found = [(item.subject, item.category, item.side, item.values) for item in find_items(tmp_path).items]
    assert found == [
        (subject, *rest)
        for subject in ("a", "b.x")
        for rest in (("cerebrospinal fluid", "", (2,)), ("kidney", "left", (7,)))
    ]


def test_results_with_names_in_their_headers_need_no_labels_json(tmp_path: Path) -> None:
    data = np.zeros((1, 4, 4, 4), np.uint8)
    Volume(data, np.eye(4), {0: "background", 5: "kidney_left"}).save(tmp_path / "a.nii.gz")
    Volume(data, np.eye(4), {0: "background", 2: "CSF", 3: ""}).save(tmp_path / "b.nii.gz")
    Volume(data.astype(np.float32), np.eye(4)).save(tmp_path / "b.probabilities.nii.gz")
    touch(tmp_path / "broken.nii.gz", "no gzip")
    listing = find_items(tmp_path)
    found = [(item.subject, item.category, item.side, item.values) for item in listing.items]
    assert found == [("a", "kidney", "left", (5,)), ("b", "cerebrospinal fluid", "", (2,))]
    assert [(path.name, why[:22]) for path, why in listing.left_out] == [
        ("b.probabilities.nii.gz", "its header names no la"),
        ("broken.nii.gz", "its header names no la"),
    ]
    touch(tmp_path / "labels.json", json.dumps({"5": "spleen"}))
    assert {(item.subject, item.category) for item in find_items(tmp_path).items} >= {("a", "spleen"), ("b", "spleen")}
    (tmp_path / "labels.json").unlink()
    touch(tmp_path / "liver.stl")
    assert [item.path.name for item in find_items(tmp_path).items] == ["liver.stl"]


@pytest.mark.parametrize("names", [{"1": "a", "b": 1}, {"liver": "one"}, {"1": ["liver"]}, {"liver": True}])
def test_names_of_label_maps_that_name_no_value_are_refused(tmp_path: Path, names: dict) -> None:
    touch(tmp_path / "a.nii.gz")
    touch(tmp_path / "labels.json", json.dumps(names))
    with pytest.raises(GenMedError, match=r"labels.json: must name each value once"):
        find_items(tmp_path)


def test_known_data_sets_give_unions_and_persons(tmp_path: Path) -> None:
    for case in ("hippocampus_001", "hippocampus_002", "hippocampus_003"):
        touch(tmp_path / f"labelsTr/{case}.nii.gz")
        touch(tmp_path / f"imagesTr/{case}.nii.gz")
    rows = [{"image": f"imagesTr/hippocampus_{k:03d}.nii.gz", "label": f"labelsTr/hippocampus_{k:03d}.nii.gz"}
            for k in (1, 2, 3)]  # fmt: skip
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    about = {"name": "Hippocampus", "modality": {"0": "MRI"}, "training": rows, "labels": labels}
    touch(tmp_path / "dataset.json", json.dumps(about))
    items = find_items(tmp_path).items
    assert {(item.category, item.values) for item in items} == {
        ("hippocampus", (1, 2)), ("anterior hippocampus", (1,)), ("posterior hippocampus", (2,)),
    }  # fmt: skip
    assert [item.subject for item in items if item.category == "hippocampus"] == ["person_001"] * 2 + ["person_002"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [("femur_right", ("femur", "right")), ("Left Lung", ("Lung", "left")), ("left", ("left", "")),
     ("left_right_thing", ("left right thing", "")), ("Brainstem", ("Brainstem", ""))],
)  # fmt: skip
def test_sides_are_found_in_names(name: str, answer: tuple[str, str]) -> None:
    assert sided(name) == answer


def test_categories_are_plain_words() -> None:
    assert plain("Inferior_Horn of the Lateral Ventricle") == "inferior horn of the lateral ventricle"
    assert plain("vertebrae_L3") == "vertebra L3" and plain("HCP") == "HCP"


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="holds no shapes"):
        find_items(tmp_path)
    with pytest.raises(GenMedError, match="not a folder"):
        find_items(tmp_path / "missing")
    touch(tmp_path / "index.csv", "file,organ\na,b\n")
    with pytest.raises(GenMedError, match="needs the columns path, category, side, subject"):
        find_items(tmp_path)


@pytest.mark.parametrize(
    ("name", "items", "subjects"),
    [("subcortical", 2555, 80), ("kits23_kidney", 789, 399), ("adrenal", 1286, 1286), ("femur", 40, 40),
     ("left_atrium", 80, 56), ("Task04_Hippocampus", 645, 139), ("acdc", 480, 80)],
)  # fmt: skip
def test_public_sets_are_listed_in_full(name: str, items: int, subjects: int) -> None:
    listing = find_items(real_set(name))
    assert (len(listing.items), len({item.subject for item in listing.items})) == (items, subjects)
    assert all(item.path.is_file() for item in listing.items)


@pytest.mark.parametrize(
    ("row", "line"),
    [("m.nii.gz,liver,,p,label=liver", "line 2: label 'liver'"), ("m.nii.gz,liver,,p,label=0", "line 2: label '0'"),
     ("m.npz,liver,,p,array=a,,x", "line 2: index 'x'"), ("m.npz,liver,,p,array=a,,-1", "line 2: index '-1'"),
     ("m.nii.gz", "line 2 has no path, category or subject"), ("m.nii.gz,,,p", "line 2 has no path, category")],
)  # fmt: skip
def test_bad_rows_of_an_index_are_named(tmp_path: Path, row: str, line: str) -> None:
    """A label that is no number must not mean the whole map."""
    index(tmp_path / "set", row + "\n")
    with pytest.raises(GenMedError, match=line):
        find_items(tmp_path / "set")


def test_tables_that_are_no_text_and_labels_that_are_no_names_are_refused(tmp_path: Path) -> None:
    index(tmp_path / "set", "m.nii.gz,liver,,p\n", labels=["liver"])
    with pytest.raises(GenMedError, match=r"dataset\.json: labels must be names"):
        find_items(tmp_path / "set")
    (tmp_path / "set/index.csv").write_bytes("path,category,side,subject\nm.nii.gz,Läber,,p\n".encode("latin-1"))
    with pytest.raises(GenMedError, match=r"index\.csv: cannot be read as CSV .*; save it as UTF-8"):
        find_items(tmp_path / "set")


@pytest.mark.skipif(os.name != "posix", reason="such file names exist on POSIX systems alone")
def test_names_that_are_no_text_are_left_out_with_a_reason(tmp_path: Path) -> None:
    touch(tmp_path / "liver/a.stl")
    touch(tmp_path / "liver/Läber.stl")
    touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/liver/b\xff.stl")))
    listing = find_items(tmp_path)
    assert [item.path.name for item in listing.items] == ["Läber.stl", "a.stl"]
    assert [(path.name, why) for path, why in listing.left_out] == [("b?.stl", "its name is not UTF-8: rename it")]


def test_licences_are_looked_for_once_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MedShapeNet's link list gives one folder of 100,000 files."""
    asked: list[Path] = []
    monkeypatch.setattr(sources, "_licence", lambda folder: asked.append(folder) or "")
    for k in range(9):
        touch(tmp_path / f"flat/{k:06d}_liver.stl")
        touch(tmp_path / f"plain/liver/a{k}.stl")
    find_items(tmp_path / "flat")
    find_items(tmp_path / "plain")
    assert asked == [tmp_path / "flat", tmp_path / "plain"]
