"""masks/crf.py against pydensecrf, which sees all pairs of pixels through its lattice."""

import numpy as np
import pytest
import torch
from test_make import ONE, RIGHT, iou, picture

from diffumask_fast.bench.baselines import dense_crf
from diffumask_fast.masks import crf as module
from diffumask_fast.masks.crf import PRESETS, SIDE, crf


def scene(height=120, width=160):
    """Two textured things on a gradient, and labels that are off by some pixels; [H, W, 3] uint8, [H, W] bool."""
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[:height, :width]
    image = np.stack([90 + 0.4 * xs, 120 + 0.3 * ys, np.full_like(xs, 140)], -1)
    body = ((xs - 70) / 45) ** 2 + ((ys - 55) / 32) ** 2 < 1
    image[body] = [200, 80, 50]
    image[(abs(xs - 130) < 18) & (abs(ys - 90) < 15)] = [60, 150, 70]
    image = (image + rng.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8)
    labels = ((xs - 76) / 47) ** 2 + ((ys - 60) / 34) ** 2 < 1
    return image, labels, body


@pytest.mark.parametrize(
    "name, num_labels, window, least",
    [("threshold", 2, 31, 0.97), ("threshold", 3, 31, 0.97), ("seeds", 2, 81, 0.97), ("seeds", 3, 31, 0.94)],
)
def test_agrees_with_pydensecrf(name, num_labels, window, least):
    """With "seeds" ten steps are not the end yet, so every pair that a thinned window leaves out can be seen."""
    image, labels, body = scene()
    labels = labels.astype(np.int64)
    if num_labels == 3:
        labels[75:110, 105:150] = 2
    wanted = dense_crf(image, labels, num_labels, PRESETS[name], min(labels.shape) / SIDE).argmax(0)
    found = crf(
        torch.from_numpy(labels)[None, None], num_labels, torch.from_numpy(image)[None], PRESETS[name], window=window
    )
    found = found[0, 0].argmax(0).numpy()
    for label in range(1, num_labels):
        same = ((found == label) & (wanted == label)).sum() / ((found == label) | (wanted == label)).sum()
        before = ((labels == label) & (wanted == label)).sum() / ((labels == label) | (wanted == label)).sum()
        assert same >= least > before
    gained = [((part == 1) & body).sum() / ((part == 1) | body).sum() for part in (labels, found)]
    assert gained[1] > gained[0] + 0.05


def test_chunks_and_candidates_change_nothing(monkeypatch):
    images = torch.stack([picture(ONE), picture(RIGHT)])
    labels = torch.stack([torch.stack([ONE, RIGHT, ONE | RIGHT])] * 2).long()
    together = crf(labels, 2, images, PRESETS["threshold"], window=5)
    calls = []
    step = module.mean_field
    monkeypatch.setattr(module, "mean_field", lambda q, *rest, **kw: calls.append(q.nbytes) or step(q, *rest, **kw))
    monkeypatch.setattr(module, "MEMORY", 2 * 5 * 2 * labels[0, 0].numel() * 4)
    chunked = crf(labels, 2, images, PRESETS["threshold"], window=5)
    assert torch.equal(together, chunked)
    assert len(calls) == 3 * module.STEPS and max(calls) * 5 <= module.MEMORY
    assert torch.allclose(together.sum(2), torch.ones(2, 3, 96, 96), atol=1e-5)
    assert iou(together[1, 1, 1] > 0.5, RIGHT) > 0.98
