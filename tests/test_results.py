"""results.py: what becomes of a finished batch, and what a notebook shows of it."""

import numpy as np
import pytest
import torch
from samples import draw, requests
from test_show import pictures_in

from diffumask_fast import DiffuMaskPipeline
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.results import Drawn, Result, to_host


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_outputs_show_their_first_samples(tiny_sd, kind):
    pipe = DiffuMaskPipeline.from_pipe(tiny_sd)
    prompts = ["a photo of a dog"] * 10
    out = pipe(prompts, classes=[["dog"]] * 10, num_inference_steps=1, height=64, width=64, output_type=kind)
    html = out._repr_html_()
    assert {picture.size for picture in pictures_in(html)} == {(3 * 64 + 2 * 4, 64)}
    assert len(pictures_in(html)) == 8 and "and 2 more" in html and "id 12: quality" in html


def test_a_result_shows_itself():
    one = draw(requests(1)[0])
    result = Result(one.request, one.image, one.mask, tuple(one.quality), one.maps, False, "too small <b>")
    html = result._repr_html_()
    assert len(pictures_in(html)) == 1 and "rejected: too small &lt;b&gt;" in html


def test_a_finished_batch_gives_the_sample_of_each_request():
    wished = requests(3)  # of one class each
    pixels = torch.rand(3, 3, 8, 8)
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    ids = torch.tensor([[*request.class_ids, 0] for request in wished])
    mask = ids[:, :1, None].expand(3, 8, 8).to(torch.uint8).clone()
    mask[:, :, :4] = 0
    mask[1] = 0
    class_maps = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    quality = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0]])
    drawn = Drawn(pixels, images, [True, True, False], mask, class_maps, quality, ids)
    results = drawn.results(wished, MaskOptions())
    assert [one.request for one in results] == list(wished)
    assert [one.accepted for one in results] == [True, False, False]
    assert results[0].reason == "" and "not finite" in results[2].reason and results[1].reason
    for row, one in enumerate(results):
        assert np.array_equal(one.image, images[row]) and np.array_equal(one.mask, mask[row])
        assert np.array_equal(one.maps, class_maps[row, :1]) and one.quality == pytest.approx((0.9 - row / 10,))


def test_to_host_gives_each_tensor():
    one, other = to_host(torch.arange(3), torch.ones(2, 2, dtype=torch.uint8))
    assert one.tolist() == [0, 1, 2] and other.dtype == np.uint8
