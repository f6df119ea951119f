"""kernels/inputs.py: what is drawn has the shapes that it says, on random data and the same every time."""

import torch

from diffumask_fast.kernels import attend, mean_field
from diffumask_fast.kernels.inputs import CANDIDATES, CRF, LABELS, attention_input, filter_input, step_input
from diffumask_fast.kernels.shapes import KEYS


def rng():
    return torch.Generator().manual_seed(0)


def test_attention_takes_it_and_adds_to_its_maps():
    given, again = (
        attention_input((12, 2, 16), torch.bfloat16, "cpu", rng(), rows=3, conditional=2, num=4) for _ in range(2)
    )
    assert given.q.shape == (3, 12, 32) and given.k.shape == given.v.shape == (3, KEYS, 32)
    assert given.settings == {"heads": 2, "first_conditional": 1}
    assert torch.equal(given.q, again.q) and torch.equal(given.select, again.select)
    assert given.num_bytes == 2 * 3 * 32 * (2 * 12 + 2 * KEYS) + 4 * 2 * 4 * (KEYS + 2 * 12)
    out, maps = attend(given.q, given.k, given.v, given.select, **given.settings, maps=given.maps)
    assert maps is given.maps and maps.shape == (2, 4, 12) and (maps > 0).all() and out.dtype == torch.bfloat16


def test_the_filters_input_is_in_range():
    guide, maps = filter_input(2, 5, 6, "cpu", rng())
    assert guide.shape == (2, 3, 6, 6) and maps.shape == (2, 5, 6, 6) and 0 <= guide.min() < guide.max() < 1
    q, unary, guide = step_input(2, 6, "cpu", rng())
    assert q.shape == unary.shape == (2, CANDIDATES, LABELS, 6, 6) and torch.equal(unary, -q.log())
    assert guide.shape == (2, 3, 6, 6) and 1 < guide.max() < 255
    assert torch.allclose(mean_field(q, unary, guide, **CRF).sum(2), torch.ones(2, CANDIDATES, 6, 6))
