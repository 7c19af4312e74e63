"""A llama-server of one slot as a caller whose history is known, and replayed elsewhere.

The server says how much of a prompt it took over. With llama.cpp's rules for its prompt cache in
RAM this tells which steps its slot has gone through; a native context that never talked to a server
does the same steps, and the server's probabilities are compared with its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import mtmd_cpp
from PIL import Image

from tests.support.engine import nmse
from tests.support.mtmd_plain import PlainVision
from tests.support.replay import NMSE, Record, Step
from tests.support.server import Server, data_uri

N_CTX = 1024
N_QUESTION = 16  # cells that `serve` leaves free behind an image
LETTERS = "BCDFGJKLMNPQRSVWXZ"  # a token each, also as a part of a text
N_PROBS = 64  # most likely tokens that are compared


@dataclass
class Prompt:
    """What a slot holds, and the steps that made it. Cells of an image are negative ids."""

    ids: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class PromptCache:
    """llama.cpp's (server_prompt_cache, and what get_available_slot does with it)."""

    def __init__(self) -> None:
        self.states: list[Prompt] = []

    def before(self, slot: Prompt, ids: list[int]) -> Prompt:
        """What the only slot holds when it begins to read `ids`."""
        n = n_common(slot.ids, ids)
        if slot.ids and n / len(ids) > 0.1 and n / len(slot.ids) >= 0.5:
            return slot  # is similar enough
        if slot.ids and all(n_common(s.ids, slot.ids) < len(slot.ids) for s in self.states):
            held = [s for s in self.states if n_common(s.ids, slot.ids) < len(s.ids)]
            self.states = [*held, Prompt(list(slot.ids), list(slot.steps))]
        best, found = (n / len(slot.ids) if slot.ids else -1.0, n / len(ids)), None
        for state in self.states:
            n = n_common(state.ids, ids)
            keeps, similar = n / len(state.ids), n / len(ids)
            if keeps >= 0.25 and best[0] < keeps and best[1] < similar:
                best, found = (keeps, similar), state
        if found is None:
            return slot
        self.states = [s for s in self.states if s is not found]
        return found


