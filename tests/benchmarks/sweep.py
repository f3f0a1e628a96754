"""How long does a patching sweep take beside loops over whole forward passes.

    python -m tests.benchmarks.sweep [resid] [heads] [picture] [peers] [memory] [--rounds N]

Random weights, the same in every model; float32, two threads; 15 blocks of width 384, nine of which
read the keys and values of the last two of six owners, window 64; prompts that differ from their
second token on. The loops patch 32 cells in a batch, read the last position only, and unembed only
that. Loops over passes cost the same in every cell, so of the slow ones a third of the blocks is
run, and their time multiplied by three. Prints ratios of interleaved runs, and how far the results
lie apart; asserts nothing.
"""

import time
from statistics import median

import torch

import g4lens
from g4lens.analysis.pairs import Pair
from g4lens.resources import bundled
from tests.benchmarks.forward import transformer_lens
from tests.benchmarks.measure import extra_peak, run, seconds
from tests.parity.checkpoints import randomise

LOCAL, GLOBAL = "sliding_attention", "full_attention"
BATCH, VOCABULARY = 32, 988  # as many as the bundled tokenizer has, which the bridge wants
LAYERS = range(15)


def theirs():
    """The model of transformers, text only."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        num_hidden_layers=15,
        layer_types=([LOCAL] * 4 + [GLOBAL]) * 3,
        num_kv_shared_layers=9,
        hidden_size=384,
        intermediate_size=1536,
        use_double_wide_mlp=True,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        global_head_dim=128,
        sliding_window=64,
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=64,
        final_logit_softcapping=30.0,
        max_position_embeddings=4096,
    )
    model = Gemma4ForCausalLM._from_config(config, attn_implementation="sdpa")
    randomise(model, seed=0)
    return model.eval()


def pair(n: int) -> Pair:
    """Two prompts of random tokens that share only the first."""
    random = torch.Generator().manual_seed(n)
    clean, corrupted = torch.randint(10, VOCABULARY, (2, n), generator=random)
    corrupted[0] = clean[0]
    return Pair(clean, corrupted, 5, 6)


def difference(logits: torch.Tensor) -> torch.Tensor:
    """The metric: of the last position's logits."""
    return logits[..., 5] - logits[..., 6]


def plain_loop(model, one: Pair, layers, read=None) -> torch.Tensor:
    """Every position of these blocks, 32 whole passes of ours in a batch; layer x position."""
    clean, corrupted = one.clean[None], one.corrupted[None]
    n, found = clean.shape[1], []
    _, cache = model.run_with_cache(clean, "blocks.*.hook_resid_pre")
    for layer in layers:
        source = cache["resid_pre", layer][0]
        for start in range(0, n, BATCH):
            at = torch.arange(start, min(start + BATCH, n))

            def patch(x, hook, at=at, source=source):
                row = at - n + x.shape[1]  # from the horizon on, read=-1 computes the last alone
                held = row >= 0
                x[torch.arange(len(at))[held], row[held]] = source[at[held]]

            hooks = [(f"blocks.{layer}.hook_resid_pre", patch)]
            inputs = corrupted.expand(len(at), -1)
            if read is None:
                state = model.run_with_hooks(inputs, fwd_hooks=hooks, stop=15)
                logits = model.unembed(state.resid[:, -1:])[:, 0]
            else:
                logits = model.run_with_hooks(inputs, fwd_hooks=hooks, read=read)[:, 0]
            found.append(difference(logits))
    return torch.cat(found).view(len(layers), n)


def transformers_loop(hf, one: Pair, layers) -> torch.Tensor:
    """The same with transformers and its modules' hooks."""
    clean, corrupted = one.clean[None], one.corrupted[None]
    n, found = clean.shape[1], []
    states = hf(input_ids=clean, use_cache=False, output_hidden_states=True).hidden_states
    for layer in layers:
        for start in range(0, n, BATCH):
            at = torch.arange(start, min(start + BATCH, n))

            def patch(module, args, kwargs, at=at, source=states[layer][0]):
                x = args[0].clone()
                x[torch.arange(len(at)), at] = source[at]
                return (x, *args[1:]), kwargs

            block = hf.model.layers[layer]
            handle = block.register_forward_pre_hook(patch, with_kwargs=True)
            logits = hf(input_ids=corrupted.expand(len(at), -1), use_cache=False).logits[:, -1]
            handle.remove()
            found.append(difference(logits))
    return torch.cat(found).view(len(layers), n)


def bridge_loop(bridge, one: Pair, layers) -> torch.Tensor:
    """The same with TransformerLens's own patching loop, which runs a cell at a time."""
    import pandas as pd
    from transformer_lens import patching

    clean, corrupted = one.clean[None], one.corrupted[None]
    n = clean.shape[1]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    _, cache = bridge.run_with_cache(clean, names_filter=lambda name: name in names)
    frame = pd.DataFrame(
        [(layer, p) for layer in layers for p in range(n)], columns=["layer", "pos"]
    )
    found = patching.generic_activation_patch(
        bridge,
        corrupted,
        cache,
        lambda logits: difference(logits[0, -1]),
        patching.layer_pos_patch_setter,
        "resid_pre",
        index_df=frame,
    )
    return torch.as_tensor(found).view(len(layers), n)


