"""The history of a sequence as steps, and the same steps in a context that saw nothing else.

A `Record` is told what is decoded, compressed and cut. What survives is replayed in a fresh
context, whose logits the recorded ones must equal.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import llama_cpp
import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.probe import probe
from llama_cpp import mtmd_cpp

from tests.support.engine import nmse

low = llama_cpp.llama_cpp  # where llama-cpp-python's own classes look functions up

# to rounding: cells may lie in other places, and sums over them come in another order
NMSE = 1e-4


@dataclass(frozen=True)
class Step:
    """Something that happened when the sequence ended at `pos`.

    `what`: decode (data: ids [n] or embeddings [n, n_embd]), compress, probe (data: token),
    room (data: tokens), logits (data: [n_vocab]), copy (data: of which sequence; hold: whether its
    prompt was not compressed).
    """

    what: str
    pos: int
    data: Any = None
    hold: bool = False
    wants: bool = False  # logits of the last token, of a copy those that were there

    def __len__(self) -> int:
        return len(self.data) if self.what == "decode" else 0

    @property
    def is_generated(self) -> bool:
        """Unless it comes first."""
        one_token = self.what == "decode" and self.data.ndim == 1 and len(self) == 1
        return one_token and self.wants and not self.hold and self.pos > 0


def cut_steps(steps: list[Step], pos: int) -> list[Step]:
    """What a removal from `pos` on leaves. An answer may follow what is left of a prompt."""
    kept = []
    for step in steps:
        if step.what != "decode" or step.is_generated:
            if step.pos + len(step) <= pos:
                kept.append(step)
        elif step.pos < pos:
            data = step.data[: pos - step.pos]
            kept.append(replace(step, data=data, hold=True, wants=True))
    return kept


@dataclass
class Record:
    """Steps of one sequence that survive."""

    steps: list[Step] = field(default_factory=list)

    def copy(self) -> list[Step]:
        return list(self.steps)

    def end(self) -> int:
        return max((s.pos + len(s) for s in self.steps), default=0)

    def pending(self) -> bool:
        """Whether the last prompt is not compressed yet."""
        for step in reversed(self.steps):
            if step.what in ("compress", "copy"):
                return step.hold
            if step.what == "decode" and not step.is_generated:
                return True
        return False

    def may_answer(self) -> bool:
        """Whether an answer may follow: the last token wanted logits, or was probed behind."""
        for step in reversed(self.steps):
            if step.what == "probe":
                return True
            if step.what in ("decode", "copy"):
                return step.wants
        return True

    def add(self, step: Step) -> None:
        """What has just happened. Compressions that came with it get a step of their own."""
        if step.is_generated and self.pending():
            if self.may_answer():
                self.steps.append(Step("compress", step.pos))
            else:
                step = replace(step, hold=True)  # the prompt's last token
        self.steps.append(step)

    def cut(self, pos: int) -> None:
        if pos < self.end():
            self.steps = cut_steps(self.steps, pos)

    def replay(
        self, ctx: Any, session: Any, config: ElasticConfig
    ) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Do it all again in a context of the same kind, which is emptied first.

        Returns
        -------
        list of (position, recorded logits, logits now)
        """
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        out = []
        last = None
        session = _Off() if session is None else session
        for step in self.steps:
            if step.what == "decode":
                session.set_prefill(step.hold)
                code = decode(ctx, step.data, step.pos, step.wants)
                assert code == 0, f"replay: llama_decode returned {code} at {step.pos}"
                last = None
                if step.wants:
                    n_vocab = llama_cpp.llama_vocab_n_tokens(
                        llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))
                    )
                    row = llama_cpp.llama_get_logits_ith(ctx, -1)
                    last = (step.pos + len(step), np.ctypeslib.as_array(row, (n_vocab,)).copy())
            elif step.what == "compress":
                session.compress(0)
            elif step.what == "probe":
                probe(ctx, session, config, {0: step.data})
            elif step.what == "room":
                session.make_room(step.data)
            elif last is not None and last[0] == step.pos:  # else of a prompt whose end was cut off
                out.append((step.pos, step.data, last[1]))
        session.set_prefill(False)
        return out


def compare(pairs: list[tuple[int, np.ndarray, np.ndarray]], what: str, least: int = 1) -> int:
    """Logits equal the replay's; returns how many do to the last bit."""
    assert len(pairs) >= least, f"{what}: {len(pairs)} logits"
    n_same = 0
    for pos, got, expected in pairs:
        error = nmse(expected, got)
        assert error <= NMSE, f"{what}: logits at {pos}: NMSE {error:.2g}, first of all at " + str(
            next(p for p, a, b in pairs if nmse(b, a) > NMSE)
        )
        n_same += bool((got == expected).all())
    return n_same


def same_cells(ours: Any, theirs: Any, what: str) -> None:
    """The cells of sequence 0 of two sessions."""
    if theirs is None:
        return
    assert ours.n_tokens(0) == theirs.n_tokens(0), what
    for name in ("pos", "kind"):
        a, b = ours.cells(0)[name], theirs.cells(0)[name]
        assert a.tolist() == b.tolist(), f"{what}: {name}"
    for name in ("importance", "count", "bias"):
        a, b = getattr(ours, name)(0), getattr(theirs, name)(0)
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3, err_msg=f"{what}: {name}")


