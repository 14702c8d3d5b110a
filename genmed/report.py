"""Pictures of slices, and a self-contained HTML page from plain data: no scripts, no network, no plots.

Slices are (across, up) arrays of one plane; pictures are (height, width, 3) uint8 arrays, first row on top.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

Colour = tuple[int, int, int]

LABEL_COLOURS: tuple[Colour, ...] = (  # Okabe and Ito: told apart by colour-blind eyes too
    (240, 150, 20),
    (70, 175, 240),
    (0, 170, 125),
    (225, 125, 180),
    (240, 228, 66),
    (213, 94, 0),
)
WHITE: Colour = (255, 255, 255)
HATCH: tuple[Colour, Colour] = ((34, 46, 78), (52, 68, 110))  # bluish: never taken for a grey value
PROBABILITY_COLOURS: tuple[Colour, ...] = (  # "magma" of matplotlib at 0, 0.25, 0.5, 0.75 and 1
    (0, 0, 4),
    (81, 18, 124),
    (183, 55, 121),
    (252, 137, 97),
    (252, 253, 191),
)

# Pictures -------------------------------------------------------------------------------------------------


def grey(values: np.ndarray, window: tuple[float, float], zoom: int = 1) -> np.ndarray:
    """Slice (across, up) -> grey picture, `window` (low, high) becoming black and white."""
    low, high = window
    shade = np.rint(255 * np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1)).astype(np.uint8)
    return np.repeat(_upright(shade, zoom)[..., None], 3, axis=2)


def hide(picture: np.ndarray, seen: np.ndarray, zoom: int = 1) -> np.ndarray:
    """Hatch what was not `seen` (across, up); nothing of the picture below shows through."""
    hidden = ~_upright(seen.astype(bool), zoom)
    row, column = np.indices(hidden.shape)
    stripe = ((row + column) // max(2, zoom // 2)) % 2
    return np.where(hidden[..., None], np.array(HATCH, dtype=np.uint8)[stripe], picture)


def overlay(
    picture: np.ndarray,
    labels: np.ndarray,
    colours: Mapping[int, Colour],
    zoom: int = 1,
    opacity: float = 0.35,
) -> np.ndarray:
    """Tint each label (across, up) and outline it, inside its own voxels, in its full colour."""
    painted = picture.copy()
    for value, colour in colours.items():
        inside = _upright(labels == value, zoom)
        tint = (1 - opacity) * picture[inside] + opacity * np.array(colour, dtype=float)
        painted[inside] = np.rint(tint).astype(np.uint8)
        painted[_rim(inside, max(1, zoom // 4))] = colour
    return painted


def outline(picture: np.ndarray, mask: np.ndarray, colour: Colour = WHITE, zoom: int = 1) -> np.ndarray:
    """A thin line round a mask (across, up), inside its voxels."""
    painted = picture.copy()
    painted[_rim(_upright(mask.astype(bool), zoom), max(1, zoom // 8))] = colour
    return painted


def probability(values: np.ndarray, zoom: int = 1) -> np.ndarray:
    """Probabilities (across, up) in 0…1 -> picture from black (0) over red (0.5) to pale yellow (1)."""
    anchors = np.linspace(0, 1, len(PROBABILITY_COLOURS))
    table = np.array(PROBABILITY_COLOURS, dtype=float)
    shown = _upright(np.clip(np.nan_to_num(values), 0, 1), zoom)
    return np.stack([np.rint(np.interp(shown, anchors, table[:, c])).astype(np.uint8) for c in range(3)], axis=-1)


def png(picture: np.ndarray) -> bytes:
    """The bytes of a PNG file; the same picture gives the same bytes."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _upright(plane: np.ndarray, zoom: int) -> np.ndarray:
    """(across, up) -> rows from the top, every voxel `zoom` pixels wide and high."""
    return plane.T[::-1].repeat(zoom, axis=0).repeat(zoom, axis=1)


def _rim(inside: np.ndarray, width: int) -> np.ndarray:
    return inside & ~binary_erosion(inside, iterations=width, border_value=1)


# What a page is made of -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One picture of a panel and what it shows in words; without a picture the words stand in its place."""

    text: str
    picture: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """Pictures in rows and columns, under a heading."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Table:
    """Numbers as text. A line break in an entry puts what follows in small print."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A large number with a line above and a line below it."""

    title: str
    number: str
    text: str


@dataclass(frozen=True)
class Key:
    """One entry of the legend: a colour, or several that run into each other."""

    text: str
    colours: tuple[Colour, ...]


@dataclass(frozen=True)
class Page:
    """Everything the page says; plain text, escaped when it is rendered."""

    title: str
    eyebrow: str
    lead: str
    facts: tuple[Fact, ...]
    legend: tuple[Key, ...]
    panels: tuple[Panel, ...]
    table: Table
    notes_heading: str
    notes: tuple[str, ...]
    footer: str


