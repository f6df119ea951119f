"""Write the tables of README.md and docs, and the plots, from committed rows; what `make tables` runs."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffumask_fast.bench.gpu_tables import gpu_tables
from diffumask_fast.bench.regressions import read_rows
from diffumask_fast.errors import DiffuMaskError

BEGIN, END = "<!-- bench: made by `make tables` -->", "<!-- bench: end -->"
PLOT = "docs/bench.png"
# the rows of the paper's protocol, and what is made of them
PROTOCOL, PROTOCOL_PAGE, PROTOCOL_PLOT = "bench/results/reproduce/mini.jsonl", "docs/reproduce.md", "docs/reproduce.png"
# the few of mini that README.md shows
SUMMARY = ("maps_overhead", "masks_overhead", "speedup_vs_reference_best", "speedup_vs_daam", "memory_vs_steps")
LABELS = {
    "maps_overhead": "maps alone, denoising only, over plain diffusers",
    "propagation_overhead": "maps and propagation, denoising only, over plain diffusers",
    "masks_overhead": "finished images with masks, over plain diffusers' images",
    "speedup_vs_reference_fp32": "speed-up over the reference program's store, fp32 both",
    "speedup_vs_reference_best": "speed-up over the reference program's store, our best precision",
    "speedup_vs_daam": "speed-up over DAAM-style capture, fp32 both",
    "speedup_vs_peer": "speed-up over attention-map-diffusers 1.0.0, maps of all steps",
    "speedup_vs_reference_with_masks": "speed-up over the reference with its mask stage (20 CRFs)",
    "iou_vs_reference": "IoU with the reference's masks, same aggregation and threshold",
    "peak_memory_vs_reference": "peak memory over the reference store's, one image",
    "memory_vs_steps": "peak memory at 50 steps over that at 10",
    "seconds_plain": "plain diffusers, one run of one image",
    "seconds_ours": "ours with its mask, one run of one image",
    "seconds_reference": "the reference program's store, one run of one image",
}


def latest_rows(folder: Path) -> list[dict]:
    """Return the last row of each suite, name, geometry, case and so on, of all files of a folder."""
    rows = [one for path in sorted(folder.glob("*.jsonl")) for one in read_rows(path)]
    kept: dict[str, dict] = {}
    for one in rows:
        config = one["config"]
        known = [config.get(key) for key in ("geometry", "device", "cpu", "gpu", "threads", "batch", "case")]
        known += [config.get("num_inference_steps")] if one["suite"] == "scaling" else []
        kept[json.dumps([one["suite"], one["name"], *known])] = one
    return list(kept.values())


def table(rows: Sequence[dict]) -> str:
    """Return Markdown tables of the end-to-end rows, one for each geometry and machine, and the figure's digest.

    Raises:
        DiffuMaskError: there is no such row.
    """
    rows = [one for one in rows if one["suite"] == "end_to_end"]
    if not rows:
        raise DiffuMaskError("There are no end_to_end rows in bench/results: run `diffumask-fast bench` first.")
    machines: dict[tuple, list[dict]] = {}
    for one in rows:
        config = one["config"]
        machine = (config["geometry"], config.get("gpu") or config["cpu"], config["threads"])
        machines.setdefault(machine, []).append(one)
    parts = []
    for (geometry, machine, threads), own in machines.items():
        title = f"`{geometry}` on {machine}, {threads} thread{'s' * (threads != 1)}"
        parts.append("\n".join([f"| {title} | | low to high | n |", "|---|---|---|---|", *map(_line, _sorted(own))]))
    return "\n\n".join(parts)


def engines_table(rows: Sequence[dict]) -> str:
    """Return a Markdown table of the rows of the suite engines, a line for each engine, machine and threads; or ""."""
    lines: dict[tuple, dict[str, float]] = {}
    for one in rows:
        if one["suite"] == "engines":
            config, (engine, _, kind) = one["config"], one["name"].rpartition("_")
            machine = config.get("gpu") or config["cpu"]
            key = (config["geometry"], machine, config["batch"], engine, config["threads"])
            lines.setdefault(key, {})[kind] = one["value"]
    if not lines:
        return ""
    text = ["| time over eager torch's | plain | with maps | images and masks |", "|---|---|---|---|"]
    for (geometry, machine, batch, engine, threads), ratios in lines.items():
        title = (
            f"{engine.replace('_', ' ')}: `{geometry}`, batch {batch}, {machine}, {threads} thread{'s' * (threads > 1)}"
        )
        cells = (f"{ratios[kind]:.3f}" if kind in ratios else "" for kind in ("plain", "maps", "masks"))
        text.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(text)


def digest(rows: Sequence[dict]) -> str:
    """Return the SHA-256 of rows: the plot carries it, so that a test sees whether it was made of them."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def summary(rows: Sequence[dict]) -> str:
    """Return the Markdown table of the rows of mini that SUMMARY names."""
    return table([one for one in rows if one["name"] in SUMMARY and one["config"]["geometry"] == "mini"])


def all_tables(rows: Sequence[dict]) -> str:
    """Return every table, one below the other."""
    return "\n\n".join(filter(None, [table(rows), engines_table(rows)]))


def protocol_page(rows: Sequence[dict]) -> str:
    """Return the tables and the plot of the paper's protocol."""
    from diffumask_fast.bench import protocol_tables

    text = "mIoU of each training set, and what each ablation changes; a dot for each seed"
    return protocol_tables.all_tables(rows) + (f"\n\n![{text}]({Path(PROTOCOL_PLOT).name})" if rows else "")


PAGES = {"README.md": summary, "docs/costs.md": all_tables, "docs/kernels.md": gpu_tables}


def between_markers(text: str, tables: str) -> str:
    """Replace what stands between the markers.

    Raises:
        DiffuMaskError: the text has not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DiffuMaskError(f"A page must have the lines {BEGIN} and {END}, once and in this order.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def _sorted(rows: Sequence[dict]) -> list[dict]:
    order = list(LABELS)
    return sorted(rows, key=lambda one: order.index(one["name"]) if one["name"] in order else len(order))


def _line(one: dict) -> str:
    label, unit = LABELS.get(one["name"], one["name"]), "" if one["unit"] == "ratio" else f" {one['unit']}"
    if case := one["config"].get("case"):
        label += f": batch {one['config']['batch']}, attention by `{case}`"
    return f"| {label} | {one['value']:.3f}{unit} | {one['low']:.3f} to {one['high']:.3f} | {one['n']} |"


def main(root: Path) -> None:
    """Rewrite the pages and the plots of a checkout."""
    from diffumask_fast.bench.plots import overview
    from diffumask_fast.bench.protocol_tables import plot

    rows = latest_rows(root / "bench" / "results")
    made = {name: tables(rows) for name, tables in PAGES.items()}
    overview(rows, root / PLOT, digest(rows))
    rows = read_rows(root / PROTOCOL) if (root / PROTOCOL).exists() else []
    made[PROTOCOL_PAGE] = protocol_page(rows)
    if rows:
        plot(rows, root / PROTOCOL_PLOT, digest(rows))
    for name, tables in made.items():
        page = root / name
        page.write_text(between_markers(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
