"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..stats import MIB, TurnStats

T = TypeVar("T")


def print_table(rows: list[tuple[str, TurnStats]], console: Console | None = None) -> None:
    """One row per run: cells, KV memory of all parts, times, speed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    mixed = any(s.other_bytes for _, s in rows)
    table.add_column("KV cache")
    names = [
        "prompt cells",
        "kept",
        "pruned",
        "KV MiB",
        "kept MiB",
        "encode ms",
        "prefill ms",
        "compress ms",
        "decode ms",
        "tokens/s",
    ]
    if mixed:
        names.insert(names.index("kept MiB") + 1, "fixed MiB")
    for name in names:
        table.add_column(name, justify="right")
    for name, s in rows:
        table.add_row(
            name,
            str(s.cells_prompt),
            str(s.cells_kept),
            f"{100 * s.pruned_share:.0f} %",
            f"{s.bytes_prompt / MIB:.2f}",
            f"{s.bytes_kept / MIB:.2f}",
            *([f"{s.other_bytes / MIB:.2f}"] if mixed else []),
            f"{s.encode_ms:.0f}",
            f"{s.prefill_ms:.0f}",
            f"{s.compress_ms:.1f}",
            f"{s.decode_ms:.0f}",
            f"{s.tokens_per_second:.1f}",
        )
    width = None if _is_terminal() else 132 if mixed else 120
    console = console or Console(width=width, soft_wrap=False)
    console.print(table)
    if mixed:
        console.print(
            "MiB and pruned are those of the whole memory. Fixed, in both MiB, is what is never "
            f"compressed: {rows[-1][1].other_parts}.",
            highlight=False,
        )


def progress(items: Iterable[T], what: str, n: int) -> Iterator[T]:
    """The items, with a bar and the time that is left on the terminal's stderr."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )
    with bar:
        yield from bar.track(items, total=n)


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