class Served:
    """Questions to a server, of text and images, greedy, and the replay of what it did.

    Parameters
    ----------
    folder : Path
        For the log and saved slots.
    model, mmproj : Path
    policy : str
    budget : float
        As --kv-budget.
    """

    n_least = 0  # tokens that a prompt asked again takes

    def __init__(self, folder: Path, model: Path, mmproj: Path, policy: str, budget: float) -> None:
        self.off = policy == "full" or budget == 1.0
        self.n_least = int(self.off)
        options = ["-m", str(model), "--mmproj", str(mmproj), "-np", "1", "-c", str(N_CTX)]
        options += ["--kv-policy", policy, "--kv-budget", f"{budget:g}"]
        options += ["--slots", "--slot-save-path", str(folder)]
        self.server = Server(folder, *options)
        elastic = {"policy": policy, "budget": budget, "checkpoints": 4, "auto_layers": True}
        elastic["n_question"] = N_QUESTION
        self.twin = PlainVision(model, mmproj, elastic=elastic, n_ctx=N_CTX)
        self.features: dict[bytes, np.ndarray] = {}
        self.record = Record()
        self.slot = Prompt()
        self.cache = PromptCache()
        self.n_saved = 0
        self.server.wait()
        self.marker = self.server.get("/props")[1]["media_marker"]
        # answers of letters come back as the tokens that they were
        self.letters = self.server.post("/tokenize", {"content": LETTERS})[1]["tokens"][-18:]
        others = sorted(set(range(self.twin.engine.n_vocab)) - set(self.letters))
        self.options = {"logit_bias": [[i, False] for i in others], "temperature": 0}

    def close(self) -> int:
        self.twin.close()
        return self.server.stop()

    # -- asking

    def pieces(self, text: str, images: Sequence[Image.Image]) -> list[tuple[list[int], Any]]:
        """(ids, embeddings or None) of each chunk of a prompt; text has markers of libmtmd."""
        pixels = [np.asarray(image) for image in images]
        tokens = iter(self.twin.tokens(text, pixels))
        rest = iter(pixels)
        out: list[tuple[list[int], Any]] = []
        for n, _, is_image in self.twin.sizes(text, pixels):
            if not is_image:
                out.append((next(tokens), None))
                continue
            image = next(rest)
            key = image.tobytes()
            if key not in self.features:
                marker = mtmd_cpp.mtmd_default_marker().decode()
                self.features[key] = self.twin.features(marker, [image])[0]
            first = 1 + 1000 * list(self.features).index(key)
            out.append(([-first - i for i in range(n)], self.features[key]))
        return out

    def ask(self, text: str, images: Sequence[Image.Image], n: int) -> str:
        """The answer of `n` tokens to a prompt with a marker of libmtmd for each image."""
        pieces = self.pieces(text, images)
        ids = [i for part, _ in pieces for i in part]
        self.slot = self.cache.before(self.slot, ids)
        self.record.steps = self.slot.steps
        prompt: Any = text
        if images:
            string = text.replace(mtmd_cpp.mtmd_default_marker().decode(), self.marker)
            data = [data_uri(image).split(",")[1] for image in images]
            prompt = {"prompt_string": string, "multimodal_data": data}
        body = {"prompt": prompt, "n_predict": n, "cache_prompt": True, **self.options}
        body.update({"n_probs": N_PROBS, "return_tokens": True})
        status, out = self.server.post("/completion", body)
        assert status == 200, out
        assert out["timings"]["cache_n"] + out["timings"]["prompt_n"] == len(ids)
        self.note(pieces, ids, out)
        return str(out["content"])

    def note(self, pieces: list[tuple[list[int], Any]], ids: list[int], out: dict) -> None:
        """The steps of a request, as the server does them."""
        self.n_read = out["timings"]["prompt_n"]
        cut = out["timings"]["cache_n"]
        assert cut <= n_common(self.slot.ids, ids), "more than the slot held was taken over"
        self.record.cut(cut)
        last = max((i for i, (_, rows) in enumerate(pieces) if rows is not None), default=-1)
        pos = 0
        for i, (part, rows) in enumerate(pieces):
            if pos + len(part) > cut:
                new = part[max(0, cut - pos) :] if rows is None else rows
                wants = i == len(pieces) - 1
                begin = pos + len(part) - len(new)
                self.record.add(Step("decode", begin, np.asarray(new), False, wants))
                if i == last:
                    self.record.steps.append(Step("compress", pos + len(part)))
            pos += len(part)
        tokens = out["tokens"]
        self.said = [most_likely(row) for row in out["completion_probabilities"]]
        assert len(tokens) == len(self.said)
        for i, (token, row) in enumerate(zip(tokens, self.said)):
            self.record.add(Step("logits", pos + i, (token, row)))
            if i < len(tokens) - 1:  # the last one is not decoded
                self.record.add(Step("decode", pos + i, np.array([token]), False, True))
        self.slot = Prompt([*ids, *tokens[:-1]], self.record.steps)

    # -- what is done with the slot

    def save(self) -> Any:
        self.n_saved += 1
        name = f"slot-{self.n_saved}.bin"
        status, out = self.server.post("/slots/0?action=save", {"filename": name})
        assert status == 200, out
        return name, Prompt(list(self.slot.ids), list(self.slot.steps))

    def load(self, state: Any) -> None:
        name, prompt = state
        status, out = self.server.post("/slots/0?action=restore", {"filename": name})
        assert status == 200, out
        self.slot = Prompt(list(prompt.ids), list(prompt.steps))

    # -- comparing

    def check(self, what: str) -> None:
        """The probabilities, tokens and cells are the replay's."""
        self.record.steps = self.slot.steps
        engine = self.twin.engine
        pairs = self.record.replay(engine.ctx, engine.session, None)  # without probes
        assert len(pairs) >= 2, what
        for pos, (token, got), logits in pairs:
            expected = log_softmax(logits)
            of_letters = expected[self.letters]
            assert expected[token] >= of_letters.max() - 1e-3, f"{what}: not greedy at {pos}"
            assert len(got) == N_PROBS
            error = nmse(centred(expected[list(got)]), centred(np.array(list(got.values()))))
            assert error <= NMSE, f"{what}: NMSE {error:.2g} at {pos}"
        if not self.off:
            assert self.server.metric("kv_tokens") == engine.session.n_tokens(0), what
            assert self.server.metric("kv_cells") == engine.session.n_per_layer(0), what


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64) - row.max()
    return row - np.log(np.exp(row).sum())


def centred(row: np.ndarray) -> np.ndarray:
    return row - row.mean()


def most_likely(token: dict[str, Any]) -> dict[int, float]:
    """Logarithms of the probabilities of some tokens, by id."""
    return {int(other["id"]): float(other["logprob"]) for other in token["top_logprobs"]}
