"""The text decoder of Gemma 4: blocks over one residual stream.

One block, top to bottom. Every `ln` is an RMSNorm; the field's names for the slots are kept.

    resid_pre ──┬─ ln1 ─ attention ─ ln1_post ─(+)── resid_mid
                └───────────────────────────────┘
    resid_mid ──┬─ ln2 ─ gated MLP ─ ln2_post ─(+)── resid_pre_ple
                └──────────────────────────────┘
    resid_pre_ple ─┬─ gate · per-layer embedding ─ project ─ ln ─(+)─ * scalar ── resid_post
                   └──────────────────────────────────────────────┘

In E2B four of every five blocks attend to the last 512 positions, the fifth to all of them.
Blocks 15 to 34 own no keys or values: local ones read block 13's, global ones block 14's. So after
block 14, the horizon, positions exchange nothing new, and only those whose logits are read need
computing.

Source: `Gemma4TextModel` in transformers' `models/gemma4/modeling_gemma4.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from g4lens.attention import Sight, explicit_attention
from g4lens.config import TextConfig
from g4lens.hooks import HookedModule, HookPoint, at_keys, at_rows
from g4lens.model.primitives import MLP, RMSNorm, rotary_angles, rotate
from g4lens.state import KeyValues, Rows, State, take_rows
from g4lens.tables import Table

Resid = Float[Tensor, "batch pos d_model"]
Ple = Float[Tensor, "batch pos layer d_ple"]
Heads = Float[Tensor, "batch pos head d_head"]
KeysValues = tuple[
    Float[Tensor, "batch key_pos kv_head d_head"], Float[Tensor, "batch key_pos kv_head d_head"]
]
Read = Int[Tensor, "batch read"]
Soft = Sequence[tuple[Int[Tensor, "_ 2"], Float[Tensor, "_ d_model"]]]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESID = "batch pos d_model"
HEADS = "batch pos head d_head"
KV_HEADS = "batch pos kv_head d_head"
KV_READ = "batch key_pos kv_head d_head"
ATTENTION = "batch head query_pos key_pos"
PLE = "batch pos d_ple"
PLE_ALL = "batch pos layer d_ple"


class Embed(nn.Module):
    """Token embeddings, and the per-layer embeddings that every block receives directly.

    The context half of those is computed from the embeddings as edited: it follows `hook_embed`.
    The token half depends on the token alone.
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.scale, self.ple_scale = _rounded(cfg.d_model**0.5), _rounded(cfg.d_ple**0.5)
        self.tokens = Table(cfg.d_vocab, cfg.d_model)
        self.ple_tokens = Table(cfg.d_vocab, cfg.n_layers * cfg.d_ple)
        self.ple_context = nn.Linear(cfg.d_model, cfg.n_layers * cfg.d_ple, bias=False)
        self.ple_norm = RMSNorm(cfg.d_ple, PLE_ALL, eps=cfg.eps)

    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        """What the residual stream starts with."""
        embedded = self.tokens(tokens).to(self.ple_norm.weight)
        return embedded * self.scale[embedded.dtype]

    def token_half(self, tokens: Int[Tensor, "batch pos"]) -> Ple:
        """The rows of the tokens in the table of per-layer embeddings, times 1/sqrt(2)."""
        rows = self.ple_tokens(tokens).to(self.ple_norm.weight)
        return self._per_layer(rows * (self.ple_scale[rows.dtype] * 0.5**0.5))

    def context_half(self, embed: Resid) -> Ple:
        """What the input embedding, soft tokens included, adds to them, times 1/sqrt(2)."""
        context = self._per_layer(self.ple_context(embed)) * self.cfg.d_model**-0.5
        return self.ple_norm(context) * 0.5**0.5

    def _per_layer(self, x: Float[Tensor, "batch pos layers"]) -> Ple:
        return x.unflatten(-1, (self.cfg.n_layers, self.cfg.d_ple))


