import pytest
import torch

from diffumask_fast.bench import memory
from diffumask_fast.bench.geometries import open_geometry
from diffumask_fast.bench.sides import Sides


def test_peak_bytes_counts_what_lives_at_once():
    def call():
        kept = torch.zeros(1000)
        for _ in range(3):
            kept = kept + torch.ones(1000)

    assert memory.peak_bytes(call) == 3 * 4000


def test_ours_is_smaller_and_flat_in_steps():
    pipe = open_geometry("mini", "cpu")
    value, config = memory.against_reference(Sides(pipe, 1, 1))
    assert value == pytest.approx(config["peak_gib"] / config["reference_peak_gib"], rel=0.02) and value < 0.3
    peaks = dict(memory.over_steps(pipe, (3, 9)))
    assert peaks[9] / peaks[3] <= 1.02
