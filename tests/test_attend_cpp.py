import pytest
import torch
from conftest import relative

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, reference

OP = torch.ops.diffumask_fast.attend_cpp.default


def make(rows=3, queries=37, keys=19, width=48, num=3, own=2, dtype=torch.float32):
    q, k, v = 3 * torch.randn(rows, queries, width), torch.randn(rows, keys, width), torch.randn(rows, keys, width)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.rand(own, keys, num)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-6), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries, keys, width", [(37, 19, 48), (1, 1, 4), (256, 256, 64), (32, 77, 6), (33, 13, 320)])
def test_it_is_the_reference(queries, keys, width, threads, dtype, limit):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, own, first in ((3, 2, 1), (1, 1, 0), (2, 1, 0)):
            given, settings = make(rows, queries, keys, width, 3, own, dtype), {"heads": 2, "first_conditional": first}
            out, maps = attend(*given, **settings, impl="cpp")
            true_out, true_maps = reference.attend(*(x.double() for x in given), **settings)
            assert out.dtype == dtype and maps.dtype == torch.float32
            assert relative(out.double(), true_out) < limit and relative(maps, true_maps) < 5e-6
            assert torch.equal(attend(*given[:3], heads=2, impl="cpp")[0], out)
    finally:
        torch.set_num_threads(before)


def test_large_and_small_scores_are_exact_too():
    q, k, v, columns = make(1, 40, 50, 16, 2, 1)
    for factor in (1e-4, 30.0, 1e3):
        found, truth = attend(q * factor, k, v, columns, heads=1, impl="cpp"), reference.attend(
            (q * factor).double(), k.double(), v.double(), columns.double(), heads=1)  # fmt: skip
        # a score has seven digits, so that a large one is known to fewer than one behind the point
        assert relative(found[0], truth[0]) < max(1e-5, 1e-5 * factor)
        assert found[1].isfinite().all() and (found[1] <= 1 + 1e-5).all()


def test_what_is_not_a_number_stays_in_its_row():
    q, k, v, columns = make(2, 40, 20, 16, 2, 2)
    q[1, 3, 2] = torch.nan
    out, maps = attend(q, k, v, columns, heads=2, impl="cpp")
    assert out[1, 3, :8].isnan().all() and maps[1, :, 3].isnan().all()
    out[1, 3], maps[1, :, 3] = 0, 0
    assert out.isfinite().all() and maps.isfinite().all()


def test_parts_of_larger_tensors_and_columns_of_other_types():
    q, k, v, columns = make()
    truth = attend(q, k, v, columns, heads=2, first_conditional=1, impl="cpp")
    wide = torch.randn(3, 37, 96)
    wide[..., 48:] = q
    strange = columns.double().transpose(1, 2).contiguous().transpose(1, 2)
    found = attend(wide[..., 48:], k, v, strange, heads=2, first_conditional=1, impl="cpp")
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)
    maps = torch.ones(2, 3, 37)
    attend(q, k, v, columns, heads=2, first_conditional=1, maps=maps, weight=0.5, impl="cpp")
    assert torch.allclose(maps, 1 + truth[1] / 2)


def test_what_it_does_not_take_is_refused():
    q, k, v, columns = make()
    for given, rest in (((q.half(), k.half(), v.half()), {}), ((q, k.bfloat16(), v), {}), ((q, k, v), {"mask": q[0]})):
        with pytest.raises(DiffuMaskError, match="impl 'cpp' takes q, k, v of one dtype.*use 'sdpa'"):
            attend(*given, heads=2, impl="cpp", **rest)
    for wrong in (
        (q, k[:, 1:], v, None),
        (q, k[1:], v[1:], None),
        (q, k, v, columns[:, 1:]),
        (q, k[:, :0], v[:, :0], None),
    ):
        with pytest.raises(ValueError, match="do not fit each other"):
            OP(*wrong, 2, 1.0, 0)
    for heads, first in ((5, 0), (2, 2), (2, -1), (0, 0), (-2, 0)):
        with pytest.raises(ValueError, match="do not fit each other"):
            OP(q, k, v, columns, heads, 1.0, first)


@pytest.mark.filterwarnings("ignore")
def test_it_is_an_operator():
    for given in ((*make(),), (*make()[:3], None)):
        assert set(torch.library.opcheck(OP, (*given, 2, 0.25, 1)).values()) == {"SUCCESS"}
