"""What `diffumask-fast bench` runs: each suite is a module with `run(geometry, device) -> rows`."""

SUITES = ("end_to_end",)
__all__ = ["SUITES"]
