"""The run: every item under every policy, budget and KV type; one line of results per item."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ElasticConfig, policy_row
from ..errors import ConfigError, message
from ..kv_types import KV_TYPES
from ..llama import ElasticLlama
from .items import Item
from .metrics import forced_figures, is_right, log_softmax, rouge_l
from .prompts import Prefiller, Prompt
from .sequence_runner import Answer, SequenceRunner
from .streams import Streams


@dataclass(frozen=True)
class Case:
    """One way to hold the cache."""

    policy: str
    budget: float
    kv_type: str = "f16"

    @property
    def name(self) -> str:
        return f"{self.policy}@{self.budget:g}/{self.kv_type}"


@dataclass
class Plan:
    """What is run.

    Attributes
    ----------
    before : bool
        Compress images before the question is known.
    metrics : tuple of str
        "forced" (perplexity, KL, agreement), "exact", "rouge".
    parallel : int
        Sequences decoded side by side.
    """

    cases: list[Case]
    model: str | None = None
    mmproj: str | None = None
    before: bool = False
    metrics: tuple[str, ...] = ("forced", "exact", "rouge")
    parallel: int = 1
    n_threads: int = 1
    n_ctx: int = 2048
    n_ubatch: int = 512
    elastic: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the figures; two runs with the same may share results."""
        return {
            "cases": [c.name for c in self.cases],
            "model": _identity(self.model),
            "mmproj": _identity(self.mmproj),
            "before": self.before,
            "metrics": list(self.metrics),
            "flash_attn": True,  # the elastic cache has no other
            "elastic": self.elastic,
        }


