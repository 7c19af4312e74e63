"""The parts that ggml's scheduler cuts graphs into: two more for each op that a device lacks."""

from __future__ import annotations

import ctypes
import os
import re

import llama_cpp

from tests.support.engine import _quiet


class Splits:
    """Within `with`, of contexts made there: the backends of each graph's parts, in order."""

    def __init__(self) -> None:
        self.graphs: list[tuple[str, ...]] = []
        self._callback = llama_cpp.llama_log_callback(self._on_line)

    def __enter__(self) -> Splits:
        os.environ["GGML_SCHED_DEBUG"] = "1"
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        return self

    def __exit__(self, *exc: object) -> None:
        del os.environ["GGML_SCHED_DEBUG"]
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))

    def _on_line(self, level: int, text: bytes, data: object) -> None:
        found = re.match(rb"\n## SPLIT #(\d+): (\S+)", text)
        if found and found[1] == b"0":
            self.graphs.append(())
        if found:
            self.graphs[-1] += (found[2].decode(),)
