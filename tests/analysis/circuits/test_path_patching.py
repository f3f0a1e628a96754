"""Path patching against the run of the graph, and against plain hooks."""

import pytest
import torch

from g4lens.analysis.circuits.edge_scores import EdgeScores
from g4lens.analysis.circuits.graph import Edge, Graph, Node
from g4lens.analysis.circuits.graph_run import circuit_metric
from g4lens.analysis.circuits.path_patching import path_patching
from g4lens.analysis.metrics import as_metric
from g4lens.analysis.runs import measure
from g4lens.errors import InputError
from g4lens.hooks import edited_points
from g4lens.model.gemma4 import Gemma4
from tests.analysis.circuits.test_graph_run import CASES, plain, random_pairs
from tests.conftest import randomised, small_config


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("case", CASES)
def test_an_edge_taken_out(case, direction):
    """Each cell is a run of the graph without that edge."""
    model = randomised(Gemma4(small_config(**CASES[case])), seed=4).double()
    pairs, graph = random_pairs(2), Graph(model.cfg)
    n, horizon = model.cfg.n_layers, model.cfg.horizon
    ports = [(Node("logits"), "in"), (Node("ple", n - 1), "value"), (Node("ple", 1), "gate")]
    ports += [(Node("head", n - 1, 3), name) for name in ("q", "k", "v")]
    ports += [(Node("head", horizon, 1), name) for name in ("q", "k", "v")]
    ports += [(Node("mlp", 0), "in"), (Node("mlp", n - 1), "in"), (Node("ple", horizon), "value")]
    senders = graph.senders[:: 1 + len(graph.senders) // 25]
    found = path_patching(
        model, pairs, senders=senders, receivers=ports, direction=direction, progress=False
    )
    keep = graph.allowed.repeat(len(senders), len(ports), 1, 1)
    for i, sender in enumerate(senders):
        for j, port in enumerate(ports):
            keep[i, j, graph.row(sender), graph.column(*port)] = False
    expected = circuit_metric(model, pairs, keep=keep, direction=direction)
    torch.testing.assert_close(found.per_pair, expected.movedim(-1, 0), rtol=0, atol=1e-5)
    base = plain(model, pairs, "clean" if direction == "noise" else "corrupted")
    torch.testing.assert_close(found.base, base)
    assert (found.effect.abs() > 1e-3).float().mean() > 0.3


# ---- against hooks alone


class Ends:
    """Both runs taken apart: what a sender's other write changes in a stream."""

    def __init__(self, model, group):
        self.model = model
        self.runs = [model.run_with_cache(group.batch(s))[1] for s in ("clean", "corrupted")]
        self.parts = {}

    def change(self, sender: Node, layer: int) -> torch.Tensor:
        """In a block's stream, before its layer scalar."""
        if layer not in self.parts:
            self.parts[layer] = [run.decompose_resid(layer + 1, heads=True) for run in self.runs]
        label = {
            "embed": "embed",
            "head": f"L{sender.layer}H{sender.head}",
            "mlp": f"{sender.layer}_mlp_out",
            "ple": f"{sender.layer}_ple_out",
        }[sender.kind]
        clean, corrupted = (stack[labels.index(label)] for stack, labels in self.parts[layer])
        return (corrupted - clean) / self.model.blocks[layer].scalar


def by_hooks(model, group, ends, sender: Node, receiver: Node, port: str) -> torch.Tensor:
    """The metric of the clean run with one edge corrupted, from both caches and a few lines."""
    clean, layer, head = ends.runs[0], receiver.layer, receiver.head
    if port == "value":
        name = {"embed": "hook_ple_context", "ple_rows": "hook_ple_token"}[sender.kind]
        new = (ends.runs[1][name] - clean[name])[:, :, layer]

        def edit(x, hook):
            x[:, :, layer] += new

        return measure(model, group, "clean", as_metric("logit_diff"), [("hook_ple", edit)])
    if receiver.kind == "logits":
        layer = model.cfg.n_layers - 1
        x = clean["resid_post", layer]
        x = x + ends.change(sender, layer) * model.blocks[layer].scalar
        hooks = [(f"blocks.{layer}.hook_resid_post", lambda _, hook: x[:, -1:])]
        return measure(model, group, "clean", as_metric("logit_diff"), hooks)
    block, at = model.blocks[layer], f"blocks.{layer}."
    rows = slice(-1, None) if layer >= model.cfg.horizon else slice(None)  # what a run then holds
    if port == "in":
        x = clean["resid_mid", layer] + ends.change(sender, layer)
        new = block.ln2(x) / block.ln2.weight
        hooks = [(f"{at}ln2.hook_normalized", lambda _, hook: new[:, rows])]
    elif port == "gate":
        new = block.ple.gate(clean["resid_pre_ple", layer] + ends.change(sender, layer))
        hooks = [(f"{at}ple.hook_pre", lambda _, hook: new[:, rows])]
    elif port == "q":
        x = clean["resid_pre", layer] + ends.change(sender, layer)
        new = block.attn.q_proj(block.ln1(x)).unflatten(-1, (model.cfg.n_heads, -1))[:, :, head]

        def edit(x, hook):
            x[:, :, head] = new[:, rows]

        hooks = [(f"{at}attn.hook_q", edit)]
    else:
        source = block.attn.source
        owner = model.blocks[source]
        x = clean["resid_pre", source] + ends.change(sender, source)
        proj = {"k": owner.attn.k_proj, "v": owner.attn.v_proj}[port]
        new = proj(owner.ln1(x)).unflatten(-1, (model.cfg.n_kv_heads, -1))
        site = {"k": "rot_k", "v": "norm_v"}[port]
        name = f"blocks.{source}.attn.hook_{port}"
        _, changed = _with(model, group, name, new, f"blocks.{source}.attn.hook_{site}")
        name = f"{at}attn.hook_{site}"
        _, seen = _with(model, group, name, changed, f"{at}attn.hook_z")

        def edit(x, hook):
            x[:, :, head] = seen[:, rows, head]

        hooks = [(f"{at}attn.hook_z", edit)]
    return measure(model, group, "clean", as_metric("logit_diff"), hooks)


def _with(model, group, name, value, wanted):
    """An activation of the clean run where another has a new value."""
    with model.hooks([(name, lambda _, hook: value)]):
        logits, cache = model.run_with_cache(group.batch("clean"), wanted)
    return logits, cache[wanted]


def test_by_hooks():
    """Every kind of edge, before the horizon, at it and behind it."""
    model = randomised(Gemma4(small_config(n_kv_heads=2)), seed=5).double()
    pairs, graph = random_pairs(2), Graph(model.cfg)
    (group,) = pairs.on(model, as_metric("logit_diff"))
    ends = Ends(model, group)
    layers, random = (3, model.cfg.horizon, 9), torch.Generator().manual_seed(1)
    ports = [(Node("logits"), "in")]
    for layer in layers:
        ports += [(Node("head", layer, 2), name) for name in ("q", "k", "v")]
        ports += [(Node("mlp", layer), "in"), (Node("ple", layer), "gate")]
        ports += [(Node("ple", layer), "value")]
    for receiver, port in ports:
        (rows,) = graph.allowed[:, graph.column(receiver, port)].nonzero(as_tuple=True)
        some = rows[torch.randperm(len(rows), generator=random)[:2]].tolist()
        senders = [graph.senders[row] for row in some]
        found = path_patching(
            model, pairs, senders=senders, receivers=[(receiver, port)], progress=False
        )
        for sender, values in zip(senders, found.per_pair[:, :, 0].unbind(1), strict=True):
            expected = by_hooks(model, group, ends, sender, receiver, port)
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


# ---- groups, readers, scores, errors


def test_several_ports_at_once():
    """A node is all its ports; a list is patched together; a shared key is one for all readers."""
    model = randomised(Gemma4(small_config(n_kv_heads=2)), seed=7).double()
    pairs, graph = random_pairs(2), Graph(model.cfg)
    head, mlp = Node("head", 9, 1), Node("mlp", 6)
    receivers = [head, [(Node("head", 4, 0), "k"), mlp, Node("logits")], Node("ple", 2)]
    senders = [Node("embed"), Node("mlp", 3), Node("ple_rows"), Node("head", 9, 0)]
    found = path_patching(
        model, pairs, senders=senders, receivers=receivers, readers="all", progress=False
    )
    group = [graph.column(mlp, "in"), graph.column(Node("logits"), "in")]
    columns = [
        [column for port in "qkv" for column in graph.alike(graph.column(head, port))],
        group + graph.alike(graph.column(Node("head", 9, 0), "k")),
        [graph.column(Node("ple", 2), port) for port in ("gate", "value")],
    ]
    for j, ports in enumerate(columns):
        keep = graph.allowed.repeat(len(senders), 1, 1)
        for i, sender in enumerate(senders):
            keep[i, graph.row(sender), ports] = False
        expected = circuit_metric(model, pairs, keep=keep)
        torch.testing.assert_close(found.per_pair[:, :, j], expected.T, rtol=0, atol=1e-5)
    assert [a.name for a in found.axes] == ["sender", "receiver"]
    assert found.axes[1].labels == ("head 9.1", "head 4.0 k, mlp 6, logits", "ple 2")
    torch.testing.assert_close(found.per_pair[:, 3, 0], found.base)  # heads of one block
    assert found.cost.skipped and len(found.to_frame()) == found.per_pair.numel()
    found.plot("values")
    with pytest.raises(InputError, match=r"'head 9\.1' is no single port"):
        EdgeScores.of_paths(found)


def test_scores_of_paths():
    """Every cell that was measured is an edge's score."""
    model = randomised(Gemma4(small_config()), seed=8)
    graph, senders = Graph(model.cfg), [Node("mlp", 1), Node("embed")]
    ports = [(Node("mlp", 3), "in"), (Node("head", 0, 1), "v")]
    found = path_patching(
        model,
        random_pairs(3),
        senders=senders,
        receivers=ports,
        direction="denoise",
        progress=False,
    )
    one = path_patching(
        model,
        random_pairs(3),
        senders=senders,
        receivers=ports,
        direction="denoise",
        budget=1,
        progress=False,
    )
    torch.testing.assert_close(found.per_pair, one.per_pair, rtol=0, atol=1e-4)
    scores = EdgeScores.of_paths(found)
    index = graph.index(Edge(senders[0], *ports[0]))
    torch.testing.assert_close(scores.values[index], found.effect.mean(0)[0, 0])
    assert int((scores.values != 0).sum()) == 3  # an MLP writes nothing before block 0
    assert scores.about["method"] == "path patching"


def test_where_nothing_leads_nothing_changes(model):
    """Backwards: nothing is run, and the cell is the run itself."""
    senders, receivers = [Node("head", 9, 0)], [Node("head", 3, 1)]
    found = path_patching(
        model, random_pairs(1), senders=senders, receivers=receivers, progress=False
    )
    assert found.cost.cells == 0 and not found.effect.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"senders": [Node("logits")]}, "no sender is called 'logits'"),
        ({"receivers": [Node("embed")]}, "'embed' has no port 'in'"),
        ({"receivers": [(Node("mlp", 1), "q")]}, "its ports are in"),
        ({"receivers": [[]]}, "a receiver is empty"),
        ({"receivers": ["head 3.1"]}, r"found 'head 3\.1', expected a Node"),
        ({"senders": ["head 3.1"]}, r"found 'head 3\.1', expected a Node"),
        ({"readers": "some"}, "readers is 'some'"),
        ({"direction": "both"}, "direction is 'both'"),
    ],
)
def test_bad_input(model, options, message):
    """Named, at once."""
    with pytest.raises(InputError, match=message):
        path_patching(model, random_pairs(1), progress=False, **options)
    assert not edited_points()
