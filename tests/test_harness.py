import gc
import itertools

import pytest
import torch
from cuda_stand_in import stand_in

from diffumask_fast.bench import harness
from diffumask_fast.bench.harness import compare, live_tensor_bytes, orders, race

NAMES = ["candidate", "baseline", "control"]


class FakeClock:
    """A process clock that each call of a workload moves on by the next of the durations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, durations: list[float]) -> None:
        self.now = 0.0
        self.durations = iter(durations)
        monkeypatch.setattr(harness.time, "process_time", lambda: self.now)

    def __call__(self) -> None:
        self.now += next(self.durations)


def by_name(rounds: int, names: list[str], seconds: dict[str, float], drift: float = 0.0) -> list[float]:
    called = itertools.chain.from_iterable(orders(names, rounds))
    return [seconds[name] + drift * index for index, name in enumerate(called)]


def test_third_smallest() -> None:
    assert harness.third_smallest([5.0, 1.0, 4.0, 2.0, 3.0]) == 3.0
    assert harness.third_smallest([5.0, 1.0]) == 5.0


def test_orders_are_abba() -> None:
    assert orders(["a", "b"], 4) == [("a", "b"), ("b", "a"), ("b", "a"), ("a", "b")]


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
def test_orders_give_every_name_the_same_place_on_average(names: list[str]) -> None:
    rounds = orders(names, 2 * len(names))
    places = [sum(order.index(name) for order in rounds) for name in names]
    assert len(set(places)) == 1
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))


def test_the_control_deviation_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"candidate": 1.2, "baseline": 1.0, "control": 1.05}
    clock = FakeClock(monkeypatch, by_name(14, NAMES, seconds))
    ratio = compare(clock, clock, warmup=0)
    assert (ratio.raw, ratio.deviation, ratio.value) == pytest.approx((1.2, 0.05, 1.15))
    assert (ratio.low, ratio.high) == pytest.approx((1.15, 1.15))
    assert (ratio.n, ratio.baseline_s) == (14, pytest.approx(1.0))
    assert "control 1.050" in str(ratio)


def test_without_a_control_nothing_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch, by_name(14, NAMES[:2], {"candidate": 1.2, "baseline": 1.0}))
    ratio = compare(clock, clock, warmup=0, control=False)
    assert (ratio.value, ratio.raw, ratio.deviation) == pytest.approx((1.2, 1.2, 0))


def test_a_steady_drift_falls_on_both_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch, by_name(12, NAMES[:2], dict.fromkeys(NAMES, 1.0), drift=0.01))
    assert compare(clock, clock, pairs=12, warmup=0, control=False).value == pytest.approx(1, abs=0.011)


def test_disturbed_calls_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"candidate": 1.2, "baseline": 1.0, "control": 1.0}
    durations = by_name(14, NAMES, seconds)
    durations = [time * (1 if index < 12 else 3) for index, time in enumerate(durations)]
    clock = FakeClock(monkeypatch, durations)
    assert compare(clock, clock, warmup=0).value == pytest.approx(1.2)


def test_bounds_hold_the_value_and_show_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.rand(42, generator=torch.Generator().manual_seed(0)).tolist()
    quiet = by_name(14, NAMES, {"candidate": 1.2, "baseline": 1.0, "control": 1.0})
    noisy = FakeClock(monkeypatch, [a * (1 + 0.2 * b) for a, b in zip(quiet, noise, strict=True)])
    ratio = compare(noisy, noisy, warmup=0)
    assert ratio.low <= ratio.value <= ratio.high
    assert 0.01 < ratio.high - ratio.low < 0.3
    assert ratio.value == pytest.approx(1.2, abs=0.08)


def test_a_known_ratio_is_measured() -> None:
    left, right = torch.randn(192, 192), torch.randn(192, 192)

    def once(times: int) -> None:
        for _ in range(times):
            torch.mm(left, right)

    ratio = compare(lambda: once(60), lambda: once(20), pairs=14)
    assert ratio.value == pytest.approx(3, rel=0.2), ratio
    assert ratio.clock == "process CPU time"


def test_threads_and_collector_are_restored_also_after_an_exception() -> None:
    before, seen = torch.get_num_threads(), []

    def fails() -> None:
        seen.append((torch.get_num_threads(), gc.isenabled()))
        raise RuntimeError("no")

    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no"):
            compare(fails, fails, warmup=0)
        assert (torch.get_num_threads(), gc.isenabled()) == (2, True)
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, False)]


def test_at_least_one_round() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        compare(dict, dict, pairs=-1)


def test_warmup_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [100.0] * 4 + by_name(3, NAMES, {"candidate": 1.5, "baseline": 1.0, "control": 1.0})
    clock = FakeClock(monkeypatch, durations)
    assert compare(clock, clock, pairs=3, warmup=2).value == pytest.approx(1.5)


def test_live_bytes_count_what_lives() -> None:
    outside = torch.ones(1000)
    with live_tensor_bytes() as live:
        kept = torch.ones(256)
        assert live.now == 1024
        kept.mul_(2)
        views = [kept[:10], kept.view(16, 16).t()]
        outside.add_(1)
        assert live.now == 1024
        temporary = kept.double()
        assert (live.now, live.peak) == (3072, 3072)
        del temporary
        assert (live.now, live.peak) == (1024, 3072)
        del kept
        assert live.now == 1024
        views.clear()
        assert live.now == 0
        made = torch.tensor([1.0, 2.0])
        assert live.now == 8
    del made
    assert (live.now, live.peak) == (0, 3072)


def test_live_bytes_follow_a_growing_tensor_and_inference_mode() -> None:
    with live_tensor_bytes() as live, torch.inference_mode():
        out = torch.empty(0)
        torch.add(torch.ones(50), 1, out=out)
        assert live.now == 200


def test_live_bytes_of_an_accumulator_do_not_grow_with_steps() -> None:
    def run(steps: int) -> int:
        with live_tensor_bytes() as live:
            maps = torch.zeros(2, 3, 64)
            for _ in range(steps):
                maps += torch.rand(2, 4, 3, 64).mean(1)
        assert maps.shape == (2, 3, 64)
        return live.now

    def run_keeping(steps: int) -> int:
        with live_tensor_bytes() as live:
            kept = [torch.rand(2, 3, 64) for _ in range(steps)]
        assert len(kept) == steps
        return live.now

    assert run(2) == run(12) == 2 * 3 * 64 * 4
    assert run_keeping(12) == 6 * run_keeping(2)


@pytest.mark.gpu
def test_a_known_ratio_is_measured_by_events() -> None:
    left, right = (torch.randn(2048, 2048, device="cuda") for _ in range(2))

    def once(times: int) -> None:
        for _ in range(times):
            torch.mm(left, right)

    ratio = compare(lambda: once(30), lambda: once(10), device="cuda", warmup=3)
    assert ratio.value == pytest.approx(3, rel=0.1), ratio
    assert (ratio.n, ratio.clock) == (10, "CUDA events")
    small = torch.randn(64, 64, device="cuda")  # shorter than its launch: by calls, one and three look alike
    workloads = {"one": lambda: small @ small, "three": lambda: small @ small @ small @ small}
    done = race(workloads, device="cuda", warmup=3, graph_calls=20)
    assert done.ratio("three", "one").value == pytest.approx(3, rel=0.25)


def test_on_cuda_replays_of_a_graph_are_timed_and_divided_by_its_calls() -> None:
    calls = {"a": [], "b": []}
    with stand_in():
        x = torch.zeros(4, device="cuda")

        def work(name: str) -> None:
            calls[name].append(None)
            x.add_(1)

        workloads = {name: lambda name=name: work(name) for name in calls}
        done = race(workloads, control="a", pairs=3, device="cuda", warmup=2, graph_calls=5)
        assert [len(found) for found in calls.values()] == [2 + 1 + 5] * 2  # no call after the captures
        assert x.tolist() == [2 * 8.0 + 3 * 3 * 5] * 4  # three rounds of a, b and the control
        assert done.clock == "CUDA events, graph replays"


def test_on_the_cpu_there_are_no_graphs() -> None:
    assert race({"a": dict}, pairs=1, graph_calls=5).clock == "process CPU time"
