"""A picture of what a compression kept: a heat map over each image, and the prompt's tokens."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .errors import ConfigError, message

if TYPE_CHECKING:
    from .show import Kept, Panel

__all__ = ["draw", "matplotlib_figure"]

# inches
_WIDTH = 11.0
_MARGIN = 0.4
_INNER = _WIDTH - 2 * _MARGIN
_HEAD = 1.0
_GAP = 0.25
_CAPTION = 0.55  # above a panel
_STRIP = 0.5
_LINE = 0.33
_COLUMN = 0.0795  # a character of the tokens' font

_FONT_SIZE = 9.5  # points
_MAX_LABEL = 60  # characters
_DPI = 140
_MAX_PIXELS = 30_000  # height; long prompts get fewer dots per inch
_COLORS = "viridis"
_INK = "#1f2430"
_FAINT = "#6b7280"
# For what matplotlib's own font lacks; those that are installed are used.
_FONTS = ("Noto Sans Mono CJK SC", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei")


@dataclass(frozen=True)
class _Box:
    """A token, or all cells of an image, among the text."""

    label: str
    share: float
    is_image: bool = False

    @property
    def n_columns(self) -> int:
        return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in self.label)


_Line = list[tuple[int, _Box]]  # column and box


class _Page:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, height: float) -> None:
        dpi = min(_DPI, _MAX_PIXELS / height)
        self.height = height
        self.figure = matplotlib_figure()(figsize=(_WIDTH, height), dpi=dpi, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        box = (x / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height)
        return self.figure.add_axes(box)

    def text(self, x: float, y: float, string: str, **style: Any) -> None:
        """Text on the baseline y; "$" is no formula in it."""
        style = {"color": _INK, "fontsize": 10, "va": "baseline", **style}
        self.figure.text(x / _WIDTH, 1 - y / self.height, string, parse_math=False, **style)


def matplotlib_figure() -> Any:
    """The class `matplotlib.figure.Figure`.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(
            message("show", "matplotlib is missing", do='pip install "elastic-llama[eval]"')
        ) from e
    return Figure


