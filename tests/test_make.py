"""masks/make.py: maps of known things become the masks they should."""

import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import guided_filter
from diffumask_fast.masks import make
from diffumask_fast.masks.make import make_masks, mask_quality, quantise_maps, refine_maps, score_classes
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu

SIDE, CELLS = 96, 12


def disc(x, y, radius, height=SIDE, width=SIDE):
    """[height, width] bool; centre and radius as shares of the sides."""
    ys, xs = torch.meshgrid(
        torch.linspace(0.5 / height, 1 - 0.5 / height, height),
        torch.linspace(0.5 / width, 1 - 0.5 / width, width),
        indexing="ij",
    )
    return (xs - x) ** 2 + (ys - y) ** 2 < radius**2


def picture(*shapes, height=SIDE, width=SIDE):
    """A grey picture with each shape in a colour of its own, uint8 [height, width, 3], and a little noise."""
    colours = torch.tensor([[220, 60, 40], [40, 70, 220], [240, 230, 60]])
    image = torch.full((height, width, 3), 120)
    for shape, colour in zip(shapes, colours, strict=False):
        image[shape] = colour
    noise = torch.randint(-6, 7, image.shape, generator=torch.Generator().manual_seed(0))
    return (image + noise).clamp(0, 255).to(torch.uint8)


def seen(shape, cells=(CELLS, CELLS), floor=0.1):
    """What attention sees of a shape: few cells, soft, on a floor."""
    return floor + torch.nn.functional.adaptive_avg_pool2d(shape[None].float(), cells)[0]


