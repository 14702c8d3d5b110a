import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import find_objects, label

from genmed import report
from genmed.report import Cell, Fact, Key, Page, Panel, Table

RED, BLUE = (200, 0, 0), (0, 0, 200)
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
PAGE = Page(
    title="Title",
    eyebrow="Eyebrow",
    lead="Lead",
    facts=(Fact("Fact", "0.91", "below"),),
    legend=(Key("front", (RED,)), Key("probability", (RED, BLUE))),
    panels=(Panel("Left", ("A", "B"), (("Row", (Cell("first", PICTURE), Cell("nothing here"))),)),),
    table=Table("Numbers", ("Side", "ml"), (("Left", "1.25\n1.20 to 1.30"),), ("A note.",)),
    notes_heading="Notes",
    notes=("One.", "Two."),
    footer="Footer",
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Outline(HTMLParser):
    """Collects tags with their attributes, and text; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def pictures(self) -> list[np.ndarray]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [decoded(base64.b64decode(source.removeprefix("data:image/png;base64,"))) for source in sources]


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def require_self_contained(html: str) -> None:
    outline = Outline(html)
    assert not re.search(r"(?i)https?:|//|url\(|@import|javascript:", re.sub(r'src="data:[^"]*"', "", html))
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in outline.tags:
        assert not {"srcset", "background", "data", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert tag == "img" and (attributes["src"] or "").startswith("data:image/png;base64,")
    policy = next(a["content"] for t, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")


def test_page_is_self_contained_and_says_everything() -> None:
    html = report.render(PAGE)
    require_self_contained(html)
    text = Outline(html).text
    words = ("Title", "Eyebrow", "Lead", "0.91", "front", "Left", "Row", "nothing here", "1.20 to 1.30")
    for word in (*words, "A note.", "Notes", "Two.", "Footer"):
        assert word in text


def test_pictures_on_the_page_decode_to_what_was_given() -> None:
    outline = Outline(report.render(PAGE))
    (picture,) = outline.pictures()
    assert np.array_equal(picture, PICTURE)
    (attributes,) = [attributes for tag, attributes in outline.tags if tag == "img"]
    assert attributes["alt"] == "first" and (attributes["width"], attributes["height"]) == ("6", "4")


def test_page_suits_dark_mode_and_phones() -> None:
    html = report.render(PAGE)
    assert "prefers-color-scheme: dark" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Outline(html).tags


def test_text_from_outside_cannot_become_markup() -> None:
    nasty = "<script>alert('x')</script>\"&"
    table = replace(PAGE.table, caption=nasty, header=(nasty,), rows=((nasty, nasty),), notes=(nasty,))
    panel = Panel(nasty, (nasty,), ((nasty, (Cell(nasty, PICTURE),)), (nasty, (Cell(nasty),))))
    page = Page(
        nasty, nasty, nasty, (Fact(nasty, nasty, nasty),), (Key(nasty, (RED,)),), (panel,), table, nasty,
        (nasty,), nasty,
    )  # fmt: skip
    html = report.render(page)
    assert "<script" not in html
    outline = Outline(html)
    assert outline.text.count(nasty) == 21  # once each, the title also in <title>
    assert [attributes["alt"] for tag, attributes in outline.tags if tag == "img"] == [nasty]


def test_same_page_gives_the_same_bytes() -> None:
    assert report.render(PAGE) == report.render(PAGE)


def test_grey_picture_stands_upright_and_maps_the_window_to_black_and_white() -> None:
    plane = np.array([[10.0, 20.0, 30.0], [-5.0, np.nan, 99.0]])  # (across, up)
    picture = report.grey(plane, (10, 30))
    assert picture.shape == (3, 2, 3) and picture.dtype == np.uint8
    assert picture[..., 0].tolist() == [[255, 255], [128, 0], [0, 0]]
    assert np.array_equal(report.grey(plane, (10, 30), zoom=3)[1::3, 1::3], picture)


def test_overlay_tints_and_outlines_exactly_the_labelled_voxels() -> None:
    plane, labels = np.zeros((5, 5)), np.zeros((5, 5), dtype=int)
    labels[1:4, 1:4], labels[4, 0] = 1, 2
    picture = report.overlay(report.grey(plane, (0, 1)), labels, {1: RED, 2: BLUE}, opacity=0.5)
    expected = np.zeros((5, 5, 3), dtype=np.uint8)
    expected[1:4, 1:4] = RED
    expected[2, 2] = (100, 0, 0)  # the only voxel off the rim
    expected[4, 4] = BLUE  # last across, lowest
    assert np.array_equal(picture, expected)


def test_overlay_touches_no_pixel_outside_its_labels() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, (6, 7))
    under = report.grey(generator.random((6, 7)), (0, 1), zoom=4)
    inside = (labels.T[::-1] > 0).repeat(4, axis=0).repeat(4, axis=1)
    painted = report.overlay(under, labels, {1: RED, 2: BLUE}, zoom=4)
    assert np.array_equal(painted[~inside], under[~inside])
    assert (painted[inside] != under[inside]).any(axis=-1).all()


def test_outline_is_the_rim_of_the_mask() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[0:3, 1:4] = True
    picture = report.outline(np.zeros((5, 4, 3), dtype=np.uint8), mask, (1, 2, 3))
    painted = picture[..., 0].T[:, ::-1] == 1
    rim = mask.copy()
    rim[0:2, 2] = False  # inside; a mask that runs out of the picture has no rim there
    assert np.array_equal(painted, rim)


def test_hidden_voxels_show_nothing_of_the_picture_below() -> None:
    generator = np.random.default_rng(0)
    seen = np.arange(6)[:, None] % 2 * np.ones(5) == 0
    first, second = generator.random((2, 6, 5))
    second[seen] = first[seen]
    one, two = (report.hide(report.grey(plane, (0, 1), 4), seen, 4) for plane in (first, second))
    assert np.array_equal(one, two)
    hidden = ~seen.T[::-1].repeat(4, axis=0).repeat(4, axis=1)
    assert {tuple(colour) for colour in one[hidden]} == set(report.HATCH)
    assert np.array_equal(one[~hidden], report.grey(first, (0, 1), 4)[~hidden])


def test_probability_colours_run_from_the_first_to_the_last() -> None:
    picture = report.probability(np.array([[0.0, 0.5, 1.0, np.nan, 2.0]]))
    colours = report.PROBABILITY_COLOURS
    upwards = [tuple(int(part) for part in colour) for colour in picture[::-1, 0]]
    assert upwards == [colours[0], colours[2], colours[4], colours[0], colours[4]]


@pytest.mark.parametrize("rows", [(0,), (1, 0)])
def test_contact_sheet_holds_the_chosen_pictures_unchanged(rows: tuple[int, ...]) -> None:
    pictures = [np.full((80, 120, 3), shade, dtype=np.uint8) for shade in (90, 120, 150, 200)]
    panel = Panel(
        "Left",
        ("A", "B"),
        (
            ("Seen", (Cell("a", pictures[0]), Cell("b", pictures[1]))),
            ("Restored image", (Cell("nothing to restore"), Cell("c", pictures[2]))),
            ("Not chosen", (Cell("d", pictures[3]), Cell("e", pictures[3]))),
        ),
    )
    sheet = decoded(report.contact_sheet(panel, rows, (Key("front", (RED,)),)))
    whole = {shade for shade in (90, 120, 150, 200) if _holds(sheet, np.full((80, 120, 3), shade))}
    assert whole == ({90, 120} if rows == (0,) else {90, 120, 150})
    assert _holds(sheet, np.full((19, 27, 3), RED))


def _holds(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture of one colour lies somewhere in the sheet, whole."""
    mask = (sheet == picture[0, 0]).all(axis=-1)
    found = [mask[box] for box in find_objects(label(mask)[0])]
    return any(part.shape == picture.shape[:2] and bool(part.all()) for part in found)
