"""Image files of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from .errors import ImageError, message


def image_files(name: str | os.PathLike[str]) -> list[Path]:
    """A file, or the files in a folder and in those below it whose names end as images' do.

    In order of their names; what is hidden is left out. Whether a file is an image shows when it is
    read.

    Raises
    ------
    ImageError
        It does not exist, or is a folder without images.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ImageError(message("image", str(name), "no such file or folder", "an image file"))
    endings = Image.registered_extensions()
    out = []
    for folder, below, names in os.walk(path):
        below[:] = sorted(n for n in below if not n.startswith("."))
        seen = (n for n in names if not n.startswith("."))
        out += [Path(folder) / n for n in seen if os.path.splitext(n)[1].lower() in endings]
    if not out:
        raise ImageError(message("image", str(name), "a folder without images", "image files"))
    return sorted(out)
