"""Write a language model of LLaVA-1.5-7B's shape with random Q4_0 weights.

32 layers, width 4096, 32 heads (no grouped queries), feed-forward 11008, the 32000 tokens of
Llama's vocabulary, which comes out of the pinned llama.cpp archive. Speed and memory do not depend
on the values of the weights; quality is never measured on this file. About 25 s and 3.6 GB for all
layers.

Usage: python benchmarks/shaped_model.py OUT.gguf [--layers 4]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

import prepare_llama_cpp as source  # noqa: E402  (a script beside the CMake files that run it)

N_EMBD, N_HEAD, N_FF, N_VOCAB = 4096, 32, 11008, 32000
N_CTX = 32768  # more than the 4096 of the real model, so that long scenarios are not refused
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: an f16 scale and 32 nibbles


def vocabulary() -> GGUFReader:
    """Llama's tokenizer from the archive that the package is built from."""
    pin = source.read_pin(ROOT / "patches" / "llama-cpp.pin")
    tree = source.prepare(pin, [], None, source.cache_dir())
    return GGUFReader(str(tree / "models" / "ggml-vocab-llama-spm.gguf"))


def copy_tokenizer(reader: GGUFReader, writer: GGUFWriter) -> None:
    def value(name: str) -> Any:
        field = reader.fields[f"tokenizer.ggml.{name}"]
        return [field.parts[i] for i in field.data]

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([bytes(token) for token in value("tokens")])
    writer.add_token_scores([float(x[0]) for x in value("scores")])
    writer.add_token_types([int(x[0]) for x in value("token_type")])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def random_q4_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Blocks [rows, bytes] whose values have about the deviation that keeps activations near 1."""
    blocks = rng.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    scale = np.float16(1.0 / (4.6 * np.sqrt(columns)))  # nibbles deviate by 4.6
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, n_layer: int) -> None:
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("llava-1.5-7b-shaped, random weights")
    writer.add_file_type(2)  # mostly Q4_0
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    copy_tokenizer(vocabulary(), writer)

    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = random_q4_0(rng, rows, columns)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))

    matrix("token_embd", N_VOCAB, N_EMBD)
    for il in range(n_layer):
        norm(f"blk.{il}.attn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{il}.{part}", N_EMBD, N_EMBD)
        norm(f"blk.{il}.ffn_norm")
        matrix(f"blk.{il}.ffn_gate", N_FF, N_EMBD)
        matrix(f"blk.{il}.ffn_up", N_FF, N_EMBD)
        matrix(f"blk.{il}.ffn_down", N_EMBD, N_FF)
    norm("output_norm")
    matrix("output", N_VOCAB, N_EMBD)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    write(args.out, args.layers)
    print(f"{args.out}: {args.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
