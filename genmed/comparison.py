"""One self-contained HTML page of meshes side by side, turned by one camera; it needs no network, only WebGL 2.

`comparison_page` puts columns, the truth as a ghost and cutting planes into the page. The script and the style are
built from viewer/ by Vite and ship as genmed/viewer/page.js and page.css. Coordinates are world millimetres, RAS+.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from genmed.errors import GenMedError
from genmed.mesh import Triangles, decimated
from genmed.volume import Volume

OBSERVED, UNOBSERVED, REDUNDANT = 0, 1, 2
MATTER = ("observed", "not observed, completed", "redundant")
COLOURS = ("#56b4e9", "#e69f00", "#b5367f", "#009e73", "#f0e442", "#d55e00", "#0072b2")  # Okabe and Ito, but the third
PLAIN = 255  # the class of matter without one
MAX_COLUMNS = 12
MAX_FACES = 60_000


@dataclass(frozen=True, eq=False)
class Column:
    """One mesh of the page: its title, what is coloured how, and a line of figures below it.

    `mesh` is in world mm. `classes` holds for each of its vertices an index into the page's class names, or `PLAIN`.
    `figures` maps names to text, such as "Dice" to "0.913", and is shown in its order; `note` is small print.
    All of it is plain text: the page escapes it.
    """

    title: str
    mesh: Triangles
    classes: UInt8[np.ndarray, " n"] | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def comparison_page(
    columns: Sequence[Column],
    *,
    title: str = "Comparison",
    truth: Triangles | None = None,
    planes: Sequence[Float[np.ndarray, "4 3"]] = (),
    classes: Sequence[str] = MATTER,
    notes: Sequence[str] = (),
) -> str:
    """The page as one HTML document of UTF-8 text; write it with `genmed.files.write_bytes`.

    Args:
        columns: 1 to 12 of them.
        truth: the full shape, drawn as a translucent ghost in every column.
        planes: the corners of cutting planes in mm, going round (`slice_corners` makes them).
        classes: at most 7 names of what the columns' classes mean. The legend shows those that occur.
        notes: paragraphs below the columns, such as the definitions of the figures.

    Meshes of more than 60 000 triangles are decimated for the page, and their column says so. Positions are rounded
    to 1/65535 of the longest side of the box round all meshes. Raises `GenMedError` for too many columns or classes,
    and for meshes without triangles, with vertices that are not finite or with classes that do not fit.
    """
    if not 1 <= len(columns) <= MAX_COLUMNS:
        raise GenMedError(f"a page shows 1 to {MAX_COLUMNS} shapes, not {len(columns)}; make several pages.")
    if len(classes) > len(COLOURS):
        raise GenMedError(f"a page has {len(COLOURS)} colours, too few for {len(classes)} classes; join some of them.")
    whole = [] if truth is None else [Column("the truth", truth)]
    for column in (*columns, *whole):
        _check(column, len(classes))
    columns = [_light(column) for column in columns]
    ghost = _light(whole[0]).mesh if whole else None
    scene = _scene(columns, ghost, planes)
    shown = {int(value) for column in columns if column.classes is not None for value in np.unique(column.classes)}
    shown.discard(PLAIN)
    switches = {
        "ghost": ("Ghost of the truth", ghost is not None),
        "planes": ("Cutting planes", len(planes) > 0),
        "colours": ("Colours", len(shown) > 0),
    }
    keys = "".join(_KEY.format(colour=COLOURS[k], text=escape(classes[k])) for k in sorted(shown))
    script, style = (files("genmed").joinpath("viewer", name).read_text("utf-8") for name in ("page.js", "page.css"))
    return _PAGE.format(
        title=escape(title),
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; {_NO_ESCAPE}",
        style=style,
        switches="".join(_SWITCH.format(id=id, text=text) for id, (text, there) in switches.items() if there),
        legend=f'<ul class="bar legend" aria-label="Colours">{keys}</ul>' if keys else "",
        count=len(columns),
        columns="\n".join(map(_figure, columns)),
        notes="".join(f"<p class=small>{escape(note)}</p>" for note in notes),
        scene=json.dumps(scene, separators=(",", ":")),
        script=script,
    )


def slice_corners(
    affine: Float[np.ndarray, "4 4"], axis: int, index: float, vertices: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "4 3"]:
    """Corners in mm of slice `index` along an array axis, cut to the box round `vertices` (mm) and a little more."""
    at = (vertices - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    low, high = at.min(axis=0), at.max(axis=0)
    margin = 0.08 * (high - low)
    corners = np.empty((4, 3))
    corners[:, axis] = index
    for other, ends in zip((k for k in range(3) if k != axis), ([0, 1, 1, 0], [0, 0, 1, 1]), strict=True):
        corners[:, other] = np.array([low[other] - margin[other], high[other] + margin[other]])[ends]
    return corners @ affine[:3, :3].T + affine[:3, 3]


def matter(
    vertices: Float[np.ndarray, "n 3"], observed: Volume, redundant: Volume | None = None
) -> UInt8[np.ndarray, " n"]:
    """The class of each vertex (mm) from masks: `OBSERVED` where `observed` is set in the closest voxel, `REDUNDANT`
    where `redundant` is, `UNOBSERVED` elsewhere, also outside of the masks' grids."""
    classes = np.where(_at(observed, vertices), OBSERVED, UNOBSERVED)
    if redundant is not None:
        classes[_at(redundant, vertices)] = REDUNDANT
    return classes.astype(np.uint8)


