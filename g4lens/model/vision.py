"""The vision tower: patches of a picture in, soft tokens for the decoder out.

    patches ─ Linear + table[x] + table[y] ─ blocks ─ mean of 3 x 3 ─ norm ─ Linear ── soft tokens

A block has the decoder's two sandwiched sublayers, without mask, per-layer embedding or scalar:

    resid_pre ── + ln1_post(attention(ln1)) ── resid_mid ── + ln2_post(MLP(ln2)) ── resid_post

Half of each head turns with the patch's column, half with its row. Every linear map of a block may
clamp its inputs and outputs to stored bounds.

Source: `Gemma4VisionModel` and `Gemma4MultimodalEmbedder` in transformers'
`models/gemma4/modeling_gemma4.py`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from g4lens.attention import explicit_attention, fused_attention
from g4lens.config import VisionConfig
from g4lens.hooks import HookPoint, at_keys, at_rows
from g4lens.model.primitives import MLP, RMSNorm, linear, rotary_angles, rotate, widened

Patches = Float[Tensor, "image pos d_model"]
PatchPositions = Int[Tensor, "image pos 2"]
Packing = Int[Tensor, "soft_token"]
Mask = Bool[Tensor, "image 1 1 key_pos"]
Angles = tuple[Tensor, Tensor]

RESID = "batch pos d_model"
HEADS = "batch pos head d_head"
KEYS = "batch key_pos head d_head"
ATTENTION = "batch head query_pos key_pos"


class VisionAttention(nn.Module):
    """Every patch attends to every patch of its picture."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.d_head = cfg.d_head
        width = cfg.n_heads * cfg.d_head
        self.q_proj, self.k_proj, self.v_proj = (
            linear(cfg.d_model, width, cfg.clipped) for _ in range(3)
        )
        self.o_proj = linear(width, cfg.d_model, cfg.clipped)
        self.q_norm, self.k_norm = (RMSNorm(cfg.d_head, HEADS, eps=cfg.eps) for _ in range(2))
        self.v_norm = RMSNorm(cfg.d_head, HEADS, eps=cfg.eps, gain=False)
        self.hook_q = HookPoint(HEADS)
        self.hook_k = HookPoint(HEADS)
        self.hook_v = HookPoint(HEADS)
        self.hook_rot_q = HookPoint(HEADS)
        self.hook_rot_k = HookPoint(KEYS)
        self.hook_norm_v = HookPoint(KEYS)
        self.hook_attn_scores = HookPoint(ATTENTION)
        self.hook_pattern = HookPoint(ATTENTION)
        self.hook_z = HookPoint(HEADS)
        self.hook_out = HookPoint(RESID)

    def forward(self, x: Patches, angles: tuple[Angles, Angles], mask: Mask | None) -> Patches:
        """What the heads bring together. `angles` turn by column and by row."""
        q = self.hook_q(self._heads(self.q_proj(x)))
        k = self.hook_k(self._heads(self.k_proj(x)))
        v = self.hook_v(self._heads(self.v_proj(x)))
        q = self.hook_rot_q(_rotate_2d(self.q_norm(q), angles))
        k = self.hook_rot_k(_rotate_2d(self.k_norm(k), angles))
        v = self.hook_norm_v(self.v_norm(v))
        if self.hook_attn_scores.is_hung or self.hook_pattern.is_hung:
            z = explicit_attention(q, k, v, mask, self.hook_attn_scores, self.hook_pattern)
        else:
            z = fused_attention(q, k, v, mask)
        return self.hook_out(self.o_proj(self.hook_z(z).flatten(2)))

    def _heads(self, x: Float[Tensor, "image pos width"]) -> Float[Tensor, "image pos head d_head"]:
        return x.unflatten(-1, (-1, self.d_head))


