"""Plans made the slow, obvious way, to compare the core with.

Nothing here knows the package under test. A plan is ``kept`` [L, H, N] (logical indices, ascending)
and ``bucket`` [L, H, T] (rank of the anchor that a cell joins, -1: evicted).
"""

from __future__ import annotations

import numpy as np

TEXT, IMAGE, GENERATED = 0, 1, 2


def scores(rule: str, importance: np.ndarray) -> np.ndarray:
    """Score of every cell [L, H, T]; higher is kept."""
    n_layer, n_head, n_cells = importance.shape
    out = np.zeros(importance.shape, dtype=np.float32)
    for layer in range(n_layer):
        for i in range(n_cells):
            mean = sum(float(x) for x in importance[layer, :, i]) / n_head
            for head in range(n_head):
                if rule == "frequency":
                    out[layer, head, i] = importance[layer, head, i]
                elif rule == "frequency_layer":
                    out[layer, head, i] = mean
                elif rule == "recency":
                    out[layer, head, i] = i
    return out


def protected(kind: np.ndarray, pinned: np.ndarray, n_keep: int, n_sink: int) -> set[int]:
    """Cells that stay whatever their score: sinks, the last cell, pinned cells."""
    n_cells = len(kind)
    cells = {n_cells - 1}
    cells |= set(range(min(n_sink, n_keep - 1)))
    cells |= {i for i in range(n_cells) if pinned[i]}
    return cells


def split(n_keep: int, n_text: int, n_image: int) -> tuple[int, int]:
    """Text and image cells that stay.

    All text stays while it leaves images half of their proportional share; otherwise images get
    that half share and text the rest.
    """
    if n_text + n_image == 0:
        return 0, 0
    half_share = (n_keep * n_image) // (2 * (n_text + n_image))
    if n_keep - n_text >= half_share:
        text = min(n_text, n_keep)
    else:
        text = n_keep - half_share
    return text, n_keep - text


def segments(kind: np.ndarray) -> list[list[int]]:
    """Runs of cells that are all image cells or all something else."""
    runs: list[list[int]] = []
    for i in range(len(kind)):
        if runs and (kind[runs[-1][-1]] == IMAGE) == (kind[i] == IMAGE):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def share(runs: list[list[int]], stay: set[int], n_keep: int) -> list[int]:
    """Kept cells per run: the protected ones, then a proportional share, the rest to the first."""
    fixed = [sum(i in stay for i in run) for run in runs]
    free = [len(run) - f for run, f in zip(runs, fixed)]
    left = n_keep - sum(fixed)
    shares = [left * n // sum(free) if sum(free) else 0 for n in free]
    while sum(shares) < left:
        before = sum(shares)
        for k in range(len(runs)):
            if shares[k] < free[k] and sum(shares) < left:
                shares[k] += 1
        assert sum(shares) > before, "more to keep than there are cells"
    return [f + s for f, s in zip(fixed, shares)]


def quotas(rule: str, kind: np.ndarray, stay: set[int], n_keep: int) -> list[tuple[list[int], int]]:
    """Runs of cells, each with the number of its cells that stay, the same for every head."""
    if rule != "image_first":
        return [(list(range(len(kind))), n_keep)]
    runs = segments(kind)
    image = [run for run in runs if kind[run[0]] == IMAGE]
    text = [run for run in runs if kind[run[0]] != IMAGE]
    n_text, _ = split(n_keep, sum(map(len, text)), sum(map(len, image)))
    must_text = sum(i in stay for run in text for i in run)
    must_image = sum(i in stay for run in image for i in run)
    n_text = min(max(n_text, must_text), n_keep - must_image)
    found = list(zip(text, share(text, stay, n_text)))
    return found + list(zip(image, share(image, stay, n_keep - n_text)))


def select(
    rule: str, kind: np.ndarray, pinned: np.ndarray, score: np.ndarray, n_keep: int, n_sink: int
) -> np.ndarray | None:
    """Kept cells [L, H, N], or None when the protected cells alone are too many."""
    n_layer, n_head, n_cells = score.shape
    if rule == "all":
        return np.tile(np.arange(n_cells), (n_layer, n_head, 1))
    stay = protected(kind, pinned, n_keep, n_sink)
    if len(stay) > n_keep:
        return None
    kept = np.empty((n_layer, n_head, n_keep), dtype=np.int64)
    for layer in range(n_layer):
        for head in range(n_head):
            chosen: list[int] = []
            for run, n in quotas(rule, kind, stay, n_keep):
                order = sorted(run, key=lambda i: (i not in stay, -score[layer, head, i], i))
                chosen += order[:n]
            kept[layer, head] = sorted(chosen)
    return kept


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def anchor_of(
    rule: str, i: int, kept: np.ndarray, kind: np.ndarray, pinned: np.ndarray, keys: np.ndarray
) -> int:
    """Rank of the kept cell that dropped cell i joins, -1 for none."""
    ranks = [j for j in range(len(kept)) if not pinned[kept[j]]]
    if rule == "nearest_mean":
        return min(ranks, key=lambda j: (abs(kept[j] - i), j), default=-1)
    if rule == "mass" and kind[i] == IMAGE:
        ranks = [j for j in ranks if kind[kept[j]] == IMAGE]
        return min(ranks, key=lambda j: (-cosine(keys[i], keys[kept[j]]), j), default=-1)
    return -1


def buckets(
    rule: str, kept: np.ndarray, kind: np.ndarray, pinned: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Bucket of every cell [L, H, T]; ``keys`` [L, H, T, d] is used by ``mass`` only."""
    n_layer, n_head, _ = kept.shape
    out = np.empty((n_layer, n_head, len(kind)), dtype=np.int64)
    for layer, head in np.ndindex(n_layer, n_head):
        row = list(kept[layer, head])
        for i in range(len(kind)):
            if i in row:
                out[layer, head, i] = row.index(i)
            else:
                out[layer, head, i] = anchor_of(
                    rule, i, kept[layer, head], kind, pinned, keys[layer, head]
                )
    return out
