"""VTK's PolyData files (.vtp), triangles only: https://docs.vtk.org/en/latest/vtk_file_formats/vtkxml_file_format.html.

Reads ascii, inline and appended data, plain or zlib; writes ascii. VTK itself would weigh a hundred megabytes.
"""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np

TYPES = {
    "Float32": "f4", "Float64": "f8", "Int8": "i1", "UInt8": "u1", "Int16": "i2", "UInt16": "u2",
    "Int32": "i4", "UInt32": "u4", "Int64": "i8", "UInt64": "u8", "String": "u1",
}  # fmt: skip


def decode(content: bytes) -> tuple[np.ndarray, np.ndarray, str]:
    """Vertices (n, 3) and triangles (m, 3) of all pieces, and the space that 3D Slicer notes ("LPS", "RAS" or "").

    Polygons become fans. Raises ValueError.
    """
    try:
        return _decoded(content)
    except (ElementTree.ParseError, KeyError, IndexError, TypeError, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def encode(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """An ascii file with one piece, whose vertices are RAS."""
    root = ElementTree.Element("VTKFile", type="PolyData", version="1.0", byte_order="LittleEndian")
    counts = {"NumberOfPoints": str(len(vertices)), "NumberOfPolys": str(len(faces))}
    data = ElementTree.SubElement(root, "PolyData")
    facts = {"type": "String", "Name": "SPACE", "NumberOfTuples": "1", "format": "ascii"}
    space = ElementTree.SubElement(ElementTree.SubElement(data, "FieldData"), "Array", facts)
    space.text = " ".join(map(str, b"RAS\0"))
    piece = ElementTree.SubElement(data, "Piece", counts)
    points, polys = ElementTree.SubElement(piece, "Points"), ElementTree.SubElement(piece, "Polys")
    _add(points, "Float64", "Points", vertices)
    _add(polys, "Int64", "connectivity", faces)
    _add(polys, "Int64", "offsets", 3 * np.arange(1, len(faces) + 1))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _add(parent: ElementTree.Element, kind: str, name: str, values: np.ndarray) -> None:
    components = str(values.shape[1] if name == "Points" else 1)
    facts = {"type": kind, "Name": name, "format": "ascii", "NumberOfComponents": components}
    element = ElementTree.SubElement(parent, "DataArray", facts)
    element.text = " ".join(map(repr, values.ravel().tolist()))


def _decoded(content: bytes) -> tuple[np.ndarray, np.ndarray, str]:
    appended, is_base64 = b"", False
    if (start := content.find(b"<AppendedData")) >= 0:
        appended = content[content.index(b"_", start) + 1 : content.rindex(b"</AppendedData>")]
        is_base64 = b"base64" in content[start : content.index(b">", start)]
        content = content[:start] + b"</VTKFile>"
    root = ElementTree.fromstring(content)
    if root.get("type") != "PolyData":
        raise ValueError(f"it is {root.get('type')}, not PolyData")
    vertices, triangles, first = [], [], 0
    for piece in root.iter("Piece"):
        if int(piece.get("NumberOfStrips", 0)):
            raise ValueError("it has triangle strips; convert them to triangles")
        arrays = {
            element.get("Name", tag): _values(element, root, appended, is_base64)
            for tag in ("Points", "Polys")
            for element in piece.iterfind(f"{tag}/DataArray")
            if tag == "Points" or element.get("Name") in ("connectivity", "offsets")
        }
        none = np.zeros(0, np.int64)  # points alone
        connectivity, offsets = arrays.pop("connectivity", none), arrays.pop("offsets", none)
        (points,) = arrays.values()
        vertices.append(points.reshape(-1, 3))
        triangles.append(_fans(connectivity.astype(np.int64), offsets.astype(np.int64)) + first)
        first += len(vertices[-1])
    if not vertices:
        raise ValueError("it has no piece")
    noted = root.find("PolyData/FieldData/Array[@Name='SPACE']")
    space = b"" if noted is None else _values(noted, root, appended, is_base64).tobytes()
    return np.concatenate(vertices).astype(np.float64), np.concatenate(triangles), space.rstrip(b"\0").decode("ascii")


def _values(element: ElementTree.Element, root: ElementTree.Element, appended: bytes, is_base64: bool) -> np.ndarray:
    order = "<" if root.get("byte_order", "LittleEndian") == "LittleEndian" else ">"
    dtype = np.dtype(order + TYPES[element.attrib["type"]])
    kind, text = element.get("format", "ascii"), (element.text or "").strip()
    if kind == "ascii":
        return np.array(text.split(), dtype=dtype)
    stream = appended[int(element.attrib["offset"]) :] if kind == "appended" else text.encode("ascii")
    if kind == "binary" or is_base64:
        stream = _unbase64(stream)
    header = np.dtype(order + TYPES[root.get("header_type", "UInt32")])
    compressor = root.get("compressor")
    if compressor not in (None, "", "vtkZLibDataCompressor"):
        raise ValueError(f"compression by {compressor} is not read; write it with zlib or without")
    return np.frombuffer(_unzipped(stream, header) if compressor else _counted(stream, header), dtype)


def _unbase64(text: bytes) -> bytes:
    """Several base64 runs after each other, each with its own padding; trailing fragments are cut."""
    runs = re.findall(rb"[A-Za-z0-9+/]+={0,2}", re.sub(rb"\s+", b"", text))
    return b"".join(base64.b64decode(run[: len(run) // 4 * 4]) for run in runs)


def _counted(stream: bytes, header: np.dtype) -> bytes:
    size = int(np.frombuffer(stream, header, 1)[0])
    return stream[header.itemsize : header.itemsize + size]


def _unzipped(stream: bytes, header: np.dtype) -> bytes:
    """[number of blocks, size, size of the last one, compressed sizes …] and the blocks."""
    blocks = int(np.frombuffer(stream, header, 1)[0])
    sizes = np.frombuffer(stream, header, blocks, offset=3 * header.itemsize).astype(int)
    ends = (3 + blocks) * header.itemsize + np.cumsum(sizes)
    return b"".join(zlib.decompress(stream[end - size : end]) for end, size in zip(ends, sizes, strict=True))


def _fans(connectivity: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Triangles of polygons given by the end of each in the list of corners."""
    starts = np.concatenate([[0], offsets[:-1]]).astype(np.int64)
    corners = offsets - starts
    count = np.maximum(corners - 2, 0)
    of = np.repeat(np.arange(len(offsets)), count)
    turn = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    first = starts[of]
    return connectivity[np.column_stack([first, first + turn + 1, first + turn + 2])]
