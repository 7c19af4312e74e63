"""Figures of one answer."""

from __future__ import annotations

import re

import numpy as np


def log_softmax(logits: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities of rows of logits, f32 [n, n_vocab]."""
    x = np.stack(logits).astype(np.float32)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return x


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean of KL(p || q) in nats over rows of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean())


def forced_figures(ref: np.ndarray, own: np.ndarray, target: np.ndarray, skip: int) -> dict:
    """KL and agreement with the full cache, negative log-likelihood of the reference.

    The first `skip` tokens are predicted by the prompt's own pass, before any compression: they
    count in `nll` (the paper's protocol) and nowhere else.
    """
    out = {"nll": float(-own[np.arange(len(target)), target].mean()), "n": len(target)}
    if len(target) > skip:
        out["kl"] = max(0.0, kl(ref[skip:], own[skip:]))
        out["agree"] = float((ref[skip:].argmax(-1) == own[skip:].argmax(-1)).mean())
    return out


def rouge_l(reference: str, said: str) -> float:
    """F-measure of ROUGE-L (rouge-score, stemmed)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(reference, said)["rougeL"].fmeasure)


def is_right(said: str, answer: str) -> bool:
    """Whether the answer is said, by itself or in a sentence, case and punctuation aside."""
    return f" {_words(answer)} " in f" {_words(said)} "


def _words(s: str) -> str:
    return " ".join(re.findall(r"\w+", s.lower()))
