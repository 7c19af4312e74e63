"""Tests of llama.cpp and of llama-cpp-python themselves, on our libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts.build_stock import source
from tests.support.tiny_llama import write_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build-upstream"

pytestmark = pytest.mark.slow


def run(
    name: str,
    *args: object,
    cwd: Path,
    budget: float | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """What a test of llama.cpp prints; with a budget each of its contexts has an elastic cache."""
    program = BUILT / name
    if not program.is_file():
        pytest.fail(f"{program} is missing: run make upstream", pytrace=False)
    env = {**os.environ, **(env or {})}
    if budget is not None:
        env.update(LD_PRELOAD=str(BUILT / "libattach_everywhere.so"), ELASTIC_BUDGET=str(budget))
    command = [str(a) for a in (program, *args)]
    done = subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=300
    )
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    return out


def compressions(out: str) -> list[int]:
    """Of each context that the preloaded library attached to."""
    return [int(n) for n in re.findall(r"elastic: (\d+) compressions", out)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upstream")
    write_tiny_llama(folder / "gqa.gguf", n_layer=3, n_embd=256, n_head=4, n_head_kv=2, n_ff=256)
    write_tiny_llama(folder / "mha.gguf", n_layer=2, n_embd=128, n_head=4, n_head_kv=4, seed=1)
    return folder


def test_batch_alloc(tmp_path: Path) -> None:
    out = run("test-batch-alloc", cwd=tmp_path)
    counts = dict(re.findall(r"(assertions|failures|exceptions|skipped)\s*: (\d+)", out))
    assert int(counts.pop("assertions")) > 0
    assert counts == {"failures": "0", "exceptions": "0", "skipped": "0"}


@pytest.mark.parametrize(
    ("budget", "flash_attn"), [(None, "on"), (None, "off"), (1.0, "on"), (0.5, "on"), (0.2, "on")]
)
def test_save_load_state(
    models: Path, budget: float | None, flash_attn: str, tmp_path: Path
) -> None:
    """All nine parts. With an elastic cache too: what is saved, loaded, copied is all there is."""
    out = run(
        "test-save-load-state", "--models", models, "-fa", flash_attn, cwd=tmp_path, budget=budget
    )
    table = [re.findall(r"PASS|FAIL|SKIP", line) for line in out.splitlines() if ".gguf" in line]
    assert table == [["PASS"] * 9] * 2
    if budget is not None:
        assert (max(compressions(out)) > 0) == (budget < 1)


@pytest.mark.parametrize("budget", [None, 1.0, 0.5, 0.2])
def test_state_restore_fragmented(models: Path, budget: float | None, tmp_path: Path) -> None:
    """A sequence that is compressed, saved, removed and loaded between the cells of two others."""
    program, env = "test-state-restore-fragmented", {"ELASTIC_COMPRESS_SAVED": "1"}
    out = run(program, "-m", models / "gqa.gguf", cwd=tmp_path, budget=budget, env=env)
    assert "SUCCESS" in out
    if budget is not None:
        assert max(compressions(out)) == (budget < 1)


@pytest.mark.model
@pytest.mark.parametrize("budget", [None, 5.0])
def test_thread_safety(embedded_model: Path, budget: float | None, tmp_path: Path) -> None:
    """Contexts of two models, each decoding in a thread of its own."""
    prompt = "The meaning of life is the question of what makes it worth living, and"
    args = ("-p", prompt, "-n", 16, "-c", 256, "-ub", 32, "-np", 2, "-t", 1)
    out = run("test-thread-safety", "-m", embedded_model, *args, cwd=tmp_path, budget=budget)
    assert "All threads finished without errors." in out
    if budget is not None:
        assert compressions(out) == [1] * 4


# what the tests of llama-cpp-python expect of a model that they download, and the embedded one says
SAID = {
    '" jumps over the lazy dog."': '" is a classic example of a"',
    "[9419, 11, 1814, 0]": "[19556, 28, 905, 17]",
}


@pytest.mark.model
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_llama_cpp_python(embedded_model: Path, budget: float, tmp_path: Path) -> None:
    """Its own tests, of the archive that the build comes from, with `ElasticLlama` for `Llama`."""
    archive = source.fetch(source.read_pin(ROOT / "patches" / "llama-cpp.pin"), source.cache_dir())
    top = archive.name[: -len(".tar.gz")]
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = member.name.partition("/")[2]
            if name.startswith("tests/") or name.endswith("/ggml-vocab-llama-spm.gguf"):
                tar.extract(member, tmp_path)
    tests = tmp_path / top / "tests" / "test_llama.py"
    content = tests.read_text()
    for theirs, ours in SAID.items():
        assert theirs in content
        content = content.replace(f"== {theirs}", f"== {ours}")
    tests.write_text(content)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ELASTIC_UPSTREAM_MODEL": str(embedded_model),
        "ELASTIC_UPSTREAM_BUDGET": str(budget),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.upstream_python", "-rs", "-q"]
    done = subprocess.run(
        [*command, "--import-mode=importlib", "tests"],
        env=env,
        cwd=tmp_path / top,
        capture_output=True,
        text=True,
        timeout=600,
    )
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    assert re.search(r"\b15 passed, 11 skipped\b", out), out
    assert ("\n0 compressions" in out) == (budget == 1)
    reasons = re.findall(r"SKIPPED \[(\d+)\] \S+ (.*)", out)
    assert sum(int(n) for n, _ in reasons) == 11
    assert all(reason.endswith("which is not supported") for _, reason in reasons), out
