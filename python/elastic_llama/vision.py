"""The vision side of libmtmd: a prompt with images becomes chunks of tokens and of embeddings."""

from __future__ import annotations

import ctypes
import numbers
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from llama_cpp._utils import suppress_stdout_stderr
from PIL import Image

from .errors import (
    ConfigError,
    ContextOverflowError,
    ImageError,
    ModelFileError,
    StateError,
    message,
)

_MOST_TOKENS = 32768  # libmtmd counts the pixels of these in 32 bits
_COUNTED = 112  # pixels of a side of an image that is only counted
MARKER = mtmd_cpp.mtmd_default_marker().decode()


@dataclass(frozen=True)
class ImageTokens:
    """Bounds of the embeddings that an image becomes; None: those of the vision tower.

    They say how large towers take an image that take any size (Qwen-VL, Pixtral, LFM2-VL, Gemma 4).

    Raises
    ------
    ConfigError
        A bound below 1, or the smaller one above the larger one.
    """

    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("image_min_tokens", self.least), ("image_max_tokens", self.most)):
            is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if value is not None and not (is_number and 1 <= value <= _MOST_TOKENS):
                expected = f"a whole number from 1 to {_MOST_TOKENS}"
                raise ConfigError(message("vision", name, repr(value), expected))
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ConfigError(
                message(
                    "vision",
                    "image_min_tokens",
                    self.least,
                    f"at most image_max_tokens = {self.most}",
                )
            )

    def check_refusal(self) -> None:
        """Raise `ConfigError` if a tower that libmtmd refuses may be so for these bounds."""
        if self != ImageTokens():
            raise ConfigError(
                message(
                    "vision",
                    "image_min_tokens, image_max_tokens",
                    f"{self.least}, {self.most}",
                    "bounds that the vision tower takes; its own lie between them, or are replaced",
                    "pass both, or neither",
                )
            )

    def applied(self, params: Any) -> Any:
        """`params`, a `mtmd_context_params`, with these bounds."""
        params.image_min_tokens = -1 if self.least is None else int(self.least)
        params.image_max_tokens = -1 if self.most is None else int(self.most)
        return params


