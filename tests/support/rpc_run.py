"""One model on the host and on RPC servers, in a process of its own: they cannot be taken back.

Prints one JSON object per line: what differed, and the commands that each generated token took.

Usage: python -m tests.support.rpc_run MODEL ENDPOINT[,ENDPOINT...] CASES
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["ELASTIC_ATTENTION"] = "graph"  # on the host, the ops that a device gets

import numpy as np
from elastic_llama.rpc import add_rpc_server

from tests.support import engine
from tests.support.engine import Engine, nmse, random_tokens
from tests.support.rpc_proxy import RpcProxy

N_VOCAB = 384
N_PROMPT, N_ANSWER = 300, 40


def run(
    path: str, case: dict[str, Any], proxies: list[RpcProxy], gpu_layers: int
) -> dict[str, Any]:
    """Two sequences: text, and text with an image; then forced tokens of both."""
    engine.N_GPU_LAYERS = gpu_layers
    tokens = random_tokens(N_PROMPT + N_ANSWER, N_VOCAB, 5)
    types = case["type"]
    out: dict[str, Any] = {"logits": [], "cells": [], "commands": []}
    with Engine(
        path,
        elastic=case["elastic"],
        flash_attn=True,
        type_k=types,
        type_v=types,
        n_seq_max=case["n_seq"],
        unified=case["unified"],
        n_ctx=2048,
    ) as e:
        for seq in range(case["n_seq"]):
            if seq % 2 == case["image_in"]:
                rng = np.random.default_rng(seq)
                e.prompt(tokens[:20], 0, seq, logits=False)
                e.image(rng.normal(scale=0.5, size=(200, e.n_embd)).astype(np.float32), 20, seq)
                e.prompt(tokens[220:N_PROMPT], 220, seq)
            else:
                e.prompt(tokens[:N_PROMPT], 0, seq)
        for i in range(N_PROMPT, N_PROMPT + N_ANSWER):
            for p in proxies:
                p.take()
            for seq in range(case["n_seq"]):
                out["logits"].append(e.token(tokens[i], i, seq))
            out["commands"].append([sum(p.take().values()) for p in proxies])
        if e.session is not None:
            for seq in range(case["n_seq"]):
                out["cells"].append(e.session.cells(seq)["pos"].tolist())
            out["ways"] = sorted(set(e.session.attention()))
    return out


def main() -> None:
    path, endpoints, cases = sys.argv[1:]
    proxies = []
    for endpoint in endpoints.split(","):
        host, port = endpoint.split(":")
        proxies.append(RpcProxy((host, int(port))))
        add_rpc_server(proxies[-1].endpoint)
    for case in json.loads(cases):
        host = run(path, case, [], 0)
        there = run(path, case, proxies, case["gpu_layers"])
        result = {
            "nmse": nmse(np.stack(host["logits"]), np.stack(there["logits"])),
            "same_cells": host["cells"] == there["cells"],
            "commands": there["commands"],
            "ways": there.get("ways"),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
