"""What it costs to encode an image, which a conversation that keeps its cells pays once."""

from __future__ import annotations

import time
from typing import Any

from PIL import Image

from ..llama import ElasticLlama
from ..vision import MARKER, Vision


def time_encoding(llm: ElasticLlama, n_threads: int, n_times: int) -> dict[str, Any]:
    """Seconds of each of `n_times` encodings of a grey image, after one that does not count."""
    llm.n_threads_batch = n_threads
    vision = Vision(llm.mmproj_path or "", llm)
    seconds, cells = [], 0
    try:
        with vision.chunks(MARKER, [Image.new("RGB", (336, 336), "grey")], False) as chunks:
            images = [chunk for chunk in chunks if chunk.is_image]
            for _ in range(n_times + 1):
                start = time.perf_counter()
                cells = sum(len(vision.encode(chunk)[0]) for chunk in images)
                seconds.append(time.perf_counter() - start)
    finally:
        vision.close()
    return {"kind": "encode", "n_threads": n_threads, "cells": cells, "encode_s": seconds[1:]}
