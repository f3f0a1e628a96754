"""Figures draw what the numbers say, and other people's viewers take the cache as it is."""

from itertools import pairwise

import matplotlib as mpl
import pytest
import torch

from g4lens import plots
from g4lens.errors import CacheError, InputError
from g4lens.inputs.prompt import Prompt, Token

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def cache(model):
    tokens = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(5))
    return model.run_with_cache(tokens)[1]


@pytest.fixture
def prompt():
    def token(i, text, modality="text", item=None):
        return Token(i, 5, text, modality, None, item)

    words = [token(i, f" w{i}") for i in range(12)]
    words[0] = token(0, "<bos>", "special")
    words[3:6] = [token(i, "<|image|>", "image", 0) for i in (3, 4, 5)]
    words[7:9] = [token(i, "<|audio|>", "audio", 0) for i in (7, 8)]
    return Prompt(tuple(words))


def test_pattern_draws_the_weights(cache, prompt):
    ax = plots.pattern(cache, 4, 2, prompt)
    drawn = torch.tensor(ax.images[0].get_array().tolist())
    torch.testing.assert_close(drawn, cache.pattern(4)[0, 2].sqrt().double(), check_dtype=False)
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert labels == ["<bos>", " w1", " w2", "[image 0]", " w6", "[audio 0]", " w9", " w10", " w11"]
    assert ax.get_xticks()[3] == 4
    assert ax.get_title() == "block 4, head 2 (global)"
    assert (
        plots.pattern(cache, 8, 0).get_title() == "block 8, head 0 (local, window 6, reads block 5)"
    )


def test_pattern_draws_the_rows_asked_for(cache, prompt):
    ax = plots.pattern(cache, 9, 1, prompt, queries=slice(-3, None))
    assert ax.images[0].get_array().shape == (3, 12)
    assert [text.get_text() for text in ax.get_yticklabels()] == [" w9", " w10", " w11"]


def test_labels_do_not_overlap():
    crowded = [(float(i), f"w{i}") for i in range(100)] + [(50.5, "[image 0]")]
    kept = plots._legible(sorted(crowded), gap=2.5)
    assert (50.5, "[image 0]") in kept and len(kept) < 41
    assert all(b - a >= 2.5 for (a, _), (b, _) in pairwise(kept))


def test_ple_share_by_modality(cache, prompt):
    ax = plots.ple_share(cache, prompt)
    assert [line.get_label() for line in ax.get_lines()[:3]] == ["text", "image", "audio"]
    norms = [cache[name, 3][0, 3:6].norm(dim=-1) for name in ("ple_out", "attn_out", "mlp_out")]
    share = (norms[0] / sum(norms)).mean()
    assert ax.get_lines()[1].get_ydata()[3] == pytest.approx(share.item(), rel=1e-5)
    assert [line.get_label() for line in plots.ple_share(cache).get_lines()[:1]] == [
        "all positions"
    ]


@pytest.mark.parametrize("heads", [False, True])
def test_logit_attrs_stack_by_block(cache, heads):
    stack, labels = cache.decompose_resid(-1, heads=heads)
    attrs = cache.logit_attrs(stack, 7)[:, 0, -1]
    ax = plots.logit_attrs(attrs, labels, cache)
    drawn = sum(bar.get_height() for group in ax.containers for bar in group)
    assert drawn == pytest.approx(attrs.sum().item(), abs=1e-4)


def test_wrong_arguments(model, tokens, cache):
    with pytest.raises(
        InputError, match="layer 99, head 0: expected layers 0 to 9 and heads 0 to 3"
    ):
        plots.pattern(cache, 99, 0)
    with pytest.raises(
        InputError, match=r"attrs is \(3,\), expected one number for each of 1 labels"
    ):
        plots.logit_attrs([1.0, 2.0, 3.0], ["embed"], cache)
    _, thin = model.run_with_cache(tokens, "blocks.*.hook_resid_post")
    with pytest.raises(CacheError, match=r"blocks\.3\.attn\.hook_rot_q was not cached"):
        plots.pattern(thin, 3, 0)
    with pytest.raises(CacheError, match="hook_attn_out was not cached"):
        plots.ple_share(thin)


def test_other_peoples_viewers_take_the_cache(cache, model):
    """attnview reads any mapping with TransformerLens's names, and asks for what is not there."""
    from attnview import AttentionStudy

    study = AttentionStudy.from_cache(cache, tokens=[f"t{i}" for i in range(12)])
    assert len(study.layers) == model.cfg.n_layers