@dataclass
class Chunk:
    """Part of a prompt: text tokens, or one image or tile of one.

    `native` lives as long as its `chunks` scope.
    """

    tokens: list[int]
    native: Any
    n_tokens: int  # which is cells
    bitmap_id: str | None = None  # which of the images it belongs to, a number from 0 on

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def is_image(self) -> bool:
        return self.native is not None

    @property
    def n_positions(self) -> int:
        """Positions that it takes: fewer than its tokens with M-RoPE."""
        if self.native is None:
            return self.n_tokens
        return int(mtmd_cpp.mtmd_input_chunk_get_n_pos(self.native))

    @property
    def knows_its_number(self) -> bool:
        """Whether positions say which image of the prompt it is (HunyuanVL)."""
        image = mtmd_cpp.mtmd_input_chunk_get_tokens_image(self.native) if self.native else None
        if image is None or self.n_tokens < 3:
            return False
        second = mtmd_cpp.mtmd_image_tokens_get_decoder_pos(image, 0, 1)
        return (int(second.t), int(second.x)) == (1, 0)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns, where all embeddings are at one position (M-RoPE); else None."""
        image = mtmd_cpp.mtmd_input_chunk_get_tokens_image(self.native) if self.native else None
        if image is None:
            return None
        last = mtmd_cpp.mtmd_image_tokens_get_decoder_pos(image, 0, self.n_tokens - 1)
        return (int(last.y) + 1, int(last.x) + 1) if last.t == 0 else None


class Vision:
    """One mtmd context.

    Parameters
    ----------
    mmproj_path : path
    llm : llama_cpp.Llama
    image_tokens : ImageTokens, optional
        Fewest and most embeddings of an image, for towers that take images of any size.
    """

    def __init__(
        self,
        mmproj_path: str | os.PathLike[str],
        llm: Any,
        image_tokens: ImageTokens | None = None,
    ) -> None:
        self.llm = llm
        image_tokens = image_tokens or ImageTokens()
        params = image_tokens.applied(mtmd_cpp.mtmd_context_params_default())
        params.n_threads = llm.n_threads_batch
        params.print_timings = False
        params.use_gpu = True
        with suppress_stdout_stderr(disable=llm.verbose):
            path = os.fspath(mmproj_path).encode()
            self.ctx = mtmd_cpp.mtmd_init_from_file(path, llm.model, params)
        if self.ctx is None:
            image_tokens.check_refusal()
            raise ModelFileError(
                message(
                    "mmproj",
                    str(mmproj_path),
                    "a file that libmtmd refuses",
                    "a vision tower for this model",
                )
            )
        # also where nobody closes it; the system frees the rest
        self._free = weakref.finalize(self, mtmd_cpp.mtmd_free, self.ctx)
        self._free.atexit = False

    @property
    def n_embd(self) -> int:
        """Floats of an embedding that the model reads: more than its width with deepstack."""
        return int(llama_cpp.llama_model_n_embd_inp(self.llm.model))

    def close(self) -> None:
        self._free()
        self.ctx = None

    @contextmanager
    def chunks(
        self, prompt: str, images: Sequence[Image.Image | None], add_special: bool
    ) -> Iterator[list[Chunk]]:
        """The chunks of a prompt in which `MARKER` stands for each image in turn.

        None stands for an image that is only counted, and not encoded.
        """
        bitmaps = [self._bitmap(image) for image in images]
        for i, bitmap in enumerate(bitmaps):
            mtmd_cpp.mtmd_bitmap_set_id(bitmap, str(i).encode())
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            data = prompt.encode()
            inp = mtmd_cpp.mtmd_input_text()
            inp.text, inp.text_len = data, len(data)
            inp.add_special, inp.parse_special = add_special, True
            array = (mtmd_cpp.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
            code = mtmd_cpp.mtmd_tokenize(self.ctx, chunks, ctypes.byref(inp), array, len(bitmaps))
            if code:
                raise ImageError(
                    message(
                        "prompt",
                        "libmtmd could not place the images in it",
                        f"code {code}",
                        "one marker per readable image",
                    )
                )
            yield [
                self._chunk(mtmd_cpp.mtmd_input_chunks_get(chunks, i))
                for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks))
            ]
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                mtmd_cpp.mtmd_bitmap_free(bitmap)

    def check_batch(self, chunk: Chunk) -> None:
        """Refuse an image whose embeddings see each other, but do not fit in one batch.

        Raises
        ------
        ConfigError
        """
        n_most = min(self.llm.n_batch, int(llama_cpp.llama_n_ubatch(self.llm._ctx.ctx)))
        if chunk.n_tokens <= n_most:
            return
        if mtmd_cpp.mtmd_decode_use_non_causal(self.ctx, chunk.native):
            raise ConfigError(
                message(
                    "image",
                    "embeddings of an image that this model reads at once",
                    chunk.n_tokens,
                    f"at most n_batch and n_ubatch, {n_most}",
                    f"pass n_batch={chunk.n_tokens} and n_ubatch={chunk.n_tokens}, or more",
                )
            )

    def encode(self, chunk: Chunk) -> tuple[np.ndarray, float]:
        """Embeddings of an image f32 [n_tokens, n_embd], and the milliseconds they took."""
        start = time.perf_counter()
        code = mtmd_cpp.mtmd_encode_chunk(self.ctx, chunk.native)
        if code:
            raise StateError(message("image", "libmtmd could not encode it", f"code {code}"))
        shape = (chunk.n_tokens, self.n_embd)
        out = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.ctx), shape).copy()
        return out, 1000 * (time.perf_counter() - start)

    def decode(self, chunk: Chunk, embeddings: np.ndarray, n_past: int) -> int:
        """Put an encoded image into the KV cache at `n_past`; returns the next position."""
        if embeddings.shape != (chunk.n_tokens, self.n_embd):
            raise StateError(
                message(
                    "image",
                    "embeddings of another shape",
                    embeddings.shape,
                    f"{chunk.n_tokens} tokens of {self.n_embd} floats",
                )
            )
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        n_past_new = llama_cpp.llama_pos(0)
        code = mtmd_cpp.mtmd_helper_decode_image_chunk(
            self.ctx,
            self.llm._ctx.ctx,
            chunk.native,
            embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            llama_cpp.llama_pos(n_past),
            llama_cpp.llama_seq_id(0),
            self.llm.n_batch,
            ctypes.byref(n_past_new),
            mtmd_cpp.mtmd_helper_post_decode_callback(0),
            None,
        )
        if code == 1:
            raise ContextOverflowError(message("image", "no free cells for it", do="raise n_ctx"))
        if code:
            raise StateError(message("image", "llama.cpp could not decode it", f"code {code}"))
        return int(n_past_new.value)

    def _bitmap(self, image: Image.Image | None) -> Any:
        if image is None:
            return mtmd_cpp.mtmd_bitmap_init(_COUNTED, _COUNTED, None)
        pixels = image.convert("RGB").tobytes()  # libmtmd reads three bytes a pixel
        buffer = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        return mtmd_cpp.mtmd_bitmap_init(image.width, image.height, buffer)

    def _chunk(self, native: Any) -> Chunk:
        n = mtmd_cpp.mtmd_input_chunk_get_n_tokens(native)
        kind = mtmd_cpp.mtmd_input_chunk_get_type(native)
        if kind != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            bitmap_id = mtmd_cpp.mtmd_input_chunk_get_id(native)
            return Chunk([], native, n, None if bitmap_id is None else bitmap_id.decode())
        n_out = ctypes.c_size_t()
        tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(native, ctypes.byref(n_out))
        return Chunk([tokens[i] for i in range(n_out.value)], None, n)
