"""A prompt that agrees with the cache only before a sliding window: as if asked afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elastic_llama as el
import numpy as np
import pytest

from tests.support.engine import nmse, random_tokens
from tests.support.tiny_llama import write_tiny_llama

SMALL = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 64 tokens, for which 256 cells are kept."""
    path = tmp_path_factory.mktemp("windows") / "cohere2.gguf"
    return write_tiny_llama(path, arch="cohere2", n_layer=4, n_embd=128, n_ctx_train=4096)


def answer(llm: Any, prompt: list[int]) -> np.ndarray:
    """Logits of the prompt's last token and of four of an answer, [5, n_vocab]."""
    stream = llm.generate(prompt, temp=0.0)
    for _ in range(5):
        next(stream)
    stream.close()
    return llm.scores[len(prompt) - 1 : len(prompt) + 4].copy()


@pytest.mark.slow
@pytest.mark.parametrize("elastic", [None, "auto", el.ElasticConfig(0.5)])
@pytest.mark.parametrize("swa_full", [True, False])
def test_reuse(windowed: Path, elastic: Any, swa_full: bool) -> None:
    args = {"elastic": elastic, "flash_attn": True, "swa_full": swa_full, "logits_all": True}
    args.update(SMALL)
    long = random_tokens(1400, 300, 1)
    prompts = [
        long,
        long[:1180] + random_tokens(2, 300, 2),  # some of what it looks at is there
        long,
        long[:600] + random_tokens(2, 300, 2),  # nothing of it
        long[:600] + random_tokens(300, 300, 3),
        long[:550],  # a part of what is held
        long[:540] + random_tokens(5, 300, 4),
        long,
    ]
    with el.ElasticLlama(windowed, **args) as llm:
        for prompt in prompts:
            logits = answer(llm, prompt)
            with el.ElasticLlama(windowed, **args) as fresh:
                assert nmse(answer(fresh, prompt), logits) < 1e-5


@pytest.mark.parametrize("elastic", [None, el.ElasticConfig(0.5)])
def test_set_back_by_hand(windowed: Path, elastic: Any) -> None:
    """`n_tokens` behind which the window is gone: what comes before is decoded again."""
    tokens = random_tokens(1300, 300, 1)
    logits = []
    for n_first in (1300, 0):
        with el.ElasticLlama(
            windowed, elastic=elastic, flash_attn=True, swa_full=False, logits_all=True, **SMALL
        ) as llm:
            if n_first:
                llm.eval(tokens)
                llm.n_tokens = 400
            else:
                llm.eval(tokens[:400])
            llm.eval(tokens[400:420])
            assert llm.n_tokens == 420
            logits.append(llm.scores[400:420].copy())
    assert nmse(logits[1], logits[0]) < 1e-5
