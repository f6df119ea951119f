"""Maps of a layer that has a processor of its own: the columns join the values of the product that it makes itself."""

import functools
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    IPAdapterXFormersAttnProcessor,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffumask_fast.attention.processor import bias, is_plain
from diffumask_fast.attention.tap import Place, Tap
from diffumask_fast.borrow import patched
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend

# draw the perturbed rows, which are the last ones, without a product
FEWER_ROWS = (PAGIdentitySelfAttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0)
# multiply by xformers, where no column can be read, and are known to take the layer's own projections
PROJECTS_AS_LAYER = (IPAdapterXFormersAttnProcessor,)


class OwnProduct(TorchFunctionMode):
    """Append columns to the values of a layer's attention products while it is entered, for this thread alone.

    It sees torch's `scaled_dot_product_attention`, however that is named where it is called, and
    `Attention.get_attention_scores`.
    """

    def __init__(self, found: "Products | None" = None) -> None:
        super().__init__()
        self.found = found or Products()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let a function run, an attention product with the columns."""
        if func is not F.scaled_dot_product_attention and func is not torch._C._nn.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.found.attend(func, *args, **(kwargs or {}))


class Products:
    """What one call of a layer has multiplied."""

    columns: Tensor | None
    first: int
    queries: tuple[int, int]  # rows and pixels
    heads: int
    fewer_rows = False
    maps: list[Tensor]  # of products over all heads: [Bc, K, N]
    parts: list[Tensor]  # of products over some rows of batch and heads: [n, N, K]

    def begin(self, heads: int, queries: tuple[int, int], columns: Tensor | None, first: int) -> None:
        """Forget the last call.

        Args:
            heads: H of the layer.
            queries: B and N of its input.
            columns: [Bc, T, K]; None only counts the products.
            first: the first conditional row.
        """
        self.columns, self.first, self.heads, self.queries = columns, first, heads, queries
        self.maps, self.parts = [], []

    def attend(
        self,
        product: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        """Make a product of torch's, over the conditional rows' tokens with the columns."""
        rest |= {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        columns = self.columns
        if columns is None or not self._is_of_the_tokens(query, key):
            return product(query, key, value, scale=scale, **rest)
        size, own, num = query.shape[-1], value.shape[-1], columns.shape[-1]
        width = -(-max(size, own + num) // 8) * 8
        after = value.shape[0] - self.first - columns.shape[0]
        extra = F.pad(columns.to(value.dtype), (0, width - own - num, 0, 0, self.first, after))
        values = torch.cat([value, extra[:, None].expand(-1, value.shape[1], -1, -1)], -1)
        query, key = (F.pad(x, (0, width - size)) for x in (query, key))
        out = product(query, key, values, scale=size**-0.5 if scale is None else scale, **rest)
        read = out[self.first : self.first + columns.shape[0], :, :, own : own + num]
        self.maps.append(self.over_heads(read).transpose(1, 2))
        return out[..., :own]

    def over_heads(self, read: Tensor) -> Tensor:
        """Return the mean [Bc, N, K] of what the columns of all heads [Bc, H, N, K] gave."""
        return read.mean(1, dtype=torch.float32)

    def read(self, probs: Tensor) -> None:
        """Read the columns from probabilities [n, N, T], of some or all rows of batch and heads."""
        columns, (rows, pixels) = self.columns, self.queries
        if columns is None or probs.shape[1:] != (pixels, columns.shape[1]):
            return
        start = sum(len(part) for part in self.parts)
        after = rows - self.first - columns.shape[0]
        own = F.pad(columns, (0, 0, 0, 0, self.first, after)).repeat_interleave(self.heads, 0)
        own = own[start : start + len(probs)]
        if len(own) == len(probs):
            self.parts.append(probs.float() @ own.float())
        else:
            self.maps += [probs, probs]  # more products than one: whose rows these are is not known

    def only(self) -> Tensor | None:
        """Return the maps [Bc, K, N] of the one product over the tokens; None where there is none, or several."""
        rows = self.queries[0]
        maps = list(self.maps)
        if self.parts and self.columns is not None:
            parts = torch.cat(self.parts)
            if len(parts) != rows * self.heads:
                return None
            whole = parts.unflatten(0, (rows, self.heads))[self.first : self.first + self.columns.shape[0]]
            maps.append(whole.mean(1).transpose(1, 2))
        return maps[0] if len(maps) == 1 else None

    def _is_of_the_tokens(self, query: Tensor, key: Tensor) -> bool:
        columns, (rows, pixels) = self.columns, self.queries
        assert columns is not None
        if query.ndim != 4 or query.shape[2] != pixels or key.shape[-2] != columns.shape[1]:
            return False
        enough = self.first + columns.shape[0] <= query.shape[0]
        return query.shape[0] == rows or (self.fewer_rows and enough)


class _WithMaps:
    """Stands for a layer's own processor; see `with_own_product`."""

    def __init__(self, processor: Any, place: Place, impl: str) -> None:
        self.processor = processor
        self.place = place
        self.impl = impl
        self.product = OwnProduct()
        self.product.found.fewer_rows = isinstance(processor, FEWER_ROWS)

    def draw(
        self, attn: Attention, hidden_states: Tensor, tap: Tap | None, context: Any, mask: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Let the layer's own processor draw, and give the tap the maps of its product."""
        columns = None if tap is None else tap.columns(self.place, hidden_states)

        def own() -> Any:
            return self.processor(attn, hidden_states, encoder_hidden_states=context, attention_mask=mask, **kwargs)

        if tap is None or columns is None:
            return own()
        if type(self.processor) in PROJECTS_AS_LAYER and is_plain(attn):
            _second_product(attn, hidden_states, context, mask, tap, columns, self.place, self.impl)
            return own()
        found, scores = self.product.found, attn.get_attention_scores
        found.begin(attn.heads, (hidden_states.shape[0], hidden_states.shape[1]), columns, tap.first)

        def get_attention_scores(*args: Any, **kwargs: Any) -> Tensor:
            probs = scores(*args, **kwargs)
            found.read(probs)
            return probs

        with patched("get_attention_scores", {attn: get_attention_scores}), self.product:
            out = own()
        added = found.only()
        if added is None:
            raise DiffuMaskError(self._unknown())
        maps, weight = tap.target(self.place)
        tap.put(self.place, added * weight if maps is None else maps.add_(added, alpha=weight))
        return out

    def _unknown(self) -> str:
        what, instead = ("tokens", "") if self.place.cross else ("pixels", ", or use `propagate=none`")
        return (
            f"{type(self.processor).__name__} does not make one product over all {what} by torch's "
            "scaled_dot_product_attention or by get_attention_scores, so what it attends to cannot be read: give the "
            f"layer a processor that does{instead}"
        )


def with_own_product(processor: Any, place: Place, impl: str = "auto") -> Any:
    """Wrap a foreign processor (IP-Adapter, a user's own): it draws, and its own product gives the maps too.

    Args:
        processor: what the layer has; it is called with what it would be called with without maps.
        place: of the layer.
        impl: of `attend`, for the processors whose product cannot be looked into.

    Returns:
        a processor with the same named parameters, for diffusers filters by name, and `tap`.
    """
    kind: type = type(processor)
    return _class_with_maps(kind)(processor, place, impl)


@functools.cache
def _class_with_maps(kind: Any) -> type:
    """Make the wrapper for one class of processors, with its signature and `tap`."""

    def call(
        self: _WithMaps,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tap: Tap | None = None,
        **kwargs: Any,
    ) -> Any:
        return self.draw(attn, hidden_states, tap, encoder_hidden_states, attention_mask, kwargs)

    return taking_a_tap(kind, _WithMaps, call)


def taking_a_tap(kind: Any, base: type, call: Any) -> type:
    """Make a class that is called as one of processors is, and takes `tap` by name: diffusers filters by names.

    Args:
        kind: of processors.
        base: of the class.
        call: what it is called by.
    """
    taken = list(inspect.signature(kind.__call__).parameters.values())
    at = len(taken) - (taken[-1].kind is inspect.Parameter.VAR_KEYWORD)
    taken.insert(at, inspect.Parameter("tap", inspect.Parameter.KEYWORD_ONLY))
    call.__signature__ = inspect.Signature(taken)
    return type(f"{kind.__name__}WithMaps", (base,), {"__call__": call})


def _second_product(
    attn: Attention,
    hidden_states: Tensor,
    context: Any,
    attention_mask: Tensor | None,
    tap: Tap,
    columns: Tensor,
    place: Place,
    impl: str,
) -> None:
    """Attend again for the conditional rows, for the maps alone."""
    rows = slice(tap.first, tap.first + columns.shape[0])
    hidden = hidden_states[rows]
    context = context[0] if isinstance(context, tuple) else context
    context = hidden if context is None else context[rows]
    q, k = attn.to_q(hidden), attn.to_k(context)
    mask = bias(attn, None if attention_mask is None else attention_mask[rows], context)
    maps, weight = tap.target(place)
    _, maps = attend(q, k, k, columns, heads=attn.heads, maps=maps, weight=weight, mask=mask, impl=impl)
    tap.put(place, cast(Tensor, maps))
