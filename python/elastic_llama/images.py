"""Images of any kind to plain RGB."""

from __future__ import annotations

import base64
import http.client
import io
import os
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError
from .errors import message as error_message

ImageSource = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryIO, Image.Image, np.ndarray
]

MAX_PIXELS = 178_956_970  # Pillow's own limit: a small file can claim any size
MAX_SIDE = 4096  # vision towers look at a few hundred pixels; more only costs memory

_ACCEPTED = "a path, a URL, base64, bytes, a binary file, a PIL image or a numpy array"
_SHAPES = "height x width, or height x width x 1, 3 or 4, of numbers"
_OBJECT = "image object"
_MAX_QUOTE = 200  # characters
_MAX_NAME = 255  # of a file


def load_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB: first frame, upright, transparency on white, sides <= `MAX_SIDE`.

    Parameters
    ----------
    source : path, URL, base64, bytes, binary file, PIL image or numpy array
        URLs are ``data:``, ``file:`` or ``http(s):``. A file is read from where it stands, and
        stays open. An array is height x width, or height x width x 1, 3 or 4. Where it, or an
        image, is not of 8 bits, its largest value says whether white is 1 (floats only), 255,
        4095 or 65535; values of other ranges are stretched.

    Raises
    ------
    ImageError
        It does not exist, is no image, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, _OBJECT)
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source), "array")
    name, data = _read(source)
    if not data:
        raise ImageError(error_message("image", name, "an empty file", "an image"))
    with _pillow_errors(name), _opened(data) as image:
        return _rgb(image, name)


def as_images(value: Any) -> list[ImageSource]:
    """What people pass as images: none, one, or several, as a list.

    Raises
    ------
    ImageError
        Something in it is nothing that `load_image` takes.
    """
    if value is None:
        return []
    if _is_source(value):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ImageError(
            error_message("image", "images", _type(value), f"{_ACCEPTED}, or a list of them")
        )
    images = list(value)
    for i, image in enumerate(images):
        if not _is_source(image):
            raise ImageError(error_message("image", f"images[{i}]", _type(image), _ACCEPTED))
    return images


def to_png(image: Image.Image) -> bytes:
    """PNG bytes of an RGB image; lossless, lightly compressed."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def to_data_uri(source: ImageSource) -> str:
    """``data:image/png;base64,...`` of any image, for the messages of a chat completion."""
    return "data:image/png;base64," + base64.b64encode(to_png(load_image(source))).decode()


# -- pixels


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    with _pillow_errors(name):
        image.seek(0)
        if image.format == "JPEG":
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # decodes at a smaller scale
        image.load()
        out = ImageOps.exif_transpose(image)
        if out.mode[0] in "IF":  # I, I;16 of every kind, F
            out = Image.fromarray(_to_8_bits(np.asarray(out)))
        if max(out.size) > MAX_SIDE:
            if out.mode in ("P", "PA", "1"):
                out = out.convert("RGBA")
            out = out.copy()
            out.thumbnail((MAX_SIDE, MAX_SIDE))
        if out.mode == "La":
            out = out.convert("LA")
        if out.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in out.info:
            front = out.convert("RGBA")
            out = Image.new("RGB", front.size, "white")
            out.paste(front, mask=front.getchannel("A"))
        return out.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not is_image or array.size == 0 or array.dtype.kind not in "buif":
        got = f"{array.dtype} of shape {array.shape}"
        do = "pass several images as a list" if array.ndim == 4 else ""
        raise ImageError(error_message("image", "array", shorten(got), _SHAPES, do))
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large("array")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(array)))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Numbers of any range as uint8; what is not a number is black."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    with np.errstate(all="ignore"):
        numbers = values.astype(np.promote_types(values.dtype, np.float32))
        out = _scaled(numbers, is_float=values.dtype.kind == "f")
        out = np.nan_to_num(out, nan=0.0, posinf=255.0, neginf=0.0)
        return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _scaled(values: np.ndarray, is_float: bool) -> np.ndarray:
    """Floats whose range says what white is, as floats in which white is 255."""
    finite = np.isfinite(values)
    if not finite.any():
        return values
    low = values.min(where=finite, initial=np.inf)
    high = values.max(where=finite, initial=-np.inf)
    slack = 0.1 if is_float else 0.0  # filters overshoot
    for white, scale in ((1, 255.0), (255, 1.0), (4095, 1 / 16), (65535, 1 / 256)):
        if white == 1 and not is_float:
            continue
        if high <= white * (1 + slack):
            if low >= -slack * white:
                return values * scale
            break
    if low == high:
        return values * np.inf  # says nothing: white above zero, black below
    return (values - low) * (255 / (high - low))


# -- files, URLs and text


def _read(source: Any) -> tuple[str, bytes]:
    """Name for messages, and the bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        try:
            data = bytes(source)
        except ValueError as e:  # a memoryview that was released
            raise ImageError(error_message("image", _type(source), shorten(e), "bytes")) from e
        return f"{len(data)} bytes", data
    if callable(getattr(source, "read", None)):
        return _read_open(source)
    if isinstance(source, str):
        return _read_text(source)
    if isinstance(source, os.PathLike):
        return _read_path(os.fsdecode(source))
    raise ImageError(error_message("image", "source", _type(source), _ACCEPTED))


