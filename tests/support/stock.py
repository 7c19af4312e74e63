"""Unpatched llama.cpp to compare with."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.lru_cache(maxsize=1)
def stock_lib_dir() -> Path:
    """Folder of the stock libraries, built at first use.

    `ELASTIC_STOCK_LIB_DIR` names libraries that exist already.
    """
    if os.environ.get("ELASTIC_STOCK_LIB_DIR"):
        return Path(os.environ["ELASTIC_STOCK_LIB_DIR"])
    command = [sys.executable, str(ROOT / "scripts" / "build_stock.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Path(done.stdout.strip())
