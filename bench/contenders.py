"""The same prompts, noise and settings for all contenders; each method returns what is timed."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.options import MapOptions, Propagate
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.bench.baselines import DaamStore, PeerMaps, ReferenceStore, plain_attention, reference_mask
from diffumask_fast.bench.harness import Workload
from diffumask_fast.kernels.shapes import KEYS
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary

REFERENCE_MAPS = MapOptions(aggregation="reference", propagate="none")
REFERENCE_MASK = MaskOptions(threshold=0.45, refine="none")
REFERENCE_SIZE = 512


class Contenders:
    """One model, one set of prompts, latents and seeds.

    Args:
        pipe: the model; its plain diffusers pipeline is the lower bound, and what the baselines hook into.
        batch: images of our calls; the reference and DAAM take one image at a time and draw the first alone.
        steps: denoising steps.
    """

    def __init__(self, pipe: DiffuMaskPipeline, batch: int, steps: int) -> None:
        self.pipe = pipe
        self.batch = batch
        self.settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": pipe.info.guidance_scale}
        vocabulary = Vocabulary.named(pipe.info.classes) if pipe.info.classes else Vocabulary.voc()
        requests = plan(vocabulary, batch, scenes=pipe.info.scenes or None)
        self.prompts = [request.prompt for request in requests]
        self.phrases = [list(request.phrases) for request in requests]
        by_id = dict(zip(vocabulary.ids, vocabulary.names, strict=True))
        self.ids = torch.tensor([request.class_ids for request in requests])
        self.classes = [[by_id[id] for id in request.class_ids] for request in requests]
        self.seeds = [request.seed for request in requests]
        stock: Any = pipe.pipe
        unet = stock.unet
        shape = (batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(unet.device)
        tokenizer = getattr(stock, "tokenizer", None) or stock.tokenizer_2
        self.select = phrase_columns(tokenizer, self.prompts, self.phrases, length=KEYS)

    def plain(self, output_type: str = "latent") -> Workload:
        """Return a call that draws the whole batch by the plain diffusers pipeline."""
        return lambda: self._draw(slice(None), output_type)

    def plain_with(self, attention: str) -> Workload:
        """Return a call that does so with another attention, and sets it back."""

        def call() -> None:
            plain_attention(self.pipe.pipe, attention)
            try:
                self._draw(slice(None), "latent")
            finally:
                plain_attention(self.pipe.pipe, "sdpa")

        return call

    def mapped(self, propagate: Propagate) -> Workload:
        """Return a call that denoises with maps, and with propagation unless it is "none"."""

        def call() -> None:
            pipe, denoiser = self.pipe.pipe, self.pipe.denoiser
            with collect_maps(pipe, self.phrases, denoiser=denoiser, propagate=propagate) as maps:
                self._draw(slice(None), "latent")
            assert maps.levels

        return call

    def seeded(self, masked: bool) -> Workload:
        """Return a call that draws finished images from the seeds, by the plain pipeline or by ours with masks."""

        def plain() -> None:
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            self.pipe.pipe(self.prompts, generator=generators, **self.settings)

        def ours() -> None:
            self.pipe(self.prompts, classes=self.classes, seeds=self.seeds, **self.settings)

        return ours if masked else plain

    def ours(
        self, pipe: DiffuMaskPipeline | None = None, batch: int | None = None, *, like_reference: bool = True
    ) -> Callable[[], np.ndarray]:
        """Return a call that draws images by our pipeline, in its engine and precision, and gives the masks.

        Maps and masks are made as the reference makes them, or by the pipeline's defaults.
        """
        pipe, rows = pipe or self.pipe, slice(batch)
        options: dict[str, Any] = {"maps": REFERENCE_MAPS, "mask": REFERENCE_MASK} if like_reference else {}

        def call() -> np.ndarray:
            latents = self.latents[rows].to(pipe.pipe.unet.dtype)
            out: Any = pipe(self.prompts[rows], self.classes[rows], latents=latents, **options, **self.settings)
            return out.masks

        return call

    def reference(self, row: int = 0) -> Callable[[], np.ndarray]:
        """Return a call that draws one image under the reference program's store and gives its mask."""
        return self._alone(ReferenceStore, row)

    def ours_by_token(self) -> np.ndarray:
        """Return our masks with a column for each token of a word, each over its own maximum, as the reference does."""
        tokens = [[[position] for position in rows[:, 0].nonzero().flatten().tolist()] for rows in self.select]
        names = [[str(position) for position in row] for row in tokens]
        with torch.no_grad(), collect_maps(self.pipe.pipe, names, token_indices=tokens, propagate="none") as maps:
            self._draw(slice(None), "latent")
        counts = torch.tensor([len(row) for row in tokens], device=self.latents.device)[:, None, None, None]
        class_maps = maps.class_maps(REFERENCE_MAPS).sum(1, keepdim=True) / counts
        images = torch.zeros(self.batch, self._size(), self._size(), 3, dtype=torch.uint8)
        return make_masks(class_maps, images, REFERENCE_MASK, self.ids)[0].cpu().numpy()

    def daam(self, row: int = 0) -> Callable[[], np.ndarray]:
        """Return a call that draws one image with DAAM-style capture and gives its mask."""
        return self._alone(DaamStore, row)

    def peer(self) -> Callable[[], Tensor]:
        """Return a call that draws the batch under attention-map-diffusers and gives class maps: it makes no masks."""

        def call() -> Tensor:
            with PeerMaps(self.pipe.pipe) as store:
                self._draw(slice(None), "pt")
            store.compute()
            return store.class_maps(self.select, self._size())

        return call

    def crf_seconds(self) -> float:
        """Time the reference program's mask stage on one image at its own 512x512, on the CPU."""
        with ReferenceStore(self.pipe.pipe) as store:
            images = self._draw(slice(0, 1), "pt")
        image = torch.nn.functional.interpolate(images.float(), (REFERENCE_SIZE,) * 2, mode="bilinear")[0]
        pixels = (image.clamp(0, 1).permute(1, 2, 0) * 255).to(torch.uint8).cpu().numpy()
        class_map = store.class_maps(self.select[0], REFERENCE_SIZE)[0].cpu().numpy()
        start = time.process_time()
        reference_mask(class_map, pixels, class_map > REFERENCE_MASK.threshold)
        return time.process_time() - start

    def denoise_alone(self, store: Any) -> None:
        """Denoise the first image inside a store or a collector, without the VAE."""
        with store:
            self._draw(slice(0, 1), "latent")

    def collector(self, row: int = 0) -> Any:
        """Return our own collector for one image, with the maps that the reference has."""
        return collect_maps(self.pipe.pipe, self.phrases[row], propagate="none")

    def _alone(self, kind: type, row: int) -> Callable[[], np.ndarray]:
        def call() -> np.ndarray:
            with kind(self.pipe.pipe) as store:
                images = self._draw(slice(row, row + 1), "pt")
            maps = store.class_maps(self.select[row], self._size())[None]
            images = (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
            return make_masks(maps, images, REFERENCE_MASK, self.ids[row : row + 1])[0][0].cpu().numpy()

        return torch.no_grad()(call)

    def _draw(self, rows: slice, output_type: str) -> Any:
        pipe = self.pipe.pipe
        latents = self.latents[rows].to(pipe.unet.dtype)
        return pipe(self.prompts[rows], latents=latents, output_type=output_type, **self.settings).images

    def _size(self) -> int:
        return self.pipe.pipe.unet.config.sample_size * self.pipe.pipe.vae_scale_factor


def mask_iou(left: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> list[float]:
    """Return the foreground IoU of each pair of masks; 1 for two empty ones."""
    pairs = [(a > 0, b > 0) for a, b in zip(left, right, strict=True)]
    return [float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0 for a, b in pairs]