def _read_open(file: Any) -> tuple[str, bytes]:
    """The rest of an open file."""
    name = getattr(file, "name", None)
    name = shorten(name) if isinstance(name, str) and name else _type(file)
    try:
        data = file.read()
    except Exception as e:  # it may be anything that has a method of this name
        raise ImageError(error_message("image", name, _unreadable(e), "an open binary file")) from e
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(
            error_message(
                "image", name, f"{_type(data)} from read()", "bytes", "open it in binary mode"
            )
        )
    if not data:
        raise ImageError(
            error_message(
                "image", name, "nothing left to read", "an image", "seek(0) before if it was read"
            )
        )
    return name, bytes(data)


def _read_text(source: str) -> tuple[str, bytes]:
    """What a URL, a path, or base64 stands for; a file goes before base64 of the same letters."""
    url = source.strip()
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return "data URL", _from_data_url(url)
    if scheme.startswith(("http://", "https://", "file://")):
        return shorten(url), _fetch(url)
    if not os.path.exists(source):
        data = _base64_image(source)
        if data is not None:
            return "base64", data
    return _read_path(source)


def _read_path(path: str) -> tuple[str, bytes]:
    name = shorten(path)
    if not path:
        raise ImageError(error_message("image", "path", "no name", "an image file"))
    try:
        return name, Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(error_message("image", name, "no such file", "an image file")) from None
    except IsADirectoryError:
        raise ImageError(error_message("image", name, "a folder", "an image file")) from None
    except (OSError, ValueError) as e:  # unreadable, NUL in it
        if len(path) > _MAX_NAME:
            got = "neither a file nor an image in base64"
            raise ImageError(error_message("image", name, got, _ACCEPTED)) from None
        raise ImageError(error_message("image", name, _unreadable(e), "an image file")) from e


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url) as response:
            return bytes(response.read())
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise ImageError(
            error_message("image", shorten(url), _unreadable(e), "an image file")
        ) from e


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    parameters = [part.strip().lower() for part in head.split(";")[1:]]
    if not comma or "base64" not in parameters:
        raise ImageError(
            error_message("image", "data URL", shorten(repr(head)), "data:...;base64,...")
        )
    try:
        return _from_base64(body)
    except ValueError as e:
        raise ImageError(
            error_message("image", "data URL", f"bad base64 ({shorten(e)})", "base64 data")
        ) from None


def _from_base64(body: str) -> bytes:
    """Bytes of base64 as it is found: in lines, of the URL-safe kind, escaped, not padded.

    Raises
    ------
    ValueError
    """
    body = "".join(urllib.parse.unquote(body).split())
    body = body.replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)


def _base64_image(source: str) -> bytes | None:
    """The image that a text is the base64 of, if it is one."""
    try:
        data = _from_base64(source)
        with _opened(data):
            return data
    except Image.DecompressionBombError:
        return data
    except Exception:  # no base64, or nothing that Pillow knows
        return None


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            yield image


# -- errors


def shorten(value: object) -> str:
    """Text as it is quoted in a message."""
    out = str(value)
    return out if len(out) <= _MAX_QUOTE else out[: _MAX_QUOTE - 1] + "…"


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Whatever Pillow raises, as an `ImageError`; its decoders raise nearly all there is."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            error_message(
                "image", name, "no known image format", "PNG, JPEG, WebP, GIF, BMP or TIFF"
            )
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except Exception as e:
        why = shorten(str(e) or type(e).__name__)
        expected = "an image that is still open" if name == _OBJECT else "a whole image file"
        raise ImageError(error_message("image", name, f"damaged data ({why})", expected)) from e


def _too_large(name: str) -> ImageError:
    return ImageError(
        error_message(
            "image",
            name,
            f"more than {MAX_PIXELS // 1_000_000} megapixels",
            f"at most {MAX_PIXELS // 1_000_000}",
            "scale it down first",
        )
    )


def _unreadable(error: Exception) -> str:
    return f"an unreadable file ({shorten(str(error) or type(error).__name__)})"


def _is_source(value: Any) -> bool:
    known = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    return isinstance(value, known) or callable(getattr(value, "read", None))


def _type(value: object) -> str:
    return type(value).__name__
