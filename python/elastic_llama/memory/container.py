"""One entry of the image memory as a safetensors file, in which every flipped byte is noticed."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ElasticError, message

FORMAT = "elastic-llama image memory 1"

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
    packed : bytes
        The sequence's saved state, deflated: rows that single layers do without are zero in it.
    info : dict of str
        For people: the model, the policy, the budget, cells.
    """

    key: str
    ids: np.ndarray
    packed: bytes = field(repr=False)
    info: dict[str, str]

    @classmethod
    def of_state(cls, key: str, ids: np.ndarray, state: Any, info: dict[str, Any]) -> Entry:
        """Of a state as `llama_state_seq_get_data` gives it."""
        named = {name: str(value) for name, value in info.items()}
        return cls(key, np.asarray(ids, np.int32), zlib.compress(state, 1), named)

    def state(self) -> bytes:
        """What `llama_state_seq_set_data` takes."""
        return zlib.decompress(self.packed)

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
    return _with_checksum(data, hashlib.sha256(data).hexdigest().encode())


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
    found = _CHECKSUM.findall(_header(data))
    if len(found) != 1:
        raise _damaged("no file of the image memory, or a damaged one")
    if hashlib.sha256(_with_checksum(data, _BLANK)).hexdigest().encode() != found[0]:
        raise _damaged("damaged: its checksum is another one")
    return _read(data, key)


def _read(data: bytes, key: str | None) -> Entry:
    from safetensors.numpy import load

    try:
        n = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + n])["__metadata__"]
        tensors = load(data)
        entry = Entry(
            key=metadata["key"],
            ids=np.array(tensors["ids"], np.int32),
            packed=tensors["state"].tobytes(),
            info=json.loads(metadata["info"]),
        )
    except Exception as e:  # safetensors' own classes
        raise _damaged(f"of another kind ({e})") from e
    if metadata.get("format") != FORMAT:
        raise _damaged(f"of another version ({metadata.get('format')})")
    if key is not None and entry.key != key:
        raise _damaged("of another image, prompt or model than its name says")
    return entry


def _header(data: bytes) -> bytes:
    return data[: 8 + int.from_bytes(data[:8], "little")]


def _with_checksum(data: bytes, digits: bytes) -> bytes:
    found = _CHECKSUM.search(_header(data))
    if found is None:
        raise _damaged("no file of the image memory")
    start, end = found.span(1)
    return data[:start] + digits + data[end:]


def _damaged(what: str) -> DamagedFileError:
    return DamagedFileError(message("memory", f"a file is {what}"))
