"""The cross-attention of Stable Diffusion: the shapes that the kernels are tuned and accounted for."""

from dataclasses import dataclass

KEYS = 77


@dataclass(frozen=True)
class Layer:
    """Cross-attention layers of one shape in a UNet."""

    count: int
    pixels: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Model:
    """A UNet: FLOPs of one forward of one sample (1 MAC = 2, by torch's FlopCounterMode), its cross-attention."""

    name: str
    flops: float
    layers: tuple[Layer, ...]


MODELS = (
    Model(
        "SD1.5, 512 x 512",
        0.803e12,
        (Layer(5, 4096, 8, 40), Layer(5, 1024, 8, 80), Layer(5, 256, 8, 160), Layer(1, 64, 8, 160)),
    ),
    Model(
        "SD2.1, 768 x 768",
        2.149e12,
        (Layer(5, 9216, 5, 64), Layer(5, 2304, 10, 64), Layer(5, 576, 20, 64), Layer(1, 144, 20, 64)),
    ),
    Model("SDXL, 1024 x 1024", 6.761e12, (Layer(10, 4096, 10, 64), Layer(60, 1024, 20, 64))),
)
