"""A progress bar over bytes, shown only where somebody can see it and has to wait."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

SHOWN_FROM_BYTES = 256 * 2**20


@contextlib.contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(nbytes)`; draws on standard error if that is a terminal and the total is large."""
    if total_bytes < SHOWN_FROM_BYTES or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn(title), bars.BarColumn(), bars.DownloadColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)
