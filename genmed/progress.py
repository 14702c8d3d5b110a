"""The one progress bar of loops over cases."""

from collections.abc import Collection, Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Collection[T], description: str) -> Iterable[T]:
    """The items in turn, under a bar on stderr that goes away in the end."""
    from rich.console import Console
    from rich.progress import track as bar

    return bar(items, description=description, console=Console(stderr=True), transient=True)
