"""kernels/attend_triton.py: the real kernels, in Triton's interpreter where there is no GPU."""

import subprocess
import sys

import pytest
import test_attend
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, attend_triton, guided_filter_triton, mean_field_triton, reference
from diffumask_fast.kernels.attend_triton import add_parts_kernel, constants, two_powers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, Bc, first, N, T, H, D, K
SHAPES = [
    (1, 1, 0, 64, 77, 2, 64, 1),
    (2, 1, 1, 64, 77, 8, 40, 5),
    (2, 1, 1, 256, 77, 4, 80, 16),
    (2, 1, 1, 64, 77, 2, 160, 17),
    (4, 2, 1, 77, 77, 3, 24, 2),
    (3, 3, 0, 130, 128, 1, 64, 3),
    (2, 1, 0, 100, 20, 2, 36, 4),
    (1, 1, 0, 4096, 77, 1, 16, 1),
]
LAUNCHED = {
    attend_triton: ("attend_kernel", "attend_maps_kernel", "add_parts_kernel"),
    guided_filter_triton: ("products_kernel", "lines_kernel", "rows_kernel", "values_kernel"),
    mean_field_triton: ("norm_kernel", "step_kernel"),
}
DTYPES = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


def make(shape, dtype=torch.float32):
    """Draw q, k, v, columns and earlier maps, on the device."""
    *tensors, settings = test_attend.make(shape, dtype)
    maps = torch.rand(shape[1], shape[7], shape[3], generator=torch.Generator().manual_seed(2)) / shape[4]
    return *(x.to(DEVICE) for x in (*tensors, maps)), settings


def error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def truth_of(q, k, v, columns, settings):
    """Return output and map in float64, from the same rounded inputs."""
    split = [x.double().unflatten(-1, (settings["heads"], -1)).transpose(1, 2) for x in (q, k, v)]
    probs = torch.softmax(split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5, -1)
    rows = slice(settings["first_conditional"], settings["first_conditional"] + len(columns))
    return (probs @ split[2]).transpose(1, 2).flatten(2), (probs[rows].mean(1) @ columns.double()).transpose(1, 2)


def check(impl, shape, dtype):
    q, k, v, columns, maps, settings = make(shape, dtype)
    before, (true_out, true_maps) = maps.clone(), truth_of(q, k, v, columns, settings)
    out, same = attend(q, k, v, columns, **settings, maps=maps, weight=0.5, impl=impl)
    assert same is maps and out.dtype == dtype
    plain_out, plain_maps = attend(q, k, v, columns, **settings, impl="sdpa")
    added = (maps - before) / 0.5
    assert error(out, true_out) <= 2 * error(plain_out, true_out) + DTYPES[dtype]
    assert error(added, true_maps) <= 2 * error(plain_maps, true_maps) + 2e-6
    bound = 2 * error(plain_maps, true_maps) + 2e-6
    uniform = columns.mean(1)[..., None].expand_as(true_maps)
    assert error(torch.zeros_like(added), true_maps) > bound and error(uniform, true_maps) > bound
    assert error(torch.zeros_like(out), true_out) > 2 * error(plain_out, true_out) + DTYPES[dtype]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(shape, dtype):
    check("triton", shape, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[1], torch.float16), (SHAPES[3], torch.bfloat16), (SHAPES[4], torch.float32), (SHAPES[6], torch.float32)],
    ids=str,
)
def test_the_maps_alone_are_as_exact_and_the_output_is_torchs_own(shape, dtype):
    out = check("sdpa+maps", shape, dtype)
    q, k, v, _, _, settings = make(shape, dtype)
    assert torch.equal(out, attend(q, k, v, heads=settings["heads"])[0])


@pytest.mark.parametrize("impl", ["triton", "sdpa+maps"])
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_any_scale_is_obeyed(scale, impl):
    q, k, v, columns, _, settings = make((2, 1, 1, 20, 77, 2, 24, 3))
    out, maps = attend(5 * q, k, v, columns, **settings, scale=scale, impl=impl)
    true_out, true_maps = reference.attend(5 * q, k, v, columns, **settings, scale=scale)
    assert error(out, true_out.double()) < 1e-5 and error(maps, true_maps.double()) < 1e-5


