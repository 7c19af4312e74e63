"""The scene generator: the same seed gives the same scene, and every answer follows from it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from elastic_llama.scenes import (
    COLORS,
    GRIDS,
    IMAGE_SIZE,
    KINDS,
    SHAPES,
    SPLITS,
    CaptionScore,
    Cell,
    Scene,
    exact,
    make_scene,
    parse_caption,
    question,
    questions,
    score_caption,
    token_accuracy,
    write_dataset,
)
from elastic_llama.scenes.layout import SPLIT_SIZE

LAYOUT_SHA256 = "78b2d1fa3f4ef64385020a413cfd4efa83c12d632a5f41d47b0e9a8c39e7ec3d"


def test_layout_of_a_seed_never_changes():
    text = "\n".join(
        make_scene(split, index, grid).caption()
        for split in SPLITS
        for grid in GRIDS
        for index in range(20)
    )
    assert hashlib.sha256(text.encode()).hexdigest() == LAYOUT_SHA256


def test_same_seed_same_picture():
    first, second = (np.asarray(make_scene("train", 5).render()) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_splits_are_disjoint_seed_ranges():
    starts = sorted(SPLITS.values())
    assert all(b - a >= SPLIT_SIZE for a, b in zip(starts, starts[1:]))
    assert make_scene("train", SPLIT_SIZE - 1).seed < make_scene("dev", 0).seed
    assert make_scene("dev", SPLIT_SIZE - 1).seed < make_scene("test", 0).seed


@pytest.mark.parametrize("grid", GRIDS)
def test_caption_parses_back_to_its_cells(grid):
    for index in range(20):
        scene = make_scene("dev", index, grid)
        rows = parse_caption(scene.caption())
        assert [cell for row in rows for cell in row] == list(scene.cells)


def test_mixed_grids_and_all_contents_occur():
    scenes = [make_scene("train", i) for i in range(120)]
    assert {s.grid for s in scenes} == set(GRIDS)
    cells = [c for s in scenes for c in s.cells]
    assert {c.color for c in cells} == {"", *COLORS}
    assert {c.shape for c in cells} == {"", *SHAPES}


def test_objects_stay_inside_their_cells():
    background = np.asarray(Scene(4, (Cell(),) * 16, 7).render(), dtype=int)
    cells = tuple(Cell("black", SHAPES[i % 6]) for i in range(16))
    drawn = np.abs(np.asarray(Scene(4, cells, 7).render(), dtype=int) - background).max(-1) > 40
    side = IMAGE_SIZE // 4
    borders = np.arange(side, IMAGE_SIZE, side)
    assert drawn.any()
    assert not drawn[borders].any()
    assert not drawn[:, borders].any()


def test_answers_agree_with_the_scene():
    rng = np.random.default_rng(0)
    for index in range(30):
        scene = make_scene("dev", index)
        for kind in KINDS:
            q = question(scene, kind, rng)
            if q is None:
                continue
            numbers = [int(c) for c in q.text + q.answer if c.isdigit()]
            if kind == "where":
                assert q.text == f"Where is the {scene.at(*numbers)}?"
            elif kind in ("cell", "color", "shape"):
                cell = scene.at(*numbers)
                assert (
                    q.answer == {"cell": str(cell), "color": cell.color, "shape": cell.shape}[kind]
                )


def test_where_asks_only_for_unique_objects():
    twice = Scene(2, (Cell("red", "star"),) * 4, 1)
    assert question(twice, "where", np.random.default_rng(0)) is None
    assert [q.kind for q in questions(twice)] == [k for k in KINDS if k != "where"]


def test_score_counts_what_is_wrong():
    cells = (Cell("red", "star"), Cell(), Cell("blue", "heart"), Cell("pink", "cross"))
    scene = Scene(2, cells, 1)
    assert score_caption(scene, scene.caption()) == CaptionScore(4, 3, 4, 3, 3, 4, 1)
    said = "row 1: red heart, blue star. row 2: blue heart."
    assert score_caption(scene, said) == CaptionScore(4, 3, 1, 2, 1, 2, 0)
    assert score_caption(scene, "nonsense") == CaptionScore(4, 3)
    total = score_caption(scene, said) + score_caption(scene, said)
    assert total.n_cells == 8
    assert total.cells == 2


def test_exact_and_token_accuracy():
    assert exact(" red star\n", "red star")
    assert not exact("red star.", "red star")
    assert token_accuracy([1, 2, 3], [1, 2, 3]) == 1.0
    assert token_accuracy([1, 9], [1, 2, 3, 4]) == 0.25
    assert token_accuracy([], []) == 1.0


@pytest.mark.parametrize(("split", "index", "grid"), [("all", 0, 3), ("dev", -1, 3), ("dev", 0, 5)])
def test_bad_arguments_are_refused(split, index, grid):
    with pytest.raises(ValueError, match=r"\[scene\]"):
        make_scene(split, index, grid)


def test_dataset_folder(tmp_path):
    path = write_dataset(tmp_path, "test", count=2, grid=3)
    items = json.loads(path.read_text(encoding="utf-8"))
    assert {item["kind"] for item in items} <= set(KINDS)
    assert all(set(item) == {"image", "kind", "question", "answer"} for item in items)
    assert len({item["image"] for item in items}) == 2
    assert all((tmp_path / item["image"]).is_file() for item in items)
