"""Where commands print; rich is imported once they do, as help and mistakes are answered without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console of rich's."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet)
