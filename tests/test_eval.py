"""The evaluation: figures against plain NumPy, and a run as a user starts it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from elastic_llama import ConfigError, ElasticConfig, ElasticLlama
from elastic_llama.conversation import Conversation
from elastic_llama.evaluation import metrics
from elastic_llama.evaluation.figure import draw
from elastic_llama.evaluation.items import Item, read_items, scene_items
from elastic_llama.evaluation.runner import Case, Plan, Results, Runner, read_rows
from elastic_llama.evaluation.summary import paired, summarise

from tests.support.command_line import run_here


def run(*args):
    command = [sys.executable, "-m", "elastic_llama", "eval", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


# -- figures


def test_kl_and_likelihood_equal_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 11)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    target = np.array([1, 2, 3, 4, 5])
    own = metrics.forced_figures(
        metrics.log_softmax(list(a)), metrics.log_softmax(list(b)), target, skip=1
    )
    assert own["kl"] == pytest.approx((p * np.log(p / q)).sum(-1)[1:].mean(), rel=1e-4)
    assert own["nll"] == pytest.approx(-np.log(q[range(5), target]).mean(), rel=1e-5)
    assert own["agree"] == (p.argmax(-1) == q.argmax(-1))[1:].mean()


def test_one_token_answers_have_no_kl():
    x = metrics.log_softmax([np.zeros(3)])
    assert metrics.forced_figures(x, x, np.array([0]), 1) == {
        "nll": pytest.approx(math.log(3)),
        "n": 1,
    }


def test_right_answers():
    assert metrics.is_right("The code is 4829.", "4829")
    assert metrics.is_right("Red Circle", "red circle")
    assert not metrics.is_right("48291", "4829")
    assert not metrics.is_right("", "4829")


def test_summary_means_errors_and_pairs():
    def row(i, kl):
        figures = {
            "nll": 1.0 + i,
            "n": 1 + i,
            "cells": [10, 12],
            "kl": kl,
            "agree": 1.0,
            "bytes": 5,
        }
        full = {**figures, "nll": float(i), "kl": 0.0}
        return {"id": str(i), "group": "g", "cases": {"full@1/f16": full, "a@0.2/q8_0": figures}}

    rows = [row(0, 0.1), row(1, 0.3)]
    full, line = summarise(rows)
    assert (line["policy"], line["budget"], line["kv_type"], line["n"]) == ("a", 0.2, "q8_0", 2)
    assert line["kl"] == pytest.approx(0.2)
    assert line["kl_se"] == pytest.approx(np.std([0.1, 0.3], ddof=1) / math.sqrt(2))
    assert line["ppl"] == pytest.approx(math.exp((1 * 1 + 2 * 2) / 3))  # by tokens, not by items
    assert line["ppl_ratio"] == pytest.approx(math.e)
    assert paired(rows, "g", "full@1/f16", "a@0.2/q8_0")[0] == pytest.approx(0.2)
    assert full["ppl_ratio"] == 1


# -- items


def test_scene_items_ask_a_caption_and_a_question_each():
    items = scene_items("dev", 10)
    assert [i.group for i in items] == ["captions", "questions"] * 10
    assert len({i.id for i in items}) == 20
    assert all(i.exact == (i.group == "questions") for i in items)


def test_reading_the_papers_format(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": "a.jpg", "question": "What?", "answer": "That."}]))
    (item,) = read_items(path, "test")
    assert (item.image, item.prompt, item.group) == (str(tmp_path / "a.jpg"), "What?", "all")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "--data"),
        ("{}", "JSON list"),
        ('[{"question": "?"}]', "item 0"),
        ("[]", "no item"),
        (
            '[{"id": 1, "question": "?", "answer": ""}, {"id": 1, "question": "", "answer": ""}]',
            "id",
        ),
    ],
)
def test_bad_data_is_refused(tmp_path, content, words):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_items(path)


# -- runs

TEXT = "The heat of the sun warms the earth and the air above it. " * 12


@pytest.fixture(scope="module")
def text_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    rows = [
        {"id": str(i), "kind": "x", "text": TEXT, "question": f"Say {i}.", "answer": f"It is {i}."}
        for i in range(3)
    ]
    path.write_text(json.dumps(rows))
    return path


def small_plan(model, **changes):
    plan = {
        "cases": [Case("full", 1.0), Case("elastic", 0.2), Case("local", 0.2)],
        "model": str(model),
        "metrics": ("forced", "exact"),
        "parallel": 3,
    }
    return Plan(**{**plan, **changes})


def rows_of(plan, items):
    runner = Runner(plan)
    try:
        return [row for group in runner.run(items, lambda n: None) for row in group]
    finally:
        runner.close()


@pytest.mark.slow
@pytest.mark.model
def test_lanes_say_what_one_sequence_says(embedded_model):
    """Side by side from saved prompts, or one after the other as a user does it."""
    items = [Item(str(i), "x", f"Say {i}.", f"It is {i}.", text=TEXT) for i in range(3)]
    # the evaluation scores every prompt, in an op that rounds differently: policies that score, too
    policies = ("elastic", "elastic-paper")
    cases = [Case("full", 1.0), *(Case(policy, 0.2) for policy in policies)]
    rows = rows_of(small_plan(embedded_model, cases=cases), items)
    full = [r["cases"]["full@1/f16"] for r in rows]
    assert max(f["kl"] for f in full) == 0
    for policy in policies:
        config = ElasticConfig(budget=0.2, policy=policy)
        options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
        llm = ElasticLlama(embedded_model, elastic=config, **options)
        chat = Conversation(llm)
        for item, row in zip(items, rows):
            chat.clear()
            chat.prefill(item.prompt)
            answer = llm.tokenize(item.answer.encode(), add_bos=False, special=False)
            target = [*answer, llm.token_eos()]
            logits = []
            for i in range(len(target)):
                if i:
                    llm.eval([target[i - 1]])
                logits.append(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])
            own = metrics.log_softmax([np.array(x) for x in logits])
            nll = -own[np.arange(len(target)), target].mean()
            figures = row["cases"][f"{policy}@0.2/f16"]
            assert figures["nll"] == pytest.approx(nll, abs=0.02)
            assert figures["cells"][0] < llm.n_tokens / 2
        llm.close()


@pytest.mark.slow
@pytest.mark.model
def test_image_compressed_before_the_question(embedded_model, embedded_mmproj):
    """With every cell kept, it does not matter that the question came later."""
    items = [i for i in scene_items("dev", 2) if i.group == "questions"]
    cases = [Case("full", 1.0), Case("elastic", 1.0), Case("elastic", 0.2)]
    shared = {"mmproj": str(embedded_mmproj), "parallel": 2, "cases": cases}
    after = rows_of(small_plan(embedded_model, **shared), items)
    before = rows_of(small_plan(embedded_model, **shared, before=True), items)
    for a, b in zip(after, before):
        assert b["cases"]["elastic@1/f16"]["kl"] == pytest.approx(0, abs=1e-3)
        assert b["cases"]["full@1/f16"]["nll"] == pytest.approx(
            a["cases"]["full@1/f16"]["nll"], abs=0.02
        )
        assert b["cases"]["elastic@0.2/f16"]["kl"] > 1e-4


@pytest.mark.slow
@pytest.mark.model
def test_command_writes_goes_on_and_refuses_another_run(embedded_model, text_data, tmp_path):
    out = tmp_path / "out"
    args = ["-m", embedded_model, "--data", text_data, "--policies", "full,elastic", "--out", out]
    args += ["--budgets", "0.2", "--metrics", "forced,rouge"]
    done = run(*args, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "elastic" in done.stdout
    for name in ("config.yaml", "summary.csv", "kl.png", "kl.svg", "ppl.png", "rouge.png"):
        assert (out / name).stat().st_size > 0
    assert "full@1/f16" in yaml.safe_load((out / "config.yaml").read_text())["cases"]
    results = out / "results-0.jsonl"
    first = results.read_text()
    assert [json.loads(line)["id"] for line in first.splitlines()] == ["0", "1"]
    results.write_text(first + '{"id": "2", "cas')  # a crash in the middle of a line
    assert run(*args).returncode == 0
    assert results.read_text().startswith(first)
    assert [json.loads(line)["id"] for line in results.read_text().splitlines()] == ["0", "1", "2"]
    other = run(*args, "--budgets", "0.5")
    assert other.returncode == 1
    assert "cases differ" in other.stderr
    assert results.exists()


def test_shards_are_read_together(tmp_path):
    for shard in (0, 1):
        Results(tmp_path, {"a": 1}, shard).add([{"id": str(shard)}])
    assert Results(tmp_path, {"a": 1}, 1).done() == {"0", "1"}


def test_pruned_results_say_the_same_and_go_on(tmp_path):
    """What is committed of a run: packed rows, no figures but those named."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "prune_results.py"
    for shard in (1, 0):
        Results(tmp_path, {"a": 1}, shard).add([{"id": str(shard), "kl": 0.1 + 0.2}])
    with (tmp_path / "results-1.jsonl").open("a") as file:
        file.write('{"id": "cut')
    for name in ("kl.png", "kl.svg", "ppl.png"):
        (tmp_path / name).touch()
    before = read_rows(tmp_path)
    prune = [sys.executable, str(script), str(tmp_path), "--keep", "ppl.png"]
    for _ in range(2):  # the second time changes nothing
        subprocess.run(prune, check=True)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"config.yaml", "results.jsonl.gz", "ppl.png"}
        assert read_rows(tmp_path) == before
    results = Results(tmp_path, {"a": 1})
    results.add([{"id": "2"}])
    assert results.done() == {"0", "1", "2"}
    subprocess.run(prune, check=True)
    assert [row["id"] for row in read_rows(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--budgets", "much"], "--budgets"),
        (["--budgets", "1.5"], "budget"),
        (["--policies", "magic"], "policy"),
        (["-fa", "off"], "--flash-attn"),
        (["--kv-type", "q9_0", "-fa", "on"], "--kv-type"),
        (["--metrics", "beauty"], "--metrics"),
        (["--parallel", "0"], "--parallel"),
        (["--shard", "2/2"], "--shard"),
        (["--data", "nothing.json"], "--data"),
        (["--mmproj", "x.gguf"], "-m"),
    ],
)
def test_bad_options_are_refused(tmp_path, args, words, capfd):
    done = run_here(capfd, "eval", "--out", tmp_path / "out", *args)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_figure_over_bytes(tmp_path: Path) -> None:
    """Drawn where several KV types were run, and only there."""
    pytest.importorskip("matplotlib")
    lines = [
        {"group": g, "policy": p, "budget": b, "kv_type": t, "kl": kl, "bytes": size * 1e6}
        for g in ("captions", "questions")
        for p, b, t, kl, size in (
            ("full", 1.0, "f16", 0.0, 16),
            ("full", 1.0, "q8_0", 0.01, 8),
            ("full", 1.0, "q4_0", 0.1, 4),
            ("elastic", 0.5, "q8_0", 0.02, 4),
            ("elastic", 0.2, "q8_0", 0.03, 2),
        )
    ]
    names = {path.name for path in draw(lines, tmp_path)}
    assert {"kl.png", "bytes.png", "bytes.svg"} <= names
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    alone = [line for line in lines if line["kv_type"] == "f16"]
    assert "bytes.png" not in {path.name for path in draw(alone, tmp_path)}
