"""Features and answers of small random vision models by ``transformers``: the reference.

    pip install torch transformers sentencepiece gguf pillow
    python tests/reference/vlm_reference.py LLAMA_CPP   # writes tests/data/vlm_*.npz

``LLAMA_CPP`` is the tree that `cmake/prepare_llama_cpp.py` prints: its converter makes both GGUF
files. A weight is a small whole number times a power of two. So it is the same number in every
type, the files hold exactly what the reference computes with, and they compress to a quarter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "data"
BEFORE, AFTER, ANSWER = "look at", "what is in the second row ?", "red and blue"
TEMPLATE = BEFORE + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
N_VOCAB = 352
N_PIECE = 330  # of them made by SentencePiece
MARKERS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
GEMMA_MARKERS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
TEXT = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def image(width: int, height: int) -> np.ndarray:
    """Colours in few steps with some noise, uint8 ``(height, width, 3)``; it compresses well."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    base = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x + 4 * y)], axis=-1)
    noise = np.random.default_rng(1).uniform(-0.2, 0.2, base.shape)
    return np.clip(32 * np.rint(8 * (base + noise)), 0, 255).astype(np.uint8)


def fill(model: Any) -> None:
    """Draw every weight by its name's place in the alphabet, so that outputs have unit size."""
    import torch

    rng = np.random.default_rng(0)
    for name, value in sorted(model.named_parameters()):
        whole = rng.integers(-4, 5, tuple(value.shape))
        if "embed_tokens" in name or "position" in name or "pos_embed" in name:
            number = whole / 4.0
        elif value.ndim > 1:
            n_in = value[0].numel()
            number = whole * 2.0 ** np.round(np.log2(0.45 / n_in**0.5))
        else:
            number = whole / 32.0
            is_gemma = "gemma" in type(model).__name__.lower() and "vision_tower" not in name
            if "norm" in name and name.endswith("weight") and not is_gemma:
                number = number + 1
        with torch.no_grad():
            value.copy_(torch.from_numpy(np.asarray(number, np.float64)))


def tokenizer(folder: Path, markers: tuple[str, ...], dummy_prefix: bool) -> Any:
    """A tiny SentencePiece model with bytes, and its configuration beside it."""
    import sentencepiece as spm

    text = [BEFORE, AFTER, ANSWER, "a green circle stands above the small yellow square"]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 4), model_prefix=str(folder / "tokenizer"),
        vocab_size=N_PIECE, model_type="bpe", byte_fallback=True, bos_id=1, eos_id=2, unk_id=0,
        add_dummy_prefix=dummy_prefix, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    added = {
        str(N_PIECE + i): {"content": marker, "special": True} for i, marker in enumerate(markers)
    }
    config = {
        "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "bos_token": "<s>",
        "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def qwen25vl() -> tuple[Any, Any, np.ndarray]:
    """Windows of 4 x 4 tokens in two of three vision layers; the image has 6 x 5."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "patch_size": 14, "window_size": 112, "out_hidden_size": 64,
            "fullatt_block_indexes": [2],
        },
        vision_start_token_id=N_PIECE, image_token_id=N_PIECE + 1, vision_end_token_id=N_PIECE + 2,
        video_token_id=N_PIECE + 3,
    )  # fmt: skip
    processor = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, min_pixels=784, max_pixels=10**6
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor, image(168, 140)


def qwen3vl() -> tuple[Any, Any, np.ndarray]:
    """Learned positions for 6 x 6 patches are stretched over 12 x 10; deepstack of one layer."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 32, "num_hidden_layers": 3, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "patch_size": 16, "out_hidden_size": 64, "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=N_PIECE, image_token_id=N_PIECE + 1, vision_end_token_id=N_PIECE + 2,
        video_token_id=N_PIECE + 3,
    )  # fmt: skip
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, min_pixels=1024, max_pixels=10**6,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), processor, image(192, 160)


