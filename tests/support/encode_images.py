"""Encode one image with several mmproj files through libmtmd, in a process of its own.

Which libraries answer is decided before ``llama_cpp`` is imported (``LLAMA_CPP_LIB_PATH`` and
``MTMD_CPP_LIB``), so a comparison of two builds needs a process each: :func:`encode` starts one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def encode(
    lib_dir: str | Path,
    text_model: Path,
    mmprojs: Sequence[Path],
    image: np.ndarray,
    work_dir: Path,
) -> dict[str, np.ndarray]:
    """Image features by file stem, as the libraries in ``lib_dir`` compute them.

    Parameters
    ----------
    lib_dir : path
        Directory that holds libllama and libmtmd.
    text_model : Path
        Language model with the width of the features.
    mmprojs : sequence of Path
        Files to encode with.
    image : ndarray of uint8, shape (height, width, 3)
    work_dir : Path
        For the files exchanged with the process.

    Returns
    -------
    dict of str to ndarray, each (n_token, n_embd_text)
    """
    source, target = work_dir / "image.npy", work_dir / f"features-{Path(lib_dir).name}.npz"
    np.save(source, image)
    env = dict(os.environ, LLAMA_CPP_LIB_PATH=str(lib_dir), MTMD_CPP_LIB=str(lib_dir))
    command = [sys.executable, __file__, text_model, source, target, *mmprojs]
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"encoding with {lib_dir} failed ({done.returncode}):\n{done.stderr}")
    with np.load(target) as data:
        return dict(data)


def _encode_one(model: int, mmproj: str, image: np.ndarray) -> np.ndarray:
    """Features ``(n_token, n_embd)`` of one file, with the libraries of this process."""
    from llama_cpp import llama_cpp, mtmd_cpp

    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.print_timings, params.n_threads, params.warmup = False, False, 1, False
    params.flash_attn_type = 0  # off: f32 attention, the same on every CPU
    ctx = mtmd_cpp.mtmd_init_from_file(mmproj.encode(), model, params)
    if not ctx:
        raise RuntimeError(f"could not load {mmproj}")
    height, width, _ = image.shape
    pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes())
    bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, pixels)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    try:
        text = mtmd_cpp.mtmd_input_text()
        text.text = mtmd_cpp.mtmd_default_marker()
        text.text_len = len(text.text)
        text.add_special = text.parse_special = True
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd_cpp.mtmd_tokenize(ctx, chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError("mtmd_tokenize failed")
        for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            if mtmd_cpp.mtmd_encode_chunk(ctx, chunk):
                raise RuntimeError("mtmd_encode_chunk failed")
            n_token = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            shape = (n_token, llama_cpp.llama_model_n_embd(model))
            return np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(ctx), shape).copy()
        raise RuntimeError("the prompt holds no image")
    finally:
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        mtmd_cpp.mtmd_free(ctx)


def main(text_model: str, image: str, target: str, *mmprojs: str) -> None:
    from llama_cpp import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(text_model.encode(), params)
    if not model:
        raise RuntimeError(f"could not load {text_model}")
    pixels = np.load(image)
    np.savez(target, **{Path(m).stem: _encode_one(model, m, pixels) for m in mmprojs})
    llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
