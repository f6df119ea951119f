"""DiffuMaskPipeline: a diffusers pipeline whose images come with masks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffumask_fast.attention.call import Denoiser
from diffumask_fast.attention.choice import check_attention, set_attention
from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.families import check_runs, denoising_model, family_of
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.engines.compiled import CompiledEngine, compile_pipe
from diffumask_fast.engines.worker import IN_FLIGHT, StreamWorker, Turn
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import make_masks, quantise_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.arguments import SCHEDULES, check_arguments, steps_and_guidance
from diffumask_fast.models.decoding import decode, decodes_later, finished, timed_decoding
from diffumask_fast.models.device import fitting_batch, resolve_device, resolve_dtype
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline
from diffumask_fast.models.find import ModelInfo, find_model, with_options
from diffumask_fast.models.generators import Generators, generators_of
from diffumask_fast.models.loading import check_size, check_whole, load_pipe, says_force_upcast, without_bars
from diffumask_fast.models.lora import find_loras, lora_texts
from diffumask_fast.models.scheduler import try_scheduler
from diffumask_fast.options import checked, whole
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import names_of, phrases_and_ids
from diffumask_fast.results import Denoised, Drawn, Output, Provenance, Result, Seconds

TAKEN = {"prompt", "negative_prompt", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt"}


class DiffuMaskPipeline:
    """Compose a diffusers pipeline; draw with it, and make a mask of each word of interest on the way.

    Args:
        pipe: any diffusers pipeline whose denoiser is a `UNet2DConditionModel`, or SD3's or FLUX's transformer.
        info: what its model folder says; the general defaults when None.
        engine: the export.load.Engine that runs it in torch's place.
        compiled: what `compile_pipe` made of it.

    Example:
        >>> pipe = DiffuMaskPipeline.from_pretrained("mini", device="cpu")
        >>> out = pipe(["a photo of a dog on the grass"], classes=[["dog"]], seeds=[7], num_inference_steps=2)
        >>> out.images[0].size, out.masks.shape
        ((128, 128), (1, 128, 128))
    """

    def __init__(
        self,
        pipe: DiffusersPipeline,
        info: ModelInfo | None = None,
        engine: Any = None,
        compiled: CompiledEngine | None = None,
    ) -> None:
        self.pipe = pipe
        self.info = info or ModelInfo(type(pipe).__name__)
        self.engine = engine
        self.compiled = compiled
        self.seconds = Seconds()
        self._drawing, self._decoding = Turn(), Turn()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "mini",
        *,
        engine: str = "torch",
        engine_path: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        attention: str = "sdpa",
        model_options: str | Path | None = None,
        lora: str | Path | Sequence[str | Path] = (),
    ) -> DiffuMaskPipeline:
        """Load the embedded model ("mini"), a diffusers folder or a hub id; safetensors only.

        Args:
            model: what to load.
            engine: "torch"; "compile" for torch.compile and CUDA graphs; "onnx" for ONNX Runtime; or "tensorrt".
            engine_path: folder that `diffumask-fast export` wrote, for the last two.
            dtype: "fp32", "fp16", "bf16" or a torch dtype; None is fp32 on the CPU and fp16 on CUDA, or the engine's.
            device: None is CUDA where there is one.
            revision: of a hub id.
            attention: what draws where no maps are wanted: "sdpa", or with engine "torch" on CUDA "xformers".
            model_options: file that `diffumask-fast calibrate` wrote, in place of the model folder's own options.
            lora: safetensors files, folders or hub ids, "PATH_OR_HUB:SCALE"; they are fused into the weights.

        Raises:
            DiffuMaskError: no such model, half-written or pickled weights, no such device, engine, dtype, attention,
                file of options or LoRA.
        """
        if attention != "sdpa":
            check_attention(attention, engine, resolve_device(device))
        texts = checked("lora", lora, lora_texts)
        if engine not in ("torch", "compile"):
            from diffumask_fast.export.load import load_engine

            pipe, info, loaded = load_engine(model, engine, engine_path, dtype, device, revision, texts)
            return cls(pipe, with_options(info, model_options, loaded.weights), loaded)
        if engine_path is not None:
            raise DiffuMaskError(f"`engine={engine}` takes no `engine_path`: leave it out, or say `engine=onnx`.")
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        info = replace(with_options(find_model(model, revision), model_options), loras=find_loras(texts))
        pipe = load_pipe(info, dtype, device)
        if dtype == torch.float16 and says_force_upcast(info.local_folder):
            pipe.vae.to(torch.float32)
        check_runs(pipe, engine, attention)
        set_attention(denoising_model(pipe), attention)
        return cls(pipe, info, compiled=compile_pipe(pipe) if engine == "compile" else None)

    @classmethod
    def from_pipe(cls, pipe: DiffusersPipeline) -> DiffuMaskPipeline:
        """Compose a pipeline that is already loaded; it is used as it is and stays usable by itself.

        Raises:
            DiffuMaskError: its denoiser is of a kind that gives no maps.
        """
        family_of(pipe)
        return cls(pipe)

    def to(self, *args: Any, **kwargs: Any) -> DiffuMaskPipeline:
        """Move the pipeline, as diffusers' `to`."""
        self.pipe.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the composed pipeline as a diffusers folder of safetensors."""
        self.pipe.save_pretrained(folder, safe_serialization=True, **kwargs)

    @property
    def weights(self) -> str | None:
        """SHA-256 of the model folder's weights and configuration; None for a pipeline composed in Python."""
        return (self.engine or self.info).weights

    @property
    def engine_name(self) -> str:
        """What denoises: "torch", "compile", or the engine's name."""
        if self.engine is not None:
            return self.engine.name
        return "torch" if self.compiled is None else "compile"

    @property
    def denoiser(self) -> Denoiser | None:
        """What runs the UNet's calls with maps; None is the UNet itself. `collect_maps` takes it."""
        return None if self.compiled is None else self.compiled.denoiser

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return denoising_model(self.pipe).device

    @property
    def tokenizer(self) -> Any:
        """The tokenizer among whose tokens a phrase must be."""
        return getattr(self.pipe, family_of(self.pipe).tokenizer) or getattr(self.pipe, "tokenizer_2", None)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        classes: Sequence[Sequence[str]] | Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators = None,
        mask: MaskOptions | None = None,
        *,
        maps: MapOptions | None = None,
        token_indices: Sequence[Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Output | tuple[Any, np.ndarray, list[list[float]]]:
        """Draw images and make a mask of each class word.

        Args:
            prompt: one or B prompts.
            classes: a list of class names for each prompt, or one list for all; None finds VOC's phrases in the
                prompts. A name's phrase must occur in its prompt.
            seeds: one seed per image, for images that depend on nothing else in the batch.
            generator: as in diffusers; not together with seeds.
            mask: how masks are made of maps; None is what suits the model.
            maps: how maps are made; "auto" is what suits the model.
            token_indices: token positions of each class of each prompt, 0 the start token; needed with prompt_embeds.
            output_type: "pil", "np" or "pt".
            return_dict: False gives the tuple (images, masks, quality).
            kwargs: what the diffusers pipeline takes; its model's best steps and guidance are the defaults.

        Raises:
            DiffuMaskError: seeds together with a generator, a class that is not in its prompt or past its last
                token, a size that is no multiple of 8, an output type without an image.
        """
        if output_type not in ("pil", "np", "pt"):
            raise DiffuMaskError(f"There is no mask for output_type {output_type}: use pil, np or pt, or collect_maps.")
        check_arguments(self.pipe, kwargs)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts and kwargs.get("prompt_embeds") is None:
            raise DiffuMaskError("There is nothing to draw: give at least one prompt.")
        if classes is None and not prompts:
            raise DiffuMaskError("With prompt_embeds the words are unknown: say classes= and token_indices=.")
        names = names_of(prompts, classes, len(prompts) or kwargs["prompt_embeds"].shape[0])
        if prompts and isinstance(kwargs.get("negative_prompt"), str):
            kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
        repeat = kwargs.get("num_images_per_prompt") or 1
        generator = generators_of(seeds, generator, len(names) * repeat)
        call = steps_and_guidance(self.pipe, self.info.defaults | kwargs)
        steps = call["num_inference_steps"]
        maps, mask = self.map_options(maps, steps), self.info.mask_options(mask, steps)
        phrases, ids = phrases_and_ids(names, prompts)
        denoised = self._denoise(
            prompts or None, phrases, ids, maps, repeat=repeat, generator=generator, token_indices=token_indices,
            **kwargs,
        )  # fmt: skip
        drawn = self._finish(denoised, mask)
        images = self.pipe.image_processor.pt_to_numpy(drawn.pixels) if output_type != "pt" else drawn.pixels
        if output_type == "pil":
            images = [Image.fromarray(image) for image in drawn.images.cpu().numpy()]
        masks = drawn.mask.cpu().numpy()
        if not return_dict:
            return images, masks, drawn.qualities()
        class_ids = [tuple(i for i in row if i) for row in drawn.ids.tolist()]
        provenance = Provenance.of(
            self, maps.within(denoised.store.calls), mask,
            seeds=[int(seed) for seed in seeds] if seeds is not None else None,
            unet_calls=denoised.store.calls,
            planned_unet_calls=denoised.store.num_calls,
            **call,
        )  # fmt: skip
        class_maps = drawn.class_maps.cpu().numpy()
        return Output(images, masks, drawn.qualities(), denoised.store.levels, class_maps, class_ids, provenance)

    def stream(
        self,
        requests: Sequence[Request],
        batch_size: int | str = "auto",
        mask: MaskOptions | None = None,
        *,
        maps: MapOptions | None = None,
        **kwargs: Any,
    ) -> Generator[Result]:
        """Draw requests in order, batch by batch, and yield one Result each; closes cleanly when left early.

        Args:
            requests: what to draw.
            batch_size: images per batch, or "auto".
            mask: how masks are made of maps; None is what suits the model.
            maps: how maps are made; "auto" is what suits the model.
            kwargs: as for a call, without prompt, classes and seeds.

        Raises:
            DiffuMaskError: as for a call.
        """
        requests = list(requests)
        size = self.batch_size(batch_size, kwargs.get("height"), kwargs.get("width"))
        results = self.stream_batches(
            (requests[start : start + size] for start in range(0, len(requests), size)), mask, maps=maps,
            num_phrases=max((len(request.phrases) for request in requests), default=1),
            use_negative_prompts=any(request.negative_prompt for request in requests), **kwargs,
        )  # fmt: skip
        if not any(kwargs.get(name) is not None for name in SCHEDULES):
            try_scheduler(self.pipe, steps_and_guidance(self.pipe, self.info.defaults | kwargs)["num_inference_steps"])
        return results

    def stream_batches(
        self,
        batches: Iterable[Sequence[Request]],
        mask: MaskOptions | None = None,
        *,
        maps: MapOptions | None = None,
        num_phrases: int,
        use_negative_prompts: bool,
        **kwargs: Any,
    ) -> Generator[Result]:
        """Draw batches as they are handed in, as `stream`: each is finished beside the denoising of the next.

        Args:
            batches: what to draw; a batch is asked for when the one before it is denoised.
            mask, maps, kwargs: as there.
            num_phrases: the most phrases of a request; all batches are padded to it, so that shapes do not change.
            use_negative_prompts: whether those of the requests are passed on; else the pipeline's own default holds.

        Raises:
            DiffuMaskError: as for a call.
        """
        if taken := kwargs.keys() & TAKEN:
            raise DiffuMaskError(f"stream takes {', '.join(sorted(taken))} from its requests: leave it out.")
        check_arguments(self.pipe, kwargs)
        steps = steps_and_guidance(self.pipe, self.info.defaults | kwargs)["num_inference_steps"]
        options = self.map_options(maps, steps), self.info.mask_options(mask, steps)
        return self._draw_batches(batches, *options, num_phrases, use_negative_prompts, kwargs)

    def _draw_batches(
        self, batches: Iterable[Sequence[Request]], maps: MapOptions, mask: MaskOptions, num_phrases: int,
        use_negative_prompts: bool, kwargs: dict[str, Any],
    ) -> Generator[Result]:  # fmt: skip
        waiting: deque[Future] = deque()
        with StreamWorker(self.device) as worker:
            for batch in batches:
                negative: dict[str, Any] = {}
                if use_negative_prompts:
                    negative["negative_prompt"] = [request.negative_prompt for request in batch]
                with self._drawing, without_bars(self.pipe):
                    denoised = self._denoise(
                        [request.prompt for request in batch], [request.phrases for request in batch],
                        [request.class_ids for request in batch], maps, num_phrases=num_phrases,
                        generator=generators_of([request.seed for request in batch], None, len(batch)),
                        **kwargs, **negative,
                    )  # fmt: skip
                waiting.append(worker.submit(partial(self._results, batch, denoised, mask)))
                while waiting and (len(waiting) == IN_FLIGHT or waiting[0].done()):
                    yield from waiting.popleft().result()
            for future in waiting:
                yield from future.result()

    def _denoise(
        self,
        prompts: list[str] | None,
        phrases: Sequence[Sequence[str]],
        ids: Sequence[Sequence[int]],
        maps: MapOptions,
        *,
        repeat: int = 1,
        num_phrases: int | None = None,
        token_indices: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Denoised:
        """The first half of the flow: the diffusers pipeline denoises while the store fills."""
        kwargs = self.info.defaults | kwargs
        check_size(self.pipe, kwargs.get("height"), kwargs.get("width"))
        check_whole(kwargs)
        width = num_phrases or max(map(len, ids))
        if self.engine is not None:
            size = self.size(kwargs.get("height"), kwargs.get("width"))
            self.engine.limits.check(len(ids), *size, width, maps.propagate)
        later = self.engine is None and decodes_later(self.pipe)
        start, before = time.perf_counter(), self.seconds.decode
        collecting = collect_maps(
            self.pipe, phrases, denoiser=self.denoiser, token_indices=token_indices, propagate=maps.propagate,
            aggregation=maps.aggregation, pad_to=width,
        )  # fmt: skip
        with self._drawing, torch.no_grad(), collecting, ExitStack() as borrowed:
            if not later:
                borrowed.enter_context(self._decoder())
                borrowed.enter_context(timed_decoding(self.pipe, self.seconds))
            kwargs |= {"prompt": prompts, "output_type": "latent" if later else "pt", "return_dict": False}
            output = finished(self.pipe(**kwargs)[0], self.pipe)  # by name, for Kontext takes an image first
        in_call = 0 if later else self.seconds.decode - before
        self.seconds.denoise += time.perf_counter() - start - in_call
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        return Denoised(output, later, collecting.store, maps, padded.repeat_interleave(repeat, 0))

    def _decoder(self) -> AbstractContextManager[None]:
        return nullcontext() if self.compiled is None else self.compiled.decoding()

    @torch.no_grad()
    def _finish(self, denoised: Denoised, options: MaskOptions) -> Drawn:
        """The second half: decode, class maps, masks."""
        pixels = denoised.output
        if denoised.is_latent:
            with self._decoding, self._decoder():
                pixels = decode(self.pipe, denoised.output, self.seconds)
        start = time.perf_counter()
        finite = pixels.isfinite().flatten(1).all(1)
        images = (pixels.nan_to_num(0).permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
        class_maps = quantise_maps(denoised.store.class_maps(denoised.maps))
        mask, quality = make_masks(class_maps, images, options, denoised.ids)
        drawn = Drawn(pixels, images, finite.tolist(), mask, class_maps, quality, denoised.ids)
        self.seconds.masks += time.perf_counter() - start
        return drawn

    def _results(self, batch: Sequence[Request], denoised: Denoised, mask: MaskOptions) -> list[Result]:
        return self._finish(denoised, mask).results(batch, mask)

    def map_options(self, maps: MapOptions | None = None, steps: int | None = None) -> MapOptions:
        """Return the options with "auto" resolved to what was measured best for the model and so many steps."""
        return self.info.map_options(maps, steps)

    def batch_size(self, batch_size: int | str, height: int | None = None, width: int | None = None) -> int:
        """Return the batch size: as given, or for "auto" a function of model, size and the device's total memory."""
        asked = checked("batch_size", batch_size, whole(1, None, "auto"))
        if isinstance(asked, int):
            return asked
        most = self.engine.limits.batch if self.engine is not None else 64
        if self.device.type != "cuda":
            return min(8, most)
        pixels = math.prod(self.size(height, width))
        return min(most, fitting_batch(denoising_model(self.pipe), pixels, self.device))

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Return height and width, the model's own where they are None."""
        own = family_of(self.pipe).default_size(self.pipe)
        return height or own[0], width or own[1]
