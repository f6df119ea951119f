"""Every kernel on a GPU: right against float64 at the sizes of Stable Diffusion."""

import pytest
import torch
from test_attend_triton import DTYPES, error, truth_of
from test_mean_field import WEIGHTS

from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field, mean_field_triton, ran, reference
from diffumask_fast.kernels.inputs import attention_input
from diffumask_fast.kernels.shapes import KEYS, MODELS
from diffumask_fast.kernels.tune import LAYERS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LAYER = MODELS["sd15"].layers[1].shape
# all layers in the dtype that is drawn in, two of them in the others: each is compiled for it
CASES = [(layer, torch.float16) for layer in LAYERS]
CASES += [(layer, dtype) for layer in (LAYERS[1], LAYERS[3]) for dtype in DTYPES if dtype != torch.float16]


def layer_input(layer, dtype, images=1, device=None):
    rng = torch.Generator().manual_seed(3)
    given = attention_input(layer, dtype, device or DEVICE, rng, rows=2 * images, conditional=images, num=2)
    return 2 * given.q, given.k, given.v, given.select / KEYS, given.settings


@pytest.mark.parametrize("impl", ["triton", "sdpa+maps"])
@pytest.mark.parametrize(("layer", "dtype"), CASES, ids=["{}x{}x{} {}".format(*layer, dtype) for layer, dtype in CASES])
def test_attention_is_right_repeatable_and_one_in_every_batch(layer, dtype, impl):
    q, k, v, select, settings = layer_input(layer, dtype, images=2)
    true_out, true_maps = truth_of(q, k, v, select, settings)
    out, maps = attend(q, k, v, select, **settings, impl=impl)
    plain_out, plain_maps = attend(q, k, v, select, **settings, impl="sdpa")
    assert error(maps, true_maps) <= 2 * error(plain_maps, true_maps) + 2e-6
    again = attend(q, k, v, select, **settings, impl=impl)
    assert torch.equal(again[1], maps)
    alone = attend(q[3:], k[3:], v[3:], select[1:], heads=settings["heads"], impl=impl)
    assert torch.equal(alone[1], maps[1:])
    if impl == "triton":
        assert error(out, true_out) <= 2 * error(plain_out, true_out) + DTYPES[dtype]
        assert torch.equal(again[0], out) and torch.equal(alone[0], out[3:])
    else:
        assert torch.equal(out, attend(q, k, v, heads=settings["heads"])[0])


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
    q, k, v, select, settings = layer_input(LAYER, torch.float16)

    def layer(q):
        return attend(q, k, v, select, **settings, impl=impl)

    for a, b in zip(torch.compile(layer, fullgraph=True)(q), layer(q), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_auto_runs_what_the_table_says():
    from diffumask_fast.kernels import tuned

    q, k, v, select, settings = layer_input(LAYER, torch.float16)
    pixels, heads, head_dim = LAYER
    facts = {"dtype": "fp16", "heads": heads, "head_dim": head_dim, "pixels": pixels, "keys": KEYS}
    fastest = tuned.impl("attend", q.device, **facts)
    wanted = fastest if fastest in ("triton", "sdpa+maps") else "sdpa"
    with ran() as impls:
        attend(q, k, v, select, **settings)
    assert impls == [("attend", wanted)]
