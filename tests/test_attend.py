import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, cross_attention_maps, reference

# B, Bc, first, N, T, H, D, K
SHAPES = [
    (1, 1, 0, 64, 77, 1, 16, 1),
    (2, 1, 1, 64, 77, 8, 40, 2),
    (6, 2, 2, 96, 77, 2, 32, 3),
    (3, 1, 0, 37, 13, 3, 24, 9),
    (8, 4, 4, 256, 256, 4, 40, 6),
    (2, 2, 0, 104, 77, 5, 64, 8),
    (2, 1, 1, 64, 77, 1, 160, 5),
    (1, 1, 0, 9216, 77, 1, 16, 1),
    (2, 1, 1, 30, 77, 2, 12, 2),
]
EQUAL = [shape for shape in SHAPES if shape[6] % 8 == 0]


def make(shape, dtype=torch.float32):
    """Draw q, k, v and columns of a shape, the same every time, and return them with attend's settings."""
    batch, conditional, first, pixels, tokens, heads, head_dim, num = shape
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(batch, n, heads * head_dim, generator=rng) for n in (pixels, tokens, tokens))
    columns = torch.rand(conditional, tokens, num, generator=rng) / tokens
    return (3 * q).to(dtype), k.to(dtype), v.to(dtype), columns, dict(heads=heads, first_conditional=first)