# HTML -----------------------------------------------------------------------------------------------------


def render(page: Page) -> str:
    """The page as one HTML document. Pictures are inlined, and the browser is forbidden to load anything."""
    body = [
        f"<header><p class=eyebrow>{escape(page.eyebrow)}</p><h1>{escape(page.title)}</h1>"
        f"<p class=lead>{escape(page.lead)}</p></header>",
        f"<section class=facts>{''.join(map(_fact, page.facts))}</section>",
        *map(_panel, page.panels[:1]),
        f"<ul class=legend>{''.join(map(_key, page.legend))}</ul>",
        *map(_panel, page.panels[1:]),
        _table(page.table),
        f"<section class=notes><h2>{escape(page.notes_heading)}</h2>"
        f"{''.join(f'<p>{escape(note)}</p>' for note in page.notes)}</section>",
        f"<footer>{escape(page.footer)}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(page.title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _fact(fact: Fact) -> str:
    return (
        f"<div><p class=what>{escape(fact.title)}</p><p class=number>{escape(fact.number)}</p>"
        f"<p class=small>{escape(fact.text)}</p></div>"
    )


def _key(key: Key) -> str:
    wide = " class=wide" if len(key.colours) > 1 else ""
    return f'<li><i{wide} style="background:{_blend(key.colours)}"></i>{escape(key.text)}</li>'


def _blend(colours: Sequence[Colour]) -> str:
    stops = [f"rgb{colour}" for colour in colours]
    return f"linear-gradient(90deg, {', '.join(stops if len(stops) > 1 else 2 * stops)})"


def _panel(panel: Panel) -> str:
    heads = "".join(f"<p class=column>{escape(column)}</p>" for column in panel.columns)
    rows = "".join(f"<h3>{escape(title)}</h3>{''.join(map(_cell, cells))}" for title, cells in panel.rows)
    return (
        f'<section><h2>{escape(panel.heading)}</h2><div class=grid style="--columns:{len(panel.columns)}">'
        f"<span class=corner></span>{heads}{rows}</div></section>"
    )


def _cell(cell: Cell) -> str:
    if cell.picture is None:
        return f"<p class=empty>{escape(cell.text)}</p>"
    height, width = cell.picture.shape[:2]
    source = "data:image/png;base64," + base64.b64encode(png(cell.picture)).decode("ascii")
    return f'<img src="{source}" alt="{escape(cell.text)}" width="{width}" height="{height}">'


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    notes = "".join(f"<p class=small>{escape(note)}</p>" for note in table.notes)
    return (
        f"<section><h2>{escape(table.caption)}</h2><div class=scroll tabindex=0><table>"
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(map(_row, table.rows))}</tbody></table></div>"
        f"{notes}</section>"
    )


def _row(row: Sequence[str]) -> str:
    entries = "".join(f"<td>{_entry(text)}</td>" for text in row[1:])
    return f'<tr><th scope="row">{_entry(row[0])}</th>{entries}</tr>'


def _entry(text: str) -> str:
    first, *others = (escape(line) for line in text.split("\n"))
    return first + "".join(f"<small>{line}</small>" for line in others)


_STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1c1f24; --soft: #5d6470; --line: #dedbd3; --accent: #9a4a12;
  --text: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --display: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "Noto Serif", serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e9e7e2; --soft: #a0a6b0; --line: #32363e; --accent: #f2a35e;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; color-scheme: light dark }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1.0625rem/1.6 var(--text) }
