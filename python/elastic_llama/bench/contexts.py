"""One llama_context of a kind: stock, elastic, or ideal (stock with as few cells as elastic)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals

from .. import _core
from ..batch import fill_batch, n_position_planes
from ..config import ElasticConfig, policy_row
from ..errors import ElasticError, StateError, message
from ..kv_types import KV_TYPES
from ..llama import ElasticLlama
from ..pointers import address_of
from ..session import attach, lazy_buffers
from .scenarios import Scenario

_PAD = 256  # llama.cpp attends to whole multiples of these


@dataclass(frozen=True)
class ContextOptions:
    """How a context holds its cells. Those of the elastic cache have flash attention only."""

    kv_type: str = "f16"
    flash_attn: bool = True
    unified: bool = False
    n_threads: int = 1
    n_ubatch: int = 512


class Prompts:
    """The same prompt for every context: random tokens, and random rows in place of an image."""

    def __init__(self, llm: ElasticLlama, scenario: Scenario) -> None:
        rng = np.random.default_rng(0)
        self.scenario = scenario
        self.tokens = rng.integers(10, llm.n_vocab(), scenario.n_text + scenario.n_gen).tolist()
        n_embd = llama_cpp.llama_model_n_embd_inp(llm.model)  # with deepstack, above the width
        self.images = [rng.normal(0, 0.02, (n, n_embd)).astype(np.float32) for n in scenario.images]

    def parts(self) -> list[list[int] | np.ndarray]:
        half = self.scenario.n_text // 2
        parts: list[list[int] | np.ndarray] = [self.tokens[:half], *self.images]
        parts.append(self.tokens[half : self.scenario.n_text])
        return [part for part in parts if len(part)]


class Context:
    """A context of `llm`'s model with `n_seqs` sequences of `n_cells` cells."""

    def __init__(
        self,
        llm: ElasticLlama,
        setting: ContextOptions,
        n_seqs: int,
        n_cells: int,
        elastic: ElasticConfig | None = None,
    ) -> None:
        self.n_vocab = llm.n_vocab()
        self.n_embd = int(llama_cpp.llama_model_n_embd_inp(llm.model))
        self.n_seqs = n_seqs
        self.session: Any = None
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_seqs * (-(-n_cells // _PAD) * _PAD)
        params.n_batch = params.n_ubatch = setting.n_ubatch
        params.n_seq_max = n_seqs
        params.kv_unified = setting.unified
        params.n_threads = params.n_threads_batch = setting.n_threads
        params.flash_attn_type = int(setting.flash_attn)
        params.type_k = params.type_v = KV_TYPES[setting.kv_type]
        params.no_perf = False
        params.swa_full = False  # as ElasticLlama's; stock gains as much by it
        self.n_batch = params.n_batch
        try:
            with lazy_buffers(elastic):
                self._native = _internals.LlamaContext(
                    model=llm._model, params=params, verbose=llm.verbose
                )
        except ValueError as e:
            raise StateError(message("bench", "llama.cpp refused the context", str(e))) from e
        self.ctx = self._native.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)
        self._n_planes = n_position_planes(llm.model)
        n_rows = self.n_batch * self._n_planes  # room for their positions
        self._embd = llama_cpp.llama_batch_init(n_rows, self.n_embd, 1)
        if elastic is not None:
            self._attach(llm, elastic)

    def _attach(self, llm: ElasticLlama, config: ElasticConfig) -> None:
        try:
            self.session = attach(llm, self.ctx, config)
        except ElasticError:
            self.close()
            raise

    def close(self) -> None:
        if self.ctx is not None:
            if self.session is not None:
                self.session.forget()
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_batch_free(self._embd)
            self._native.close()
            self.ctx = None

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)

    def n_cells(self, seq: int = 0) -> int:
        """Cells of a sequence of the elastic cache."""
        return int(self.session.n_per_layer(seq))

    def other_bytes(self, seq: int = 0) -> int:
        """Bytes that a sequence holds in windows and recurrent states, which are not compressed."""
        try:
            return int(_core.bytes_in_use(address_of(self.ctx), seq)[1])
        except NotImplementedError:
            return 0

    def prefill(self, parts: list[list[int] | np.ndarray], seq: int) -> float:
        """Decode a prompt; returns the seconds it took."""
        start, pos = time.perf_counter(), 0
        if self.session is not None:
            self.session.set_prefill(True)  # a last piece of one token belongs to the prompt too
        for part in parts:
            for first in range(0, len(part), self.n_batch):
                piece = part[first : first + self.n_batch]
                if isinstance(piece, list):
                    rows = [(t, pos + i, seq) for i, t in enumerate(piece)]
                    self._decode_tokens(rows, {len(rows) - 1})
                else:
                    self._decode_rows(piece, pos, seq)
                pos += len(piece)
        llama_cpp.llama_synchronize(self.ctx)
        if self.session is not None:
            self.session.set_prefill(False)
        return time.perf_counter() - start

    def step(self, token: int, pos: int) -> None:
        """One token for every sequence."""
        rows = [(token, pos, seq) for seq in range(self.n_seqs)]
        self._decode_tokens(rows, range(self.n_seqs))

    def synchronize(self) -> None:
        llama_cpp.llama_synchronize(self.ctx)

    def n_graphs_reused(self) -> int:
        return int(llama_cpp.llama_perf_context(self.ctx).n_reused)

    def _decode_tokens(self, rows: list[tuple[int, int, int]], wanted: Container[int]) -> None:
        fill_batch(self._batch, rows, wanted)
        self._decode(self._batch)

    def _decode_rows(self, rows: np.ndarray, pos: int, seq: int) -> None:
        batch = self._embd
        batch.n_tokens = len(rows)
        ctypes.memmove(batch.embd, np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
        for i in range(len(rows)):
            for plane in range(self._n_planes):  # one after another, as text is
                batch.pos[plane * len(rows) + i] = pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = False
        self._decode(batch)

    def _decode(self, batch: Any) -> None:
        code = llama_cpp.llama_decode(self.ctx, batch)
        if code:
            raise StateError(message("bench", "llama_decode failed", f"code {code}"))


class Ideal:
    """Stock llama.cpp that holds as many cells as the elastic cache, whatever is in them."""

    def __init__(self, context: Context, config: ElasticConfig, n_prompt: int, n_now: int) -> None:
        self.context, self.config = context, config
        self.n_seen, self.n_now = n_prompt, n_now

    def allowed(self) -> int:
        """Cells that the budget allows after as many tokens."""
        n = max(
            _core.core.budget_cells(float(self.config.budget), self.n_seen), self.config.min_cells
        )
        return min(n, self.config.kv_cells or n)

    def overdraft(self) -> int:
        """Cells beyond these that the elastic cache takes before it merges all."""
        made_for = int(policy_row(self.config.policy)["overdraft"])
        if made_for == 0:
            return 0
        return made_for if self.config.overdraft is None else self.config.overdraft

    def kept(self) -> int:
        """Cells that the elastic cache still has when the next token comes."""
        allowed, overdraft, cap = self.allowed(), self.overdraft(), self.config.kv_cells
        if self.n_now < min(allowed + overdraft, cap or allowed + overdraft):
            return self.n_now
        if overdraft == 0:
            return allowed - 1  # one is evicted for it
        if cap is not None:
            allowed = min(allowed, max(self.config.n_sink + 2, cap - overdraft))
        return allowed

    def step(self, token: int) -> None:
        self.n_seen += 1
        kept = self.kept()
        if kept < self.n_now:  # the newest: as in the elastic cache, rows in use stay the first
            for seq in range(self.context.n_seqs):
                llama_cpp.llama_memory_seq_rm(self.context.memory, seq, kept, -1)
        self.context.step(token, kept)
        self.n_now = kept + 1
