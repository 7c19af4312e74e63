"""Where only a part of the cache can be compressed, every number counts both parts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import elastic_llama as el
import llama_cpp
import pytest
from elastic_llama import _core
from elastic_llama.bench.contexts import ContextOptions
from elastic_llama.bench.measure import measure
from elastic_llama.bench.report import COLUMNS, markdown, table
from elastic_llama.bench.scenarios import Scenario
from elastic_llama.cli import main
from elastic_llama.cli.report import print_table
from elastic_llama.conversation import Conversation
from elastic_llama.evaluation.summary import summarise
from elastic_llama.pointers import address_of
from elastic_llama.stats import MIB
from PIL import Image

from tests.support.engine import Engine, random_tokens
from tests.support.mmproj_zoo import FAMILIES, write_mmproj
from tests.support.tiny_llama import write_tiny_llama
from tests.support.vision_text import N_EMBD, WIDTHS, write_text_model
from tests.test_memory_types import model

KEPT = {"budget": 0.3, "min_cells": 8}
GEMMA3_ROW = 2 * 2 * 128 * 2  # bytes of K and V of a cell in a layer: 2 heads of 128, f16
PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: windows and recurrent states
HEADER = 4096  # of a state: positions beside the rows


def test_a_window_in_bytes() -> None:
    """gemma3 of the zoo has a layer with a window and one without."""
    n = 110
    with Engine(str(model("gemma3")), KEPT, n_seq_max=2) as e:
        e.prompt(random_tokens(n, 128, 1))
        assert e.session.other_bytes(0) == n * GEMMA3_ROW
        assert e.session.other_bytes(1) == 0
        assert _core.bytes_in_use(address_of(e.ctx), 0) == (n * GEMMA3_ROW, n * GEMMA3_ROW)
        kept = e.session.compress(0)
        assert kept < 40
        stats = e.session.stats()
        assert stats["bytes_other"] == e.session.other_bytes(0) == n * GEMMA3_ROW
        assert stats["bytes_before"] - n * GEMMA3_ROW == n * 2 * 4  # a bias for each head
        assert _core.bytes_in_use(address_of(e.ctx), 0) == (kept * GEMMA3_ROW, n * GEMMA3_ROW)


def test_a_window_that_holds_no_more_than_it_needs() -> None:
    """Without swa_full: cells that were used again are not counted twice."""
    kw = {"swa_full": False, "n_ubatch": 32, "n_batch": 32, "flash_attn": True}
    with Engine(str(model("gemma3")), **kw) as e:
        for i in range(0, 640, 32):
            e.prompt(random_tokens(32, 128, i), i)
        attention, other = _core.bytes_in_use(address_of(e.ctx))
        assert attention == 640 * GEMMA3_ROW
        assert 32 * GEMMA3_ROW <= other <= 256 * GEMMA3_ROW  # llama.cpp's caches are multiples


def test_a_recurrent_state_in_bytes() -> None:
    with Engine(str(model("qwen35")), KEPT, n_seq_max=2) as e:
        sizes = []
        for n in (40, 70):
            e.prompt(random_tokens(n, 128, 1), sum(x for x, _ in sizes))
            sizes.append((n, e.session.other_bytes(0)))
        assert sizes[0][1] == sizes[1][1]  # it does not grow
        stored = llama_cpp.llama_state_seq_get_size_ext(e.ctx, 0, PARTIAL)
        assert 0 <= stored - sizes[0][1] < HEADER
        assert e.session.other_bytes(1) == 0
        e.session.compress(0)
        assert e.session.stats()["bytes_other"] == sizes[0][1]


def test_bad_sequences_are_refused() -> None:
    with Engine(str(model("gemma3")), KEPT) as e:
        for bad in (-1, 1):
            with pytest.raises(ValueError, match="seq_id"):
                _core.bytes_in_use(address_of(e.ctx), bad)
            with pytest.raises(ValueError, match="seq"):
                e.session.other_bytes(bad)
    with pytest.raises(ValueError, match="null"):
        _core.bytes_in_use(0)


N_WINDOWED, N_FULL = 3, 1  # layers of the model below
ROW = 2 * 2 * 32 * 2


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows in three of four layers; 2 KV heads of 32."""
    path = tmp_path_factory.mktemp("both") / "cohere2.gguf"
    return write_tiny_llama(path, arch="cohere2", n_layer=4, n_embd=128)


def test_figures_of_a_turn(windowed: Path, capsys: pytest.CaptureFixture) -> None:
    with el.ElasticLlama(windowed, kv_budget=0.2, n_ctx=512, n_threads=1) as llm:
        chat = Conversation(llm)
        "".join(chat.ask("the lighthouse " * 12, max_tokens=2))
        turn, stats = chat.stats, llm.stats
    n, kept = turn.cells_prompt, turn.cells_kept
    bias = 2 * 4
    assert kept < n
    assert turn.other_bytes == stats.other_bytes == N_WINDOWED * n * ROW
    assert turn.bytes_prompt == stats.bytes_before == (N_WINDOWED + N_FULL) * n * ROW + n * bias
    assert turn.bytes_kept == stats.bytes_after == turn.other_bytes + kept * (ROW + bias)
    assert turn.pruned_share == 1 - turn.bytes_kept / turn.bytes_prompt < 0.25
    window = re.search(r"windows of (\d+) tokens; compressed are 1 of 4 layers", turn.other_parts)
    assert window
    assert f"{turn.other_bytes / MIB:.2f} MiB of it not compressed" in str(stats)

    print_table([("elastic", turn)])
    out = capsys.readouterr().out
    assert "fixed MiB" in out
    assert turn.other_parts in " ".join(out.split())
    row = next(line for line in out.splitlines() if line.startswith("elastic ")).split()
    assert row[3] == f"{100 * turn.pruned_share:.0f}"
    assert row[5:8] == [
        f"{x / MIB:.2f}" for x in (turn.bytes_prompt, turn.bytes_kept, turn.other_bytes)
    ]


