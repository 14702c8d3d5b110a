"""Segmentation and completion chained: what is sure stays, what is not is completed, from Python and the command line."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_cli import failed_in_one_line
from test_complete import folder, kidney, model  # noqa: F401  the tiny model of shapes
from test_shape import dice
from tiny import PLAN, tiny_denoiser
from typer.testing import CliRunner, Result

from genmed import hub
from genmed.cli import app
from genmed.errors import GenMedError
from genmed.plan import Plan
from genmed.shape_model import ShapeModel
from genmed.tasks.chain import chain, completed, divided, joined, shares, structures_of
from genmed.volume import Grid, Volume

AFFINE = np.diag([4.0, 4, 4, 1])


def genmed(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def slices(count: int = 4, axis: int = 2) -> np.ndarray:
    """A mask of a few slices through the kidney of the tiny set."""
    seen = np.zeros((36, 36, 36), bool)
    kept = np.linspace(6, 26, count).round().astype(int)
    seen[(slice(None),) * axis + (kept,)] = True
    return seen
