"""Tries the elastic cache on models of the zoo, each in a process of its own.

Usage: python -m tests.support.zoo_trial [NAME ...]

Prints one JSON object per model. A model that ends its process, or does not end, is a result too.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import elastic_llama  # noqa: F401  (first: it decides which libraries llama_cpp loads)
import llama_cpp
import numpy as np
from elastic_llama import _core

from tests.support import zoo
from tests.support.engine import Engine, nmse, random_tokens
from tests.support.oracle_plan import left_free

N_PROMPT, N_FORCED = 110, 24  # more than a window of 32 cells, and than an overdraft
N_SHORT = 40  # of each of several sequences, and more
OVERDRAFT = 8
WHOLE = {"budget": 1.0, "min_cells": 8}
KEPT = {"budget": 0.3, "min_cells": 8, "overdraft": OVERDRAFT, "auto_layers": True}
SECONDS = 180  # for one model; most take less than one on an idle machine


@dataclass
class Result:
    """What came of a model.

    Parameters
    ----------
    status : str
        works; refused, with the sentence in `why`; no cells, where the model has no memory at all;
        broken, with what went wrong in `why`.
    memory : dict
        `_core.memory()`, of a model that is not refused.
    """

    name: str
    status: str = "works"
    why: str = ""
    memory: dict[str, Any] = field(default_factory=dict)


class Broken(AssertionError):
    """A promise that a model does not keep."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


def try_model(path: Path) -> Result:
    result = Result(zoo.label(path))
    with Engine(str(path), n_ctx=256, flash_attn=True) as stock:
        if not stock.memory:
            result.status = "no cells"
            check(_processes(stock), "the cache off: not processed")
            return result
        try:
            with Engine(str(path), WHOLE, n_ctx=256, model=stock.model) as elastic:
                result.memory = _memory(elastic)
        except NotImplementedError as e:
            result.status, result.why = "refused", str(e)
            check(_processes(stock), "the cache off: not processed")
            return result
        _try_one_sequence(path, stock)
        for unified in (True, False):
            _try_sequences(path, stock.model, unified)
    return result


def _processes(e: Engine) -> bool:
    """Whether a prompt is taken with the elastic cache off; by its encoder first."""
    tokens = random_tokens(N_SHORT, min(e.n_vocab, 128), 1)
    if llama_cpp.llama_model_has_encoder(e.model):
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_encode(e.ctx, batch) or not llama_cpp.llama_model_has_decoder(e.model):
            return bool(llama_cpp.llama_model_has_encoder(e.model))
        tokens = tokens[:1]
    return e.decode([(t, i, 0, True) for i, t in enumerate(tokens)]) == 0


def _memory(e: Engine) -> dict[str, Any]:
    memory = dict(_core.memory(ctypes.cast(e.ctx, ctypes.c_void_p).value))
    n_layer = len(e.session.cells_per_layer(0))
    check(n_layer == memory["n_layer"], f"memory: {n_layer} layers, not {memory['n_layer']}")
    check(0 < n_layer <= memory["n_layer_model"], f"memory: {n_layer} layers of the model's")
    check(e.session.kv_bytes_per_cell() >= memory["cell_bytes"] > 0, "memory: bytes of a cell")
    check((memory["kind"] == "plain") == (memory["other_bytes"] == 0), "memory: other bytes")
    return memory


def _try_one_sequence(path: Path, stock: Engine) -> None:
    prompt = random_tokens(N_PROMPT, 128, 1)
    forced = random_tokens(N_FORCED, 128, 2)
    off = _answer(stock, prompt, forced)
    check(bool(np.isfinite(off).all()), "the cache off: NaN")
    with Engine(str(path), WHOLE, n_ctx=256, model=stock.model) as e:
        on = _answer(e, prompt, forced)
        check(np.array_equal(on, off), f"budget 1.0: NMSE {nmse(off, on):.1e} to off")
        check(e.session.n_cells(0) == N_PROMPT + N_FORCED, "budget 1.0: cells")
        e.clear()
        e.attach(KEPT)
        first = _answer(e, prompt, forced[:4])
        check(bool(np.isfinite(first).all()), "budget 0.3: NaN")
        _check_cells(e, 0, N_PROMPT, 4, "budget 0.3")
        state, of_sequence, saved = e.save(), e.save(0), _cells(e)
        rest = e.forced(forced[4:], N_PROMPT + 4)
        check(bool(np.isfinite(rest).all()), "budget 0.3, a long answer: NaN")
        _check_cells(e, 0, N_PROMPT, N_FORCED, "budget 0.3, a long answer")
        for seq in (None, 0):
            data = state if seq is None else of_sequence
            what = "a state" if seq is None else "a sequence's state"
            with Engine(str(path), KEPT, n_ctx=256, model=stock.model) as other:
                check(other.load(data, seq) == len(data), f"{what}: not loaded")
                loaded = _cells(other)
                same = all(np.array_equal(x, y) for x, y in zip(loaded, saved))
                check(same, f"{what}: other cells")
                again = other.forced(forced[4:], N_PROMPT + 4)
            if np.array_equal(again, rest):
                continue
            check(nmse(rest, again) < 1e-5, f"{what}: NMSE {nmse(rest, again):.1e}")
            # of a window llama.cpp saves what can still be seen, which then lies elsewhere
            exact = _goes_on_exactly(path, stock.model, seq)
            check(not exact, f"{what}: NMSE {nmse(rest, again):.1e}; exact with the cache off")
            check(e.load(data, seq) == len(data), f"{what}: not loaded where it was saved")
            here = e.forced(forced[4:], N_PROMPT + 4)
            check(np.array_equal(here, again), f"{what}: goes on otherwise in another context")


