"""Property-based tests draw the same examples in every run: a failure is never a matter of luck."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def tiny_shapes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny trained model of shapes."""
    from tiny_shapes import write_shapes

    from genmed.train_shapes import train_shapes

    root = tmp_path_factory.mktemp("model")
    return train_shapes(
        write_shapes(root / "set"), root / "tiny", steps=400, modes=24, width=96, blocks=2, refiner=4, batch=48
    )
