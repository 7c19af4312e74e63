"""Images of every family: their positions, cells and tiles, as libmtmd itself reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama.bench.contexts import Context, ContextOptions
from elastic_llama.cli import main
from elastic_llama.images import to_data_uri
from elastic_llama.pieces import ImagePiece, TextPiece, n_cells_from, piece_ids
from elastic_llama.positions import ImageSpans
from elastic_llama.prompt_reader import EncodedImages
from elastic_llama.vision import ImageTokens
from gguf import GGUFReader
from llama_cpp import mtmd_cpp

from tests.support.vision_families import Files, logits, picture, read_by_mtmd

TEXT = "the heat on the earth " * 8
FIRST, OTHER = picture(0), picture(1)  # of one size: 6 x 11 embeddings with M-RoPE
TALL = picture(2, 70, 120)  # 9 x 5
N_WIDE, N_TALL = 66, 45


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("families"))


@pytest.fixture
def load(files: Files) -> Iterator[Any]:
    """Makes a conversation with a family's model."""
    opened: list[el.ElasticLlama] = []

    def make(name: str = "qwen2vl", **options: Any) -> el.Conversation:
        opened.append(files.load(name, **options))
        return el.Conversation(opened[-1])

    yield make
    for llm in opened:
        llm.close()


def ask(chat: el.Conversation, question: str, *images: Any, n: int = 6) -> str:
    return "".join(chat.ask(question, images, max_tokens=n))


