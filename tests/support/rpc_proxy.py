"""A proxy before an RPC server that counts the commands a client sends.

A command is one byte, its size in eight bytes (little endian), and so many bytes (ggml-rpc.cpp).
Numbers are those of ``enum rpc_cmd``.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter

SET_TENSOR, SET_TENSOR_HASH, GET_TENSOR, COPY_TENSOR = 6, 7, 8, 9
GRAPH_COMPUTE, GRAPH_RECOMPUTE = 10, 16


class RpcProxy:
    """Listens on a free port of this machine and passes everything on to `server` (host, port)."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server = server
        self.counts: Counter[int] = Counter()
        self.n_bytes: Counter[int] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def take(self) -> Counter[int]:
        """Commands since the last call, by number."""
        counts, self.counts = self.counts, Counter()
        return counts

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(self.server)
            except OSError:
                client.close()
                continue
            for s in (client, server):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._commands, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()

    def _commands(self, client: socket.socket, server: socket.socket) -> None:
        while True:
            head = _read(client, 9)
            if not head:
                server.shutdown(socket.SHUT_RDWR)  # the other thread waits for it
                return
            self.counts[head[0]] += 1
            left = int.from_bytes(head[1:], "little")
            self.n_bytes[head[0]] += left
            server.sendall(head)
            while left:
                part = client.recv(min(left, 1 << 20))
                if not part:
                    return
                server.sendall(part)
                left -= len(part)

    @staticmethod
    def _answers(server: socket.socket, client: socket.socket) -> None:
        try:
            while part := server.recv(1 << 20):
                client.sendall(part)
        except OSError:
            pass


def _read(sock: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        part = sock.recv(n - len(data))
        if not part:
            return b""
        data += part
    return data
