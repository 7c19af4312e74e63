"""What the elastic cache keeps, and how it chooses."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, wraps
from typing import Any, TypeVar

from .errors import ConfigError, message


@lru_cache(maxsize=1)
def _policy_table() -> dict[str, dict[str, Any]]:
    from . import _core

    return {str(row["name"]): dict(row) for row in _core.core.policies()}


def policy_names() -> tuple[str, ...]:
    """Names of the policy table, in its order."""
    return tuple(_policy_table())


def policy_row(name: str) -> dict[str, Any]:
    """A row of the policy table: the parts of a policy, and what it can do.

    Raises
    ------
    ConfigError
        There is no such policy.
    """
    if name not in policy_names():
        raise ConfigError(
            message("config", "policy", repr(name), "one of " + ", ".join(policy_names()))
        )
    return _policy_table()[name]


_F = TypeVar("_F", bound=Callable[[Any], Any])

_LIKE = "elastic_like"  # attribute of a scorer: whose other parts are used


def scorer(like: str = "elastic") -> Callable[[_F], _F]:
    """Makes a callable a policy: its scores, and the other parts of the policy `like`.

    The callable gets a `ScoreView` once per compression and returns scores
    [n_layer, n_head_kv, n_cells], finite and >= 0, higher = keep.

    Raises
    ------
    ConfigError
        There is no policy `like`.

    Examples
    --------
    >>> @scorer(like="h2o")
    ... def received(view):
    ...     return view.importance
    >>> ElasticConfig(policy=received).policy
    'h2o'
    """
    if not isinstance(like, str):
        raise ConfigError(
            message(
                "scorer", "like", repr(like), "the name of a policy", 'write @scorer(like="...")'
            )
        )
    policy_row(like)

    def mark(score: _F) -> _F:
        setattr(score, _LIKE, like)
        return score

    return mark


@dataclass(frozen=True)
class ElasticConfig:
    """Parameters of the elastic cache.

    Parameters
    ----------
    budget : float or int
        What is KEPT. 0 < budget <= 1: the fraction of the tokens seen that stay as cells; a whole
        number above 1: that many cells. `elastic` leaves up to four of them free for the answer,
        unless a prompt ends with an image.
    policy : str or callable
        A row of the policy table, see `policy_names`. "full" keeps everything. A callable, which
        `scorer` may have marked, gives the scores instead of the policy's own: it becomes `scorer`,
        and this the name of the policy whose other parts are used ("elastic" if it says nothing).
    n_sink : int
        First cells that always stay, >= 0.
    offset : int
        While generating under `local` and `elastic-paper`, the cell this far before the end of the
        prompt leaves, >= 0.
    min_cells : int
        A sequence with fewer cells is left alone, >= 1.
    n_threads : int
        For planning and merging; 0: as many as the context uses for prompts.
    kv_cells : int, optional
        A hard cap: the sequence never holds more cells than these and one ubatch, neither while a
        prompt is read, which is then compressed on the way, nor while generating. >= n_sink + 2.
    overdraft : int, optional
        Cells beyond the budget that an answer may take before it is compressed with all that came
        before it (policy "elastic"); under `kv_cells` they are a part of those. None: what the
        policy is made for (`elastic`: 32); without `kv_cells`, where K and V are on a device, as
        many as the budget has, while at least as many stay free.
    checkpoints : int
        States that are kept of the sequence so that what came later can be taken back without
        reading the prompt again: before the last prompt and after its compression. Each takes as
        much memory as the sequence did then (`ElasticStats.checkpoint_bytes`). 0: none, and a
        prompt that is asked again is read again.
    probe : int, optional
        Before a prompt of text is compressed, this many likely tokens of its answer are decoded
        with all cells and taken back; what they attend to is part of the importance. Not where an
        image is among the cells. >= 0. None: 16 for `elastic` and `elastic-evict`, else 0, and one
        for 24 cells that are dropped at most. Its name was `lookahead`, which is still taken, with
        a DeprecationWarning.
    layers : "auto", "even" or sequence of float
        Cells of each layer of the cache in relation to the others'; the budget holds on average.
        "auto": layers that look words up keep more (`retrieval.py`), for the policy `elastic` where
        rows of single layers can go back to the operating system: on the CPU under Linux, with
        flash attention, `release_memory` and no `kv_cells`. "even", and "auto" elsewhere: all keep
        as many. Numbers hold everywhere, but only there do masked rows save memory; for the
        policy `elastic` without `kv_cells` only.
    release_memory : bool
        Give the memory of cells that are not in use back to the operating system, and take none
        before they are used. CPU and Linux; elsewhere it changes nothing.
    scorer : callable, optional
        Scores instead of those of `policy`: see the function of this name. What it raises reaches
        the caller, and the prompt stays uncompressed.

    Examples
    --------
    >>> ElasticConfig(budget=0.5).is_off
    False
    """

    budget: float | int = 0.2
    policy: Any = "elastic"  # a str once it is made
    n_sink: int = 1
    offset: int = 25
    min_cells: int = 64
    n_threads: int = 0
    kv_cells: int | None = None
    probe: int | None = None
    overdraft: int | None = None
    checkpoints: int = 2
    layers: str | tuple[float, ...] = "auto"
    release_memory: bool = True
    scorer: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        self._take_scorer()
        object.__setattr__(self, "budget", budget_value("budget", self.budget))
        leasts = {"n_sink": 0, "offset": 0, "min_cells": 1, "n_threads": 0}
        for name, least in leasts.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if self.overdraft is not None:
            object.__setattr__(self, "overdraft", whole("overdraft", self.overdraft, 0))
        object.__setattr__(self, "checkpoints", whole("checkpoints", self.checkpoints, 0))
        if self.probe is not None:
            object.__setattr__(self, "probe", whole("probe", self.probe, 0))
        if self.kv_cells is not None:
            cells = whole("kv_cells", self.kv_cells, self.n_sink + 2)
            object.__setattr__(self, "kv_cells", cells)
        row = policy_row(self.policy)
        object.__setattr__(self, "layers", _layers(self.layers))
        if not isinstance(self.layers, str) and (
            not row["can_vary_layers"] or self.kv_cells is not None
        ):
            raise ConfigError(
                message(
                    "config",
                    "layers that keep different numbers of cells",
                    f"policy {self.policy!r}, kv_cells {self.kv_cells}",
                    "one of " + ", ".join(_varying()) + ", without kv_cells",
                    'pass layers="even"',
                )
            )
        if self.kv_cells is not None and row["keeps_all"]:
            raise ConfigError(
                message(
                    "config",
                    "kv_cells with the policy that keeps every cell",
                    self.kv_cells,
                    do="choose another policy, or leave kv_cells out",
                )
            )

    def _take_scorer(self) -> None:
        given = self.policy
        if callable(given):
            if self.scorer is not None:
                raise ConfigError(
                    message(
                        "config",
                        "a scorer as policy and another one",
                        f"{given!r} and {self.scorer!r}",
                        do="pass one of them",
                    )
                )
            object.__setattr__(self, "scorer", given)
            object.__setattr__(self, "policy", getattr(given, _LIKE, type(self).policy))
        if self.scorer is None:
            return
        if not callable(self.scorer):
            raise ConfigError(message("config", "scorer", repr(self.scorer), "a callable or None"))
        if policy_row(self.policy)["keeps_all"]:
            raise ConfigError(
                message(
                    "config",
                    "a scorer with the policy that keeps every cell",
                    repr(self.policy),
                    do="choose another policy, or leave the scorer out",
                )
            )

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        shown = (f"{name}={x!r}" for name, x in values if name != "scorer" or x is not None)
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def off(cls) -> ElasticConfig:
        """Keeps every cell: nothing is attached, as with `elastic=None`, whatever the model is."""
        return cls(budget=1.0, policy="full")

    @property
    def lookahead(self) -> int | None:
        """Deprecated: `probe`."""
        _warn_lookahead()
        return self.probe

    @property
    def is_off(self) -> bool:
        """Whether every cell stays, so that `ElasticLlama` attaches nothing."""
        return bool(policy_row(self.policy)["keeps_all"]) or (
            self.budget == 1 and self.kv_cells is None
        )

    @property
    def may_be_uneven(self) -> bool:
        """Whether layers may keep different numbers of cells, where memory follows."""
        return (
            self.layers != "even"
            and bool(policy_row(self.policy)["can_vary_layers"])
            and not self.is_off
            and self.kv_cells is None
            and self.release_memory
        )

    def check_cells(self, n_ctx: int) -> None:
        """Refuse a budget of more cells than the context has."""
        if self.budget > n_ctx:
            raise ConfigError(
                message(
                    "config",
                    "budget in cells",
                    self.budget,
                    f"at most the {n_ctx} cells of the context",
                    "raise n_ctx or lower the budget",
                )
            )


def _warn_lookahead() -> None:
    warnings.warn("lookahead is now probe", DeprecationWarning, stacklevel=3)


_init = ElasticConfig.__init__


@wraps(_init)
def _init_renamed(self: ElasticConfig, *args: Any, **kwargs: Any) -> None:
    """Takes `lookahead` for `probe`. It is no field, so that `replace` passes only one of them."""
    if "lookahead" in kwargs:
        _warn_lookahead()
        value = kwargs.pop("lookahead")
        kwargs["probe"] = kwargs.get("probe") if value is None else value
    _init(self, *args, **kwargs)


ElasticConfig.__init__ = _init_renamed  # type: ignore[method-assign]


def budget_value(name: str, value: object) -> float | int:
    """A fraction in (0, 1], or a whole number of cells above 1.

    Raises
    ------
    ConfigError
    """
    expected = "a fraction in (0, 1] to keep, or a whole number of cells above 1"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(message("config", name, repr(value), expected))
    budget = float(value)
    if not math.isfinite(budget) or budget <= 0 or (budget > 1 and budget != int(budget)):
        hint = f"did you mean {budget / 100:g} ?" if 1 < budget < 100 else ""
        raise ConfigError(message("config", name, repr(value), expected, hint))
    if budget > 2**31 - 1:
        raise ConfigError(message("config", name, repr(value), expected))
    return int(budget) if budget > 1 else budget


def _layers(value: object) -> str | tuple[float, ...]:
    if isinstance(value, str) and value in ("auto", "even"):
        return value
    shares: tuple[float, ...] = ()
    try:
        if not isinstance(value, str):
            shares = tuple(float(x) for x in value)  # type: ignore[attr-defined]
        good = shares != () and all(math.isfinite(x) and x > 0 for x in shares)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(
            message(
                "config", "layers", repr(value), '"auto", "even" or a number > 0 for each layer'
            )
        )
    return shares


def _varying() -> list[str]:
    """Policies that take numbers for layers."""
    return [name for name in policy_names() if policy_row(name)["can_vary_layers"]]


def whole(name: str, value: object, least: int, most: int = 2**31 - 1) -> int:
    """The value as a plain int.

    Raises
    ------
    ConfigError
        It is no whole number from `least` to `most`.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)
        or not least <= int(value) <= most
    ):
        raise ConfigError(
            message("config", name, repr(value), f"a whole number from {least} to {most}")
        )
    return int(value)
