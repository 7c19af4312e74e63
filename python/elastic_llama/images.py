"""Images of any kind to plain RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Union

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError, text

ImageSource = Union[str, "os.PathLike[str]", bytes, Image.Image]

MAX_PIXELS = 178_956_970  # Pillow's own limit: a small file can claim any size
MAX_SIDE = 4096  # vision towers look at a few hundred pixels; more only costs memory


def load_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB: first frame, upright, transparency on white, sides <= `MAX_SIDE`.

    Parameters
    ----------
    source : path, ``data:`` / ``file:`` / ``http(s):`` URL, bytes or PIL image

    Raises
    ------
    ImageError
        It does not exist, is no image, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "image object")
    name, data = _read(source)
    if not data:
        raise ImageError(text("image", name, "an empty file", "an image"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return _rgb(image, name)
    except UnidentifiedImageError:
        raise ImageError(
            text("image", name, "no known image format", "PNG, JPEG, WebP, GIF, BMP or TIFF")
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None


def to_png(image: Image.Image) -> bytes:
    """PNG bytes of an RGB image; lossless, lightly compressed."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def to_data_uri(source: ImageSource) -> str:
    """``data:image/png;base64,...`` of any image, for the messages of a chat completion."""
    return "data:image/png;base64," + base64.b64encode(to_png(load_image(source))).decode()


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    try:
        image.seek(0)
        if image.format == "JPEG":
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # decodes at a smaller scale
        image.load()
        out = ImageOps.exif_transpose(image)
        if out.mode.startswith("I;16"):
            out = out.point(lambda v: v / 256, "L")
        if max(out.size) > MAX_SIDE:
            if out.mode in ("P", "PA", "1"):
                out = out.convert("RGBA")
            out = out.copy()
            out.thumbnail((MAX_SIDE, MAX_SIDE))
        if out.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in out.info:
            front = out.convert("RGBA")
            out = Image.new("RGB", front.size, "white")
            out.paste(front, mask=front.getchannel("A"))
        return out.convert("RGB")
    # Pillow's decoders raise all of these on damaged data.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, MemoryError) as e:
        raise ImageError(text("image", name, f"damaged data ({e})", "a whole image file")) from e


def _too_large(name: str) -> ImageError:
    return ImageError(
        text(
            "image",
            name,
            f"more than {MAX_PIXELS // 1_000_000} megapixels",
            f"at most {MAX_PIXELS // 1_000_000}",
            "scale it down first",
        )
    )


def _read(source: str | os.PathLike[str] | bytes) -> tuple[str, bytes]:
    """Name for messages, and the bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes", bytes(source)
    name = os.fspath(source)
    try:
        if name.startswith("data:"):
            head, _, body = name.partition(",")
            if not head.endswith(";base64"):
                raise ImageError(text("image", "data URI", repr(head[:40]), "data:...;base64,..."))
            return "data URI", base64.b64decode(body, validate=False)
        if name.startswith(("http://", "https://", "file://")):
            with urllib.request.urlopen(name) as response:
                return name, response.read()
        return name, Path(name).read_bytes()
    except FileNotFoundError:
        raise ImageError(text("image", name, "no such file", "an image file")) from None
    except IsADirectoryError:
        raise ImageError(text("image", name, "a folder", "an image file")) from None
    except binascii.Error as e:
        raise ImageError(text("image", "data URI", f"bad base64 ({e})", "base64 data")) from None
    except (OSError, ValueError) as e:  # unreadable, bad URL, NUL in a path
        raise ImageError(
            text("image", name[:200], f"an unreadable file ({e})", "an image file")
        ) from e