def gemma3() -> tuple[Any, Any, np.ndarray]:
    """Five layers with a window of 24, one without; 8 x 8 patches become 16 tokens."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    text = {**TEXT, "head_dim": 32, "num_hidden_layers": 6, "query_pre_attn_scalar": 32}
    config = Gemma3Config(
        text_config={
            **text, "sliding_window": 24,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
            },
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 112, "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=16, boi_token_index=N_PIECE, image_token_index=N_PIECE + 1,
        eoi_token_index=N_PIECE + 2,
    )  # fmt: skip
    processor = Gemma3ImageProcessorPil(
        size={"height": 112, "width": 112}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.image_seq_length = 16
    return Gemma3ForConditionalGeneration(config), processor, image(112, 112)


MODELS = {"qwen2.5vl": qwen25vl, "qwen3vl": qwen3vl, "gemma3": gemma3}


def reference(name: str, tree: Path) -> dict[str, np.ndarray]:
    """Files, image, tokens, features ``(n_token, n_float)``, logits ``(n_answer + 1, n_vocab)``."""
    import torch
    from PIL import Image

    torch.manual_seed(0)
    model, processor, pixels = MODELS[name]()
    fill(model)
    model = model.double().eval()
    is_gemma = name.startswith("gemma")
    markers = GEMMA_MARKERS if is_gemma else (MARKERS[0], MARKERS[1], MARKERS[2], MARKERS[3])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"tiny-random-{name}"  # the name that the files will have
        folder.mkdir()
        pieces = tokenizer(folder, markers, dummy_prefix=not is_gemma)
        files = convert(model, processor, folder, tree)
    inputs = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    inputs.pop("num_crops", None)
    if "image_grid_thw" in inputs:
        n_image = int(inputs["image_grid_thw"].prod()) // 4
    else:
        n_image = 16
    before, after, answer = (pieces.encode(text) for text in (BEFORE, AFTER, ANSWER))
    prompt = [1, *before, N_PIECE, *[N_PIECE + 1] * n_image, N_PIECE + 2, *after]
    ids = torch.tensor([prompt + answer])
    kinds = (ids == N_PIECE + 1).long()
    kinds_name = "token_type_ids" if is_gemma else "mm_token_type_ids"
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs, **{kinds_name: kinds}).logits[0]
        features = model.model.get_image_features(**inputs)
    return {
        **files,
        "image": pixels,
        "before": np.array([1, *before]),
        "after": np.array(after),
        "answer": np.array(answer),
        "features": side_by_side(features).numpy().astype(np.float32),
        "logits": logits[len(prompt) - 1 :].numpy().astype(np.float32),
    }


def side_by_side(features: Any) -> Any:
    """One row a token: what the projector makes, and what deepstack adds."""
    import torch

    main = getattr(features, "pooler_output", features)
    main = main[0] if isinstance(main, (tuple, list)) else main
    main = main.reshape(-1, main.shape[-1])
    deep = getattr(features, "deepstack_features", None) or []
    deep = [layer[0] if isinstance(layer, (tuple, list)) else layer for layer in deep]
    return torch.cat([main, *deep], dim=-1)


def convert(model: Any, processor: Any, folder: Path, tree: Path) -> dict[str, np.ndarray]:
    """Both GGUF files as bytes, made by llama.cpp's converter of what transformers saved."""
    model.float().save_pretrained(folder)
    model.double()
    use_published_names(folder / "model.safetensors")
    processor.save_pretrained(folder)
    out = {}
    for part, options in (("text", []), ("mmproj", ["--mmproj"])):
        path = folder / f"{part}.gguf"
        script = tree / "convert_hf_to_gguf.py"
        command = [sys.executable, script, folder, "--outtype", "f16", "--outfile", path, *options]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        made = [path] if path.is_file() else sorted(folder.glob("*mmproj*.gguf"))
        if done.returncode or not made:
            raise RuntimeError(done.stderr)
        out[part] = np.frombuffer(made[0].read_bytes(), np.uint8)
    return out


def use_published_names(path: Path) -> None:
    """Gemma 3's files have one more word in the names of the vision tower."""
    from safetensors.torch import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {
        name if new in name else name.replace(old, new): value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    args = parser.parse_args(argv)
    for name in args.names:
        path = DATA / f"vlm_{name}.npz"
        np.savez_compressed(path, **reference(name, args.llama_cpp))
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
