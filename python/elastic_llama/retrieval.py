"""Which layers look tokens up by what came before them, and how many cells they are to hold.

Heads that do are few and lie in few layers ("induction" heads, Olsson et al. 2022, In-context
Learning and Induction Heads; "retrieval" heads, Wu et al. 2024, Retrieval Head; Tang et al. 2024,
RazorAttention). What a compressed text loses, it loses there.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from . import _core
from .batch import fill_batch
from .embedded import cache_dir
from .errors import ConfigError, ElasticError, StateError, UnsupportedModelError, message

if TYPE_CHECKING:
    from .llama import ElasticLlama

__all__ = ["cached_shares", "layer_shares", "measured_shares", "retrieval_scores"]

VERSION = 1  # of what `retrieval_scores` measures; files of other ones are not read

N_TOKENS = 48  # the text that is repeated
N_BEFORE = 8  # tokens of the repetition before the first query
N_QUERIES = 32
N_CTX = 128

MIN_SCORE = 0.015  # below is noise
EXTRA = 3.0  # what the layer of the greatest score gets on top, in what a layer without any gets


log = logging.getLogger("elastic_llama")

_measured: dict[Path, list[float]] = {}  # by cache file, where that cannot be written


def retrieval_scores(llm: ElasticLlama) -> NDArray[np.float64]:
    """How much each layer looks at what followed a token when it was there before.

    Random tokens, and the beginning of the same tokens again. A head that looks up attends, from
    token i of the repetition, to the cell of token i + 1 of the first copy.

    Returns
    -------
    ndarray [n_layer], float64
        For each layer of the cache, in order: the attention to that cell less the mean attention to
        the other cells of the first copy but its first, averaged over the queries and all query
        heads; in [0, 1].

    Raises
    ------
    UnsupportedModelError
        The elastic cache cannot be attached, or the vocabulary is too small.
    StateError
        llama.cpp made no context for it or could not decode.

    Notes
    -----
    In a context of its own with f16 K and V: 32 decode steps and a prompt of 56 tokens. Importance
    is divided by the query heads of a KV head when it is added up, so a query adds 1 to each KV
    head and no other division is due.
    """
    with _context(llm) as (ctx, session):
        vocab = llama_cpp.llama_model_get_vocab(llm._model.model)
        start = [llama_cpp.llama_vocab_bos(vocab)] * llama_cpp.llama_vocab_get_add_bos(vocab)
        tokens = _random_tokens(vocab)
        first, past = len(start), len(start) + N_TOKENS + N_BEFORE
        _decode(ctx, start + tokens + tokens[:N_BEFORE], 0)
        before = session.importance(0)
        total = np.zeros(before.shape[0])
        for i in range(N_BEFORE, N_BEFORE + N_QUERIES):
            _decode(ctx, [tokens[i]], past + i - N_BEFORE)
            after = session.importance(0)
            paid = (after[..., : before.shape[2]] - before)[..., first : first + N_TOKENS]
            before = after
            # not the first cell: without a BOS, heads that find nothing rest on it
            others = np.delete(paid, [0, i + 1], axis=2)
            total += (paid[..., i + 1] - others.mean(axis=2, dtype=np.float64)).mean(axis=1)
    return np.maximum(total / N_QUERIES, 0.0)


def layer_shares(scores: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Cells that each layer is to hold, relative to the others.

    Parameters
    ----------
    scores : [n_layer]
        Of `retrieval_scores`.

    Returns
    -------
    list of float
        Mean 1; all 1.0 where no score is above the noise.

    Raises
    ------
    ConfigError
        There are no scores, or some are negative or not finite.
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not (np.isfinite(x) & (x >= 0)).all():
        raise ConfigError(
            message("retrieval", "scores", x.tolist(), "one finite value >= 0 for each layer")
        )
    if x.max() < MIN_SCORE:
        return [1.0] * x.size
    x = np.where(x < MIN_SCORE, 0.0, x) / x.max()
    share = 1 + EXTRA * np.sqrt(x)
    return [float(value) for value in share / share.mean()]


def measured_shares(llm: ElasticLlama) -> list[float]:
    """`cached_shares`, or nothing where it cannot be measured or all layers are alike."""
    try:
        shares = cached_shares(llm)
    except ElasticError:
        return []
    return shares if max(shares) > min(shares) else []


def cached_shares(llm: ElasticLlama) -> list[float]:
    """`layer_shares` of a model, measured once per file and kept in the cache folder.

    Raises
    ------
    UnsupportedModelError, StateError, ConfigError
        As the measure. A cache that cannot be read or written is done without.
    """
    path = os.path.abspath(llm.model_path)
    file = _cache_file(path)
    if file in _measured:
        return layer_shares(_measured[file])
    if file is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            n_layer = llama_cpp.llama_model_n_layer(llm._model.model)
            same = kept["version"] == VERSION and kept["model"] == path
            if same and len(kept["scores"]) == n_layer:
                return layer_shares(kept["scores"])
    log.info("measuring which layers look words up; once for this model file")
    scores = retrieval_scores(llm)
    shares = layer_shares(scores)
    if file is not None:
        try:
            _write(file, {"version": VERSION, "model": path, "scores": scores.tolist()})
        except OSError:
            _measured[file] = scores.tolist()
    return shares


@contextmanager
def _context(llm: ElasticLlama) -> Iterator[tuple[Any, Any]]:
    """A llama_context of the same model and its session, which takes everything for a prompt."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = N_CTX
    params.n_seq_max = 1
    params.n_threads, params.n_threads_batch = llm.n_threads, llm.n_threads_batch
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    ctx = llama_cpp.llama_init_from_model(llm._model.model, params)
    if not ctx:
        raise StateError(message("retrieval", "llama.cpp refused a context", f"{N_CTX} cells"))
    session = None
    try:
        address = ctypes.cast(ctx, ctypes.c_void_p).value or 0
        try:
            session = _core.Session(address, policy="elastic", release_memory=False)
        except NotImplementedError as e:
            raise UnsupportedModelError(str(e)) from e
        except RuntimeError as e:
            raise StateError(str(e)) from e
        session.set_prefill(True)  # a prompt is not compressed
        yield ctx, session
    finally:
        if session is not None:
            session.forget()
        llama_cpp.llama_free(ctx)


