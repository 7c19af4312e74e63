"""Every example runs, on the embedded model; those with a server are in test_server.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import elastic_llama as el
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
#: In process, the packages that they need, and what they say.
IN_PROCESS = {
    "plain": ([], {"picture": "red square", "again": "pink circle"}),
    "langchain_in_process": (
        ["langchain_community", "langchain_core"],
        {"picture": "red square", "stream": "pink circle"},
    ),
    "instructor_client": (["instructor"], {"thing": r"Thing\(color='\w+', shape='\w+'\)"}),
}
TESTED_IN = {
    "openai_client": "test_server.py",
    "langchain_client": "test_server.py",
    "ray_caption": "test_ray_example.py",
    "snapkv_scorer": "test_python_scorer.py",
}


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*IN_PROCESS, *TESTED_IN}
    for name, file in TESTED_IN.items():
        assert name in (Path(__file__).parent / file).read_text()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESS)
def test_in_process(name: str, embedded_mmproj: Path) -> None:
    packages, expected = IN_PROCESS[name]
    for package in packages:
        pytest.importorskip(package, reason='pip install ".[examples]"')
    from elastic_llama.embedded import demo_image

    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py"), str(demo_image())],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    stats = said.pop("stats")
    assert set(said) == set(expected)
    for key, text in expected.items():
        assert re.fullmatch(text, said[key].strip())
    before, after = re.search(r"prompt (\d+) -> (\d+) cells", stats).groups()
    assert int(after) < int(before)


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}}, "required": ["a"]}


@pytest.mark.parametrize("has_images", [True, False])
def test_the_schema_of_an_openai_client(tiny_vlm: tuple[Path, Path], has_images: bool) -> None:
    """The form in which OpenAI's clients send a schema; llama-cpp-python ignores it."""
    mmproj = tiny_vlm[1] if has_images else None
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}
    ask = {"messages": [{"role": "user", "content": "a or b"}], "max_tokens": 40}
    with el.ElasticLlama(tiny_vlm[0], mmproj_path=mmproj, n_ctx=512, n_threads=1) as llm:
        format_["json_schema"]["schema"] = SCHEMA
        out = llm.create_chat_completion(**ask, response_format=format_)
        said = out["choices"][0]["message"]["content"]
        assert re.fullmatch(r'\{\s*"a"\s*:\s*"(xx|yy)"\s*\}\s*', said)
        for bad in ({}, {"name": "x"}, {"schema": "no"}, None):
            with pytest.raises(el.ConfigError, match="response_format"):
                llm.create_chat_completion(
                    **ask, response_format={"type": "json_schema", "json_schema": bad}
                )
