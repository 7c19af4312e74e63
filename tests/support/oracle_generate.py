"""Which cell leaves while generating, found the slow, obvious way.

Nothing here knows the package under test.
"""

from __future__ import annotations

import numpy as np

IMAGE, GENERATED = 1, 2


def leaving_cell(
    rule: str,
    kind: np.ndarray,
    pinned: np.ndarray,
    n_prompt: int,
    offset: int,
    n_sink: int,
    total: np.ndarray,
) -> int:
    """Logical index of the cell that leaves, -1 when none may."""
    n_cells = len(kind)
    movable = [i for i in range(n_sink, n_cells - 1) if not pinned[i]]
    if rule == "keep" or not movable:
        return -1
    if rule == "score":
        image = [i for i in movable if kind[i] == IMAGE]
        generated = [i for i in movable if kind[i] == GENERATED]
        if image:
            return min(image, key=lambda i: (total[i], i))
        if generated:
            return generated[0]
    place = max(n_sink, min(n_prompt - offset, n_cells - 2))
    later = [i for i in movable if i >= place]
    return later[0] if later else movable[-1]
