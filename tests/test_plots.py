import pytest
from PIL import Image

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import plots
from diffumask_fast.bench.rows import row

ROWS = [
    *(row("scaling", "images_per_s", 1.0 + b, config={"batch": b, "stages_s": {"denoise": 1.0}}) for b in (1, 2, 4)),
    *(row("scaling", "peak_memory_steps", 0.5, config={"num_inference_steps": n}) for n in (10, 50)),
    row("end_to_end", "speedup_vs_daam", 2.0, low=1.5, high=2.5),
]


def test_each_plot_is_written_as_png_and_svg(tmp_path):
    written = plots.draw(ROWS, tmp_path / "new")
    assert sorted({path.stem for path in written}) == ["memory", "speedups", "stages", "throughput"]
    assert len(written) == 8 and all(path.stat().st_size > 1000 for path in written)
    with Image.open(tmp_path / "new" / "throughput.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5
    assert "<svg" in (tmp_path / "new" / "throughput.svg").read_text()[:1000]


def test_rows_without_a_plot_are_passed_over(tmp_path):
    assert plots.draw([row("masks", "otsu", 1.0)], tmp_path) == []


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(DiffuMaskError, match=r"Plots need matplotlib: pip install \"diffumask-fast\[bench\]\""):
        plots.draw(ROWS, tmp_path)


def test_what_others_drew_is_not_replaced(tmp_path):
    for _ in range(2):
        plots.draw(ROWS, tmp_path)
    for name in ("stages.svg", "memory.png"):
        ours, theirs = (tmp_path / name).read_bytes(), b"theirs"
        (tmp_path / name).write_bytes(theirs)
        with pytest.raises(DiffuMaskError, match=f"{name} is there and was not written by this program"):
            plots.draw(ROWS, tmp_path)
        with pytest.raises(DiffuMaskError, match=name):
            plots.check_places(tmp_path)
        assert (tmp_path / name).read_bytes() == theirs
        (tmp_path / name).write_bytes(ours)
    plots.check_places(tmp_path)
