"""Every kernel on a GPU: right against float64 at the sizes of Stable Diffusion."""

import pytest
import torch
from test_attend_triton import DTYPES, error, truth_of
from test_mean_field import WEIGHTS

from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field, mean_field_triton, ran, reference
from diffumask_fast.kernels.tune import LAYERS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# all layers in the dtype that is drawn in, two of them in the others: each is compiled for it
CASES = [(layer, torch.float16) for layer in LAYERS]
CASES += [(layer, dtype) for layer in (LAYERS[1], LAYERS[3]) for dtype in DTYPES if dtype != torch.float16]


def layer_input(layer, dtype, images=1, device=None):
    pixels, heads, head_dim = layer
    device = device or DEVICE
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2 * images, n, heads * head_dim, generator=rng) for n in (pixels, 77, 77))
    select = torch.rand(images, 77, 2, generator=rng) / 77
    tensors = (2 * q).to(dtype), k.to(dtype), v.to(dtype), select
    return *(x.to(device) for x in tensors), dict(heads=heads, first_conditional=images)


@pytest.mark.parametrize("impl", ["triton", "sdpa+maps"])
@pytest.mark.parametrize(("layer", "dtype"), CASES, ids=["{}x{}x{} {}".format(*layer, dtype) for layer, dtype in CASES])
def test_attention_is_right_repeatable_and_one_in_every_batch(layer, dtype, impl):
    q, k, v, select, where = layer_input(layer, dtype, images=2)
    true_out, true_maps = truth_of(q, k, v, select, where)
    out, maps = attend(q, k, v, select, **where, impl=impl)
    plain_out, plain_maps = attend(q, k, v, select, **where, impl="sdpa")
    assert error(maps, true_maps) <= 2 * error(plain_maps, true_maps) + 2e-6
    again = attend(q, k, v, select, **where, impl=impl)
    assert torch.equal(again[1], maps)
    alone = attend(q[3:], k[3:], v[3:], select[1:], heads=where["heads"], impl=impl)
    assert torch.equal(alone[1], maps[1:])
    if impl == "triton":
        assert error(out, true_out) <= 2 * error(plain_out, true_out) + DTYPES[dtype]
        assert torch.equal(again[0], out) and torch.equal(alone[0], out[3:])
    else:
        assert torch.equal(out, attend(q, k, v, heads=where["heads"])[0])


def test_the_guided_filter_is_right_and_repeatable():
    guide, maps = torch.rand(2, 3, 300, 257), torch.rand(2, 3, 300, 257)
    truth = reference.guided_filter(guide, maps, 16, 1e-3)
    found, again = (guided_filter(guide.to(DEVICE), maps.to(DEVICE), 16, 1e-3, impl="triton") for _ in range(2))
    assert (found.cpu() - truth).abs().max() < 2e-5 and torch.equal(found, again)


def test_the_crf_step_is_right_and_repeatable():
    q, guide = torch.rand(2, 5, 3, 120, 97).softmax(2), 255 * torch.rand(2, 3, 120, 97)
    settings = {"window": 11, "dilation": 2}
    truth = mean_field(q, -q.log(), guide, **settings, **WEIGHTS, impl="torch")
    q, unary, guide = q.to(DEVICE), -q.log().to(DEVICE), guide.to(DEVICE)
    norm = mean_field_triton.bilateral_norm(guide, **settings, bilateral=WEIGHTS["bilateral"])
    assert torch.allclose(norm, bilateral_norm(guide, **settings, bilateral=WEIGHTS["bilateral"]), rtol=1e-5)
    found, again = (
        mean_field_triton.mean_field(q, unary, guide, **settings, **WEIGHTS, norm=norm) for _ in range(2)
    )  # fmt: skip
    assert (found.cpu() - truth).abs().max() < 1e-5 and torch.equal(found, again)


@pytest.mark.parametrize("impl", ["triton", "sdpa+maps"])
def test_a_compiled_layer_runs_the_kernel_and_gives_the_same(impl):
    q, k, v, select, where = layer_input((1024, 8, 80), torch.float16)

    def layer(q):
        return attend(q, k, v, select, **where, impl=impl)

    for a, b in zip(torch.compile(layer, fullgraph=True)(q), layer(q), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_auto_runs_what_the_table_says():
    from diffumask_fast.kernels import tuned

    q, k, v, select, where = layer_input((1024, 8, 80), torch.float16)
    facts = {"dtype": "fp16", "heads": 8, "head_dim": 80, "pixels": 1024, "keys": 77}
    found = tuned.impl("attend", q.device, **facts)
    wanted = found if found in ("triton", "sdpa+maps") else "sdpa"
    with ran() as forms:
        attend(q, k, v, select, **where)
    assert forms == [("attend", wanted)]
