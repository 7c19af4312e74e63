"""Unpatched llama.cpp to compare with."""

from __future__ import annotations

import os
from pathlib import Path

from scripts.build_stock import folder


def stock_lib_dir() -> Path:
    """Folder of the stock libraries.

    `ELASTIC_STOCK_LIB_DIR` names others.
    """
    found = Path(os.environ.get("ELASTIC_STOCK_LIB_DIR") or folder())
    if not found.is_dir():
        raise RuntimeError(f"there are no stock libraries in {found}: run make stock")
    return found
