"""Which architectures the elastic cache takes, for docs/models.md: each is tried on a tiny model.

Usage: python scripts/model_table.py [--write | --check]

Exit status of --check: 0 if the table is what is found, 1 if not. Needs make upstream.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import zoo  # noqa: E402
from tests.support.zoo_trial import Result, try_all  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN = "<!-- architectures: scripts/model_table.py --write -->"
END = "<!-- end of architectures -->"
KINDS = {
    "plain": "every layer with attention",
    "sliding window": "layers without a sliding window",
    "hybrid": "layers with attention; the others are recurrent",
    "hybrid, sliding window": "layers with attention and no window; the others are recurrent",
}
INSTEAD = "; run this model with the elastic cache off"
NO_CELLS = "there is no KV cache: the model makes embeddings, or whole texts at once"


def table(results: list[Result]) -> str:
    """The two tables, of what works and of what does not."""
    works: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for r in results:
        (works if r.status == "works" else refused).setdefault(found(r), []).append(r.name)
    for name, why in zoo.LEFT_OUT.items():
        refused.setdefault(f"not tried: {why}", []).append(name)

    n = sum(len(names) for names in works.values())
    lines = [
        f"{n} of {len(results)} tiny models work, and {_n_architectures(works)} of the "
        f"{_n_architectures({**works, **refused})} architectures that llama.cpp names.",
        "",
    ]
    lines += ["| what is compressed | | models that work |", "| --- | --- | --- |"]
    for kind in sorted(works, key=lambda k: [*KINDS, k].index(k)):
        lines.append(_row(f"{KINDS.get(kind, kind)} | {len(works[kind])}", works[kind]))
    lines += ["", "| why it does not | | models |", "| --- | --- | --- |"]
    for why in sorted(refused, key=lambda w: (w.startswith("not tried"), w == NO_CELLS, w)):
        lines.append(_row(f"{why} | {len(refused[why])}", refused[why]))
    return "\n".join(lines)


def _n_architectures(groups: dict[str, list[str]]) -> int:
    names = {name.removesuffix(" (MoE)") for group in groups.values() for name in group}
    return len(names - zoo.VARIANTS)


def _row(left: str, names: list[str]) -> str:
    return f"| {left} | {', '.join(f'`{name}`' for name in sorted(names))} |"


def expected(page: str) -> dict[str, str]:
    """What the table says of each architecture: its kind of memory, or why it does not work."""
    kinds = {what: kind for kind, what in KINDS.items()}
    out = {}
    for line in _split(page)[1].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3:
            for name in re.findall(r"`([^`]+)`", cells[2]):
                out[name] = kinds.get(cells[0], cells[0])
    return out


def found(result: Result) -> str:
    """What the table says of a result."""
    if result.status == "works":
        return str(result.memory["kind"])
    if result.status == "refused":
        return result.why.removeprefix("[elastic_attach] ").removesuffix(INSTEAD)
    return NO_CELLS if result.status == "no cells" else f"FAILS: {result.why}"


def _split(page: str) -> tuple[str, str, str]:
    head, _, rest = page.partition(BEGIN)
    body, _, tail = rest.partition(END)
    return head, body, tail


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    parser.add_argument("--check", action="store_true", help="that docs/models.md says so")
    args = parser.parse_args(argv)
    results = []
    for result in try_all(zoo.models()):
        results.append(result)
        if result.status == "broken":
            print(f"{result.name}: {result.why}", file=sys.stderr)
    body = f"\n{table(results)}\n"
    page = PAGE.read_text(encoding="utf-8")
    head, old, tail = _split(page)
    if args.write:
        PAGE.write_text(head + BEGIN + body + END + tail, encoding="utf-8")
    elif args.check:
        print("as written" if old == body else "the table is another: run it with --write")
        return int(old != body)
    else:
        print(body)
    return int(any(r.status == "broken" for r in results))


if __name__ == "__main__":
    sys.exit(main())
