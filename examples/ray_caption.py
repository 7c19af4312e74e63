"""Captions for a folder of images with Ray Data: one model per actor, on one machine or many.

pip install "ray[data]"
python examples/ray_caption.py FOLDER OUT [--actors 2] [--threads 1] [-m MODEL --mmproj MMPROJ]

Writes a folder of JSON lines. A file that is no image has an error instead of a caption.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

PARALLEL = 4  # images of an actor that are answered at once


class Captioner:
    """One `ElasticLlama`, loaded once in the actor's process."""

    def __init__(self, prompt: str, predict: int, **options: Any) -> None:
        from elastic_llama import Conversation, ElasticLlama

        self.prompt, self.predict = prompt, predict
        n_ctx = 1024 * (PARALLEL + 1)
        self.llm = ElasticLlama(n_seq_max=PARALLEL + 1, n_ctx=n_ctx, **options)
        self.chat = Conversation(self.llm)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from elastic_llama.caption import captions

        paths = [str(path) for path in batch["path"]]
        said = {c.name: c for c in captions(self.chat, paths, self.prompt, self.predict)}
        return {
            "file": np.array(paths),
            "caption": np.array([said[path].text for path in paths]),
            "error": np.array([said[path].error for path in paths]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("-p", "--prompt", default="Describe the image.")
    parser.add_argument("-n", "--predict", type=int, default=256)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each actor")
    parser.add_argument("-m", "--model")
    parser.add_argument("--mmproj")
    args = parser.parse_args()

    import ray
    from elastic_llama.image_files import image_files

    paths = [str(path.resolve()) for path in image_files(args.folder)]
    options = {
        "prompt": args.prompt,
        "predict": args.predict,
        "model_path": args.model,
        "mmproj_path": args.mmproj,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
    }
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    images = ray.data.from_items([{"path": path} for path in paths])
    images.repartition(max(1, min(len(paths), 4 * args.actors))).map_batches(
        Captioner,
        fn_constructor_kwargs=options,
        batch_size=4 * PARALLEL,
        concurrency=args.actors,
        num_cpus=args.threads,
    ).write_json(args.out)
    ray.shutdown()


if __name__ == "__main__":
    main()
