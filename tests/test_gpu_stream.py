"""On a GPU: what a stream draws beside the next batch's denoising is what calls draw one after the other."""

import numpy as np
import pytest
import torch

from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.request import Request

pytestmark = pytest.mark.gpu
SMALL = {"num_inference_steps": 3, "height": 64, "width": 64}


@pytest.mark.parametrize("engine", ["torch", "compile"])
def test_a_stream_gives_what_calls_give(engine):
    pipe = DiffuMaskPipeline.from_pretrained("mini", engine=engine, device="cuda", dtype="fp32")
    pipe.pipe.set_progress_bar_config(disable=True)
    wished = [Request(f"dog-{i:06d}", "a photo of a dog on the grass", "", ("dog",), (12,), i) for i in range(3)]
    streamed = list(pipe.stream(wished, 2, **SMALL))
    assert [result.request for result in streamed] == wished
    torch.cuda.synchronize()
    for start in (0, 2):
        batch = wished[start : start + 2]
        out = pipe(
            [request.prompt for request in batch], [["dog"]], seeds=[request.seed for request in batch],
            output_type="np", **SMALL,
        )  # fmt: skip
        for result, image, mask in zip(streamed[start:], out.images, out.masks, strict=False):
            assert np.abs(result.image - 255 * image).max() <= 2
            found, wanted = result.mask > 0, mask > 0
            assert wanted.any() and (found & wanted).sum() / (found | wanted).sum() > 0.99
