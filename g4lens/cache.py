"""Every activation of a run that was asked for, and what follows from them.

An entry is the value that went on in the model, after all edits. A cache that holds the streams,
contributions, queries, keys and values of a run can rebuild every attention pattern, split the
residual stream into what wrote it, and tell the decoder's state before any block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.attention import attention_pattern, attention_scores, visible
from g4lens.config import TextConfig
from g4lens.errors import CacheError, HookNameError, listed
from g4lens.hooks import Hook, HookPoint
from g4lens.state import KeyValues, Positions, Rows, State, absolute, take_rows

Parts = Float[Tensor, "part batch pos d_model"]


class Decoder(Protocol):
    """What a cache needs of the model that filled it."""

    cfg: TextConfig
    hook_points: dict[str, HookPoint]

    def hint(self, name: str) -> str: ...
    def token_ids(self, tokens: Any) -> Tensor: ...
    def head_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]: ...
    def layer_scalar(self, layer: int) -> Tensor: ...
    def post_norm(self, layer: int) -> Float[Tensor, "d_model"]: ...  # noqa: F821
    def final_norm(self) -> Float[Tensor, "d_model"]: ...  # noqa: F821
    def unembedding(self, tokens: Tensor) -> Float[Tensor, "*tokens d_model"]: ...


class ActivationCache(Mapping[str, Tensor]):
    """The activations of one run, by hook name.

    `cache["blocks.5.hook_resid_post"]`, `cache["resid_post", 5]` and, in a tower,
    `cache["vision", "resid_post", 1]` look one up. `keys()`, `items()`, `in` and `len` are those of a
    mapping of full names.
    """

    def __init__(self, model: Decoder, lengths: Int[Tensor, "batch"], edited: frozenset[str]):  # noqa: F821
        self.model, self.cfg = model, model.cfg
        self.lengths = lengths
        self.edited = edited  # the points where a hook may have changed something
        self._entries: dict[str, list[Tensor]] = {}
        self._hooks: dict[str, list[Hook]] = {}

    # ---- filling

    def saver(self, device: torch.device | str | None, keep_graph: bool) -> Callable[[Tensor, Hook], None]:
        """A hook that stores what it sees, moved to `device`, cut off from the graph unless kept."""

        def save(x: Tensor, hook: Hook) -> None:
            x = x if keep_graph else x.detach()
            self._entries.setdefault(hook.name, []).append(x if device is None else x.to(device))
            self._hooks.setdefault(hook.name, []).append(hook)

        return save

    def differentiated(self, value: Tensor) -> tuple["ActivationCache", "ActivationCache"]:
        """These activations cut off from the graph, and the gradients of a scalar by them."""
        flat = [x for pieces in self._entries.values() for x in pieces]
        grads = iter(torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True))
        activations, gradients = (self._like() for _ in range(2))
        for name, pieces in self._entries.items():
            activations._entries[name] = [x.detach() for x in pieces]
            gradients._entries[name] = [next(grads) for _ in pieces]
        return activations, gradients

    def _like(self) -> "ActivationCache":
        other = ActivationCache(self.model, self.lengths, self.edited)
        other._hooks = self._hooks
        return other

    # ---- looking up

    def __getitem__(self, key: str | tuple[str | int, ...]) -> Tensor:
        name = self._name(key)
        if name in self._entries:
            return self._merged(name)
        if name.startswith("blocks.") and name.endswith("attn.hook_pattern"):
            return self.pattern(int(name.split(".")[1]))
        if name in self.model.hook_points:
            raise CacheError(
                f"{name} was not cached in this run, which holds {listed(self, 6)}: "
                f"name it in names_filter"
            )
        raise HookNameError(f"no activation is called {name!r}.{self.model.hint(name)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def get(self, key: Any, default: Any = None) -> Any:
        """The entry, or `default` where the cache holds none of that name."""
        return self[key] if key in self else default

    def __repr__(self) -> str:
        size = sum(x.untyped_storage().nbytes() for x in self._storages())
        return f"ActivationCache({len(self)} activations, {size / 2**20:.1f} MiB: {listed(self, 4)})"

    def _storages(self) -> list[Tensor]:
        """One tensor for each piece of memory: neighbours may share theirs."""
        tensors = (x for pieces in self._entries.values() for x in pieces)
        return list({x.untyped_storage().data_ptr(): x for x in tensors}.values())

    def _name(self, key: str | tuple[str | int, ...]) -> str:
        """The full name of `"pattern", 5` or `"vision", "pattern", 5`."""
        if isinstance(key, str):
            return key if key in self.model.hook_points else self._short((key,))
        return self._short(key)

    def _short(self, key: tuple[str | int, ...]) -> str:
        *towers, short = (part for part in key if isinstance(part, str))
        prefix = "".join(f"{tower}." for tower in towers)
        layers = [part for part in key if not isinstance(part, str)]
        *path, last = short.split(".")
        point = ".".join([*path, last if last.startswith("hook_") else f"hook_{last}"])
        inside = f"{prefix}blocks.{layers[0]}." if layers else prefix
        for module in ("", "attn.", "mlp."):
            if (name := f"{inside}{module}{point}") in self.model.hook_points:
                return name
        if layers and point in ("hook_k", "hook_v"):
            return f"{inside}attn.{point}"
        return f"{inside}{point}"

    def _merged(self, name: str) -> Tensor:
        """The pieces that chunks of the prompt left, as one tensor."""
        pieces, axes = self._entries[name], self._hooks[name][0].axes
        if len(pieces) == 1:
            return pieces[0]
        if "query_pos" in axes:
            n_keys = max(piece.shape[-1] for piece in pieces)
            widened = [torch.nn.functional.pad(p, (0, n_keys - p.shape[-1])) for p in pieces]
            return torch.cat(widened, dim=axes.index("query_pos"))
        if "key_pos" in axes and not self._is_owner(name):
            return pieces[-1]  # a reader sees all keys held, each time anew
        return torch.cat(pieces, dim=1)

    def _is_owner(self, name: str) -> bool:
        layer = self._hooks[name][0].layer()
        return layer is not None and self.cfg.owns_kv(layer)

    def positions(self, name: str) -> Int[Tensor, "batch row"]:
        """Which positions the rows of an entry are (keys, for an entry without queries), -1 at padding.

        Raises:
            CacheError: the activation was not cached. HookNameError: it does not exist.
        """
        name = self._name(name)
        if name not in self._entries:
            self[name]
        hooks = self._hooks[name]
        if "key_pos" in hooks[0].axes and "query_pos" not in hooks[0].axes:
            keys = [hook.key_positions for hook in hooks if hook.key_positions is not None]
            return torch.cat(keys, dim=1) if self._is_owner(name) else keys[-1]
        rows = [hook.positions for hook in hooks if hook.positions is not None]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    # ---- patterns, on demand

    def pattern(
        self, layer: int, heads: Sequence[int] | int | None = None, queries: Positions | None = None
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """The attention pattern of a decoder block, exactly as the run had it.

        Rebuilt from the cached rotated queries and keys, for the heads and query rows asked for only;
        where a hook stood on the scores or the pattern, taken as it was used.

        Args:
            layer: the block.
            heads: their indices; all by default.
            queries: positions counted over each prompt's own tokens; all rows held by default.

        Raises:
            CacheError: the block's rot_q or rot_k was not cached. InputError: a position not held.
        """
        at, stored = f"blocks.{layer}.attn.", f"blocks.{layer}.attn.hook_pattern"
        heads = list(range(self.cfg.n_heads)) if heads is None else heads
        heads = [heads] if isinstance(heads, int) else list(heads)
        name = stored if stored in self._entries else f"{at}hook_rot_q"
        rows = Rows(self.positions(name))
        index = None if queries is None else rows.find(self._wanted(queries, rows))
        if stored in self._entries:
            whole = self[stored][:, heads]
            return whole if index is None else take_rows(whole, index, 2)
        q, k = self[f"{at}hook_rot_q"][:, :, heads], self[f"{at}hook_rot_k"]
        query_pos = rows.positions
        if index is not None:
            q, query_pos = take_rows(q, index, 1), query_pos.gather(1, index)
        mask = visible(query_pos, self._key_positions(layer), self.cfg.window(layer))[:, None]
        if self.cfg.n_kv_heads > 1:  # with one key head all queries share it
            k = k[:, :, [head * self.cfg.n_kv_heads // self.cfg.n_heads for head in heads]]
        return attention_pattern(attention_scores(q, k, mask.to(q.device))).to(q.dtype)

    def _key_positions(self, layer: int) -> Int[Tensor, "batch key_pos"]:
        return self.positions(f"blocks.{layer}.attn.hook_rot_k")

    def _wanted(self, positions: Positions, rows: Rows) -> Int[Tensor, "batch read"]:
        return absolute(positions, self.lengths).to(rows.positions.device)

    # ---- what wrote the stream

    def head_results(self, layer: int) -> Float[Tensor, "batch pos head d_model"]:
        """What each head of a block contributes to `attn.hook_out` (before ln1_post); they sum to it.

        Raises: CacheError: the block's z was not cached.
        """
        weights = self.model.head_weights(layer)
        z = self[f"blocks.{layer}.attn.hook_z"]
        return einsum(
            z, weights.to(z.device), "batch pos head d_head, head d_head d_model -> batch pos head d_model"
        )

    def stack(self, name: str, layers: Sequence[int] | None = None) -> Float[Tensor, "layer batch pos ..."]:
        """One activation of several blocks, over the positions that all of them hold.

        Args:
            name: short, as in `cache[name, layer]`.
            layers: the blocks; all by default.

        Raises: CacheError: one was not cached, or they share no position.
        """
        layers = range(self.cfg.n_layers) if layers is None else layers
        return self._stacked([self._name((name, layer)) for layer in layers])

    def decompose_resid(self, layer: int = -1, heads: bool = False) -> tuple[Parts, list[str]]:
        """The residual stream that enters a block, as a sum of everything that wrote it.

        Every part carries the layer scalars it passes on its way: block j's the product of those of
        blocks j to layer-1 (in Gemma 4 `resid_post = scalar * (resid_pre + attn + mlp + ple)`).

        Args:
            layer: the block; -1 means the final residual stream, as in TransformerLens.
            heads: split each attention part by head. ln1_post is then frozen at the scale it had, the
                one thing that makes heads add up linearly.

        Returns:
            The parts `[part, batch, pos, d_model]`, which sum to `blocks.{layer}.hook_resid_pre` over
            the positions that all parts hold, and their labels: "embed", "0_attn_out" (or "L0H3"),
            "0_mlp_out", "0_ple_out", ..., and "edit" for what hooks changed in the stream itself.

        Raises: CacheError: a part was not cached, or they share no position.
        """
        n = self.cfg.n_layers
        layer = n if layer == -1 else layer
        if not 0 <= layer <= n:
            raise CacheError(f"layer is {layer}, expected 0 to {n}, or -1 for the final residual stream")
        contributions = ("attn_out", "mlp_out", "ple_out")
        names = ["hook_embed", *(f"blocks.{j}.hook_{c}" for j in range(layer) for c in contributions)]
        total = f"blocks.{layer}.hook_resid_pre" if layer < n else f"blocks.{n - 1}.hook_resid_post"
        *parts, whole = self._stacked([*names, total]).unbind()
        labels = ["embed", *(f"{j}_{c}" for j in range(layer) for c in contributions)]
        if heads:
            parts, labels = self._by_head(parts, labels, names, total)
        scalars = [self.model.layer_scalar(j).to(whole.device) for j in range(layer)]
        carried = [whole.new_ones(1)] * (layer + 1)
        for j in reversed(range(layer)):
            carried[j] = carried[j + 1] * scalars[j]
        stack = torch.stack([part * carried[_block_of(label)] for part, label in zip(parts, labels, strict=True)])
        if self._touched(names, total, heads):
            stack, labels = torch.cat([stack, (whole - stack.sum(0))[None]]), [*labels, "edit"]
        return stack, labels

    def logit_attrs(
        self, stack: Parts, tokens: Any, incorrect_tokens: Any = None
    ) -> Float[Tensor, "part batch pos"]:
        """What each part of the final residual stream adds to a token's logit, before the soft cap.

        The final norm is frozen at the scale it had, so the attributions of all parts sum to the logit
        (direct logit attribution, Elhage et al. 2021).

        Args:
            stack: parts of the final residual stream, as `decompose_resid(-1)` returns them.
            tokens: an id, a text of one token, ids `[batch]` or `[batch, pos]`.
            incorrect_tokens: the same; their logits are subtracted.

        Raises: CacheError: the stack has other rows than the final stream, or that was not cached.
        """
        final = f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"
        resid = self[final]
        if stack.ndim != 4 or stack.shape[1:] != resid.shape:
            raise CacheError(
                f"stack is {tuple(stack.shape)}, expected [part, {', '.join(map(str, resid.shape))}]: "
                "as decompose_resid(-1) returns it"
            )
        directions = self._direction(tokens, resid)
        if incorrect_tokens is not None:
            directions = directions - self._direction(incorrect_tokens, resid)
        directions = directions * self.model.final_norm().to(resid) / _scale(resid, self.cfg.eps)
        return einsum(stack, directions, "part batch pos d_model, batch pos d_model -> part batch pos")

    def _direction(self, tokens: Any, resid: Tensor) -> Float[Tensor, "batch pos d_model"]:
        ids = self.model.token_ids(tokens)
        ids = ids[:, None] if ids.ndim == 1 else ids
        return self.model.unembedding(ids.expand(*resid.shape[:2])).to(resid)

    def _by_head(
        self, parts: list[Tensor], labels: list[str], names: list[str], total: str
    ) -> tuple[list[Tensor], list[str]]:
        """Replace each attention part by one part for each head."""
        split_parts: list[Tensor] = []
        split_labels: list[str] = []
        _, indices = self._shared([*names, total])
        for part, label, name, index in zip(parts, labels, names, indices[:-1], strict=True):
            if not label.endswith("_attn_out"):
                split_parts.append(part)
                split_labels.append(label)
                continue
            layer = int(name.split(".")[1])
            gain = self.model.post_norm(layer)
            results = self.head_results(layer)
            results = results if index is None else take_rows(results, index, 1)
            results = results * gain.to(part) / _scale(results.sum(2, keepdim=True), self.cfg.eps)
            split_parts += rearrange(results, "batch pos head d_model -> head batch pos d_model").unbind()
            split_labels += [f"L{layer}H{head}" for head in range(self.cfg.n_heads)]
        return split_parts, split_labels

    def _touched(self, names: list[str], total: str, heads: bool) -> bool:
        """May a hook have changed the stream other than through the parts?"""
        blocks = {name.split(".hook_")[0] for name in names if name.startswith("blocks.")}
        streams = ("resid_pre", "resid_mid", "resid_pre_ple", "resid_post")
        points = {total, *(f"{block}.hook_{stream}" for block in blocks for stream in streams)}
        if heads:
            inside = ("hook_attn_out", "attn.hook_out", "ln1_post.hook_scale", "ln1_post.hook_normalized")
            points |= {f"{block}.{point}" for block in blocks for point in inside}
        return not points.isdisjoint(self.edited)

    def _stacked(self, names: list[str]) -> Tensor:
        _, indices = self._shared(names)
        tensors = [self[name] for name in names]
        return torch.stack(
            [x if i is None else take_rows(x, i, 1) for x, i in zip(tensors, indices, strict=True)]
        )

    def _shared(self, names: list[str]) -> tuple[Tensor, list[Tensor | None]]:
        """The positions that all entries hold, and for each entry the rows of them (None: all its rows)."""
        held = [self.positions(name) for name in names]
        fewest = min(held, key=lambda p: p.shape[1])
        common = (fewest >= 0) & torch.stack(
            [(fewest[:, :, None] == p[:, None, :]).any(-1) for p in {id(p): p for p in held}.values()]
        ).all(0)
        if all(p is fewest or torch.equal(p, fewest) for p in held):
            return fewest, [None] * len(held)
        counts = common.sum(1)
        if not bool(counts.all()) or len(set(counts.tolist())) > 1:
            raise CacheError(f"{listed(names, 4)} hold no common positions: they were cached by runs that read others")
        positions = fewest[common].reshape(len(fewest), -1)
        return positions, [Rows(p).find(positions) for p in held]

    # ---- the state before a block

    def state(self, layer: int) -> State:
        """What `model(state=...)` needs to enter at a block: stream, per-layer embeddings, keys and values.

        Raises: CacheError: one of them was not cached.
        """
        n = self.cfg.n_layers
        if not 0 <= layer <= n:
            raise CacheError(f"layer is {layer}, expected 0 to {n}")
        name = f"blocks.{layer}.hook_resid_pre" if layer < n else f"blocks.{n - 1}.hook_resid_post"
        rows = Rows.seen(self.positions(name))
        kv = KeyValues()
        for owner in range(min(layer, self.cfg.horizon + 1)):
            at = f"blocks.{owner}.attn."
            kv.keys[owner], kv.values[owner] = self[f"{at}hook_rot_k"], self[f"{at}hook_norm_v"]
            held = self.positions(f"{at}hook_rot_k")
            kv.rows[owner] = rows if torch.equal(held, rows.positions) else Rows.seen(held)
        ple, ple_positions = self["hook_ple"], self.positions("hook_ple")
        if not torch.equal(ple_positions, rows.positions):
            ple = take_rows(ple, Rows(ple_positions).find(rows.positions), 1)
        return State(layer, self[name], ple, kv, rows, self.lengths)


def _scale(x: Tensor, eps: float) -> Tensor:
    """The root mean square that an RMSNorm divides by."""
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _block_of(label: str) -> int:
    """The first block whose scalar a part is multiplied by."""
    if label == "embed":
        return 0
    return int(label[1:].split("H")[0] if label.startswith("L") else label.split("_")[0])
