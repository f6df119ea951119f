"""bench/masks.py."""

from diffumask_fast.bench import masks


def test_a_row_for_each_stage_and_number_of_classes():
    rows = list(masks.run("mini", "cpu", batch=1, pairs=1))
    names = [row["name"] for row in rows]
    assert (
        names.count("make_masks") == 2 * len(masks.CASES) and names.count("otsu") == names.count("guided_filter") == 2
    )
    assert all((row["suite"], row["unit"], row["n"]) == ("masks", "ms/image", 1) and row["value"] > 0 for row in rows)
    cases = [row["config"]["case"] for row in rows if row["name"] == "make_masks"]
    assert len(set(cases)) == len(cases) and "otsu, guided K=2" in cases
    assert {row["config"]["pixels"] for row in rows} == {128}
