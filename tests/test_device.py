"""Keys and values on a device of this machine: the answers of the host, as near as stock comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.device_cases import POLICIES, case, run
from tests.support.engine import N_GPU_LAYERS
from tests.support.tiny_llama import write_tiny_llama

IMAGE, TEXT = 0, 1  # what the first sequence is given
MORE_THAN_STOCK = 10  # times its error: a softmax of fewer cells averages less of it out

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS == 0, reason="for builds with a device: ELASTIC_TEST_GPU_LAYERS=99"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "model.gguf"
    write_tiny_llama(path, n_layer=3)
    return path


GIVEN = [{"image_in": TEXT}, {"image_in": IMAGE}, {"n_seq": 3}, {"n_seq": 3, "unified": False}]


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
@pytest.mark.parametrize("given", GIVEN, ids=["text", "image", "unified", "streams"])
def test_answers_are_those_of_the_host(model: Path, type_kv: str, given: dict[str, Any]) -> None:
    policies = [None, *(POLICIES if "n_seq" not in given else ("elastic", "h2o"))]
    stock, *ours = run(model, [], [case(policy, type=type_kv, **given) for policy in policies])
    assert stock["nmse"] > 0, "equal to the last bit: no device took part"
    for policy, got in zip(policies[1:], ours, strict=True):
        print(f"{policy}: {got['nmse']:.1e}, stock {stock['nmse']:.1e}, by {got['ways']}")
        assert got["same_cells"], (policy, got)
        assert got["nmse"] <= max(MORE_THAN_STOCK * stock["nmse"], 1e-6), (policy, got, stock)
