"""Makes of a folder of results what is committed: config, summary, all rows in one packed file.

python benchmarks/prune_results.py FOLDER [FOLDER ...] [--keep ppl.png]

No row is lost: `report.py`, `compare_runs.py` and `elastic-llama eval` read packed rows as well.
`report.py --figures DIR` draws the figures again; `--keep` names those that a page shows.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

PACKED = "results.jsonl.gz"


def prune(folder: Path, keep: set[str]) -> None:
    packed = folder / PACKED
    rows = gzip.decompress(packed.read_bytes()) if packed.exists() else b""
    shards = sorted(folder.glob("results-*.jsonl"))
    for shard in shards:
        text = shard.read_bytes()
        rows += text[: text.rfind(b"\n") + 1]  # without the half line of a crash
    if shards:
        new = packed.with_suffix(".new")
        new.write_bytes(gzip.compress(rows, 9, mtime=0))  # the same rows make the same file
        new.replace(packed)
    for shard in shards:
        shard.unlink()
    for figure in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        if figure.name not in keep:
            figure.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", action="append", default=[], metavar="FIGURE")
    args = parser.parse_args()
    for folder in args.folders:
        if not (folder / "config.yaml").exists():
            parser.error(f"{folder} holds no run of `elastic-llama eval`")
        prune(folder, set(args.keep))


if __name__ == "__main__":
    main()
