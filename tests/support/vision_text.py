"""Tiny random language models of the architectures that vision models are built on.

Real architecture, a working tokenizer with the image markers of a family, meaningless weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from tests.support.tiny_llama import TinyLlama, _add_tokenizer

Tensors = dict[str, np.ndarray]
N_EMBD = 128
N_EXPERT = 2
N_PER_LAYER = 32  # embedding of a token for each layer (Gemma 4 E2B, E4B)
#: Two layers; heads of 64.
SHAPE = TinyLlama(n_layer=2, n_embd=N_EMBD, n_head=2, n_head_kv=1, n_ff=128)
LAYERS = {"llama4": 4, "gemma4-e2b": 4}
#: Gemma 4's small models are told by their width: they read an image causally.
WIDTHS = {"gemma4-e2b": 1536}
N_HEAD_KV = {"lfm2": [0, 1], "cogvlm": SHAPE.n_head}
#: Architectures whose files tell image positions in two dimensions.
MROPE = ("qwen2vl", "qwen3vl", "qwen35", "glm4", "hunyuan_vl", "paddleocr")


def write_text_model(path: Path, arch: str, tokens: Sequence[str] = ()) -> Path:
    """Write a model of an architecture, or of a variant of one such as ``gemma4-e2b``.

    Parameters
    ----------
    tokens : sequence of str, at most 17
        Special tokens that the vocabulary has besides those of ChatML.
    """
    shape = replace(
        SHAPE,
        n_layer=LAYERS.get(arch, SHAPE.n_layer),
        n_embd=WIDTHS.get(arch, SHAPE.n_embd),
        head_dim=SHAPE.n_embd_head,
    )
    name = arch.partition("-")[0]
    writer = GGUFWriter(str(path), name)
    writer.add_name(f"tiny-random-{arch}")
    writer.add_file_type(0)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(N_HEAD_KV.get(arch, shape.n_head_kv))
    writer.add_rope_dimension_count(shape.n_embd_head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if name in MROPE:
        n_rot = shape.n_embd_head
        writer.add_rope_dimension_sections([n_rot // 8, 3 * n_rot // 16, 3 * n_rot // 16, 0])
    _add_parameters(writer, arch, shape)
    _add_tokenizer(writer, tokens)
    for key, value in _TENSORS.get(arch, lambda out, _: out)(shape.tensors(), shape).items():
        writer.add_tensor(key, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_parameters(writer: GGUFWriter, arch: str, shape: TinyLlama) -> None:
    """What only one architecture asks for."""
    name, head = arch.partition("-")[0], shape.n_embd_head
    if name == "qwen3vl":
        writer.add_num_deepstack_layers(1)
    if name == "granite":
        writer.add_logit_scale(1.0)
        writer.add_array("granite.deepstack_mapping", [-1, 1])
    if name == "lfm2":
        writer.add_shortconv_l_cache(3)
    if name == "qwen35":
        writer.add_full_attention_interval(2)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_state_size(head)
        writer.add_ssm_group_count(1)
        writer.add_ssm_time_step_rank(2)
        writer.add_ssm_inner_size(2 * head)
    if name in ("gemma3", "gemma4"):
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_sliding_window(32)
    if name == "gemma3":
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
    if name == "gemma4":
        is_window = [True, False] * (shape.n_layer // 2)
        writer.add_array("gemma4.attention.sliding_window_pattern", is_window)
        writer.add_uint32("gemma4.attention.key_length_swa", head)
        writer.add_uint32("gemma4.attention.value_length_swa", head)
        writer.add_uint32("gemma4.attention.shared_kv_layers", 2 if arch == "gemma4-e2b" else 0)
        n = N_PER_LAYER if arch == "gemma4-e2b" else 0
        writer.add_uint32("gemma4.embedding_length_per_layer_input", n)
    if arch in ("llama4", "gemma4-moe"):
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(shape.n_ff)
    if arch == "llama4":
        writer.add_interleave_moe_layer_step(2)


def _random(seed: int) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    return draw


def _biases(out: Tensors, shape: TinyLlama) -> Tensors:
    draw = _random(1)
    for i in range(shape.n_layer):
        for name in ("q", "k", "v"):
            n = len(out[f"blk.{i}.attn_{name}.weight"])
            out[f"blk.{i}.attn_{name}.bias"] = draw(n)
    return out


def _head_norms(out: Tensors, shape: TinyLlama) -> Tensors:
    draw = _random(2)
    for i in range(shape.n_layer):
        for name in ("q", "k"):
            out[f"blk.{i}.attn_{name}_norm.weight"] = 1 + draw(shape.n_embd_head)
    return out


def _post_norms(out: Tensors, shape: TinyLlama) -> Tensors:
    draw = _random(3)
    for i in range(shape.n_layer):
        for name in ("post_attention_norm", "post_ffw_norm"):
            out[f"blk.{i}.{name}.weight"] = 1 + draw(shape.n_embd)
    return out


def _gemma3(out: Tensors, shape: TinyLlama) -> Tensors:
    del out["output.weight"]
    return _head_norms(_post_norms(out, shape), shape)


def _gemma4(out: Tensors, shape: TinyLlama) -> Tensors:
    out = _gemma3(out, shape)
    out["rope_freqs.weight"] = np.ones(shape.n_embd_head // 2)
    for i in range(shape.n_layer):
        out[f"blk.{i}.layer_output_scale.weight"] = np.full(1, 0.5)
    return out


def _gemma4_e2b(out: Tensors, shape: TinyLlama) -> Tensors:
    """Embeddings for each layer; the later half of the layers shares the K and V of the first."""
    out, draw = _gemma4(out, shape), _random(4)
    n_vocab = len(out["token_embd.weight"])
    n_all = N_PER_LAYER * shape.n_layer
    out["per_layer_token_embd.weight"] = draw(n_vocab, n_all)
    out["per_layer_model_proj.weight"] = draw(n_all, shape.n_embd)
    out["per_layer_proj_norm.weight"] = 1 + draw(N_PER_LAYER)
    for i in range(shape.n_layer):
        out[f"blk.{i}.inp_gate.weight"] = draw(N_PER_LAYER, shape.n_embd)
        out[f"blk.{i}.proj.weight"] = draw(shape.n_embd, N_PER_LAYER)
        out[f"blk.{i}.post_norm.weight"] = 1 + draw(shape.n_embd)
        if i >= shape.n_layer // 2:
            for name in ("attn_k", "attn_v", "attn_k_norm"):
                del out[f"blk.{i}.{name}.weight"]
    return out


def _gemma4_moe(out: Tensors, shape: TinyLlama) -> Tensors:
    out, draw = _gemma4(out, shape), _random(5)
    for i in range(shape.n_layer):
        p = f"blk.{i}."
        out[p + "ffn_gate_inp.weight"] = draw(N_EXPERT, shape.n_embd)
        out[p + "ffn_gate_inp.scale"] = 1 + draw(shape.n_embd)
        for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
            out[f"{p}{name}.weight"] = 1 + draw(shape.n_embd)
        out[p + "ffn_gate_up_exps.weight"] = draw(N_EXPERT, 2 * shape.n_ff, shape.n_embd)
        out[p + "ffn_down_exps.weight"] = draw(N_EXPERT, shape.n_embd, shape.n_ff)
    return out


def _llama4(out: Tensors, shape: TinyLlama) -> Tensors:
    """Every second layer has experts and a shared one."""
    draw = _random(6)
    for i in range(1, shape.n_layer, 2):
        p = f"blk.{i}."
        out[p + "ffn_gate_inp.weight"] = draw(N_EXPERT, shape.n_embd)
        for name in ("gate", "up", "down"):
            dense = out.pop(f"{p}ffn_{name}.weight")
            out[f"{p}ffn_{name}_shexp.weight"] = dense
            out[f"{p}ffn_{name}_exps.weight"] = draw(N_EXPERT, *dense.shape)
    return out


def _phi2(out: Tensors, shape: TinyLlama) -> Tensors:
    out, draw = _biases(out, shape), _random(7)
    for i in range(shape.n_layer):
        p = f"blk.{i}."
        del out[p + "ffn_norm.weight"], out[p + "ffn_gate.weight"]
        for name in ("attn_norm", "attn_output", "ffn_up", "ffn_down"):
            out[f"{p}{name}.bias"] = draw(len(out[f"{p}{name}.weight"]))
    for name in ("output", "output_norm"):
        out[f"{name}.bias"] = draw(len(out[f"{name}.weight"]))
    return out


def _lfm2(out: Tensors, shape: TinyLlama) -> Tensors:
    """The first layer is a short convolution, the second one attention."""
    out, draw = _head_norms(out, shape), _random(8)
    for name in ("q", "k", "v", "output", "q_norm", "k_norm"):
        del out[f"blk.0.attn_{name}.weight"]
    out["blk.0.shortconv.conv.weight"] = draw(shape.n_embd, 3)
    out["blk.0.shortconv.in_proj.weight"] = draw(3 * shape.n_embd, shape.n_embd)
    out["blk.0.shortconv.out_proj.weight"] = draw(shape.n_embd, shape.n_embd)
    out["token_embd_norm.weight"] = out.pop("output_norm.weight")
    return out


def _qwen35(out: Tensors, shape: TinyLlama) -> Tensors:
    """The first layer is a gated delta net, the second one attention with a gate in its queries."""
    out, draw = _head_norms(out, shape), _random(10)
    n, head = shape.n_embd, shape.n_embd_head
    for name in ("q", "k", "v", "output", "q_norm", "k_norm"):
        del out[f"blk.0.attn_{name}.weight"]
    for i in range(shape.n_layer):
        out[f"blk.{i}.post_attention_norm.weight"] = out.pop(f"blk.{i}.ffn_norm.weight")
    out["blk.1.attn_q.weight"] = draw(2 * shape.n_head * head, n)
    out["blk.0.attn_qkv.weight"] = draw(4 * head, n)
    out["blk.0.attn_gate.weight"] = draw(2 * head, n)
    out["blk.0.ssm_conv1d.weight"] = draw(4 * head, 4)
    out["blk.0.ssm_dt.bias"] = draw(2)
    out["blk.0.ssm_a"] = -np.exp(draw(2))
    out["blk.0.ssm_beta.weight"] = draw(2, n)
    out["blk.0.ssm_alpha.weight"] = draw(2, n)
    out["blk.0.ssm_norm.weight"] = 1 + draw(head)
    out["blk.0.ssm_out.weight"] = draw(n, 2 * head)
    return out


def _exaone4(out: Tensors, shape: TinyLlama) -> Tensors:
    """Norms behind attention and feed-forward, none before."""
    out = _head_norms(_post_norms(out, shape), shape)
    return {k: v for k, v in out.items() if "attn_norm" not in k and "ffn_norm" not in k}


def _glm4(out: Tensors, shape: TinyLlama) -> Tensors:
    """Gate and up in one matrix."""
    out = _post_norms(_biases(out, shape), shape)
    for i in range(shape.n_layer):
        gate = out.pop(f"blk.{i}.ffn_gate.weight")
        out[f"blk.{i}.ffn_up.weight"] = np.concatenate([gate, out[f"blk.{i}.ffn_up.weight"]])
    return out


def _cogvlm(out: Tensors, shape: TinyLlama) -> Tensors:
    """Weights of its own for image tokens; as many KV heads as heads."""
    draw = _random(9)
    for i in range(shape.n_layer):
        p = f"blk.{i}."
        for name in ("q", "k", "v"):
            del out[f"{p}attn_{name}.weight"]
        out[p + "attn_qkv.weight"] = draw(3 * shape.n_embd, shape.n_embd)
        out[p + "vis_attn_qkv.weight"] = draw(3 * shape.n_embd, shape.n_embd)
        out[p + "vis_attn_output.weight"] = draw(shape.n_embd, shape.n_embd)
        for name in ("gate", "up", "down"):
            out[f"{p}vis_{name}.weight"] = draw(*out[f"{p}ffn_{name}.weight"].shape)
    return out


_TENSORS: dict[str, Callable[[Tensors, TinyLlama], Tensors]] = {
    "qwen2": _biases,
    "qwen2vl": _biases,
    "qwen3": _head_norms,
    "qwen3vl": _head_norms,
    "hunyuan_vl": _head_norms,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4-e2b": _gemma4_e2b,
    "gemma4-moe": _gemma4_moe,
    "llama4": _llama4,
    "phi2": _phi2,
    "lfm2": _lfm2,
    "glm4": _glm4,
    "qwen35": _qwen35,
    "exaone4": _exaone4,
    "cogvlm": _cogvlm,
}
