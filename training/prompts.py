"""Prompts as the chat handlers render them, split at the image: (before, after)."""

from __future__ import annotations

import numpy as np

_DEFAULT_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n"
)
_LLAVA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the human's questions. "
)
_TURN = "<|im_end|>\n<|im_start|>assistant\n"

# name -> (text before the image, text after it, share of training)
FORMATS = {
    "plain": ("<|im_start|>user\n", "{question}" + _TURN, 0.5),  # what this project uses
    "system": (_DEFAULT_SYSTEM + "<|im_start|>user\n", "{question}" + _TURN, 0.3),
    "newline": ("<|im_start|>user\n", "\n{question}" + _TURN, 0.1),
    "llava": (_LLAVA_SYSTEM + "\nUSER: ", "{question}\nASSISTANT: ", 0.1),
}


def draw_format(rng: np.random.Generator) -> str:
    """Name of a format, by its share of training."""
    names = list(FORMATS)
    return names[int(rng.choice(len(names), p=[FORMATS[n][2] for n in names]))]
