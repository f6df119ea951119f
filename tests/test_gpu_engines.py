"""Each engine outside torch on a GPU, one short test: mini is exported, runs, and gives what torch gives."""

import pytest
import torch
from torch.utils._pytree import tree_map

from diffumask_fast import DiffuMaskPipeline, doctor
from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.export.check import TOLERANCE, random_inputs, relative_error
from diffumask_fast.export.export_model import export_model
from diffumask_fast.export.options import ExportOptions, ShapeOptions

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = {"onnx": "fp32", "tensorrt": "fp16", "tensorrt-rtx": "fp16"}


@torch.no_grad()
@pytest.mark.parametrize("engine", DTYPES)
def test_an_engine_gives_what_torch_gives(engine, tmp_path):
    found = doctor.examine()["works"]
    for needed in (f"export to {engine}", f"{engine} engine"):
        if found[needed] != "works":
            pytest.skip(f"{needed} {found[needed]}")
    export_model(ExportOptions("mini", tmp_path / "engine", engine, shapes=ShapeOptions(max_batch=2)))
    name, dtype = engine.partition("-")[0], DTYPES[engine]
    pipe = DiffuMaskPipeline.from_pretrained("mini", engine=name, engine_path=tmp_path / "engine", device=DEVICE)
    denoiser, limits = pipe.pipe.unet.denoiser, pipe.engine.limits
    model = UNetWithMaps(DiffuMaskPipeline.from_pretrained("mini", device=DEVICE, dtype="fp32").pipe.unet)
    for seed in range(2):  # the second call replays the graph
        torch.manual_seed(seed)
        call = random_inputs(model.unet, limits, 4, 2, (128, 128))
        call = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, call)
        pairs = zip(*(torch.utils._pytree.tree_leaves(run(UNetCall(**call))) for run in (denoiser, model)), strict=True)
        assert all(relative_error(value, truth) <= TOLERANCE[dtype] for value, truth in pairs)
    dogs = []
    for other in (pipe, DiffuMaskPipeline.from_pretrained("mini", device=DEVICE, dtype=dtype)):
        out = other(["a photo of a dog on the grass"], [["dog"]], seeds=[1], num_inference_steps=4)
        dogs.append(torch.from_numpy(out.masks) == 12)
    both, either = (dogs[0] & dogs[1]).sum(), (dogs[0] | dogs[1]).sum()
    assert both > 0 and both / either >= 0.95
