"""docs/policies.md, followed literally: one file and one line make a policy that plans."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "policies.md"

N_LAYER, N_HEAD, N_CELLS, D, N_KEEP = 2, 2, 30, 8, 11

# reads keys, writes the kept cells of a plan
PROGRAM = """
#include "core/policy.h"

#include <algorithm>
#include <cstdio>

using namespace elastic;

constexpr int32_t n_layer = @L@, n_head = @H@, n = @T@, d = @D@;

struct given_rows : row_source {
    std::vector<float> k = std::vector<float>(n_layer * n_head * n * d);

    int32_t n_embd_head_k() const override { return d; }
    int32_t n_embd_head_v() const override { return d; }
    void    load_k(int32_t il, int32_t ih, float * dst) const override {
        std::copy_n(k.data() + (il * n_head + ih) * n * d, n * d, dst);
    }
    void load_v(int32_t il, int32_t ih, float * dst) const override { load_k(il, ih, dst); }
};

int main() {
    for (const auto & pol : policies()) {
        fprintf(stderr, "%s: %s\\n", pol.name.c_str(), pol.summary.c_str());
    }
    given_rows rows;
    if (fread(rows.k.data(), sizeof(float), rows.k.size(), stdin) != rows.k.size()) {
        return 1;
    }
    cells c;
    c.kind.assign(n, cell_kind::text);
    c.pinned.assign(n, 0);
    const importance_map none = { head_map(n_layer, n_head, n), {} };
    const plan           p    = make_plan(find_policy("@NAME@"), { @N@, 1, {}, 0 }, c, none, &rows);
    validate(p, c, 1);
    fwrite(p.kept.data(), sizeof(int32_t), p.kept.size(), stdout);
    return 0;
}
"""


def documented() -> tuple[str, str, str]:
    """Path of the file, its text, and the line of the registry."""
    text = DOC.read_text(encoding="utf-8")
    path = re.search(r"goes into\s+`(cpp/core/policies/\w+\.cpp)`", text)
    blocks = re.findall(r"```cpp\n(.*?)```", text, re.S)
    assert path is not None
    return path[1], blocks[0], blocks[1]


def with_policy(folder: Path) -> tuple[Path, str]:
    """A copy of the core with the documented policy, and its name."""
    path, text, line = documented()
    for part in ("core", "kernels"):
        shutil.copytree(ROOT / "cpp" / part, folder / "cpp" / part)
    (folder / path).write_text(text, encoding="utf-8")
    registry = folder / "cpp" / "core" / "registry.cpp"
    lines = registry.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(i for i, x in enumerate(lines) if "ADD(snapkv)" in x)
    registry.write_text("".join([*lines[: at + 1], line, *lines[at + 1 :]]), encoding="utf-8")
    return folder / "cpp", Path(path).stem


def build(folder: Path, name: str, sources: Path) -> Path:
    program = folder / "main.cpp"
    values = {"L": N_LAYER, "H": N_HEAD, "T": N_CELLS, "D": D, "N": N_KEEP, "NAME": name}
    program.write_text(re.sub(r"@(\w+)@", lambda m: str(values[m[1]]), PROGRAM))
    core = sources / "core"
    parts = [
        p for p in core.glob("*.cpp") if p.stem != "merge"
    ]  # only a merge touches K and V, as ggml stores them
    parts.append(sources / "kernels" / "distances.cpp")
    out = folder / "plan"
    options = ["-std=c++17", "-O0", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    files = [program, *parts, *(core / "policies").glob("*.cpp")]
    subprocess.run(["g++", *options, f"-I{sources}", *files, "-o", out], check=True)
    return out


def expected(keys: np.ndarray) -> np.ndarray:
    """The first and the last cell, and the keys least like the mean, in rank order."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    likeness = (unit * unit.mean(axis=2, keepdims=True)).sum(-1)
    kept = np.empty((N_LAYER, N_HEAD, N_KEEP), np.int32)
    for at in np.ndindex(N_LAYER, N_HEAD):
        free = sorted(range(1, N_CELLS - 1), key=lambda i: likeness[at][i])
        kept[at] = [0, *free[: N_KEEP - 2], N_CELLS - 1]
    return kept


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_documented_policy_compiles_and_plans(tmp_path):
    sources, name = with_policy(tmp_path)
    program = build(tmp_path, name, sources)
    keys = np.random.default_rng(0).standard_normal((N_LAYER, N_HEAD, N_CELLS, D)) + 0.5
    keys = keys.astype(np.float32)
    done = subprocess.run([program], input=keys.tobytes(), capture_output=True, check=True)
    rows = dict(line.split(": ", 1) for line in done.stderr.decode().splitlines())
    names = list(rows)
    assert names.index(name) == names.index("snapkv") + 1
    assert rows[name] == "keys least like the others per KV head (KeyDiff)"
    kept = np.frombuffer(done.stdout, np.int32).reshape(N_LAYER, N_HEAD, N_KEEP)
    np.testing.assert_array_equal(kept, expected(keys.astype(np.float64)))


def test_the_example_is_formatted_as_the_core_is(tmp_path):
    """`make format` would leave the documented file as it is."""
    tool = shutil.which("clang-format") or str(ROOT / ".venv" / "bin" / "clang-format")
    if not Path(tool).exists():
        pytest.skip("needs clang-format")
    text = documented()[1]
    shutil.copy(ROOT / ".clang-format", tmp_path)
    file = tmp_path / "example.cpp"
    file.write_text(text)
    done = subprocess.run([tool, file], capture_output=True, text=True, check=True)
    assert done.stdout == text
