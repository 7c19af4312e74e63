"""The C program of examples/c: built as its README says against the installed package, and run."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import elastic_llama
import pytest
from elastic_llama import ElasticConfig, ElasticLlama

from tests.support.oracle_plan import left_free

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "c"
PROMPT = "the other there " * 40
N_NEW = 8


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("c")
    shutil.copy(EXAMPLE / "answer.c", folder)
    (lines,) = re.findall(r"```\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) == 3
    strict = lines.replace("cc answer.c", "cc -std=c11 -Wall -Wextra -Wpedantic -Werror answer.c")
    assert strict != lines
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", strict],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "answer"


def run(program: Path, *args: object) -> subprocess.CompletedProcess[bytes]:
    command = [str(program), *map(str, args)]
    env = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize("budget", [0.2, 0.5, 1])
def test_the_program_does_what_python_does(program: Path, tiny_gqa: Path, budget: float) -> None:
    """The same cells and the same answer; a budget of 1 keeps everything."""
    done = run(program, tiny_gqa, PROMPT, N_NEW, budget)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    match = re.fullmatch(
        rb"prompt: (\d+) tokens in (\d+) cells\n"
        rb"compressed: (\d+) tokens in (\d+) cells\n"
        rb"answer: (.*)\n"
        rb"end: (\d+) tokens in (\d+) cells\n",
        done.stdout,
        re.DOTALL,
    )
    assert match is not None, done.stdout
    config = ElasticConfig(budget=budget, layers="even", probe=0)
    with ElasticLlama(tiny_gqa, elastic=config, n_ctx=1024, flash_attn=True) as llm:
        prompt = llm.tokenize(PROMPT.encode(), special=True)
        n = len(prompt)
        kept = math.ceil(budget * n)
        kept = n if budget == 1 else kept - left_free(kept)
        stream = llm.generate(prompt, temp=0)
        answer = [next(stream) for _ in range(N_NEW)]
        stream.close()
        said = b"".join(llm.detokenize([token]) for token in answer)
    counts = [int(match[i]) for i in (1, 2, 3, 4, 6, 7)]
    assert counts == [n, n, n, kept, n + N_NEW, kept + N_NEW]
    assert match[5] == said


def test_errors_have_their_reason(program: Path, tiny_gqa: Path) -> None:
    done = run(program, tiny_gqa, PROMPT, N_NEW, -1)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: elastic_attach: [budget] got -1")
    assert run(program, "nothing.gguf", PROMPT).returncode == 1
    assert run(program).returncode == 1


def test_headers_are_those_of_the_libraries() -> None:
    """Everything that `elastic.h` includes is there, and nothing that nobody includes."""
    folder = Path(elastic_llama.get_include())
    found, todo = set(), {"elastic.h"}
    while todo:
        name = todo.pop()
        found.add(name)
        text = (folder / name).read_text()
        todo |= set(re.findall(r'^#\s*include "(.*)"', text, re.MULTILINE)) - found
    assert found == {path.name for path in folder.iterdir()}
    root = EXAMPLE.parents[1]
    assert (folder / "elastic.h").read_bytes() == (root / "cpp/runtime/elastic.h").read_bytes()
    assert Path(elastic_llama.get_library_dir()) == elastic_llama.lib_dir()