def test_a_cache_that_is_off_counts_alike(windowed: Path) -> None:
    with el.ElasticLlama(windowed, elastic=None, n_ctx=512, n_threads=1) as llm:
        chat = Conversation(llm)
        "".join(chat.ask("the lighthouse " * 12, max_tokens=2))
        turn = chat.stats
    assert turn.other_bytes == N_WINDOWED * turn.cells_prompt * ROW
    assert turn.bytes_prompt == turn.bytes_kept == (N_WINDOWED + N_FULL) * turn.cells_prompt * ROW
    assert turn.pruned_share == 0
    assert turn.other_parts.startswith("windows of ")


def test_plain_models_say_nothing_of_it(tiny_gqa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with el.ElasticLlama(tiny_gqa, kv_budget=0.2, n_ctx=512, n_threads=1) as llm:
        chat = Conversation(llm)
        "".join(chat.ask("the lighthouse " * 12, max_tokens=2))
        turn, stats = chat.stats, llm.stats
    assert (turn.other_bytes, turn.other_parts, stats.other_bytes) == (0, "", 0)
    assert turn.pruned_share == 1 - turn.cells_kept / turn.cells_prompt > 0.5
    assert "not compressed" not in str(stats)
    print_table([("elastic", turn)])
    assert "ixed" not in capsys.readouterr().out


def test_bench(windowed: Path) -> None:
    scenario = Scenario("two", "", 80, n_seqs=2, n_gen=8, n_parts=1)
    config = el.ElasticConfig(budget=0.25, min_cells=8)
    with el.ElasticLlama(windowed, elastic=None, n_ctx=256, n_threads=1) as llm:
        runs = measure(
            llm, scenario, ContextOptions("f16", n_ubatch=64), [config], 1, lambda _: None
        )
    by_kind = {run.kind: run for run in runs}
    assert by_kind["stock"].other_bytes == by_kind["elastic"].other_bytes == 2 * 3 * 80 * ROW
    assert by_kind["stock"].kv_bytes == 2 * 4 * 80 * ROW
    kept = by_kind["elastic"].cells_kept
    assert by_kind["elastic"].kv_bytes == 2 * (3 * 80 * ROW + kept * (ROW + 8))
    row = {**vars(by_kind["elastic"]), "scenario": {"name": "two"}}
    row["setting"] = vars(row["setting"])
    told = table([row])[0][COLUMNS.index("KV MiB")]
    kv, other = by_kind["elastic"].kv_bytes, by_kind["elastic"].other_bytes
    assert told == f"{kv / MIB:.1f} ({other / MIB:.1f} fixed)"
    assert "fixed: windows and recurrent states, which are not compressed" in markdown([row])


@pytest.fixture(scope="module", params=["gemma3", "qwen3.5"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("files")
    text = write_text_model(folder / "text.gguf", family.text, family.tokens)
    mmproj = write_mmproj(folder / "mmproj.gguf", family, WIDTHS.get(family.text, N_EMBD))
    return ["-m", str(text), "--mmproj", str(mmproj), "-t", "1"]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.effect_noise((112, 56), 90).save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def test_commands(
    files: list[str], picture: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`describe --compare` and `show` name both parts; the full cache and the elastic one agree."""
    what = "(windows of \\d+ tokens|recurrent states); compressed are (\\d) of (\\d) layers"
    options = [*files, "--kv-budget", "0.3", "-c", "512", "-p", "what is it? " * 9]
    assert main(["describe", picture, "--compare", "-n", "2", *options]) in (0, None)
    out = capsys.readouterr().out
    said = re.search(what, " ".join(out.split()))
    assert said
    assert int(said[2]) < int(said[3])
    full, elastic = (line.split() for line in out.splitlines() if line.startswith(("full ", "el")))
    assert full[-6] == elastic[-6]  # fixed MiB
    assert float(full[-6]) > 0

    pytest.importorskip("matplotlib")
    shown = str(tmp_path / "kept.png")
    assert main(["show", picture, *options, "-o", shown]) in (0, None)
    assert re.search(
        r"MiB of the whole memory, of which .* MiB are not compressed: " + what,
        capsys.readouterr().out,
    )


def test_eval_counts_both_parts(windowed: Path, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    data = tmp_path / "data.json"
    text = "The keeper of the lighthouse wrote down how high the tide was. " * 4
    data.write_text(json.dumps([{"id": "a", "group": "g", "question": text, "answer": "yes"}]))
    rows = _evaluate(windowed, data, tmp_path / "out")
    full, kept = (rows[0]["cases"][case] for case in ("full@1/f16", "elastic@0.25/f16"))
    assert full["other_bytes"] == kept["other_bytes"] > 0
    assert kept["bytes"] == kept["other_bytes"] + kept["cells"][0] * (ROW + 8)
    assert summarise(rows)[0]["other_bytes"] == full["other_bytes"]


def _evaluate(path: Path, data: Path, out: Path) -> list[dict]:
    options = ["-m", str(path), "--policies", "full,elastic", "--budgets", "0.25", "-t", "1"]
    code = main(["eval", "--data", str(data), "--out", str(out), *options, "--parallel", "2"])
    assert code in (0, None)
    return [json.loads(line) for f in out.rglob("*.jsonl") for line in f.read_text().splitlines()]
