"""The training phases as loss functions: what one step looks at and pulls towards."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from codebook import Codebook
from elastic_llama.scenes import Scene, make_scene, question
from helper import Team
from lm import END, Branch, LanguageModel
from prompts import FORMATS, draw_format
from targets import ATTRIBUTES, OUTLINE, PatchLabels, patch_labels
from torch import Tensor, nn
from tower import Tower, TowerConfig, normalise

# Kind of question -> (how many per image, weight of one).
BRANCHES = {
    "caption": (1, 3.0),
    "row": (1, 1.0),
    "cell": (3, 1.0),
    "where": (3, 1.0),
    "color": (1, 0.5),
    "shape": (1, 0.5),
}
OUTLINE_WEIGHT = 4.0
SHAPE_WEIGHT = 2.0  # of the shape head; shapes are learned last


class Heads(nn.Module):
    """Linear classifiers on each patch; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict({n: nn.Linear(width, k) for n, k in ATTRIBUTES.items()})
        self.outline = nn.Linear(width, OUTLINE**2)

    def loss(self, features: Tensor, labels: PatchLabels) -> tuple[Tensor, dict[str, float]]:
        """Summed cross-entropy and the share of patches right, by attribute."""
        total, right = features.new_zeros(()), {}
        for name, head in self.by_name.items():
            logits, target = head(features).float().flatten(0, 1), labels.classes[name].flatten()
            weight = SHAPE_WEIGHT if name == "shape" else 1.0
            total = total + weight * F.cross_entropy(logits, target)
            right[name] = (logits.argmax(-1) == target).float().mean().item()
        # Drawing the whole object makes a patch gather its cell; the shape's name alone is too
        # thin a signal (near chance after 5 000 images).
        has = labels.objects >= 0
        drawn = self.outline(features[has]).float()
        shown = labels.outlines[labels.objects[has]]
        outline = F.binary_cross_entropy_with_logits(drawn, shown)
        right["outline"] = outline.item()
        return total + OUTLINE_WEIGHT * outline, right


def look(
    tower: Tower, heads: Heads, scenes: list[Scene]
) -> tuple[PatchLabels, Tensor, Tensor, dict]:
    """Patch labels, image tokens [b, n_patch, width] in f32, the heads' loss, their hits."""
    labels = patch_labels(scenes, tower.config.side)
    pixels = normalise([s.render() for s in scenes], tower.config)
    with torch.autocast("cpu", torch.bfloat16):
        features = tower.features(pixels)
        loss, right = heads.loss(features, labels)
        said = tower.project(features).float()
    return labels, said, loss, right


class PhaseA:
    """No language model in the loop: patches learn what is where and which word to say.

    A word is an embedding from the codebook, at its start the language model's own words.
    """

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook.requires_grad_(False)

    def backward(self, tower: Tower, heads: Heads, scenes: list[Scene]) -> dict:
        """Add the gradients of one batch; returns figures for the log."""
        labels, said, loss, right = look(tower, heads, scenes)
        target = self.codebook(labels)
        distance = F.mse_loss(said, target) / target.flatten(0, 1).var(0).mean()
        (loss + 2 * distance).backward()
        return {"words": distance.item(), **right}


class Reading:
    """Loss through the frozen language model, on answer tokens only.

    One image is one prefix; its questions are branches that share it. The language model runs on
    one image at a time, so that memory does not grow with the batch.
    """

    def __init__(
        self, lm: LanguageModel, config: TowerConfig, batch: int, helpers: int = 0
    ) -> None:
        self.lm, self.batch = lm, batch
        self.team = Team(self._one, helpers, (batch, config.n_patch, config.out_width))

    def gradient(self, said: Tensor, scenes: list[Scene]) -> tuple[Tensor, dict]:
        """Gradient of the mean loss to image tokens [b, n_patch, width], and figures."""
        grads, rows = self.team.run(said.detach(), [s.seed for s in scenes])
        return grads, {
            key: float(np.mean([row[key] for row in rows if key in row]))
            for key in {k for row in rows for k in row}
        }

    def _one(self, seed: int, leaf: Tensor) -> dict:
        """Loss of one image's questions; its gradient goes to `leaf`."""
        before, kinds, branches = self.prompts(make_scene("train", seed))
        prefix = torch.cat([self.lm.embed(before), leaf])
        loss, hits = leaf.new_zeros(()), {}
        for kind, (token_loss, hit) in zip(kinds, self.lm.answer_loss(prefix, branches)):
            loss = loss + BRANCHES[kind][1] * token_loss.mean()
            hits.setdefault(kind, []).append(float(hit.all()))
            hits.setdefault(kind + "_tokens", []).append(hit.float().mean().item())
        loss = loss / sum(BRANCHES[kind][1] for kind in kinds)
        (loss / self.batch).backward()
        return {"loss": loss.item(), **{k: float(np.mean(v)) for k, v in hits.items()}}

    def prompts(self, scene: Scene) -> tuple[list[int], list[str], list[Branch]]:
        """Tokens before the image, and the question branches after it."""
        rng = np.random.default_rng([scene.seed, 77])
        before, after, _ = FORMATS[draw_format(rng)]
        kinds, branches = [], []
        for kind, (count, _) in BRANCHES.items():
            for _ in range(count):
                q = question(scene, kind, rng)
                if q is None:
                    continue
                answer = self.lm.encode(q.answer) + [END]
                ids = self.lm.encode(after.format(question=q.text)) + answer
                kinds.append(kind)
                branches.append(Branch(ids, len(answer)))
        return self.lm.encode(before), kinds, branches


class PhaseB:
    """The tower learns through the language model what helps it to answer."""

    def __init__(self, reading: Reading, aux: float = 0.15) -> None:
        self.reading, self.aux = reading, aux

    def backward(self, tower: Tower, heads: Heads, scenes: list[Scene]) -> dict:
        """Add the gradients of one batch; returns figures for the log."""
        _, said, aux, right = look(tower, heads, scenes)
        grads, figures = self.reading.gradient(said, scenes)
        torch.autograd.backward([said, self.aux * aux], [grads, None])
        return {"aux_color": right["color"], "aux_shape": right["shape"], **figures}


class PhaseC:
    """The codebook learns, from symbols alone, which vectors the language model reads best."""

    def __init__(self, reading: Reading, config: TowerConfig) -> None:
        self.reading, self.config = reading, config

    def backward(self, codebook: Codebook, scenes: list[Scene]) -> dict:
        """Add the gradients of one batch; returns figures for the log."""
        said = codebook(patch_labels(scenes, self.config.side))
        grads, figures = self.reading.gradient(said, scenes)
        said.backward(grads)
        return figures