class Attention(nn.Module):
    """Grouped-query attention: in E2B eight query heads share one key and one value head."""

    def __init__(self, cfg: TextConfig, layer: int):
        super().__init__()
        self.d_head, self.n_kv_heads = cfg.d_head(layer), cfg.n_kv_heads
        self.layer, self.source, self.window = layer, cfg.kv_source(layer), cfg.window(layer)
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * self.d_head, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * self.d_head, cfg.d_model, bias=False)
        self.q_norm = RMSNorm(self.d_head, HEADS, eps=cfg.eps)
        if self.owns_kv:
            self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * self.d_head, bias=False)
            self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * self.d_head, bias=False)
            self.k_norm = RMSNorm(self.d_head, KV_HEADS, eps=cfg.eps)
            self.v_norm = RMSNorm(self.d_head, KV_HEADS, eps=cfg.eps, gain=False)
            self.hook_k = HookPoint(KV_HEADS)
            self.hook_v = HookPoint(KV_HEADS)
        self.hook_q = HookPoint(HEADS)
        self.hook_rot_q = HookPoint(HEADS)
        self.hook_rot_k = HookPoint(KV_READ)
        self.hook_norm_v = HookPoint(KV_READ)
        self.hook_attn_scores = HookPoint(ATTENTION)
        self.hook_pattern = HookPoint(ATTENTION)
        self.hook_z = HookPoint(HEADS)
        self.hook_out = HookPoint(RESID)

    @property
    def owns_kv(self) -> bool:
        """Does this block compute the keys and values it attends to?"""
        return self.source == self.layer

    def keys_values(self, x: Resid, run: "Run", kv: KeyValues) -> KeysValues:
        """What this block attends to: its own keys and values, which `kv` receives, or its owner's.

        An edit of `hook_rot_k` or `hook_norm_v` in an owner reaches every reader; in a reader it
        stays there.
        """
        if self.owns_kv:
            at_keys(run.rows.positions)
            k = self.hook_k(self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.d_head)))
            v = self.hook_v(self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.d_head)))
            k = self.hook_rot_k(rotate(self.k_norm(k), run.angles(self.layer)))
            kv.write(self.layer, k, self.hook_norm_v(self.v_norm(v)), run.rows, self.window)
            at_keys(kv.rows[self.layer].positions)
            return kv.keys[self.layer], kv.values[self.layer]
        at_keys(kv.rows[self.source].positions)
        return self.hook_rot_k(kv.keys[self.source]), self.hook_norm_v(kv.values[self.source])

    def forward(self, x: Resid, keys_values: KeysValues, run: "Run", keys: Rows) -> Resid:
        """What the heads read, before ln1_post. `keys` says which positions the keys are."""
        q = self.hook_q(self.q_proj(x).unflatten(-1, (-1, self.d_head)))
        q = self.hook_rot_q(rotate(self.q_norm(q), run.angles(self.layer)))
        k, v = keys_values
        if self.hook_attn_scores.is_hung or self.hook_pattern.is_hung:
            mask = run.sight.mask(keys, self.window)
            z = explicit_attention(q, k, v, mask, self.hook_attn_scores, self.hook_pattern)
        else:
            z = run.sight.attend(q, k, v, keys, self.window)
        return self.hook_out(self.o_proj(self.hook_z(z).flatten(2)))


class PerLayerInput(nn.Module):
    """Let the residual stream gate this block's own embedding of the token."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.gate = nn.Linear(cfg.d_model, cfg.d_ple, bias=False)
        self.project = nn.Linear(cfg.d_ple, cfg.d_model, bias=False)
        self.hook_pre = HookPoint(PLE)
        self.hook_post = HookPoint(PLE)

    def forward(self, x: Resid, ple: Float[Tensor, "batch pos d_ple"]) -> Resid:
        """What the gated embedding adds, before ln_ple_post."""
        pre = self.hook_pre(self.gate(x))
        return self.project(self.hook_post(F.gelu(pre, approximate="tanh") * ple))


class Block(nn.Module):
    """Attention, MLP, per-layer input: each reads the residual stream and adds to it."""

    scalar: Tensor

    def __init__(self, cfg: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp, self.ple = (
            Attention(cfg, layer),
            MLP(cfg.d_model, cfg.d_mlp_at(layer)),
            PerLayerInput(cfg),
        )
        self.ln1, self.ln1_post, self.ln2, self.ln2_post, self.ln_ple_post = (
            RMSNorm(cfg.d_model, RESID, eps=cfg.eps) for _ in range(5)
        )
        self.register_buffer("scalar", torch.ones(1))
        self.hook_resid_pre = HookPoint(RESID)
        self.hook_attn_out = HookPoint(RESID)
        self.hook_resid_mid = HookPoint(RESID)
        self.hook_mlp_out = HookPoint(RESID)
        self.hook_resid_pre_ple = HookPoint(RESID)
        self.hook_ple_out = HookPoint(RESID)
        self.hook_resid_post = HookPoint(RESID)

    def forward(
        self, resid: Resid, run: "Run", kv: KeyValues, read: Read | None
    ) -> Float[Tensor, "batch row d_model"]:
        """Run the block; with `read`, go on after the keys and values with those rows only."""
        resid_pre = self.hook_resid_pre(resid)
        normalized = self.ln1(resid_pre)
        keys_values = self.attn.keys_values(normalized, run, kv)
        if read is not None:
            resid_pre, normalized = take_rows(resid_pre, read), take_rows(normalized, read)
            run.take(read)
        keys = kv.rows[self.attn.source]
        attn_out = self.hook_attn_out(self.ln1_post(self.attn(normalized, keys_values, run, keys)))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.ln2_post(self.mlp(self.ln2(resid_mid))))
        resid_pre_ple = self.hook_resid_pre_ple(resid_mid + mlp_out)
        ple_out = self.hook_ple_out(
            self.ln_ple_post(self.ple(resid_pre_ple, run.ple_at(self.layer)))
        )
        return self.hook_resid_post((resid_pre_ple + ple_out) * self.scalar)


class Run:
    """The rows that one pass is computing, and what every block needs to know of them."""

    def __init__(
        self,
        cfg: TextConfig,
        ple: Float[Tensor, "held pos layer d_ple"],
        rows: Rows,
        lengths: Int[Tensor, "batch"],
    ):
        self.cfg, self.ple, self.lengths = cfg, ple, lengths
        self._stand_at(rows)

    def take(self, read: Read) -> None:
        """Go on with some of the rows."""
        self.ple = take_rows(self.ple, read)
        self._stand_at(self.rows.take(read))

    def ple_at(self, layer: int) -> Float[Tensor, "batch row d_ple"]:
        """One block's embedding of each row's token."""
        return self.ple[:, :, layer]

    def angles(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotation of this block's queries and keys at the rows."""
        return self._angles[self.cfg.is_global(layer)]

    def _stand_at(self, rows: Rows) -> None:
        self.rows, self.sight = rows, Sight(rows)
        positions = rows.positions if rows.first is None else rows.positions[:1]
        cfg = self.cfg
        self._angles = (
            rotary_angles(positions, cfg.d_head_local, cfg.rope_base_local),
            rotary_angles(
                positions, cfg.d_head_global, cfg.rope_base_global, cfg.rope_fraction_global
            ),
        )
        at_rows(rows.positions, self.lengths)


