"""Images of every kind become RGB, or one clear error."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np
import pytest
from elastic_llama import ImageError
from elastic_llama.images import MAX_SIDE, load_image, to_data_uri, to_png
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_sources_agree(tmp_path):
    image = Image.effect_noise((20, 10), 50).convert("RGB")
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.as_uri(), path.read_bytes(), image, to_data_uri(path)):
        assert load_image(source).tobytes() == image.tobytes()
    assert load_image(to_png(image)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK", "YCbCr"]
)
def test_modes(mode):
    image = (
        Image.new("RGB", (8, 4), "white").convert("L")
        if mode == "I;16"
        else Image.new("RGB", (8, 4), "white").convert(mode)
    )
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 8), 65535, np.uint16))
    out = load_image(image)
    assert (out.mode, out.size) == ("RGB", (8, 4))
    assert out.getpixel((0, 0)) == (255, 255, 255)


def test_one_pixel():
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"))).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_jpeg():
    out = load_image(encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "JPEG"))
    assert out.getpixel((4, 4)) == (255, 255, 255)


def test_transparent_is_white():
    assert load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = load_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))).getpixel((0, 0))
    assert half[0] in (126, 127, 128)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation():
    image = Image.new("RGB", (4, 2), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (2, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_is_scaled_down(kind):
    out = load_image(encoded(Image.new("RGB", (9000, 300), "red"), kind))
    assert max(out.size) <= MAX_SIDE
    assert out.size[0] / out.size[1] == pytest.approx(30, rel=0.02)


def test_a_line_of_pixels_keeps_a_side():
    assert load_image(Image.new("L", (20_000, 1))).size == (MAX_SIDE, 1)


def bad_sources():
    png = encoded(Image.effect_noise((64, 64), 50))
    jpeg = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    huge = bytearray(encoded(Image.new("L", (1, 1))))
    huge[16:24] = (20_000).to_bytes(4, "big") * 2  # width and height
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    return {
        "empty": b"",
        "text": b"not an image",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "flipped bytes": png[:60] + bytes(b ^ 0xFF for b in png[60:400]) + png[400:],
        "header only": png[:8],
        "huge": bytes(huge),
        "missing": "no/such/file.png",
        "folder": ".",
        "nul in name": "a\0b.png",
        "bad base64": "data:image/png;base64,A",
        "no base64": "data:image/png,hello",
        "data of text": "data:image/png;base64," + base64.b64encode(b"hello").decode(),
        "bad url": "http://",
        "missing url": "file:///no/such/file.png",
    }


@pytest.mark.parametrize("name", list(bad_sources()))
def test_bad_sources(name):
    with pytest.raises(ImageError, match=r"^\[image\] "):
        load_image(bad_sources()[name])


def test_huge_says_so():
    with pytest.raises(ImageError, match="megapixels"):
        load_image(bad_sources()["huge"])


def test_unreadable(tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop root
    with pytest.raises(ImageError, match="Permission denied"):
        load_image(tmp_path / "a.png")
