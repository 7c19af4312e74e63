"""Positions and cells: with M-RoPE an image takes more cells than positions.

A text token takes one of both. An image of rows x columns embeddings takes a cell for each, but its
positions go on by max(rows, columns) alone, and all its cells are at the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ImageSpans"]


class ImageSpans:
    """The images of sequence 0 whose cells are all at their first position (M-RoPE).

    Parameters
    ----------
    spans : mapping of int to (int, int), optional
        Positions and cells of each image, by its first position.
    """

    def __init__(self, spans: Mapping[int, tuple[int, int]] | None = None) -> None:
        self._spans = dict(spans or {})

    def put(self, start: int, n_positions: int, n_cells: int) -> None:
        """Note an image that was decoded at `start`, where the sequence ended."""
        self.cut(start)
        self._spans[start] = (n_positions, n_cells)

    def cut(self, n: int) -> None:
        """Forget what does not end within the first `n` positions."""
        for start, (n_positions, _) in list(self._spans.items()):
            if start + n_positions > n:
                del self._spans[start]

    def n_cells(self, n: int) -> int:
        """Cells that the first `n` positions take while nothing of them is compressed."""
        return n + sum(
            n_cells - n_positions
            for start, (n_positions, n_cells) in self._spans.items()
            if start < n
        )

    def end(self, n: int) -> int:
        """Where the next token goes, `n` being the position behind the last cell's."""
        return n - 1 + self._spans[n - 1][0] if n - 1 in self._spans else n

    def is_inside(self, n: int) -> bool:
        """Whether a cut at `n` would go through one of the images."""
        return any(start < n < start + length for start, (length, _) in self._spans.items())

    def copy(self) -> dict[int, tuple[int, int]]:
        """As the parameter `spans`."""
        return dict(self._spans)
