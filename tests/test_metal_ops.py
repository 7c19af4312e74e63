"""What a device gets to compute is among the ops of Metal, as its source lists them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# calls that make no op of their own
VIEWS = {
    "view_1d",
    "view_2d",
    "view_3d",
    "view_4d",
    "reshape_2d",
    "reshape_4d",
    "permute",
    "transpose",
}
OPS = {  # by the function that makes it
    "add": "ADD",
    "cast": "CPY",
    "concat": "CONCAT",
    "cont": "CONT",
    "cont_2d": "CONT",
    "cpy": "CPY",
    "flash_attn_ext": "FLASH_ATTN_EXT",
    "get_rows": "GET_ROWS",
    "mul": "MUL",
    "mul_mat": "MUL_MAT",
    "repeat_4d": "REPEAT",
    "scale": "SCALE",
    "set_rows": "SET_ROWS",
    "soft_max_ext": "SOFT_MAX",
    "tanh": "TANH",
}


@pytest.fixture(scope="module")
def tree() -> Path:
    out = subprocess.run(
        [sys.executable, str(ROOT / "cmake/prepare_llama_cpp.py")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return Path(re.search(r"^tree=(.*)$", out, re.M)[1])


@pytest.fixture(scope="module")
def table(tree: Path) -> str:
    """The body of supports_op."""
    source = (tree / "ggml/src/ggml-metal/ggml-metal-device.m").read_text()
    start = source.index("bool ggml_metal_device_supports_op(")
    return source[start : source.index("\n}\n", start)]


def made_in(name: str, header: str) -> set[str]:
    """Functions of ggml that make a node, called in a file of the runtime."""
    makers = set(re.findall(r"ggml_tensor \* ggml_(\w+)\(\s*struct ggml_context", header))
    text = (ROOT / "cpp/runtime" / name).read_text()
    return set(re.findall(r"\bggml_(\w+)\(", text)) & makers - {
        "new_tensor_1d",
        "new_tensor_2d",
        "new_tensor_3d",
        "new_tensor_4d",
    }


@pytest.mark.parametrize(
    "name", ["attention_ops.cpp", "attention_graph.cpp", "head_moves.cpp", "device_sums.cpp"]
)
def test_every_op_is_one_of_metals(tree: Path, table: str, name: str) -> None:
    header = re.sub(r"\s+", " ", (tree / "ggml/include/ggml.h").read_text())
    used = made_in(name, header)
    assert used, "a file that makes no op needs no line here"
    for function in used - VIEWS:
        assert function in OPS, f"ggml_{function}: which op is that, and does Metal have it?"
        op = OPS[function]
        case = "GGML_UNARY_OP_TANH" if op == "TANH" else f"GGML_OP_{op}"
        assert re.search(rf"case {case}:", table), f"Metal has no {case}"


def test_metal_adds_equal_types_only(table: str) -> None:
    """Why the bias is added to the mask in f32. If this fails, a cast can go."""
    case = table[table.index("case GGML_OP_ADD:") :]
    assert "op->src[0]->type == op->src[1]->type" in case[: case.index(";")]


def test_metal_has_no_outer_product(table: str) -> None:
    """Why sums are matrix products. If this fails, a transposed copy can go."""
    assert "GGML_OP_OUT_PROD" not in table


@pytest.mark.parametrize("kv_type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_metals_fused_op_takes_these_keys_and_values(table: str, kv_type: str) -> None:
    """iq4_nl is not among them: docs/backends.md says what happens then."""
    case = table[table.index("case GGML_OP_FLASH_ATTN_EXT:") :]
    assert f"case GGML_TYPE_{kv_type}:" in case[: case.index("case GGML_OP_LIGHTNING_INDEXER")]
