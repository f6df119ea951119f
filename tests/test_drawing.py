"""dropin/drawing.py: the seeds of the paper's program's workers, and its maps."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from diffumask_fast.dropin.class_maps import word_tokens
from diffumask_fast.dropin.drawing import Drawing, draw, image_seeds
from diffumask_fast.pipeline import DiffuMaskPipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffuMaskPipeline.from_pretrained("mini", device="cpu", dtype="fp32")
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "number, workers, seeds",
    [
        (4, 1, [200000, 200001, 200002, 200003]),
        (4, 2, [200000, 200001, 200004, 200005]),
        (6, 3, [200000, 200001, 200004, 200005, 200008, 200009]),
        (5, 3, [200000, 200001, 200002, 200003, 200004]),
        (2, 8, [200000, 200002]),
    ],
)
def test_seeds_are_those_of_the_workers(number, workers, seeds):
    assert image_seeds(number, workers) == seeds


@pytest.mark.parametrize("number, workers", [(8000, 8), (8003, 8), (15, 8), (16, 8), (7, 7), (1, 1), (100, 99)])
def test_every_image_has_a_number_and_those_of_the_original_are_among_them(number, workers):
    seeds = image_seeds(number, workers)
    share = number // workers
    original = {200000 + worker * 2 * share + i for worker in range(workers) for i in range(share)}
    assert len(seeds) == len(set(seeds)) == number and original <= set(seeds)


@cache
def bicubic(size):
    """OpenCV's enlargement to 512 as a matrix [512, size]: Keys' kernel with a = -0.75, the border repeated."""
    matrix = np.zeros((512, size))
    for row in range(512):
        at = (row + 0.5) * size / 512 - 0.5
        for cell in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - cell)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(cell, 0), size - 1)] += near if x <= 1 else far if x < 2 else 0
    return matrix


def reference_map(levels, tokens, chosen):
    """The original's map of a class: levels {side: [side, side, 77]}, sides as chosen; one token after the other."""
    total = np.zeros((512, 512))
    for token in tokens:
        for side in chosen:
            enlarged = bicubic(side) @ levels[side][..., token] @ bicubic(side).T
            total += enlarged / enlarged.max() / len(chosen)
    return total / len(tokens)


PROMPTS = {  # class, prompt, {class index: (positions, sides)}
    "dog": ("a photo of a dog on the grass", {11: ([5], [16, 8])}),
    "cat": ("a cat and a dog on a sofa, a cat", {7: ([2, 11], [16, 8]), 11: ([5], [16, 8]), 17: ([8], [4])}),
    "diningtable": ("a photo of a dining table in a room", {10: ([6], [8])}),
    "pottedplant": ("a potted plant and a tv monitor", {15: ([3], [16, 8]), 19: ([6, 7], [4])}),
    "aeroplane": ("an aeroplane", {0: ([2, 3, 4, 5], [16, 8])}),
    "train": ("a person and a train", {14: ([2], [16, 8]), 18: ([5], [4])}),
}


def test_maps_are_those_of_the_original_computed_from_all_probabilities(pipe, recording):
    drawings = [
        Drawing(name, 200000 + i, prompt, word_tokens(pipe.pipe.tokenizer, prompt))
        for i, (name, (prompt, _)) in enumerate(PROMPTS.items())
    ]
    ours = list(draw(pipe, drawings, 4, 4.0, 5))
    for drawing, (image, maps) in zip(drawings, ours, strict=True):
        with recording(pipe.pipe.unet) as recorder:
            pixels = pipe.pipe(
                drawing.prompt, num_inference_steps=4, guidance_scale=4.0, output_type="np",
                generator=torch.Generator().manual_seed(drawing.seed),
            ).images[0]  # fmt: skip
        levels = {}
        for side in (16, 8, 4):  # conditional half; mean over layers, heads, calls
            kept = [probs[1:].mean((0, 1)) for probs in recorder.cross if probs.shape[2] == side**2]
            levels[side] = torch.stack(kept).mean(0).unflatten(0, (side, side)).double().numpy()
            assert np.allclose(levels[side].sum(-1), 1, atol=1e-4)
        expected = PROMPTS[drawing.class_name][1]
        assert drawing.tokens == {index: positions for index, (positions, _) in expected.items()}
        assert maps.keys() == expected.keys()
        for index, (tokens, sides) in expected.items():
            truth = reference_map(levels, tokens, sides)
            assert maps[index].shape == (512, 512) and maps[index].dtype == np.float32
            assert np.abs(maps[index] - truth).max() < 1e-3, (drawing.prompt, index)
            others = [s for s in ([16, 8, 4], [16], [8], [4], [16, 8]) if s != sides]
            assert all(np.abs(maps[index] - reference_map(levels, tokens, s)).max() > 0.02 for s in others)
        small = Image.fromarray((pixels * 255).astype(np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image, int) - np.asarray(small, int)).max() <= 2
