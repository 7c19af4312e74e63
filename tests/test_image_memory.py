"""The image memory: an answer from it is that of a run which compressed the same prefix."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import elastic_llama as el
import numpy as np
import pytest
import safetensors.numpy
from elastic_llama.images import to_data_uri
from elastic_llama.memory import DamagedFileError, Entry, ImageMemory, MemoryFolder
from elastic_llama.memory.container import pack, unpack
from elastic_llama.memory.packing import PART, pack_state, unpack_state
from elastic_llama.memory.reader import leading_images
from elastic_llama.pieces import ImagePiece, TextPiece
from llama_cpp import mtmd_cpp
from PIL import Image

TEXT = "the heat on the earth " * 8
IMAGES = {c: Image.new("RGB", (30, 20), c) for c in ("red", "blue", "green")}


@pytest.fixture
def counts(monkeypatch) -> SimpleNamespace:
    """Images that were encoded."""
    out = SimpleNamespace(encoded=0)
    encode = mtmd_cpp.mtmd_encode_chunk

    def counted(*args):
        out.encoded += 1
        return encode(*args)

    monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", counted)
    return out


@pytest.fixture
def load(tiny_vlm):
    def make(**kwargs):
        options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "mmproj_path": tiny_vlm[1]}
        elastic = el.ElasticConfig(budget=kwargs.pop("budget", 0.3), min_cells=4)
        return el.ElasticLlama(tiny_vlm[0], **{"elastic": elastic, **options, **kwargs})

    return make


def said(chat: el.Conversation, question: str, images=(), n: int = 16) -> str:
    return "".join(chat.ask(question, images, max_tokens=n))


def without_memory(llm, questions: list[str], image, budget: float, n: int = 16) -> list[str]:
    """What a conversation says whose first image is compressed by hand before the question."""
    chat = el.Conversation(llm)
    pieces = chat._extended(*chat._question(questions[0], image))[1]
    k = 1 + max(i for i, piece in enumerate(pieces) if isinstance(piece, ImagePiece))
    llm.prefill(pieces[:k])
    if llm.session is not None:
        llm.session.compress_prefix(budget)
    out = [said(chat, questions[0], image, n)]
    return out + [said(chat, question, (), n) for question in questions[1:]]


OPTIONS = [
    {},
    {"budget": 0.8, "memory_budget": 8},
    {"n_batch": 7, "n_ubatch": 7},
    {"elastic": el.ElasticConfig(budget=0.3, policy="h2o", min_cells=4)},
    {"elastic": el.ElasticConfig(budget=0.3, kv_cells=40, min_cells=4)},
    {"elastic": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_answer_from_memory_is_that_of_a_fresh_run(load, counts, tmp_path, options):
    """The first question, a second one, a new model and another interface: all as by hand."""
    questions = [TEXT, "the water"]
    budget = options.get("memory_budget", 0.5)
    with load(**options) as llm:
        expected = without_memory(llm, questions, IMAGES["red"], budget)
    with load(**options) as llm:
        other = without_memory(llm, ["a sea"], IMAGES["red"], budget)
    counts.encoded = 0
    with load(memory=tmp_path, **options) as llm:
        chat = el.Conversation(llm)
        assert [said(chat, TEXT, IMAGES["red"]), said(chat, "the water")] == expected
        assert counts.encoded == 1
        chat = el.Conversation(llm)
        assert [said(chat, "a sea", IMAGES["red"])] == other
        chat.clear()
        assert [said(chat, TEXT, IMAGES["red"]), said(chat, "the water")] == expected
        assert counts.encoded == 1
    with load(memory=tmp_path, **options) as llm:
        chat = el.Conversation(llm)
        assert [said(chat, "a sea", IMAGES["red"])] == other
        parts = [
            {"type": "image_url", "image_url": {"url": to_data_uri(IMAGES["red"])}},
            {"type": "text", "text": TEXT},
        ]
        out = llm.create_chat_completion(
            [{"role": "user", "content": parts}], max_tokens=16, temperature=0.0, repeat_penalty=1.0
        )
        # llama-cpp-python leaves out what is no character, and goes on until one ends
        answer = out["choices"][0]["message"]["content"].replace("\ufffd", "")
        assert answer.startswith(expected[0].replace("\ufffd", ""))
        assert counts.encoded == 1


def test_what_is_compressed_is_the_image(load, tmp_path):
    with load(memory=ImageMemory(tmp_path), memory_budget=8) as llm:
        el.Conversation(llm).prefill(TEXT, IMAGES["red"])
        (file,) = MemoryFolder(tmp_path).files()
        entry = unpack(file.read_bytes(), file.stem)
        assert entry.info["cells"] == "8"
        assert int(entry.info["positions"]) == len(entry.ids) > 16
        # cells of the image, and those of the question, which nothing has compressed yet
        assert llm.session.n_cells(0) == 8 + llm.n_tokens - len(entry.ids)


def test_two_images_of_one_size_are_not_mixed_up(load, counts):
    def swapped(memory):
        with load(memory=memory) as llm:
            out = []
            for colors in (("red",), ("blue",), ("red", "blue"), ("blue", "red"), ("red",)):
                chat = el.Conversation(llm)
                out.append(said(chat, TEXT, [IMAGES[c] for c in colors]))
            return out

    memory = ImageMemory()
    first = swapped(memory)
    n_encoded = counts.encoded
    assert swapped(memory) == first
    assert counts.encoded == n_encoded
    assert first[0] == first[4]
    assert len(memory) == 4


def test_another_prefix_model_or_budget_is_another_entry(load, tiny_vlm, tmp_path):
    def key(system=None, **kwargs):
        with load(memory=True, **kwargs) as llm:
            chat = el.Conversation(llm, system=system)
            chat.prefill(TEXT, IMAGES["red"])
            (out,) = llm.memory._entries
            return out

    same = key()
    assert key(budget=0.9) == same, "the budget of the question does not matter"
    assert key(n_ctx=2048) == same
    other = tmp_path / "model.gguf"
    data = bytearray(Path(tiny_vlm[0]).read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    keys = [
        same,
        key(system="be brief"),
        key(memory_budget=0.4),
        key(type_k=8, type_v=8),
        key(n_batch=8),
        key(rope_freq_base=5000.0),
        key(elastic=None),
        key(elastic=el.ElasticConfig(policy="h2o", min_cells=4)),
        key(elastic=el.ElasticConfig(min_cells=4, layers=(1.0, 2.0))),
    ]
    with el.ElasticLlama(other, mmproj_path=tiny_vlm[1], memory=True, n_threads=1) as llm:
        el.Conversation(llm).prefill(TEXT, IMAGES["red"])
        keys += llm.memory._entries
    assert len(set(keys)) == len(keys)


def test_a_model_that_is_replaced_after_it_was_loaded(load, tiny_vlm, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(tiny_vlm[0]).read_bytes())
    with el.ElasticLlama(model, mmproj_path=tiny_vlm[1], memory=True, n_threads=1) as llm:
        other = tmp_path / "other"
        other.write_bytes(model.read_bytes())
        other.replace(model)
        with pytest.raises(el.StateError, match="replaced"):
            said(el.Conversation(llm), TEXT, IMAGES["red"])


def test_where_the_images_end():
    image, long = ImagePiece("a-0", 4, len), TextPiece(tuple(range(20)))
    short = TextPiece((1, 2))
    assert leading_images([long, image, short, image, long, image]) == 4
    assert leading_images([image, image, short]) == 2
    assert leading_images([long, short]) == 0


def entry(key: str = "0" * 64, n: int = 1000) -> Entry:
    noise = np.random.default_rng(int(key, 16) % 2**32).bytes(n)
    return Entry.of_state(key, np.arange(5), noise, {"model": 'a "checksum":"b'})


def test_a_file_says_what_was_written():
    written = entry()
    data = pack(written)
    read = unpack(data, written.key)
    assert read.state() == written.state()
    assert read.ids.tolist() == written.ids.tolist()
    assert read.info == written.info
    tensors = safetensors.numpy.load(data)
    assert bytes(tensors["state"]) == written.packed
    assert tensors["ids"].tolist() == written.ids.tolist()
    with pytest.raises(DamagedFileError):
        unpack(data, "1" * 64)


@pytest.mark.parametrize("n", [0, 1, 7, PART - 1, PART, PART + 1, 5 * PART + 3])
def test_a_state_is_packed_without_its_zeros(n):
    rng = np.random.default_rng(n)
    noise = rng.integers(1, 256, n, np.uint8)
    some = np.where(np.arange(n) // 100 % 2, noise, 0).astype(np.uint8)
    rows = np.where(np.arange(n) // PART % 2, noise, 0).astype(np.uint8)
    extra = 8 + 4 * -(-n // PART)
    for state, limit in (
        (noise, n),
        (some, 0.6 * n + 90),
        (rows, (rows > 0).sum()),
        (0 * noise, 0),
    ):
        packed = pack_state(state.tobytes())
        assert len(packed) <= limit + extra
        assert bytes(unpack_state(packed)) == state.tobytes()


def test_every_flipped_byte_is_noticed():
    data = pack(entry(n=50))
    for i in range(len(data)):  # of the header, too
        for bit in (1, 0x20, 0x80):
            with pytest.raises(DamagedFileError):
                unpack(data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :], "0" * 64)
    for n in range(len(data)):
        with pytest.raises(DamagedFileError):
            unpack(data[:n], "0" * 64)


def test_a_damaged_file_is_set_aside_and_computed_again(load, counts, tmp_path, caplog):
    with load(memory=tmp_path) as llm:
        expected = said(el.Conversation(llm), TEXT, IMAGES["red"])
    (file,) = MemoryFolder(tmp_path).files()
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for n in range(3):
        i = int(rng.integers(len(good)))
        file.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
        counts.encoded = 0
        with load(memory=tmp_path) as llm, caplog.at_level(logging.WARNING, "elastic_llama"):
            caplog.clear()
            assert said(el.Conversation(llm), TEXT, IMAGES["red"]) == expected
        assert counts.encoded == 1
        assert "computed again" in caplog.text
        assert len(list((tmp_path / "damaged").iterdir())) == n + 1
        assert unpack(file.read_bytes()).state() == unpack(good).state()


def test_a_file_of_another_key_is_not_loaded(load, tmp_path):
    with load(memory=tmp_path) as llm:
        expected = said(el.Conversation(llm), TEXT, IMAGES["blue"])
        said(el.Conversation(llm), TEXT, IMAGES["red"])
    blue, red = MemoryFolder(tmp_path).files()
    blue.write_bytes(red.read_bytes())
    with load(memory=tmp_path) as llm:
        assert said(el.Conversation(llm), TEXT, IMAGES["blue"]) == expected
    assert [s.problem for s in MemoryFolder(tmp_path).verify()] == ["", ""]


def test_a_context_too_small_for_an_entry(load, tmp_path):
    with load(memory=tmp_path, memory_budget=1) as llm:
        said(el.Conversation(llm), "the water", IMAGES["red"])
        n = llm.n_tokens
    with load(memory=tmp_path, memory_budget=1, n_ctx=256) as llm:
        assert n < 256
        said(el.Conversation(llm), "the water", IMAGES["red"])


def keys(n: int) -> list[str]:
    return [f"{i:064x}" for i in range(n)]


def test_the_least_recently_used_goes_first_in_ram():
    a, b, c = keys(3)
    memory = ImageMemory(ram_bytes=2 * entry().n_bytes + 100)
    memory.put(entry(a))
    memory.put(entry(b))
    assert memory.get(a)
    memory.put(entry(c))
    assert memory.get(b) is None
    assert memory.get(a)
    assert memory.get(c)


def test_the_least_recently_used_goes_first_on_disk(tmp_path):
    a, b, c = keys(3)
    size = len(pack(entry()))
    folder = MemoryFolder(tmp_path, 2 * size + 100)
    folder.put(entry(a))
    folder.put(entry(b))
    assert folder.get(a)
    folder.put(entry(c))
    assert [path.stem for path in folder.files()] == [a, c]
    assert folder.prune(size) == 1
    assert [path.stem for path in folder.files()] == [c]


def test_bad_arguments(load, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for bad in ({"memory": 3}, {"memory": ""}, {"memory": file}, {"memory_budget": 0}):
        with pytest.raises(el.ConfigError):
            load(**bad)
    with pytest.raises(el.ConfigError, match="scorer"):
        load(memory=True, elastic=el.ElasticConfig(policy=lambda view: view.importance))
