"""SnapKV (Li et al. 2024, arXiv:2404.14469) as a scorer in NumPy, compared with the built-in one.

python examples/snapkv_scorer.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama, scorer

N_NEAR = 7  # cells around each, whose attention is averaged

QUESTION = "What did the keeper of the lighthouse write down every evening, and why?"
TEXT = (
    "The keeper of the lighthouse wrote down every evening how high the tide was, which ships went "
    "by and what the wind did. In winter he wrote by the light of the lamp itself, since oil was "
    "dear. His sister, who kept the shop in the village, read the pages to the fishermen before "
    "they went out. One night the lamp failed, and the pages were what brought the boats home."
)


@scorer(like="snapkv")  # its window of queries, selector and evictor
def snapkv(view: Any) -> np.ndarray:
    """Attention from the last queries, averaged over the cells around each."""
    half = N_NEAR // 2
    padded = np.pad(view.recent.astype(np.float64), [(0, 0), (0, 0), (half, half)])
    near = np.lib.stride_tricks.sliding_window_view(padded, N_NEAR, axis=-1)
    n = view.recent.shape[-1]
    to_start = np.minimum(np.arange(n), half)
    n_near = to_start + 1 + to_start[::-1]  # fewer at both ends
    return (near.sum(axis=-1) / n_near).astype(np.float32)


def run(policy: Any, model: str | None = None, n_tokens: int = 24) -> tuple[np.ndarray, list[int]]:
    """Cells kept of the prompt [n_layer, n_head_kv, n_keep], and the tokens of the answer."""
    config = ElasticConfig(budget=0.3, policy=policy, min_cells=16)
    with ElasticLlama(model, elastic=config, n_ctx=512, seed=0) as llm:
        prompt = llm.tokenize(f"{TEXT}\n\n{QUESTION}\n".encode())
        answer: list[int] = []
        for token in llm.generate(prompt, temp=0.0):
            answer.append(token)
            if len(answer) == n_tokens:
                break
        return llm.session.last_plan()["kept"], answer


def main() -> None:
    (kept, answer), (kept_too, answer_too) = run(snapkv), run("snapkv")
    same_cells, same_answer = np.array_equal(kept, kept_too), answer == answer_too
    print(f"cells kept of each head: {kept.shape[-1]}, the same as the built-in: {same_cells}")
    print(f"tokens of the answer: {len(answer)}, the same as with the built-in: {same_answer}")


if __name__ == "__main__":
    main()
