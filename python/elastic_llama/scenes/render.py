"""Drawing a scene: soft background, one anti-aliased object per cell, everything jittered."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .layout import COLORS, Scene, stream

IMAGE_SIZE = 336  # pixels per side: 24 patches of 14, so that 2, 3 and 4 cells are whole patches
SUPERSAMPLE = 2  # objects are drawn this many times larger, then reduced

# Hue in degrees, saturation and value in [0, 1]; the jitter keeps neighbours apart.
_HSV = {
    "red": (358, 0.82, 0.86),
    "orange": (28, 0.90, 0.97),
    "yellow": (51, 0.85, 0.97),
    "green": (135, 0.68, 0.66),
    "blue": (216, 0.78, 0.86),
    "purple": (274, 0.62, 0.68),
    "pink": (333, 0.42, 0.98),
    "black": (220, 0.15, 0.15),
}
assert set(_HSV) == set(COLORS)

_RADIUS = {2: 37, 3: 32, 4: 27}  # mean radius of an object by grid size, pixels
_TURN = {"circle": 0, "square": 18, "triangle": 20, "star": 36, "heart": 20, "cross": 18}  # degrees


@dataclass(frozen=True)
class Placement:
    """Where and how one object is drawn: centre and radius in pixels, turn in degrees."""

    cell: int
    center: tuple[float, float]
    radius: float
    turn: float
    color: tuple[int, int, int]


def placements(scene: Scene) -> list[Placement]:
    """Drawing of every object of a scene, in cell order."""
    rng = stream(scene.seed, "render")
    side = IMAGE_SIZE / scene.grid
    out = []
    for i, cell in enumerate(scene.cells):
        # Eight numbers per cell, drawn for empty cells too: one cell never shifts the next.
        u = rng.random(8)
        if cell.is_empty:
            continue
        radius = _RADIUS[scene.grid] * (0.82 + 0.36 * u[0])
        slack = side / 2 - radius - 1
        x = side * (i % scene.grid + 0.5) + slack * 0.7 * (2 * u[1] - 1)
        y = side * (i // scene.grid + 0.5) + slack * 0.7 * (2 * u[2] - 1)
        turn = _TURN[cell.shape] * (2 * u[3] - 1)
        out.append(Placement(i, (x, y), radius, turn, _color(cell.color, u[4:7])))
    return out


def render(scene: Scene) -> Image.Image:
    """Draw a scene.

    Returns
    -------
    PIL.Image.Image
        RGB, IMAGE_SIZE x IMAGE_SIZE.
    """
    image = _background(stream(scene.seed, "background"))
    for p in placements(scene):
        _paste(image, scene.cells[p.cell].shape, p)
    return image


def outline(shape: str, turn: float, size: int) -> np.ndarray:
    """A shape alone, filling a square: [size, size], f32, 1 inside; `turn` in degrees."""
    big = 4 * size
    mask = Image.new("L", (big, big), 0)
    _fill(mask, shape, (big / 2, big / 2), big / 2.1, turn)
    return np.asarray(mask.reduce(4), dtype=np.float32) / 255


def _background(rng: np.random.Generator) -> Image.Image:
    """A pale gradient between two tints with fine grain."""
    top, bottom = (
        _rgb(rng.random() * 360, 0.10 * rng.random(), 0.93 + 0.07 * rng.random()) for _ in range(2)
    )
    angle = rng.random() * 2 * math.pi
    grain_seed = int(rng.integers(2**31))
    axis = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32)
    ramp = 0.5 + 0.7 * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])
    ramp = np.clip(ramp, 0, 1)[..., None]
    pixels = ramp * np.float32(bottom) + (1 - ramp) * np.float32(top)
    grain = np.random.Generator(np.random.PCG64(grain_seed))
    pixels += grain.integers(-4, 5, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def _color(name: str, u: np.ndarray) -> tuple[int, int, int]:
    """The named colour moved a little; `u` holds three numbers in [0, 1)."""
    hue, saturation, value = _HSV[name]
    move = [2 * float(x) - 1 for x in u]
    return _rgb(
        hue + 6 * move[0],
        min(1.0, saturation + 0.07 * move[1]),
        min(1.0, value + 0.06 * move[2]),
    )


def _paste(image: Image.Image, shape: str, p: Placement) -> None:
    """Draw one object as a reduced mask, so that its edges are smooth."""
    reach = math.ceil(p.radius) + 2
    left, top = round(p.center[0]) - reach, round(p.center[1]) - reach
    mask = Image.new("L", (2 * reach * SUPERSAMPLE,) * 2, 0)
    center = ((p.center[0] - left) * SUPERSAMPLE, (p.center[1] - top) * SUPERSAMPLE)
    _fill(mask, shape, center, p.radius * SUPERSAMPLE, p.turn)
    image.paste(p.color, (left, top), mask.reduce(SUPERSAMPLE))


def _fill(
    mask: Image.Image, shape: str, center: tuple[float, float], radius: float, turn: float
) -> None:
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    points = [
        (center[0] + radius * (x * cos - y * sin), center[1] + radius * (x * sin + y * cos))
        for x, y in _OUTLINES[shape]
    ]
    ImageDraw.Draw(mask).polygon(points, fill=255)


def _circle() -> list[tuple[float, float]]:
    turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(0.94 * math.cos(t), 0.94 * math.sin(t)) for t in turns]


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        r, t = (1.04, 0.46)[i % 2], math.pi * i / 5 - math.pi / 2
        points.append((r * math.cos(t), r * math.sin(t)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for t in np.linspace(0, 2 * math.pi, 60, endpoint=False):
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


def _cross() -> list[tuple[float, float]]:
    a, b = 0.32, 0.96
    return [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]


# Outlines in a unit circle around the origin, y downwards.
_OUTLINES = {
    "circle": _circle(),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0.0, -0.98), (0.95, 0.7), (-0.95, 0.7)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}
