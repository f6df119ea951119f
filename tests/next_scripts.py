"""Stand-ins for the next two scripts of the paper's program: they read what those read, in the way they read it.

Written from their behaviour: names listed from the image folder, the class out of the file name, the .npy a pickled
dictionary of 20 arrays at 512x512, the image at that size beside it. A box filter stands for the dense CRF.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIDE = 512
CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
# low, high, d_la, d_ha
SEED_RANGES = {
    "person": (0.48, 0.55, 0.06, 0.06),
    "sofa": (0.48, 0.58, -0.01, 0.07),
    "aeroplane": (0.48, 0.53, -0.02, 0.05),
    "boat": (0.48, 0.53, -0.02, 0.05),
    "diningtable": (0.55, 0.64, -0.04, 0.04),
}


def read(cam_dir, infer_list, name):
    """Return class index, image and the 21 channels of which the first is still empty."""
    stem = name.split(".")[0]
    index = CLASSES.index(name.split("_")[1])
    image = np.array(Image.open(os.path.join(infer_list, name)))
    cams = np.load(os.path.join(cam_dir, stem + ".npy"), allow_pickle=True).item()
    channels = np.zeros((21, SIDE, SIDE), np.float32)
    for key in cams:
        channels[key + 1] = cams[key]
    return stem, index, image, channels


def smoothed(labels, image, certainty):
    """Stand for the CRF: hard labels [512, 512] become probabilities [21, 512, 512]."""
    assert image.shape == (*labels.shape, 3) and image.dtype == np.uint8
    probs = np.full((21, *labels.shape), (1 - certainty) / 20, np.float32)
    np.put_along_axis(probs, labels[None], certainty, 0)
    return F.avg_pool2d(torch.from_numpy(probs)[None], 7, 1, 3, count_include_pad=False)[0].numpy()


def fraction(channel, above):
    return (channel > above).sum() / SIDE**2


def prepare_aff_data(cam_dir, infer_list, out_crf):
    """Cut confident object ("la") and confident background ("ha") of each image, for AffinityNet."""
    for name in os.listdir(infer_list):
        stem, index, image, channels = read(cam_dir, infer_list, name)
        a = channels[index + 1]
        low, high, d_la, d_ha = SEED_RANGES.get(CLASSES[index], (0.45, 0.53, -0.04, 0.02))
        edges = np.arange(low, high, 0.01)
        t = edges[np.argmax([((a >= edge) & (a < edge + 0.01)).sum() for edge in edges])]
        share = 0.01 if CLASSES[index] == "person" else 0.06
        upper, lower = a[a > t].mean(), a[a < t].mean()
        while fraction(a, upper) < share and t >= 0.30:
            t -= 0.03
            upper = a[a > t].mean()
        while (a < lower).sum() < share * SIDE**2 and t <= 0.75:
            lower = a[a < t].mean()
            t += 0.03
        for suffix, background in (("la", upper + d_la), ("ha", lower + d_ha)):
            channels[0] = background
            os.makedirs(f"{out_crf}_{suffix}", exist_ok=True)
            np.save(os.path.join(f"{out_crf}_{suffix}", stem + ".npy"), smoothed(channels.argmax(0), image, 0.7))


def curve_threshold(cam_dir, infer_list, refine_gt, out):
    """Choose for each image the threshold whose mask agrees best with AffinityNet's; write masks of class id + 1."""
    os.makedirs(out, exist_ok=True)
    for name in os.listdir(infer_list):
        stem, index, image, channels = read(cam_dir, infer_list, name)
        if os.path.exists(os.path.join(out, stem + ".png")):
            continue
        wanted = np.array(Image.open(os.path.join(refine_gt, stem + ".png"))) == index + 1
        best, mask = 0.0, np.zeros((SIDE, SIDE), bool)
        for threshold in np.arange(0.35, 0.545, 0.01):
            channels[0] = threshold
            found = smoothed(channels.argmax(0), image, 0.5)[index + 1] > 0.25
            score = (found & wanted).sum() / max(found.sum() + wanted.sum(), 1)
            if score > best:
                best, mask = score, found
        Image.fromarray((mask * (index + 1)).astype(np.uint8)).save(os.path.join(out, stem + ".png"))
