"""Write a trained tower as an mmproj GGUF that stock llama.cpp reads (projector type "mlp")."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor
from tower import Tower, TowerConfig


def tensors(tower: Tower) -> dict[str, Tensor]:
    """GGUF tensor names and values."""
    c = tower.config
    out = {
        "v.patch_embd.weight": tower.patch.weight.view(c.width, 3, c.patch_size, c.patch_size),
        "v.position_embd.weight": tower.position,
    }

    def linear(name: str, weight: Tensor, bias: Tensor) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = weight, bias

    linear("v.pre_ln", tower.pre_ln.weight, tower.pre_ln.bias)
    linear("v.post_ln", tower.post_ln.weight, tower.post_ln.bias)
    for i, block in enumerate(tower.blocks):
        p = f"v.blk.{i}."
        linear(p + "ln1", block.ln1.weight, block.ln1.bias)
        linear(p + "ln2", block.ln2.weight, block.ln2.bias)
        for name, w, b in zip("qkv", block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)):
            linear(p + f"attn_{name}", w, b)
        linear(p + "attn_out", block.out.weight, block.out.bias)
        linear(p + "ffn_up", block.up.weight, block.up.bias)
        linear(p + "ffn_down", block.down.weight, block.down.bias)
    linear("mm.0", tower.mm0.weight, tower.mm0.bias)
    linear("mm.2", tower.mm2.weight, tower.mm2.bias)
    return out


def export(tower: Tower, path: Path) -> None:
    """Write the file; matrices as f16, vectors as f32."""
    c: TowerConfig = tower.config
    writer = GGUFWriter(str(path), "clip")
    writer.add_type("mmproj")
    writer.add_name("Elastic Scenes mmproj for SmolLM2-135M-Instruct")
    writer.add_description(
        "Vision tower and projector that read synthetic grid scenes, trained in "
        "front of the frozen SmolLM2-135M-Instruct (Q4_1)"
    )
    writer.add_license("mit")
    writer.add_size_label("2.9M")
    writer.add_file_type(1)  # mostly f16
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)  # neither flag: quick GELU
    v = "clip.vision."
    writer.add_uint32(v + "image_size", c.image_size)
    writer.add_uint32(v + "patch_size", c.patch_size)
    writer.add_uint32(v + "embedding_length", c.width)
    writer.add_uint32(v + "feed_forward_length", c.n_ff)
    writer.add_uint32(v + "block_count", c.n_layer)
    writer.add_uint32(v + "projection_dim", c.out_width)
    writer.add_uint32(v + "attention.head_count", c.n_head)
    writer.add_float32(v + "attention.layer_norm_epsilon", c.eps)
    writer.add_array(v + "image_mean", [c.mean] * 3)
    writer.add_array(v + "image_std", [c.std] * 3)
    # Without this key llama.cpp skips the last layer. Its reader wants 32-bit signed integers.
    writer.add_array(v + "feature_layer", [c.n_layer])
    for name, value in tensors(tower).items():
        kind = np.float16 if value.dim() > 1 else np.float32
        writer.add_tensor(name, value.detach().float().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def load_tower(path: Path) -> Tower:
    """Tower of a training checkpoint (.pt) or of an exported file (.gguf, values as exported)."""
    tower = Tower()
    if path.suffix == ".gguf":
        stored = {t.name: t.data for t in GGUFReader(str(path)).tensors}
        for name, target in tensors(tower).items():  # views: filling them fills the tower
            target.copy_(torch.from_numpy(stored[name].astype(np.float32)).view(target.shape))
    else:
        tower.load_state_dict(torch.load(path)["tower"])
    return tower.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    export(load_tower(args.checkpoint), args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