def _decode(ctx: Any, tokens: list[int], past: int) -> None:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        fill_batch(batch, [(token, past + i, 0) for i, token in enumerate(tokens)], ())
        code = llama_cpp.llama_decode(ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code:
        raise StateError(message("retrieval", "llama_decode failed", f"code {code}"))


def _random_tokens(vocab: Any) -> list[int]:
    """Different tokens of text, the same ones for the same vocabulary."""
    order = np.random.default_rng(0).permutation(llama_cpp.llama_vocab_n_tokens(vocab)).tolist()
    tokens = list(islice((t for t in order if _is_ordinary(vocab, t)), N_TOKENS))
    if len(tokens) < N_TOKENS:
        raise UnsupportedModelError(
            message("retrieval", "ordinary tokens in the vocabulary", len(tokens), f">= {N_TOKENS}")
        )
    return tokens


def _is_ordinary(vocab: Any, token: int) -> bool:
    attr = llama_cpp.llama_vocab_get_attr(vocab, token)
    return (
        bool(attr & llama_cpp.LLAMA_TOKEN_ATTR_NORMAL)
        and not attr & llama_cpp.LLAMA_TOKEN_ATTR_BYTE
        and not llama_cpp.llama_vocab_is_control(vocab, token)
        and not llama_cpp.llama_vocab_is_eog(vocab, token)
    )


def _cache_file(path: str) -> Path | None:
    """Where the scores of a model file are kept; None where file or home folder are not there."""
    try:
        stat = os.stat(path)
        folder = cache_dir() / "retrieval"
    except (OSError, RuntimeError):  # pathlib's for a user without a home
        return None
    key = json.dumps([path, stat.st_size, stat.st_mtime_ns, VERSION])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    """All of it or nothing, whoever else writes or reads it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temp:
        part = Path(temp) / file.name
        part.write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, file)