def _at(mask: Volume, points: np.ndarray) -> np.ndarray:
    """Whether the voxel closest to each point (n, 3) in mm is set."""
    index = np.rint((points - mask.affine[:3, 3]) @ np.linalg.inv(mask.affine[:3, :3]).T).astype(np.int64)
    within = ((index >= 0) & (index < mask.grid.shape)).all(axis=1)
    found = np.zeros(len(points), dtype=bool)
    found[within] = mask.data[0][tuple(index[within].T)] != 0
    return found


# Geometry -------------------------------------------------------------------------------------------------


def _check(column: Column, class_count: int) -> None:
    mesh, name = column.mesh, column.title
    if len(mesh.faces) == 0:
        raise GenMedError(f"{name}: has no triangles, so there is nothing to show; leave it out.")
    if not np.isfinite(mesh.vertices).all():
        raise GenMedError(f"{name}: has vertices that are NaN or infinite; export the mesh again.")
    if column.classes is None:
        return
    if column.classes.shape != (len(mesh.vertices),):
        raise GenMedError(f"{name}: {column.classes.size} classes for {len(mesh.vertices)} vertices; give one each.")
    if not ((column.classes < class_count) | (column.classes == PLAIN)).all():
        raise GenMedError(f"{name}: has classes beyond the {class_count} that are named; name them all.")


def _light(column: Column) -> Column:
    """The column with at most `MAX_FACES` triangles; classes are those of the closest vertices."""
    count = len(column.mesh.faces)
    if count <= MAX_FACES:
        return column
    from scipy.spatial import cKDTree

    light = decimated(column.mesh, MAX_FACES)
    classes = None
    if column.classes is not None:
        classes = column.classes[cKDTree(column.mesh.vertices).query(light.vertices)[1]]
    text = f"Shown with {len(light.faces):,} of its {count:,} triangles.".replace(",", "\u202f")
    note = f"{column.note} {text}".strip()
    return Column(column.title, light, classes, column.figures, note)


