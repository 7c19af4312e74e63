"""What an answer is going to look at, found by decoding its likely beginning and taking it back.

A prompt of text is compressed by what was looked at, and what its answer looks at is known only
once the answer is there. So a few of its likeliest tokens are decoded before, between
`begin_probe` and `end_probe`: nothing of them stays but the attention that they paid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from .batch import fill_batch
from .config import ElasticConfig, policy_row
from .errors import ConfigError, message

PROBE_TOKENS = 16
# On a CPU a token takes as long as about eight of a prompt: a third of the prompt's time at most.
CELLS_PER_PROBE_TOKEN = 24

_IMAGE = 1  # kind of a cell


@dataclass
class _Answer:
    seq_id: int
    token: int  # the next one
    pos: int
    n_left: int


def probe(
    ctx: Any,
    session: Any,
    config: ElasticConfig,
    first: Mapping[int, int],
    positions: Mapping[int, int] | None = None,
) -> int:
    """Decode likely answers, one token of each in a batch, and take them back.

    Nothing is decoded for a sequence with image cells, whose answer looks from one patch to
    another, so that its beginning says little of the rest; nor where nothing is dropped, nor with
    a memory that cannot take back what was decoded (recurrent layers). If
    anything was decoded, the logits of the context are not the prompt's any more.

    Parameters
    ----------
    ctx : llama_context_p
    session : _core.Session
        Its elastic cache, attached as `config` says.
    first : mapping of int to int
        Sequences whose prompts are about to be compressed, and the first token of each answer.
    positions : mapping of int to int, optional
        Where that token goes in each; by default behind the last cell, which is not behind an
        image with M-RoPE.

    Returns
    -------
    int
        Steps taken: batches that were decoded.

    Raises
    ------
    ConfigError
        A token that does not exist, or more sequences than a batch has tokens.
    """
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))
    n_vocab = int(llama_cpp.llama_vocab_n_tokens(vocab))
    _check(ctx, first, n_vocab)
    memory = llama_cpp.llama_get_memory(ctx)
    answers = [
        _Answer(
            seq_id,
            token,
            (positions or {}).get(seq_id, llama_cpp.llama_memory_seq_pos_max(memory, seq_id) + 1),
            n,
        )
        for seq_id, token in first.items()
        if (n := n_probe_tokens(ctx, session, config, seq_id, len(first))) > 0
        and not llama_cpp.llama_vocab_is_eog(vocab, token)
    ]
    if not answers:
        return 0
    n_steps = 0
    batch = llama_cpp.llama_batch_init(len(answers), 0, 1)
    try:
        session.begin_probe()
        try:
            while answers := [a for a in answers if a.n_left > 0]:
                rows = [(a.token, a.pos, a.seq_id) for a in answers]
                fill_batch(batch, rows, range(len(rows)))
                if llama_cpp.llama_decode(ctx, batch) != 0:
                    break
                n_steps += 1
                for i, a in enumerate(answers):
                    logits = llama_cpp.llama_get_logits_ith(ctx, i)
                    a.token = int(np.ctypeslib.as_array(logits, (n_vocab,)).argmax())
                    a.pos += 1
                    a.n_left -= 1
                    if llama_cpp.llama_vocab_is_eog(vocab, a.token):
                        a.n_left = 0
        finally:
            session.end_probe()
    finally:
        llama_cpp.llama_batch_free(batch)
    return n_steps


def n_probe_tokens(
    ctx: Any, session: Any, config: ElasticConfig, seq_id: int, n_seqs: int = 1
) -> int:
    """Tokens of its answer that are decoded for a sequence, one of `n_seqs` at once."""
    n_gone = int(session.n_to_drop(seq_id))
    if config.probe == 0 or n_gone == 0 or not _looks(config) or not session.can_probe():
        return 0
    n = config.probe
    if n is None:
        n = min(probe_tokens(config), n_gone // CELLS_PER_PROBE_TOKEN)
    if n == 0:
        return 0
    if (session.cells(seq_id)["kind"] == _IMAGE).any():
        return 0
    n = min(n, int(session.n_free(seq_id)) // n_seqs)
    if config.kv_cells is not None:  # beyond these the prompt would be compressed on the way
        n_most = config.kv_cells + int(llama_cpp.llama_n_ubatch(ctx))
        n = min(n, n_most - int(session.n_cells(seq_id)))
    return max(0, n)


def probe_tokens(config: ElasticConfig) -> int:
    """Tokens of an answer where the config does not say: for policies that weigh recent queries."""
    return PROBE_TOKENS if policy_row(config.policy)["needs"]["decay"] else 0


def _looks(config: ElasticConfig) -> bool:
    """Whether the policy goes by attention at all."""
    needs = policy_row(config.policy)["needs"]
    return bool(needs["sum"] or needs["n_window"] or needs["decay"])


def _check(ctx: Any, first: Mapping[int, int], n_vocab: int) -> None:
    n_batch = int(llama_cpp.llama_n_batch(ctx))
    if len(first) > n_batch:
        raise ConfigError(message("probe", "sequences", len(first), f"at most n_batch = {n_batch}"))
    for token in first.values():
        if not 0 <= token < n_vocab:
            raise ConfigError(message("probe", "token", token, f"0 to {n_vocab - 1}"))
