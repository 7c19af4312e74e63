"""Takes tensors out of a graph while it runs, through llama.cpp's own evaluation callback."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
from elastic_llama import lib_dir

_ggml = ctypes.CDLL(str(next(lib_dir().glob("libggml-base.*"))))
_ggml.ggml_get_name.restype = ctypes.c_char_p
_ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
_ggml.ggml_backend_tensor_get.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
]
_ggml.ggml_nbytes.restype = ctypes.c_size_t
_ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]


class _Head(ctypes.Structure):
    """The first fields of ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    ]


class Capture:
    """Keeps every f32 tensor whose name starts with `prefix` and a layer: name -> list of arrays.

    Arrays have ggml's dimensions in reverse: [ne3, ne2, ne1, ne0].
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.names: set[str] = set()  # of all tensors, without their layer
        self.seen: dict[str, list[np.ndarray]] = {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)

    def _on_tensor(self, tensor: int, ask: bool, _data: object) -> bool:
        name = _ggml.ggml_get_name(tensor).decode()
        self.names.add(name.rsplit("-", 1)[0])
        if name.rsplit("-", 1)[0] != self.prefix:
            return not ask
        if not ask:
            head = _Head.from_address(tensor)
            data = np.empty(_ggml.ggml_nbytes(tensor), np.uint8)
            _ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            strides = [head.nb[i] for i in range(3, -1, -1)]
            shape = [head.ne[i] for i in range(3, -1, -1)]
            view = np.lib.stride_tricks.as_strided(data.view(np.float32), shape, strides)
            self.seen.setdefault(name, []).append(view.copy())
        return True