def iou(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


def make_with_scores(*args):
    """Return what make_masks gives, with the scores that its masks are made of in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(make, "score_classes", lambda *inner: kept.append(score_classes(*inner)) or kept[-1])
        mask, quality = make_masks(*args)
    return mask, kept[0], quality


ONE = disc(0.4, 0.55, 0.25)
LEFT, RIGHT = disc(0.25, 0.5, 0.17), disc(0.72, 0.45, 0.2)


@pytest.mark.parametrize("threshold", ["otsu", 0.5])
def test_recovers_a_disc_along_the_edges_of_the_image(threshold):
    maps, images, ids = seen(ONE)[None, None] * 1e-3, picture(ONE)[None], torch.tensor([[12]])
    mask, scores, quality = make_with_scores(maps, images, MaskOptions(threshold=threshold), ids)
    assert mask.dtype == torch.uint8 and mask.unique().tolist() == [0, 12]
    assert scores.shape == (1, 2, SIDE, SIDE) and scores.min() >= 0 and scores.max() <= 1
    sharp = iou(mask[0] == 12, ONE)
    soft = iou(make_masks(maps, images, MaskOptions(threshold=threshold, refine="none"), ids)[0][0] == 12, ONE)
    assert sharp > 0.96 and sharp > soft
    assert 0.7 < quality.item() <= 1


def test_two_classes_and_a_padded_column():
    maps = torch.stack([torch.full((CELLS, CELLS), 9.0), seen(LEFT), 5 * seen(RIGHT)])[None]
    mask, scores, quality = make_with_scores(
        maps, picture(LEFT, RIGHT)[None], MaskOptions(), torch.tensor([[0, 7, 12]])
    )
    assert mask.unique().tolist() == [0, 7, 12]
    assert iou(mask[0] == 7, LEFT) > 0.9 and iou(mask[0] == 12, RIGHT) > 0.9
    assert quality[0, 0] == 0 and quality[0, 1:].min() > 0.5
    assert scores[0, 1].max() == 0
    assert torch.equal(scores.argmax(1)[0] == 3, mask[0] == 12)


def test_padding_and_batch_change_nothing():
    maps = torch.stack([torch.stack([seen(LEFT), seen(RIGHT)]), torch.stack([seen(ONE), torch.zeros(CELLS, CELLS)])])
    images = torch.stack([picture(LEFT, RIGHT), picture(ONE)])
    ids = torch.tensor([[7, 12], [3, 0]])
    together = make_with_scores(maps, images, MaskOptions(), ids)
    first = make_with_scores(maps[:1], images[:1], MaskOptions(), ids[:1])
    second = make_with_scores(maps[1:, :1], images[1:], MaskOptions(), ids[1:, :1])
    assert torch.equal(together[0], torch.cat([first[0], second[0]]))
    assert torch.equal(together[1][0], first[1][0]) and torch.equal(together[1][1, :2], second[1][0])
    assert torch.allclose(together[2][1, :1], second[2][0])


def test_masks_of_stored_maps_are_the_same():
    maps = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) ** 3 * 0.07
    images = torch.stack([picture(ONE), picture(LEFT, RIGHT)])
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    stored = quantise_maps(maps)
    assert stored.dtype == torch.uint8 and stored.amax((2, 3)).min() == 255
    assert torch.equal(quantise_maps(stored.float() / 255), stored)
    for ours, again in zip(
        make_with_scores(maps, images, MaskOptions(), ids),
        make_with_scores(stored, images, MaskOptions(), ids),
        strict=True,
    ):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("height, width, cells", [(64, 128, (8, 16)), (97, 41, (13, 6)), (128, 64, (3, 5))])
def test_sizes_that_are_not_square(height, width, cells):
    shape = disc(0.5, 0.45, 0.3, height, width)
    mask = make_masks(
        seen(shape, cells)[None, None],
        picture(shape, height=height, width=width)[None],
        MaskOptions(),
        torch.tensor([[200]]),
    )[0]
    assert mask.shape == (1, height, width) and iou(mask[0] == 200, shape) > 0.8


@pytest.mark.parametrize("height, width, radius", [(64, 64, 4), (192, 160, 10), (16, 300, 1)])
def test_the_filters_window_grows_with_the_image(height, width, radius):
    image = picture(height=height, width=width)[None]
    maps = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    wanted = refine_maps(maps, image, MaskOptions(refine="none"))
    wanted = guided_filter(image.permute(0, 3, 1, 2) / 255, wanted, radius, 1e-4).clamp(0, 1)
    assert torch.equal(refine_maps(maps, image, MaskOptions(radius=8)), wanted)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(8, 8), torch.full((8, 8), 0.3), torch.full((8, 8), float("nan")), torch.full((8, 8), float("inf"))],
    ids=["zeros", "flat", "nan", "inf"],
)
@pytest.mark.parametrize("threshold", ["otsu", 0.5])
def test_a_map_without_an_object(bad, threshold):
    maps = torch.stack([bad, seen(LEFT, (8, 8))])[None]
    options = MaskOptions(threshold=threshold, refine="none")
    mask, scores, quality = make_with_scores(maps, picture(LEFT)[None], options, torch.tensor([[1, 2]]))
    assert scores.isfinite().all() and quality.isfinite().all()
    if threshold == "otsu" or bad[0, 0] != 0.3:  # a flat map is wholly above a fixed threshold
        assert mask.unique().tolist() == [0, 2] and quality[0, 0] == 0


def test_one_nan_cell_spoils_nothing_else():
    maps = seen(ONE)[None, None].clone()
    maps[0, 0, 0, 0] = float("nan")
    mask = make_masks(maps, picture(ONE)[None], MaskOptions(), torch.tensor([[1]]))[0]
    assert iou(mask[0] == 1, ONE) > 0.95


@pytest.mark.parametrize("band", [1, 3])
def test_ignore_band_lies_on_both_sides_of_the_boundary(band):
    maps, images, ids = seen(ONE)[None, None], picture(ONE)[None], torch.tensor([[254]])
    plain = make_masks(maps, images, MaskOptions(), ids)[0][0].int()
    banded = make_masks(maps, images, MaskOptions(ignore_band=band), ids)[0][0].int()
    ignored = banded == 255
    near = torch.zeros_like(ignored)
    for dy in range(-band, band + 1):
        for dx in range(-band, band + 1):
            moved = plain.roll((dy, dx), (0, 1))  # nothing touches the border here
            near |= moved != plain
    assert torch.equal(ignored, near) and ignored.any()
    assert torch.equal(banded[~ignored], plain[~ignored])


def test_no_band_along_the_border_of_the_image():
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 4:] = 1
    mask = make_masks(maps, picture()[None], MaskOptions(ignore_band=2, refine="none"), torch.tensor([[1]]))[0][0]
    assert (mask == 255).sum() == 4 * SIDE and (mask[:, -1] == 1).all() and (mask[:, 0] == 0).all()


def test_quality_orders_masks():
    inside = ONE[None, None]
    clear = inside.float()
    faint = 0.6 + 0.2 * clear
    noise = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    values = [
        mask_quality(maps, otsu(maps), inside).item() for maps in (clear, faint, 0.7 * clear + 0.3 * noise, noise)
    ]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[0] > values[2] > values[1] > values[3] >= 0 and values[3] < 0.05
    cut = torch.full((1, 1), 0.5)
    assert mask_quality(clear, cut, torch.zeros_like(inside)).item() == mask_quality(clear, cut, inside | True) == 0


def test_a_mask_that_a_little_of_the_threshold_changes_is_poor():
    ramp = torch.linspace(0, 1, 1000).expand(1, 1, 4, 1000)
    high, low = (mask_quality(ramp, torch.tensor([[cut]]), ramp > 0.5).item() for cut in (0.5, 0.9))
    assert low / high == pytest.approx((0.08 / 0.28) / (0.4 / 0.6), abs=0.01)


def test_quality_of_two_images_in_one_batch():
    clear = torch.stack([ONE, LEFT]).float()[:, None]
    wrong = torch.stack([ONE, RIGHT])[:, None]
    assert mask_quality(clear, torch.full((2, 1), 0.5), wrong)[:, 0].tolist() == pytest.approx([1, 0], abs=1e-5)


@pytest.mark.parametrize(
    "maps, images, ids, word",
    [
        (torch.rand(1, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 1), "class maps"),
        (torch.rand(1, 0, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 0), "class maps"),
        (torch.rand(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 1), "images"),
        (torch.rand(1, 1, 8, 8), torch.rand(1, 8, 8, 3), torch.ones(1, 1), "uint8"),
        (torch.rand(1, 1, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 2), "class ids"),
    ],
)
def test_refuses_what_does_not_fit(maps, images, ids, word):
    with pytest.raises(DiffuMaskError, match=word):
        make_masks(maps, images, MaskOptions(), ids)


REFINEMENTS = [{}, {"colour_steps": 0}, {"refine": "crf"}, {"refine": "none"}, {"threshold": "adaptive"}]
REFINED = pytest.mark.parametrize("options", REFINEMENTS, ids=[str(*o.values()) or "default" for o in REFINEMENTS])


@REFINED
def test_an_object_of_one_cell_and_one_of_one_pixel(options):
    maps = torch.zeros(2, 1, 12, 12)
    maps[:, 0, 5, 6] = 1
    pixel = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    cell = pixel.clone()
    cell[40:48, 48:56] = pixel[44, 52] = True
    mask, scores, quality = make_with_scores(
        maps, torch.stack([picture(cell), picture(pixel)]), MaskOptions(**options), torch.tensor([[9], [9]])
    )
    assert scores.isfinite().all() and quality.isfinite().all()
    assert iou(mask[0] == 9, cell) > 0.4 and mask[0].count_nonzero() < 4 * cell.sum()
    assert 0 < mask[1].count_nonzero() < 12 * cell.sum()  # what attention cannot see is a cell at best


@REFINED
def test_an_object_that_fills_the_frame(options):
    everything = torch.ones(SIDE, SIDE, dtype=torch.bool)
    maps = torch.ones(1, 1, 12, 12)
    mask, quality = make_masks(maps, picture(everything)[None], MaskOptions(**options), torch.tensor([[9]]))
    assert mask.unique().numel() == 1 and quality.item() == 0  # a map of one value says nothing
    maps[..., 0, :] = 0.1
    mask = make_masks(maps, picture(everything)[None], MaskOptions(**options), torch.tensor([[9]]))[0][0]
    assert (mask == 9).float().mean() > 0.85


def test_small_parts_and_holes():
    ring = ONE & ~disc(0.4, 0.55, 0.08)
    speck = disc(0.9, 0.1, 0.05)
    maps = torch.nn.functional.adaptive_avg_pool2d((ring | speck)[None, None].float(), 48)
    images, ids = picture(ring | speck)[None], torch.tensor([[9]])
    plain, cleaned, filled = (
        make_masks(maps, images, MaskOptions(**options), ids)[0][0] == 9
        for options in ({}, {"min_component": 0.02}, {"min_component": 0.02, "fill_holes": True})
    )
    assert iou(plain, ring | speck) > 0.9 and iou(cleaned, ring) > 0.9 and iou(filled, ONE) > 0.9
    assert plain[speck].any() and not cleaned[speck].any() and not cleaned[ONE & ~ring].all()


def test_the_class_that_leads_takes_all_of_an_object():
    maps = torch.stack([seen(LEFT) + 0.3 * seen(RIGHT), seen(RIGHT) + 0.6 * seen(LEFT)])[None]
    mask = make_masks(maps, picture(LEFT, RIGHT)[None], MaskOptions(), torch.tensor([[7, 12]]))[0][0]
    assert iou(mask == 7, LEFT) > 0.95 and iou(mask == 12, RIGHT) > 0.95
