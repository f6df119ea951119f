import numpy as np
import pytest
import torch

from diffumask_fast.bench.contenders import Contenders, mask_iou
from diffumask_fast.bench.geometries import open_geometry


@pytest.fixture(scope="module")
def contenders():
    return Contenders(open_geometry("mini", "cpu"), 2, 2)


def test_all_contenders_draw_the_same_image(contenders):
    plain = contenders._draw(slice(0, 1), "pt")
    drawn = []
    for call in (contenders.ours(batch=1), contenders.reference(), contenders.daam()):
        with pytest.MonkeyPatch.context() as patch:
            kept = contenders.pipe.pipe.image_processor.postprocess

            def keep(*args, kept=kept, **kwargs):
                found = kept(*args, **kwargs)
                if kwargs["output_type"] != "latent":  # ours decodes after the call
                    drawn.append(found)
                return found

            patch.setattr(contenders.pipe.pipe.image_processor, "postprocess", keep)
            mask = call()
        assert mask.shape[-2:] == (128, 128) and mask.any()
    assert len(drawn) == 3 and all(torch.allclose(image, plain, atol=1e-3) for image in drawn)
    assert not torch.allclose(plain, contenders._draw(slice(1, 2), "pt"), atol=1e-1)


def test_the_peer_gives_maps_of_the_whole_batch(contenders):
    assert contenders.peer()().shape == (2, 1, 128, 128)


def test_mask_iou():
    empty, half = np.zeros((2, 2), np.uint8), np.array([[1, 1], [0, 0]], np.uint8)
    one = np.array([[1, 0], [0, 0]], np.uint8)
    assert mask_iou([empty, half, half, empty], [empty, half, one, half]) == [1, 1, 0.5, 0]
