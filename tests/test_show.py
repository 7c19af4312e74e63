"""The picture of what was kept, and the numbers in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.cli import main
from elastic_llama.grids import Grid, grid_of, grid_shape, tile_boxes
from elastic_llama.picture import draw
from elastic_llama.show import kept_share, look, visible
from PIL import Image

pytest.importorskip("matplotlib")

QUESTION = "the heat on the earth " * 12
# 2 layers, 2 KV heads, ranks in no order
PLAN = {"kept": np.array([[[4, 0], [1, 4]], [[4, 3], [4, 0]]], np.int32)}


def heat_map(figure: Any, name: str) -> np.ndarray:
    (axes,) = (a for a in figure.axes if a.get_label() == name)
    return np.asarray(axes.images[-1].get_array())


@pytest.fixture
def chat(tiny_vlm: tuple[Path, Path]) -> Iterator[Any]:
    """Makes a conversation with 16 patches per image."""
    opened: list[el.ElasticLlama] = []

    def load(**kwargs: Any) -> el.Conversation:
        options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, **kwargs}
        opened.append(el.ElasticLlama(tiny_vlm[0], mmproj_path=tiny_vlm[1], **options))
        return el.Conversation(opened[-1])

    yield load
    for llm in opened:
        llm.close()


# -- numbers


def test_share_of_all_rows() -> None:
    assert kept_share(PLAN, 6).tolist() == [0.5, 0.25, 0, 0.25, 1, 0]


def test_share_of_a_layer() -> None:
    assert kept_share(PLAN, 6, layer=0).tolist() == [0.5, 0.5, 0, 0, 1, 0]
    assert kept_share(PLAN, 6, layer=1).tolist() == [0.5, 0, 0, 0.5, 1, 0]


def test_a_layer_that_holds_fewer() -> None:
    kept = np.array([[[0, -1, 5]], [[0, 3, 5]]])
    assert kept_share({"kept": kept}, 6).tolist() == [1, 0, 0, 0.5, 0, 1]


def test_order_of_ranks_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    kept = np.stack([rng.permutation(40)[:9] for _ in range(15)]).reshape(5, 3, 9)
    share = kept_share({"kept": kept}, 40)
    assert np.array_equal(share, kept_share({"kept": np.sort(kept)}, 40))
    assert share == pytest.approx([(kept == i).any(axis=2).mean() for i in range(40)])
    assert share.sum() == pytest.approx(9)


@pytest.mark.parametrize("plan", [None, {"kept": np.zeros((0, 0, 0), np.int32)}])
def test_no_plan_keeps_everything(plan: Any) -> None:
    assert kept_share(plan, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("layer", [-1, 2])
def test_bad_layer(layer: int) -> None:
    with pytest.raises(el.ConfigError, match="layer, got .* expected 0 to 1"):
        kept_share(PLAN, 6, layer)


def test_plan_of_other_cells() -> None:
    with pytest.raises(el.StateError, match="cells below 4"):
        kept_share(PLAN, 4)


@pytest.mark.parametrize(
    ("n", "side", "shape"),
    [
        (576, 24, (24, 24)),
        (144, 24, (12, 12)),  # pooled
        (2304, 24, (1, 2304)),  # four tiles, by coincidence a square
        (49, 0, (7, 7)),
        (50, 0, (1, 50)),
        (0, 24, (1, 0)),
    ],
)
def test_grid(n: int, side: int, shape: tuple[int, int]) -> None:
    assert grid_shape(n, side) == shape


@pytest.mark.parametrize(
    ("n", "kind", "size", "side", "grid"),
    [
        (66, "qwen2vl_merger", (160, 90), 0, Grid(6, 11, 0, 11)),
        (71, "pixtral", (160, 90), 0, Grid(6, 11, 0, 12)),  # [IMG_BREAK] between rows
        (66, "pixtral", (90, 160), 0, Grid(11, 6, 0, 6)),
        (74, "hunyuanvl", (160, 90), 0, Grid(6, 11, 1, 12)),
        (6, "adapter", (160, 90), 4, Grid(2, 2, 1)),
        (67, "kimivl", (160, 90), 0, None),  # a prime: no grid of about this shape
        (16, "gemma3", (160, 90), 8, Grid(4, 4)),
        (64, "resampler", (64, 64), 8, None),
    ],
)
def test_grids_of_families(
    n: int, kind: str, size: tuple[int, int], side: int, grid: Grid | None
) -> None:
    assert grid_of(n, kind, size, side) == grid


def test_patches_among_embeddings() -> None:
    assert Grid(2, 3, 1, 4).patches().tolist() == [1, 2, 3, 5, 6, 7]
    assert Grid(2, 2).patches().tolist() == [0, 1, 2, 3]


def test_parts_of_an_image() -> None:
    whole = (0, 0, 200, 100)
    assert tile_boxes(1, "internvl", (200, 100)) == [whole]
    tiles = [(0, 0, 100, 100), (100, 0, 200, 100)]
    assert tile_boxes(3, "internvl", (200, 100)) == [*tiles, whole]
    assert tile_boxes(3, "resampler", (200, 100)) == [whole, *tiles]
    assert tile_boxes(8, "idefics3", (100, 100)) == [None] * 7 + [(0, 0, 100, 100)]


def test_visible_text() -> None:
    assert visible(b" two words\n\n") == "·two·words↵↵"
    assert visible("\tna\u00efve".encode()) == "→naïve"
    assert visible("\u20ac".encode()[:2]) == "\\xe2\\x82"  # half a character
    assert visible(b"\x00\x1b") == "\\x00\\x1b"


# -- pictures


@pytest.mark.model
@pytest.mark.parametrize("layer", [None, pytest.param(17, marks=pytest.mark.slow)])
def test_embedded_model(
    embedded_model: Path, embedded_mmproj: Path, tmp_path: Path, layer: int | None
) -> None:
    """The heat map shows the plan, the patches row by row."""
    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "kv_budget": 0.2}
    with el.ElasticLlama(embedded_model, mmproj_path=embedded_mmproj, **options) as llm:
        kept = look(el.Conversation(llm), "What is in row 1?", [demo_image()], layer)
        plan = llm.session.last_plan()["kept"]
        start = len(llm.tokenize(b"<|im_start|>user\n", add_bos=False, special=True))
        n_cells, n_after = llm.n_tokens, llm.session.n_per_layer()
    figure = draw(kept)

    rows = plan.reshape(-1, plan.shape[2]) if layer is None else plan[layer]
    expected = np.mean([np.isin(np.arange(n_cells), row) for row in rows], axis=0)
    assert kept.share == pytest.approx(expected)
    patches = expected[start : start + 576].reshape(24, 24)
    assert heat_map(figure, "image 1") == pytest.approx(patches)
    assert kept.panels[0].image is not None
    assert kept.panels[0].image.size == (336, 336)

    text = kept.pieces[:start] + kept.pieces[start + 576 :]
    assert "".join(text).startswith("<|im_start|>user↵What·is·in·row")
    assert all(text)
    assert f"{n_cells} → {n_after} cells" in kept.title
    figure.savefig(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert 1000 < picture.width < 2500
        assert 800 < picture.height < 2500
        assert picture.convert("L").getextrema()[0] < 64  # not blank


def demo_image() -> Path:
    from elastic_llama.embedded import demo_image as get

    return get()


@pytest.mark.parametrize(
    "options",
    [
        {"elastic": el.ElasticConfig.off()},
        {"elastic": el.ElasticConfig(policy="full")},
        {"elastic": el.ElasticConfig(min_cells=400)},
        {"kv_budget": 1.0},
    ],
)
def test_nothing_compressed(chat: Any, options: dict[str, Any]) -> None:
    kept = look(chat(**options), QUESTION, [Image.new("RGB", (20, 20))])
    assert set(kept.share) == {1.0}
    assert kept.n_after == len(kept.share)
    assert "nothing was compressed" in kept.subtitle
    assert (heat_map(draw(kept), "image 1") == 1).all()


def test_the_plan_of_an_earlier_prompt_is_not_shown(chat: Any) -> None:
    conversation = chat(elastic=el.ElasticConfig(budget=0.3, min_cells=64))
    assert look(conversation, QUESTION).share.min() == 0
    assert set(look(conversation, "the heat").share) == {1.0}


@pytest.mark.parametrize("policy", ["local", "elastic-paper", "elastic-evict", "elastic"])
def test_policies_and_several_images(chat: Any, policy: str) -> None:
    conversation = chat(elastic=el.ElasticConfig(budget=0.4, policy=policy))
    images = [Image.new("RGB", size, "red") for size in ((40, 40), (60, 20), (20, 60))]
    kept = look(conversation, QUESTION, images)
    figure = draw(kept)
    plan = conversation.llm.session.last_plan()["kept"]
    assert kept.share.sum() == pytest.approx(plan.shape[2])
    for i, panel in enumerate(kept.panels):
        assert panel.shape == (4, 4)
        expected = [
            [(plan == c).any(axis=2).mean() for c in row] for row in panel.cells.reshape(4, 4)
        ]
        assert heat_map(figure, f"image {i + 1}") == pytest.approx(np.array(expected))
    lost = policy in ("local", "elastic-evict")
    assert ("lost" in kept.subtitle) == lost
    assert ("merged" in kept.subtitle) != lost


def test_a_wide_image_is_padded_as_the_tower_pads_it(chat: Any) -> None:
    kept = look(chat(), QUESTION, [Image.new("RGB", (60, 20), "red")])
    (panel,) = kept.panels
    assert panel.image is not None
    assert panel.image.getpixel((5, 2)) == (122, 116, 104)
    assert panel.image.getpixel((5, panel.image.height // 2)) == (255, 0, 0)


def test_cells_that_are_no_square(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_llama.show._patches_per_side", lambda tower: 3)
    kept = look(chat(), QUESTION, [Image.new("RGB", (20, 20))])
    assert "strip" in kept.panels[0].note
    assert heat_map(draw(kept), "image 1").shape == (1, 16)
    kept = look(chat(), QUESTION, [Image.new("RGB", (20, 20))] * 2)  # side by side
    assert [panel.shape for panel in kept.panels] == [(1, 16), (1, 16)]
    assert heat_map(draw(kept), "image 2").shape == (1, 16)


def test_signs_of_formulas_and_characters_of_no_font(chat: Any, tmp_path: Path) -> None:
    kept = look(chat(), "$x_1$ and $ \u7684 \U000f0000 " * 8)
    draw(kept).savefig(tmp_path / "out.png")


# -- errors and the command


def test_errors(chat: Any) -> None:
    with pytest.raises(el.ConfigError, match="layer, got 2, expected 0 to 1"):
        look(chat(), QUESTION, layer=2)
    with pytest.raises(el.ConfigError, match="no elastic cache"):
        look(chat(elastic=None), QUESTION)


@pytest.fixture
def command(tiny_vlm: tuple[Path, Path], tmp_path: Path) -> list[str]:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    model = ["-m", tiny_vlm[0], "--mmproj", tiny_vlm[1], "-t", "1", "-c", "512", "-p", QUESTION]
    return ["show", *map(str, [tmp_path / "red.png", *model, "-o", tmp_path / "out.png"])]


def test_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--kv-budget", "0.5", "--layer", "1"]) == 0
    assert "policy elastic, budget 0.5" in capsys.readouterr().out
    with Image.open(command[-1]) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--layer", "2"], "expected 0 to 1"),
        (["--layer", "-1"], "expected 0 to 1"),
        (["-o", "no/such/folder.png"], "a folder that exists"),
        (["-o", "picture.txt"], ".png"),
        (["-o", "picture"], ".png"),
    ],
)
def test_mistakes(
    command: list[str], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_without_matplotlib(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(command) == 1
    assert 'pip install "elastic-llama[eval]"' in capsys.readouterr().err
    assert not Path(command[-1]).exists()
