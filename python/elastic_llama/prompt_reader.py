"""A prompt of a chat handler, read over the cells that are there already.

llama-cpp-python's handler clears the cache and decodes a prompt chunk by chunk. Ours does so to a
`PromptReader`, which finds out what of it the cache lacks.
"""

from __future__ import annotations

import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_cpp import mtmd_cpp

from .pieces import ImagePiece, Piece, TextPiece, piece_ids
from .vision import ImageTokens, Vision

if TYPE_CHECKING:
    from .llama import ElasticLlama

_MAX_BYTES = 128 << 20  # of embeddings: an image has about 1 to 50 MiB, in one tile or many


class EncodedImages:
    """Embeddings of the images and tiles that were asked for last, f32 [n_tokens, n_embd] each.

    The last one, and those before it as far as `max_bytes` takes.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()
        self._max_bytes = max_bytes

    def get(self, key: str, encode: Callable[[], np.ndarray]) -> np.ndarray:
        """Those of an image with this content; `encode` is called if they are not known."""
        if key not in self._known:
            self._known[key] = encode()
        self._known.move_to_end(key)
        n_bytes = sum(embeddings.nbytes for embeddings in self._known.values())
        while n_bytes > self._max_bytes and len(self._known) > 1:
            n_bytes -= self._known.popitem(last=False)[1].nbytes
        return self._known[key]


class Pieces:
    """The pieces of a prompt, noted in place of being decoded."""

    def __init__(self, llm: ElasticLlama, known: EncodedImages, tower: str) -> None:
        self._llm, self._known, self._tower_key = llm, known, tower
        self._bitmap: bytes | None = None  # whose chunk came last
        self._part = 0  # which of its chunks that was
        self.all: list[Piece] = []

    def add_text(self, tokens: Sequence[int]) -> None:
        self.all.append(TextPiece(tuple(tokens)))

    def add_image(self, ctx: Any, native: Any) -> int:
        """Note an image chunk of the mtmd context `ctx`; returns the positions that it takes."""
        bitmap = mtmd_cpp.mtmd_input_chunk_get_id(native)
        is_next = bitmap is not None and bitmap == self._bitmap
        self._bitmap, self._part = bitmap, self._part + 1 if is_next else 0
        content = secrets.token_hex() if bitmap is None else bitmap.decode().partition("/")[0]
        tower = _Tower(ctx, self._llm)
        chunk = tower._chunk(native)
        tower.check_batch(chunk)
        key, n = f"{self._tower_key}{content}-{self._part}", chunk.n_positions
        decode = self._decoder(key, tower, native)
        self.all.append(ImagePiece(key, n, decode, chunk.n_tokens, self._part, chunk.grid))
        return n

    def _decoder(self, key: str, tower: Vision, native: Any) -> Callable[[int], int]:
        own, known = _OwnChunk(native), self._known

        def decode(n_past: int) -> int:
            chunk = tower._chunk(own.native)
            return tower.decode(chunk, known.get(key, lambda: tower.encode(chunk)[0]), n_past)

        return decode


class PromptReader:
    """Stands for an `ElasticLlama` while a chat handler goes through the chunks of a prompt.

    The handler resets it, has each chunk decoded, asks for the ids of all of them, and for a
    completion. What the cache lacks is decoded when the ids are asked for. `tower` names the vision
    tower, if it is not the one of `llm`.
    """

    def __init__(self, llm: ElasticLlama, known: EncodedImages, tower: str = "") -> None:
        self._llm = llm
        self._pieces = Pieces(llm, known, tower)
        self._ctx = SimpleNamespace(ctx=self._pieces, kv_cache_clear=lambda: None)
        self.n_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def reset(self) -> None:
        """Nothing: the cache is kept."""

    def eval(self, tokens: Sequence[int]) -> None:
        self._pieces.add_text(tokens)
        self.n_tokens += len(tokens)

    @property
    def input_ids(self) -> np.ndarray:
        """Ids of the prompt, which the cache holds then."""
        self._llm.prefill(self._pieces.all)
        return piece_ids(self._pieces.all)

    def create_completion(
        self, *, stream: bool = False, max_tokens: int | None = None, **kwargs: Any
    ) -> Any:
        llm, n_room = self._llm, self._llm._room.for_answer()
        if n_room is not None:
            max_tokens = min(max_tokens, n_room) if max_tokens and max_tokens > 0 else n_room
        out = llm.create_completion(stream=stream, max_tokens=max_tokens, **kwargs)
        if stream:
            return self._streamed(out)
        n_more = sum(piece.n_cells - len(piece) for piece in self._pieces.all)
        for name in ("prompt_tokens", "total_tokens"):  # which it takes for positions
            out["usage"][name] += n_more
        return out

    def _streamed(self, chunks: Iterator[Any]) -> Iterator[Any]:
        self._llm.prefill(self._pieces.all)  # another call may have come before the first piece
        yield from chunks


class Mtmd:
    """libmtmd, where the chunks of a `PromptReader` are noted and those of a model decoded."""

    def __init__(self, image_tokens: ImageTokens | None = None) -> None:
        self._image_tokens = image_tokens or ImageTokens()

    def mtmd_context_params_default(self) -> Any:
        return self._image_tokens.applied(mtmd_cpp.mtmd_context_params_default())

    def __getattr__(self, name: str) -> Any:
        return getattr(mtmd_cpp, name)

    def mtmd_helper_eval_chunk_single(
        self, ctx: Any, lctx: Any, chunk: Any, n_past: Any, *args: Any
    ) -> int:
        if not isinstance(lctx, Pieces):
            return int(mtmd_cpp.mtmd_helper_eval_chunk_single(ctx, lctx, chunk, n_past, *args))
        args[-1]._obj.value = n_past.value + lctx.add_image(ctx, chunk)
        return 0


class _Tower(Vision):
    """The vision tower of a chat handler, which frees it."""

    def __init__(self, ctx: Any, llm: Any) -> None:
        self.ctx, self.llm = ctx, llm


class _OwnChunk:
    """A copy of a chunk, which lives as long as this."""

    def __init__(self, native: Any) -> None:
        self.native = mtmd_cpp.mtmd_input_chunk_copy(native)
        weakref.finalize(self, mtmd_cpp.mtmd_input_chunk_free, self.native).atexit = False
