import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.find import find_model
from diffumask_fast.models.loading import load_pipe
from diffumask_fast.models.scheduler import scheduler_name, set_scheduler, try_scheduler


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


def test_the_scheduler_that_suits_a_model_best_is_its_own(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    known = {"classes": [], "scenes": {}, "num_inference_steps": 9, "guidance_scale": 3}
    for name, used in ((None, "DDIMScheduler"), ("EulerDiscreteScheduler", "EulerDiscreteScheduler")):
        (folder / "diffumask.json").write_text(json.dumps(known | ({"scheduler": name} if name else {})))
        pipe = load_pipe(find_model(folder), torch.float32, torch.device("cpu"))
        assert type(pipe.scheduler).__name__ == used
    (folder / "diffumask.json").write_text(json.dumps(known | {"scheduler": "nonsense"}))
    with pytest.raises(DiffuMaskError, match="model/diffumask.json: There is no scheduler nonsense"):
        load_pipe(find_model(folder), torch.float32, torch.device("cpu"))


def test_a_scheduler_does_not_clip_latents():
    pipe = load_pipe(find_model("mini"), torch.float32, torch.device("cpu"))
    assert "clip_sample" not in pipe.scheduler.config
    set_scheduler(pipe, "ddim")
    assert not pipe.scheduler.config.clip_sample


def test_the_schedulers_of_few_step_models_are_known_by_name(pipe):
    for name, used in (("lcm", "LCMScheduler"), ("tcd", "TCDScheduler"), ("TCDScheduler", "TCDScheduler")):
        set_scheduler(pipe, name)
        assert type(pipe.scheduler).__name__ == scheduler_name(pipe, name) == used
        assert try_scheduler(pipe, 1) == 1 and try_scheduler(pipe, 4) == 4


def test_a_default_of_the_old_scheduler_does_not_clip_latents(pipe):
    pipe.scheduler = LCMScheduler()
    set_scheduler(pipe, "tcd")
    assert not pipe.scheduler.config.clip_sample


@pytest.mark.parametrize("name", ["euler-trailing", "EulerDiscreteScheduler-trailing", "ddim-trailing"])
def test_trailing_timesteps_begin_with_the_noisiest(pipe, name):
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0] == 751
    set_scheduler(pipe, name)
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    known = scheduler_name(pipe, name)
    assert known in ("EulerDiscreteScheduler-trailing", "DDIMScheduler-trailing")
    set_scheduler(pipe, known)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert scheduler_name(pipe, None) == scheduler_name(pipe, "euler") == type(pipe.scheduler).__name__


def test_trailing_timesteps_that_a_scheduler_cannot_have_are_refused(pipe):
    with pytest.raises(DiffuMaskError, match="scheduler dpmsolversinglestep spaces .* one way: leave out -trailing"):
        set_scheduler(pipe, "dpmsolversinglestep-trailing")
    for name in ("lcm", "tcd"):
        with pytest.raises(DiffuMaskError, match=f"scheduler {name} spaces its timesteps in one way"):
            set_scheduler(pipe, f"{name}-trailing")
    with pytest.raises(DiffuMaskError, match="There is no scheduler nonsense-trailing for .*, lcm, .*tcd"):
        set_scheduler(pipe, "nonsense-trailing")


@pytest.mark.parametrize(("name", "steps", "calls"), [("ddim", 3, 3), ("heun", 1, 1), ("heun", 2, 3)])
def test_calls_of_the_denoiser_are_counted(pipe, name, steps, calls):
    set_scheduler(pipe, name)
    assert try_scheduler(pipe, steps) == calls


@pytest.fixture
def pipe(tiny_folder):
    return load_pipe(find_model(tiny_folder), torch.float32, torch.device("cpu"))


def test_a_scheduler_of_another_noise_schedule_is_refused(pipe):
    with pytest.raises(DiffuMaskError, match="no scheduler edmeuler for this model: use one of ddim, ddpm"):
        set_scheduler(pipe, "edmeuler")


@pytest.mark.skipif(find_spec("torchsde") is not None, reason="torchsde is installed")
def test_a_scheduler_whose_library_is_absent_names_it(pipe):
    with pytest.raises(DiffuMaskError, match="no scheduler dpmsolversde for this model without torchsde: use one of"):
        set_scheduler(pipe, "dpmsolversde")


def test_every_scheduler_that_is_named_works(pipe):
    with pytest.raises(DiffuMaskError) as error:
        set_scheduler(pipe, "nonsense")
    names = str(error.value).rpartition("one of ")[2].rstrip(".").split(", ")
    assert len(names) >= 10
    for name in names:
        set_scheduler(pipe, name)
        try_scheduler(pipe, 10)


def test_too_few_steps_are_refused(pipe):
    set_scheduler(pipe, "pndm")
    try_scheduler(pipe, 4)
    with pytest.raises(DiffuMaskError, match="scheduler pndm cannot draw in 3 steps .*: use other steps or another"):
        try_scheduler(pipe, 3)


def test_noise_that_is_not_of_the_seed_is_refused(pipe):
    class Careless(EulerAncestralDiscreteScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            return super().step(model_output, timestep, sample, None, return_dict)

    class Shared(EulerAncestralDiscreteScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            return super().step(model_output, timestep, sample, generator[0], return_dict)

    before = torch.get_rng_state()
    for kind in (Careless, Shared):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        with pytest.raises(DiffuMaskError, match="noise that does not come from an image's seed"):
            try_scheduler(pipe, 5)
    assert torch.equal(torch.get_rng_state(), before)