def _goes_on_exactly(path: Path, model: Any, seq: int | None) -> bool:
    """Whether a state that is saved and loaded goes on to the same bits with the cache off."""
    prompt = random_tokens(N_PROMPT, 128, 1)
    forced = random_tokens(N_FORCED, 128, 2)
    with Engine(str(path), n_ctx=256, model=model, flash_attn=True) as e:
        _answer(e, prompt, forced[:4])
        state = e.save(seq)
        rest = e.forced(forced[4:], N_PROMPT + 4)
    with Engine(str(path), n_ctx=256, model=model, flash_attn=True) as e:
        e.load(state, seq)
        return np.array_equal(e.forced(forced[4:], N_PROMPT + 4), rest)


def _cells(e: Engine) -> list[np.ndarray]:
    """All that an elastic cache knows of sequence 0, with its keys and values."""
    s = e.session
    layers = range(len(s.cells_per_layer(0)))
    rows = [x for il in layers for x in s.read_kv(0, il)]
    places = s.cells(0)
    known = [s.importance(0), s.bias(0), s.count(0), s.cells_per_layer(0)]
    return [places["pos"], places["kind"], *known, *rows]


def _answer(e: Engine, prompt: list[int], forced: list[int]) -> np.ndarray:
    e.prompt(prompt)
    return np.stack([e.logits(-1), *e.forced(forced, len(prompt))])


def _promised(n_tokens: int) -> int:
    return -(-3 * n_tokens // 10)


def _check_cells(e: Engine, seq: int, n_prompt: int, n_forced: int, what: str) -> None:
    held = _promised(n_prompt) - left_free(_promised(n_prompt))
    for n in range(n_prompt + 1, n_prompt + n_forced + 1):
        if held + 1 > _promised(n) + OVERDRAFT:  # all above what is promised are merged
            held = _promised(n)
        held += 1
    got = e.session.n_per_layer(seq)
    check(got == held, f"{what}: {got} cells, promised {held}")


def _try_sequences(path: Path, model: Any, unified: bool) -> None:
    """Four sequences: prompts after one another, then answers side by side."""
    layout = "a unified cache" if unified else "a stream each"
    args = {"n_ctx": 1024, "n_seq_max": 4, "unified": unified, "model": model, "flash_attn": True}
    with Engine(str(path), **args) as e:
        off = _answers(e)
    with Engine(str(path), WHOLE, **args) as e:
        on = _answers(e)
        check(np.array_equal(on, off), f"four sequences, {layout}: NMSE {nmse(off, on):.1e} to off")
        e.clear()
        e.attach({**KEPT, "auto_layers": False})
        logits = _answers(e)
        check(bool(np.isfinite(logits).all()), f"four sequences, {layout}: NaN")
        for seq in range(4):
            _check_cells(e, seq, N_SHORT + seq, 4, f"four sequences, {layout}")


def _answers(e: Engine) -> np.ndarray:
    out = []
    for seq in range(4):
        e.prompt(random_tokens(N_SHORT + seq, 128, 10 + seq), seq=seq)
        out.append(e.logits(-1))
    for i, token in enumerate(random_tokens(4, 128, 3)):
        rows = [(token + seq, N_SHORT + seq + i, seq, True) for seq in range(4)]
        check(e.decode(rows) == 0, "four sequences: not decoded")
        out += [e.logits(seq) for seq in range(4)]
    return np.stack(out)


# -- processes


def _child(path: Path, send: Any) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger takes seconds
    try:
        result = try_model(path)
    except Broken as e:
        result = Result(zoo.label(path), "broken", str(e))
    except Exception as e:
        result = Result(zoo.label(path), "broken", f"{type(e).__name__}: {e}")
    send.send(asdict(result))


def try_all(paths: list[Path]) -> Iterator[Result]:
    """The result of each, forked from this process, which has run no model."""
    context = multiprocessing.get_context("fork")
    for path in paths:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(path, send))
        process.start()
        send.close()
        why = ""
        try:
            if receive.poll(SECONDS):
                yield Result(**receive.recv())
            else:
                why = f"took more than {SECONDS} s"
                process.kill()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if why:
            yield Result(zoo.label(path), "broken", why)
        process.join()


def main(names: list[str]) -> None:
    paths = [p for p in zoo.models() if not names or zoo.label(p) in names or p.stem in names]
    for result in try_all(paths):
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