def user(question: str, *images: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": to_data_uri(i)}} for i in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def complete(llm: el.ElasticLlama, *messages: dict[str, Any], **options: Any) -> Any:
    options = {"max_tokens": 6, "temperature": 0, "repeat_penalty": 1.0, **options}
    return llm.create_chat_completion(list(messages), **options)


def said(completion: Any) -> str:
    return str(completion["choices"][0]["message"]["content"])


# -- libmtmd's own helper is the oracle: the same bits


# every family: test_vision_zoo
@pytest.mark.parametrize("name", ["qwen2vl", "idefics3"])
def test_two_images_over_two_turns_are_read_as_by_mtmd(load: Any, name: str) -> None:
    chat = load(name, elastic=None)
    ask(chat, "the heat", FIRST, n=0)
    chat.prefill("the sea", [TALL])
    ours, end = logits(chat.llm), chat.llm.n_tokens
    theirs, their_end = read_by_mtmd(chat, chat._text, [FIRST, TALL])
    assert end == their_end
    np.testing.assert_array_equal(ours, theirs)


def test_images_of_earlier_turns_are_counted(load: Any, monkeypatch: Any) -> None:
    """HunyuanVL rotates K by the number of the image in the prompt."""
    numbers = []
    decode = mtmd_cpp.mtmd_helper_decode_image_chunk

    def noted(ctx: Any, lctx: Any, chunk: Any, *rest: Any) -> int:
        image = mtmd_cpp.mtmd_input_chunk_get_tokens_image(chunk)
        numbers.append(int(mtmd_cpp.mtmd_image_tokens_get_decoder_pos(image, 0, 1).z))
        return int(decode(ctx, lctx, chunk, *rest))

    monkeypatch.setattr(mtmd_cpp, "mtmd_helper_decode_image_chunk", noted)
    chat = load("hunyuan", elastic=None)
    ask(chat, "the heat", FIRST, TALL)
    ask(chat, "the sea", OTHER)
    assert numbers == [0, 1, 2]
    complete(chat.llm, user("the", TALL), {"role": "assistant", "content": "no"}, user("a", FIRST))
    assert numbers[3:] == [0, 1]


# -- positions are not cells


def test_names_of_figures(load: Any) -> None:
    chat = load(kv_budget=0.5)
    ask(chat, TEXT, FIRST, n=1)
    stats, llm = chat.stats, chat.llm
    assert stats.n_image == N_WIDE
    assert stats.cells_prompt == stats.n_text + N_WIDE
    assert llm.n_tokens == stats.n_text + 11  # positions: as many as columns
    assert llm.stats.tokens == llm.session.n_tokens(0) == stats.cells_prompt
    half = -(-stats.cells_prompt // 2)
    assert half - 4 <= stats.cells_kept <= half
    ask(chat, "the sea", TALL)
    assert chat.stats.n_image == N_TALL


def test_without_a_session_cells_are_counted(load: Any) -> None:
    chat = load(elastic=None)
    ask(chat, TEXT, FIRST)
    llm = chat.llm
    assert llm.stats.cells == llm.stats.tokens == llm.n_tokens + N_WIDE - 11
    state = llm.save_state()
    llm.reset()
    assert llm.stats.cells == 0
    llm.load_state(state)
    assert llm.stats.cells == llm.n_tokens + N_WIDE - 11


def test_spans() -> None:
    spans = ImageSpans()
    spans.put(5, 11, 66)
    spans.put(30, 9, 45)
    assert [spans.n_cells(n) for n in (5, 16, 30, 39, 50)] == [5, 71, 85, 130, 141]
    assert (spans.end(6), spans.end(31), spans.end(40)) == (16, 39, 40)
    assert [spans.is_inside(n) for n in (5, 6, 15, 16)] == [False, True, True, False]
    copy = ImageSpans(spans.copy())
    spans.cut(38)
    assert spans.n_cells(50) == 50 + 55
    spans.put(5, 4, 8)
    assert spans.n_cells(50) == 54
    assert copy.n_cells(39) == 130


def test_cells_of_pieces() -> None:
    pieces = [TextPiece((1, 2, 3)), ImagePiece("a", 11, lambda n: n, 66), TextPiece((4, 5))]
    assert len(piece_ids(pieces)) == 16
    assert [n_cells_from(pieces, n) for n in (0, 1, 3, 14, 15, 16)] == [71, 70, 68, 2, 1, 0]


# -- a full context


@pytest.mark.parametrize("options", [{"elastic": None}, {"kv_budget": 1.0}, {"kv_budget": 0.5}])
@pytest.mark.parametrize("how", ["conversation", "completion"])
def test_a_full_context_refuses_before_anything_is_decoded(
    load: Any, how: str, options: dict[str, Any]
) -> None:
    """Its positions would fit: 3 images have 198 cells at 33 positions."""
    chat = load(n_ctx=256, **options)
    llm = chat.llm
    many = [picture(k) for k in range(10, 14)]
    if how == "conversation":
        first = ask(chat, "the heat", FIRST)
    else:
        history = [user("the heat", FIRST)]
        first = said(complete(llm, *history))
        history.append({"role": "assistant", "content": first})
    before = (llm.n_tokens, llm.stats.cells, llm.input_ids[: llm.n_tokens].tolist())
    with pytest.raises(el.ContextOverflowError, match="at most n_ctx = 256"):
        if how == "conversation":
            ask(chat, "the sea", *many)
        else:
            complete(llm, *history, user("the sea", *many))
    assert (llm.n_tokens, llm.stats.cells, llm.input_ids[: llm.n_tokens].tolist()) == before
    if how == "conversation":
        assert ask(chat, "the sea", TALL) is not None
    else:
        assert said(complete(llm, *history, user("the sea", TALL))) is not None


def test_an_answer_ends_where_the_context_is_full(load: Any) -> None:
    """llama-cpp-python compares n_ctx with positions, of which an image takes few."""
    llm = load(elastic=None, n_ctx=256).llm
    out = complete(llm, user("the heat", FIRST), max_tokens=None, logit_bias={4: -100.0})
    usage = out["usage"]
    assert out["choices"][0]["finish_reason"] == "length"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 253 <= usage["total_tokens"] <= 256


# -- batches, caps, repetition, states


@pytest.mark.parametrize("n_batch", [16, 33])
def test_an_image_cut_into_batches(load: Any, n_batch: int) -> None:
    logits_of = []
    for options in ({}, {"n_batch": n_batch, "n_ubatch": n_batch}):
        chat = load(kv_budget=1.0, **options)
        chat.prefill("the heat", [FIRST])
        logits_of.append(logits(chat.llm))
        assert chat.llm._rewind.end() == chat.llm.n_tokens
    np.testing.assert_allclose(*logits_of, rtol=0, atol=2e-5)


def test_compressed_by_the_same_rule_however_it_is_cut(load: Any) -> None:
    kept = []
    for n_batch in (512, 24):
        chat = load(kv_budget=0.5, n_batch=n_batch, n_ubatch=n_batch)
        ask(chat, TEXT, FIRST)
        kept.append([chat.llm.session.cells(0)[name].tolist() for name in ("pos", "kind")])
    assert kept[0] == kept[1]


def test_a_cap_inside_an_image(load: Any) -> None:
    config = el.ElasticConfig(budget=60, kv_cells=80)
    chat = load(elastic=config, n_ctx=None, n_batch=32, n_ubatch=32)
    for image in (FIRST, TALL, OTHER):
        ask(chat, "the heat", image)
        assert chat.llm.session.n_cells(0) <= 80 + 32
    cells = chat.llm.session.cells(0)
    assert (np.diff(cells["pos"]) >= 0).all()
    assert (cells["kind"] == 1).sum() > 0


def test_the_same_call_twice_decodes_nothing(load: Any) -> None:
    chat = load(kv_budget=0.5)
    first = complete(chat.llm, user(TEXT, FIRST), max_tokens=20)
    n_encoded = count_encoded(chat)
    assert said(complete(chat.llm, user(TEXT, FIRST), max_tokens=20)) == said(first)
    assert count_encoded(chat) == n_encoded
    assert said(complete(chat.llm, user(TEXT, OTHER), max_tokens=20)) != said(first)
    assert said(complete(chat.llm, user(TEXT, FIRST), max_tokens=20)) == said(first)


def count_encoded(chat: el.Conversation) -> int:
    return len(chat.llm.chat_handler._encoded._known)


def test_edited_history(load: Any) -> None:
    """What is asked again differently is as if the first had never been asked."""
    history = (user(TEXT, FIRST), {"role": "assistant", "content": "the"})
    with_first = load(kv_budget=0.5).llm
    complete(with_first, *history, user("the sea", TALL), max_tokens=12)
    for last in (user("the water", OTHER), user("the water")):
        edited = said(complete(with_first, *history, last))
        assert edited == said(complete(load(kv_budget=0.5).llm, *history, last))


def test_a_cut_before_an_image_leaves_none_of_it(load: Any) -> None:
    chat = load(elastic=el.ElasticConfig(min_cells=400))
    ask(chat, "the heat", FIRST, n=1)
    llm = chat.llm
    start = int(np.argmax(llm.input_ids[: llm.n_tokens] < 0))
    llm.n_tokens = start + 4  # within the image
    with pytest.raises(el.StateError, match="an image would have to be read again"):
        llm.eval([5])
    llm.n_tokens = start
    llm.eval([5, 6])
    assert llm.session.n_cells(0) == start + 2 == llm.stats.tokens


def test_an_image_at_the_end(load: Any) -> None:
    """The cache's last cell is at the image's first position."""
    chat = load(kv_budget=0.5)
    pieces = chat._extended(*chat._question("the heat", [FIRST]))[1]
    at = next(i for i, piece in enumerate(pieces) if isinstance(piece, ImagePiece))
    llm = chat.llm
    n_new = llm.prefill(pieces[: at + 1])
    assert n_new == len(pieces[0]) + N_WIDE == llm.session.n_cells(0)
    assert llm._rewind.end() == llm.n_tokens == len(pieces[0]) + 11
    assert llm.prefill(pieces) == len(pieces[-1])  # goes on behind it
    ours = logits(llm)
    chat.clear()
    at_once = load(kv_budget=0.5)
    at_once.prefill("the heat", [FIRST])
    np.testing.assert_array_equal(ours, logits(at_once.llm))


@pytest.mark.parametrize("n_same", [30, 460, 720])
def test_a_sliding_window_is_read_again_where_it_is_gone(load: Any, n_same: int) -> None:
    """Its cells are those of the newest tokens alone, unless `swa_full` keeps them all."""
    rng = np.random.default_rng(0)
    said, other = (tuple(rng.integers(262, 380, n).tolist()) for n in (760, 10))
    prompt = [TextPiece((*said[:n_same], *other))]
    options = {"elastic": None, "swa_full": False, "n_batch": 32, "n_ubatch": 32}
    found = []
    for first in ([TextPiece(said)], []):
        llm = load("gemma3", **options).llm
        llm.prefill(first)
        n_new = llm.prefill(prompt)
        found.append(logits(llm))
        assert n_new == (10 if first and n_same == 720 else n_same + 10)
    np.testing.assert_allclose(*found, rtol=0, atol=1e-3)


def test_a_saved_state_and_a_further_image(load: Any) -> None:
    chat = load(kv_budget=0.5)
    history = (user(TEXT, FIRST), {"role": "assistant", "content": "the"})
    complete(chat.llm, user(TEXT, FIRST))
    state = chat.llm.save_state()
    expected = said(complete(chat.llm, *history, user("the sea", TALL), max_tokens=12))
    for llm in (chat.llm, load(kv_budget=0.5).llm):
        llm.load_state(state)
        assert llm.stats.tokens == state.n_tokens + N_WIDE - 11
        assert said(complete(llm, *history, user("the sea", TALL), max_tokens=12)) == expected


# -- tiles, and the embeddings that are kept


@pytest.mark.parametrize(("name", "n"), [("idefics3", 5), ("internvl", 5), ("minicpmv", 7)])
def test_tiles_are_known_again(load: Any, name: str, n: int, monkeypatch: Any) -> None:
    encoded = []
    encode = mtmd_cpp.mtmd_encode_chunk
    monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", lambda *a: encoded.append(1) or encode(*a))
    chat = load(name, kv_budget=0.5)
    first = ask(chat, TEXT, FIRST)
    assert len(encoded) == n
    chat.clear()
    assert ask(chat, TEXT, FIRST) == first
    chat.clear()
    ask(chat, "the", OTHER)  # of the same size
    assert len(encoded) == 2 * n
    ids = [p for p in chat._pieces if isinstance(p, ImagePiece)]
    assert [p.part for p in ids] == list(range(n))
    chat.clear()
    assert ask(chat, TEXT, FIRST) == first
    assert len(encoded) == 2 * n


def test_embeddings_are_kept_by_their_bytes() -> None:
    known = EncodedImages(max_bytes=4 * 10)
    rows = np.zeros((1, 5), np.float32)
    for key in "abcabc":
        known.get(key, rows.copy)
    assert list(known._known) == ["b", "c"]
    large = np.zeros(100, np.float32)
    assert known.get("d", lambda: large) is large
    assert list(known._known) == ["d"]


# -- bounds, batches of images that are read at once


def test_bounds_of_an_image(load: Any) -> None:
    for options, n in (
        ({}, N_WIDE),
        ({"image_max_tokens": 24}, range(12, 25)),
        ({"image_min_tokens": 100, "image_max_tokens": 200}, range(100, 201)),
    ):
        chat = load(elastic=None, **options)
        ask(chat, "the", FIRST, n=1)
        assert chat.stats.n_image == n if isinstance(n, int) else chat.stats.n_image in n
        n_image = chat.stats.n_image
        assert complete(chat.llm, user("the", FIRST))["usage"]["prompt_tokens"] == (
            chat.stats.n_text + n_image
        )


@pytest.mark.parametrize(
    ("least", "most", "says"),
    [
        (0, None, "image_min_tokens, got 0"),
        (None, 1.5, "1.5"),
        (None, 2**30, "a whole number from 1 to"),
        (9, 8, "at most image_max_tokens"),
    ],
)
def test_bad_bounds(least: Any, most: Any, says: str) -> None:
    with pytest.raises(el.ConfigError, match=says):
        ImageTokens(least, most)


def test_bounds_that_a_tower_does_not_take(load: Any, files: Files) -> None:
    with pytest.raises(el.ConfigError, match="got None, 1, expected bounds"):
        load(image_max_tokens=1)
    llm = files.load("qwen2vl", image_max_tokens=1)
    with pytest.raises(el.ConfigError, match="got None, 1, expected bounds"):
        complete(llm, user("the", FIRST))
    llm.close()
    with pytest.raises(el.ConfigError, match="got no vision tower"):
        el.ElasticLlama(files.folder / "qwen2vl.gguf", image_max_tokens=9)


def test_images_of_one_row_and_of_one_embedding(load: Any) -> None:
    """As many cells as positions, but all at one."""
    for options in ({"elastic": None}, {"kv_budget": 0.5}):
        chat = load(image_min_tokens=1, image_max_tokens=4, **options)
        for k, size in enumerate(((900, 40), (20, 20), (40, 900), (900, 40))):
            ask(chat, "the heat", picture(k, *size))
            assert chat.llm._rewind.end() == chat.llm.n_tokens
        ask(chat, "the")
        asked = [piece for piece in chat._pieces if isinstance(piece, ImagePiece)]
        assert [piece.grid for piece in asked] == [(1, 9), (1, 1), (9, 1), (1, 9)]


def test_an_image_that_is_read_at_once_needs_its_batch(load: Any) -> None:
    """llama.cpp would abort the process."""
    chat = load("gemma3", elastic=None, n_batch=8, n_ubatch=8)
    with pytest.raises(el.ConfigError, match="pass n_batch=16 and n_ubatch=16"):
        ask(chat, "the", FIRST)
    with pytest.raises(el.ConfigError, match="n_ubatch=16"):
        complete(chat.llm, user("the", FIRST))
    assert chat.llm.n_tokens == 0


# -- show, and the command line


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("qwen2vl", {"image 1": (6, 11), "image 2": (9, 5)}),
        ("pixtral", {"image 1": (6, 11), "image 2": (9, 5)}),  # without its [IMG_BREAK]
        (
            "idefics3",
            {
                "image 1, tile 1 of 4": (2, 2),
                "image 1, overview": (2, 2),
                "image 2, tile 4 of 4": (2, 2),
            },
        ),
        ("minicpmv", {"image 1, overview": (1, 9), "image 1, tile 6 of 6": (1, 9)}),
    ],
)
def test_show_draws_grids_and_tiles(load: Any, name: str, shapes: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from elastic_llama.picture import draw
    from elastic_llama.show import look

    chat = load(name, elastic=el.ElasticConfig(budget=0.5, min_cells=16))
    kept = look(chat, TEXT, [FIRST, TALL])
    panels = {panel.name: panel for panel in kept.panels}
    assert {name: panels[name].shape for name in shapes} == shapes
    kinds = chat.stats.n_image, len(kept.share)
    assert sum(not piece for piece in kept.pieces) == kinds[0]
    in_panels = np.concatenate([panel.cells for panel in kept.panels])
    assert len(np.unique(in_panels)) == len(in_panels)
    assert all(not kept.pieces[cell] for cell in in_panels)
    plan = chat.llm.session.last_plan()["kept"]
    assert kept.share.sum() == pytest.approx(plan.shape[2])
    figure = draw(kept)
    for name, shape in shapes.items():
        (axes,) = (a for a in figure.axes if a.get_label() == name)
        grid = np.asarray(axes.images[-1].get_array())
        assert grid.shape == shape
        assert grid.ravel() == pytest.approx(kept.share[panels[name].cells])
        box = axes.get_position()
        wide = box.width * figure.get_figwidth() / (box.height * figure.get_figheight())
        if shape[0] > 1:
            assert wide == pytest.approx(shape[1] / shape[0])


def test_bounds_on_the_command_line(files: Files, load: Any, tmp_path: Any, capsys: Any) -> None:
    load()
    FIRST.save(tmp_path / "a.png")
    paths = [str(files.folder / f"qwen2vl{end}.gguf") for end in ("", "-mmproj")]
    command = ["describe", str(tmp_path / "a.png"), "-m", paths[0], "--mmproj", paths[1], "-n", "1"]
    command += ["-t", "1", "-c", "512", "--kv-budget", "0.5"]
    n_cells = []
    for more in ([], ["--image-max-tokens", "24"]):
        assert main([*command, *more]) == 0
        row = capsys.readouterr().out.splitlines()[-1].split()
        n_cells.append(int(row[2]))
    assert 66 - 24 <= n_cells[0] - n_cells[1] < 66 - 12
    assert main([*command, "--image-min-tokens", "0"]) == 1
    assert "image_min_tokens, got 0" in capsys.readouterr().err


def test_rows_of_the_benchmark_have_positions(load: Any, files: Files) -> None:
    """Rows that are the embeddings of tokens are read as these tokens are."""
    llm = load(elastic=None).llm
    (table,) = (
        tensor.data
        for tensor in GGUFReader(files.folder / "qwen2vl.gguf").tensors
        if tensor.name == "token_embd.weight"
    )
    tokens = list(range(270, 300))
    found = []
    for first in (tokens[:20], np.asarray(table[tokens[:20]], np.float32)):
        context = Context(llm, ContextOptions(n_ubatch=8), 1, 256)
        context.prefill([first, tokens[20:]], 0)
        row = llama_cpp.llama_get_logits_ith(context.ctx, -1)
        found.append(np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy())
        context.close()
    np.testing.assert_allclose(*found, rtol=0, atol=1e-3)