class VisionBlock(nn.Module):
    """Attention and MLP: each reads the residual stream of the patches and adds to it."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.attn, self.mlp = VisionAttention(cfg), MLP(cfg.d_model, cfg.d_mlp, cfg.clipped)
        self.ln1, self.ln1_post, self.ln2, self.ln2_post = (
            RMSNorm(cfg.d_model, RESID, eps=cfg.eps) for _ in range(4)
        )
        self.hook_resid_pre = HookPoint(RESID)
        self.hook_attn_out = HookPoint(RESID)
        self.hook_resid_mid = HookPoint(RESID)
        self.hook_mlp_out = HookPoint(RESID)
        self.hook_resid_post = HookPoint(RESID)

    def forward(self, resid: Patches, angles: tuple[Angles, Angles], mask: Mask | None) -> Patches:
        """The stream behind the block."""
        resid_pre = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.ln1_post(self.attn(self.ln1(resid_pre), angles, mask)))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.ln2_post(self.mlp(self.ln2(resid_mid))))
        return self.hook_resid_post(resid_mid + mlp_out)


class VisionTower(nn.Module):
    """Pictures in, packed soft tokens of the decoder's width out, in prompt order."""

    def __init__(self, cfg: VisionConfig, d_model: int):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Linear(cfg.d_patch, cfg.d_model, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(2, cfg.n_positions, cfg.d_model))
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, "soft_token d_model", eps=cfg.eps, gain=False)
        self.project = nn.Linear(cfg.d_model, d_model, bias=False)
        self.hook_embed = HookPoint(RESID)
        self.hook_pooled = HookPoint("batch soft_token d_model")
        self.hook_image_tokens = HookPoint("soft_token d_model")

    def packing(self, positions: PatchPositions) -> Packing | None:
        """Which squares of all pictures are soft tokens; None: every one, for no patch is padding.

        Looks at numbers, so it is asked on the CPU: a pass must not wait for the device.
        """
        valid = positions[..., 0] >= 0
        if valid.all():
            return None
        size = self.cfg.pooling**2
        n_tokens = valid.sum(1, keepdim=True) // size
        is_token = torch.arange(positions.shape[1] // size) < n_tokens
        return is_token.flatten().nonzero()[:, 0]

    def forward(
        self,
        pixels: Float[Tensor, "image pos d_patch"],
        positions: PatchPositions,
        packing: Packing | None,
    ) -> Float[Tensor, "soft_token d_out"]:
        """Soft tokens of all pictures, packed one after the other.

        Args:
            pixels: flattened patches (row, column, channel), 0 to 1.
            positions: column and row of each patch, -1 at padding.
            packing: of these positions.
        """
        valid = positions[..., 0] >= 0
        index = torch.arange(positions.shape[1], device=positions.device)
        at_rows(torch.where(valid, index, -1), None)
        at_keys(torch.where(valid, index, -1))
        mask = None if packing is None else valid[:, None, None, :]
        column, row = (
            rotary_angles(positions[..., axis], self.cfg.d_head // 2, self.cfg.rope_base)
            for axis in (0, 1)
        )
        resid = self.hook_embed(self._embed(pixels, positions, valid))
        for block in self.blocks:
            resid = block(resid, (column, row), mask)
        tokens = self.hook_pooled(self._pool(resid, positions, valid)).flatten(0, 1)
        tokens = (tokens if packing is None else tokens[packing]).to(resid.dtype)
        return self.hook_image_tokens(self.project(self.ln_final(tokens)))

    def _embed(self, pixels: Tensor, positions: PatchPositions, valid: Tensor) -> Patches:
        patches = self.patch_embed((2 * (pixels - 0.5)).to(self.pos_embed.dtype))
        x, y = positions.clamp(min=0).unbind(-1)
        return patches + (self.pos_embed[0][x] + self.pos_embed[1][y]) * valid[..., None]

    def _pool(
        self, resid: Patches, positions: PatchPositions, valid: Tensor
    ) -> Float[Tensor, "image soft_token d_model"]:
        """Mean over squares of patches, times sqrt(d_model), in float32."""
        side = self.cfg.pooling
        n_tokens = positions.shape[1] // side**2
        x, y = (positions // side).unbind(-1)
        columns = x.amax(dim=1, keepdim=True) + 1
        square = torch.where(valid, y * columns + x, n_tokens)  # padding: one square too many
        sums = widened(resid).new_zeros(len(resid), n_tokens + 1, resid.shape[-1])
        sums = sums.scatter_add(1, square[..., None].expand_as(resid), widened(resid))[:, :n_tokens]
        return sums * (self.cfg.d_model**0.5 / side**2)


def _rotate_2d(x: Float[Tensor, "image pos head d_head"], angles: tuple[Angles, Angles]) -> Tensor:
    """Turn the first half of the channels by the patch's column, the second by its row."""
    halves = zip(x.chunk(2, dim=-1), angles, strict=True)
    return torch.cat([rotate(half, by) for half, by in halves], dim=-1)