def decode(ctx: Any, data: np.ndarray, pos: int, wants: bool, seq: int = 0) -> int:
    """One llama_decode of ids [n] or embeddings [n, n_embd]."""
    n = len(data)
    is_text = data.ndim == 1
    batch = llama_cpp.llama_batch_init(n, 0 if is_text else data.shape[1], 1)
    batch.n_tokens = n
    if not is_text:
        rows = np.ascontiguousarray(data, np.float32)
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
    for i in range(n):
        if is_text:
            batch.token[i] = int(data[i])
        batch.pos[i] = pos + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq
        batch.logits[i] = wants and i == n - 1
    code = llama_cpp.llama_decode(ctx, batch)
    llama_cpp.llama_batch_free(batch)
    return int(code)


# -- watching an ElasticLlama


class _Off:
    """The session of a cache that keeps everything."""

    def set_prefill(self, value: bool) -> None: ...

    def compress(self, seq_id: int) -> None: ...


class _Session:
    """A native session, of which what changes the cache is recorded."""

    def __init__(self, native: Any, record: Record, held: list[bool]) -> None:
        self.native, self.record, self.held = native, record, held

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def set_prefill(self, value: bool) -> None:
        self.held[0] = value
        self.native.set_prefill(value)

    def compress(self, seq_id: int = 0) -> int:
        n = int(self.native.compress(seq_id))
        self.record.add(Step("compress", self.record.end()))
        return n

    def make_room(self, n_new: int) -> int:
        before = self.native.n_cells(0)
        n = int(self.native.make_room(n_new))
        if n != before:
            self.record.add(Step("room", self.record.end(), n_new))
        return n


class WatchedLlama(ElasticLlama):
    """An ElasticLlama that records what its cache went through, at llama.cpp's interface.

    `taken` counts positions decoded since it was last set to 0.
    """

    record: Record
    taken: int
    answer: list[np.ndarray]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.taken = 0
        self.answer = []
        self._held = [False]
        self.record = Record()
        if self._session is not None:
            self._session = _Session(self._session, self.record, self._held)

    def _probe(self, token: int) -> None:
        before = self._probe_ms
        super()._probe(token)
        if self._probe_ms > before:
            self.record.add(Step("probe", self.record.end(), token))

    def sample(self, *args: Any, **kwargs: Any) -> int:
        row = np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), (self.n_vocab(),)).copy()
        self.answer.append(row)
        self.record.add(Step("logits", self.n_tokens, row))
        return int(super().sample(*args, **kwargs))

    def save_state(self) -> Any:
        state = super().save_state()
        state.steps = self.record.copy()
        return state

    def load_state(self, state: Any) -> None:
        super().load_state(state)
        self.record.steps = list(state.steps)


@contextmanager
def watched(llm: WatchedLlama) -> Iterator[WatchedLlama]:
    """Everything that reaches llama.cpp inside is recorded."""
    address = ctypes.cast(llm._ctx.ctx, ctypes.c_void_p).value
    record, held = llm.record, llm._held

    def is_ours(ctx: Any) -> bool:
        return ctypes.cast(ctx, ctypes.c_void_p).value == address

    def add(data: np.ndarray, pos: int, wants: bool) -> None:
        llm.taken += len(data)
        record.add(Step("decode", pos, data, held[0], wants))

    def llama_decode(ctx: Any, batch: Any) -> int:
        n = batch.n_tokens
        ids = np.array([batch.token[i] for i in range(n)], np.int64)
        pos, wants = batch.pos[0], bool(batch.logits[n - 1])
        code = int(originals["llama_decode"](ctx, batch))
        if is_ours(ctx):
            assert code == 0, f"llama_decode returned {code}"
            add(ids, pos, wants)
        return code

    def llama_memory_seq_rm(memory: Any, seq: int, p0: int, p1: int) -> bool:
        done = bool(originals["llama_memory_seq_rm"](memory, seq, p0, p1))
        if done and p1 < 0:
            record.cut(max(0, p0))
        return done

    def llama_memory_clear(memory: Any, data: bool) -> None:
        originals["llama_memory_clear"](memory, data)
        record.cut(0)

    def mtmd_helper_decode_image_chunk(
        mtmd: Any, ctx: Any, chunk: Any, embd: Any, n_past: Any, *rest: Any
    ) -> int:
        shape = (mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), llm.n_embd())
        rows = np.ctypeslib.as_array(embd, shape).copy()
        code = int(
            originals_m["mtmd_helper_decode_image_chunk"](mtmd, ctx, chunk, embd, n_past, *rest)
        )
        add(rows, n_past.value, False)
        return code

    def mtmd_helper_eval_chunk_single(
        mtmd: Any, ctx: Any, chunk: Any, n_past: Any, *rest: Any
    ) -> int:
        code = int(originals_m["mtmd_helper_eval_chunk_single"](mtmd, ctx, chunk, n_past, *rest))
        shape = (mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), llm.n_embd())
        rows = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(mtmd), shape).copy()
        add(rows, n_past.value, False)
        return code

    new = {f.__name__: f for f in (llama_decode, llama_memory_seq_rm, llama_memory_clear)}
    new_m = {f.__name__: f for f in (mtmd_helper_decode_image_chunk, mtmd_helper_eval_chunk_single)}
    originals = {name: getattr(low, name) for name in new}
    originals_m = {name: getattr(mtmd_cpp, name) for name in new_m}
    try:
        for name, f in new.items():
            setattr(low, name, f)
        for name, f in new_m.items():
            setattr(mtmd_cpp, name, f)
        yield llm
    finally:
        for name, f in originals.items():
            setattr(low, name, f)
        for name, f in originals_m.items():
            setattr(mtmd_cpp, name, f)
