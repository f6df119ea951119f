"""Where the noise of images comes from."""

from collections.abc import Sequence

import torch

from diffumask_fast.errors import DiffuMaskError

Generators = torch.Generator | list[torch.Generator] | None


def generators_of(seeds: Sequence[int] | None, generator: Generators, count: int) -> Generators:
    """Make a generator for each image's seed, so that an image depends on nothing else in its batch.

    Args:
        seeds: of the images.
        generator: what stands in their place, returned as it is.
        count: number of images.

    Raises:
        DiffuMaskError: both are given, or not as many seeds as images.
    """
    if seeds is None:
        return generator
    if generator is not None:
        raise DiffuMaskError("seeds and generator both say where the noise comes from: give one of them.")
    if len(seeds) != count:
        raise DiffuMaskError(f"There are {count} images and {len(seeds)} seeds: give one seed for each image.")
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
