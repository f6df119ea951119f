"""convert/brush.py, read by Label Studio's own rule, written out: a head, then runs or single values, bit by bit."""

import numpy as np
import pytest

from diffumask_fast.convert import brush


def read(code):
    """Return the values that a code stands for."""
    bits = "".join(f"{byte:08b}" for byte in code)
    place = 0

    def take(count):
        nonlocal place
        place += count
        assert place <= len(bits)
        return int(bits[place - count : place], 2)

    num, word = take(32), take(5) + 1
    sizes, values = [take(4) + 1 for _ in range(4)], []
    while len(values) < num:
        is_run, length = take(1), take(sizes[take(2)]) + 1
        values += [take(word)] * length if is_run else [take(word) for _ in range(length)]
    assert len(values) == num and len(bits) - place < 8
    return np.array(values)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (7, 9), (30, 41), (300, 301)])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
def test_any_mask(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    code = brush.encode(mask)
    assert (read(code).reshape(*shape, 4) == np.where(mask, 255, 0)[..., None]).all()
    assert all(type(byte) is int and 0 <= byte < 256 for byte in code)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 32768, 32769])
def test_runs_at_the_ends_of_the_sizes(length):
    mask = np.ones((1, length), bool)
    assert (read(brush.encode(mask)) == 255).all()
    both = np.concatenate([mask, ~mask], 1)
    assert (read(brush.encode(both)).reshape(-1, 4)[:, 3] == np.where(both[0], 255, 0)).all()