def compared(what: str, ours, other, scale: float, rounds: int, target: str) -> None:
    """One line: seconds of both, the ratio of those, and how far the results lie apart."""
    result, rows, expected = ours(), [], None  # the first call warms up
    for _ in range(rounds):
        before = seconds(ours)
        start = time.perf_counter()
        expected = other()
        theirs = scale * (time.perf_counter() - start)
        rows.append((median((before, seconds(ours), seconds(ours))), theirs))
    mine, them = (median(column) for column in zip(*rows, strict=True))
    ratio = median(b / a for a, b in rows)
    part = result if result.shape == expected.shape else result[:: round(scale)]
    apart = float((part - expected).abs().max() / part.std())
    print(
        f"{what:<66} {mine:>7.3g} s {them:>7.3g} s {ratio:>6.1f}x  {target:<6} apart {apart:.0e}",
        flush=True,
    )


def sweep(model, one, **options):
    """Ours, as a user calls it."""
    found = g4lens.activation_patching(model, one, "logit_diff", progress=False, **options)
    return found.per_pair[0]


def resid(model, hf, rounds: int) -> None:
    """The residual stream over all blocks and positions."""
    for n in (96, 192):
        one, some = pair(n), LAYERS[::1] if n == 96 else LAYERS[::3]
        for what, read, target in (
            ("batched loop of our full passes", None, ">= 15"),
            ("the same loop with read=-1", -1, ""),
        ):
            compared(
                f"resid_pre, {n} tokens / {what}",
                lambda one=one: sweep(model, one),
                lambda one=one, some=some, read=read: plain_loop(model, one, some, read),
                15 / len(some),
                rounds,
                target,
            )


def peers(model, hf, rounds: int) -> None:
    """The same beside transformers with hooks and TransformerLens's patching loop."""
    some, bridge = LAYERS[::3], transformer_lens(theirs())
    for n in (96, 192):
        one = pair(n)
        compared(
            f"resid_pre, {n} tokens / transformers with hooks, batched",
            lambda one=one: sweep(model, one),
            lambda one=one: transformers_loop(hf, one, some),
            3,
            rounds,
            ">= 20",
        )
        if bridge is not None:
            compared(
                f"resid_pre, {n} tokens / TransformerLens's patching loop",
                lambda one=one: sweep(model, one),
                lambda one=one: bridge_loop(bridge, one, some),
                3,
                rounds,
                ">= 20",
            )


def heads(model, hf, rounds: int) -> None:
    """z, block by block and head by head, all positions at once."""
    for n in (96, 192):
        one = pair(n)

        def loop(one=one):
            _, cache = model.run_with_cache(one.clean[None], "blocks.*.attn.hook_z")
            found = []
            for layer in LAYERS:

                def patch(x, hook, source=cache["z", layer][0]):
                    for head in range(8):
                        x[head, :, head] = source[:, head]

                state = model.run_with_hooks(
                    one.corrupted.expand(8, -1),
                    fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)],
                    stop=15,
                )
                found.append(difference(model.unembed(state.resid[:, -1:])[:, 0]))
            return torch.stack(found)

        compared(
            f"z by block and head, {n} tokens / batched loop of our full passes",
            lambda one=one: sweep(model, one, site="z"),
            loop,
            1,
            rounds + 2,
            ">= 4",
        )


def picture(model, hf, rounds: int) -> None:
    """Groups of a picture's patches in the bundled model, over all blocks."""
    tiny = g4lens.load("tiny")
    question = "What colour is the top left corner?"
    image = g4lens.Image(bundled("data", "images", "corners.png"))
    import numpy as np
    from PIL import Image

    flipped = np.asarray(Image.open(image.source).convert("RGB"))[::-1].copy()
    one = Pair((image, question), (g4lens.Image(flipped), question), " red", " yellow")
    prompts = [tiny.prompt(*side) for side in (one.clean, one.corrupted)]
    seen = [token.index for token in prompts[0].tokens if token.modality == "image"]
    groups = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    ids = [tiny.token_ids(word) for word in (" red", " yellow")]

    def loop(is_decoder_only: bool):
        _, cache = tiny.run_with_cache(prompts[0], "blocks.*.hook_resid_pre")
        state = tiny(prompts[1], stop=0)
        found = []
        for layer in LAYERS:
            for group in groups:

                def patch(x, hook, group=group, source=cache["resid_pre", layer]):
                    x[:, group] = source[:, group]

                hooks = [(f"blocks.{layer}.hook_resid_pre", patch)]
                entered = {"state": state} if is_decoder_only else {"inputs": prompts[1]}
                end = tiny.run_with_hooks(**entered, fwd_hooks=hooks, stop=15)
                logits = tiny.unembed(end.resid[:, -1:])[0, 0]
                found.append(logits[ids[0]] - logits[ids[1]])
        return torch.stack(found).view(len(LAYERS), len(groups))

    for what, only in (("whole passes, tower too", False), ("passes of the decoder", True)):
        compared(
            f"16 groups of patches of a picture, resid_pre / {what}",
            lambda: sweep(tiny, one, positions=groups),
            lambda only=only: loop(only),
            1,
            rounds,
            "",
        )


def memory(model, hf, rounds: int) -> None:
    """How far a sweep's memory grows, beside its budget."""
    mib = 2**20
    for n, budget in ((192, 64), (192, 256), (2048, 256), (2048, 512)):
        one = pair(n)
        layers = None if n < 1000 else [0, 3, 5, 9]
        places = None if n < 1000 else list(range(0, n, 64))
        options = {"layers": layers, "positions": places, "budget": budget * mib}
        peak = extra_peak(lambda one=one, options=options: sweep(model, one, **options)) / mib
        print(f"memory of a sweep over {n} tokens, budget {budget} MiB: {peak:.0f} MiB", flush=True)


PARTS = {"resid": resid, "heads": heads, "picture": picture, "peers": peers, "memory": memory}


if __name__ == "__main__":
    run(PARTS, theirs, __doc__, rounds=2)
