"""Synthetic grid scenes: the pictures the embedded vision model can read.

A scene is a grid of 2x2 to 4x4 cells; each cell holds one coloured shape or nothing. Everything is
drawn from a seed, so a training set, a held-out set and a benchmark are three seed ranges and need
no download.

>>> from elastic_llama.scenes import make_scene, questions
>>> scene = make_scene("test", 0, grid=3)
>>> scene.caption().startswith("row 1:")
True
>>> scene.render().size
(336, 336)
"""

from __future__ import annotations

from .conversations import Turn, draw_conversation
from .dataset import write_dataset
from .layout import COLORS, EMPTY, GRIDS, SHAPES, SPLITS, Cell, Scene, make_scene
from .questions import CAPTION_PROMPT, KINDS, Question, caption, question, questions
from .render import IMAGE_SIZE, render
from .score import CaptionScore, exact, parse_caption, score_caption, token_accuracy

__all__ = [
    "CAPTION_PROMPT",
    "COLORS",
    "EMPTY",
    "GRIDS",
    "IMAGE_SIZE",
    "KINDS",
    "SHAPES",
    "SPLITS",
    "CaptionScore",
    "Cell",
    "Question",
    "Scene",
    "Turn",
    "caption",
    "draw_conversation",
    "exact",
    "make_scene",
    "parse_caption",
    "question",
    "questions",
    "render",
    "score_caption",
    "token_accuracy",
    "write_dataset",
]