@pytest.mark.parametrize("impl", ["sdpa", "cpp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_matches_reference(shape, impl):
    q, k, v, columns, settings = make(shape)
    out, maps = attend(q, k, v, columns, **settings, impl=impl)
    true_out, true_maps = reference.attend(q, k, v, columns, **settings)
    assert maps.shape == (shape[1], shape[7], shape[3]) and maps.dtype == torch.float32 and maps.is_contiguous()
    assert relative(out, true_out) < 5e-6 and relative(maps, true_maps) < (1e-6 if impl == "sdpa" else 2e-6)
    uniform = columns.mean(1)[..., None].expand_as(true_maps)
    assert relative(torch.zeros_like(maps), true_maps) > 0.1 and relative(uniform, true_maps) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", EQUAL)
def test_attend_output_is_bit_equal_to_plain_attention(shape, dtype):
    q, k, v, columns, settings = make(shape, dtype)
    split = [x.unflatten(-1, (settings["heads"], -1)).transpose(1, 2) for x in (q, k, v)]
    plain = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    assert torch.equal(attend(q, k, v, columns, **settings)[0], plain)
    assert torch.equal(attend(q, k, v, heads=settings["heads"])[0], plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_attend_is_one_product_of_a_width_that_fused_attention_takes(shape, monkeypatch):
    widths, plain = [], F.scaled_dot_product_attention

    def spy(*tensors, **kwargs):
        widths.append({x.shape[-1] for x in tensors})
        return plain(*tensors, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v, columns, settings = make(shape)
    attend(q, k, v, columns, **settings)
    assert widths == [{-(-(shape[6] + shape[7]) // 8) * 8}]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_attend_columns_have_the_precision_of_the_queries(dtype, bound):
    q, k, v, columns, settings = make((2, 1, 1, 64, 77, 8, 40, 2), dtype)
    truth = reference.attend(q, k, v, columns, **settings)[1]
    assert relative(attend(q, k, v, columns, **settings)[1], truth) < bound


def test_attend_adds_in_place_with_its_weight():
    q, k, v, columns, settings = make((4, 2, 1, 64, 77, 2, 16, 3))
    once = attend(q, k, v, columns, **settings)[1]
    kept = torch.rand_like(once)
    maps = kept.clone()
    assert attend(q, k, v, columns, **settings, maps=maps, weight=0.25)[1] is maps
    assert torch.allclose(maps, kept + once / 4, atol=1e-6)
    assert torch.allclose(attend(q, k, v, columns, **settings, weight=0.25)[1], once / 4)


def test_attend_takes_only_the_conditional_rows():
    q, k, v, columns, settings = make((4, 2, 1, 64, 77, 2, 16, 3))
    maps = attend(q, k, v, columns, **settings)[1]
    q[0], k[3] = 7, -7
    assert torch.equal(attend(q, k, v, columns, **settings)[1], maps)
    q[1] *= -1
    assert not torch.equal(attend(q, k, v, columns, **settings)[1], maps)


def test_attend_reads_strided_queries():
    q, k, v, columns, settings = make((2, 1, 1, 64, 77, 2, 16, 2))
    wide = torch.randn(2, 64, 96)
    wide[..., 32:64] = q
    for a, b in zip(
        attend(wide[..., 32:64], k, v, columns, **settings), attend(q, k, v, columns, **settings), strict=True
    ):
        assert torch.equal(a, b)


def test_attend_obeys_a_mask():
    q, k, v, columns, settings = make((2, 1, 1, 64, 77, 2, 16, 2))
    mask = torch.zeros(2, 1, 1, 77)
    mask[..., 40:] = -1e4
    for got, truth in zip(
        attend(q, k, v, columns, mask=mask, **settings),
        reference.attend(q[:, :], k[:, :40], v[:, :40], columns[:, :40], **settings),
        strict=True,
    ):
        assert relative(got, truth) < 5e-6


@pytest.mark.parametrize("impl", ["auto", "sdpa", "cpp", "reference"])
def test_cross_attention_maps_matches_reference(impl):
    q, k, v, select, settings = make((4, 2, 2, 64, 77, 8, 40, 2))
    maps = torch.ones(2, 2, 64)
    out = cross_attention_maps(q, k, v, select, maps, weight=0.5, scale=0.1, impl=impl, **settings)
    true_out, added = reference.attend(q, k, v, select, scale=0.1, **settings)
    assert relative(out, true_out) < 5e-6
    assert relative(maps - 1, added / 2) < 1e-4


@pytest.mark.parametrize("impl", ["sdpa", "cpp"])
def test_attend_is_repeatable_and_independent_of_the_batch(impl):
    q, k, v, columns, settings = make((8, 8, 0, 256, 77, 4, 40, 2))
    whole = attend(q, k, v, columns, **settings, impl=impl)
    assert torch.equal(whole[1], attend(q, k, v, columns, **settings, impl=impl)[1])
    for row in range(8):
        alone = attend(*(x[row : row + 1] for x in (q, k, v, columns)), heads=4, impl=impl)
        assert torch.equal(alone[0][0], whole[0][row]) and torch.equal(alone[1][0], whole[1][row])


def test_attend_refuses_what_it_cannot_do():
    q, k, v, columns, settings = make((2, 1, 1, 64, 77, 2, 16, 2))
    with pytest.raises(DiffuMaskError, match="impl is 'cudnn'"):
        attend(q, k, v, columns, impl="cudnn", **settings)
    with pytest.raises(DiffuMaskError, match="are not .Bc, T, K. for 77 keys"):
        attend(q, k, v, columns[:, 1:], **settings)
    with pytest.raises(DiffuMaskError, match="32 channels cannot be split into 3 heads"):
        attend(q, k, v, heads=3)


@pytest.mark.parametrize("impl", ["sdpa", "triton", "sdpa+maps", "cpp", "reference"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": (2, 5, 32)}, "attend takes q"),
        ({"v": (2, 5, 32)}, "attend takes q"),
        ({"k": (1, 7, 32), "v": (1, 7, 32)}, "attend takes q"),
        ({"k": (2, 7, 16), "v": (2, 7, 16)}, "attend takes q"),
        ({"q": (16, 32)}, "attend takes q"),
        ({"k": (2, 0, 32), "v": (2, 0, 32), "columns": (1, 0, 3)}, "attend takes q"),
        ({"maps": torch.zeros(1, 3, 16, dtype=torch.float16)}, "add to fp32 maps"),
        ({"columns": torch.ones(1, 7, 3, dtype=torch.long)}, "columns are of a floating type"),
        ({"columns": (1, 5, 3)}, "for 7 keys"),
        ({"columns": (7, 3)}, "for 7 keys"),
        ({"maps": (1, 2, 16)}, "maps to add to"),
        ({"maps": (4, 3, 16)}, "maps to add to"),
        ({"maps": (1, 3, 8)}, "maps to add to"),
        ({"first_conditional": 2}, "rows 2 to 3"),
        ({"first_conditional": -1}, "rows -1 to 0"),
        ({"heads": 0}, "into 0 heads"),
    ],
    ids=str,
)
def test_attend_refuses_what_a_kernel_would_read_or_write_beyond(change, word, impl):
    given = {"q": (2, 16, 32), "k": (2, 7, 32), "v": (2, 7, 32), "columns": (1, 7, 3), "maps": (1, 3, 16)} | change
    given = {name: torch.rand(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()}
    tensors = [given.pop(name) for name in ("q", "k", "v", "columns")]
    with pytest.raises(DiffuMaskError, match=word):
        attend(*tensors, **{"heads": 2, "first_conditional": 1, "impl": impl, **given})


@pytest.mark.parametrize("impl", ["sdpa", "triton", "sdpa+maps", "cpp", "reference"])
@pytest.mark.parametrize(("rows", "num", "pixels"), [(1, 0, 16), (0, 2, 16), (1, 2, 0)])
def test_attend_with_nothing_to_add_draws_the_same(rows, num, pixels, impl):
    q, k, v = torch.randn(2, pixels, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    out, maps = attend(q, k, v, torch.rand(rows, 7, num), heads=2, first_conditional=1, impl=impl)
    assert maps.shape == (rows, num, pixels)
    assert torch.allclose(out, reference.attend(q, k, v, heads=2)[0], atol=1e-6)


def test_attend_example_runs():
    results = doctest.testmod(importlib.import_module("diffumask_fast.kernels.attend"))
    assert results.attempted and not results.failed
