"""results.py: what a notebook shows of results."""

import pytest
from samples import draw, requests
from test_show import pictures_in

from diffumask_fast import DiffuMaskPipeline
from diffumask_fast.results import Result


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
