"""One model, one context with a stream of cells per sequence, and the policy it runs under."""

from __future__ import annotations

import contextlib
from typing import Any

import llama_cpp
from llama_cpp import _internals

from .. import _core
from ..config import ElasticConfig
from ..errors import ConfigError, UnsupportedModelError, message
from ..llama import ElasticLlama
from ..pointers import address_of


class Streams:
    """An `ElasticLlama` whose context holds `n_seqs` sequences of `n_cells` cells each.

    Sequence 0 is the one that `Conversation` and `Llama.eval` use.
    """

    def __init__(self, llm: ElasticLlama, n_seqs: int, n_cells: int) -> None:
        self.llm, self.n_seqs, self.n_cells = llm, n_seqs, n_cells
        params = llm.context_params
        params.n_ctx = n_seqs * n_cells
        params.n_seq_max = n_seqs
        params.kv_unified = False
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED  # the elastic cache's
        try:
            ctx = _internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose)
        except ValueError as e:
            raise ConfigError(
                message(
                    "eval",
                    "llama.cpp refused the context",
                    f"{n_seqs} x {n_cells} cells",
                    do="lower --parallel or --ctx-size",
                )
            ) from e
        llm._ctx.close()
        llm._ctx = llm._stack.enter_context(contextlib.closing(ctx))

    @property
    def ctx(self) -> Any:
        return self.llm._ctx.ctx

    @property
    def session(self) -> Any:
        return self.llm.session

    def record(self) -> None:
        """Empty the cache; from now on every cell and every score is kept.

        Raises
        ------
        UnsupportedModelError
        """
        self._detach()
        address = address_of(self.ctx)
        try:
            self.llm._session = _core.Session(address, policy="full", budget=1.0, record=True)
        except NotImplementedError as e:
            raise UnsupportedModelError(str(e)) from e
        self.llm._attached = ElasticConfig.off()

    def attach(self, config: ElasticConfig) -> None:
        """Empty the cache; from now on the policy of `config` holds."""
        self._detach()
        self.llm._attach(config)

    def _detach(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)
        if self.llm._session is not None:
            self.llm._session.detach()

    def close(self) -> None:
        self.llm.close()
