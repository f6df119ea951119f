"""bench/gpu_tables.py: the tables of a GPU's rows."""

from diffumask_fast.bench.gpu_tables import gpu_tables

CONFIG = {"gpu": "H", "geometry": "sd15", "case": "64x8x160", "layers": 1, "batch": 16}


def row(name, value, **config):
    return {"suite": "gpu_targets", "name": name, "value": value, "config": CONFIG | config}


def test_a_layer_is_a_line_of_three_ratios():
    rows = [
        row("columns_over_sdpa_without_maps", 4.0),
        row("attend_over_sdpa_without_maps", 1.0625),
        row("attend_over_sdpa_without_maps", 1.5, case="all layers", layers=16),
        row("attend_copy_share", 0.5),
    ]
    assert gpu_tables(rows).splitlines()[2:] == [
        "| `sd15` 64x8x160, batch 16, H | 1 | 1.062 |  | 4.000 |",
        "| `sd15` all layers, batch 16, H | 16 | 1.500 |  |  |",
    ]


def test_masks_are_a_table_of_their_own():
    rows = [
        row("make_masks", 0.4, case="auto"),
        row("mean_field", 3.5, case="torch"),
        row("mean_field", 0.5, case="triton"),
    ]
    assert gpu_tables(rows).splitlines()[2:] == [
        "| masks, all stages, batch 16, H |  |  | 0.400 |",
        "| one step of the CRF, batch 16, H | 3.500 | 0.500 |  |",
    ]


def test_each_table_is_well_formed():
    for table in gpu_tables([row("mean_field", 1.0), row("attend_over_sdpa_without_maps", 1.0)]).split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_other_rows_make_no_table():
    assert gpu_tables([row("mean_field", 1.0) | {"suite": "engines"}]) == ""
