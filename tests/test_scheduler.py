import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.find import find_model
from diffumask_fast.models.loading import load_pipe
from diffumask_fast.models.scheduler import set_scheduler


def test_schedulers_by_name(tiny_folder):
    pipe = load_pipe(find_model(tiny_folder), torch.float32, torch.device("cpu"))
    before = pipe.scheduler.config.beta_end
    set_scheduler(pipe, "euler")
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.scheduler.config.beta_end == before
    set_scheduler(pipe, "DDIMScheduler")
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    with pytest.raises(DiffuMaskError, match="no scheduler nonsense.*ddim"):
        set_scheduler(pipe, "nonsense")


def test_a_scheduler_does_not_clip_latents():
    pipe = load_pipe(find_model("mini"), torch.float32, torch.device("cpu"))
    assert "clip_sample" not in pipe.scheduler.config
    set_scheduler(pipe, "ddim")
    assert not pipe.scheduler.config.clip_sample
