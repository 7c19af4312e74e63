"""Which layers look tokens up by what came before them: measured once per model file.

The measure and what follows from it for the cells of each layer are native (`measure_layers.h`);
here is the file in which the scores are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from . import _core
from .embedded import cache_dir
from .pointers import address_of

if TYPE_CHECKING:
    from .llama import ElasticLlama

__all__ = ["measured_scores"]

VERSION = 2  # of what `_core.measure_layers` measures; files of other ones are not read

log = logging.getLogger("elastic_llama")

_measured: dict[Path, list[float]] = {}  # by cache file, where that cannot be written


def measured_scores(llm: ElasticLlama) -> list[float]:
    """How much each layer looks words up, measured once per model file.

    A cache folder that cannot be read or written is done without.

    Raises
    ------
    NotImplementedError, ValueError, RuntimeError
        As `_core.measure_layers`.
    """
    path = os.path.abspath(llm.model_path)
    file = _cache_file(path)
    if file is not None:
        if file in _measured:
            return _measured[file]
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            scores = [float(x) for x in kept["scores"]]
            _core.layer_shares(scores)  # refuses what no measure gives
            same = kept["version"] == VERSION and kept["model"] == path
            if same and len(scores) == _n_layer(llm):
                return scores
    log.info("measuring which layers look words up; once for this model file")
    address = address_of(llm._model.model)
    scores = _core.measure_layers(address, llm.n_threads_batch)
    if file is not None:
        try:
            _write(file, {"version": VERSION, "model": path, "scores": scores})
        except OSError:
            _measured[file] = scores
    return scores


def _n_layer(llm: ElasticLlama) -> int:
    """Layers of the part of the memory that is compressed; of the model where that is not known."""
    address = address_of(llm._ctx.ctx)
    try:
        return int(_core.memory(address)["n_layer"])
    except NotImplementedError:
        return int(llama_cpp.llama_model_n_layer(llm._model.model))


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
