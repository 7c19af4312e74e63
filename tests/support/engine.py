"""Drives a llama_context through llama.cpp's C API, one token or prompt at a time.

The least that a caller of llama.cpp does, so that tests see the stages recognised in C++ and not by
any Python around it. Works with our libraries and with stock ones (`elastic=None`).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

# to run the tests where model and cache lie on a device, whose arithmetic is less exact
N_GPU_LAYERS = int(os.environ.get("ELASTIC_TEST_GPU_LAYERS", "0"))
TESTS_A_DEVICE = N_GPU_LAYERS > 0  # not where a test sets the former
# the most tokens of a ubatch: a device's driver may not survive more (docs/backends.md, Vulkan)
MAX_UBATCH = int(os.environ.get("ELASTIC_TEST_MAX_UBATCH", "512"))

GGML_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}

_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
if "ELASTIC_TEST_BACKEND" in os.environ:  # a library beside the package, make test-vulkan
    from tests.support.backend import add_backend

    add_backend(Path(os.environ["ELASTIC_TEST_BACKEND"]))


@dataclass
class Engine:
    """A model and one context.

    Parameters
    ----------
    path : str
        GGUF file of the language model.
    elastic : dict, optional
        Keyword arguments of `_core.Session`, with `auto_layers` off where they do not say, so that
        nothing is measured. None leaves the context as llama.cpp made it.
    flash_attn : bool, optional
        None: on with an elastic cache, which has no other, else off.
    """

    path: str
    elastic: dict[str, Any] | None = None
    n_ctx: int = 1024
    n_ubatch: int = 512
    n_batch: int = 2048
    flash_attn: bool | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    n_seq_max: int = 1
    unified: bool = True
    n_threads: int = 1
    cb_eval: Any = None
    swa_full: bool = True
    model: Any = None  # of another engine, which outlives this one
    session: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._owns_model = self.model is None
        if self._owns_model:
            mparams = llama_cpp.llama_model_default_params()
            mparams.n_gpu_layers = N_GPU_LAYERS
            self.model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), mparams)
        assert self.model, self.path
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = self.n_batch
        params.n_ubatch = min(self.n_ubatch, MAX_UBATCH)
        params.n_seq_max = self.n_seq_max
        params.kv_unified = self.unified
        params.n_threads = params.n_threads_batch = self.n_threads
        flash = self.elastic is not None if self.flash_attn is None else self.flash_attn
        params.flash_attn_type = int(flash)
        params.type_k = GGML_TYPES[self.type_k]
        params.type_v = GGML_TYPES[self.type_v]
        params.no_perf = False
        params.swa_full = self.swa_full
        params.op_offload = N_GPU_LAYERS > 0  # else a device takes the products of a prompt
        if self.cb_eval is not None:
            params.cb_eval = self.cb_eval
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert self.ctx, "no context"
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        if self.elastic is not None:
            self.attach(self.elastic)

    def attach(self, elastic: dict[str, Any]) -> None:
        """An elastic cache for the context, which must be empty, in place of the one it has."""
        from elastic_llama import _core

        is_default = elastic.get("policy", "elastic") == "elastic" and "max_cells" not in elastic
        if TESTS_A_DEVICE and is_default and elastic.get("overdraft", -1) == -1:
            elastic = {**elastic, "overdraft": 32}  # the host's; test_rpc has what a device chooses
        address = ctypes.cast(self.ctx, ctypes.c_void_p).value
        self.session = _core.Session(address, **{"auto_layers": False, **elastic})

    def close(self) -> None:
        if self.ctx:
            if self.session is not None:
                self.session.forget()
            llama_cpp.llama_free(self.ctx)
            if self._owns_model:
                llama_cpp.llama_model_free(self.model)
            self.ctx = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> int:
        """One llama_decode of (token, position, sequence, wants logits); returns its code."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, pos, seq, logits) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = pos
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = logits
        code = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        return code

    def prompt(self, tokens: list[int], pos: int = 0, seq: int = 0, logits: bool = True) -> None:
        last = len(tokens) - 1
        rows = [(t, pos + i, seq, logits and i == last) for i, t in enumerate(tokens)]
        code = self.decode(rows)
        assert code == 0, f"llama_decode returned {code}"

    def image(self, embeddings: np.ndarray, pos: int, seq: int = 0) -> None:
        """Rows of embeddings [n, n_embd], as an image comes in."""
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        for start in range(0, len(embeddings), self.n_batch):
            part = embeddings[start : start + self.n_batch]
            batch = llama_cpp.llama_batch_init(len(part), self.n_embd, 1)
            batch.n_tokens = len(part)
            ctypes.memmove(batch.embd, part.ctypes.data, part.nbytes)
            for i in range(len(part)):
                batch.pos[i] = pos + start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = seq
                batch.logits[i] = False
            code = llama_cpp.llama_decode(self.ctx, batch)
            llama_cpp.llama_batch_free(batch)
            assert code == 0, f"llama_decode returned {code}"

    def token(self, token: int, pos: int, seq: int = 0) -> np.ndarray:
        """Decode one token and return its logits."""
        code = self.decode([(token, pos, seq, True)])
        assert code == 0, f"llama_decode returned {code}"
        return self.logits(-1)

    def logits(self, i: int) -> np.ndarray:
        row = llama_cpp.llama_get_logits_ith(self.ctx, i)
        return np.ctypeslib.as_array(row, shape=(self.n_vocab,)).copy()

    def forced(self, tokens: list[int], pos: int, seq: int = 0) -> np.ndarray:
        """Logits [len(tokens), n_vocab] of forced tokens, one decode each."""
        return np.stack([self.token(t, pos + i, seq) for i, t in enumerate(tokens)])

    def seq_rm(self, seq: int, p0: int, p1: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, seq, p0, p1))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def save(self, seq: int | None = None) -> bytes:
        if seq is None:
            size = llama_cpp.llama_state_get_size(self.ctx)
            buffer = (ctypes.c_uint8 * size)()
            n = llama_cpp.llama_state_get_data(self.ctx, buffer, size)
        else:
            size = llama_cpp.llama_state_seq_get_size(self.ctx, seq)
            buffer = (ctypes.c_uint8 * size)()
            n = llama_cpp.llama_state_seq_get_data(self.ctx, buffer, size, seq)
        return bytes(buffer[:n])

    def load(self, data: bytes, seq: int | None = None) -> int:
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if seq is None:
            return llama_cpp.llama_state_set_data(self.ctx, buffer, len(data))
        return llama_cpp.llama_state_seq_set_data(self.ctx, buffer, len(data), seq)


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    """Normalised mean squared error of b against a."""
    a = a.astype(np.float64)
    return float(((a - b) ** 2).sum() / (a**2).sum())


def random_tokens(n: int, n_vocab: int, seed: int) -> list[int]:
    """Ordinary tokens: the first few of a vocabulary are special."""
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(10, n_vocab, n)]


def held_after(
    held: int, promised: int, overdraft: int, cap: int | None = None, n_sink: int = 1
) -> int:
    """Cells that `elastic` holds after one more token of an answer, by what is documented of it.

    One more while they are no more than `overdraft` beyond the `promised` ones, and no more than
    the cap. Then all are merged to the promised ones, under a cap to what leaves the overdraft
    below it, and the token is added. Without an overdraft one is evicted instead.
    """
    most = promised + overdraft if cap is None else min(promised + overdraft, cap)
    if held < most:
        return held + 1
    if overdraft == 0:
        return promised
    return 1 + (promised if cap is None else min(promised, max(n_sink + 2, cap - overdraft)))
