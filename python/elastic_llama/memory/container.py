"""One entry of the image memory as a safetensors file, in which every flipped byte is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ElasticError, message
from .packing import pack_state, unpack_state

FORMAT = "elastic-llama image memory 2"

_BLANK = b"0" * 64
# safetensors writes plain JSON; the name is found once, since values cannot hold a bare quote
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')


class DamagedFileError(ElasticError, ValueError):
    """A file of the image memory that is not what was written, or not of this memory."""


@dataclass(frozen=True)
class Entry:
    """The K/V of a prompt that ends with an image.

    Attributes
    ----------
    key : str
        Says what it is of (`keys.prefix_key`), 64 hexadecimal digits.
    ids : ndarray, int32 [n_positions]
        Ids of the prompt's positions: tokens >= 0, places of an image < 0.
    packed : bytes-like
        The sequence's saved state, without its zeros (`packing`).
    info : dict of str
        For people: the model, the policy, the budget, cells.
    """

    key: str
    ids: np.ndarray
    packed: bytes | memoryview = field(repr=False)
    info: dict[str, str]

    @classmethod
    def of_state(cls, key: str, ids: np.ndarray, state: Any, info: dict[str, Any]) -> Entry:
        """Of a state as `llama_state_seq_get_data` gives it."""
        named = {name: str(value) for name, value in info.items()}
        return cls(key, np.asarray(ids, np.int32), pack_state(state), named)

    def state(self) -> memoryview:
        """What `llama_state_seq_set_data` takes."""
        return unpack_state(self.packed)

    @property
    def n_bytes(self) -> int:
        return len(self.packed) + self.ids.nbytes


def pack(entry: Entry) -> bytes:
    """The bytes of a file: tensors `state` (uint8) and `ids` (int32), and what they are of."""
    from safetensors.numpy import save

    about = json.dumps(entry.info, sort_keys=True)
    metadata = {
        "format": FORMAT,
        "key": entry.key,
        "info": about,
        "checksum": _BLANK.decode(),
    }
    tensors = {"state": np.frombuffer(entry.packed, np.uint8), "ids": entry.ids}
    data = save(tensors, metadata=metadata)
    start, end = _checksum_span(data)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def unpack(data: bytes, key: str | None = None) -> Entry:
    """The entry in the bytes of a file.

    Parameters
    ----------
    key : str, optional
        What it is expected to be of.

    Raises
    ------
    DamagedFileError
        A byte is not what was written, or it is a file of another kind, version or key.
    """
    start, end = _checksum_span(data)
    view, state = memoryview(data), hashlib.sha256()
    for part in (view[:start], _BLANK, view[end:]):  # as it was when it was computed
        state.update(part)
    if state.hexdigest().encode() != data[start:end]:
        raise _damaged("damaged: its checksum is another one")
    return _read(data, key)


def _read(data: bytes, key: str | None) -> Entry:
    try:
        n = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:n])
        metadata = header["__metadata__"]
        entry = Entry(
            key=metadata["key"],
            ids=np.frombuffer(_tensor(data, n, header["ids"]), np.int32),
            packed=_tensor(data, n, header["state"]),
            info=json.loads(metadata["info"]),
        )
    except Exception as e:  # whatever another file has there
        raise _damaged(f"of another kind ({e})") from e
    if metadata.get("format") != FORMAT:
        raise _damaged(f"of another version ({metadata.get('format')})")
    if key is not None and entry.key != key:
        raise _damaged("of another image, prompt or model than its name says")
    return entry


def _tensor(data: bytes, start: int, about: dict[str, Any]) -> memoryview:
    """The bytes of a tensor, which safetensors would copy twice."""
    first, last = about["data_offsets"]
    return memoryview(data)[start + first : start + last]


def _checksum_span(data: bytes) -> tuple[int, int]:
    """Where the digits of the checksum are."""
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    found = list(_CHECKSUM.finditer(header))
    if len(found) != 1:
        raise _damaged("no file of the image memory, or a damaged one")
    return found[0].span(1)


def _damaged(what: str) -> DamagedFileError:
    return DamagedFileError(message("memory", f"a file is {what}"))
