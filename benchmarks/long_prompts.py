"""Long prompts under every policy, on either model: how the text goes on, and facts in it.

python benchmarks/long_prompts.py --model second --out benchmarks/results/long-second

Of each text three groups of figures: its continuation, questions that are asked before it is
compressed, and the same questions asked afterwards. `report.py` makes the tables. An interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.embedded import embedded_model
from elastic_llama.evaluation.metrics import forced_figures, is_right, log_softmax
from elastic_llama.evaluation.prompts import Prompt
from elastic_llama.evaluation.runner import Case, Results, _identity, make_config
from elastic_llama.evaluation.sequence_runner import SequenceRunner
from elastic_llama.evaluation.streams import Streams
from elastic_llama.evaluation.summary import summarise, write_csv
from long_texts import LongText, long_texts
from second_model import second_model

MODELS = {"embedded": embedded_model, "second": second_model}
N_FURTHER = 64  # tokens of the continuation that are forced
N_ANSWER = 8  # tokens that an answer may have


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

    def _target(self, answer: str, n_most: int) -> np.ndarray:
        tokens = self.llm.tokenize(answer.encode(), add_bos=False, special=False)
        return np.array(tokens[:n_most])

    def _like(self, text: Prompt, answer: str, tail: list[int]) -> Prompt:
        target = self._target(answer, N_ANSWER)
        return Prompt(text.state, text.n_tokens, text.logits, tail, target, text.end)

    def _prompt(self, answer: str, n_most: int, tail: list[int]) -> Prompt:
        llm, ctx = self.llm, self.streams.ctx
        size = llama_cpp.llama_state_seq_get_size(ctx, 0)
        buffer = (ctypes.c_uint8 * size)()
        n = llama_cpp.llama_state_seq_get_data(ctx, buffer, size, 0)
        row = llama_cpp.llama_get_logits_ith(ctx, -1)
        logits = np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy()
        state, target = bytes(memoryview(buffer)[:n]), self._target(answer, n_most)
        return Prompt(state, llm.n_tokens, logits, tail, target, llm.token_eos())

    def _load(self, prompt: Prompt) -> None:
        buffer = (ctypes.c_uint8 * len(prompt.state)).from_buffer_copy(prompt.state)
        if not llama_cpp.llama_state_seq_set_data(self.streams.ctx, buffer, len(buffer), 0):
            raise SystemExit("llama.cpp refused a saved prompt")
        self.llm.n_tokens = prompt.n_tokens


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
            off = ElasticConfig.off()
            reference = [log_softmax(a.logits) for a in self.reader.runner.forced(off, prompts)]
            for case in self.cases:
                figures = self._case(case, prompts, reference, text, group)
                for row, found in zip(own, figures):
                    row["cases"][case.name] = found
            rows += own
        return rows

    def _case(
        self, case: Case, prompts: list[Prompt], reference: list[Any], text: LongText, group: str
    ) -> list[dict[str, Any]]:
        config = make_config(case.policy, case.budget, self.given)
        runner, out = self.reader.runner, []
        for ref, prompt, answer in zip(reference, prompts, runner.forced(config, prompts)):
            skip = 0 if prompt.tail else 1
            own = log_softmax(answer.logits)
            figures = forced_figures(ref, own, prompt.target, skip)
            out.append({"cells": list(answer.cells), **figures})
        if group != "continued":
            greedy = runner.greedy(config, prompts, [N_ANSWER] * len(prompts))
            for figures, answer, question in zip(out, greedy, text.questions):
                said = self.reader.llm.detokenize(answer.tokens).decode("utf-8", errors="replace")
                figures["exact"] = is_right(said, question.value)
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
