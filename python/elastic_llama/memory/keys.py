"""What an entry of the image memory is of: a hash of all that its K/V depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..embedded import cache_dir
from ..pieces import ImagePiece, Piece

if TYPE_CHECKING:
    from ..llama import ElasticLlama

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# fields of llama_context_params that K and V depend on, by more than rounding or by it
_CONTEXT = (
    "n_batch",
    "n_ubatch",
    "rope_scaling_type",
    "attention_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "type_k",
    "type_v",
    "swa_full",
)

_digests: dict[tuple[Any, ...], str] = {}  # of files, by name and what tells that they changed


def digest(value: Any) -> str:
    """Of anything that JSON can say, 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def owner_of(llm: ElasticLlama, budget: float | int) -> dict[str, Any]:
    """Everything but the prompt: model, tower, library, cache and context."""
    from .. import build_info

    params = llm.context_params
    resolved = llm.elastic_resolved
    elastic: Any = None
    if resolved is not None and llm.elastic is not None:
        elastic = {
            "policy": resolved.policy,
            "parts": [resolved.scorer, resolved.selector, resolved.combiner, resolved.evictor],
            "budget": budget,
            "n_sink": llm.elastic.n_sink,
            "min_cells": llm.elastic.min_cells,
            "kv_cells": resolved.kv_cells,
            "layer_share": resolved.layer_share,
        }
    lora = llm.lora_path
    return {
        "build": build_info(),
        "model": [file_digest(path) for path in model_parts(llm.model_path)],
        "mmproj": None if llm.mmproj_path is None else file_digest(llm.mmproj_path),
        "image_tokens": [llm.image_tokens.least, llm.image_tokens.most],
        "lora": None if lora is None else [file_digest(lora), llm.lora_scale],
        "overrides": sorted((llm.kv_overrides or {}).items()),
        "context": {name: getattr(params, name) for name in _CONTEXT},
        "long_rope": _is_long(llm),
        "elastic": elastic,
    }


def stamps(llm: ElasticLlama) -> list[Any]:
    """What tells that a file of the model was replaced since it was loaded."""
    paths = [*model_parts(llm.model_path), llm.mmproj_path, llm.lora_path]
    return [_stamp(path) for path in paths if path is not None]


def _stamp(path: str) -> tuple[Any, ...]:
    name = os.path.abspath(path)
    stat = os.stat(name)
    return (name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def prefix_key(owner: dict[str, Any], n_ctx: int, pieces: Sequence[Piece]) -> str:
    """The key of a prompt: the tokens and images in it, in their order.

    Layers that keep different numbers of cells take no more than three quarters of a context, so a
    smaller one counts, too.
    """
    said = [
        ["image", piece.key, len(piece), piece.n_cells]
        if isinstance(piece, ImagePiece)
        else ["text", list(piece.tokens)]
        for piece in pieces
    ]
    n = sum(piece.n_cells for piece in pieces)
    return digest([owner, min(n_ctx * 3 // 4, n), said])


def _is_long(llm: ElasticLlama) -> bool:
    """Whether a longrope model takes its factors for long contexts."""
    name = "scaling.original_context_length"
    known = [int(value) for key, value in llm.metadata.items() if key.endswith(name)]
    return bool(known) and llm.context_params.n_ctx > known[0]


def model_parts(path: str) -> list[str]:
    """All files of a model that is cut into several."""
    match = _SPLIT.fullmatch(path)
    if match is None:
        return [path]
    n = int(match[3])
    return [f"{match[1]}-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]


def file_digest(path: str | os.PathLike[str]) -> str:
    """Hash of what is in a file; computed once as long as its size and times stay the same.

    Raises
    ------
    OSError
    """
    known = _stamp(os.fspath(path))
    if known not in _digests:
        _digests[known] = _kept_digest(known) or _hash(known[0], known)
    return _digests[known]


def _hash(name: str, known: tuple[Any, ...]) -> str:
    state = hashlib.blake2b(digest_size=32)
    with open(name, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            state.update(block)
    value = state.hexdigest()
    for kept in _kept_files(known):
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as temp:
                part = Path(temp) / kept.name
                part.write_text(json.dumps([list(known), value]), encoding="utf-8")
                os.replace(part, kept)
    return value


def _kept_digest(known: tuple[Any, ...]) -> str | None:
    for kept in _kept_files(known):
        with suppress(OSError, ValueError, TypeError):
            of, value = json.loads(kept.read_text(encoding="utf-8"))
            if of == list(known) and re.fullmatch("[0-9a-f]{64}", value):
                return str(value)
    return None


def _kept_files(known: tuple[Any, ...]) -> Iterator[Path]:
    """Where the hash of a large file is kept; nowhere without a home folder."""
    with suppress(RuntimeError):
        yield cache_dir() / "hashes" / f"{digest(list(known))[:32]}.json"