@pytest.mark.parametrize("impl", ["triton", "sdpa+maps"])
@pytest.mark.parametrize("shape", [(4, 2, 2, 64, 77, 4, 40, 3), (3, 2, 1, 16, 77, 2, 160, 9)], ids=str)
def test_the_same_input_gives_the_same_bits_in_every_batch(shape, impl):
    q, k, v, columns, maps, settings = make(shape)
    runs = []
    for _ in range(2):
        mine = maps.clone()
        runs.append((attend(q, k, v, columns, **settings, maps=mine, impl=impl)[0], mine))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    alone, last = maps[1:].clone(), shape[0] - 1
    out, _ = attend(q[last:], k[last:], v[last:], columns[1:], heads=shape[5], maps=alone, impl=impl)
    assert torch.equal(out, runs[0][0][last:]) and torch.equal(alone, runs[0][1][1:])


def test_what_is_not_written_is_not_read(monkeypatch):
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    for shape, impl in ((SHAPES[1], "sdpa+maps"), (SHAPES[3], "triton"), (SHAPES[4], "triton")):
        q, k, v, columns, maps, settings = make(shape)
        out, maps = attend(q, k, v, columns, **settings, maps=maps, impl=impl)
        assert out.isfinite().all() and maps.isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "sdpa+maps"])
def test_strided_inputs_are_read_where_they_are(impl):
    q, k, v, columns, maps, settings = make((2, 1, 1, 70, 77, 2, 40, 2))
    wide = torch.full((2, 70, 3, 80), float("nan"), device=DEVICE)
    wide[:, :, 1] = q
    found = attend(wide[:, :, 1], k, v, columns, **settings, maps=maps.clone(), impl=impl)
    for a, b in zip(found, attend(q, k, v, columns, **settings, maps=maps.clone(), impl=impl), strict=True):
        assert torch.equal(a, b)


def test_a_padded_column_adds_nothing_and_maps_are_made_when_there_are_none():
    q, k, v, columns, _, settings = make((2, 1, 1, 64, 77, 2, 16, 3))
    columns[:, :, 2] = 0
    _, maps = attend(q, k, v, columns, **settings, impl="triton")
    _, truth = reference.attend(q, k, v, columns, **settings)
    assert torch.allclose(maps, truth, atol=1e-7) and not maps[:, 2].any()


def test_sizes_are_covered_by_two_powers_of_two():
    for size in range(1, 257):
        first, second = two_powers(size)
        assert size <= first + second and first & (first - 1) == 0 == second & (second - 1)
        assert first <= max(size, 16)
    assert two_powers(128) == (128, 16) and two_powers(128, 64) == (64, 64) and two_powers(77, 64) == (64, 16)
    assert two_powers(77) == (64, 16) and two_powers(160) == (128, 32) and two_powers(80) == (64, 16)
    sizes = {size: two_powers(size, narrowest=64) for size in (8, 40, 64, 80, 160)}
    assert sizes == {8: (16, 64), 40: (64, 64), 64: (64, 64), 80: (64, 64), 160: (128, 64)}


def test_small_layers_split_their_heads_and_large_ones_do_not():
    def split(pixels, heads, head_dim):
        return heads // constants("attend", pixels, 77, heads, head_dim, 1, 64)["GROUP"]

    assert split(64, 8, 40) == 8 and split(1024, 20, 64) == 5
    assert split(4096, 8, 40) == 1 and constants("attend", 4096, 77, 8, 40, 1, 64)["ADD"]
    assert not constants("attend_maps", 1024, 77, 20, 64, 1, 64)["ADD"]
    # wide heads have a program each: the sums of their probabilities would not stay in registers from head to head
    assert split(9216, 8, 160) == 8 and split(9216, 8, 96) == 1


def test_columns_are_as_wide_as_they_are_and_many_take_turns():
    widths = {num: constants("attend", 64, 77, 8, 40, num, 64)["BLOCK_K"] for num in (1, 3, 8, 9, 77)}
    assert widths == {1: 1, 3: 3, 8: 8, 9: 4, 77: 4}


