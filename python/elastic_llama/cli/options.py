"""Options of several commands, named as in llama.cpp's tools, and the model they describe."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import ElasticConfig
from ..embedded import cache_dir
from ..errors import ConfigError, message
from ..kv_types import KV_TYPES, PLAIN_TYPES

RANDOM_SEED = -1


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model (the embedded one if none is given)")
    group.add_argument("-m", "--model", metavar="FILE", help="GGUF of the language model")
    group.add_argument("--mmproj", metavar="FILE", help="GGUF of the vision tower and projector")
    group.add_argument("--hf-repo", metavar="REPO", help="Hugging Face repository to fetch from")
    group.add_argument("--hf-file", metavar="NAME", help="language model in --hf-repo")
    group.add_argument("--hf-mmproj", metavar="NAME", help="vision tower in --hf-repo")
    for bound in ("min", "max"):
        group.add_argument(
            f"--image-{bound}-tokens",
            type=int,
            metavar="N",
            help=f"{'fewest' if bound == 'min' else 'most'} tokens of an image, for vision towers "
            "that take any size (the tower's)",
        )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        metavar="N",
        help="context size in cells (2048, or what --kv-cells takes)",
    )
    group.add_argument("-t", "--threads", type=int, metavar="N")
    group.add_argument(
        "-ngl", "--gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU (0)"
    )
    group.add_argument(
        "--rpc",
        metavar="HOST:PORT,...",
        help="RPC servers whose machines take layers too, with -ngl (elastic-llama rpc-server)",
    )
    group.add_argument(
        "-fa",
        "--flash-attn",
        choices=("on", "off", "auto"),
        default="auto",
        help="auto: on while the elastic cache is, which has no other (auto)",
    )
    group.add_argument("-ctk", "--cache-type-k", choices=tuple(KV_TYPES), default="f16")
    group.add_argument("-ctv", "--cache-type-v", choices=tuple(KV_TYPES), default="f16")
    group.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's own log")


def add_elastic_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("elastic cache")
    group.add_argument(
        "--kv-budget",
        type=float,
        default=0.2,
        metavar="B",
        help="fraction of cells kept (0 < B <= 1) or number of cells (B > 1); 0.2",
    )
    group.add_argument(
        "--kv-cells",
        type=int,
        metavar="N",
        help="never hold more cells than N and one ubatch, not even while a prompt is read",
    )
    group.add_argument(
        "--no-release-memory",
        action="store_true",
        help="keep the memory of cells that are not in use",
    )
    group.add_argument("--policy", default="elastic", help="row of the policy table (elastic)")
    group.add_argument("--n-sink", type=int, default=1, metavar="N", help="first cells that stay")
    group.add_argument(
        "--offset",
        type=int,
        default=25,
        metavar="N",
        help="distance of the evicted cell from the prompt's end (25)",
    )
    group.add_argument(
        "--min-cells",
        type=int,
        default=64,
        metavar="N",
        help="fewer cells than this are left alone (64)",
    )
    add_layers_option(group)


def add_memory_options(parser: argparse.ArgumentParser, always: bool = False) -> None:
    """Where images are remembered; `always`: in a folder of the user's if none is named."""
    group = parser.add_argument_group("image memory")
    folder = str(cache_dir() / "images") if always else None
    group.add_argument(
        "--memory",
        metavar="DIR",
        default=folder,
        help="keep the K/V of images in this folder: a later question about the same image starts "
        f"from there ({folder or 'off'})",
    )
    group.add_argument(
        "--memory-budget",
        type=float,
        default=0.5,
        metavar="B",
        help="what is kept of an image before its question is known, as --kv-budget (0.5)",
    )
    group.add_argument(
        "--memory-size",
        type=float,
        default=4.0,
        metavar="GIB",
        help="beyond it the images that were not used for longest are forgotten (4)",
    )


def memory_bytes(gib: float) -> int:
    """The argument of --memory-size in bytes."""
    if not 0 < gib < 2**33:
        raise ConfigError(message("options", "--memory-size", gib, "a size above 0"))
    return int(gib * 2**30)


def _memory(args: argparse.Namespace) -> Any:
    if getattr(args, "memory", None) is None:
        return None
    from ..memory import ImageMemory

    return ImageMemory(args.memory, max_bytes=memory_bytes(args.memory_size))


def layer_option(value: str) -> str | tuple[float, ...]:
    """The argument of --layers."""
    if value in ("auto", "even"):
        return value
    try:
        return tuple(float(x) for x in value.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{value!r}, expected auto, even or numbers") from e


def add_layers_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--layers",
        type=layer_option,
        default="auto",
        metavar="auto|even|X,X,...",
        help="cells of each layer in relation to the others'; auto: more where words are looked up "
        "(on the CPU); even: the same in all (auto)",
    )


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """When a prompt is compressed; for the commands that go on to answer."""
    parser.add_argument(
        "--probe",
        type=int,
        metavar="N",
        help="before a prompt of text is compressed, decode N likely tokens of its answer to see "
        "what they look at (16 for elastic and elastic-evict where enough cells are dropped; "
        "else 0)",
    )
    parser.add_argument("--lookahead", dest="probe", type=int, help=argparse.SUPPRESS)  # old name
    parser.add_argument(
        "--overdraft",
        type=int,
        metavar="N",
        help="cells beyond the budget that an answer may take before all is compressed again "
        "(32 for elastic, else 0)",
    )
    parser.add_argument(
        "--checkpoints",
        type=int,
        metavar="N",
        default=2,
        help="states kept of the conversation so that an answer can be taken back (2)",
    )


