"""kernels/operators.py: each kernel is one node of a compiled and of an exported graph."""

import json
import os
import subprocess
import sys

import pytest
import torch

from diffumask_fast import kernels
from diffumask_fast.kernels import attend, operators, reference  # noqa: F401 - importing operators registers them

OP = torch.ops.diffumask_fast.cross_attention_maps
SETTINGS = (2, 0.25, 1, 0.5)  # heads, scale, first_conditional, weight


def make():
    q, k, v = (torch.randn(3, n, 32) for n in (24, 7, 7))
    return 3 * q, k, v, torch.rand(2, 7, 3), torch.rand(2, 3, 24)


class Layer(torch.nn.Module):
    def forward(self, q, k, v, select, maps):
        maps = maps.clone()
        return OP(q * 2, k, v, select, maps, *SETTINGS) + 1, maps


def nodes(graph):
    return [node for node in graph.nodes if node.target in (OP, OP.default)]


def eager(q, k, v, select, maps):
    maps = maps.clone()
    heads, scale, first, weight = SETTINGS
    out, _ = attend(
        q * 2, k, v, select, heads=heads, scale=scale, first_conditional=first, maps=maps, weight=weight, impl="sdpa"
    )
    return out + 1, maps


def assert_equal(found, truth):
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)


GUIDE, Q = torch.rand(2, 3, 6, 5), torch.rand(2, 3, 2, 6, 5)
WIDTHS = [2.0, 4.0, 60.0]
CALLS = {
    "cross_attention_maps": (*make(), *SETTINGS),
    "attend_maps": (*(make()[i][:2] for i in (0, 1)), *make()[3:], 2, 0.25, 0.5),
    "guided_filter": (GUIDE, torch.rand(2, 4, 6, 5), 2, 1e-3),
    "bilateral_norm": (GUIDE, 3, 1, WIDTHS),
    "mean_field": (Q, -Q.log(), GUIDE, torch.rand(2, 1, 6, 5), 3, 1, WIDTHS, [1.5, 1.2]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_an_operator_obeys_its_own_description(name):
    result = torch.library.opcheck(getattr(torch.ops.diffumask_fast, name).default, CALLS[name])
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@pytest.mark.parametrize("name", list(CALLS)[2:])
def test_the_other_operators_are_one_node_too_and_give_what_torch_gives(name):
    op = getattr(torch.ops.diffumask_fast, name)

    class One(torch.nn.Module):
        def forward(self, *tensors):
            return op(*tensors, *rest) * 2

    tensors = tuple(x for x in CALLS[name] if isinstance(x, torch.Tensor))
    rest = CALLS[name][len(tensors) :]
    named = {
        "guided_filter": lambda: kernels.guided_filter(*CALLS[name]),
        "bilateral_norm": lambda: kernels.bilateral_norm(GUIDE, window=3, dilation=1, bilateral=tuple(WIDTHS)),
        "mean_field": lambda: kernels.mean_field(
            *tensors[:3], norm=tensors[3], window=3, dilation=1, bilateral=tuple(WIDTHS), gaussian=(1.5, 1.2)
        ),
    }
    program = torch.export.export(One(), tensors)
    assert sum(node.target is op.default for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(*tensors), 2 * named[name]())


@pytest.mark.parametrize("num", [3, 40], ids=["narrow", "wider than a head"])
def test_the_maps_alone_are_one_node_too_and_what_the_reference_says(num):
    q, k, _, _, _ = make()
    select, maps = torch.rand(3, 7, num), torch.rand(3, num, 24)
    seen, op = [], torch.ops.diffumask_fast.attend_maps

    def add(q, k, maps):
        maps = maps.clone()
        op(q, k, select, maps, 2, 0.25, 0.5)
        return maps

    def keep(graph, _):
        seen.extend(node for node in graph.graph.nodes if node.target in (op, op.default))
        return graph.forward

    truth = maps + 0.5 * reference.attend_maps(q, k, select, heads=2, scale=0.25)
    for found in (add, torch.compile(add, fullgraph=True, backend=keep)):
        assert torch.allclose(found(q, k, maps), truth, atol=1e-6)
    assert len(seen) == 1


def test_torch_finds_the_kernels_of_every_operator_for_the_keys_of_its_caches():
    code = (
        "import json; from diffumask_fast.kernels import operators; from torch._library.triton import"
        " triton_ops_to_kernels as found; print(json.dumps({k: [x.__name__ for x in v] for k, v in found.items()}))"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=plain, check=True)
    assert json.loads(done.stdout) == {
        "diffumask_fast::cross_attention_maps": ["attend_kernel", "add_parts_kernel"],
        "diffumask_fast::attend_maps": ["attend_maps_kernel", "add_parts_kernel"],
        "diffumask_fast::guided_filter": ["products_kernel", "lines_kernel", "rows_kernel", "values_kernel"],
        "diffumask_fast::bilateral_norm": ["norm_kernel"],
        "diffumask_fast::mean_field": ["step_kernel"],
    }


def test_a_compiled_graph_holds_one_node():
    seen, tensors = [], make()

    def keep(graph, _):
        seen.append(graph.graph)
        return graph.forward

    compiled = torch.compile(Layer(), fullgraph=True, backend=keep)
    assert_equal(compiled(*tensors), eager(*tensors))
    assert len(seen) == 1 and len(nodes(seen[0])) == 1


def test_it_survives_functionalisation():
    tensors = make()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*tensors), eager(*tensors))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_holds_one_node_and_any_batch(strict):
    batch = torch.export.Dim("batch", min=2, max=8)
    tensors = make()
    q, k, v, select, maps = tensors
    longer = [torch.cat([x, x[:1]]) for x in (q, k, v)]
    program = torch.export.export(
        Layer(), tensors, dynamic_shapes=[{0: batch}] * 3 + [None, None], strict=strict
    )  # fmt: skip
    assert len(nodes(program.graph)) == 1
    for inputs in (tensors, (*longer, select, maps)):
        assert_equal(program.module()(*inputs), eager(*inputs))


def test_attend_exports_as_torch_attention():
    class Auto(torch.nn.Module):
        def forward(self, q, k, v, select):
            return attend(q, k, v, select, heads=2, first_conditional=1)

    program = torch.export.export(Auto(), make()[:4])
    assert not nodes(program.graph)
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)
