"""Vision models of the families, loaded, and libmtmd's own way of reading a prompt."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import elastic_llama as el
import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from PIL import Image

from tests.support.mmproj_zoo import FAMILIES, write_mmproj
from tests.support.vision_text import N_EMBD, write_text_model


def picture(seed: int = 0, width: int = 160, height: int = 90) -> Image.Image:
    """Noise: no two pictures are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Files:
    """Files of the families in a folder, written when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, **options: Any) -> el.ElasticLlama:
        family = FAMILIES[name]
        model, mmproj = self.folder / f"{name}.gguf", self.folder / f"{name}-mmproj.gguf"
        if not mmproj.exists():
            write_text_model(model, family.text, family.tokens)
            write_mmproj(mmproj, family, N_EMBD)
        options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, **options}
        return el.ElasticLlama(model, mmproj_path=mmproj, **options)


def logits(llm: el.ElasticLlama) -> np.ndarray:
    """After the last token, f32 [n_vocab]."""
    row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy()


def read_by_mtmd(
    chat: el.Conversation, prompt: str, images: Sequence[Image.Image]
) -> tuple[np.ndarray, int]:
    """What `mtmd_helper_eval_chunks` makes of a prompt in an empty cache.

    Returns
    -------
    logits, position
        After the last token, and where the next one goes.
    """
    llm, vision = chat.llm, chat.vision
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm._ctx.ctx), True)
    buffers = [np.asarray(image.convert("RGB")).copy() for image in images]
    bytes_of = ctypes.POINTER(ctypes.c_uint8)
    bitmaps = [
        mtmd_cpp.mtmd_bitmap_init(b.shape[1], b.shape[0], b.ctypes.data_as(bytes_of))
        for b in buffers
    ]
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    text = mtmd_cpp.mtmd_input_text()
    data = prompt.encode()
    text.text, text.text_len, text.add_special, text.parse_special = data, len(data), True, True
    array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
    end = llama_cpp.llama_pos(0)
    try:
        code = mtmd_cpp.mtmd_tokenize(vision.ctx, chunks, ctypes.byref(text), array, len(bitmaps))
        assert code == 0, f"mtmd_tokenize returned {code}"
        code = mtmd_cpp.mtmd_helper_eval_chunks(
            vision.ctx, llm._ctx.ctx, chunks, 0, 0, llm.n_batch, True, ctypes.byref(end)
        )
        assert code == 0, f"mtmd_helper_eval_chunks returned {code}"
    finally:
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd_cpp.mtmd_bitmap_free(bitmap)
    return logits(llm), int(end.value)