def draw(kept: Kept) -> Any:
    """Draw what was kept.

    Parameters
    ----------
    kept : Kept
        From `show.look`.

    Returns
    -------
    matplotlib.figure.Figure
        11 inches wide; ``savefig`` writes it. Axes with the names of the panels as labels hold the
        heat maps; the last image of each is the share of each patch [rows, columns], 0 to 1.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    matplotlib_figure()  # first: a clear error where it is missing
    per_row = 1 if len(kept.panels) == 1 else 2
    side = (_INNER - (2 * per_row - 1) * _GAP) / (2 * per_row)
    has_image = any(panel.image is not None for panel in kept.panels)
    row_height = _CAPTION + (side if has_image else _STRIP) + _GAP
    y_text = _HEAD + math.ceil(len(kept.panels) / per_row) * row_height
    fonts = _fonts()
    lines = list(_wrap(_boxes(kept, fonts), int(_INNER / _COLUMN)))

    page = _Page(y_text + 0.35 + len(lines) * _LINE + _MARGIN)
    page.text(_MARGIN, 0.48, kept.title, fontsize=15, weight="bold")
    page.text(_MARGIN, 0.76, kept.subtitle, color=_FAINT)
    page.text(_MARGIN, 0.94, kept.bytes_note, color=_FAINT)
    _draw_scale(page)
    for i, panel in enumerate(kept.panels):
        row, column = divmod(i, per_row)
        x = _MARGIN + column * 2 * (side + _GAP)
        _draw_panel(page, panel, kept.share[panel.cells], x, _HEAD + row * row_height, side)
    _draw_text(page, kept, lines, y_text, fonts)
    return page.figure


def _draw_scale(page: _Page) -> None:
    axes = page.axes(_WIDTH - _MARGIN - 2.4, 0.36, 2.4, 0.15)
    axes.set_label("scale")
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=_COLORS, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nnone", "0.25", "0.5", "0.75", "1\nall"])
    axes.tick_params(length=2, labelsize=8, colors=_FAINT)
    _frame(axes)


# -- images


def _draw_panel(
    page: _Page, panel: Panel, share: np.ndarray, x: float, y: float, side: float
) -> None:
    """The image beside its heat map, [x, y] the upper left corner, under two lines of caption."""
    rows, columns = panel.shape
    page.text(x, y + 0.2, f"{panel.name}: {len(share)} cells", weight="bold")
    page.text(x, y + 0.4, panel.note or f"{rows} × {columns} patches", fontsize=9, color=_FAINT)
    x_map, y = x + side + _GAP, y + _CAPTION
    width, height = (side * n / max(rows, columns) for n in (columns, rows))
    page.text(x_map, y - _CAPTION + 0.2, f"kept: {share.mean():.2f} on average", weight="bold")
    spread = f"{share.min():.2f} to {share.max():.2f}, {np.count_nonzero(share == 0)} kept nowhere"
    page.text(x_map, y - _CAPTION + 0.4, spread, fontsize=9, color=_FAINT)

    if panel.image is not None:
        shape = (width, height) if rows > 1 else (side, side)
        plain = page.axes(x, y, *shape)
        aspect = "auto" if rows > 1 else "equal"
        plain.imshow(panel.image, interpolation="lanczos", aspect=aspect)
        _frame(plain, ticks=False)
    if rows == 1:
        heat = page.axes(x_map, y, side, _STRIP)
    else:
        heat = page.axes(x_map, y, width, height)
    heat.set_label(panel.name)
    grid = share.reshape(rows, columns)
    extent = (0, columns, rows, 0)
    if rows > 1 and panel.image is not None:
        heat.imshow(_outlines(panel.image, grid), extent=extent, interpolation="lanczos", zorder=2)
    style = {"cmap": _COLORS, "vmin": 0, "vmax": 1}
    style["interpolation"] = "nearest" if rows > 1 else "auto"  # more cells than pixels
    heat.imshow(grid, extent=extent, aspect="auto", zorder=1, **style)
    _frame(heat, ticks=False)


def _outlines(image: Image.Image, grid: np.ndarray) -> np.ndarray:
    """Lines where the image changes, RGBA u8 [height, width, 4], black on bright patches.

    Between the lines the heat map keeps the colours of the scale.
    """
    scale = max(1.0, max(image.size) / 336)
    grey = ImageOps.grayscale(image).filter(ImageFilter.GaussianBlur(1.2 * scale))
    steep = np.hypot(*np.gradient(np.asarray(grey, np.float32))) * scale
    alpha = np.clip(steep / max(float(np.quantile(steep, 0.98)), 6.0), 0, 1) ** 1.5
    y, x = (np.arange(n) * m // n for n, m in zip(alpha.shape, grid.shape))
    out = np.where(grid[y][:, x, None] > 0.7, 0, 255).repeat(4, axis=2).astype(np.uint8)
    out[..., 3] = 200 * alpha
    return out


def _frame(axes: Any, ticks: bool = True) -> None:
    if not ticks:
        axes.set_xticks([])
        axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=_FAINT, linewidth=0.6)


# -- text


def _boxes(kept: Kept, fonts: list[str]) -> Iterator[_Box]:
    """Tokens in the order of the prompt; each image is one box, where its first cell is."""
    first = {int(panel.cells[0]): panel for panel in kept.panels if len(panel.cells)}
    for i, piece in enumerate(kept.pieces):
        if i in first:
            share = float(kept.share[first[i].cells].mean())
            yield _Box(f" {first[i].name}: {share:.2f} ", share, is_image=True)
        if piece:
            yield _Box(_drawable(piece, fonts), float(kept.share[i]))


def _wrap(boxes: Iterator[_Box], width: int) -> Iterator[_Line]:
    """Lines of (column, box), broken where they are full and after a newline."""
    line: _Line = []
    column = 0
    for box in boxes:
        n = box.n_columns + 2  # padding and the gap to the next box
        if line and column + n > width:
            yield line
            line, column = [], 0
        line.append((column, box))
        column += n
        if box.label.endswith("↵"):
            yield line
            line, column = [], 0
    if line:
        yield line


def _draw_text(page: _Page, kept: Kept, lines: list[_Line], y: float, fonts: list[str]) -> None:
    from matplotlib import colormaps

    share = kept.share[[bool(piece) for piece in kept.pieces]]
    head = f"text: {len(share)} cells"
    page.text(_MARGIN, y + 0.2, head, weight="bold")
    if len(share):
        page.text(_MARGIN + 1.6, y + 0.2, f"kept: {share.mean():.2f} on average", weight="bold")
    page.text(
        _WIDTH - _MARGIN, y + 0.2, "· space   ↵ newline", color=_FAINT, fontsize=9, ha="right"
    )

    axes = page.axes(_MARGIN, y + 0.35, _INNER, max(1, len(lines)) * _LINE)
    axes.set(xlim=(0, _INNER), ylim=(max(1, len(lines)) * _LINE, 0))
    axes.set_label("text")
    axes.axis("off")
    for row, line in enumerate(lines):
        for column, box in line:
            _draw_box(axes, box, column * _COLUMN, row * _LINE, colormaps[_COLORS], fonts)


def _draw_box(axes: Any, box: _Box, x: float, y: float, colors: Any, fonts: list[str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill = colors(box.share)
    width, height = (box.n_columns + 1.4) * _COLUMN, 0.8 * _LINE
    shape = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.04",
        facecolor=fill,
        edgecolor=_INK if box.is_image else "none",
        linewidth=1.2,
    )
    axes.add_patch(shape)
    axes.text(
        x + width / 2,
        y + height / 2,
        box.label,
        parse_math=False,
        family=fonts,
        fontsize=_FONT_SIZE,
        weight="bold" if box.is_image else "normal",
        color="white" if _luminance(fill) < 0.45 else "black",
        ha="center",
        va="center_baseline",
    )


def _luminance(color: tuple[float, ...]) -> float:
    red, green, blue = color[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _fonts() -> list[str]:
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return ["DejaVu Sans Mono", *(name for name in _FONTS if name in installed)]


def _drawable(piece: str, fonts: list[str]) -> str:
    """A token of at most a line, in which ``\\uNNNN`` stands for what no font can draw."""
    from matplotlib.font_manager import findfont, get_font

    known = [get_font(findfont(name)) for name in fonts]
    out = ""
    for c in piece:
        drawn = any(font.get_char_index(ord(c)) for font in known)
        out += c if drawn else c.encode("unicode_escape").decode()
    return out if len(out) <= _MAX_LABEL else out[: _MAX_LABEL - 1] + "…"
