"""Small files, whole or not at all: write to a temporary file, then rename."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from genmed.errors import GenMedError


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file so that no reader, and no kill, ever sees half of it. Makes missing parent folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def require_room(option: str, path: Path) -> None:
    """Raise `GenMedError` where no file can be put: what exists of its folder must be one, and writable."""
    above = path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise GenMedError(f"{option} {path}: {above} is no folder that may be written to; choose another.")


def write_json(path: str | Path, content: Any) -> Path:
    """`write_bytes` of indented JSON. NaN is refused: it is not JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_bytes(path, text.encode("utf-8"))


def sha256_of(*paths: Path) -> str:
    """SHA-256 over the bytes of one file, or of several in the order given, read in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
