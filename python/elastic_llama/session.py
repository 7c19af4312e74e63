"""The native session of a context: what an `ElasticConfig` says, given to `_core.Session`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _core
from ._checks import OFF
from .config import ElasticConfig, policy_row
from .errors import ConfigError, UnsupportedModelError
from .pointers import address_of
from .retrieval import measured_scores

if TYPE_CHECKING:
    from .llama import ElasticLlama

__all__ = ["Resolved", "attach", "lazy_buffers", "resolve"]

log = logging.getLogger("elastic_llama")


@dataclass(frozen=True)
class Resolved:
    """What an `ElasticConfig` came to with a model and its context (`llm.elastic_resolved`).

    Parameters
    ----------
    scorer, selector, combiner, evictor : str
        Parts of the policy; a scorer written in Python by its name.
    overdraft : int
        Cells beyond the budget that an answer may take; where none was chosen and K and V are on a
        device, at least an eighth of the budget's cells.
    layer_share : tuple of float
        Cells of each layer in relation to the others'; empty: all as many.
    frees_layers : bool
        Whether the memory of cells that are masked in single layers goes back to the system.
    attention : tuple of str
        How attention that is scored or biased is computed, of each layer of the cache: "own op"
        (on the CPU), "fused op, a mask per head", "fused op, a head as a stream", "plain ops".
    """

    policy: str
    scorer: str
    selector: str
    combiner: str
    evictor: str
    budget: float | int
    overdraft: int
    kv_cells: int | None
    checkpoints: int
    layer_share: tuple[float, ...]
    frees_layers: bool
    attention: tuple[str, ...]


def attach(llm: ElasticLlama, ctx: Any, elastic: ElasticConfig) -> Any:
    """The native session of a context (a ctypes pointer) of the model of `llm`.

    Raises
    ------
    UnsupportedModelError, ConfigError
    """
    address = address_of(ctx)
    given = () if isinstance(elastic.layers, str) else elastic.layers
    measured = () if given else _measured_shares(llm, address, elastic)
    scorer = elastic.scorer
    try:
        return _core.Session(
            address,
            policy=elastic.policy,
            budget=float(elastic.budget),
            n_sink=elastic.n_sink,
            offset=elastic.offset,
            min_cells=elastic.min_cells,
            n_threads=elastic.n_threads,
            max_cells=elastic.kv_cells or 0,
            layer_share=given or measured,
            auto_layers=len(measured) > 0,  # without shares it would measure again
            overdraft=-1 if elastic.overdraft is None else elastic.overdraft,
            checkpoints=elastic.checkpoints,
            release_memory=elastic.release_memory,
            scorer=None if scorer is None else llm._scorer_guard.around_scorer(scorer),
        )
    except NotImplementedError as e:
        raise UnsupportedModelError(f"{e}: {OFF}") from e
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _measured_shares(llm: ElasticLlama, address: int, elastic: ElasticConfig) -> tuple[float, ...]:
    """Shares of layers that look words up; none where they are alike, or memory cannot follow."""
    if not elastic.may_be_uneven or not _core.frees_layers(address):
        return ()
    try:
        return tuple(_core.layer_shares(measured_scores(llm)))
    except (NotImplementedError, ValueError, RuntimeError) as e:
        log.warning("all layers keep as many cells, since they cannot be measured: %s", e)
        return ()


def resolve(session: Any, elastic: ElasticConfig) -> Resolved:
    """What `elastic` came to in the session that `attach` gave for it."""
    row = policy_row(elastic.policy)
    scorer = elastic.scorer
    name = row["scorer"] if scorer is None else getattr(scorer, "__name__", repr(scorer))
    return Resolved(
        policy=elastic.policy,
        scorer=name,
        selector=row["selector"],
        combiner=row["combiner"],
        evictor=row["evictor"],
        budget=elastic.budget,
        overdraft=int(row["overdraft"]) if elastic.overdraft is None else elastic.overdraft,
        kv_cells=elastic.kv_cells,
        checkpoints=elastic.checkpoints,
        layer_share=tuple(session.layer_share()),
        frees_layers=session.frees_rows(),
        attention=tuple(session.attention()),
    )


@contextmanager
def lazy_buffers(elastic: ElasticConfig | None) -> Iterator[None]:
    """Contexts that this thread makes inside take memory as cells are used, if that is wanted."""
    _core.lazy_buffers(elastic is not None and elastic.release_memory and not elastic.is_off)
    try:
        yield
    finally:
        _core.lazy_buffers(False)
