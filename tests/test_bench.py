"""The benchmark measures what it says: cells, turns, rows, ratios. No test looks at a speed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.bench.contexts import Context, ContextOptions, Ideal, Prompts
from elastic_llama.bench.measure import measure, n_steps
from elastic_llama.bench.report import COLUMNS, markdown, ratios, table
from elastic_llama.bench.scenarios import Scenario, find_scenarios
from elastic_llama.cli import main
from elastic_llama.errors import ConfigError

from tests.support.engine import held_after
from tests.support.oracle_plan import left_free

ONE = Scenario("one", "", 40, (100,), n_gen=20, n_parts=2)
TWO = Scenario("two", "", 140, (), n_seqs=2, n_gen=20, n_parts=2)
CAPPED = Scenario("capped", "", 40, (300, 300), n_gen=20, n_parts=2, kv_cells=80)


@pytest.fixture(scope="module")
def llm(tiny_gqa: Path) -> Any:
    with ElasticLlama(tiny_gqa, elastic=None, n_ctx=256) as model:
        yield model


@pytest.mark.parametrize("scenario", [ONE, TWO, CAPPED], ids=lambda s: s.name)
@pytest.mark.parametrize("overdraft", [None, 0, 5])
def test_runs(llm: ElasticLlama, scenario: Scenario, overdraft: int | None) -> None:
    ticks: list[str] = []
    config = ElasticConfig(budget=0.5, min_cells=8, overdraft=overdraft)
    setting = ContextOptions("f16", n_ubatch=64)
    measured = measure(llm, scenario, setting, [config], 2, ticks.append, [False, True])
    kinds = [("stock", False), ("stock", True), ("elastic", True), ("ideal", True)]
    assert [(run.kind, run.setting.flash_attn) for run in measured] == kinds
    assert len(ticks) == n_steps(scenario, 2, 1, 2)
    runs = {run.kind: run for run in measured}

    n = scenario.n_prompt
    kept = min(math.ceil(0.5 * n), scenario.kv_cells or n)
    kept -= left_free(kept)
    end = kept
    for i in range(18):  # 2 + 8 + 8 tokens generated
        promised = min(math.ceil(0.5 * (n + i + 1)), scenario.kv_cells or n)
        end = held_after(end, promised, 32 if overdraft is None else overdraft, scenario.kv_cells)
    if overdraft == 0:
        assert end == min(math.ceil(0.5 * (n + 18)), scenario.kv_cells or n)
    assert (runs["stock"].cells_kept, runs["stock"].cells_end) == (n, n + 18)
    assert (runs["elastic"].cells_kept, runs["elastic"].cells_end) == (kept, end)
    assert (runs["ideal"].cells_kept, runs["ideal"].cells_end) == (kept, end)
    for run in measured:
        assert len(run.decode_tps) == scenario.n_parts
        assert min(run.decode_tps + run.prefill_s) > 0
        assert run.n_steps == 16
    assert [len(r.prefill_s) for r in runs.values()] == [2, 2, 1]
    assert runs["elastic"].plan_s > 0
    assert (runs["elastic"].probe_s > 0) == (scenario is TWO)  # text only
    bias = 3 * 2 * 4  # bytes of a cell, beside K and V
    per_cell = runs["stock"].kv_bytes // (n * scenario.n_seqs)
    assert runs["elastic"].kv_bytes == (per_cell + bias) * kept * scenario.n_seqs


@pytest.mark.parametrize("overdraft", [None, 0, 5])
@pytest.mark.parametrize("kv_cells", [None, 60, 24])
@pytest.mark.parametrize("budget", [0.2, 50])
def test_ideal_holds_what_elastic_does_at_every_token(
    llm: ElasticLlama, budget: float, kv_cells: int | None, overdraft: int | None
) -> None:
    """120 tokens: more than one overdraft, under a cap too, and one that is all of the cap."""
    scenario = Scenario("x", "", 150, n_gen=120)
    config = ElasticConfig(
        budget=budget, min_cells=8, overdraft=overdraft, kv_cells=kv_cells, n_sink=4
    )
    setting = ContextOptions(n_ubatch=64)
    elastic = Context(llm, setting, 1, 256, config)
    stock = Context(llm, setting, 1, 256)
    try:
        prompts = Prompts(llm, scenario)
        elastic.prefill(prompts.parts(), 0)
        elastic.session.compress(0)
        held = elastic.n_cells()
        stock.prefill([prompts.tokens[:held]], 0)
        ideal = Ideal(stock, config, 150, held)
        found, expected = [], []
        for i, token in enumerate(prompts.tokens[150:]):
            elastic.step(token, 150 + i)
            ideal.step(token)
            found.append(elastic.n_cells())
            expected.append(ideal.n_now)
        assert found == expected
        assert max(found) <= (kv_cells or 1000)
        memory = stock.memory
        assert llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1 == ideal.n_now
        assert llama_cpp.llama_memory_seq_pos_min(memory, 0) == 0
    finally:
        elastic.close()
        stock.close()


def _row(kind: str, tps: list[float], prefill: list[float], **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "scenario": {"name": "x"},
        "setting": {"kv_type": "f16", "flash_attn": True},
        "kind": kind,
        "budget": None if kind == "stock" else 0.2,
        "cells_prompt": 640,
        "cells_kept": 128 if kind != "stock" else 640,
        "prefill_s": prefill,
        "decode_tps": tps,
        "plan_s": 0.0,
        "merge_s": 0.0,
        "probe_s": 0.0,
        "kv_bytes": 1 << 20,
        "bytes_freed": 2 << 20,
        "rss": {"prompt": 2 << 20, "compressed": 1 << 20},
    }
    return {**row, **more}


def test_ratios_compare_the_same_part() -> None:
    """Part by part, so that a disturbance that hits all of a part cancels."""
    plain = {"kv_type": "f16", "flash_attn": False}
    rows = [
        _row("stock", [8.0, 4.0, 10.0], [1.0, 2.0], setting=plain),
        _row("stock", [10.0, 5.0, 10.0], [2.0, 4.0]),
        _row("elastic", [12.0, 6.0, 13.0], [2.0, 4.2], plan_s=0.1, merge_s=0.1, probe_s=0.3),
        _row("ideal", [12.0, 6.0, 10.0], [1.0]),
    ]
    own = ratios(rows)
    assert own[0] == own[1] == own[3] == {}
    assert own[2]["stock off"] == pytest.approx(1.5)
    assert own[2]["stock on"] == pytest.approx(1.2)
    assert own[2]["ideal"] == pytest.approx(1.0)
    assert own[2]["cost"] == pytest.approx((0.1 + 0.1) / 2)
    assert own[2]["probe"] == pytest.approx(0.1)
    cells = dict(zip(COLUMNS, table(rows)[2]))
    assert cells["probe"] == "+10.0 %"
    assert cells["x stock, fa off"] == "1.500"
    assert cells["x stock, fa on"] == "1.200"
    assert cells["RSS freed MiB"] == "1.0 of 2.0"
    assert markdown(rows).count("\n") == 5


def test_the_cost_is_that_of_the_only_stock_there_is() -> None:
    plain = {"kv_type": "f16", "flash_attn": False}
    rows = [
        _row("stock", [10.0], [2.0], setting=plain),
        _row("elastic", [12.0], [2.0], plan_s=0.2),
    ]
    assert ratios(rows)[1]["cost"] == pytest.approx(0.1)
    assert "stock on" not in ratios(rows)[1]


def test_other_settings_are_no_partners() -> None:
    other = {"kv_type": "q8_0", "flash_attn": True}
    rows = [_row("stock", [10.0], [1.0], setting=other), _row("elastic", [12.0], [1.0])]
    assert ratios(rows)[1] == {}


def test_command(tiny_gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["bench", "-m", str(tiny_gqa), "--scenarios", "image", "-n", "20", "-r", "1"]
    assert main([*command, "-t", "1", "-fa", "off", "--budgets", "0.5,0.2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(r["kind"], r["budget"], r["setting"]["flash_attn"]) for r in rows] == [
        ("stock", None, False),
        ("elastic", 0.5, True),
        ("elastic", 0.2, True),
        ("ideal", 0.5, True),
        ("ideal", 0.2, True),
    ]
    assert rows[2]["cells_kept"] == 128 - 4
    assert capsys.readouterr().out.count("| image |") == 5


def test_what_was_measured_is_shown_on_ctrl_c(
    tiny_gqa: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import elastic_llama.bench.measure as module

    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    real = module.measure
    monkeypatch.setattr(module, "measure", interrupted)
    command = ["bench", "-m", str(tiny_gqa), "-n", "20", "-r", "1", "-t", "1"]
    assert main([*command, "--kv-types", "f16,q8_0"]) == 130
    out = capsys.readouterr().out
    assert out.count("| image | f16 | off |") == 1
    assert out.count("| image | f16 | on |") == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ["--scenarios", "nope"],
        ["--scenarios", ","],
        ["--policy", "full"],
        ["--budgets", "0.2,1"],
        ["--budgets", "many"],
        ["--budgets", "0"],
        ["--kv-types", "f99"],
        ["--kv-types", "q8_0", "-fa", "off"],
        ["-fa", "perhaps"],
        ["-r", "0"],
        ["-n", "1"],
        ["-t", "0"],
        ["--out", "/nonexistent/rows.jsonl"],
    ],
)
def test_bad_arguments(tiny_gqa: Path, wrong: list[str], capsys: Any) -> None:
    assert main(["bench", "-m", str(tiny_gqa), *wrong]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.out == ""


def test_scenarios_by_name() -> None:
    assert [s.name for s in find_scenarios("hires, image")] == ["hires", "image"]
    with pytest.raises(ConfigError, match="images8"):
        find_scenarios("nope")