def add_sampling_options(parser: argparse.ArgumentParser, predict: int = 256) -> None:
    """How an answer is sampled, and how many tokens it has at most."""
    group = parser.add_argument_group("answer")
    group.add_argument(
        "-n",
        "--predict",
        type=int,
        default=predict,
        metavar="N",
        help="most tokens of an answer; -1: no limit but its end and a full context; 0: none "
        f"({predict})",
    )
    group.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (0)")
    group.add_argument(
        "-s",
        "--seed",
        type=seed_option,
        default=RANDOM_SEED,
        metavar="N",
        help="what is drawn at a temperature above 0; -1: something else each time (-1)",
    )


def seed_option(value: str) -> int:
    """The argument of --seed."""
    try:
        seed = int(value)
    except ValueError:
        seed = RANDOM_SEED - 1
    if not RANDOM_SEED <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{value!r}, expected -1, or 0 to {2**32 - 1}")
    return seed


def ask_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `Conversation.ask` is told of an answer."""
    out: dict[str, Any] = {"max_tokens": args.predict, "temperature": args.temp}
    if args.seed != RANDOM_SEED:
        out["seed"] = args.seed
    return out


def elastic_config(args: argparse.Namespace) -> ElasticConfig:
    return ElasticConfig(
        budget=args.kv_budget,
        policy=args.policy,
        n_sink=args.n_sink,
        offset=args.offset,
        min_cells=args.min_cells,
        kv_cells=args.kv_cells,
        probe=getattr(args, "probe", None),
        overdraft=getattr(args, "overdraft", None),
        checkpoints=getattr(args, "checkpoints", 2),
        layers=args.layers,
        release_memory=not args.no_release_memory,
    )


def check_flash(args: argparse.Namespace, do: str = "leave it out") -> None:
    """Refuse -fa off, for the elastic cache."""
    if args.flash_attn == "off":
        raise ConfigError(
            message(
                "options",
                "--flash-attn",
                "off",
                "on: the V of an elastic cache lies in rows, as flash attention has them",
                do,
            )
        )


def model_files(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """The files that the options name, fetched if need be; None: the embedded ones."""
    model, mmproj = args.model, args.mmproj
    if args.hf_repo:
        from ..hub import fetch

        if not args.hf_file:
            raise ConfigError(
                message(
                    "options", "--hf-repo without --hf-file", do="name the language model's file"
                )
            )
        model = str(fetch(args.hf_repo, args.hf_file))
        mmproj = str(fetch(args.hf_repo, args.hf_mmproj)) if args.hf_mmproj else mmproj
    if mmproj and not model:
        raise ConfigError(
            message("options", "--mmproj without -m", do="name the language model too")
        )
    return model, mmproj


def load_llm(
    args: argparse.Namespace,
    elastic: ElasticConfig,
    n_seq_max: int = 1,
    swa_full: bool | None = None,
) -> Any:
    """The `ElasticLlama` that the options describe; with its cache off, and a warning, where the
    model does not take an elastic one and no option asks for it.
    """
    model, mmproj = model_files(args)
    if args.ctx_size is not None and args.ctx_size < 1:
        raise ConfigError(message("options", "--ctx-size", args.ctx_size, "at least 1"))

    from ..llama import ElasticLlama
    from ..native_log import silence

    if not args.verbose:
        silence()  # main() reports what went wrong
    if args.rpc:
        from ..rpc import add_rpc_server

        for endpoint in args.rpc.split(","):
            add_rpc_server(endpoint)
    flash = {"on": True, "off": False, "auto": None}[args.flash_attn]
    if not elastic.is_off:
        check_flash(args, "leave it out, or turn the cache off (--kv-budget 1)")
        flash = True
    if args.cache_type_v not in PLAIN_TYPES and not flash:
        if args.flash_attn == "off":
            raise ConfigError(
                message(
                    "options",
                    "--cache-type-v",
                    args.cache_type_v,
                    "f32, f16 or bf16 without flash attention",
                    "add -fa on",
                )
            )
        flash = True
    return ElasticLlama(
        model,
        mmproj_path=mmproj,
        image_min_tokens=args.image_min_tokens,
        image_max_tokens=args.image_max_tokens,
        elastic="auto" if elastic == ElasticConfig() else elastic,  # nothing was asked for
        memory=_memory(args),
        n_seq_max=n_seq_max,
        memory_budget=getattr(args, "memory_budget", 0.5),
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_gpu_layers=args.gpu_layers,
        flash_attn=flash,
        swa_full=swa_full,
        type_k=KV_TYPES[args.cache_type_k],
        type_v=KV_TYPES[args.cache_type_v],
        seed=args.seed % 2**32,  # llama.cpp's random seed is its largest
        verbose=args.verbose,
    )
