"""The random generators of images."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch

from diffumask_fast.errors import DiffuMaskError

Generators = torch.Generator | list[torch.Generator] | None


def generators_of(seeds: Sequence[int] | None, generator: Generators, count: int) -> Generators:
    """Make one generator per seed, so that an image does not depend on the others in its batch.

    Args:
        seeds: of the images.
        generator: given instead of seeds; returned unchanged.
        count: number of images.

    Raises:
        DiffuMaskError: both are given, or the numbers of seeds and images differ.
    """
    if seeds is None:
        return generator
    if generator is not None:
        raise DiffuMaskError("seeds and generator both say where the noise comes from: give one of them.")
    if not isinstance(seeds, Sequence | np.ndarray) or not all(isinstance(seed, Integral) for seed in seeds):
        raise DiffuMaskError(f"seeds are {seeds!r}: give a list of whole numbers, one for each image.")
    if len(seeds) != count:
        raise DiffuMaskError(f"There are {count} images and {len(seeds)} seeds: give one seed for each image.")
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
