"""
Native part of elastic_llama: the elastic KV cache.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
from . import core

__all__ = [
    "Session",
    "build_info",
    "bytes_in_use",
    "core",
    "default_params",
    "frees_layers",
    "layer_shares",
    "lazy_buffers",
    "measure_layers",
    "memory",
    "route_log",
    "take_log",
]

class Session:
    """
    The elastic KV cache of one llama_context.
    """
    @staticmethod
    def _pybind11_conduit_v1_(*args, **kwargs): ...
    def __init__(
        self,
        ctx: typing.SupportsInt | typing.SupportsIndex,
        *,
        policy: str = "elastic",
        budget: typing.SupportsFloat | typing.SupportsIndex = 0.2,
        n_sink: typing.SupportsInt | typing.SupportsIndex = 1,
        offset: typing.SupportsInt | typing.SupportsIndex = 25,
        min_cells: typing.SupportsInt | typing.SupportsIndex = 64,
        n_threads: typing.SupportsInt | typing.SupportsIndex = 0,
        max_cells: typing.SupportsInt | typing.SupportsIndex = 0,
        overdraft: typing.SupportsInt | typing.SupportsIndex = -1,
        checkpoints: typing.SupportsInt | typing.SupportsIndex = 2,
        layer_share: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] = [],
        auto_layers: bool = True,
        record: bool = False,
        release_memory: bool = True,
        n_question: typing.SupportsInt | typing.SupportsIndex = 0,
        scorer: collections.abc.Callable | None = None,
    ) -> None:
        """
        Attach an elastic cache to the llama_context at address `ctx`.

        A sequence never holds more cells than `max_cells` and one ubatch, or one batch where batches are
        larger (0: no such cap). `overdraft`: cells beyond the budget that an answer may take (-1: what the
        policy is made for). `checkpoints`: states that are kept of each sequence so that what came later
        can be taken back (0: none). `layer_share`: cells of each layer of the cache in relation to the others',
        > 0, while the budget holds on average (policy "elastic", without max_cells; empty: all the same); with
        `auto_layers` only where rows of single layers can go back to the operating system, and measured if empty. With
        `release_memory`, rows that are not in use go back to the operating system. With `record`, every score
        that any policy looks at is kept, so that a saved prompt can be loaded under each of them. `n_question`: cells of the budget that
        stay free where `compress` finds an image at the end, for its question. `scorer`: a callable that is given a ScoreView at each compression and returns
        scores float32 [n_layer, n_head_kv, n_cells], finite and >= 0, higher = keep; instead of the scores of `policy`, whose
        other parts stay.

        Raises ValueError for a bad parameter, NotImplementedError for a memory that cannot be compressed,
        RuntimeError when the cache holds cells already.
        """
    def attention(self) -> list[str]:
        """
        How attention that is scored or biased is computed in each layer of the cache: "own op" (on the CPU), "fused op, a mask per head", "fused op, a head as a stream" or "plain ops".
        """
    def begin_probe(self) -> None:
        """
        What is decoded from now on is taken back by end_probe, as if it had never been decoded.

        What its tokens attended to stays part of the importance of the prompts that are there.

        Raises ValueError while a probe is running, and where there can be none (`can_probe`).
        """
    def bias(
        self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Attention bias, f32 [n_layer, n_head_kv, n_cells].
        """
    def can_cut(
        self,
        p0: typing.SupportsInt | typing.SupportsIndex,
        seq_id: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        The largest position <= p0 from which on everything can be removed exactly; 0: only the whole sequence.
        """
    def can_probe(self) -> bool:
        """
        Whether what is decoded can be taken back; not with recurrent layers.
        """
    def cells(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> dict:
        """
        Cells of a sequence in order of position: dict of int32 arrays index, pos, kind (0 text, 1 image, 2 generated).
        """
    def cells_per_layer(
        self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> numpy.typing.NDArray[numpy.int32]:
        """
        Cells that each layer holds of the sequence, int32 [n_layer].
        """
    def compress(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Compress the prompt of a sequence now; returns the number of cells it holds after.
        """
    def compress_prefix(
        self,
        budget: typing.SupportsFloat | typing.SupportsIndex,
        seq_id: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        Compress a prompt that others begin with, by a budget of its own; returns the number of cells it holds after.

        No checkpoint is taken, so that a saved state has its K and V once.
        """
    def count(
        self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Tokens merged into each cell, f32 [n_layer, n_head_kv, n_cells].
        """
    def detach(self) -> None:
        """
        Switch the elastic cache off. RuntimeError while some cell carries an attention bias.
        """
    def end_probe(self) -> None: ...
    def equalize_layers(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Give all layers of a sequence as many cells, on average as many as before; returns n_cells.
        """
    def forget(self) -> None:
        """
        Forget the context without touching it; for when it is about to be freed.
        """
    def frees_rows(self) -> bool:
        """
        Whether rows masked in single layers (layer_share) go back to the operating system.
        """
    def importance(
        self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> numpy.typing.NDArray[numpy.float32]:
        """
        Importance, f32 [n_layer, n_head_kv, n_cells].
        """
    def kv_bytes(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Bytes of K, V and bias that the layers hold of the sequence.
        """
    def kv_bytes_per_cell(self) -> int:
        """
        Bytes of K, V and bias that one cell takes in all layers.
        """
    def last_plan(self) -> dict:
        """
        Plan of the last compression: kept [L, H, n_keep], bucket [L, H, n_cells].
        """
    def layer_share(self) -> list[float]:
        """
        Cells of each layer in relation to the others', as resolved when attaching; empty: all as many.
        """
    def make_room(
        self,
        n_new: typing.SupportsInt | typing.SupportsIndex,
        seq_id: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        Free cells for `n_new` tokens, if it takes no more than compressing what is beyond the budget; returns n_cells.
        """
    def memory(self) -> dict:
        """
        What the cache works on, and what is left alone: dict as of `memory(ctx)`.
        """
    def n_cells(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Cells the sequence holds; with layer_share not every layer holds all of them.
        """
    def n_free(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Tokens that find a cell now, in the part of the memory that has fewest.
        """
    def n_per_layer(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Cells that a layer holds of the sequence, on average over the layers, rounded up.
        """
    def n_to_drop(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Cells that the compression of the sequence's prompt is going to take away; 0 if it has been compressed.
        """
    def n_tokens(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Tokens decoded since the sequence was last empty; 0 where nothing is ever dropped (budget 1, policy full).
        """
    def next_pos(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Position of the next token; behind an image with M-RoPE its height and width count.
        """
    def other_bytes(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Bytes that the sequence holds in windows and recurrent states, which are not compressed.
        """
    def read_kv(
        self,
        seq_id: typing.SupportsInt | typing.SupportsIndex,
        layer: typing.SupportsInt | typing.SupportsIndex,
    ) -> tuple:
        """
        K and V of one layer as f32 [n_cells, n_head_kv, n_embd_head], as stored (after RoPE).
        """
    def recent(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> tuple:
        """
        Attention from the last queries: (decayed, windowed), each f32 [n_layer, n_head_kv, n_cells] or empty where not kept. Windowed: 0 once the prompt is compressed.
        """
    def reset_stats(self) -> None: ...
    def restore_logits(self, seq_id: typing.SupportsInt | typing.SupportsIndex = 0) -> bool:
        """
        Make the logits after a prompt's last token, which is the sequence's last, those of the context; False: not known.
        """
    def set_prefill(self, value: bool) -> None:
        """
        While set, batches of one token are part of a prompt, which is compressed for max_cells only.
        """
    def stats(self) -> dict:
        """
        Counters since the last reset; times in microseconds, sizes in bytes.
        """
    @property
    def is_attached(self) -> bool: ...

def build_info() -> dict:
    """
    What this build is made of: llama.cpp commit, patches, backends, CPU features.
    """

def bytes_in_use(
    ctx: typing.SupportsInt | typing.SupportsIndex,
    seq_id: typing.SupportsInt | typing.SupportsIndex = 0,
) -> tuple:
    """
    Bytes that a sequence of the llama_context at this address holds: (attention, other).

    attention: K and V of the part that an elastic cache compresses. other: of windows, with cells that they have passed and not
    used again, and of its recurrent state. No elastic cache needs to be attached.

    Raises NotImplementedError, with the reason, for a memory that cannot be compressed, ValueError for a sequence out of range.
    """

def default_params() -> dict:
    """
    Parameters of an elastic cache where none are given.
    """

def frees_layers(ctx: typing.SupportsInt | typing.SupportsIndex) -> bool:
    """
    Whether rows that single layers of the llama_context at this address do without can go back to the operating system.
    """

def layer_shares(
    scores: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
) -> list[float]:
    """
    Cells that each layer is to hold by its score, mean 1; empty where all are alike. ValueError for scores < 0 or not finite.
    """

def lazy_buffers(value: bool) -> None:
    """
    Whether the K and V buffers of contexts that this thread makes from now on are left untouched until they are used.
    """

def measure_layers(
    model: typing.SupportsInt | typing.SupportsIndex,
    n_threads: typing.SupportsInt | typing.SupportsIndex,
) -> list[float]:
    """
    How much each layer of the cache looks words up, list of float [n_layer] in [0, 1].

    Takes a context of its own, a prompt of 56 tokens and 32 steps. `model`: address of the llama_model.

    Raises NotImplementedError for a model whose memory cannot be compressed, ValueError or RuntimeError.
    """

def memory(ctx: typing.SupportsInt | typing.SupportsIndex) -> dict:
    """
    What an elastic cache of the llama_context at this address works on; none needs to be attached.

    dict of kind ("plain", "sliding window", "hybrid", "hybrid, sliding window"), n_layer_model, n_layer (compressed),
    cell_bytes (K and V of one cell of those layers), other_bytes (allocated by windows and recurrent states, which are left
    alone), other_cells (of the windows, or states) and recurrent (no probes, no cuts, no checkpoints).

    Raises NotImplementedError, with the reason, for a memory that cannot be compressed.
    """

def route_log(level: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Send llama.cpp's log of this level and above to stderr (1 debug, 2 info, 3 warning, 4 error, 5 nothing). Returns the address of the ggml_log_callback, for other libraries.
    """

def take_log() -> list[str]:
    """
    The latest warnings and errors of the native libraries, oldest first; forgotten after this.
    """
