"""Two ways to ask the model: PyTorch (checkpoints) and llama.cpp (what users run)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from export_mmproj import load_tower
from lm import LanguageModel
from PIL import Image
from prompts import FORMATS
from tower import normalise


class TorchReader:
    """The tower of a checkpoint (.pt) or an exported mmproj (.gguf) and the PyTorch decoder."""

    def __init__(self, lm: str, vision: str) -> None:
        self.lm, self.tower = LanguageModel(lm), load_tower(Path(vision))

    @torch.no_grad()
    def embed(self, image: Image.Image) -> np.ndarray:
        """Image tokens, [n_patch, width], f32."""
        return self.tower(normalise([image], self.tower.config))[0].numpy()

    def encode(self, text: str) -> list[int]:
        return self.lm.encode(text)

    def answers(
        self, image: Image.Image, questions: list[str], style: str, limits: list[int]
    ) -> list[str]:
        """Greedy answers to questions about one image, each asked alone; limits in tokens."""
        before, after, _ = FORMATS[style]
        prefix = torch.cat(
            [self.lm.embed(self.lm.encode(before)), torch.from_numpy(self.embed(image))]
        )
        prompts = [self.lm.encode(after.format(question=q)) for q in questions]
        return [self.lm.decode(ids) for ids in self.lm.generate(prefix, prompts, limits)]


class LlamaReader:
    """llama.cpp through llama-cpp-python, with the libraries that package finds."""

    def __init__(self, lm: str, vision: str, n_threads: int = 1) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.api, self.mtmd = llama_cpp, mtmd_cpp
        self.llama = llama_cpp.Llama(
            lm,
            n_ctx=2048,
            n_threads=n_threads,
            n_gpu_layers=0,
            n_threads_batch=n_threads,
            verbose=False,
        )
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads = False, False, n_threads
        self.vision = mtmd_cpp.mtmd_init_from_file(vision.encode(), self.llama.model, params)
        if self.vision is None:
            raise RuntimeError(f"[evaluate] llama.cpp could not read {vision}")

    def encode(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def embed(self, image: Image.Image) -> np.ndarray:
        """Image tokens, [n_patch, width], f32."""
        with _Chunks(self, "", image) as chunks:
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, 0)
            if self.mtmd.mtmd_encode_chunk(self.vision, chunk) != 0:
                raise RuntimeError("[evaluate] image encoding failed")
            n = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            width = self.llama.n_embd()
            values = self.mtmd.mtmd_get_output_embd(self.vision)
            return np.ctypeslib.as_array(values, (n * width,)).reshape(n, width).copy()

    def answers(
        self, image: Image.Image, questions: list[str], style: str, limits: list[int]
    ) -> list[str]:
        """Greedy answers; the image is decoded once and each question rolled back."""
        before, after, _ = FORMATS[style]
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        n_past = self.api.llama_pos(0)
        with _Chunks(self, before, image) as chunks:
            rc = self.mtmd.mtmd_helper_eval_chunks(
                self.vision,
                self.llama._ctx.ctx,
                chunks,
                self.api.llama_pos(0),
                self.api.llama_seq_id(0),
                self.llama.n_batch,
                False,
                ctypes.byref(n_past),
            )
        if rc != 0:
            raise RuntimeError("[evaluate] decoding the image failed")
        return [
            self._answer(n_past.value, self.encode(after.format(question=q)), limit)
            for q, limit in zip(questions, limits)
        ]

    def _answer(self, n_prefix: int, prompt: list[int], limit: int) -> str:
        self.llama._ctx.kv_cache_seq_rm(0, n_prefix, -1)
        self.llama.n_tokens = n_prefix
        tokens: list[int] = []
        self.llama.eval(prompt)
        while len(tokens) < limit:
            logits = self.api.llama_get_logits_ith(self.llama._ctx.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).argmax())
            if token == self.llama.token_eos():
                break
            tokens.append(token)
            self.llama.eval([token])
        return self.llama.detokenize(tokens).decode()


class _Chunks:
    """mtmd chunks of a text followed by an image, freed on exit."""

    def __init__(self, reader: LlamaReader, before: str, image: Image.Image) -> None:
        self.reader, self.before, self.image = reader, before, image

    def __enter__(self):
        m = self.reader.mtmd
        pixels = np.asarray(self.image.convert("RGB")).tobytes()
        data = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        self.bitmap = m.mtmd_bitmap_init(self.image.width, self.image.height, data)
        text = self.before.encode() + m.mtmd_default_marker()
        self.chunks = m.mtmd_input_chunks_init()
        self.text = m.mtmd_input_text(text, len(text), True, True)
        bitmaps = (m.mtmd_bitmap_p_ctypes * 1)(self.bitmap)
        if m.mtmd_tokenize(self.reader.vision, self.chunks, ctypes.byref(self.text), bitmaps, 1):
            raise RuntimeError("[evaluate] tokenizing failed")
        return self.chunks

    def __exit__(self, *_: object) -> None:
        self.reader.mtmd.mtmd_input_chunks_free(self.chunks)
        self.reader.mtmd.mtmd_bitmap_free(self.bitmap)
