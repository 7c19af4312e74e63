"""One scenario under one setting: every context prefills, then they generate in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from ..config import ElasticConfig
from ..llama import ElasticLlama
from ..probe import probe
from .contexts import Context, ContextOptions, Ideal, Prompts
from .memory import resident_bytes
from .scenarios import Scenario


@dataclass
class Run:
    """What one context did. Times in seconds, sizes in bytes.

    Attributes
    ----------
    prefill_s : list of float
        Of all sequences together, once per repetition; scoring included, plan and merge not.
    decode_tps : list of float
        Tokens of all sequences per second, one for each part of the generation.
    score_s, plan_s, merge_s : float
        Reading the importance; plan and merge of the compression after the prompt. The graph's
        share of scoring is in `prefill_s` (compare it with stock's), as are compressions under way.
    probe_s : float
        Probes of the answers before that compression, prompts of text only.
    kv_bytes : int
        K, V and bias of the cells in use after the prompt, and `other_bytes`.
    other_bytes : int
        Of them what is not compressed: windows and recurrent states.
    rss : dict
        What the context's own calls added to the resident set: up to and with the last prompt
        ("prompt"), with its compression ("compressed"), with the generation ("end").
    """

    kind: str
    budget: float | None
    setting: ContextOptions
    cells_prompt: int = 0
    cells_kept: int = 0
    cells_end: int = 0
    prefill_s: list[float] = field(default_factory=list)
    decode_tps: list[float] = field(default_factory=list)
    score_s: float = 0.0
    plan_s: float = 0.0
    merge_s: float = 0.0
    probe_s: float = 0.0
    kv_bytes: int = 0
    other_bytes: int = 0
    bytes_freed: int = 0
    rss: dict[str, int] = field(default_factory=dict)
    graphs_reused: int = 0
    n_steps: int = 0


class Contestant:
    """A context and its figures. Contexts take turns, so each counts its own growth in memory."""

    def __init__(
        self,
        kind: str,
        setting: ContextOptions,
        config: ElasticConfig | None,
        make: Callable[[], Context],
    ) -> None:
        self.run = Run(kind, None if config is None else float(config.budget), setting)
        self.config = config
        self._own = 0
        with self._counted("made"):
            self.context = make()
        self.ideal: Ideal | None = None
        self.pos = 0

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        before = resident_bytes()
        yield
        after = resident_bytes()
        if before is not None and after is not None:
            self._own += after - before
            self.run.rss[name] = self._own

    def close(self) -> None:
        self.context.close()

    def prefill(self, parts: list[Any], first_token: int = 0) -> None:
        """All sequences once; compression is timed on its own. `first_token`: of the answers."""
        context, run = self.context, self.run
        with self._counted("prompt"):
            context.clear()
            if context.session is not None:
                context.session.reset_stats()
            run.prefill_s.append(sum(context.prefill(parts, seq) for seq in range(context.n_seqs)))
        self.pos = sum(len(part) for part in parts)
        run.cells_prompt = run.cells_kept = self.pos
        run.other_bytes = sum(map(context.other_bytes, range(context.n_seqs)))
        if context.session is not None:
            self._compress(first_token)

    def warm_up(self, part: Any) -> None:
        """What only the first decode of a context does: pages of the model, buffers."""
        with self._counted("warm"):
            self.context.clear()
            self.context.prefill([part], 0)

    def _compress(self, first_token: int) -> None:
        context, run = self.context, self.run
        assert self.config is not None
        run.cells_prompt = context.n_cells()
        run.score_s = context.session.stats()["score_us"] / 1e6
        with self._counted("compressed"):
            first = dict.fromkeys(range(context.n_seqs), first_token)
            start = time.perf_counter()
            n_steps = probe(context.ctx, context.session, self.config, first)
            run.probe_s = time.perf_counter() - start if n_steps else 0.0
            before = context.session.stats()
            for seq in range(context.n_seqs):
                context.session.compress(seq)
        stats = context.session.stats()
        run.cells_kept = context.n_cells()
        run.plan_s, run.merge_s = (
            (stats[name] - before[name]) / 1e6 for name in ("plan_us", "merge_us")
        )
        freed = (run.cells_prompt - run.cells_kept) * context.session.kv_bytes_per_cell()
        run.bytes_freed = freed * context.n_seqs

    def generate(self, tokens: list[int]) -> None:
        """One part of the generation."""
        with self._counted("end"):
            self._generate(tokens)

    def _generate(self, tokens: list[int]) -> None:
        reused = self.context.n_graphs_reused()
        start = time.perf_counter()
        for token in tokens:
            if self.ideal is not None:
                self.ideal.step(token)
            else:
                self.context.step(token, self.pos)
                self.pos += 1
        self.context.synchronize()
        seconds = time.perf_counter() - start
        self.run.decode_tps.append(len(tokens) * self.context.n_seqs / seconds)
        self.run.graphs_reused += self.context.n_graphs_reused() - reused
        self.run.n_steps += len(tokens)

    def finish(self, cell_bytes: int) -> None:
        run = self.run
        if self.ideal is not None:
            run.cells_end = self.ideal.n_now
        elif self.context.session is not None:
            run.cells_end = self.context.n_cells()
            cell_bytes = self.context.session.kv_bytes_per_cell()
        else:
            run.cells_end = self.pos
        run.kv_bytes = cell_bytes * run.cells_kept * self.context.n_seqs + run.other_bytes


def cell_bytes(llm: ElasticLlama, kv_type: str) -> int:
    """Bytes of K and V of one cell in all layers, read from a context of one ubatch."""
    context = Context(llm, ContextOptions(kv_type), 1, 256, ElasticConfig(policy="h2o"))
    try:
        assert context.session is not None
        return int(context.session.kv_bytes_per_cell())
    finally:
        context.close()


def n_steps(scenario: Scenario, n_stock: int, n_budgets: int, n_prefills: int) -> int:
    """Calls of `tick` in `measure`."""
    n_generate = (n_stock + 2 * n_budgets) * scenario.n_parts
    return (n_stock + n_budgets) * n_prefills + n_budgets + n_generate


def measure(
    llm: ElasticLlama,
    scenario: Scenario,
    setting: ContextOptions,
    configs: list[ElasticConfig],
    n_prefills: int,
    tick: Callable[[str], None],
    stock_flash: Sequence[bool] = (True,),
) -> list[Run]:
    """Stock for each of `stock_flash`; elastic and ideal, with flash attention, for each config.

    A context's prefills alternate with the others'; so do the parts of the generation, and who
    comes first changes from part to part.
    """
    contestants: list[Contestant] = []
    prompts = Prompts(llm, scenario)
    n_cells = scenario.n_prompt + scenario.n_gen
    setting = replace(setting, flash_attn=True)
    try:
        for flash_attn in stock_flash:
            stock = replace(setting, flash_attn=flash_attn)
            make = partial(Context, llm, stock, scenario.n_seqs, n_cells)
            contestants.append(Contestant("stock", stock, None, make))
        for config in configs:
            own = replace(config, kv_cells=scenario.kv_cells)
            size = n_cells if own.kv_cells is None else own.kv_cells + setting.n_ubatch
            make = partial(Context, llm, setting, scenario.n_seqs, size, own)
            contestants.append(Contestant("elastic", setting, own, make))
        for contestant in contestants:
            contestant.warm_up(prompts.parts()[0])
        for turn in range(n_prefills):
            for contestant in contestants if turn % 2 == 0 else contestants[::-1]:
                contestant.prefill(prompts.parts(), prompts.tokens[scenario.n_text])
                tick(f"{scenario.name} {contestant.run.kind}: prompt")
        for elastic in [r for r in contestants if r.run.kind == "elastic"]:
            make = partial(_ideal_context, llm, scenario, elastic)
            contestants.append(Contestant("ideal", setting, elastic.config, make))
            _fill_ideal(scenario, prompts, elastic, contestants[-1])
            tick(f"{scenario.name} ideal: prompt")
        _generate(scenario, prompts, contestants, tick)
        size = cell_bytes(llm, setting.kv_type)
        for contestant in contestants:
            contestant.finish(size)
    finally:
        for contestant in contestants:
            contestant.close()
    return [contestant.run for contestant in contestants]


def _ideal_context(llm: ElasticLlama, scenario: Scenario, elastic: Contestant) -> Context:
    n_cells = elastic.run.cells_kept + scenario.n_gen
    return Context(llm, elastic.run.setting, scenario.n_seqs, n_cells)


def _fill_ideal(
    scenario: Scenario, prompts: Prompts, elastic: Contestant, ideal: Contestant
) -> None:
    """As many cells as `elastic` has after its prompt."""
    assert ideal.config is not None
    held = elastic.run.cells_kept
    tokens = (prompts.tokens * (1 + held // len(prompts.tokens)))[:held]
    ideal.prefill([tokens])
    ideal.ideal = Ideal(ideal.context, ideal.config, scenario.n_prompt, held)


def _generate(
    scenario: Scenario, prompts: Prompts, contestants: list[Contestant], tick: Callable[[str], None]
) -> None:
    tokens = prompts.tokens[scenario.n_text :]
    size = scenario.n_gen // scenario.n_parts
    for contestant in contestants:  # the first step after a prompt builds its graph
        contestant.generate(tokens[:2])
        contestant.run.decode_tps.clear()
        contestant.run.n_steps = contestant.run.graphs_reused = 0
    for part in range(scenario.n_parts):
        shift = part % len(contestants)
        for contestant in contestants[shift:] + contestants[:shift]:
            contestant.generate(tokens[2 + part * size : (part + 1) * size])
            tick(f"{scenario.name} {contestant.run.kind}: generation")


def as_row(run: Run, scenario: Scenario, about: dict[str, Any]) -> dict[str, Any]:
    """A line of results: everything that is needed to read the figures later."""
    shape = {k: v for k, v in asdict(scenario).items() if k != "about"}
    return {**about, "scenario": shape, **asdict(run)}


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")
