"""The closing table of a run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..stats import MIB, TurnStats


def print_table(rows: list[tuple[str, TurnStats]], console: Console | None = None) -> None:
    """One row per run: cells, KV memory, times, speed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("KV cache")
    for name in (
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
    ):
        table.add_column(name, justify="right")
    for name, s in rows:
        table.add_row(
            name,
            str(s.cells_prompt),
            str(s.cells_kept),
            f"{100 * s.pruned_share:.0f} %",
            f"{s.bytes_prompt / MIB:.2f}",
            f"{s.bytes_kept / MIB:.2f}",
            f"{s.encode_ms:.0f}",
            f"{s.prefill_ms:.0f}",
            f"{s.compress_ms:.1f}",
            f"{s.decode_ms:.0f}",
            f"{s.tokens_per_second:.1f}",
        )
    (console or Console(width=None if _is_terminal() else 120, soft_wrap=False)).print(table)


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