def _identity(path: str | None) -> str | None:
    """Name and sha256 of a file, so that results say which model they are of."""
    if path is None:
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{os.path.basename(path)} sha256:{digest.hexdigest()}"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Finished items of all shards in a folder of results, those packed by gzip first.

    Half a line counts as none.
    """
    packed = sorted(folder.glob("results*.jsonl.gz"))
    texts = [gzip.decompress(path.read_bytes()).decode("utf-8") for path in packed]
    texts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("results-*.jsonl"))]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def make_config(policy: str, budget: float, given: dict[str, Any]) -> ElasticConfig:
    """The options of a run as a policy has them: only some take numbers for layers."""
    if not policy_row(policy)["can_vary_layers"]:
        given = {name: value for name, value in given.items() if name != "layers"}
    return ElasticConfig(budget=budget, policy=policy, **given)


class Results:
    """A folder with `config.yaml`, written first, and `results-I.jsonl`, a line per finished item.

    Shards of one run write files of their own and read all of them.

    Raises
    ------
    ConfigError
        The folder holds the results of another run.
    """

    def __init__(self, folder: Path, description: dict[str, Any], shard: int = 0) -> None:
        import yaml

        self.folder = folder
        self.path = folder / f"results-{shard}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        if config.exists():
            found = yaml.safe_load(config.read_text(encoding="utf-8"))
            changed = [
                key
                for key in sorted(set(found) | set(description))
                if found.get(key) != description.get(key)
            ]
            if changed:
                raise ConfigError(
                    message(
                        "eval",
                        f"{folder} holds another run: {', '.join(changed)} differ",
                        do="choose another --out, or remove the folder",
                    )
                )
        else:
            config.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
        self._mend()

    def _mend(self) -> None:
        """Cut off the half line that a crash may have left."""
        if self.path.exists():
            whole = self.path.read_text(encoding="utf-8")
            kept = whole[: whole.rfind("\n") + 1]
            if kept != whole:
                self.path.write_text(kept, encoding="utf-8")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All finished items, of all shards."""
        return read_rows(self.folder)

    def done(self) -> set[str]:
        return {row["id"] for row in self.rows}

    def add(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Runner:
    """Loads the model once for every KV type."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._prefillers: dict[str, Prefiller] = {}
        self._runners: dict[str, SequenceRunner] = {}

    def close(self) -> None:
        for kv_type, prefiller in self._prefillers.items():
            self._runners[kv_type].close()
            prefiller.close()
            prefiller.streams.close()
        self._runners, self._prefillers = {}, {}

    def run(self, items: list[Item], tick: Callable[[int], None]) -> Iterator[list[dict]]:
        """Rows of results, one group of items after another. `tick(n)`: n decode runs are done."""
        for start in range(0, len(items), self.plan.parallel):
            yield self._group(items[start : start + self.plan.parallel], tick)

    def n_runs(self, n_items: int) -> int:
        """Ticks of a run over `n_items`."""
        groups = -(-n_items // self.plan.parallel)
        return groups * (len(self.plan.cases) + 1)

    def _group(self, items: list[Item], tick: Callable[[int], None]) -> list[dict]:
        rows: list[dict[str, Any]] = [
            {"id": item.id, "group": item.group, "cases": {}} for item in items
        ]
        prompts = self._prompts("f16", items)
        reference = self._answers("f16", ElasticConfig.off(), items, prompts)
        tick(1)
        kv_types = list(dict.fromkeys(c.kv_type for c in self.plan.cases))
        for kv_type in kv_types:
            if kv_type != "f16":
                prompts = self._prompts(kv_type, items)
            for case in (c for c in self.plan.cases if c.kv_type == kv_type):
                config = make_config(case.policy, case.budget, self.plan.elastic)
                own = self._answers(kv_type, config, items, prompts)
                for i, (item, prompt) in enumerate(zip(items, prompts)):
                    figures = self._figures(item, prompt, reference[i], own[i])
                    other = own[i].get("other_bytes", 0)
                    figures["bytes"] = own[i]["cells"][0] * self._cell_bytes(kv_type) + other
                    if other:
                        figures["other_bytes"] = other  # in bytes; not compressed
                    rows[i]["cases"][case.name] = figures
                tick(1)
        return rows

    def _figures(self, item: Item, prompt: Prompt, ref: dict, own: dict) -> dict[str, Any]:
        out: dict[str, Any] = {"cells": own["cells"]}
        if "logp" in own:
            skip = 0 if prompt.tail else 1
            out.update(forced_figures(ref["logp"], own["logp"], prompt.target, skip))
        if "said" in own:
            if item.exact and "exact" in self.plan.metrics:
                out["exact"] = is_right(own["said"], item.answer)
            if "rouge" in self.plan.metrics:
                out["rouge"] = rouge_l(ref["said"], own["said"])
        return out

    def _answers(
        self, kv_type: str, config: ElasticConfig, items: list[Item], prompts: list[Prompt]
    ) -> list[dict[str, Any]]:
        """Forced log-probabilities and greedy text of a group under one policy."""
        runner = self._runners[kv_type]
        out: list[dict[str, Any]] = [{} for _ in items]
        if "forced" in self.plan.metrics:
            for row, answer in zip(out, runner.forced(config, prompts)):
                row["logp"], row["cells"] = log_softmax(answer.logits), answer.cells
                row["other_bytes"] = answer.other_bytes
        asked = [
            i
            for i, item in enumerate(items)
            if "rouge" in self.plan.metrics or ("exact" in self.plan.metrics and item.exact)
        ]
        if asked:
            chosen = [prompts[i] for i in asked]
            limits = [len(p.target) + 8 for p in chosen]
            for i, answer in zip(asked, runner.greedy(config, chosen, limits)):
                out[i]["said"] = self._text(answer)
                out[i].setdefault("cells", answer.cells)
                out[i].setdefault("other_bytes", answer.other_bytes)
        return out

    def _text(self, answer: Answer) -> str:
        llm = self._prefiller("f16").llm
        return str(llm.detokenize(answer.tokens).decode("utf-8", errors="replace"))

    def _prompts(self, kv_type: str, items: list[Item]) -> list[Prompt]:
        prefiller = self._prefiller(kv_type)
        prefiller.streams.record()
        return [prefiller.prompt(item) for item in items]

    def _prefiller(self, kv_type: str) -> Prefiller:
        if kv_type not in self._prefillers:
            plan = self.plan
            llm = ElasticLlama(
                plan.model,
                mmproj_path=plan.mmproj,
                elastic=None,
                n_ctx=256,  # replaced by the streams'
                n_threads=plan.n_threads,
                n_threads_batch=plan.n_threads,
                n_ubatch=plan.n_ubatch,
                flash_attn=True,  # which a quantized V asks for, too
                type_k=KV_TYPES[kv_type],
                type_v=KV_TYPES[kv_type],
            )
            streams = Streams(llm, plan.parallel, plan.n_ctx)
            self._prefillers[kv_type] = Prefiller(streams, plan.before)
            self._runners[kv_type] = SequenceRunner(streams)
        return self._prefillers[kv_type]

    def _cell_bytes(self, kv_type: str) -> int:
        return int(self._prefillers[kv_type].streams.session.kv_bytes_per_cell())
