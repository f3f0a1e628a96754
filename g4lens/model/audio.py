"""The audio tower: log-mel frames of a sound in, soft tokens for the decoder out.

    mel frames ─ two stride-2 convolutions ─ Linear ─ blocks ─ Linear ─ norm ─ Linear ── soft tokens

One block is a conformer: half a feed-forward step, attention over the last frames in chunks, a
causal convolution over time, half a feed-forward step, and a norm over the stream itself.

    resid_pre ── + ffn1/2 ── resid_mid ── + attention ── resid_pre_conv ── + convolution ──
    resid_pre_ffn2 ── + ffn2/2 ── ln_out ── resid_post

Queries stand in chunks of 12; a chunk sees one context of keys, of which the mask leaves each query
the 12 last frames up to its own. Source: `Gemma4AudioModel` in transformers'
`models/gemma4/modeling_gemma4.py`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from g4lens.config import AudioConfig
from g4lens.hooks import HookPoint, at_keys, at_rows
from g4lens.model.primitives import RMSNorm, linear, widened

Frames = Float[Tensor, "sound pos d_model"]
Mask = Bool[Tensor, "sound 1 chunk query_pos key_pos"]
Packing = Int[Tensor, "soft_token"]

RESID = "batch pos d_model"
HEADS = "batch pos head d_head"
ATTENTION = "batch head chunk query_pos key_pos"
NEURONS = "batch pos d_mlp"


class Subsample(nn.Module):
    """Two 3 x 3 convolutions of stride 2 over time and pitch: four frames become one position."""

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        first, second = cfg.conv_channels
        self.conv1 = nn.Conv2d(1, first, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.ln1 = nn.LayerNorm(first, eps=cfg.eps, bias=False)
        self.ln2 = nn.LayerNorm(second, eps=cfg.eps, bias=False)
        self.project = nn.Linear(cfg.n_mels // 4 * second, cfg.d_model, bias=False)

    def forward(
        self, mel: Float[Tensor, "sound frame mel"], mask: Bool[Tensor, "sound frame"]
    ) -> tuple[Frames, Bool[Tensor, "sound pos"]]:
        """Positions of 40 ms, and which of them are sound."""
        x = mel.to(self.conv1.weight.dtype)[:, None]
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = conv(x * mask[:, None, :, None]).permute(0, 2, 3, 1)
            x = F.relu(norm(x)).permute(0, 3, 1, 2)
            mask = mask[:, ::2]
        return self.project(rearrange(x, "sound channel pos mel -> sound pos (mel channel)")), mask


class ChunkedAttention(nn.Module):
    """Attention over the last frames, with a score for the distance (Dai et al. 2019)."""

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        self.cfg = cfg
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linear(cfg.d_model, cfg.d_model, cfg.clipped) for _ in range(4)
        )
        self.distance_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.channel_scale = nn.Parameter(torch.zeros(cfg.d_head))
        self.hook_q = HookPoint(HEADS)
        self.hook_k = HookPoint(HEADS)
        self.hook_v = HookPoint(HEADS)
        self.hook_attn_scores = HookPoint(ATTENTION)
        self.hook_pattern = HookPoint(ATTENTION)
        self.hook_z = HookPoint(HEADS)
        self.hook_out = HookPoint(RESID)

    def forward(self, x: Frames, mask: Mask) -> Frames:
        """What the heads bring together."""
        cfg, (_, n, _) = self.cfg, x.shape
        q, k, v = (
            hook(widened(proj(x)).unflatten(-1, (cfg.n_heads, cfg.d_head)))
            for hook, proj in (
                (self.hook_q, self.q_proj),
                (self.hook_k, self.k_proj),
                (self.hook_v, self.v_proj),
            )
        )
        q = q * F.softplus(self.channel_scale) * (cfg.d_head**-0.5 / math.log(2))
        k = k * (math.log(1 + math.e) / math.log(2))
        q, k, v = self._chunks(q), self._contexts(k), self._contexts(v)
        scores = torch.einsum("bcqhd,bckhd->bhcqk", q, k) + self._distance_scores(q)
        scores = cfg.softcap * torch.tanh(scores / cfg.softcap)

        def closed(x: Tensor) -> Tensor:
            return x.masked_fill(~mask, cfg.masked_score)

        scores = self.hook_attn_scores(closed(scores), closed)
        pattern = self.hook_pattern(scores.softmax(-1), lambda x: x.masked_fill(~mask, 0.0))
        z = torch.einsum("bhcqk,bckhd->bcqhd", pattern, v).flatten(1, 2)[:, :n]
        return self.hook_out(self.o_proj(self.hook_z(z).flatten(2).to(x.dtype)))

    def _chunks(self, x: Tensor) -> Float[Tensor, "sound chunk query_pos head d_head"]:
        tail = -x.shape[1] % self.cfg.chunk
        return F.pad(x, (0, 0, 0, 0, 0, tail)).unflatten(1, (-1, self.cfg.chunk))

    def _contexts(self, x: Tensor) -> Float[Tensor, "sound chunk key_pos head d_head"]:
        """For each chunk of queries the keys around it: overlapping windows over time."""
        return windows(x, self.cfg, 0).movedim(-1, 2)

    def _distance_scores(self, q: Tensor) -> Float[Tensor, "sound head chunk query_pos key_pos"]:
        """What the distance between query and key alone is worth to the query.

        The released tower has an embedding for each distance 0 to n_keys // 2. A shift along the
        rows turns scores by distance into scores by key; what it puts beyond is masked.
        """
        cfg = self.cfg
        distances = torch.arange(cfg.n_keys // 2, -1, -1, device=q.device)
        by_head = self.distance_proj(
            _sinusoids(distances, cfg.d_model).to(self.channel_scale.dtype)
        )
        by_head = by_head.unflatten(-1, (cfg.n_heads, cfg.d_head)).to(q.dtype)
        scores = torch.einsum("bcqhd,khd->bhcqk", q, by_head)
        padded = F.pad(scores, (0, cfg.n_keys + 1 - len(distances))).flatten(-2)
        return padded[..., : cfg.chunk * cfg.n_keys].unflatten(-1, (cfg.chunk, cfg.n_keys))


class FeedForward(nn.Module):
    """Half a step: silu between two linear maps, between two norms."""

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        self.cfg = cfg
        self.ln1, self.ln1_post = (RMSNorm(cfg.d_model, RESID, eps=1e-6) for _ in range(2))
        self.up_proj = linear(cfg.d_model, 4 * cfg.d_model, cfg.clipped)
        self.down_proj = linear(4 * cfg.d_model, cfg.d_model, cfg.clipped)
        self.hook_pre = HookPoint(NEURONS)
        self.hook_post = HookPoint(NEURONS)

    def forward(self, x: Frames) -> Frames:
        """What half a step adds to the stream."""
        post = self.hook_post(F.silu(self.hook_pre(self.up_proj(self.ln1(clamped(x, self.cfg))))))
        return self.ln1_post(clamped(self.down_proj(post), self.cfg)) * self.cfg.residual_weight


class LightConvolution(nn.Module):
    """A causal convolution over time, channel by channel, between two gated linear maps."""

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        self.cfg = cfg
        self.ln1, self.ln_conv = (RMSNorm(cfg.d_model, RESID, eps=cfg.eps) for _ in range(2))
        self.in_proj = linear(cfg.d_model, 2 * cfg.d_model, cfg.clipped)
        self.out_proj = linear(cfg.d_model, cfg.d_model, cfg.clipped)
        self.conv = nn.Conv1d(
            cfg.d_model, cfg.d_model, cfg.conv_kernel, groups=cfg.d_model, bias=False
        )
        self.hook_pre = HookPoint(RESID)
        self.hook_post = HookPoint(RESID)

    def forward(self, x: Frames) -> Frames:
        """What the convolution adds to the stream."""
        pre = self.hook_pre(F.glu(self.in_proj(self.ln1(x)), dim=-1))
        mixed = self.conv(F.pad(pre.transpose(1, 2), (self.cfg.conv_kernel - 1, 0))).transpose(1, 2)
        post = self.hook_post(F.silu(self.ln_conv(clamped(mixed, self.cfg))))
        return self.out_proj(post)


class AudioBlock(nn.Module):
    """Feed-forward, attention, convolution, feed-forward add to the stream; a norm ends it."""

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        self.cfg = cfg
        self.ffn1, self.ffn2 = FeedForward(cfg), FeedForward(cfg)
        self.attn, self.conv = ChunkedAttention(cfg), LightConvolution(cfg)
        self.ln1, self.ln1_post, self.ln_out = (
            RMSNorm(cfg.d_model, RESID, eps=1e-6) for _ in range(3)
        )
        self.hook_resid_pre = HookPoint(RESID)
        self.hook_ffn1_out = HookPoint(RESID)
        self.hook_resid_mid = HookPoint(RESID)
        self.hook_attn_out = HookPoint(RESID)
        self.hook_resid_pre_conv = HookPoint(RESID)
        self.hook_conv_out = HookPoint(RESID)
        self.hook_resid_pre_ffn2 = HookPoint(RESID)
        self.hook_ffn2_out = HookPoint(RESID)
        self.hook_resid_post = HookPoint(RESID)

    def forward(self, resid: Frames, mask: Mask) -> Frames:
        """The stream behind the block."""
        resid_pre = self.hook_resid_pre(resid)
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_ffn1_out(self.ffn1(resid_pre)))
        attn_out = clamped(self.attn(self.ln1(clamped(resid_mid, self.cfg)), mask), self.cfg)
        resid_pre_conv = self.hook_resid_pre_conv(
            resid_mid + self.hook_attn_out(self.ln1_post(attn_out))
        )
        conv_out = self.hook_conv_out(self.conv(resid_pre_conv))
        resid_pre_ffn2 = self.hook_resid_pre_ffn2(resid_pre_conv + conv_out)
        ffn2_out = self.hook_ffn2_out(self.ffn2(resid_pre_ffn2))
        return self.hook_resid_post(self.ln_out(clamped(resid_pre_ffn2 + ffn2_out, self.cfg)))


class AudioTower(nn.Module):
    """Sounds in, packed soft tokens of the decoder's width out, in prompt order."""

    def __init__(self, cfg: AudioConfig, d_model: int):
        super().__init__()
        self.cfg = cfg
        self.subsample = Subsample(cfg)
        self.blocks = nn.ModuleList(AudioBlock(cfg) for _ in range(cfg.n_layers))
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_out)
        self.ln_final = RMSNorm(cfg.d_out, "soft_token d_model", eps=cfg.eps, gain=False)
        self.project = nn.Linear(cfg.d_out, d_model, bias=False)
        self.hook_embed = HookPoint(RESID)
        self.hook_out = HookPoint(RESID)
        self.hook_audio_tokens = HookPoint("soft_token d_model")

    def packing(self, mask: Bool[Tensor, "sound frame"]) -> Packing:
        """Which positions of all sounds are soft tokens: one for four frames that are sound.

        Looks at numbers, so it is asked on the CPU: a pass must not wait for the device.
        """
        return mask[:, ::2][:, ::2].flatten().nonzero()[:, 0]

    def forward(
        self,
        mel: Float[Tensor, "sound frame mel"],
        mask: Bool[Tensor, "sound frame"],
        packing: Packing,
    ) -> Float[Tensor, "soft_token d_out"]:
        """Soft tokens of all sounds, packed one after the other.

        Args:
            mel: log-mel features.
            mask: the frames that are sound, not padding.
            packing: of this mask.
        """
        resid, valid = self.subsample(mel, mask)
        index = torch.arange(resid.shape[1], device=resid.device)
        at_rows(torch.where(valid, index, -1), None)
        at_keys(torch.where(valid, index, -1))
        resid, sees = self.hook_embed(resid), self._mask(valid)
        for block in self.blocks:
            resid = block(resid, sees)
        tokens = self.hook_out(self.out_proj(resid)).flatten(0, 1)[packing]
        return self.hook_audio_tokens(self.project(self.ln_final(tokens)))

    def _mask(self, valid: Bool[Tensor, "sound pos"]) -> Mask:
        """Which keys of its context a query sees: the last frames up to its own, no padding."""
        cfg = self.cfg
        query = torch.arange(cfg.chunk, device=valid.device)[:, None] + cfg.n_left - 1
        distance = query - torch.arange(cfg.n_keys, device=valid.device)
        near = (distance >= 0) & (distance < cfg.n_left - 1) | (distance < 0) & (
            -distance < cfg.n_right
        )
        return near & windows(valid, cfg, False)[:, None, :, None, :]


def windows(x: Tensor, cfg: AudioConfig, fill: float) -> Tensor:
    """Overlapping contexts of keys, one for each chunk: `[sound, chunk, ..., key_pos]`."""
    tail = cfg.n_right + cfg.chunk - 1
    padding = (*(0, 0) * (x.ndim - 2), cfg.n_left - 1, tail)
    return F.pad(x, padding, value=fill).unfold(1, cfg.n_keys, cfg.chunk)


def clamped(x: Tensor, cfg: AudioConfig) -> Tensor:
    """`x` within the tower's bounds, or its dtype's if they are narrower."""
    bound = min(cfg.clamp, torch.finfo(x.dtype).max)
    return x.clamp(-bound, bound)


def _sinusoids(distances: Tensor, d: int) -> Float[Tensor, "distance d"]:
    """Sines, then cosines, of the distance at wavelengths from 2 pi to 10,000 times that."""
    n = d // 2
    rates = torch.exp(
        torch.arange(n, device=distances.device) * -(math.log(10_000.0) / max(n - 1, 1))
    )
    time = distances[:, None] * rates
    return torch.cat([time.sin(), time.cos()], dim=-1)
