"""A tiny random Llama as GGUF: real architecture, working tokenizer, meaningless weights.

For tests of structure (graphs, caches, shapes, round trips), never of quality. Written in some
hundredths of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

#: Written into the file, so chat handlers that read it work.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPACE = "\u2581"  # how SentencePiece spells a space
_MERGES = f"th he in er an re on at {_SPACE}t {_SPACE}a {_SPACE}the".split()
_N_VOCAB = 384


@dataclass(frozen=True)
class TinyLlama:
    """Shape of the model.

    Parameters
    ----------
    n_layer, n_embd, n_head, n_head_kv, n_ff : int
        As in llama.cpp; ``n_head_kv < n_head`` gives grouped queries.
    head_dim : int, optional
        Size of a head, ``n_embd // n_head`` by default. RoPE turns all of it.
    n_ctx_train : int, default=4096
        Context length the file announces.
    dtype : {"f32", "f16"}, default="f32"
        Type of the matrices; norms are always f32.
    seed : int, default=0
        Same seed, same file.
    arch : {"llama", "cohere2"}, default="llama"
        Cohere2 alternates sliding-window layers: a memory that is no plain KV cache.
    """

    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 256
    head_dim: int | None = None
    n_ctx_train: int = 4096
    dtype: str = "f32"
    seed: int = 0
    arch: str = "llama"

    @property
    def n_embd_head(self) -> int:
        """Size of a head."""
        return self.head_dim if self.head_dim is not None else self.n_embd // self.n_head

    def write(self, path: str | Path) -> Path:
        """Write the GGUF and return its path."""
        if self.dtype not in ("f32", "f16"):
            raise ValueError(f"dtype must be 'f32' or 'f16', not {self.dtype!r}")
        if self.n_head % self.n_head_kv:
            raise ValueError("n_head must be a multiple of n_head_kv")
        path = Path(path)
        writer = GGUFWriter(str(path), self.arch)
        if self.arch == "cohere2":
            writer.add_layer_norm_eps(1e-5)
            writer.add_sliding_window(64)
            writer.add_logit_scale(1.0)
        writer.add_name("tiny-random-llama")
        writer.add_file_type(0 if self.dtype == "f32" else 1)
        writer.add_context_length(self.n_ctx_train)
        writer.add_embedding_length(self.n_embd)
        writer.add_block_count(self.n_layer)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_head)
        writer.add_head_count_kv(self.n_head_kv)
        writer.add_key_length(self.n_embd_head)
        writer.add_value_length(self.n_embd_head)
        writer.add_rope_dimension_count(self.n_embd_head)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(_N_VOCAB)
        _add_tokenizer(writer)
        matrix = np.dtype(np.float32 if self.dtype == "f32" else np.float16)
        for name, value in self.tensors().items():
            writer.add_tensor(name, value.astype(matrix if value.ndim == 2 else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def tensors(self) -> dict[str, np.ndarray]:
        """Weights by GGUF name, f32; matrices are ``[n_out, n_in]``."""
        rng = np.random.default_rng(self.seed)
        n_q, n_kv = self.n_head * self.n_embd_head, self.n_head_kv * self.n_embd_head

        def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
            return rng.standard_normal((n_out, n_in), np.float32) * np.float32(gain / n_in**0.5)

        def norm() -> np.ndarray:
            return 1 + 0.1 * rng.standard_normal(self.n_embd, np.float32)

        out = {"token_embd.weight": rng.standard_normal((_N_VOCAB, self.n_embd), np.float32)}
        for i in range(self.n_layer):
            p = f"blk.{i}."
            out[p + "attn_norm.weight"] = norm()
            # Queries and keys above unit size: attention that is neither flat nor one-hot.
            out[p + "attn_q.weight"] = matrix(n_q, self.n_embd, 1.3)
            out[p + "attn_k.weight"] = matrix(n_kv, self.n_embd, 1.3)
            out[p + "attn_v.weight"] = matrix(n_kv, self.n_embd)
            out[p + "attn_output.weight"] = matrix(self.n_embd, n_q)
            out[p + "ffn_norm.weight"] = norm()
            out[p + "ffn_gate.weight"] = matrix(self.n_ff, self.n_embd)
            out[p + "ffn_up.weight"] = matrix(self.n_ff, self.n_embd)
            out[p + "ffn_down.weight"] = matrix(self.n_embd, self.n_ff)
        out["output_norm.weight"] = norm()
        out["output.weight"] = matrix(_N_VOCAB, self.n_embd, 2.0)
        if self.arch == "cohere2":  # one norm per block, tied output
            out = {k: v for k, v in out.items() if "ffn_norm" not in k and k != "output.weight"}
        return out


def write_tiny_llama(path: str | Path, **shape: object) -> Path:
    """Write a :class:`TinyLlama` of the given shape (its fields as keywords)."""
    return TinyLlama(**shape).write(path)


def _add_tokenizer(writer: GGUFWriter, more: Sequence[str] = ()) -> None:
    """SentencePiece vocabulary of bytes, printable ASCII and a few merges: any text tokenizes.

    ``more`` are special tokens, such as image markers.
    """
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    characters = [_SPACE] + [chr(c) for c in range(0x21, 0x7F)]
    pieces = characters + list(_MERGES)
    # Unused rows keep the vocabulary a round number.
    n_spare = _N_VOCAB - len(special) - 256 - len(pieces) - len(more)
    if n_spare < 0:
        raise ValueError(f"{len(more)} special tokens are {-n_spare} too many")
    spare = [f"<spare{i}>" for i in range(n_spare)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        special + [f"<0x{b:02X}>" for b in range(256)] + pieces + spare + list(more)
    )
    # SentencePiece joins the pair with the highest score first.
    scores = [-float(i) for i in range(len(pieces))]
    writer.add_token_scores([0.0] * (len(special) + 256) + scores + [0.0] * (n_spare + len(more)))
    writer.add_token_types(
        [TokenType.UNKNOWN]
        + [TokenType.CONTROL] * (len(special) - 1)
        + [TokenType.BYTE] * 256
        + [TokenType.NORMAL] * len(pieces)
        + [TokenType.UNUSED] * n_spare
        + [TokenType.CONTROL] * len(more)
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(special.index("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
