"""Rows of benchmarks that are kept from run to run, and the bar above loops over cases."""

from pathlib import Path
from typing import NamedTuple

import pytest

from genmed.bench import shapes
from genmed.bench.kept import key_of, read_rows, read_table, write_rows, write_table
from genmed.errors import GenMedError
from genmed.progress import track

TABLES = Path(__file__).parents[1] / "docs" / "tables"


class Row(NamedTuple):
    name: str
    count: int
    dice: float


ROWS = [Row('a, "b"\nc', 2, 1 / 3), Row("", -1, float("inf")), Row("ü", 0, 1e-17)]


def test_rows_come_back_in_their_types_to_the_last_digit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    assert read_rows(path, Row) == []
    write_rows(path, Row, ROWS)
    found = read_rows(path, Row)
    assert found == ROWS and [type(value) for value in found[0]] == [str, int, float]
    write_rows(path, Row, [])
    assert read_rows(path, Row) == [] and path.read_text() == "name,count,dice\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"name,dice\na,0.9\n", b"name,dice,count\n", b"name,count,dice\na,1\n", b"name,count,dice\na,one,0.9\n",
     b"name,count,dice\n\xff,1,0.9\n"],
)  # fmt: skip
def test_another_table_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(GenMedError, match=r"rows\.csv: is no table of this benchmark and data set; use another --out"):
        read_rows(path, Row)
    assert path.read_bytes() == content


def test_a_failed_write_leaves_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, Row, ROWS)

    def killed():  # type: ignore[no-untyped-def]
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, Row, killed())
    assert read_rows(path, Row) == ROWS and list(tmp_path.iterdir()) == [path]


def test_columns_that_no_tuple_has_are_parsed_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_table(path, ["case", "dice front"], [["a", 0.5], ["b", None]])
    assert read_table(path, ["case", "dice front"], lambda entries: entries["dice front"]) == ["0.5", ""]
    assert path.read_text() == "case,dice front\na,0.5\nb,\n"


def test_the_table_of_completions_is_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    rows = read_rows(TABLES / "completion-shapes.csv", shapes.Row)
    assert len(rows) > 1000
    write_rows(tmp_path / "again.csv", shapes.Row, rows)
    assert (tmp_path / "again.csv").read_bytes() == (TABLES / "completion-shapes.csv").read_bytes()


def test_keys_are_those_of_rows_that_exist() -> None:
    assert key_of(["a", ""], ["keep_slices(count=4, axis=2)"], 0.9) == "30bf3978fc1d502e"
    assert key_of(1, {"a": 1, "b": 2}) == key_of(1, {"b": 2, "a": 1}) != key_of(1, {"a": 1})


def test_the_bar_gives_every_item_in_turn_and_leaves_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track({3: "a", 1: "b"}, "Counting")) == [3, 1]
    assert capsys.readouterr().out == ""
