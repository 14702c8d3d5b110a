"""Public data sets for the tests that need real scans."""

import os
from pathlib import Path

import pytest


def real_set(name: str) -> Path:
    """Its folder below the one that the variable GENMED_DATA names; the test is skipped where it is not there."""
    root = os.environ.get("GENMED_DATA")
    if not root:
        pytest.skip(f"needs the public set {name}; to run it: GENMED_DATA=FOLDER_OF_SETS python -m pytest")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"needs the public set {name}, which GENMED_DATA={root} lacks; add it there")
    return folder
