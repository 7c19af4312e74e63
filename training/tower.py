"""The vision tower and projector: a small ViT without a class token, LLaVA-1.5 geometry."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class TowerConfig:
    """Shape of tower and projector; lengths in pixels or features."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 192
    n_layer: int = 5
    n_head: int = 3
    n_ff: int = 768
    out_width: int = 576  # embedding width of the language model
    eps: float = 1e-5
    mean: float = 0.85
    std: float = 0.3

    @property
    def side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def n_patch(self) -> int:
        return self.side**2

    as_dict = asdict


class Block(nn.Module):
    """Pre-norm transformer block with quick GELU."""

    def __init__(self, c: TowerConfig) -> None:
        super().__init__()
        self.n_head = c.n_head
        self.ln1 = nn.LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.ln2 = nn.LayerNorm(c.width, c.eps)
        self.up = nn.Linear(c.width, c.n_ff)
        self.down = nn.Linear(c.n_ff, c.width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, n, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, w))
        y = self.up(self.ln2(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))  # quick GELU


class Tower(nn.Module):
    """Image to language-model embeddings: [b, 3, h, w] normalised to [b, n_patch, out_width]."""

    def __init__(self, config: TowerConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or TowerConfig()
        self.patch = nn.Linear(3 * c.patch_size**2, c.width, bias=False)  # CLIP has no bias here
        self.position = nn.Parameter(0.7 * _sincos(c.side, c.width))
        self.pre_ln = nn.LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.post_ln = nn.LayerNorm(c.width, c.eps)
        self.mm0 = nn.Linear(c.width, c.out_width)
        self.mm2 = nn.Linear(c.out_width, c.out_width)
        for name, p in self.named_parameters():
            if p.dim() == 2 and name != "position":
                nn.init.trunc_normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for block in self.blocks:
            for linear in (block.out, block.down):  # residual branches start small
                linear.weight.data *= (2 * c.n_layer) ** -0.5

    def features(self, pixels: Tensor) -> Tensor:
        """Patch features after the last norm, [b, n_patch, width]."""
        c = self.config
        b, p = pixels.shape[0], c.patch_size
        x = pixels.view(b, 3, c.side, p, c.side, p).permute(0, 2, 4, 1, 3, 5)
        x = self.patch(x.reshape(b, c.n_patch, 3 * p * p)) + self.position
        x = self.pre_ln(x)
        for block in self.blocks:
            x = block(x)
        return self.post_ln(x)

    def project(self, features: Tensor) -> Tensor:
        return self.mm2(F.gelu(self.mm0(features), approximate="tanh"))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(self.features(pixels))


def normalise(images: list[Image.Image], config: TowerConfig) -> Tensor:
    """RGB images of the tower's size to [b, 3, h, w], f32."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return ((pixels.permute(0, 3, 1, 2).float() / 255) - config.mean) / config.std


def _sincos(side: int, width: int) -> Tensor:
    """2-D sine-cosine position table, [side * side, width]."""
    quarter = width // 4
    freq = 10000.0 ** (-torch.arange(quarter) / quarter)
    angle = torch.arange(side)[:, None] * freq[None]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)
