import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.generators import generators_of


def test_each_seed_has_its_own_noise_whatever_stands_beside_it():
    one, other = (torch.randn(3, generator=generators_of(seeds, None, 2)[1]) for seeds in ([7, 8], [1, 8]))
    assert torch.equal(one, other)
    first = torch.randn(3, generator=generators_of([7], None, 1)[0])
    assert torch.equal(first, torch.randn(3, generator=torch.Generator().manual_seed(7))) and not first.equal(one)


def test_a_generator_is_taken_as_it_is():
    generator = torch.Generator()
    assert generators_of(None, generator, 3) is generator and generators_of(None, None, 3) is None


@pytest.mark.parametrize(
    ("seeds", "generator", "words"),
    [
        ([1], torch.Generator(), "give one of them"),
        ([1, 2], None, "1 images and 2 seeds"),
        *((wrong, None, "seeds are .*: give a list of whole numbers") for wrong in (5, [1.5], ["1"], "1")),
    ],
)
def test_what_does_not_fit_is_refused(seeds, generator, words):
    with pytest.raises(DiffuMaskError, match=words):
        generators_of(seeds, generator, 1)
