"""
The pure functions of the core, for tests and inspection; prone to change.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__ = [
    "ScoreView",
    "budget_cells",
    "cell_to_evict",
    "dequantize_rows",
    "eviction_candidates",
    "make_plan",
    "merge_layer",
    "policies",
    "quantize_rows",
    "split_budget",
    "split_with_past",
]

class ScoreView:
    """
    What a scorer looks at: one sequence at one compression.
    """
    @staticmethod
    def _pybind11_conduit_v1_(*args, **kwargs): ...
    def keys(
        self,
        layer: typing.SupportsInt | typing.SupportsIndex,
        head: typing.SupportsInt | typing.SupportsIndex,
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Keys of one KV head, float32 [n_cells, n_embd_head].
        """
    def values(
        self,
        layer: typing.SupportsInt | typing.SupportsIndex,
        head: typing.SupportsInt | typing.SupportsIndex,
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Values of one KV head, float32 [n_cells, n_embd_head].
        """
    @property
    def importance(self) -> typing.Any:
        """
        Attention received from all queries, float32 [n_layer, n_head_kv, n_cells].
        """
    @property
    def kind(self) -> numpy.ndarray:
        """
        0: text, 1: image, 2: generated; uint8 [n_cells].
        """
    @property
    def pinned(self) -> numpy.ndarray:
        """
        1: another sequence uses the cell too; uint8 [n_cells].
        """
    @property
    def recent(self) -> typing.Any:
        """
        Attention received from the last queries, of the same shape; None where the policy needs none.
        """

def budget_cells(
    value: typing.SupportsFloat | typing.SupportsIndex,
    n_tokens: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Cells that a budget (fraction kept, or number of cells) allows for n_tokens.
    """

def cell_to_evict(
    rule: str,
    kind: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    pinned: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    n_prompt: typing.SupportsInt | typing.SupportsIndex,
    offset: typing.SupportsInt | typing.SupportsIndex,
    n_sink: typing.SupportsInt | typing.SupportsIndex,
    total: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
) -> int:
    """
    Logical index of the cell to evict, -1 for none.
    """

def dequantize_rows(
    type: str,
    bytes: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    d: typing.SupportsInt | typing.SupportsIndex,
) -> numpy.typing.NDArray[numpy.float32]:
    """
    Stored bytes as f32 [n, d].
    """

def eviction_candidates(
    rule: str,
    kind: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    pinned: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    n_sink: typing.SupportsInt | typing.SupportsIndex,
    total: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
) -> list[int]:
    """
    Logical indices of the cells among which each head loses one of its own.
    """

def make_plan(
    policy: str,
    n_keep: typing.SupportsInt | typing.SupportsIndex,
    n_sink: typing.SupportsInt | typing.SupportsIndex,
    kind: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    pinned: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    importance: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    recent: typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None = None,
    keys: typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None = None,
    values: typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None = None,
    n_threads: typing.SupportsInt | typing.SupportsIndex = 1,
    layer_share: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] = [],
    masked: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8] | None = None,
    old: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8] | None = None,
    tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    scorer: collections.abc.Callable | None = None,
) -> dict:
    """
    Plan one compression: dict of kept [L, H, N] (-1: masked in the layer), bucket [L, H, T] (-1: evicted), positions [N] and rank_score [N]. With layer_share [L], N is what the layers that keep most hold; masked [L, T]: cells masked already. old [T]: text of earlier turns; tokens [T]: tokens that each cell stands for (empty: one each). scorer: a callable that gets a ScoreView and returns the scores [L, H, T], in place of the policy's own.
    """

def merge_layer(
    rule: str,
    kept: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    bucket: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    k: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    type_k: str,
    v: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    type_v: str,
    n_embd_head: typing.SupportsInt | typing.SupportsIndex,
    n_rows: typing.SupportsInt | typing.SupportsIndex,
    rows_src: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    rows_dst: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    importance: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    count: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    bias: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
    weight: typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None = None,
    key_weight: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] = [],
) -> tuple:
    """
    Carry out a plan of one layer on copies of K and V, by weights [1, H, T] that are the importance unless given; the keys of anchors move by key_weight [T]. Returns (k, v, importance, count, bias).
    """

def policies() -> list:
    """
    The table of policies: their parts, and what they can do.
    """

def quantize_rows(
    type: str, x: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]
) -> numpy.typing.NDArray[numpy.uint8]:
    """
    Rows of f32 [n, d] as stored bytes.
    """

def split_budget(
    n_keep: typing.SupportsInt | typing.SupportsIndex,
    n_text: typing.SupportsInt | typing.SupportsIndex,
    n_image: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[int, int]:
    """
    Text and image cells that stay of n_keep.
    """

def split_with_past(
    n_keep: typing.SupportsInt | typing.SupportsIndex,
    kind: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    old: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    masked: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8] | None = None,
) -> tuple[int, int]:
    """
    Text and image cells that stay of n_keep in a later turn about an image. kind [T], old [T], tokens [T], masked [L, T].
    """