def test_a_launch_is_on_the_tensors_device(monkeypatch):
    current, seen = [0], []

    class Spy:
        def __init__(self, kernel):
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid):
            return lambda *a, **k: seen.append(current[-1])

    class Second(torch.cuda.device):
        """The guard of a second GPU, without one."""

        def __init__(self, tensor):
            self.index = 1

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Second)
    for module, names in LAUNCHED.items():
        for name in names:
            monkeypatch.setattr(module, name, Spy(getattr(module, name)))
    q, k, v, columns, maps, settings = make((2, 1, 1, 20, 77, 2, 160, 3))
    for impl in ("triton", "sdpa+maps"):
        attend(q, k, v, columns, **settings, maps=maps, impl=impl)
    guide, probs = torch.rand(1, 3, 6, 5), torch.rand(1, 1, 2, 6, 5)
    guided_filter_triton.guided_filter(guide, guide, 1, 0.1)
    around = {"window": 3, "dilation": 1, "bilateral": (1.0, 2.0, 3.0)}
    norm = mean_field_triton.bilateral_norm(guide, **around)
    mean_field_triton.mean_field(probs, probs, guide, **around, gaussian=(1.0, 2.0), norm=norm)
    assert seen == [1] * 10 and current == [0]


def test_eager_launches_need_no_operator_and_gradients_and_compilers_have_theirs(monkeypatch):
    class Operator(Exception):
        pass

    def call(*a, **k):
        raise Operator

    monkeypatch.setattr(torch.ops.diffumask_fast, "cross_attention_maps", call)
    monkeypatch.setattr(torch.ops.diffumask_fast, "attend_maps", call)
    q, k, v, columns, maps, settings = make((1, 1, 0, 16, 77, 1, 16, 1))
    for impl in ("triton", "sdpa+maps"):
        attend(q, k, v, columns, **settings, maps=maps, impl=impl)
        with torch.no_grad():
            attend(q.requires_grad_(), k, v, columns, **settings, maps=maps, impl=impl)
        with pytest.raises(Operator):
            attend(q, k, v, columns, **settings, maps=maps, impl=impl)
        q.requires_grad_(False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(Operator):
            attend(q, k, v, columns, **settings, maps=maps, impl=impl)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)


def test_a_guided_pair_of_sdxl_fills_the_gpu(monkeypatch):
    grids = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *a, **k: grids.append(grid)

    monkeypatch.setattr(attend_triton, "attend_kernel", Spy())
    for batch in (2, 16):
        q, k, maps = torch.zeros(batch, 1024, 1280), torch.zeros(batch, 77, 1280), torch.zeros(batch // 2, 1, 1024)
        select = torch.zeros(batch // 2, 77, 1)
        half = dict(heads=20, scale=0.1, first_conditional=batch // 2)
        attend_triton.attend(q.half(), k.half(), k.half(), select, maps, **half)
    assert grids == [(16, 2, 5), (16, 16, 5)]  # 160 programs for 132 multiprocessors


def test_parts_are_added_one_after_the_other():
    parts = 10.0 ** torch.arange(3, 8).float()[:, None].expand(5, 1500) + torch.rand(5, 1500)
    maps = torch.rand(1500)
    truth = maps.clone()
    for part in parts:
        truth += part
    add_parts_kernel[(2,)](parts.contiguous().to(DEVICE), found := maps.to(DEVICE), 1500, GROUPS=5, BLOCK=1024)
    assert torch.equal(found.cpu(), truth) and not torch.equal(maps + parts.flip(0).sum(0), truth)


def test_what_it_cannot_do_is_one_sentence():
    q, k, v, columns, maps, settings = make((1, 1, 0, 16, 77, 1, 16, 1))
    many = torch.zeros(1, 129, 16, device=DEVICE)
    for arguments, reason in (
        ((q, k, v, None), "takes columns"),
        ((q, many, many, torch.zeros(1, 129, 1)), "128 keys"),
    ):
        with pytest.raises(DiffuMaskError, match=reason):
            attend(*arguments, **settings, impl="triton")
    for change in ({0: q.double(), 1: k.double(), 2: v.double()}, {0: q.half()}):
        tensors = [change.get(at, tensor) for at, tensor in enumerate((q, k, v))]
        with pytest.raises(DiffuMaskError, match="q, k, v of one dtype, fp32, fp16, bf16"):
            attend(*tensors, columns, **settings, impl="triton")
    with pytest.raises(DiffuMaskError, match="fp32 maps"):
        attend(q, k, v, columns, **settings, maps=maps.half(), impl="triton")
    code = (
        "import torch; from diffumask_fast.kernels import attend; from diffumask_fast.errors import DiffuMaskError\n"
        "x = torch.zeros(1, 4, 16)\n"
        "try: attend(x, x, x, torch.zeros(1, 4, 1), heads=1, impl='triton')\n"
        "except DiffuMaskError as error: print(error)"
    )
    plain = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "PYTHONSAFEPATH": "1"}
    )
    assert "runs on CUDA" in plain.stdout, plain.stderr
