"""The frozen language model in PyTorch, read from its quantized GGUF.

Matrix products run in bfloat16; the residual stream, norms and RoPE stay in float32 (all-bfloat16
gives wrong answers). No weight takes a gradient: only the image embeddings do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from attention import attend
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

END = 2  # <|im_end|>, which ends every answer


@dataclass
class Branch:
    """Tokens that follow the shared prefix: a question and its answer.

    `n_answer` counts the last tokens of `ids`, which are the answer including END.
    """

    ids: list[int]
    n_answer: int


class LanguageModel:
    """A llama-architecture decoder with frozen weights."""

    def __init__(
        self, path: str | Path, dtype: torch.dtype = torch.bfloat16, compiled: bool = False
    ) -> None:
        reader = GGUFReader(str(path))
        meta = {
            key: field.contents()
            for key, field in reader.fields.items()
            if key.startswith(("llama.", "tokenizer."))
        }
        self.n_layer = int(meta["llama.block_count"])
        self.n_head = int(meta["llama.attention.head_count"])
        self.n_head_kv = int(meta["llama.attention.head_count_kv"])
        self.width = int(meta["llama.embedding_length"])
        self.eps = float(meta["llama.attention.layer_norm_rms_epsilon"])
        self.head_dim = self.width // self.n_head
        self.rope_base = float(meta["llama.rope.freq_base"])
        self.dtype = dtype
        self.tokenizer = _tokenizer(meta)
        self.project_qkv, self.finish_layer = _project_qkv, _finish_layer
        if compiled:  # fuses norms, RoPE and gates; needs a C++ compiler
            self.project_qkv = torch.compile(_project_qkv, dynamic=True)
            self.finish_layer = torch.compile(_finish_layer, dynamic=True)
        raw = {t.name: t for t in reader.tensors}

        def load(name: str, dtype: torch.dtype = dtype) -> Tensor:
            t = raw[name]
            return torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))).to(dtype)

        self.embedding = load("token_embd.weight", torch.float32)  # [n_vocab, width]
        self.head = self.embedding.to(dtype)  # tied
        self.out_norm = load("output_norm.weight", torch.float32)
        self.layers = []
        for i in range(self.n_layer):
            p = f"blk.{i}."
            q = _unpermute(load(p + "attn_q.weight", torch.float32), self.n_head)
            k = _unpermute(load(p + "attn_k.weight", torch.float32), self.n_head_kv)
            v = load(p + "attn_v.weight", torch.float32)
            gate, up = load(p + "ffn_gate.weight"), load(p + "ffn_up.weight")
            self.layers.append(
                {
                    "attn_norm": load(p + "attn_norm.weight", torch.float32),
                    "qkv": torch.cat([q, k, v]).to(dtype),
                    "out": load(p + "attn_output.weight"),
                    "ffn_norm": load(p + "ffn_norm.weight", torch.float32),
                    "gate": gate,
                    "up": up,
                    "down": load(p + "ffn_down.weight"),
                }
            )

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text are recognised, none are added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def embed(self, ids: list[int]) -> Tensor:
        """[n, width], f32."""
        return self.embedding[torch.tensor(ids, dtype=torch.long)]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [n, head_dim], f32, for the half-split layout."""
        half = self.head_dim // 2
        freq = self.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = positions.float()[:, None] * freq[None]
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    def hidden(
        self,
        x: Tensor,
        positions: Tensor,
        n_prefix: int,
        mask: Tensor | None,
        cache: list | None = None,
    ) -> Tensor:
        """Run the decoder over one sequence.

        Parameters
        ----------
        x : Tensor [n, width], f32
        positions : Tensor [n]
        n_prefix : int
            The first `n_prefix` rows attend causally among themselves.
        mask : Tensor [n - n_prefix, n], bool, or None
            Keys visible to each later row; None when there are none.
        cache : list, optional
            Receives (k, v) of every layer, [n_head_kv, n, head_dim].

        Returns
        -------
        Tensor [n, width], f32, after the final norm
        """
        cos, sin = self.rope(positions)
        for layer in self.layers:
            q, k, v = self._qkv(layer, x, cos, sin)
            if cache is not None:
                cache.append((k, v))
            parts = [attend(q[:, :n_prefix], k[:, :n_prefix], v[:, :n_prefix], causal=True)]
            if mask is not None:
                parts.append(attend(q[:, n_prefix:], k, v, mask=mask))
            x = self._finish(layer, x, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        return F.rms_norm(x, (self.width,), self.out_norm, self.eps)

    def step(self, token: int, position: int, cache: list) -> Tensor:
        """Logits [n_vocab] after one more token; `cache` grows in place."""
        x = self.embed([token])
        cos, sin = self.rope(torch.tensor([position]))
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            k, v = torch.cat([cache[i][0], k], dim=1), torch.cat([cache[i][1], v], dim=1)
            cache[i] = (k, v)
            x = self._finish(layer, x, attend(q, k, v))
        return self.logits(F.rms_norm(x, (self.width,), self.out_norm, self.eps))[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, n_vocab], f32."""
        return F.linear(hidden.to(self.dtype), self.head).float()

    def answer_loss(self, prefix: Tensor, branches: list[Branch]) -> list[tuple[Tensor, Tensor]]:
        """Loss of each branch's answer after a shared prefix.

        The prefix (text and image embeddings, [n_prefix, width]) runs once; every branch sees it
        and itself, never another branch, at the positions it would have alone.

        Returns
        -------
        list of (loss, hit)
            Per branch: cross-entropy [n_answer] and whether the top token is right [n_answer].
        """
        n_prefix = prefix.shape[0]
        lengths = [len(b.ids) for b in branches]
        x = torch.cat([prefix, self.embed([t for b in branches for t in b.ids])])
        positions = torch.cat(
            [torch.arange(n_prefix)] + [n_prefix + torch.arange(n) for n in lengths]
        )
        mask = torch.zeros(sum(lengths), n_prefix + sum(lengths), dtype=torch.bool)
        mask[:, :n_prefix] = True
        rows, targets, start = [], [], 0
        for b, n in zip(branches, lengths):
            own = slice(start, start + n)
            mask[own, n_prefix + start : n_prefix + start + n] = torch.ones(n, n).tril().bool()
            first = n_prefix + start + n - b.n_answer
            rows += range(first - 1, first - 1 + b.n_answer)
            targets += b.ids[-b.n_answer :]
            start += n
        out = self.logits(self.hidden(x, positions, n_prefix, mask)[rows])
        target = torch.tensor(targets)
        loss, hit = F.cross_entropy(out, target, reduction="none"), out.argmax(-1) == target
        sizes = [b.n_answer for b in branches]
        return list(zip(loss.split(sizes), hit.split(sizes)))

    @torch.no_grad()
    def generate(
        self, prefix: Tensor, prompts: list[list[int]], limits: list[int]
    ) -> list[list[int]]:
        """Greedy answers of at most `limits` tokens to prompts after one prefix, END excluded."""
        cache: list = []
        n = prefix.shape[0]
        self.hidden(prefix, torch.arange(n), n, None, cache)
        answers = []
        for ids, limit in zip(prompts, limits):
            own, answer = list(cache), []
            for i, token in enumerate(ids):
                logits = self.step(token, n + i, own)
            while len(answer) < limit:
                token = int(logits.argmax())
                if token == END:
                    break
                answer.append(token)
                logits = self.step(token, n + len(ids) + len(answer) - 1, own)
            answers.append(answer)
        return answers

    def _qkv(self, layer: dict, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return self.project_qkv(
            x, layer["attn_norm"], layer["qkv"], cos, sin, self.eps, self.n_head, self.n_head_kv
        )

    def _finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        return self.finish_layer(
            x,
            attended,
            layer["out"],
            layer["ffn_norm"],
            layer["gate"],
            layer["up"],
            layer["down"],
            self.eps,
        )


def _project_qkv(
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    n_head: int,
    n_head_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, project and rotate: q [n_head, n, d], k and v [n_head_kv, n, d]."""
    n, d = x.shape[0], cos.shape[1]
    y = F.rms_norm(x, (x.shape[1],), norm, eps).to(weight.dtype)
    qkv = F.linear(y, weight).view(n, n_head + 2 * n_head_kv, d)
    n_qk = n_head + n_head_kv
    qk = qkv[:, :n_qk].float()
    turned = torch.cat([-qk[..., d // 2 :], qk[..., : d // 2]], dim=-1)
    qk = (qk * cos[:, None] + turned * sin[:, None]).to(weight.dtype)
    q, k, v = qk[:, :n_head], qk[:, n_head:], qkv[:, n_qk:]
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def _finish_layer(
    x: Tensor,
    attended: Tensor,
    out: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    """Attention output, residual, and the feed-forward half of a layer."""
    y = attended.transpose(0, 1).reshape(x.shape[0], out.shape[1])
    x = x + F.linear(y, out)
    y = F.rms_norm(x, (x.shape[1],), norm, eps).to(gate.dtype)
    y = F.silu(F.linear(y, gate)) * F.linear(y, up)
    return x + F.linear(y, down)


def _unpermute(weight: Tensor, n_head: int) -> Tensor:
    """Undo the GGUF row order (interleaved RoPE), giving the half-split one."""
    rows, columns = weight.shape
    return (
        weight.view(n_head, rows // n_head // 2, 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
        .contiguous()
    )


def _tokenizer(meta: dict) -> Tokenizer:
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, kinds)
            if kind == 3
        ]
    )
    return tokenizer
