"""Figures of the elastic cache, as plain records."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

MIB = 1024 * 1024


class _Renamed:
    """Old names, for one release."""

    probe_ms: float

    @property
    def look_ms(self) -> float:
        """Deprecated: `probe_ms`."""
        warnings.warn("look_ms is now probe_ms", DeprecationWarning, stacklevel=2)
        return self.probe_ms


@dataclass(frozen=True)
class ElasticStats(_Renamed):
    """What the elastic cache did since the model was loaded or its figures were reset.

    `cells_before`, `cells_after` and the bytes are those of the last compressed prompt. Cells are
    what a layer that is compressed holds, on average (`ElasticConfig.layers`). Bytes are those of
    all parts of the memory; `other_bytes` of them are windows and recurrent states, which are not
    compressed.
    """

    compressions: int = 0
    evictions: int = 0
    cells_before: int = 0
    cells_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    other_bytes: int = 0  # in bytes_before and in bytes_after
    score_ms: float = 0.0
    plan_ms: float = 0.0
    merge_ms: float = 0.0
    probe_ms: float = 0.0  # decoding what answers begin with, to compress by it (probe)
    checkpoint_bytes: int = 0  # held outside of the cache, to take answers back (checkpoints)
    cells: int = 0  # held now
    tokens: int = 0  # seen by the sequence: of text, and embeddings of images

    def __str__(self) -> str:
        cost = f"score {self.score_ms:.1f} + plan {self.plan_ms:.1f} + merge {self.merge_ms:.1f}"
        if self.probe_ms:
            cost += f" + probe {self.probe_ms:.1f}"
        other = f", {mib(self.other_bytes)} of it not compressed" if self.other_bytes else ""
        return (
            f"{self.tokens} tokens in {self.cells} cells; last prompt {self.cells_before} -> "
            f"{self.cells_after} cells, {mib(self.bytes_before)} -> {mib(self.bytes_after)}{other};"
            f" {self.compressions} compressions, {self.evictions} evictions; {cost} ms"
        )


@dataclass
class TurnStats(_Renamed):
    """One question and its answer. Times in milliseconds, sizes in bytes.

    Cells are those of the layers that are compressed, bytes those of all parts of the memory.
    """

    n_text: int = 0  # prompt tokens of this turn
    n_image: int = 0  # image embeddings of this turn
    cells_prompt: int = 0  # the sequence's cells before and after compressing
    cells_kept: int = 0
    bytes_prompt: int = 0
    bytes_kept: int = 0
    other_bytes: int = 0  # in both: of windows and recurrent states, which are not compressed
    other_parts: str = ""  # what they are; "" where there are none
    encode_ms: float = 0.0  # vision tower and projector
    prefill_ms: float = 0.0  # llama_decode of text and image embeddings
    probe_ms: float = 0.0  # decoding what the answer begins with, to compress by it (probe)
    compress_ms: float = 0.0  # after the first token of the answer was given out
    decode_ms: float = 0.0
    n_decoded: int = 0  # llama_decode calls behind decode_ms
    n_answer: int = 0  # tokens of the answer
    finish: str = ""  # "stop", "length" or "" while running

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.n_decoded / self.decode_ms if self.decode_ms > 0 else 0.0

    @property
    def pruned_share(self) -> float:
        """Fraction of the prompt's cells that were dropped or merged.

        Where a part of the memory is not compressed: fraction of the bytes of all parts.
        """
        if self.other_bytes:
            return max(0.0, 1 - self.bytes_kept / self.bytes_prompt)
        return 1 - self.cells_kept / self.cells_prompt if self.cells_prompt else 0.0


def mib(n_bytes: float) -> str:
    """Bytes as text, such as 1.25 MiB."""
    return f"{n_bytes / MIB:.2f} MiB"
