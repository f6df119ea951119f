"""Two files of rows compared: what became worse by more than a threshold."""

import json
import math
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError

KEYS = ("geometry", "model", "device", "cpu", "gpu", "threads", "batch", "num_inference_steps", "dtype", "case")
HIGHER_IS_BETTER = ("speedup", "iou", "images_per_s", "fraction")
ROW = ("suite", "name", "value", "unit", "low", "high", "n", "config")


def read_rows(path: str | Path) -> list[dict]:
    """Read a file of rows, JSON lines or what `--json` printed.

    Raises:
        DiffuMaskError: it is not there, or is no file of rows; names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DiffuMaskError(f"Cannot read the rows in {path} ({error}): give a file that bench wrote.") from error
    rows: list[dict] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            parsed = json.loads(line) if line.strip() else {"rows": []}
            read = parsed["rows"] if "rows" in parsed else [parsed]
            if any(key not in one for one in read for key in ROW):
                raise KeyError("row")
            if not all(_is_number(one[key]) for one in read for key in ("value", "low", "high")):
                raise ValueError("not a number")
        except (ValueError, KeyError, TypeError) as error:
            raise DiffuMaskError(
                f"{path} line {number} is no row of the bench with finite numbers: give a file it wrote."
            ) from error
        rows += read
    return rows


def compare_rows(before: list[dict], after: list[dict], threshold: float) -> list[dict]:
    """Match rows by suite, name and what they depend on, the last of each file, and say how they changed.

    Versions and commits are no part of the match: they are what is compared. A change for the worse counts as a
    regression when it exceeds the threshold and the two ranges do not meet.

    Args:
        before, after: rows of two runs.
        threshold: share of the earlier value.

    Returns:
        One dict for each row in both: name, case, before, after, change (share, above 0 worse), regression.

    Raises:
        DiffuMaskError: no row is in both.
    """
    old, new = ({_key(one): one for one in rows} for rows in (before, after))
    shared = [key for key in old if key in new]
    if not shared:
        raise DiffuMaskError(
            "The two files have no row in common (suite, geometry, machine, batch): give two of a kind."
        )
    result = []
    for key in shared:
        one, other = old[key], new[key]
        higher = one["name"].startswith(HIGHER_IS_BETTER)
        change = (other["value"] - one["value"]) / max(abs(one["value"]), 1e-12) * (-1 if higher else 1)
        apart = other["high"] < one["low"] if higher else other["low"] > one["high"]
        result.append(
            {
                "suite": one["suite"],
                "name": one["name"],
                "case": one["config"].get("case"),
                "before": one["value"],
                "after": other["value"],
                "change": round(change, 5),
                "regression": change > threshold and apart,
            }
        )
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _key(one: dict) -> tuple:
    return (one["suite"], one["name"], *(json.dumps(one["config"].get(key)) for key in KEYS))
