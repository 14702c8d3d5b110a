"""GenMed: one diffusion model of P(image, label), steered at test time by whatever was observed.

    import genmed as gm

    model = gm.load("hippocampus-mr")
    scan = gm.read("scan.nii.gz")
    result = gm.segment(model, scan)
    result.labels.save("labels.nii.gz")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genmed.errors import GenMedError as GenMedError
    from genmed.hub import Model as Model
    from genmed.shape_model import ShapeModel as ShapeModel
    from genmed.shape_model import load as load
    from genmed.tasks.chain import Chained as Chained
    from genmed.tasks.chain import chain as chain
    from genmed.tasks.complete import Completion as Completion
    from genmed.tasks.complete import complete as complete
    from genmed.tasks.complete import generate as generate
    from genmed.tasks.restore import Restoration as Restoration
    from genmed.tasks.restore import restore as restore
    from genmed.tasks.restore import translate as translate
    from genmed.tasks.segment import Segmentation as Segmentation
    from genmed.tasks.segment import segment as segment
    from genmed.volume import Volume as Volume
    from genmed.volume import read as read
    from genmed.volume import read_labels as read_labels

__version__ = "0.1.0"

_HOME = {
    "Chained": "genmed.tasks.chain",
    "Completion": "genmed.tasks.complete",
    "GenMedError": "genmed.errors",
    "Model": "genmed.hub",
    "Restoration": "genmed.tasks.restore",
    "ShapeModel": "genmed.shape_model",
    "Segmentation": "genmed.tasks.segment",
    "Volume": "genmed.volume",
    "chain": "genmed.tasks.chain",
    "complete": "genmed.tasks.complete",
    "generate": "genmed.tasks.complete",
    "load": "genmed.shape_model",
    "read": "genmed.volume",
    "read_labels": "genmed.volume",
    "restore": "genmed.tasks.restore",
    "segment": "genmed.tasks.segment",
    "translate": "genmed.tasks.restore",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch takes seconds, `genmed --help` must not."""
    if name not in _HOME:
        raise AttributeError(f"module 'genmed' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
