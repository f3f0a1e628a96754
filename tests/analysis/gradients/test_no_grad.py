"""Gradient methods ask for their own gradients: under `torch.no_grad` they do the same."""

import pytest
import torch

import g4lens
from tests.analysis.circuits.test_graph_run import random_pairs
from tests.conftest import randomised, small_config

METHODS = {
    "AtP": lambda model, pairs: g4lens.attribution_patching(model, pairs, site="z").per_pair,
    "AtP*": lambda model, pairs: (
        g4lens.attribution_patching(model, pairs, site="q", qk_fix=True, grad_drop=True).per_pair
    ),
    "IG": lambda model, pairs: g4lens.integrated_gradients(model, pairs, steps=2).per_pair,
    "EAP": lambda model, pairs: g4lens.edge_attribution(model, pairs).per_pair,
    "EAP-IG": lambda model, pairs: g4lens.edge_attribution(model, pairs, steps=2).per_pair,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_without_grad(method):
    model, pairs = randomised(g4lens.Gemma4(small_config())), random_pairs(2, n=8)
    with torch.enable_grad():
        expected = METHODS[method](model, pairs)
    with torch.no_grad():
        found = METHODS[method](model, pairs)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)
