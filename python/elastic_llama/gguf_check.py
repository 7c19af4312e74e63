"""Looks at a GGUF file before llama.cpp does: a wrong file is an error and never an abort."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ModelFileError, ModelNotFoundError, message

# GGUF value type -> struct code; 8 is a string, 9 an array
_SCALAR = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# ggml type -> (values per block, bytes per block)
_BLOCK = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
}


@dataclass
class Header:
    """Metadata (arrays left out) and the shapes of the tensors, [ne0, ne1, ...]."""

    meta: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.meta.get("general.architecture", ""))

    @property
    def is_mmproj(self) -> bool:
        return self.architecture == "clip" or self.meta.get("general.type") == "mmproj"

    @property
    def n_embd(self) -> int:
        """Width of a language model, 0 if unknown."""
        return int(self.meta.get(f"{self.architecture}.embedding_length", 0))

    @property
    def n_embd_out(self) -> int:
        """Width that a LLaVA-style projector writes, 0 for other projectors."""
        kind = self.meta.get("clip.projector_type", "mlp")
        shape = self.shapes.get("mm.2.weight", ())
        return shape[1] if kind == "mlp" and len(shape) == 2 else 0


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def value(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self, skip: bool = False) -> str:
        n = self.value("Q")
        if n > len(self.data) - self.at:
            raise struct.error("string runs past the end of the file")
        self.at += n
        return "" if skip else self.data[self.at - n : self.at].decode("utf-8", "replace")

    def typed(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind != 9:
            return self.value(_SCALAR[kind])
        kind, n = self.value("I"), self.value("Q")
        if n > len(self.data) - self.at:
            raise struct.error("array runs past the end of the file")
        if kind in _SCALAR:
            self.at += n * struct.calcsize("<" + _SCALAR[kind])
        else:
            for _ in range(n):
                self.string(skip=True) if kind == 8 else self.typed(kind)
        return None


def read_header(path: str | os.PathLike[str], what: str = "model") -> Header:
    """Read and check a GGUF file's header, and that its tensors lie inside the file.

    Raises
    ------
    ModelNotFoundError, ModelFileError
    """
    path = Path(path)
    if not path.exists():
        raise ModelNotFoundError(message(what, "no such file", str(path), "a GGUF file"))
    try:
        if path.is_dir() or path.stat().st_size < 24:
            raise ModelFileError(
                message(
                    what,
                    str(path),
                    "a folder" if path.is_dir() else f"{path.stat().st_size} bytes",
                    "a GGUF file",
                )
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, str(path), what)
    except OSError as e:
        raise ModelFileError(
            message(what, str(path), f"an unreadable file ({e.strerror})", "a GGUF file")
        ) from e
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as e:
        if isinstance(e, ModelFileError):
            raise
        raise ModelFileError(
            message(
                what,
                str(path),
                f"a damaged or truncated GGUF header ({e})",
                "a whole GGUF file",
                "fetch it again",
            )
        ) from e


def _parse(data: mmap.mmap, path: str, what: str) -> Header:
    if data[:4] != b"GGUF":
        raise ModelFileError(
            message(what, path, f"magic {data[:4]!r}", "a GGUF file (magic b'GGUF')")
        )
    reader, header, end = _Reader(data), Header(), 0
    reader.at = 4
    version, n_tensors, n_meta = reader.value("I"), reader.value("Q"), reader.value("Q")
    if version not in (2, 3):
        raise ModelFileError(message(what, path, f"GGUF version {version}", "2 or 3"))
    for _ in range(n_meta):
        key = reader.string()
        value = reader.typed(reader.value("I"))
        if value is not None:
            header.meta[key] = value
    for _ in range(n_tensors):
        name = reader.string()
        shape = tuple(reader.value("Q") for _ in range(reader.value("I")))
        kind, offset = reader.value("I"), reader.value("Q")
        header.shapes[name] = shape
        per_block, n_bytes = _BLOCK.get(kind, (1, 0))
        size = n_bytes
        for n in shape:
            size *= n
        end = max(end, offset + size // per_block)
    align = int(header.meta.get("general.alignment", 32)) or 32
    start = -(-reader.at // align) * align
    if n_tensors and start + end > len(data):
        raise ModelFileError(
            message(
                what,
                path,
                f"a truncated file of {len(data)} bytes",
                f"{start + end} bytes",
                "fetch it again",
            )
        )
    return header


def check_model(path: str | os.PathLike[str]) -> Header:
    """Header of a language model; refuses projectors, adapters and others."""
    header = read_header(path, "model")
    kind = header.meta.get("general.type", "model")
    if header.is_mmproj:
        raise ModelFileError(
            message(
                "model",
                str(path),
                "a multimodal projector (mmproj)",
                "a language model",
                "pass it as mmproj",
            )
        )
    if kind != "model" or not header.architecture:
        raise ModelFileError(
            message("model", str(path), f"a GGUF of type {kind!r}", "a language model")
        )
    return header


def check_mmproj(path: str | os.PathLike[str], model: Header | None = None) -> Header:
    """Header of a vision projector that fits the model."""
    header = read_header(path, "mmproj")
    if not header.is_mmproj:
        raise ModelFileError(
            message(
                "mmproj",
                str(path),
                f"a {header.architecture or '?'} model",
                "a multimodal projector",
                "pass it as the model",
            )
        )
    if header.meta.get("clip.has_vision_encoder") is False:
        raise ModelFileError(
            message("mmproj", str(path), "no vision encoder", "one that sees images")
        )
    widths = (header.n_embd_out, model.n_embd if model else 0)
    if all(widths) and widths[0] != widths[1]:
        raise ModelFileError(
            message(
                "mmproj",
                str(path),
                f"a projector to width {widths[0]}",
                f"the model's {widths[1]}",
                "use the mmproj of this model",
            )
        )
    return header
