"""Merging done the slow, obvious way on f32 rows of one head, to compare the core with.

Nothing here knows the package under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Cells:
    """What the cells of one head hold and stand for.

    ``k``, ``v`` are [n, d]; ``importance``, ``count``, ``bias`` and ``weight``, by which a
    merge of rule "merge_biased" weighs them, are [n].
    """

    k: np.ndarray
    v: np.ndarray
    importance: np.ndarray
    count: np.ndarray
    bias: np.ndarray
    weight: np.ndarray | None = None


def members_of(j: int, kept: np.ndarray, bucket: np.ndarray) -> list[int]:
    """The anchor of rank j and every cell that joins it."""
    others = [i for i in range(len(bucket)) if bucket[i] == j and i != kept[j]]
    return [int(kept[j]), *others]


def mean(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    weights = weights.astype(np.float64)[:, None]
    return (weights * rows.astype(np.float64)).sum(axis=0) / weights.sum()


def merge(
    rule: str,
    kept: np.ndarray,
    bucket: np.ndarray,
    cells: Cells,
    key_weight: np.ndarray | None = None,
) -> tuple[Cells, list[bool]]:
    """The kept cells after a merge (in f64), and which of them took others in."""
    n_keep, d = len(kept), cells.k.shape[1]
    out = Cells(np.zeros((n_keep, d)), np.zeros((n_keep, d)), *np.zeros((3, n_keep)))
    took = []
    for j in range(n_keep):
        a = kept[j]
        group = [int(a)] if rule == "evict" else members_of(j, kept, bucket)
        took.append(len(group) > 1)
        out.k[j], out.v[j] = cells.k[a], cells.v[a]
        out.importance[j] = cells.importance[group].astype(np.float64).sum()
        out.count[j] = cells.count[group].astype(np.float64).sum()
        out.bias[j] = cells.bias[a]
        if not took[-1]:
            continue
        if rule == "merge_mean":
            out.k[j] = mean(cells.k[group], cells.count[group])
            out.v[j] = mean(cells.v[group], cells.count[group])
            continue
        weight = cells.importance if cells.weight is None else cells.weight
        w = weight[group].astype(np.float64) if weight[a] > 0 else np.ones(len(group))
        out.v[j] = mean(cells.v[group], w)
        out.bias[j] += np.log(w.sum() / w[0])
        goal = mean(cells.k[group], w)
        way = 0.0 if key_weight is None else float(key_weight[a])
        out.k[j] = (1 - way) * out.k[j] + way * goal
        seen = w > 0
        bias = cells.bias[group].astype(np.float64)
        of_key = np.log(w[seen]) - bias[seen]  # log weight without the bias, linear in the key
        out.bias[j] += way * (of_key[0] - (w[seen] * of_key).sum() / w.sum())
    return out, took


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Output of one query over the rows of one head, with biased logits."""
    logits = k.astype(np.float64) @ q.astype(np.float64) + bias
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ v.astype(np.float64)


def attention_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    logits = k.astype(np.float64) @ q.astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
