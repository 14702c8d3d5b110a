import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real import real_set

from genmed.data.dataset import read_dataset
from genmed.data.split import PARTS, Split, person, read_split, three_way, validate, write_split
from genmed.errors import GenMedError

SPLIT = Split("toy", train=("a", "b"), tune=("c",), report=("d",))
HIPPOCAMPUS = Path(str(files("genmed.bench") / "splits" / "hippocampus.json"))


@given(
    subjects=st.dictionaries(st.text(min_size=1), st.integers(0, 40).map(str), min_size=60),
    seed=st.integers(0, 1000),
)
def test_no_subject_is_in_two_parts_and_no_case_is_lost(subjects: dict[str, str], seed: int) -> None:
    if len(set(subjects.values())) < 10:
        return
    parts = three_way(subjects, seed)
    people = [{subjects[id] for id in parts[part]} for part in PARTS]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    assert sorted(sum(parts.values(), ())) == sorted(subjects)


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_cases() -> None:
    subjects = {f"case_{k}": f"p{k // 2}" for k in range(60)}
    backwards = dict(reversed(subjects.items()))
    assert three_way(subjects, seed=3) == three_way(backwards, seed=3) != three_way(subjects, seed=4)


def test_fractions_count_subjects() -> None:
    subjects = {f"{k}_{frame}": str(k) for k in range(100) for frame in range(1 + k % 3)}
    parts = three_way(subjects, fractions=(0.7, 0.1, 0.2))
    assert [len({subjects[id] for id in parts[part]}) for part in PARTS] == [70, 10, 20]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, 0.2), (1.2, -0.1, -0.1)])
def test_impossible_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(GenMedError, match="fractions"):
        three_way({"a": "a"}, fractions=fractions)
    with pytest.raises(GenMedError, match="too few"):
        three_way({"a": "a", "b": "b"})


NAMES = ["hippocampus", "Hippocampus", "Task04_Hippocampus", "Dataset004_hippocampus"]


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_of_a_hippocampus_are_one_person(name: str) -> None:
    assert person(name, "hippocampus_367") == person(name, "hippocampus_368")
    assert person(name, "hippocampus_366") != person(name, "hippocampus_367")


def test_both_frames_of_an_acdc_patient_are_one_person() -> None:
    assert person("acdc", "patient001_frame01") == person("acdc", "patient001_frame12") == "patient001"


def test_other_sets_have_one_subject_per_case_unless_told_otherwise() -> None:
    assert person("liver", "a_1") == "a_1"
    assert person("liver", "a_1", {"a_1": "x"}) == "x"
    assert person("liver", "a_1", r"^(\w)_") == "a"
    with pytest.raises(GenMedError, match="'b'"):
        person("liver", "b", {"a_1": "x"})
    with pytest.raises(GenMedError, match="group"):
        person("liver", "b", r"^(\w)_")
    with pytest.raises(GenMedError, match="regular expression"):
        person("liver", "b", "(")


def test_a_written_split_reads_back(tmp_path: Path) -> None:
    write_split(tmp_path / "split.json", SPLIT)
    assert read_split(tmp_path / "split.json", known_ids="abcde") == SPLIT
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_overlaps_are_refused() -> None:
    with pytest.raises(GenMedError, match=r"'a'.*train and report"):
        validate(replace(SPLIT, report=("a",)))
    with pytest.raises(GenMedError, match="listed twice"):
        validate(replace(SPLIT, train=("a", "a")))
    with pytest.raises(GenMedError, match=r"subject 'p'"):
        validate(SPLIT, subjects={"a": "p", "b": "q", "c": "r", "d": "p"})


def test_unknown_ids_are_refused_with_the_file_name(tmp_path: Path) -> None:
    write_split(tmp_path / "split.json", SPLIT)
    with pytest.raises(GenMedError, match=r"split\.json: 1 ids such as 'd'"):
        read_split(tmp_path / "split.json", known_ids="abc")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"dataset": "x"}', '{"dataset": "x", "train": "a", "tune": [], "report": []}']
)
def test_broken_split_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(GenMedError, match=r"split\.json"):
        read_split(tmp_path / "split.json")


def test_the_published_hippocampus_split_keeps_persons_apart() -> None:
    split = read_split(HIPPOCAMPUS)
    people = [{(int(id[-3:]) + 1) // 2 for id in getattr(split, part)} for part in PARTS]
    assert [len(part) for part in people] == [95, 14, 30]
    assert len(set.union(*people)) == 139 and len(split.ids) == 215
    assert json.loads(HIPPOCAMPUS.read_text())["subjects"] == "(id + 1) // 2"


def test_the_published_hippocampus_split_matches_the_real_folder() -> None:
    read_split(HIPPOCAMPUS, known_ids=read_dataset(real_set("Task04_Hippocampus")).ids)
