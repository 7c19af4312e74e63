"""Which cell is evicted while generating, found the slow, obvious way.

Nothing here knows the package under test.
"""

from __future__ import annotations

import numpy as np

TEXT, GENERATED = 0, 2
NEWEST, SHORT = 16, 4  # tokens never evicted unless "heavy"; an answer that spares text


def cell_to_evict(
    rule: str,
    kind: np.ndarray,
    pinned: np.ndarray,
    n_prompt: int,
    offset: int,
    n_sink: int,
    total: np.ndarray,
) -> int:
    """Logical index of the cell to evict, -1 when none may be."""
    n_cells = len(kind)
    movable = [i for i in range(n_sink, n_cells - 1) if not pinned[i]]
    if rule == "keep" or not movable:
        return -1
    finite = [i for i in movable if np.isfinite(total[i])]
    generated = [i for i in movable if kind[i] == GENERATED]
    if rule == "lowest":
        if finite:
            return min(finite, key=lambda i: (total[i], i))
        if generated:
            return generated[0]
    place = max(n_sink, min(n_prompt - offset, n_cells - 2))
    later = [i for i in movable if i >= place]
    return later[0] if later else movable[-1]


def eviction_candidates(
    rule: str, kind: np.ndarray, pinned: np.ndarray, n_sink: int, total: np.ndarray
) -> list[int]:
    """Cells among which each head loses one of its own."""
    n_cells = len(kind)
    n_recent = max(1, n_cells // 2) if rule == "heavy" else NEWEST
    free = [i for i in range(n_sink, n_cells - n_recent) if not pinned[i]]
    if rule == "heavy" or sum(k == GENERATED for k in kind) > SHORT:
        return free
    spared = {i for i in free if kind[i] == TEXT and np.isinf(total[i])}
    return [i for i in free if i not in spared] or free
