"""What `diffumask-fast bench` runs: each suite is a module with `run(geometry, device) -> rows`."""

SUITES = ("end_to_end", "engines", "goals", "kernels", "masks", "quality", "scaling")
__all__ = ["SUITES"]