class TextModel(HookedModule):
    """The decoder: token ids and soft tokens in, next-token logits out."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, RESID, eps=cfg.eps)
        self.hook_embed = HookPoint(RESID)
        self.hook_ple_token = HookPoint(PLE_ALL)
        self.hook_ple_context = HookPoint(PLE_ALL)
        self.hook_ple = HookPoint(PLE_ALL)
        self.hook_logits_pre_cap = HookPoint("batch pos d_vocab")
        self.hook_logits = HookPoint("batch pos d_vocab")

    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        rows: Rows,
        lengths: Int[Tensor, "batch"],
        soft: Soft = (),
        past: KeyValues | None = None,
    ) -> State:
        """The state that enters block 0.

        Args:
            tokens: ids, on any device, with the pad id where soft tokens stand.
            rows: the positions of the tokens.
            lengths: the number of tokens of each prompt.
            soft: the prompt and the column of each soft token `[soft_token, 2]`, on the CPU, and
                the embedding to put there `[soft_token, d_model]`; for each tower.
            past: keys and values of earlier positions.
        """
        at_rows(rows.positions, lengths)
        token_half = self.embed.token_half(tokens)  # first: a host table waits for the ids
        resid = self.embed.stream(tokens)
        for where, embeddings in soft:
            index = where.to(resid.device).unbind(-1)
            resid = resid.index_put(index, embeddings.to(resid.dtype))
        resid = self.hook_embed(resid)
        token_half = self.hook_ple_token(token_half)
        ple = self.hook_ple(token_half + self.hook_ple_context(self.embed.context_half(resid)))
        return State(0, resid, ple, past or KeyValues(), rows, lengths)

    def run(self, state: State, stop: int | None = None, read: Read | None = None) -> State:
        """Run blocks `state.layer` up to, not including, `stop` (default: all).

        Args:
            state: what enters.
            stop: the block before which to stop.
            read: indices into the rows; from the horizon on only these are computed.

        Returns:
            The state that enters block `stop`.
        """
        cfg, kv = self.cfg, state.kv.copy()
        stop = cfg.n_layers if stop is None else stop
        run = Run(cfg, state.ple, state.rows, state.lengths)
        resid = state.resid
        if read is not None and state.layer > cfg.horizon:
            resid, read = take_rows(resid, read), run.take(read)
        for layer in range(state.layer, stop):
            resid = self.blocks[layer](resid, run, kv, read if layer == cfg.horizon else None)
        return State(stop, resid, run.ple, kv, run.rows, state.lengths)

    def unembed(self, resid: Resid) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the final residual stream, after the soft cap."""
        cap, table = self.cfg.final_softcap, self.embed.tokens
        # unnamed, so that no more than two tensors of the vocabulary's width are held at a time
        return self.hook_logits(
            cap * torch.tanh(self.hook_logits_pre_cap(table.products(self.ln_final(resid))) / cap)
        )

    def hint(self, name: str) -> str:
        """As `HookedModule.hint`; a reader's missing keys are explained."""
        parts = name.split(".")
        if (
            len(parts) == 4
            and parts[0] == "blocks"
            and parts[1].isdigit()
            and int(parts[1]) < self.cfg.n_layers
        ):
            layer, point = int(parts[1]), parts[3]
            source, twin = (
                self.cfg.kv_source(layer),
                {"hook_k": "rot_k", "hook_v": "norm_v"}.get(point),
            )
            if source != layer and twin:
                return (
                    f" Block {layer} reads block {source}'s keys and values: use "
                    f"'blocks.{source}.attn.{point}' or 'blocks.{layer}.attn.hook_{twin}'."
                )
        return super().hint(name)


def _rounded(scale: float) -> dict[torch.dtype, float]:
    """A scale as transformers stores it, by way of float32: in bfloat16 sqrt(1536) is 39.25."""
    wide = torch.tensor(scale, dtype=torch.float32, device="cpu")
    return {dtype: wide.to(dtype).item() for dtype in FLOATS}
