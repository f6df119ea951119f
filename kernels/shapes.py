"""The cross-attention of the models that kernels are tuned, timed and accounted for."""

from dataclasses import dataclass

KEYS = 77  # tokens of a prompt


@dataclass(frozen=True)
class Layer:
    """Cross-attention layers of one shape in a UNet: how many there are, N, H and D."""

    count: int
    pixels: int
    heads: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return pixels, heads and head size."""
        return self.pixels, self.heads, self.head_dim


@dataclass(frozen=True)
class Model:
    """A UNet: FLOPs of one forward of one sample (1 MAC = 2, by torch's FlopCounterMode), its cross-attention."""

    name: str
    flops: float
    layers: tuple[Layer, ...]


# By the geometry's name, as `bench --geometry` takes it; tests/test_shapes.py counts them anew in the UNets.
MODELS = {
    "mini": Model("mini, 128 x 128", 0.981e9, (Layer(3, 256, 4, 16), Layer(3, 64, 4, 32), Layer(4, 16, 4, 40))),
    "sd15": Model(
        "SD1.5, 512 x 512",
        0.803e12,
        (Layer(5, 4096, 8, 40), Layer(5, 1024, 8, 80), Layer(5, 256, 8, 160), Layer(1, 64, 8, 160)),
    ),
    "sd21": Model(
        "SD2.1, 768 x 768",
        2.149e12,
        (Layer(5, 9216, 5, 64), Layer(5, 2304, 10, 64), Layer(5, 576, 20, 64), Layer(1, 144, 20, 64)),
    ),
    "sdxl": Model("SDXL, 1024 x 1024", 6.761e12, (Layer(10, 4096, 10, 64), Layer(60, 1024, 20, 64))),
}
STABLE_DIFFUSION = tuple(model for geometry, model in MODELS.items() if geometry != "mini")