main {
  max-width: 66rem; margin: 0 auto;
  padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem);
}
p, h1, h2, h3, ul { margin: 0 }
h1, h2 {
  font-family: var(--display); font-weight: 600; line-height: 1.15; letter-spacing: -.01em;
  text-wrap: balance;
}
h1 { font-size: clamp(2rem, 6vw, 3.1rem); margin: .35rem 0 1rem }
h2 { font-size: clamp(1.4rem, 4vw, 1.8rem); margin-bottom: 1.1rem }
section { margin-top: clamp(2.25rem, 6vw, 3.75rem) }
small, .small { color: var(--soft); font-size: .9rem; line-height: 1.5 }
.eyebrow {
  color: var(--accent); font-size: .85rem; font-weight: 600; letter-spacing: .07em; text-transform: uppercase;
}
.lead { max-width: 44rem; font-size: 1.15rem }
.facts {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); margin-top: 2rem;
}
.facts div {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem;
}
.what { font-weight: 600 }
.number { font: 600 2.1rem/1.3 var(--display); font-variant-numeric: lining-nums tabular-nums }
.grid {
  display: grid; gap: .55rem; align-items: center;
  grid-template-columns: 8.5rem repeat(var(--columns), minmax(0, 1fr));
}
.grid h3 { font-size: .95rem; font-weight: 600; line-height: 1.35; padding-right: .5rem }
.grid img { display: block; width: 100%; height: auto; border-radius: .3rem; background: #000 }
.column { font-size: .95rem; font-weight: 600; text-align: center; align-self: end }
.empty {
  display: grid; place-content: center; align-self: stretch; padding: .5rem; text-align: center;
  color: var(--soft); font-size: .9rem; line-height: 1.4;
  border: 1px dashed var(--line); border-radius: .3rem;
}
.legend {
  list-style: none; padding: 0; margin-top: 1.1rem; display: flex; flex-wrap: wrap; gap: .35rem 1.5rem;
  color: var(--soft); font-size: .9rem;
}
.legend li { display: flex; align-items: center; gap: .5rem }
.legend i { width: 1.1rem; height: .8rem; border-radius: .15rem; border: 1px solid var(--soft) }
.legend i.wide { width: 5rem }
.scroll { overflow-x: auto }
table {
  border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: lining-nums tabular-nums;
}
th, td {
  padding: .6rem 1rem .6rem 0; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
th:first-child { text-align: left }
th:last-child, td:last-child { padding-right: 0 }
thead th {
  color: var(--soft); font-size: .85rem; font-weight: 600; line-height: 1.35; white-space: normal;
  min-width: 5rem;
  vertical-align: bottom;
}
tbody th { font-weight: 600 }
td small { display: block; font-size: .82rem }
section > .small { margin-top: .8rem; max-width: 46rem }
.notes p { max-width: 44rem; margin-bottom: .9rem }
footer {
  margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; overflow-wrap: anywhere;
}
@media (max-width: 44rem) {
  .grid { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: .35rem }
  .grid h3 { grid-column: 1 / -1; padding-top: .7rem }
  .corner { display: none }
  .column { font-size: .85rem; line-height: 1.3 }
  .empty { font-size: .75rem; padding: .25rem }
}
"""

# One wide picture -----------------------------------------------------------------------------------------

_SHEET_PAPER, _SHEET_INK, _SHEET_SOFT = (20, 22, 26), (233, 231, 226), (160, 166, 176)
_MARGIN, _LINE, _GAP = 190, 62, 12  # pixels: row titles, column titles and legend, between pictures


def contact_sheet(panel: Panel, rows: Sequence[int], legend: Sequence[Key] = ()) -> bytes:
    """The chosen rows of a panel as one wide PNG with titles and a legend, dark, for a README."""
    chosen = [panel.rows[number] for number in rows]
    shape = next(cell.picture.shape for _, cells in chosen for cell in cells if cell.picture is not None)
    height, width = shape[0] + _GAP, shape[1] + _GAP
    bottom = _LINE + len(chosen) * height
    size = (_MARGIN + len(panel.columns) * width, bottom + (_LINE if legend else _GAP))
    sheet = Image.new("RGB", size, _SHEET_PAPER)
    for column, title in enumerate(panel.columns):
        _write(sheet, title, (_MARGIN + (column + 0.5) * width - _GAP / 2, _LINE / 2), "mm", width=28)
    for row, (title, cells) in enumerate(chosen):
        _write(sheet, title, (2 * _GAP, _LINE + (row + 0.5) * height - _GAP / 2), "lm")
        for column, cell in enumerate(cells):
            _put(sheet, cell, (_MARGIN + column * width, _LINE + row * height), (shape[1], shape[0]))
    _put_legend(sheet, legend, bottom + _LINE / 2 - _GAP / 2)
    return png(np.asarray(sheet))


def _put(sheet: Image.Image, cell: Cell, corner: tuple[int, int], size: tuple[int, int]) -> None:
    if cell.picture is not None:
        sheet.paste(Image.fromarray(cell.picture), corner)
        return
    centre = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    _write(sheet, cell.text, centre, "mm", _SHEET_SOFT, width=24)


def _put_legend(sheet: Image.Image, legend: Sequence[Key], y: float) -> None:
    draw, x = ImageDraw.Draw(sheet), float(_MARGIN)
    for key in legend:
        draw.rectangle((x, y - 9, x + 26, y + 9), fill=key.colours[0])
        x = _write(sheet, key.text, (x + 38, y), "lm", _SHEET_SOFT, width=99) + 44


def _write(
    sheet: Image.Image,
    text: str,
    position: tuple[float, float],
    anchor: str,
    colour: Colour = _SHEET_INK,
    width: int = 13,
) -> float:
    """Put text, broken into lines of at most `width` letters; returns where it ends on the right."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=25)
    lines, align = "\n".join(wrap(text, width)), "center" if anchor == "mm" else "left"
    draw.multiline_text(position, lines, colour, font, anchor, align=align)
    return float(draw.multiline_textbbox(position, lines, font, anchor)[2])
