"""Keys and values on other machines: the answers of this one, and no command per layer or head."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from elastic_llama import lib_dir, rpc
from elastic_llama.errors import ConfigError
from elastic_llama.rpc import add_rpc_server, serve_rpc

from tests.support.device_cases import POLICIES, case, run
from tests.support.tiny_llama import write_tiny_llama

pytestmark = pytest.mark.skipif(
    not any(lib_dir().glob("*ggml-rpc*")), reason="built with GGML_RPC=OFF"
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    ports = [free_port(), free_port()]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "elastic_llama", "rpc-server", "--port", str(p), "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for p in ports
    ]
    for port in ports:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
    yield [f"127.0.0.1:{p}" for p in ports]
    for p in processes:
        p.kill()
        p.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rpc") / "model.gguf"
    write_tiny_llama(path, n_layer=3)
    return path


def test_answers_are_those_of_the_host(servers: list[str], model: Path) -> None:
    cases = [case(policy, type=t) for policy in POLICIES for t in ("f16", "q8_0")]
    cases += [
        case(policy, n_seq=3, unified=u) for policy in ("elastic", "h2o") for u in (True, False)
    ]
    for given, got in zip(cases, run(model, servers[:1], cases)):
        assert got["nmse"] <= 1e-6, (given, got)
        assert got["same_cells"], (given, got)


def test_two_servers_and_the_host(servers: list[str], model: Path) -> None:
    """Of four layers (the output counts as one), one or two stay here."""
    cases = [case(p, gpu_layers=n) for p in ("elastic", "elastic-evict") for n in (2, 3, 4)]
    results = run(model, servers, cases)
    for given, got in zip(cases, results):
        assert got["nmse"] <= 1e-6, (given, got)
        assert got["same_cells"], (given, got)
    assert all(min(counts) > 0 for counts in results[-1]["commands"]), "both take part"


@pytest.mark.parametrize("policy", ["elastic", "elastic-evict", "h2o", "snapkv", "local"])
def test_commands_do_not_grow_with_layers_and_heads(
    servers: list[str], tmp_path: Path, policy: str
) -> None:
    """Those of a token beyond stock's.

    Not of the first two: a prompt is compressed once, and a checkpoint of it is copied once.
    """
    more = {}
    for n_layer, n_head_kv in ((2, 2), (6, 4)):
        path = tmp_path / f"{n_layer}.gguf"
        write_tiny_llama(path, n_layer=n_layer, n_head_kv=n_head_kv)
        stock, ours = run(path, servers[:1], [case(None), case(policy)])
        counts = [np.sum(x["commands"], axis=1)[2:31] for x in (stock, ours)]
        more[n_layer] = (counts[1] - counts[0]).max()
    assert more[6] <= more[2] <= 8, more


@pytest.mark.parametrize(("given", "interval"), [({}, 16), ({"overdraft": 32}, 4)])
def test_tokens_that_are_scored(
    servers: list[str], model: Path, given: dict[str, int], interval: int
) -> None:
    """They take two commands more. A device has fewer of them: its graphs cost more to change."""
    ours = case("elastic")
    ours["elastic"].update(given, budget=100.0)
    counts = np.sum(run(model, servers[:1], [ours])[0]["commands"], axis=1)
    scored = np.flatnonzero(counts[2:31] > counts[2:31].min())
    assert len(scored) == 29 // interval
    assert set(np.diff(scored)) <= {interval}


def test_commands_of_a_compression_do_not_grow_with_cells(servers: list[str], model: Path) -> None:
    """An answer is compressed with the prompt after 32 tokens: K, V and bias of a layer at once."""
    more = {}
    for budget in (60, 120):  # cells, so that both are compressed again at the same token
        ours = case("elastic")
        ours["elastic"].update(budget=float(budget), overdraft=32)
        stock, ours = run(model, servers[:1], [case(None), ours])
        counts = [np.sum(x["commands"], axis=1)[31:] for x in (stock, ours)]
        more[budget] = (counts[1] - counts[0]).max()
    n_layer = 3
    assert 5 * n_layer <= more[60] == more[120] <= 7 * n_layer + 8, more


# prints the most cells that an answer of 120 tokens holds, of a prompt of 450 that keeps 100
OVERDRAFT = """
import sys
from elastic_llama.rpc import add_rpc_server
from tests.support import engine
add_rpc_server(sys.argv[2])
engine.N_GPU_LAYERS = int(sys.argv[3])
elastic = {"budget": 100, **eval(sys.argv[4])}
with engine.Engine(sys.argv[1], elastic, n_ctx=int(sys.argv[5]), flash_attn=True) as e:
    e.prompt(engine.random_tokens(450, 128, 1))
    held = [e.token(t, 450 + i) is None or e.session.n_cells(0) for i, t in enumerate([7] * 120)]
    print(max(held))
"""


@pytest.mark.parametrize(
    ("gpu_layers", "given", "n_ctx", "most"),
    [
        (0, {}, 1024, 132),
        (9, {}, 1024, 200),
        (9, {"overdraft": 32}, 1024, 132),
        (9, {"budget": 300}, 512, 406),
    ],
)
def test_an_overdraft_on_a_device(
    servers: list[str],
    model: Path,
    gpu_layers: int,
    given: dict[str, int],
    n_ctx: int,
    most: int,
) -> None:
    """As many cells again, if nobody chose it: a compression there waits for transfers.

    As many stay free. Of 512 cells 406 leave 106, which is what there is beyond 300.
    """
    numbers = [str(gpu_layers), str(given), str(n_ctx)]
    command = [sys.executable, "-c", OVERDRAFT, str(model), servers[0], *numbers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == most


def test_nobody_there() -> None:
    with pytest.raises(ConfigError, match="no server answers"):
        add_rpc_server(f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("said", [None, b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"])
def test_a_server_of_another_kind(said: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits, one that goes away, one that says something else."""
    monkeypatch.setattr(rpc, "_REACH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client = server.accept()[0]
            client.recv(100)
            if said is not None:
                client.sendall(said)
                client.close()
            kept.append(client)

        kept: list[socket.socket] = []
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match="no server answers"):
            add_rpc_server(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
        kept[0].close()


@pytest.mark.parametrize(
    "endpoint", ["", "host", "host:", "host:0", "host:x", ":50052", "host:70000", "host:²"]
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        add_rpc_server(endpoint)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s, pytest.raises(ConfigError, match="listen"):
        serve_rpc(port=s.getsockname()[1])
