"""Long prompts under every policy, on either model: how the text goes on, and facts in it.

python benchmarks/long_prompts.py --model second --out benchmarks/results/long-second

Of each text three groups of figures: its continuation, questions that are asked before it is
compressed, and the same questions asked afterwards. What is forced is read in one batch behind the
compressed prompt: what an answer loses while it is generated is in the tables of the text set.
Right: every token of the answer is the likeliest one. `report.py` makes the tables. An interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.embedded import embedded_model
from elastic_llama.evaluation.metrics import forced_figures, log_softmax
from elastic_llama.evaluation.prompts import Prompt
from elastic_llama.evaluation.runner import Case, Results, _identity, make_config
from elastic_llama.evaluation.sequence_runner import SequenceRunner
from elastic_llama.evaluation.streams import Streams
from elastic_llama.evaluation.summary import summarise, write_csv
from elastic_llama.probe import probe
from elastic_llama.sequence_state import put_sequence, save_sequence
from llama_cpp import llama_get_logits_ith
from long_texts import LongText, long_texts
from second_model import second_model

MODELS = {"embedded": embedded_model, "second": second_model}
N_FURTHER = 64  # tokens of the continuation that are forced
N_ANSWER = 8  # tokens of an answer at most


class Reader:
    """Reads a text once and gives its prompts."""

    def __init__(self, model: Path, n_seqs: int, n_cells: int) -> None:
        self.llm = ElasticLlama(
            model,
            elastic=None,
            n_ctx=256,  # replaced by the streams'
            n_threads=1,
            n_threads_batch=1,
            swa_full=False,
            flash_attn=True,
        )
        self.streams = Streams(self.llm, n_seqs, n_cells)
        self.runner = SequenceRunner(self.streams)

    def close(self) -> None:
        self.runner.close()
        self.streams.close()

    def prompts(self, text: LongText) -> dict[str, list[Prompt]]:
        """By group: continued, asked before the compression, asked after it."""
        llm = self.llm
        self.streams.record()
        llm.reset()
        with llm.prompt_phase():
            llm.eval(llm.tokenize(text.text.encode(), add_bos=True, special=False))
            alone = self._prompt(text.further, N_FURTHER, [])
            before, after = [], []
            for question in text.questions:
                tail = llm.tokenize(question.text.encode(), add_bos=False, special=False)
                after.append(self._like(alone, question.answer, tail))
                self.streams.record()
                self._load(alone)
                llm.eval(tail)
                before.append(self._prompt(question.answer, N_ANSWER, []))
        return {"continued": [alone], "asked before": before, "asked after": after}

    def forced(
        self, config: ElasticConfig, prompts: list[Prompt]
    ) -> list[tuple[list[np.ndarray], int]]:
        """Compresses prompts, reads what follows, and gives the logits that predict the answers.

        Where the question was known, its answer's first token is predicted before the compression
        and is none of them. Besides: cells of the compressed prompt.
        """
        self.streams.attach(config)
        for i, prompt in enumerate(prompts):
            self._load(prompt, i)
        first = {i: int(p.target[0]) for i, p in enumerate(prompts) if not p.tail}
        probe(self.streams.ctx, self.llm.session, config, first)
        out = []
        for i, prompt in enumerate(prompts):
            self.llm.session.compress(i)
            cells = int(self.llm.session.n_per_layer(i))
            tokens = [*prompt.tail, *prompt.target[:-1]]
            rows = [(int(t), prompt.n_positions + k, i) for k, t in enumerate(tokens)]
            wanted = set(range(max(0, len(prompt.tail) - 1), len(rows)))
            out.append((self.runner._decode(rows, wanted), cells))
        return out

    def _target(self, answer: str, n_most: int) -> np.ndarray:
        tokens = self.llm.tokenize(answer.encode(), add_bos=False, special=False)
        return np.array(tokens[:n_most])

    def _like(self, text: Prompt, answer: str, tail: list[int]) -> Prompt:
        target = self._target(answer, N_ANSWER)
        return Prompt(text.state, text.n_positions, text.logits, tail, target, text.end)

    def _prompt(self, answer: str, n_most: int, tail: list[int]) -> Prompt:
        llm, ctx = self.llm, self.streams.ctx
        row = llama_get_logits_ith(ctx, -1)
        logits = np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy()
        target = self._target(answer, n_most)
        return Prompt(save_sequence(llm), llm.n_tokens, logits, tail, target, llm.token_eos())

    def _load(self, prompt: Prompt, seq_id: int = 0) -> None:
        if not put_sequence(self.streams.ctx, prompt.state, seq_id):
            raise SystemExit("llama.cpp refused a saved prompt")
        if seq_id == 0:
            self.llm.n_tokens = prompt.n_positions


class Run:
    """One text after another under all cases."""

    def __init__(self, reader: Reader, cases: list[Case], given: dict[str, Any]) -> None:
        self.reader, self.cases, self.given = reader, cases, given

    def rows(self, text: LongText) -> list[dict[str, Any]]:
        rows = []
        for group, prompts in self.reader.prompts(text).items():
            own: list[dict[str, Any]] = [
                {"id": f"{text.id} {group} {i}", "group": f"{text.n_tokens} {group}", "cases": {}}
                for i in range(len(prompts))
            ]
            reference = self._case(Case("full", 1.0), prompts, None)
            for case in self.cases:
                for row, found in zip(own, self._case(case, prompts, reference)):
                    if group == "continued":
                        del found["exact"]
                    row["cases"][case.name] = found
            rows += own
        return rows

    def _case(
        self, case: Case, prompts: list[Prompt], reference: list[Any] | None
    ) -> list[dict[str, Any]]:
        """Figures of each prompt under one case; without a reference, its log-probabilities."""
        config = make_config(case.policy, case.budget, self.given)
        out = []
        for i, (logits, cells) in enumerate(self.reader.forced(config, prompts)):
            own, prompt = log_softmax(logits), prompts[i]
            if reference is None:
                out.append({"logp": own})
                continue
            target = prompt.target[len(prompt.target) - len(own) :]
            figures = forced_figures(reference[i]["logp"], own, target, 0)
            right = bool((own.argmax(-1) == target).all())
            out.append({"cells": [cells, cells], **figures, "exact": right})
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="second")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--sizes", default="2000,4000,8000", help="tokens, about")
    parser.add_argument("--count", type=int, default=4, help="texts of each size")
    parser.add_argument("--policies", default="local,h2o,snapkv,pyramidkv,elastic-evict,elastic")
    parser.add_argument("--budgets", default="0.5,0.3,0.2,0.1")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    sizes = [int(x) for x in args.sizes.split(",")]
    cases = [Case("full", 1.0)]
    for policy in args.policies.split(","):
        cases += [Case(policy, float(budget)) for budget in args.budgets.split(",")]
    model = MODELS[args.model]()
    what = {"cases": [c.name for c in cases], "model": _identity(str(model)), "split": args.split}
    results = Results(args.out, what)
    for size in sizes:
        todo = [t for t in long_texts(args.split, size, args.count) if not _done(t, results)]
        if not todo:
            continue
        reader = Reader(model, len(todo[0].questions), _cells(size))
        for text in todo:
            results.add(Run(reader, cases, {}).rows(text))
            print(text.id, flush=True)
        reader.close()
    write_csv(summarise(results.rows), results.folder / "summary.csv")


def _cells(size: int) -> int:
    """Slots of each sequence: the text, a question and an answer."""
    return -(-(size * 5 // 4 + 256) // 256) * 256


def _done(text: LongText, results: Results) -> bool:
    return any(row["id"].startswith(text.id + " ") for row in results.rows)


if __name__ == "__main__":
    main()
