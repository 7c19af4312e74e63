"""A table of image-token embeddings that the frozen language model has learned to read.

One vector per (word slot, attribute, class), summed over the attributes of a patch. It starts as
the plain words of `targets.py` and is tuned through the language model on symbolic scenes, with no
picture and no tower in the loop. Phase A then teaches the tower to say these vectors.
"""

from __future__ import annotations

import torch
from lm import LanguageModel
from targets import ATTRIBUTES, UNIT, PatchLabels, vocabulary
from torch import Tensor, nn


class Codebook(nn.Module):
    """Patch labels to embeddings, [b, n_patch, width]."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        words = lm.embed([i for (i,) in (lm.encode(w) for w in vocabulary())])
        n_color = ATTRIBUTES["color"]
        self.table = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(UNIT, n, words.shape[1]))
                for name, n in ATTRIBUTES.items()
            }
        )
        with torch.no_grad():
            self.table["row"][0] = words[0]
            self.table["row"][1] = words[2:6]
            self.table["column"][2] = words[1]
            self.table["column"][3] = words[2:6]
            self.table["color"][4] = words[6 : 6 + n_color]
            self.table["shape"][5, 0] = words[6]
            self.table["shape"][5, 1:] = words[6 + n_color : -2]
            self.table["end"][6] = words[-2:][[0, 1, 1]]

    def forward(self, labels: PatchLabels) -> Tensor:
        said = 0.0
        for name, table in self.table.items():
            n = table.shape[1]
            said = said + table.flatten(0, 1)[labels.slot * n + labels.classes[name]]
        return said
