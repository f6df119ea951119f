"""A run as a value: what every shard of it is a function of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffumask_fast.attention.families import denoising_model
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns
from diffumask_fast.dataset.writer import MOST_BYTES
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.options import NUM, GenerateOptions
from diffumask_fast.generation.quota import first_round
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.arguments import check_draws_from_prompts, suited
from diffumask_fast.models.device import DTYPES
from diffumask_fast.models.loading import check_size
from diffumask_fast.models.lora import Lora, lora_record
from diffumask_fast.models.scheduler import scheduler_name, set_scheduler, try_scheduler
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import Plan, Recipe
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffumask_fast.generation.cluster import Cluster


@dataclass(frozen=True)
class Job:
    """A run with everything resolved: any process that opens its pipeline can draw any of its shards.

    Args:
        model: folder or hub id, as `DiffuMaskPipeline.from_pretrained` takes it; the next six as well.
        revision: of a hub id.
        scheduler: the class of diffusers, and the spacing of its timesteps where that was asked for.
        dtype: of the UNet: "fp32", "fp16" or "bf16".
        engine: what denoises.
        engine_path: folder of an exported engine.
        attention: what draws attention where no maps are wanted.
        identity: the name under which the dataset records the model.
        weights: hash of the model's weights, None where there is none.
        engine_sha256: hash of an exported engine, None without one.
        recipe: of the plan.
        batch_size: images of a batch.
        steps: of denoising.
        guidance_scale: of the drawing.
        height: in pixels.
        width: in pixels.
        maps: how maps are made.
        mask: how masks are made of maps.
        shard_size: rows of a shard, the last one excepted; batches do not reach from shard to shard.
        accept_per_class: accepted images of each class, until which the recipe grows by rounds; None where it does not.
        loras: files that are fused into the model's weights.
    """

    model: str
    revision: str | None
    scheduler: str
    dtype: str
    engine: str
    engine_path: str | None
    attention: str
    identity: str
    weights: str | None
    engine_sha256: str | None
    recipe: Recipe
    batch_size: int
    steps: int
    guidance_scale: float
    height: int
    width: int
    maps: MapOptions
    mask: MaskOptions
    shard_size: int
    accept_per_class: int | None = None
    loras: tuple[Lora, ...] = ()

    @property
    def lora(self) -> tuple[str, ...]:
        """The files and their scales, as `DiffuMaskPipeline.from_pretrained` takes them."""
        return tuple(f"{lora.path}:{lora.scale!r}" for lora in self.loras)

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return -(-self.recipe.num // self.shard_size)

    @property
    def options(self) -> dict[str, Any]:
        """What decides the data beside the model, named as the flags are: the `options` of `dataset.json`."""
        engine = {"engine_sha256": self.engine_sha256} if self.engine_sha256 else {}
        retrieved = self.recipe.retrieved.options if self.recipe.retrieved else {}
        quota = {"accept_per_class": self.accept_per_class} if self.accept_per_class else {"num": self.recipe.num}
        return {
            "revision": self.revision, "classes": ",".join(self.recipe.vocabulary.names),
            **retrieved, "classes_per_image": self.recipe.classes_per_image, **quota, "seed": self.recipe.seed,
            "batch_size": self.batch_size, "steps": self.steps, "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler, "size": f"{self.height}x{self.width}",
            "dtype": str(DTYPES[self.dtype]).removeprefix("torch."), "engine": self.engine, **engine,
            "attention": self.attention, **lora_record(self.loras), **vars(self.maps), **vars(self.mask),
        }  # fmt: skip

    @property
    def rounds(self) -> list[dict[str, int]]:
        """How many images of each class each round has; none where the number of images is fixed."""
        names = self.recipe.vocabulary.names
        return [{name: num for name, num in zip(names, counts, strict=True) if num} for counts in self.recipe.rounds]

    def with_rounds(self, rounds: Sequence[Sequence[int]]) -> Job:
        """Return the job with these rounds, each with a number for every class."""
        return replace(self, recipe=replace(self.recipe, num=sum(map(sum, rounds)), rounds=tuple(map(tuple, rounds))))

    def resumed(self, plan: Mapping[str, Any]) -> Job:
        """Return the job with the rounds that the plan of a `dataset.json` with the same classes has."""
        names = self.recipe.vocabulary.names
        rounds = [[part["classes"].get(name, 0) for name in names] for part in plan.get("rounds", [])]
        return self.with_rounds(rounds) if rounds else self

    def plan(self, pipe: DiffuMaskPipeline | Cluster) -> Plan:
        """Return the requests, each made when it is asked for; the pipeline's tokenizer says which captions fit."""
        tokenizer = pipe.tokenizer

        def fits(prompt: str, phrases: tuple[str, ...]) -> bool:
            try:
                phrase_columns(tokenizer, [prompt], [list(phrases)], length=tokenizer.model_max_length)
            except PhraseNotFound as error:
                if error.unknown:
                    raise DiffuMaskError(
                        f"the model's tokenizer has no tokens for {error.phrase!r}: name the class by other words"
                    ) from error
                return False
            return True

        return Plan(self.recipe, fits)

    def num_rows(self, index: int) -> int:
        """Return the number of rows of a shard."""
        return min(self.shard_size, self.recipe.num - index * self.shard_size)

    def batches(self, plan: Sequence[Request], index: int) -> Iterator[Sequence[Request]]:
        """Yield the batches of a shard."""
        first = index * self.shard_size
        last = first + self.num_rows(index)
        for start in range(first, last, self.batch_size):
            yield plan[start : min(start + self.batch_size, last)]

    def open(self, device: str = "auto") -> DiffuMaskPipeline:
        """Load the pipeline that draws the job.

        Raises:
            DiffuMaskError: it cannot be loaded, or its weights are not those of the job.
        """
        pipe = open_pipe(self, device)
        if pipe.weights != self.weights:
            raise DiffuMaskError(f"the weights of {self.model} are not those that the job was made with")
        if changed := self.changed_lora(pipe):
            raise DiffuMaskError(f"the LoRA {changed} is not the file that the job was made with: give that one")
        return pipe

    def changed_lora(self, pipe: DiffuMaskPipeline) -> str | None:
        """Return the name of a LoRA that is another file in a pipeline than in the job; None where all are the same."""
        pairs = zip(self.loras, pipe.info.loras, strict=True)
        return next((one.name for one, now in pairs if one.sha256 != now.sha256), None)

    def as_json(self) -> dict[str, Any]:
        """Return the job as JSON types."""
        return {**asdict(self), "recipe": self.recipe.as_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Job:
        """Return the job that `as_json` wrote."""
        parts = {
            "recipe": Recipe.from_json(values["recipe"]),
            "maps": MapOptions(**values["maps"]),
            "mask": MaskOptions(**values["mask"]),
            "loras": tuple(Lora(**lora) for lora in values["loras"]),
        }
        return cls(**{**values, **parts})


def open_pipe(options: GenerateOptions | Job, device: str) -> DiffuMaskPipeline:
    """Load the pipeline that options or a job name.

    Raises:
        DiffuMaskError: no such model, device, engine, dtype, attention or scheduler.
    """
    pipe = DiffuMaskPipeline.from_pretrained(
        options.model, engine=options.engine, engine_path=options.engine_path, dtype=options.dtype, device=device,
        revision=options.revision, attention=options.attention, lora=options.lora,
        model_options=options.model_options if isinstance(options, GenerateOptions) else None,
    )  # fmt: skip
    if options.scheduler not in (None, type(pipe.pipe.scheduler).__name__):
        set_scheduler(pipe.pipe, options.scheduler)
    pipe.info = suited(pipe.info, pipe.pipe)
    return pipe


def taken_for(options: GenerateOptions, job: Job, info: Any) -> str:
    """Say which steps and guidance a job takes that the options leave open, why, and what speaks against them.

    Args:
        options: the flags.
        job: made of them.
        info: of the model, with its `origin` and `doubt`.
    """
    left = [f"{name} {getattr(job, name)}" for name in ("steps", "guidance_scale") if getattr(options, name) is None]
    but = f"; but {info.doubt}: if it is one, give it its own" if info.doubt else ""
    return f"{' and '.join(left)}, as {info.origin}{but}" if left else ""


def _check_shards(rows: int, height: int, width: int, num_maps: int) -> None:
    """Raise where a shard may become too large to be read back: image and mask in pixels, and maps of latent size."""
    most = MOST_BYTES // (height * width * (4 + num_maps / 64))
    if most < 1:
        raise DiffuMaskError(f"an image of `size={height}x{width}` fits no shard: give a smaller one")
    if rows > most:
        raise DiffuMaskError(
            f"a shard of {rows} images of {height}x{width} may be larger than {MOST_BYTES} bytes: give a `shard_size` "
            f"up to {most:.0f}"
        )


def _map_options(options: GenerateOptions, pipe: DiffuMaskPipeline, steps: int) -> MapOptions:
    """Return how maps are made; the scheduler is tried, which tells how many calls of the denoiser there are.

    Raises:
        DiffuMaskError: it does not work, or there are fewer calls than the propagations that are asked for need.
    """
    calls, asked = try_scheduler(pipe.pipe, steps), options.maps.propagate
    maps = pipe.map_options(options.maps, steps).within(calls)
    if asked not in ("auto", maps.propagate):
        raise DiffuMaskError(
            f"`propagate={asked}` takes more steps than {steps}, for a map is propagated in the steps after it: give "
            f"`propagate={maps.propagate}`, or more `steps`"
        )
    return maps


def make_job(options: GenerateOptions, pipe: DiffuMaskPipeline) -> Job:
    """Return the job that options ask for: what they leave open is the model's own.

    Raises:
        DiffuMaskError: a model that wants pictures, classes or a size that it cannot draw, or that its engine was not
            exported for.
    """
    check_draws_from_prompts(pipe.pipe)
    known = Vocabulary.named(pipe.info.classes) if pipe.info.classes else None
    vocabulary = Vocabulary.parse(options.classes, known, options.model, options.prompts.sub_classes)
    asked = options.size or (None, None)
    check_size(pipe.pipe, *asked)
    height, width = pipe.size(*asked)
    steps = options.steps or pipe.info.num_inference_steps
    batch_size, maps = pipe.batch_size(options.batch_size, height, width), _map_options(options, pipe, steps)
    if pipe.engine is not None:
        pipe.engine.limits.check(batch_size, height, width, options.classes_per_image, maps.propagate)
    num, quota, shard_size = options.num or NUM, options.accept_per_class, options.shard_size
    rounds: tuple[tuple[int, ...], ...] = ()
    if quota:  # a round is a whole number of shards: those of a small quota are small
        shard_size = min(shard_size, sum(first_round(len(vocabulary), quota, shard_size=1)))
        rounds = (first_round(len(vocabulary), quota, shard_size),)
        num = sum(rounds[0])
    _check_shards(min(shard_size, num), height, width, options.classes_per_image)
    folder = Path(options.model).expanduser()
    return Job(
        model=str(folder.resolve()) if options.model != "mini" and folder.is_dir() else options.model,
        revision=options.revision,
        scheduler=scheduler_name(pipe.pipe, options.scheduler),
        dtype=next(name for name, dtype in DTYPES.items() if dtype == denoising_model(pipe.pipe).dtype),
        engine=options.engine,
        engine_path=str(Path(options.engine_path).expanduser().resolve()) if options.engine_path else None,
        attention=options.attention,
        identity=pipe.info.identity,
        weights=pipe.weights,
        engine_sha256=pipe.engine.sha256 if pipe.engine else None,
        recipe=Recipe(vocabulary, num, options.seed, options.classes_per_image, scenes=pipe.info.scenes, rounds=rounds),
        batch_size=batch_size,
        steps=steps,
        guidance_scale=pipe.info.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        height=height,
        width=width,
        maps=maps,
        mask=pipe.info.mask_options(options.mask, steps),
        shard_size=shard_size,
        accept_per_class=quota,
        loras=pipe.info.loras,
    )
