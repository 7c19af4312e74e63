"""Prompts with images on a plain context, by libmtmd's own helper: what ours is compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

from tests.support.engine import N_GPU_LAYERS, Engine


class PlainVision:
    """A language model with a vision tower; nothing of `elastic_llama` is used.

    Parameters
    ----------
    model, mmproj : Path
    **context
        Fields of :class:`tests.support.engine.Engine`.
    """

    def __init__(self, model: Path, mmproj: Path, **context: Any) -> None:
        self.engine = Engine(str(model), **context)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.print_timings = N_GPU_LAYERS > 0, False
        params.n_threads = self.engine.n_threads
        self.ctx = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self.engine.model, params)
        assert self.ctx, mmproj
        self.n_past = 0

    def close(self) -> None:
        if self.ctx:
            mtmd_cpp.mtmd_free(self.ctx)
            self.engine.close()
            self.ctx = None

    def clear(self) -> None:
        self.engine.clear()
        self.n_past = 0

    def __enter__(self) -> PlainVision:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def chunks(self, text: str, images: Sequence[np.ndarray], first: bool = True) -> Iterator[Any]:
        """Native chunks of a text with a marker for each image, uint8 ``(height, width, 3)``."""
        bitmaps = [
            mtmd_cpp.mtmd_bitmap_init(
                image.shape[1],
                image.shape[0],
                (ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes()),
            )
            for image in images
        ]
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            data = text.encode()
            inp = mtmd_cpp.mtmd_input_text()
            inp.text, inp.text_len = data, len(data)
            inp.add_special, inp.parse_special = first, True
            array = (mtmd_cpp.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
            code = mtmd_cpp.mtmd_tokenize(self.ctx, chunks, ctypes.byref(inp), array, len(bitmaps))
            assert code == 0, f"mtmd_tokenize returned {code}"
            yield chunks
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                mtmd_cpp.mtmd_bitmap_free(bitmap)

    def sizes(
        self, text: str, images: Sequence[np.ndarray], first: bool = True
    ) -> list[tuple[int, int, bool]]:
        """Cells, positions, and whether it is an image, of each chunk."""
        with self.chunks(text, images, first) as chunks:
            return [
                (
                    mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk),
                    mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk),
                    mtmd_cpp.mtmd_input_chunk_get_type(chunk)
                    == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE,
                )
                for chunk in _each(chunks)
            ]

    def prompt(self, text: str, images: Sequence[np.ndarray], first: bool = True) -> np.ndarray:
        """Decode a prompt behind what is there and return the logits of its last token."""
        n_past = llama_cpp.llama_pos(0)
        with self.chunks(text, images, first) as chunks:
            code = mtmd_cpp.mtmd_helper_eval_chunks(
                self.ctx,
                self.engine.ctx,
                chunks,
                self.n_past,
                0,
                self.engine.n_batch,
                True,
                ctypes.byref(n_past),
            )
        assert code == 0, f"mtmd_helper_eval_chunks returned {code}"
        self.n_past = n_past.value
        return self.engine.logits(-1)

    def forced(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits ``(len(tokens), n_vocab)`` of an answer."""
        out = self.engine.forced(list(tokens), self.n_past)
        self.n_past += len(tokens)
        return out

    def features(self, text: str, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Embeddings ``(n_token, n_float)`` of every image chunk."""
        out = []
        n_float = llama_cpp.llama_model_n_embd_inp(self.engine.model)
        with self.chunks(text, images) as chunks:
            for chunk in _each(chunks):
                kind = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
                if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    assert mtmd_cpp.mtmd_encode_chunk(self.ctx, chunk) == 0
                    shape = (mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), n_float)
                    data = mtmd_cpp.mtmd_get_output_embd(self.ctx)
                    out.append(np.ctypeslib.as_array(data, shape).copy())
        return out

    def tokens(self, text: str, images: Sequence[np.ndarray]) -> list[list[int]]:
        """Tokens of every text chunk."""
        out = []
        with self.chunks(text, images) as chunks:
            for chunk in _each(chunks):
                if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    n = ctypes.c_size_t()
                    data = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                    out.append([int(data[i]) for i in range(n.value)])
        return out


def _each(chunks: Any) -> Iterator[Any]:
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        yield mtmd_cpp.mtmd_input_chunks_get(chunks, i)
