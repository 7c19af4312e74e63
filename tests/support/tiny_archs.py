"""Tiny random models of other architectures, for what the elastic cache does not take.

Like `tiny_llama`: real architecture, working tokenizer, meaningless weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, PoolingType

from tests.support.tiny_llama import TinyLlama, _add_tokenizer

#: What is special about the memory, or the positions, of each.
ABOUT = {
    "cohere2": "sliding window",
    "refact": "ALiBi",
    "qwen2vl": "M-RoPE",
    "qwen3vl": "M-RoPE; image embeddings wider than the model (deepstack)",
    "mamba": "recurrent",
    "llada": "no memory, writes a text as a whole",
    "eurobert": "no memory, makes embeddings",
}
N_DEEPSTACK = 1  # fewer than layers: the last one only reads what is asked for
_SHAPE = TinyLlama(n_layer=2, n_embd=128, n_head=2, n_head_kv=1, n_ff=128)
_N_INNER, _N_CONV, _N_STATE, _N_DT = 2 * _SHAPE.n_embd, 4, 8, 8


def write_tiny(path: Path, arch: str) -> Path:
    """Write a model of an architecture of `ABOUT` and return its path."""
    if arch == "cohere2":
        shape = {**_SHAPE.__dict__, "arch": arch}
        return TinyLlama(**shape).write(path)
    writer = GGUFWriter(str(path), arch)
    writer.add_name(f"tiny-random-{arch}")
    writer.add_file_type(0)
    writer.add_context_length(_SHAPE.n_ctx_train)
    writer.add_embedding_length(_SHAPE.n_embd)
    writer.add_block_count(_SHAPE.n_layer)
    writer.add_feed_forward_length(_SHAPE.n_ff)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(_N_CONV)
        writer.add_ssm_inner_size(_N_INNER)
        writer.add_ssm_state_size(_N_STATE)
        writer.add_ssm_time_step_rank(_N_DT)
    else:
        _add_attention(writer, arch)
    _add_tokenizer(writer)
    for name, value in _tensors(arch).items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_attention(writer: GGUFWriter, arch: str) -> None:
    n_rot = _SHAPE.n_embd_head
    writer.add_head_count(_SHAPE.n_head)
    writer.add_head_count_kv(_SHAPE.n_head_kv)
    writer.add_rope_dimension_count(n_rot)
    writer.add_rope_freq_base(10000.0)
    if arch in ("qwen2vl", "qwen3vl"):
        writer.add_rope_dimension_sections([n_rot // 8, 3 * n_rot // 16, 3 * n_rot // 16, 0])
    if arch == "qwen3vl":
        writer.add_num_deepstack_layers(N_DEEPSTACK)
    if arch == "eurobert":
        writer.add_causal_attention(False)
        writer.add_pooling_type(PoolingType.MEAN)


def _tensors(arch: str) -> dict[str, np.ndarray]:
    out = _SHAPE.tensors()
    if arch == "mamba":
        return _mamba(out)
    if arch == "eurobert":
        del out["output.weight"]
    if arch == "qwen3vl":
        for i in range(_SHAPE.n_layer):
            for name in ("q", "k"):
                out[f"blk.{i}.attn_{name}_norm.weight"] = np.ones(_SHAPE.n_embd_head)
    return out


def _mamba(llama: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n_embd = _SHAPE.n_embd

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        return rng.standard_normal((n_out, n_in)) / n_in**0.5

    out = {name: value for name, value in llama.items() if not name.startswith("blk.")}
    for i in range(_SHAPE.n_layer):
        p = f"blk.{i}."
        out[p + "attn_norm.weight"] = llama[p + "attn_norm.weight"]
        out[p + "ssm_in.weight"] = matrix(2 * _N_INNER, n_embd)
        out[p + "ssm_conv1d.weight"] = matrix(_N_INNER, _N_CONV)
        out[p + "ssm_conv1d.bias"] = np.zeros(_N_INNER)
        out[p + "ssm_x.weight"] = matrix(_N_DT + 2 * _N_STATE, _N_INNER)
        out[p + "ssm_dt.weight"] = matrix(_N_INNER, _N_DT)
        out[p + "ssm_dt.bias"] = np.zeros(_N_INNER)
        out[p + "ssm_a"] = -np.exp(rng.standard_normal((_N_INNER, _N_STATE)))
        out[p + "ssm_d"] = np.ones(_N_INNER)
        out[p + "ssm_out.weight"] = matrix(n_embd, _N_INNER)
    return out
