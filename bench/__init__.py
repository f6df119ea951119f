"""What `diffumask-fast bench` runs: each suite is a module with `run(geometry, device) -> rows`."""

SUITES = ("cluster", "end_to_end", "engines", "gpu_targets", "kernels", "masks", "quality", "scaling")
GEOMETRIES = ("mini", "sd15", "sd21", "sdxl")
__all__ = ["GEOMETRIES", "SUITES"]
