"""Image features of LLaVA models against ``transformers``, with and without our patches.

Two layouts isolate the two patches. A file that names its feature layer is right about the layers
in every build, so only ``0101-mtmd-llava-class-token-first`` can mend it; a tower without a class
token has no order to get wrong, so only ``0102-mtmd-llava-feature-layer`` can. The rest must not
change.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.clip_numpy import image_features, normalize
from tests.support.encode_images import encode
from tests.support.mmproj import Layout, Tower, write_mmproj
from tests.support.stock import stock_lib_dir
from tests.support.tiny_llama import write_tiny_llama

HERE = Path(__file__).parent
DATA = HERE / "data" / "llava_tiny.npz"

#: Layouts, and for each the layers whose states the model was trained on.
#: The tower has 4 layers: LLaVA's -2 is the state after layer 3.
LAYOUTS = {
    "legacy": (Layout(), (3,)),
    "names_layer": (Layout(feature_layer=(3,)), (3,)),
    "no_class_token": (Layout(class_token=False), (3,)),
    "granite": (Layout(class_token=False, feature_layer=(1, 3)), (1, 3)),
    "elastic": (Layout(class_token=False, n_block=4, post_norm=True, feature_layer=(4,)), (4,)),
    "moondream": (Layout(class_token=False, n_block=4, post_norm=True, repeat_last=True), (4,)),
    "glm_edge": (Layout(class_token=False, n_block=4, projector="adapter"), (4,)),
}
BROKEN_IN_STOCK = ("legacy", "names_layer", "no_class_token")
NEVER_BROKEN = ("granite", "elastic", "moondream")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine per token of two ``(n_token, n_embd)``."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / norms


@pytest.fixture(scope="module")
def tower() -> Tower:
    return Tower.load(DATA)


@pytest.fixture(scope="module")
def towers(tower: Tower) -> dict[str, Tower]:
    """Tower that each layout stores."""
    out = {}
    for name, (layout, layers) in LAYOUTS.items():
        out[name] = tower if layout.class_token else tower.without_class_token()
        if len(layers) > 1:  # the projector reads all the named layers side by side
            key = "projector.linear_1.weight"
            one = out[name].weights[key]
            wide = {key: np.concatenate([one[:, ::-1], one], axis=1)}
            out[name] = replace(out[name], weights={**out[name].weights, **wide})
    return out


@pytest.fixture(scope="module")
def expected(towers: dict[str, Tower]) -> dict[str, np.ndarray]:
    """Right features of every layout with LLaVA's projector."""
    out = {}
    for name, (layout, layers) in LAYOUTS.items():
        if layout.projector == "mlp":
            t = towers[name]
            pixels = normalize(t.image, t.mean, t.std)
            out[name] = image_features(
                t.weights, pixels, t.shape["n_head"], layers, layout.post_norm
            )
    return out


@pytest.fixture(scope="module")
def files(towers: dict[str, Tower], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Language model, then an mmproj per layout."""
    folder = tmp_path_factory.mktemp("llava")
    n_embd = towers["legacy"].shape["n_embd_text"]
    text_model = write_tiny_llama(folder / "text.gguf", n_embd=n_embd)
    mmprojs = [
        write_mmproj(folder / f"{name}.gguf", towers[name], layout)
        for name, (layout, _) in LAYOUTS.items()
    ]
    return [text_model, *mmprojs]


@pytest.fixture(scope="module")
def patched(
    files: list[Path], tower: Tower, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Features of our libraries by layout."""
    lib_dir = os.environ.get("ELASTIC_TEST_LIB_DIR")
    if lib_dir is None:
        elastic_llama = pytest.importorskip("elastic_llama")
        lib_dir = elastic_llama.lib_dir()
    return encode(lib_dir, files[0], files[1:], tower.image, tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="module")
def stock(
    files: list[Path], tower: Tower, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Features of unpatched libraries by layout."""
    return encode(
        stock_lib_dir(), files[0], files[1:], tower.image, tmp_path_factory.mktemp("stock")
    )


def test_numpy_agrees_with_stored_transformers_features(tower: Tower) -> None:
    pixels = normalize(tower.image, tower.mean, tower.std)
    ours = image_features(tower.weights, pixels, tower.shape["n_head"], layers=(-2,))
    np.testing.assert_allclose(ours, tower.features, rtol=0, atol=1e-9)


def test_stored_features_can_be_regenerated() -> None:
    pytest.importorskip("torch", reason="torch is needed to run the reference again")
    pytest.importorskip("transformers", reason="transformers is needed to run the reference again")
    spec = importlib.util.spec_from_file_location(
        "llava_reference", HERE / "reference" / "llava_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh = module.reference()
    with np.load(DATA) as stored:
        assert set(stored) == set(fresh)
        for name in stored:
            np.testing.assert_allclose(fresh[name], stored[name], rtol=0, atol=1e-9, err_msg=name)


def test_legacy_llava_file_gives_the_features_of_transformers(
    patched: dict[str, np.ndarray], tower: Tower
) -> None:
    assert cosines(patched["legacy"], tower.features).min() >= 0.999


@pytest.mark.parametrize("layout", BROKEN_IN_STOCK + NEVER_BROKEN)
def test_patched_features_are_right(
    layout: str, patched: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    assert cosines(patched[layout], expected[layout]).min() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("layout", BROKEN_IN_STOCK)
def test_stock_features_are_wrong(
    layout: str, stock: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    """Fails once upstream mends a defect: then its patch can go."""
    assert cosines(stock[layout], expected[layout]).min() < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("layout", NEVER_BROKEN)
def test_stock_was_right_about_the_others(
    layout: str, stock: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    assert cosines(stock[layout], expected[layout]).min() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("layout", NEVER_BROKEN + ("glm_edge",))
def test_patches_leave_the_others_alone(
    layout: str, stock: dict[str, np.ndarray], patched: dict[str, np.ndarray]
) -> None:
    np.testing.assert_array_equal(patched[layout], stock[layout])
