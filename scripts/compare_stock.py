"""Shows that off is off: logits of our libraries against a stock build, bit by bit.

Each library folder answers in a process of its own: a prompt of tokens, embeddings (as an image
comes in) and tokens, then forced tokens, with and without flash attention, for several KV types.
`budget 1.0` has an elastic cache attached that keeps everything, with flash attention only. With
--mmproj the embeddings are an image's, encoded by the libraries under test.

    python scripts/compare_stock.py [--model FILE [--mmproj FILE]]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RUNS = [(False, "f16", "f16"), (False, "q8_0", "f16"), (True, "f16", "f16"), (True, "q8_0", "q8_0")]


def name_of(fa: bool, k: str, v: str) -> str:
    return f"flash attention {'on ' if fa else 'off'}, K {k}, V {v}"


def embeddings(model: str, mmproj: str | None, picture: str | None, n_embd: int) -> np.ndarray:
    """Rows [n, n_embd] that come in as an image does; of a picture where there is a tower."""
    if mmproj is None or picture is None:
        return np.random.default_rng(0).normal(scale=0.3, size=(576, n_embd)).astype(np.float32)
    from tests.support.encode_images import encode

    with tempfile.TemporaryDirectory() as temp:
        lib_dir = os.environ["LLAMA_CPP_LIB_PATH"]
        image = np.load(picture)
        (features,) = encode(lib_dir, Path(model), [Path(mmproj)], image, Path(temp)).values()
    return features


def draw_picture(path: Path) -> Path:
    """Save the scene to encode [height, width, 3]; a child with other libraries cannot draw it."""
    from elastic_llama.scenes import make_scene

    np.save(path, np.asarray(make_scene("test", 0, 3).render()))
    return path


def answer(model: str, mmproj: str | None, picture: str | None, target: str, elastic: bool) -> None:
    """Runs in the child: all logits of all runs into an npz."""
    if elastic:
        import elastic_llama  # noqa: F401  (chooses the libraries)
    from tests.support.engine import Engine, random_tokens

    out = {}
    for fa, k, v in RUNS:
        if elastic and not fa:
            continue
        config = {"policy": "elastic", "budget": 1.0, "min_cells": 8} if elastic else None
        kw = {"flash_attn": fa, "type_k": k, "type_v": v, "n_ctx": 1024, "elastic": config}
        with Engine(model, **kw) as e:
            rows = embeddings(model, mmproj, picture, e.n_embd)
            n = 30 + len(rows)
            e.prompt(random_tokens(30, min(e.n_vocab, 300), 1), 0, logits=False)
            e.image(rows, 30)
            e.prompt(random_tokens(20, min(e.n_vocab, 300), 2), n)
            logits = [e.logits(-1), *e.forced(random_tokens(16, min(e.n_vocab, 300), 3), n + 20)]
        out[name_of(fa, k, v)] = np.stack(logits)
    if mmproj is not None:
        out["image features"] = rows
    np.savez(target, **out)


def run_child(
    lib_dir: Path, model: str, mmproj: str | None, target: Path, elastic: bool
) -> dict[str, np.ndarray]:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(lib_dir), "MTMD_CPP_LIB": str(lib_dir)}
    command = [sys.executable, __file__, "--child", str(target), "--model", model]
    if mmproj:
        picture = draw_picture(target.with_name("picture.npy"))
        command += ["--mmproj", mmproj, "--picture", str(picture)]
    subprocess.run([*command, *(["--elastic"] if elastic else [])], env=env, check=True)
    with np.load(target) as data:
        return dict(data)


def compare(
    model: str, stock_dir: Path, our_dir: Path, mmproj: str | None = None
) -> list[tuple[str, str, bool, float]]:
    """Rows of (run, which of ours, identical, largest difference)."""
    with tempfile.TemporaryDirectory() as temp:
        stock = run_child(stock_dir, model, mmproj, Path(temp) / "stock.npz", False)
        rows = []
        for label, elastic in (("off", False), ("budget 1.0", True)):
            ours = run_child(our_dir, model, mmproj, Path(temp) / "ours.npz", elastic)
            for run in ours:
                expected = stock[run]
                same = bool(np.array_equal(expected.view(np.uint32), ours[run].view(np.uint32)))
                rows.append((run, label, same, float(np.abs(expected - ours[run]).max())))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="GGUF; default: a tiny random one")
    parser.add_argument("--mmproj", help="GGUF of a vision tower for --model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--picture", help=argparse.SUPPRESS)
    parser.add_argument("--elastic", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer(args.model, args.mmproj, args.picture, args.child, args.elastic)
        return 0

    if args.mmproj and not args.model:
        parser.error("--mmproj needs --model")

    import elastic_llama

    from tests.support.stock import stock_lib_dir
    from tests.support.tiny_llama import write_tiny_llama

    with tempfile.TemporaryDirectory() as temp:
        model = args.model or str(
            write_tiny_llama(Path(temp) / "tiny.gguf", n_layer=4, n_embd=256, n_head=4, n_head_kv=2)
        )
        rows = compare(model, stock_lib_dir(), elastic_llama.lib_dir(), args.mmproj)
    for run, label, same, largest in rows:
        print(f"{run:44} {label:10} {'identical' if same else f'DIFFERS by {largest:g}'}")
    return 0 if all(same for _, _, same, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
