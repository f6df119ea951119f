"""What the page's script is given: figures of all rows, and the rows that are shown."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from diffumask_fast.dataset.card import flat
from diffumask_fast.prompts.vocabulary import palette_of
from diffumask_fast.report.survey import AREA_EDGES, ClassFigures, Survey


def page_data(
    manifest: dict[str, Any],
    missing: int,
    survey: Survey,
    twins: list[list[int]],
    groups: dict[str, list[list[int]]],
    entries: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Return what the page shows, as JSON types.

    Args:
        manifest: of the dataset.
        missing: shards that are still to be written.
        survey: of all rows.
        twins: numbers of rows that are nearly equal, in groups.
        groups: what is shown of each view, and of the twins, as numbers of rows.
        entries: number of a row -> what is shown of it.
    """
    place = {number: index for index, number in enumerate(entries)}
    palette = palette_of(manifest["classes"])
    shown = {name: [[place[one] for one in group if one in place] for group in some] for name, some in groups.items()}
    return {
        "run": _run(manifest),
        "missing": missing,
        "rows": survey.rows,
        "accepted": survey.accepted,
        "damaged": survey.damaged,
        "background": _share(survey.rows - survey.damaged - survey.covered - survey.ignored, survey),
        "ignored": _share(survey.ignored, survey),
        "sizes": [[width, height, count] for (height, width), count in survey.sizes.most_common(6)],
        "classes": [_class(number, figures, palette) for number, figures in sorted(survey.classes.items())],
        "quality": [survey.quality[True], survey.quality[False]],
        "edges": AREA_EDGES,
        "reasons": sorted(survey.reasons.items(), key=lambda pair: (-pair[1], pair[0])),
        "entries": list(entries.values()),
        "twins": [group for group in shown.pop("twins") if group],
        "views": {name: group for name, (group,) in shown.items() if group},
        "twin_groups": [len(group) for group in twins],
    }


def _class(number: int, figures: ClassFigures, palette: Sequence[int]) -> dict[str, Any]:
    red, green, blue = palette[3 * number : 3 * number + 3]
    heat = (figures.place / max(figures.place.max(), 1e-9) * 255).round().astype("uint8")
    rated = sum(figures.qualities)
    return {
        "id": number,
        "name": figures.name,
        "colour": f"#{red:02x}{green:02x}{blue:02x}",
        "images": figures.images,
        "accepted": figures.accepted,
        "seen": figures.seen,
        "area": round(figures.area / figures.seen, 5) if figures.seen else None,
        "areas": figures.areas,
        "quality": round(figures.quality / rated, 4) if rated else None,
        "qualities": figures.qualities if rated else None,
        "heat": b64encode(heat.tobytes()).decode() if figures.seen else None,
    }


def _share(part: float, survey: Survey) -> float | None:
    whole = survey.rows - survey.damaged
    return round(part / whole, 5) if whole else None


def _run(manifest: dict[str, Any]) -> list[list[Any]]:
    """Return what the dataset is and how it was made: [title, [[name, value], ...]]."""
    parts = {name: manifest[name] for name in ("model", "options", "environment", "plan")}
    parts |= {name: {"": manifest[name]} for name in ("drift", "source") if name in manifest}
    return [[name, [[key, _text(value)] for key, value in flat(part)]] for name, part in parts.items() if part]


def _text(value: Any) -> str:
    text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 500 else text[:499] + "…"
