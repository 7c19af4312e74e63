"""Write a vision tower for a model of `shaped_model.py`: LLaVA's 576 patches, random weights.

Its two layers are narrow, so that it takes next to no time: what is measured with it is the
language model, and a share of the first question's time is one that a real tower makes smaller.

Usage: python benchmarks/shaped_tower.py OUT.gguf [--width 4096]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.mmproj import Layout, Tower, write_mmproj

SIZE, PATCH, N_EMBD, N_FF, N_LAYER = 336, 14, 64, 128, 2


def random_tower(width: int) -> Tower:
    """A tower whose projector makes embeddings of this width."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int) -> None:
        scale = np.float32(np.prod(shape[1:]) ** -0.5)
        weights[f"{name}.weight"] = rng.standard_normal(shape, np.float32) * scale

    def linear(name: str, n_out: int, n_in: int) -> None:
        matrix(name, n_out, n_in)
        weights[f"{name}.bias"] = np.zeros(n_out, np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(N_EMBD, np.float32)
        weights[f"{name}.bias"] = np.zeros(N_EMBD, np.float32)

    matrix("embeddings.patch_embedding", N_EMBD, 3, PATCH, PATCH)
    matrix("embeddings.position_embedding", (SIZE // PATCH) ** 2 + 1, N_EMBD)
    weights["embeddings.class_embedding"] = rng.standard_normal(N_EMBD, np.float32)
    norm("pre_layrnorm")
    for i in range(N_LAYER):
        layer = f"encoder.layers.{i}."
        for name in "qkv":
            linear(f"{layer}self_attn.{name}_proj", N_EMBD, N_EMBD)
        linear(f"{layer}self_attn.out_proj", N_EMBD, N_EMBD)
        norm(f"{layer}layer_norm1")
        norm(f"{layer}layer_norm2")
        linear(f"{layer}mlp.fc1", N_FF, N_EMBD)
        linear(f"{layer}mlp.fc2", N_EMBD, N_FF)
    linear("projector.linear_1", width, N_EMBD)
    linear("projector.linear_2", width, width)
    shape = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "n_embd": N_EMBD,
        "n_head": 4,
        "n_ff": N_FF,
        "n_layer": N_LAYER,
        "n_embd_text": width,
    }
    half, nothing = np.full(3, 0.5, np.float32), np.empty(0)
    return Tower(weights, shape, half, half, nothing, nothing)


def write(path: Path, width: int = 4096) -> Path:
    return write_mmproj(path, random_tower(width), Layout(n_block=N_LAYER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=4096)
    args = parser.parse_args()
    write(args.out, args.width)


if __name__ == "__main__":
    main()
