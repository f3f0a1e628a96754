"""Gradients reach every hook point, for any scalar, and are right."""

import copy

import pytest
import torch

from g4lens.errors import InputError


def objective(logits):
    return (logits[:, -1, 7] - logits[:, -1, 8]).sum() + logits[:, 3].square().mean()


def test_gradients_reach_every_point(model, seen_and_heard):
    value, cache, grads = model.run_with_grads(seen_and_heard, objective, "*")
    assert set(grads) == set(cache) == set(model.hook_points)
    for name, grad in grads.items():
        assert grad.shape == cache[name].shape, name
        assert (grad != 0).any(), f"no gradient at {name}"
        assert not cache[name].requires_grad
    torch.testing.assert_close(value, objective(model(seen_and_heard)), atol=1e-3, rtol=0)


def test_points_that_the_scalar_does_not_depend_on_get_zeros(model, tokens):
    grads = model.run_with_grads(tokens, lambda logits: logits[0, 2, 5]).grads
    assert (grads["resid_post", 3][1] == 0).all() and (grads["resid_post", 3][0, 3:] == 0).all()
    assert (grads["resid_post", 3][0, :3] != 0).any()


@pytest.mark.unchecked
def test_gradients_equal_finite_differences(model, seen_and_heard):
    """In float64 throughout: the model computes at least in float32, so doubles stay doubles."""
    double = copy.deepcopy(model).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in seen_and_heard.items()}
    random = torch.Generator().manual_seed(0)
    _, cache, grads = double.run_with_grads(inputs, objective, "*")
    step = 1e-6
    for name in model.hook_points:
        if "attn_scores" in name:
            continue  # -inf where masked: moving it means nothing
        direction = torch.randn(cache[name].shape, generator=random, dtype=torch.float64)
        if "pattern" in name:
            direction *= cache[name] != 0  # the mask takes back what an edit puts elsewhere

        def value(sign, name=name, direction=direction):
            moved = [(name, lambda x, hook: x + sign * step * direction)]
            return objective(double.run_with_hooks(inputs, fwd_hooks=moved))

        with torch.no_grad():
            numeric = (value(1) - value(-1)) / (2 * step)
        torch.testing.assert_close(
            (grads[name] * direction).sum(), numeric, atol=1e-5, rtol=1e-4, msg=name
        )


def test_gradients_belong_to_the_value_after_edits(model, tokens):
    name = "blocks.2.hook_resid_post"
    plain = model.run_with_grads(tokens, objective, name).grads[name]
    with model.hooks([(name, lambda x, hook: x * 2)]):
        _, cache, grads = model.run_with_grads(
            tokens, objective, [name, "blocks.1.hook_resid_post"]
        )
    twice = model.run_with_cache(tokens, name)[1][name] * 2
    assert torch.equal(cache[name], twice)
    assert not torch.allclose(grads[name], plain)
    assert (grads["resid_post", 1] != 0).any()


@pytest.mark.parametrize("watched", ["hook_embed", "blocks.3.*", "*"])
def test_gradients_are_those_that_backward_hooks_let_through(model, tokens, watched):
    """Whatever else is watched: torch alone gives what stood there before a tensor's own hooks."""
    for name in ("hook_embed", "blocks.2.hook_resid_post", "blocks.3.attn.hook_z", "hook_logits"):
        plain = model.run_with_grads(tokens, objective, name).grads[name]
        with model.hooks(bwd_hooks=[(name, lambda grad, hook: grad * 10)]):
            grads = model.run_with_grads(tokens, objective, [name, watched]).grads
        torch.testing.assert_close(grads[name], 10 * plain, rtol=1e-3, atol=1e-2, msg=name)


def test_an_objective_must_be_a_scalar(model, tokens):
    with pytest.raises(
        InputError, match=r"the objective returned \(2, 23, 100\), expected a tensor of one"
    ):
        model.run_with_grads(tokens, lambda logits: logits)
    with pytest.raises(InputError, match="the objective returned float"):
        model.run_with_grads(tokens, lambda logits: logits.sum().item())


def test_an_objective_must_have_a_gradient(model, tokens):
    with pytest.raises(InputError, match="the objective gives no gradient"):
        model.run_with_grads(tokens, lambda logits: logits.argmax(-1).sum())


def test_an_objective_may_run_the_model(model, tokens):
    """What it runs beside is not what is watched."""
    name = "blocks.2.hook_resid_post"

    def beside_another(logits):
        return (logits - model(tokens.flip(1)).detach())[:, -1, 5].sum()

    _, cache, grads = model.run_with_grads(tokens, beside_another, name)
    plain = model.run_with_grads(tokens, lambda logits: logits[:, -1, 5].sum(), name)
    assert torch.equal(cache[name], plain.cache[name])
    torch.testing.assert_close(grads[name], plain.grads[name])
