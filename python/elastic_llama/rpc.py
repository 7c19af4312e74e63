"""Other machines as devices: llama.cpp's RPC backend.

A server lends its memory and its processor. A model that is loaded later with ``n_gpu_layers`` is
split over all devices, in the order in which they were added; keys and values lie beside the
layers they belong to. Source: ggml/src/ggml-rpc of llama.cpp.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from pathlib import Path

from ._libraries import lib_dir
from .errors import ConfigError, UnsupportedModelError, message

_REACH_SECONDS = 5.0
_HELLO, _CAPS = 14, 24  # the first command, and bytes of what a client can do


def add_rpc_server(endpoint: str) -> list[str]:
    """Make the devices of an RPC server known; models that are loaded from now on use them.

    Parameters
    ----------
    endpoint : str
        ``host:port`` of a server (``elastic-llama rpc-server``, or llama.cpp's ``rpc-server``).

    Returns
    -------
    list of str
        Names of its devices, such as ``RPC0``.

    Raises
    ------
    ConfigError
        The endpoint is not ``host:port``, or nobody answers there.
    UnsupportedModelError
        This build has no RPC backend.

    Notes
    -----
    llama.cpp ends the process when a server goes away later. The connection is not encrypted.
    """
    host, port = _parse(endpoint)
    lib = _library()
    try:
        _greet(host, port)
    except OSError as e:
        raise ConfigError(
            message("rpc", f"no server answers ({e})", endpoint, "a running RPC server")
        ) from e
    base = _ggml()
    before = base.ggml_backend_dev_count()
    reg = lib.ggml_backend_rpc_add_server(endpoint.encode())
    if not reg:
        raise ConfigError(message("rpc", "the server has no device", endpoint, "one or more"))
    devices = [
        base.ggml_backend_reg_dev_get(reg, i) for i in range(base.ggml_backend_reg_dev_count(reg))
    ]
    known = {base.ggml_backend_dev_get(i) for i in range(before)}
    if not known.issuperset(devices):
        base.ggml_backend_register(reg)
    return [base.ggml_backend_dev_name(d).decode() for d in devices]


def serve_rpc(host: str = "127.0.0.1", port: int = 50052, n_threads: int = 1) -> None:
    """Lend this machine's CPU to other processes. Does not return.

    Parameters
    ----------
    host : str, default="127.0.0.1"
        Address to listen at. Whoever reaches it can read and write this process's memory.
    port : int, default=50052
        TCP port, in [1, 65535].
    n_threads : int, default=1
        Threads of the computation.

    Raises
    ------
    ConfigError
        The port is out of range or taken.
    UnsupportedModelError
        This build has no RPC backend.
    """
    _parse(f"{host}:{port}")
    lib = _library()
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as e:
        raise ConfigError(
            message("rpc", f"cannot listen ({e})", f"{host}:{port}", "a free port")
        ) from e
    devices = (ctypes.c_void_p * 1)(_ggml().ggml_backend_dev_by_type(0))  # the CPU
    lib.ggml_backend_rpc_start_server(f"{host}:{port}".encode(), None, n_threads, 1, devices)


def _greet(host: str, port: int) -> None:
    """Say hello as llama.cpp does, which waits for an answer without end, or ends the process.

    Raises
    ------
    OSError
        Nothing answers in time, or it is no RPC server.
    """
    with socket.create_connection((host, port), timeout=_REACH_SECONDS) as s:
        s.sendall(struct.pack("<BQ", _HELLO, _CAPS) + bytes(_CAPS))
        with s.makefile("rb") as answer:
            head = answer.read(8)
        if len(head) < 8 or struct.unpack("<Q", head)[0] != 4 + _CAPS:
            raise OSError("it is no RPC server of this version")


def _parse(endpoint: str) -> tuple[str, int]:
    host, _, port = str(endpoint).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(message("rpc", "endpoint", endpoint, "host:port, the port in [1, 65535]"))
    return host, int(port)


def _open(stem: str) -> ctypes.CDLL | None:
    for path in sorted(Path(lib_dir()).glob(f"*{stem}.*")):
        return ctypes.CDLL(str(path))
    return None


def _library() -> ctypes.CDLL:
    lib = _open("ggml-rpc")
    if lib is None:
        raise UnsupportedModelError(
            message(
                "rpc", "this build has no RPC backend", "GGML_RPC=OFF", "a build with GGML_RPC=ON"
            )
        )
    lib.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    lib.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    lib.ggml_backend_rpc_start_server.restype = None
    lib.ggml_backend_rpc_start_server.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    return lib


def _ggml() -> ctypes.CDLL:
    lib = _open("libggml") or _open("ggml")
    assert lib is not None
    for name, result, arguments in (
        ("ggml_backend_dev_count", ctypes.c_size_t, []),
        ("ggml_backend_dev_get", ctypes.c_void_p, [ctypes.c_size_t]),
        ("ggml_backend_dev_by_type", ctypes.c_void_p, [ctypes.c_int]),
        ("ggml_backend_dev_name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("ggml_backend_reg_dev_count", ctypes.c_size_t, [ctypes.c_void_p]),
        ("ggml_backend_reg_dev_get", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
        ("ggml_backend_register", None, [ctypes.c_void_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