def _scene(columns: Sequence[Column], ghost: Triangles | None, planes: Sequence[np.ndarray]) -> dict[str, Any]:
    """What the script reads (viewer/src/geometry.ts): numbers and base64, no text of the caller."""
    meshes = [column.mesh for column in columns] + ([] if ghost is None else [ghost])
    low = np.min([mesh.vertices.min(axis=0) for mesh in meshes], axis=0)
    size = np.max([mesh.vertices.max(axis=0) for mesh in meshes], axis=0) - low
    step = float(size.max()) / 65535 or 1.0
    return {
        "origin": low.tolist(),
        "step": step,
        "size": size.tolist(),
        "colours": COLOURS,
        "columns": [_pack(column.mesh, column.classes, low, step) for column in columns],
        "ghost": None if ghost is None else _pack(ghost, None, low, step),
        "planes": [_plane(corners) for corners in planes],
    }


def _plane(corners: np.ndarray) -> list[list[float]]:
    corners = np.asarray(corners, dtype=np.float64)
    if corners.shape != (4, 3) or not np.isfinite(corners).all():
        raise GenMedError(f"a cutting plane is 4 corners of 3 finite numbers (mm), not {corners.shape}.")
    return corners.tolist()


def _pack(mesh: Triangles, classes: np.ndarray | None, low: np.ndarray, step: float) -> dict[str, Any]:
    """16 bit positions, 32 bit triangles and 8 bit classes, as differences in byte planes, deflated, as base64."""
    positions = np.rint((np.asarray(mesh.vertices) - low) / step).clip(0, 65535).astype("<u2")
    triangles = np.asarray(mesh.faces).astype("<u4")
    content = _differences(positions) + _differences(triangles) + (b"" if classes is None else classes.tobytes())
    return {
        "vertices": len(positions),
        "triangles": len(triangles),
        "classes": classes is not None,
        "data": base64.b64encode(zlib.compress(content, 6)).decode("ascii"),
    }


def _differences(rows: Int[np.ndarray, "n 3"]) -> bytes:
    """Of each row to the one before, modulo the type's range: first all low bytes, (3, n), then the higher ones."""
    differences = np.diff(rows, axis=0, prepend=rows.dtype.type(0)).T
    return np.ascontiguousarray(differences).view(np.uint8).reshape(-1, rows.dtype.itemsize).T.tobytes()


# HTML -----------------------------------------------------------------------------------------------------


def _figure(column: Column) -> str:
    title = escape(column.title)
    figures = "".join(
        f"<div><dt>{escape(name)}</dt> <dd>{escape(text)}</dd></div>" for name, text in column.figures.items()
    )
    note = f"<p class=small>{escape(column.note)}</p>" if column.note else ""
    return (
        f'<figure><canvas tabindex=0 role=application aria-roledescription="3D picture" aria-label="{title}" '
        f"aria-describedby=help></canvas><figcaption><h2>{title}</h2>"
        f"{f'<dl>{figures}</dl>' if figures else ''}{note}</figcaption></figure>"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


_NO_ESCAPE = "base-uri 'none'; form-action 'none'"
_SWITCH = "<label><input type=checkbox id={id} checked>{text}</label>"
_KEY = '<li><svg viewBox="0 0 1 1" aria-hidden=true><rect width=1 height=1 fill="{colour}"></rect></svg>{text}</li>'
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style></head>
<body>
<header><h1>{title}</h1>
<div class=bar>{switches}<button id=reset type=button>Reset view</button>
<button id=theme type=button>Dark or light</button></div>
{legend}</header>
<p id=problem class=problem role=alert hidden></p>
<noscript><p class=problem>The 3D pictures need JavaScript. The titles and figures below still hold.</p></noscript>
<main data-columns={count}>
{columns}
</main>
<footer><p class=small id=help>Drag to turn, pinch to zoom. With the keyboard: choose a picture with <kbd>Tab</kbd>,
then arrow keys to turn, <kbd>+</kbd> and <kbd>−</kbd> to zoom, <kbd>0</kbd> to reset. The wheel zooms once a picture
was clicked. All pictures move together: <output id=view></output>.</p>
{notes}</footer>
<script type="application/json" id=scene>{scene}</script>
<script>{script}</script>
</body></html>
"""
