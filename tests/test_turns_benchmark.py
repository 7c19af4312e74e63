"""The table of turns: its conversations, how they are scored and resumed, and its figures."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from elastic_llama import Conversation, ElasticConfig, ElasticLlama
from elastic_llama.scenes import KINDS, Cell, Scene, Turn
from elastic_llama.scenes.questions import Question, caption
from elastic_llama.scenes.scenarios import SCENARIOS, _ask, make_scenario

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("turns")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("turns_report")


def kinds(name, index):
    return [turn.question.kind for turn in make_scenario("dev", name, index, 3)]


# -- conversations


def test_plans():
    for i in range(6):
        assert sorted(kinds("questions", i)) == sorted(KINDS[1:])
        last = kinds("caption-last", i)
        assert len(last) == 4 + i % 2
        assert last.index("caption") == len(last) - 1
        assert kinds("again", i) == ["caption", "caption"]
        assert [k == "text" for k in kinds("text-between", i)] == [False, True, False, True, False]
        two = make_scenario("dev", "two-images", i, 3)
        assert [len(turn.images) for turn in two] == [1, 0, 1, 0, 0]
        assert [turn.about for turn in two] == [0, 0, 1, 0, 1]
        assert two[3].question.text.startswith("In the first image: W")
        assert two[4].question.text.startswith("In the second image: W")


def test_scenes_are_nobody_elses():
    seeds = []
    for name in SCENARIOS:
        for i in range(8):
            turns = make_scenario("test", name, i)
            assert turns == make_scenario("test", name, i)
            seeds += [scene.seed for turn in turns for scene in turn.images]
    assert len(set(seeds)) == len(seeds) == 8 * 6


def test_scene_without_an_object():
    """A row is asked for instead of what is not there."""
    scene, rng = Scene(2, (Cell(),) * 4, 0), np.random.default_rng(0)
    asked = [_ask(scene, kind, rng).kind for kind in KINDS]
    assert asked == ["caption", "row", "cell", "row", "row", "row"]


# -- scores


SCENE = Scene(2, (Cell("red", "star"), Cell(), Cell("blue", "heart"), Cell("pink", "cross")), 0)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (caption(SCENE), 3),
        ("row 1: red star, blue heart. row 2: blue heart, pink star.", 2),
        ("row 1: red star.", 1),
        ("A red star.", 0),
    ],
)
def test_objects_right(turns, said, right):
    assert turns.objects_right(SCENE, said) == [right, 3]


def test_score(turns):
    turn = Turn((), Question("caption", "?", caption(SCENE)), 0)
    good = turns.score(turn, SCENE, f" {caption(SCENE)}\n")
    assert (good["right"], good["objects"]) == (True, [3, 3])
    bad = turns.score(Turn((), Question("text", "?", "9."), -1), None, "9")
    assert (bad["right"], bad["expected"]) == (False, "9.")


# -- runs


def test_settings(turns):
    given = turns.fields("layers=even probe=4")
    assert given == {"layers": "even", "probe": 4}
    made = turns.settings(turns.POLICIES, turns.BUDGETS, given)
    assert len(made) == 29
    assert made[0].is_off
    assert {config.probe for config in made[1:]} == {4}


def test_shards_share_the_conversations(turns):
    def run(shard):
        return turns.jobs(turns.parse(["--out", "x", "--items", "3", "--shard", shard]))

    assert len(run("0/1")) == 15
    assert sorted(run("0/2") + run("1/2")) == sorted(run("0/1"))
    assert not set(run("0/2")) & set(run("1/2"))


@pytest.fixture
def run(turns, tiny_vlm, tmp_path):
    """Run the command with a tiny model that answers nothing; returns the lines of its file."""

    def go(*more):
        out = tmp_path / "turns.jsonl"
        args = ["--out", out, "--items", 1, "--scenarios", "two-images", "--max-tokens", 12]
        args += ["--model", tiny_vlm[0], "--mmproj", tiny_vlm[1], "--n-ctx", 1024]
        args += ["--policies", "full,elastic", "--config", "min_cells=8 layers=even"]
        turns.main([str(arg) for arg in [*args, *more]])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return go


def test_a_run_goes_on(run, tmp_path):
    lines = run("--budgets", "0.5")
    assert [(x["policy"], x["budget"], len(x["turns"])) for x in lines] == [
        ("full", 1.0, 5),
        ("elastic", 0.5, 5),
    ]
    path = tmp_path / "turns.jsonl"
    with path.open("a") as file:
        file.write('{"tag": "", "id')  # a crash in the middle of a line
    more = run("--budgets", "0.5,0.3")
    assert more[:2] == lines
    assert [x["budget"] for x in more[2:]] == [0.3]
    with pytest.raises(SystemExit, match="another run"):
        run("--budgets", "0.5", "--max-tokens", "3")
    assert len(run("--budgets", "0.5", "--max-tokens", "3", "--tag", "short")) == 5


def test_a_shared_prompt_says_what_one_of_its_own_says(run, turns, tiny_vlm):
    """A user's conversation, whose first prompt is decoded, not loaded."""
    lines = {x["policy"]: x for x in run("--budgets", "0.5")}
    config = ElasticConfig(budget=0.5, min_cells=8, layers="even", n_threads=1)
    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
    with ElasticLlama(tiny_vlm[0], mmproj_path=tiny_vlm[1], elastic=config, **options) as llm:
        chat = Conversation(llm)
        for turn, found in zip(make_scenario("dev", "two-images", 0, 3), lines["elastic"]["turns"]):
            images = [scene.render() for scene in turn.images]
            said = "".join(chat.ask(turn.question.text, images, max_tokens=12))
            assert (found["answer"], found["cells"]) == (said, llm.stats.cells)
        assert llm.stats.compressions > 0
        chat.close()


