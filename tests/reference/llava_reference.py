"""Features of a small random LLaVA by ``transformers``: the reference for the vision patches.

    pip install torch transformers numpy
    python tests/reference/llava_reference.py            # writes tests/data/llava_tiny.npz

The weights are drawn here, by name, with NumPy, and rounded as an f16 mmproj stores them (matrices
f16, vectors f32), so that the file and the reference hold the same numbers. ``LlavaModel`` picks
the layer (-2), drops the class token and projects; nothing of that is written again here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "data" / "llava_tiny.npz"

#: Shape of the tower and of the projector; stored with the data.
SHAPE = {
    "image_size": 56, "patch_size": 14, "n_embd": 64, "n_head": 4,
    "n_ff": 128, "n_layer": 4, "n_embd_text": 128,
}  # fmt: skip
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def image() -> np.ndarray:
    """Smooth colours with some noise, uint8 ``(size, size, 3)``."""
    size = SHAPE["image_size"]
    y, x = np.mgrid[0:size, 0:size] / size
    base = np.stack([x, y, 0.5 + 0.5 * np.sin(6 * x + 4 * y)], axis=-1)
    noise = np.random.default_rng(1).uniform(-0.2, 0.2, base.shape)
    return np.clip(255 * (base + noise), 0, 255).astype(np.uint8)


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights for the names and shapes of the state dict, sorted by name."""
    rng = np.random.default_rng(0)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        value = rng.standard_normal(shape)
        if len(shape) > 1 and "position" not in name:
            value *= 1.2 / np.prod(shape[1:]) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        elif name.endswith("bias"):
            value *= 0.1
        # The class token and the positions stay as large as the patches: their order must matter.
        weights[name] = value.astype(np.float16 if len(shape) > 1 else np.float32)
    return weights


def reference() -> dict[str, np.ndarray]:
    """Weights (``weight/…``), image and features ``(n_patch, n_embd_text)``."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaModel

    s = SHAPE
    vision = CLIPVisionConfig(
        image_size=s["image_size"], patch_size=s["patch_size"], hidden_size=s["n_embd"],
        intermediate_size=s["n_ff"], num_hidden_layers=s["n_layer"],
        num_attention_heads=s["n_head"], hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=8, hidden_size=s["n_embd_text"], intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaModel(config).double().eval()
    parts = {"": model.vision_tower, "projector.": model.multi_modal_projector}
    # Some versions keep the tower one level deeper, under "vision_model.".
    names = {
        (prefix, key): prefix + key.replace("vision_model.", "")
        for prefix, module in parts.items()
        for key in module.state_dict()
        if not key.endswith("position_ids")
    }
    shapes = {
        short: tuple(parts[prefix].state_dict()[key].shape)
        for (prefix, key), short in names.items()
    }
    weights = draw(shapes)
    for prefix, module in parts.items():
        state = {
            key: torch.from_numpy(weights[short].astype(np.float64))
            for (p, key), short in names.items()
            if p == prefix
        }
        module.load_state_dict(state, strict=True)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    pixels = (torch.from_numpy(image()).double() / 255 - mean) / std
    with torch.no_grad():
        out = model.get_image_features(pixels.permute(2, 0, 1)[None])
    out = getattr(out, "pooler_output", out)  # older versions return the features themselves
    return {
        **{f"weight/{name}": value for name, value in weights.items()},
        **{f"shape/{name}": np.int64(value) for name, value in s.items()},
        "mean": np.float64(MEAN),
        "std": np.float64(STD),
        "image": image(),
        "features": out[0].reshape(-1, s["n_embd_text"]).numpy(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=DATA)
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, **reference())
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
