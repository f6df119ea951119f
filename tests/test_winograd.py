import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from diffumask_fast.kernels.winograd import convolve, pays, transform


def make(rows, channels, out, height, width, dtype=torch.float32, biased=True):
    image, weight = torch.randn(rows, channels, height, width), torch.randn(out, channels, 3, 3)
    weight /= (9 * channels) ** 0.5
    return image.to(dtype), weight.to(dtype), torch.randn(out).to(dtype) if biased else None


def in_fp64(image, weight, bias, doubled=False):
    image = F.interpolate(image.double(), scale_factor=2.0, mode="nearest") if doubled else image.double()
    return F.conv2d(image, weight.double(), None if bias is None else bias.double(), padding=1)


SHAPES = [
    (1, 16, 16, 1, 1),
    (2, 32, 48, 5, 7),
    (3, 160, 160, 4, 4),
    (1, 48, 16, 13, 9),
    (16, 64, 64, 16, 16),
    (2, 16, 80, 3, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_the_direct_convolution(shape, doubled, dtype, limit, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for biased in (True, False):
            image, weight, bias = make(*shape, dtype, biased)
            truth = in_fp64(image, weight, bias, doubled)
            found = convolve(image, transform(weight), bias, len(weight), doubled)
            assert found.dtype == dtype and found.shape == truth.shape
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert relative(found.double(), truth) < limit
    finally:
        torch.set_num_threads(before)


def test_its_error_is_a_few_times_that_of_a_direct_one():
    image, weight, bias = make(4, 128, 64, 16, 16)
    truth = in_fp64(image, weight, bias)
    direct, own = (
        (found - truth).square().mean().sqrt()
        for found in (F.conv2d(image, weight, bias, padding=1), convolve(image, transform(weight), bias, 64))
    )
    assert direct < own < 6 * direct < 2e-6


def test_any_layout_and_no_rows():
    image, weight, bias = make(2, 32, 32, 8, 8)
    truth, weights = in_fp64(image, weight, bias), transform(weight)
    for given in (image.transpose(2, 3).contiguous().transpose(2, 3), image.to(memory_format=torch.channels_last)):
        assert relative(convolve(given, weights, bias, 32), truth) < 5e-6
    every_other = torch.stack([bias, bias], 1).flatten()[::2]
    assert relative(convolve(image[::2], weights, every_other, 32), truth[::2]) < 5e-6
    assert convolve(image[:0], weights, bias, 32, True).shape == (0, 32, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so_and_stays_there(dtype):
    image, weight, bias = make(2, 32, 32, 8, 8, dtype)
    image[0, 3, 1, 1] = torch.nan
    found = convolve(image, transform(weight), bias, 32)
    assert found[0, :, 1, 1].isnan().all() and found[1].isfinite().all() and found[0, :, 4:, 4:].isfinite().all()


@pytest.mark.parametrize("added", [2**-12, 2**-8 + 2**-12], ids=["down", "up"])
def test_bf16_is_rounded_to_the_nearest(added):
    weight = torch.zeros(32, 32, 3, 3)
    weight[range(32), range(32), 1, 1] = 1.0
    image = (1 + torch.arange(128) / 128).view(1, 1, 8, 16).expand(1, 32, 8, 16).bfloat16()  # one digit is 2 ** -7
    found = convolve(image, transform(weight), torch.full((32,), added).bfloat16(), 32)
    assert torch.equal(found, (image.double() + added).bfloat16())


def test_where_it_pays():
    assert pays(16, 4, 4) and pays(1, 16, 16) and pays(2, 13, 13)
    assert not pays(1, 4, 4) and not pays(16, 2, 2) and not pays(16, 5, 5)


def test_what_it_does_not_take_is_refused():
    image, weight, bias = make(2, 32, 48, 8, 8)
    weights = transform(weight)
    for given, reason in (
        ((image[:, :9], weights, bias, 48), "C by 16"),
        ((image.half(), weights, bias, 48), "float16"),
        ((image[0], weights, bias, 48), "B, C by 16, H, W"),
        ((image, weights, bias[:9], 48), "bias"),
        ((image, weights, bias.bfloat16(), 48), "bias"),
        ((image, weights, None, 49), "49 channels by 16"),
        ((image, weights, None, 144), "not what transform makes for 32 to 144"),
        ((image[:, :16], weights, bias, 48), "not what transform makes for 16 to 48"),
        ((image, weights.double(), bias, 48), "not what transform makes"),
    ):
        with pytest.raises(ValueError, match=reason):
            convolve(*given)


@pytest.mark.filterwarnings("ignore")
def test_it_is_an_operator_and_one_node_of_a_graph():
    image, weight, bias = make(2, 32, 48, 8, 8)
    given = (image, transform(weight), bias, 48)
    op = torch.ops.diffumask_fast.winograd.default
    assert set(torch.library.opcheck(op, (*given, True)).values()) == {"SUCCESS"}

    class One(torch.nn.Module):
        def forward(self, image, weights, bias):
            return convolve(image * 2, weights, bias, 48) + 1

    program = torch.export.export(One(), given[:3])
    assert sum(node.target is op for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(*given[:3]), convolve(image * 2, *given[1:]) + 1)
