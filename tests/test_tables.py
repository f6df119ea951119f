"""README.md, pages in docs and the plots are what `make tables` makes of the committed rows."""

from pathlib import Path

import pytest
from PIL import Image
from test_protocol_tables import ROWS

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import tables
from diffumask_fast.bench.regressions import read_rows
from diffumask_fast.bench.rows import append_rows, row
from diffumask_fast.bench.tables import BEGIN, END, PAGES, PLOT, all_tables, between_markers, digest, latest_rows, table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"geometry": "mini", "device": "cpu", "cpu": "some processor", "threads": 1, "batch": 8}


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_are_made_of_the_committed_rows(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = latest_rows(ROOT / "bench" / "results")
    assert between_markers(text, PAGES[page](rows)) == text, "run `make tables`"


def test_the_readmes_plot_is_made_of_the_committed_rows():
    with Image.open(ROOT / PLOT) as image:
        assert image.text["rows"] == digest(latest_rows(ROOT / "bench" / "results")), "run `make tables`"


def test_the_protocols_page_and_plot_are_made_of_the_committed_rows():
    text = (ROOT / tables.PROTOCOL_PAGE).read_text(encoding="utf-8")
    if not (ROOT / tables.PROTOCOL).exists():
        assert between_markers(text, tables.protocol_page([])) == text
        return
    rows = read_rows(ROOT / tables.PROTOCOL)
    assert between_markers(text, tables.protocol_page(rows)) == text, "run `make tables`"
    with Image.open(ROOT / tables.PROTOCOL_PLOT) as image:
        assert image.text["rows"] == digest(rows), "run `make tables`"


def test_another_row_changes_the_table_and_the_digest(tmp_path):
    first = row("end_to_end", "maps_overhead", 1.01, low=1.0, high=1.02, n=14, config=CONFIG)
    later = row("end_to_end", "maps_overhead", 1.03, low=1.0, high=1.05, n=14, config=CONFIG)
    append_rows(tmp_path / "a.jsonl", [first])
    before = latest_rows(tmp_path)
    append_rows(tmp_path / "a.jsonl", [later])
    after = latest_rows(tmp_path)
    assert (before, after) == ([first], [later]) and digest(before) != digest(after)
    assert "| maps alone, denoising only, over plain diffusers | 1.030 | 1.000 to 1.050 | 14 |" in table(after)
    assert "`mini` on some processor, 1 thread |" in table(after)


def test_the_text_around_the_markers_stays():
    text = between_markers(f"before\n{BEGIN}\nold\n{END}\nafter\n", "| a |")
    assert text == f"before\n{BEGIN}\n\n| a |\n\n{END}\nafter\n"
    assert between_markers(text, "| a |") == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_that_are_not_there(text):
    with pytest.raises(DiffuMaskError, match="must have the lines"):
        between_markers(text, "| a |")


def test_no_rows():
    with pytest.raises(DiffuMaskError, match="There are no end_to_end rows"):
        table([row("masks", "otsu", 1.0, config=CONFIG)])


def test_a_checkout_is_rewritten(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in (*PAGES, tables.PROTOCOL_PAGE):
        (tmp_path / page).write_text(f"{BEGIN}\n{END}\n")
    rows = [
        row("end_to_end", name, 2.0, low=1.5, high=2.5, config=CONFIG) for name in ("speedup_vs_daam", "maps_overhead")
    ]
    rows += [row("gpu_targets", "mean_field", 1.0, config=CONFIG | {"gpu": "H", "case": "torch"})]
    append_rows(tmp_path / "bench" / "results" / "a.jsonl", rows)
    append_rows(tmp_path / tables.PROTOCOL, ROWS)
    tables.main(tmp_path)
    for page in PAGES:
        expected = "one step of the CRF" if page == "docs/kernels.md" else "speed-up over DAAM"
        assert expected in (tmp_path / page).read_text()
    with Image.open(tmp_path / PLOT) as image:
        assert image.text["rows"] == digest(rows) and min(image.size) > 200
    assert tables.protocol_page(ROWS) in (tmp_path / tables.PROTOCOL_PAGE).read_text(encoding="utf-8")
    with Image.open(tmp_path / tables.PROTOCOL_PLOT) as image:
        assert image.text["rows"] == digest(ROWS)
    assert tables.protocol_page(ROWS).endswith("(reproduce.png)") and "(reproduce" not in tables.protocol_page([])


def test_engines_have_a_line_for_each_engine_and_number_of_threads():
    rows = [
        row("engines", f"{engine}_{kind}", value, config=CONFIG | {"threads": threads})
        for engine, kind, value, threads in (
            ("compile_bf16", "plain", 0.7, 1), ("compile_bf16", "masks", 0.6, 1), ("onnx", "maps", 0.9, 2),
        )
    ]  # fmt: skip
    lines = tables.engines_table(rows).splitlines()
    assert lines[2] == "| compile bf16: `mini`, batch 8, some processor, 1 thread | 0.700 |  | 0.600 |"
    assert lines[3] == "| onnx: `mini`, batch 8, some processor, 2 threads |  | 0.900 |  |"
    assert tables.engines_table([]) == ""
    assert lines[3] in all_tables([*rows, row("end_to_end", "maps_overhead", 1.01, config=CONFIG)])


def test_the_readme_shows_a_few_rows_of_mini():
    rows = [row("end_to_end", name, 1.5, config=CONFIG) for name in ("maps_overhead", "propagation_overhead")]
    rows.append(row("end_to_end", "maps_overhead", 1.1, config=CONFIG | {"geometry": "sd15"}))
    assert tables.summary(rows).splitlines()[2:] == [
        "| maps alone, denoising only, over plain diffusers | 1.500 | 1.500 to 1.500 | 1 |"
    ]
