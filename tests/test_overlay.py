import numpy as np
import torch
from PIL import Image

from diffumask_fast import collect_maps
from diffumask_fast.attention.overlay import overlay


def test_an_overlay_of_a_word(tiny_sd):
    with collect_maps(tiny_sd, phrases=["dog"]) as maps:
        image = tiny_sd("a dog on a sofa", num_inference_steps=2).images[0]
    shown = maps["dog"].overlay(image)
    assert shown.size == image.size == (64, 64) and shown.mode == "RGB"
    heat = np.asarray(torch.nn.functional.interpolate(maps["dog"].maps[None], (64, 64), mode="bilinear")[0, 0])
    red = np.asarray(shown)[..., 0].astype(float) - np.asarray(image)[..., 0] * 0.4
    assert np.corrcoef(heat.ravel(), red.ravel())[0, 1] > 0.5


def test_a_flat_map_and_an_image_with_alpha_are_no_trouble():
    shown = overlay(Image.new("RGBA", (40, 24)), torch.zeros(3, 5))
    assert shown.size == (40, 24) and len(shown.getcolors()) == 1
