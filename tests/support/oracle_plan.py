"""Plans made the slow, obvious way, to compare the core with.

Nothing here knows the package under test. A plan is ``kept`` [L, H, N] (logical indices in rank
order) and ``bucket`` [L, H, T] (rank of the anchor that a cell joins, -1: evicted).

What came before is told by ``old`` [T] (1: text of an earlier turn) and ``tokens`` [T] (tokens that
a cell stands for); without them all is of the present turn, and a cell stands for one token.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

TEXT, IMAGE, GENERATED = 0, 1, 2


WINDOW, POOL, ASKED_AHEAD, TEXT_RECENT, IMAGE_START = 32, 7, 3, 16, 3
FOLLOW = np.float64(np.float32(0.94))
IMAGE_POWER = 0.5  # of the score of an image cell, rule expected_attention_damped


def scores(
    rule: str,
    kind: np.ndarray,
    importance: np.ndarray,
    recent: np.ndarray | None = None,
    keys: np.ndarray | None = None,
    values: np.ndarray | None = None,
) -> np.ndarray:
    """Score of every cell [L, H, T]; higher is kept. ``keys``, ``values`` are [L, H, T, d]."""
    n_layer, n_head, n_cells = importance.shape
    out = np.zeros(importance.shape, dtype=np.float32)
    for layer, head in np.ndindex(n_layer, n_head):
        sums = importance[layer, head].astype(np.float64)
        pool = None if recent is None else pooled(recent[layer, head], POOL)
        for i in range(n_cells):
            if rule == "frequency":
                out[layer, head, i] = sums[i]
            elif rule == "frequency_layer":
                out[layer, head, i] = sum(float(x) for x in importance[layer, :, i]) / n_head
            elif rule == "recency":
                out[layer, head, i] = i
            elif rule == "random":
                out[layer, head, i] = drawn((layer << 48) ^ (head << 32) ^ i)
            elif rule == "key_norm":
                out[layer, head, i] = -np.linalg.norm(keys[layer, head, i].astype(np.float64))
            elif rule == "window_mean":
                seen_by = min(WINDOW, n_cells - i)  # of the last queries
                norm = np.linalg.norm(values[layer, head, i].astype(np.float64))
                out[layer, head, i] = float(recent[layer, head, i]) / seen_by * norm
            elif rule == "window":
                out[layer, head, i] = pool[i]
            elif rule in ("expected_attention", "expected_attention_damped"):
                row = recent[layer, head]
                asked = share_of(row[i], row)
                if kind[i] != IMAGE:
                    next_ = carried(row)
                    asked = (asked + share_of(next_[i], next_)) / 2
                elif kind[-1] == IMAGE:
                    asked *= ASKED_AHEAD
                out[layer, head, i] = share_of(sums[i], sums) + asked
                if rule == "expected_attention_damped" and kind[i] == IMAGE:
                    out[layer, head, i] = out[layer, head, i] ** IMAGE_POWER
    return out


def share_of(x: float, row: np.ndarray) -> float:
    total = sum(float(y) for y in row)
    return float(x) / total if total > 0 else 0.0


def pooled(row: np.ndarray, size: int) -> np.ndarray:
    """Mean over the `size` cells around each; fewer at the ends."""
    out = np.empty(len(row), dtype=np.float32)
    for i in range(len(row)):
        near = row[max(0, i - size // 2) : i + size // 2 + 1].astype(np.float64)
        out[i] = near.sum() / len(near)
    return out


def carried(row: np.ndarray) -> np.ndarray:
    """What a cell got and, less by FOLLOW per cell between, those before it; without the first."""
    x = row.astype(np.float64)
    return np.array(
        [
            sum(x[j] * FOLLOW ** (i - j) for j in range(1, i + 1)) if i else 0.0
            for i in range(len(x))
        ],
        dtype=np.float32,
    )


def drawn(x: int) -> float:
    """A number in [0, 1) that depends on x only (splitmix64's output function)."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 40) / (1 << 24)


def ends(rule: str, n_keep: int, n_sink: int) -> tuple[int, int]:
    """First and last cells that stay whatever their score."""
    n_last = {"heavy_recent": n_keep // 2, "window_top": min(WINDOW, n_keep // 2)}.get(rule, 1)
    n_last = max(1, n_last)
    return min(n_sink, n_keep - n_last), n_last


def has_past(kind: np.ndarray, old: Any) -> bool:
    """Whether an earlier turn left text, and there is an image."""
    return old is not None and any(old) and IMAGE in kind


def tokens_of(cells: Any, tokens: Any) -> int:
    """Tokens that the cells stand for."""
    cells = list(cells)
    return len(cells) if tokens is None or len(tokens) == 0 else sum(int(tokens[i]) for i in cells)


def question(kind: np.ndarray, old: Any) -> list[int]:
    """Text of the present turn, the newest first."""
    return [i for i in reversed(range(len(kind))) if kind[i] != IMAGE and not old[i]]


def verbatim(kind: np.ndarray, n_keep: int, old: Any = None) -> set[int]:
    """Cells that `coverage` keeps as they are.

    The newest text, the first cells of each image, and in a later turn the present question.
    """
    n_cells = len(kind)
    recent = range(max(0, n_cells - min(TEXT_RECENT, n_keep // 4)), n_cells)
    starts = [i for run in segments(kind) if kind[run[0]] == IMAGE for i in run[:IMAGE_START]]
    cells = {i for i in recent if kind[i] != IMAGE} | set(starts[: n_keep // 4])
    if has_past(kind, old):
        cells |= set(question(kind, old)[: n_keep // 2])
    return cells


def protected(
    rule: str, kind: np.ndarray, pinned: np.ndarray, n_keep: int, n_sink: int, old: Any = None
) -> set[int]:
    """Cells that stay whatever their score: the first, last and pinned ones; with coverage more."""
    n_cells = len(kind)
    n_first, n_last = ends(rule, n_keep, n_sink)
    cells = set(range(max(0, n_cells - n_last), n_cells))
    cells |= set(range(min(n_first, n_cells)))
    cells |= {i for i in range(n_cells) if pinned[i]}
    if rule == "coverage":
        free = sorted(verbatim(kind, n_keep, old) - cells, reverse=True)
        cells |= set(free[: max(0, n_keep - len(cells))])
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


def split_later(
    n_keep: int, kind: np.ndarray, old: Any, tokens: Any = None, masked: Any = None
) -> tuple[int, int]:
    """Text and image cells that stay in a later turn about an image.

    First the present question, then older text by the tokens it stands for; the image keeps what
    it has of the rest. Not less than half its share by tokens, nor less than text could not fill.
    """
    cells = range(len(kind))
    image = [i for i in cells if kind[i] == IMAGE]
    text = [i for i in cells if kind[i] != IMAGE]
    all_tokens = tokens_of(cells, tokens)
    older = n_keep * tokens_of([i for i in text if old[i]], tokens) // all_tokens
    half_share = n_keep * tokens_of(image, tokens) // (2 * all_tokens)
    has = len(image)
    if masked is not None:  # on average over the layers, rounded up
        rows = [sum(not row[i] for i in image) for row in masked]
        has = -(-sum(rows) // len(rows))
    n_image = min(n_keep - len(question(kind, old)) - older, has)
    n_image = max(n_image, min(half_share, len(image)), n_keep - len(text))
    return n_keep - n_image, n_image


def left_free(n_keep: int) -> int:
    """Cells that `elastic` leaves free for the answer when it compresses a prompt."""
    return min(4, n_keep // 8)


def segments(kind: np.ndarray) -> list[list[int]]:
    """Runs of cells that are all image cells or all something else."""
    runs: list[list[int]] = []
    for i in range(len(kind)):
        if runs and (kind[runs[-1][-1]] == IMAGE) == (kind[i] == IMAGE):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def share(runs: list[list[int]], stay: set[int], n_keep: int, tokens: Any = None) -> list[int]:
    """Kept cells per run: the protected ones, then in proportion to the tokens of the others.

    A run that has fewer cells than its part keeps all of them, and the others share what that
    leaves. Parts are rounded down; what is left over goes one by one to the first runs.
    """
    free = [[i for i in run if i not in stay] for run in runs]
    weights = [tokens_of(cells, tokens) for cells in free]
    fixed = [len(run) - len(cells) for run, cells in zip(runs, free)]
    left = n_keep - sum(fixed)
    assert 0 <= left <= sum(map(len, free)), "more to keep than there are cells, or less than must"

    whole: set[int] = set()
    while True:
        weight = sum(w for k, w in enumerate(weights) if k not in whole)
        rest = left - sum(len(free[k]) for k in whole)
        parts = [Fraction(rest * w, weight) if weight else Fraction(0) for w in weights]
        full = {k for k in range(len(runs)) if k not in whole and parts[k] >= len(free[k])}
        if not full:
            break
        whole |= full

    shares = [len(free[k]) if k in whole else int(parts[k]) for k in range(len(runs))]
    for k in range(len(runs)):
        if sum(shares) < left and shares[k] < len(free[k]):
            shares[k] += 1
    assert sum(shares) == left
    return [f + s for f, s in zip(fixed, shares)]


def quotas(
    rule: str,
    kind: np.ndarray,
    stay: set[int],
    n_keep: int,
    old: Any = None,
    tokens: Any = None,
    masked: Any = None,
) -> list[tuple[list[int], int]]:
    """Runs of cells, each with the number of its cells that stay, the same for every head."""
    if rule not in ("image_first", "coverage"):
        return [(list(range(len(kind))), n_keep)]
    runs = segments(kind)
    image = [run for run in runs if kind[run[0]] == IMAGE]
    text = [run for run in runs if kind[run[0]] != IMAGE]
    if has_past(kind, old):
        n_text, _ = split_later(n_keep, kind, old, tokens, masked)
    else:
        n_text, _ = split(n_keep, sum(map(len, text)), sum(map(len, image)))
    must_text = sum(i in stay for run in text for i in run)
    must_image = sum(i in stay for run in image for i in run)
    n_text = min(max(n_text, must_text), n_keep - must_image)
    found = list(zip(text, share(text, stay, n_text, tokens)))
    return found + list(zip(image, share(image, stay, n_keep - n_text, tokens)))


def select(
    rule: str,
    ranked: bool,
    kind: np.ndarray,
    pinned: np.ndarray,
    score: np.ndarray,
    n_keep: int,
    n_sink: int,
    old: Any = None,
    tokens: Any = None,
) -> np.ndarray | None:
    """Kept cells [L, H, N] in rank order, or None when the protected cells alone are too many."""
    n_layer, n_head, n_cells = score.shape
    if rule == "all":
        n_keep = n_cells
    stay = protected(rule, kind, pinned, n_keep, n_sink, old)
    if len(stay) > n_keep:
        return None
    kept = np.empty((n_layer, n_head, n_keep), dtype=np.int64)
    for layer, head in np.ndindex(n_layer, n_head):
        chosen: list[list[int]] = []
        for run, n in quotas(rule, kind, stay, n_keep, old, tokens):
            order = sorted(run, key=lambda i: (i not in stay, -score[layer, head, i], i))
            chosen.append(in_rank_order(run, order[:n], stay, ranked))
        # quotas come text first; runs stand in logical order
        chosen.sort(key=lambda part: min(part, default=-1))
        kept[layer, head] = [i for part in chosen for i in part]
    return kept


def in_rank_order(run: list[int], kept: list[int], stay: set[int], ranked: bool) -> list[int]:
    """Protected cells at the run's beginning, the rest by score, its other protected cells."""
    if not ranked:
        return sorted(kept)
    first = 0
    while first < len(run) and run[first] in stay:
        first += 1
    free = [i for i in kept if i not in stay]
    return run[:first] + free + [i for i in run[first:] if i in stay]


def rank_scores(
    rule: str,
    kind: np.ndarray,
    pinned: np.ndarray,
    score: np.ndarray,
    kept: np.ndarray,
    n_sink: int,
    old: Any = None,
    tokens: Any = None,
) -> np.ndarray:
    """Score of each rank over all layers and heads [N]; infinite: never evicted by it."""
    n_keep = kept.shape[2]
    stay = protected(rule, kind, pinned, n_keep, n_sink, old)
    for run, n in quotas(rule, kind, stay, n_keep, old, tokens):
        if kind[run[0]] != IMAGE and n == len(run):
            stay = stay | set(run)
    out = np.zeros(n_keep)
    for layer, head in np.ndindex(*kept.shape[:2]):
        for j, i in enumerate(kept[layer, head]):
            out[j] += np.inf if int(i) in stay else float(score[layer, head, i])
    return out


def run_features(run: list[int], keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Keys and values of a run side by side [n, 2 d], each over the square root of its variance."""
    parts = []
    for rows in (keys, values):
        x = rows[run].astype(np.float64)
        variance = ((x - x.mean(0)) ** 2).sum(1).mean()
        parts.append(x * (np.sqrt(1 / variance) if variance > 1e-9 else 0.0))
    return np.concatenate(parts, axis=1)


def cover_run(
    run: list[int],
    stay: set[int],
    not_mergeable: set[int],
    score: np.ndarray,
    x: np.ndarray,
    n_keep: int,
) -> tuple[list[int], dict[int, int]]:
    """Kept cells of a run of one kind, ascending, and for the others the kept one nearest."""
    chosen = [i for i in run if i in stay]

    def anchors() -> list[int]:
        return [j for j in chosen if j not in not_mergeable]

    def distance(i: int, j: int) -> float:
        return float(((x[run.index(i)] - x[run.index(j)]) ** 2).sum())

    def worth(i: int) -> float:
        near = min((distance(i, j) for j in anchors()), default=1.0)
        return float(score[i]) * near**1.5

    while len(chosen) < n_keep:
        chosen.append(max((i for i in run if i not in chosen), key=lambda i: (worth(i), -i)))
    order = anchors()
    joins = {
        i: min(order, key=lambda j: (distance(i, j), order.index(j)))
        for i in run
        if i not in chosen and order
    }
    return sorted(chosen), joins


def coverage(
    kind: np.ndarray,
    pinned: np.ndarray,
    score: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    kept: np.ndarray,
    n_sink: int,
    old: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Kept cells chosen anew in every run of one kind, and buckets of the dropped ones."""
    kept = kept.copy()
    bucket = np.full(score.shape, -1)
    stay = protected("coverage", kind, pinned, kept.shape[2], n_sink, old)
    not_mergeable = verbatim(kind, kept.shape[2], old) | set(np.flatnonzero(pinned))
    for layer, head in np.ndindex(*kept.shape[:2]):
        row = list(kept[layer, head])
        for run in segments(kind):
            ranks = [j for j, i in enumerate(row) if i in run]
            if len(ranks) == len(run):
                continue
            x = run_features(run, keys[layer, head], values[layer, head])
            chosen, joins = cover_run(run, stay, not_mergeable, score[layer, head], x, len(ranks))
            for j, i in zip(ranks, chosen):
                kept[layer, head, j] = i
            if has_past(kind, old) and kind[run[0]] != IMAGE:
                continue  # text of earlier turns is lost
            for i, anchor in joins.items():
                bucket[layer, head, i] = ranks[chosen.index(anchor)]
    return kept, bucket


def buckets(
    rule: str, kept: np.ndarray, kind: np.ndarray, pinned: np.ndarray, found: np.ndarray
) -> np.ndarray:
    """Bucket of every cell [L, H, T]; `found` is what `coverage` said of the dropped cells."""
    n_layer, n_head, _ = kept.shape
    out = found.copy() if rule == "merge_biased" else np.full(found.shape, -1)
    for layer, head in np.ndindex(n_layer, n_head):
        row = list(kept[layer, head])
        anchors = [j for j in range(len(row)) if not pinned[row[j]]]
        for i in range(len(kind)):
            if i in row:
                out[layer, head, i] = row.index(i)
            elif rule == "merge_mean":
                out[layer, head, i] = min(anchors, key=lambda j: (abs(row[j] - i), j), default=-1)
    return out


def pyramid(n_layer: int, n_mean: int, room: int) -> list[int]:
    """Cells of each layer beside the window, by PyramidKV's formula with beta = 20.

    The last layer has n_mean/20 cells, the first what makes the mean right, those between lie on a
    line. Rounded down; at least one, at most `room`.
    """
    last = Fraction(n_mean, 20)
    first = 2 * n_mean - last
    exact = [first + (last - first) * il / max(n_layer - 1, 1) for il in range(n_layer)]
    if n_layer == 1:
        exact = [Fraction(n_mean)]
    return [min(room, max(1, int(x))) for x in exact]