def test_forced_answers_are_as_likely_as_computed(run, tiny_vlm):
    """Of the first answer, whose tokens are decoded by hand behind the question."""
    found = run("--forced", "--policies", "full")[0]["turns"]
    turns = make_scenario("dev", "two-images", 0, 3)
    assert [x["answer"].strip() for x in found] == [turn.question.answer for turn in turns]
    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
    with ElasticLlama(tiny_vlm[0], mmproj_path=tiny_vlm[1], elastic=None, **options) as llm:
        chat = Conversation(llm)
        chat.prefill(turns[0].question.text, [scene.render() for scene in turns[0].images])
        answer = llm.tokenize(turns[0].question.answer.encode(), False, False)
        nll = 0.0
        for token in [*answer, llm.token_eos()]:
            row = last_logits(llm)
            nll -= math.log(np.exp(row)[token] / np.exp(row).sum())
            llm.eval([token])
        chat.close()
    assert found[0]["nll"] == pytest.approx(nll, rel=1e-3)
    assert not found[0]["right"]  # random weights


def test_forced_answers_say_how_far_from_the_full_cache(run, turns):
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    q = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert turns.divergence(list(p), list(q)) == pytest.approx(expected, rel=1e-5)
    lines = {x["policy"]: x["turns"] for x in run("--forced", "--budgets", "0.2")}
    assert all("kl" not in turn for turn in lines["full"])
    assert all(turn["kl"] >= 0 for turn in lines["elastic"])
    assert lines["elastic"][4]["kl"] > 0


def last_logits(llm):
    row = llama_cpp.llama_get_logits(llm._ctx.ctx)  # of the only output
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).astype(np.float64)


# -- figures


def line(policy, name, right, *, kind="cell", cells=10):
    shown = [{"kind": k, "right": r, "cells": cells, "answer": ""} for k, r in zip(kind, right)]
    budget = 1.0 if policy == "full" else 0.2
    row = {"tag": "", "id": name, "scenario": "questions", "policy": policy, "budget": budget}
    return {**row, "turns": shown}


def test_tables(report, tmp_path):
    kind = ("cell", "text", "row")
    rows = [
        line("full", "a", (True, True, True), kind=kind),
        line("full", "b", (True, False, True), kind=kind),
        line("elastic", "a", (True, True, False), kind=kind),
        line("elastic", "b", (False, False, True), kind=kind),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    settings = report.read([path])
    lines = report.summary(settings).splitlines()
    assert lines[2].startswith("| `full` | 1 | 2 | 100.0 ± 0.0 (2) |  | 100.0 ± 0.0 (2) |")
    half = "50.0 ± 50.0 (2) | -50.0 ± 50.0"
    assert lines[3].startswith(f"| `elastic` | 0.2 | 2 | {half} | {half} |")
    assert report.by_scenario(settings).splitlines()[3].endswith("| 50.0 ± 50.0 (2) |")
    assert "turn 5" in report.by_turn(settings)


def test_common_conversations(report):
    settings = {("", "a", 1.0): {"x": {}, "y": {}}, ("", "b", 0.2): {"y": {}, "z": {}}}
    assert [list(rows) for rows in report.common(settings).values()] == [["y"], ["y"]]


def test_standard_error_is_over_conversations(report):
    share, se = report.ratio([(2, 4), (4, 4), (3, 4)])
    assert share == pytest.approx(0.75)
    assert se == pytest.approx(0.25 / math.sqrt(3))
