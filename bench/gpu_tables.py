"""Markdown tables of the rows of the suite gpu_targets."""

from collections.abc import Sequence
from typing import Any

ATTENTION = {
    "attend_over_sdpa_without_maps": "`triton`",
    "sdpa_maps_over_sdpa_without_maps": "`sdpa+maps`",
    "columns_over_sdpa_without_maps": "`sdpa`",
}
REFINEMENT = {
    "guided_filter_and_otsu": "guided filter and Otsu's threshold",
    "mean_field": "one step of the CRF",
    "make_masks": "masks, all stages",
}
Cells = dict[tuple[Any, ...], dict[str, str]]


def gpu_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table for attention and one for masks, each of all GPUs; "" without rows."""
    rows = [one for one in rows if one["suite"] == "gpu_targets"]
    return "\n\n".join(filter(None, (_attention(rows), _refinement(rows))))


def _attention(rows: Sequence[dict[str, Any]]) -> str:
    lines: Cells = {}
    for one in rows:
        if one["name"] in ATTENTION:
            config = one["config"]
            key = (config["gpu"], config["geometry"], config["case"], config["layers"], config["batch"])
            lines.setdefault(key, {})[ATTENTION[one["name"]]] = f"{one['value']:.3f}"
    title = "| attention with maps, time over torch's without | layers |"
    return _markdown(
        title,
        list(ATTENTION.values()),
        {(f"`{geometry}` {case}, batch {batch}, {gpu}", layers): cells
         for (gpu, geometry, case, layers, batch), cells in lines.items()},
    )  # fmt: skip


def _refinement(rows: Sequence[dict[str, Any]]) -> str:
    lines: Cells = {}
    for one in rows:
        if one["name"] in REFINEMENT:
            config = one["config"]
            line = f"{REFINEMENT[one['name']]}, batch {config['batch']}, {config['gpu']}"
            lines.setdefault((line,), {})[f"`{config['case']}`"] = f"{one['value']:.3f}"
    return _markdown("| milliseconds for an image of 512 x 512 |", ["`torch`", "`triton`", "`auto`"], lines)


def _markdown(title: str, columns: list[str], lines: Cells) -> str:
    if not lines:
        return ""
    text = [f"{title} {' | '.join(columns)} |", "|" + "---|" * (title.count("|") - 1 + len(columns))]
    for heads, cells in lines.items():
        text.append(f"| {' | '.join(map(str, heads))} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(text)
