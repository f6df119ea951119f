"""What this project is measured against: published algorithms, written anew, and one real peer.

Each store is a context manager that works on a diffusers pipeline, draws with it as its authors' program does, and is
gone afterwards; `class_maps` then gives one map for each phrase, [K, size, size] (for the peer, of each image).
"""

import importlib.util
import math
from collections import defaultdict
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.attention.unet import attention_places
from diffumask_fast.borrow import patched
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.crf import LABELS, PRESETS, STEPS, Preset

CRF_THRESHOLDS = tuple(round(0.35 + 0.01 * i, 2) for i in range(20))
LIBRARIES = {
    "attention_map_diffusers": "pip install --no-deps attention-map-diffusers==1.0.0",
    "pydensecrf": "pip install pydensecrf2",
}


def missing(library: str) -> str | None:
    """Return how to install a baseline's library that is not installed, None if it is."""
    if importlib.util.find_spec(library) is not None:
        return None
    return f"{library} is not installed: {LIBRARIES[library]}"


def needs(library: str) -> None:
    """Raise a DiffuMaskError if a baseline's library is not installed."""
    if sentence := missing(library):
        raise DiffuMaskError(f"The baseline's library {sentence}.")


class _Hooked:
    """Stand in for the processors of some attention layers while the context lasts."""

    def __init__(self, pipe: Any) -> None:
        self.unet = pipe.unet
        self.places = attention_places(pipe.unet)
        self.calls = 0
        self._num_layers = 0
        self._borrowed = ExitStack()

    def layers(self) -> list[Attention]:
        """Return the layers whose probabilities are materialised, in the order of the call."""
        raise NotImplementedError

    def put(self, attn: Attention, probs: Tensor) -> None:
        """Take probs [2*H, N, T], the unconditional half first."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        eager, layers = _Eager(self), self.layers()
        self._num_layers = len(layers)
        self._borrowed.enter_context(patched("processor", dict.fromkeys(layers, eager)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._borrowed.close()


class _Eager:
    """Attention with its probabilities in memory: one softmax of [2*H, N, T], handed to the store, then times v."""

    def __init__(self, store: _Hooked) -> None:
        self.store = store

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (attn.head_to_batch_dim(x) for x in projected)
        scores = torch.einsum("bid,bjd->bij", q, k) * attn.scale
        probs = scores.softmax(-1)
        del scores
        self.store.put(attn, probs)
        out = attn.batch_to_head_dim(torch.einsum("bij,bjd->bid", probs, v))
        return attn.to_out[1](attn.to_out[0](out))


class ReferenceStore(_Hooked):
    """The attention store of the paper's program: all cross- and self-attention, every head, one image a run.

    The conditional half of each layer's probabilities is kept as a view, so both halves stay in memory; a call's maps
    are kept beside the sums until the call is over, and then added to them. Draw with guidance, one prompt at a time.

    Example:
        with ReferenceStore(pipe) as store:
            image = pipe("a photo of a dog").images[0]
        store.class_maps(select, 128)
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._order = self.layers()
        self._sums: list[Tensor] = []
        self._step: list[Tensor] = []

    def layers(self) -> list[Attention]:
        """Return every attention layer of the UNet, levels without cross-attention included."""
        return [module for module in self.unet.modules() if isinstance(module, Attention)]

    def put(self, attn: Attention, probs: Tensor) -> None:
        """Keep the conditional half; after the last layer of a call, add the call to the sums."""
        if not self._step:
            self._order = []
        self._order.append(attn)
        self._step.append(probs[probs.shape[0] // 2 :])
        if len(self._step) < self._num_layers:
            return
        if self._sums:
            for total, kept in zip(self._sums, self._step, strict=True):
                total += kept
        else:
            self._sums = self._step
        self._step = []
        self.calls += 1

    @property
    def num_bytes(self) -> int:
        """Bytes that the sums hold, both halves."""
        return sum(total.untyped_storage().nbytes() for total in self._sums)

    def clear(self) -> None:
        """Drop the sums and the maps of a call."""
        self._sums, self._step = [], []

    def levels(self, select: Tensor) -> dict[str, Tensor]:
        """Return the mean over heads, layers and calls of the columns select [T, K]: level -> [K, N] fp32."""
        probs: dict[str, list[Tensor]] = defaultdict(list)
        for attn, total in zip(self._order, self._sums, strict=True):
            place = self.places.get(attn)
            if place is not None and place.cross:
                probs[place.level].append(total.float().mean(0) / self.calls)
        select = select.to(self._sums[0].device)
        return {level: (torch.stack(layers).mean(0) @ select).T for level, layers in sorted(probs.items())}

    def class_maps(self, select: Tensor, size: int) -> Tensor:
        """Resize each token's map of each level but the coarsest, divide it by its maximum, and average.

        Args:
            select: [T, K], where each phrase has its tokens: the non-zero rows of a column.
            size: pixels of a side.

        Returns:
            [K, size, size] fp32, at most 1.
        """
        tokens = [column.nonzero().flatten().tolist() for column in select.T]
        maps = []
        for positions in tokens:
            each = torch.zeros(select.shape[0], len(positions))
            each[positions, range(len(positions))] = 1
            levels = list(self.levels(each).values())
            levels = levels[:-1] or levels
            resized = [_over_maximum(_resize(level, size)) for level in levels]
            maps.append(torch.stack(resized).sum(0).mean(0) / len(levels))
        return torch.stack(maps)


class DaamStore(_Hooked):
    """DAAM's capture: cross-attention with its probabilities, a loop over tokens, a sum for each layer and head.

    The coarsest level, and with it the middle block, is left out, as DAAM does. One prompt at a time, with guidance.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.sums: dict[tuple[str, int, int], Tensor] = {}
        self._index = {attn: i for i, attn in enumerate(self.layers())}

    def layers(self) -> list[Attention]:
        """Return the cross-attention layers that are captured."""
        levels = sorted({place.level for place in self.places.values()}, key=int)
        captured = levels[:-1] or levels
        return [
            attn
            for attn, place in self.places.items()
            if isinstance(attn, Attention) and place.cross and place.level in captured
        ]

    def put(self, attn: Attention, probs: Tensor) -> None:
        """Unravel the tokens one by one, and add each head's maps [T, h, w] to its sum."""
        side = math.isqrt(probs.shape[1])
        maps = []
        for one in probs.permute(2, 0, 1):
            one = one.view(one.shape[0], side, side)
            maps.append(one[one.shape[0] // 2 :])
        level, layer = self.places[attn].level, self._index[attn]
        for head, heat in enumerate(torch.stack(maps, 0).permute(1, 0, 2, 3).contiguous()):
            key = (level, layer, head)
            self.sums[key] = self.sums[key] + heat if key in self.sums else heat

    def class_maps(self, select: Tensor, size: int) -> Tensor:
        """Bring every sum to the latents' size, clamp it at 0, average over layers and heads, then over the tokens.

        Args:
            select: [T, K], 1/n at each of the n tokens of a phrase.
            size: pixels of a side.

        Returns:
            [K, size, size] fp32.
        """
        side = self.unet.config.sample_size
        each = [_resize(heat.float(), side).clamp_min(0) for heat in self.sums.values()]
        heat = torch.einsum("tk,thw->khw", select.to(each[0].device), torch.stack(each).mean(0))
        return _resize(heat, size)


class PeerMaps:
    """`attention-map-diffusers` as its users run it: its capture around the pipeline, all timesteps, head means.

    Only the text maps are asked for (its default); they are computed after drawing, from the queries and keys kept.
    """

    def __init__(self, pipe: Any) -> None:
        needs("attention_map_diffusers")
        from attention_map_diffusers import AttentionCapture

        self._capture = AttentionCapture(pipe, timesteps="all")
        self._maps: Any = None

    def __enter__(self) -> Self:
        self._capture.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._capture.__exit__(kind, error, trace)

    def compute(self) -> None:
        """Compute the maps of all layers, steps and tokens, as its users do after the pipeline's call."""
        self._maps = self._capture.compute()

    def class_maps(self, select: Tensor, size: int) -> Tensor:
        """Average over layers and steps at each level but the coarsest, resize, divide by the maximum, and average.

        Args:
            select: [B, T, K], as phrase_columns gives it.
            size: pixels of a side.

        Returns:
            [B, K, size, size] fp32.
        """
        by_pixels: dict[int, list[Tensor]] = defaultdict(list)
        for record in self._maps:
            data = record.data[-select.shape[0] :, 0].float()
            by_pixels[data.shape[1]].append(data)
        levels = [torch.stack(by_pixels[pixels]).mean(0) for pixels in sorted(by_pixels, reverse=True)]
        maps = [(level @ select).transpose(1, 2) for level in levels[:-1] or levels]
        resized = [torch.stack([_over_maximum(_resize(one, size)) for one in level]) for level in maps]
        return torch.stack(resized).sum(0) / len(maps)


def plain_attention(pipe: Any, kind: str) -> None:
    """Set how the plain pipeline attends: "sdpa" (diffusers' default), or "xformers" where it is installed.

    Raises:
        DiffuMaskError: xformers is not installed, or there is no such attention.
    """
    if kind == "sdpa":
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    elif kind == "xformers" and importlib.util.find_spec("xformers") is not None:
        pipe.enable_xformers_memory_efficient_attention()
    elif kind == "xformers":
        raise DiffuMaskError("The baseline's library xformers is not installed: pip install xformers, on CUDA only.")
    else:
        raise DiffuMaskError(f"There is no plain attention {kind}: use sdpa or xformers.")


def reference_mask(class_map: np.ndarray, image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Make a mask as the paper's program does: 20 thresholds, a CRF of 21 labels for each; the best match is kept.

    Its last step drops contours with a box under 1500 pixels; it takes next to no time and is left out.

    Args:
        class_map: [H, W] fp32, at its own size 512x512.
        image: [H, W, 3] uint8.
        target: [H, W] bool, what the candidates are compared with (there AffinityNet's mask).

    Returns:
        [H, W] bool.

    Raises:
        DiffuMaskError: pydensecrf is not installed.
    """
    best, mask = 0.0, np.zeros(class_map.shape, bool)
    for threshold in CRF_THRESHOLDS:
        candidate = dense_crf(image, (class_map > threshold).astype(np.int32), LABELS, PRESETS["threshold"])[1] > 0.5
        score = (candidate & target).sum() / max(1, candidate.sum() + target.sum())
        if score > best:
            best, mask = score, candidate
    return mask


def dense_crf(image: np.ndarray, labels: np.ndarray, num_labels: int, preset: Preset, scale: float = 1.0) -> np.ndarray:
    """Run pydensecrf as the paper's program does.

    Args:
        image: [H, W, 3] uint8.
        labels: [H, W] whole numbers 0..L-1.
        num_labels: L.
        preset: one of `masks.crf.PRESETS`.
        scale: factor of the preset's widths in pixels.

    Returns:
        [L, H, W] fp32 probabilities.

    Raises:
        DiffuMaskError: pydensecrf is not installed.
    """
    needs("pydensecrf")
    from pydensecrf.densecrf import DenseCRF2D

    height, width = labels.shape
    model = DenseCRF2D(width, height, num_labels)
    other = (1 - preset.gt_prob) / (LABELS - 1)
    energy = np.where(np.arange(num_labels)[:, None] == labels.reshape(-1), -np.log(preset.gt_prob), -np.log(other))
    model.setUnaryEnergy(np.ascontiguousarray(energy, dtype=np.float32))
    compat, sxy = preset.gaussian
    model.addPairwiseGaussian(sxy=sxy * scale, compat=compat)
    compat, sxy, srgb = preset.bilateral
    model.addPairwiseBilateral(sxy=sxy * scale, srgb=srgb, rgbim=np.ascontiguousarray(image), compat=compat)
    return np.array(model.inference(STEPS)).reshape(num_labels, height, width)


def _resize(maps: Tensor, size: int) -> Tensor:
    """Bring square maps [K, N] or [K, h, w] to [K, size, size]."""
    if maps.ndim == 2:
        maps = maps.unflatten(-1, (math.isqrt(maps.shape[-1]),) * 2)
    return F.interpolate(maps[None], (size, size), mode="bicubic", align_corners=False)[0]


def _over_maximum(maps: Tensor) -> Tensor:
    """Divide maps [K, h, w] by their maxima; zeros stay zeros."""
    return maps / maps.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
