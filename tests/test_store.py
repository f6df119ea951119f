import pytest
import torch

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.attention.store import MapStore, level_size, propagation_times
from diffumask_fast.errors import DiffuMaskError

SIZES = {"0": (8, 12), "1": (4, 6), "2": (2, 3)}


def call(batch=2, num=3):
    return {key: torch.rand(batch, num, h * w) for key, (h, w) in SIZES.items()}


def make(**kwargs):
    return MapStore([["dog", "cat", "car"], ["dog"]], (8, 12), **kwargs)


def options(aggregation="paper", propagate="auto"):
    return MapOptions(aggregation=aggregation, propagate=propagate)


def run(store, calls, answer=None):
    """Add calls and their answers: one row-stochastic matrix per call and level stands for the self-attention."""
    priors, answers = [], []
    for maps in calls:
        prior = store.prior()
        seen = {k: torch.softmax(3 * torch.rand(p.shape[-1], p.shape[-1]), -1) for k, p in prior.items()}
        propagated = {k: p @ seen[k].T for k, p in prior.items()}
        store.add(maps, propagated)
        priors.append(prior)
        answers.append(seen)
    return priors, answers


def test_levels_are_weighted_means_over_calls():
    store, calls = make(propagate="none"), [call() for _ in range(3)]
    for maps, weight in zip(calls, (1, 2, 3), strict=True):
        store.add(maps, weight=weight)
    for key in SIZES:
        expected = sum(w * c[key] for c, w in zip(calls, (1, 2, 3), strict=True)) / 6
        assert torch.allclose(store.levels[key], expected)
    assert store.sizes == SIZES and store.calls == 3


@pytest.mark.parametrize(
    ("num_calls", "first"), [(1, None), (2, 1), (3, 2), (6, 4), (7, 4), (12, 8), (51, 34), (None, 1)]
)
def test_maps_are_propagated_in_the_last_third_of_the_calls(num_calls, first):
    store = make(num_calls=num_calls)
    priors, _ = run(store, [call() for _ in range(num_calls or 5)])
    asked = [i for i, prior in enumerate(priors) if prior]
    assert asked == ([] if first is None else list(range(first, num_calls or 5)))


def test_nothing_is_propagated_when_not_asked_or_too_fine():
    assert not any(run(make(propagate="none"), [call() for _ in range(4)])[0])
    store = MapStore([["dog"]], (48, 48))
    store.add({"0": torch.rand(1, 1, 2304), "1": torch.rand(1, 1, 576)})
    assert list(store.prior()) == ["1"]


def test_the_prior_is_the_mean_of_the_earlier_maps():
    store, calls = make(num_calls=3), [call() for _ in range(3)]
    priors, seen = run(store, calls)
    for key in SIZES:
        mean = (calls[0][key] + calls[1][key]) / 2
        assert torch.allclose(priors[2][key], mean)
        assert torch.allclose(store._propagated[key][-1].mean(), mean @ seen[2][key].T)


def test_maps_propagated_n_times_are_later_calls_on_earlier_propagated_means():
    store, calls = make(num_calls=9, propagate=3), [call() for _ in range(9)]
    priors, seen = run(store, calls)
    assert [bool(p) for p in priors] == [False] * 6 + [True] * 3
    for key in SIZES:
        means = {i: sum(c[key] for c in calls[:i]) / i for i in (6, 7, 8)}
        assert priors[6][key].shape[1] == 9
        once = {i: means[i] @ seen[i][key].T for i in (6, 7, 8)}
        twice = {7: once[6] @ seen[7][key].T, 8: (once[6] + once[7]) / 2 @ seen[8][key].T}
        thrice = twice[7] @ seen[8][key].T
        kept = [m.mean() for m in store._propagated[key]]
        assert torch.allclose(kept[2], thrice, atol=1e-6)
        assert torch.allclose(kept[0], sum(once.values()) / 3) and torch.allclose(kept[1], sum(twice.values()) / 2)


def test_as_many_calls_propagate_as_times_need():
    priors, _ = run(store := make(num_calls=6, propagate=4), [call() for _ in range(6)])
    assert [bool(p) for p in priors] == [False] * 2 + [True] * 4
    assert all(m.weight for m in store._propagated["0"])


def test_paper_aggregation_takes_each_call_over_its_own_maximum():
    store, calls = make(propagate="none"), [call() for _ in range(2)]
    run(store, calls)
    small = {key: torch.zeros(2, 3, h * w) for key, (h, w) in SIZES.items()}
    for key in SIZES:
        small[key] = sum(c[key] / c[key].amax(-1, keepdim=True) for c in calls).unflatten(-1, SIZES[key]) / 2
    up = [torch.nn.functional.interpolate(small[k], (8, 12), mode="bicubic").clamp(0, 1) for k in ("1", "2")]
    assert torch.allclose(store.class_maps(options("paper")), (small["0"] + up[0] + up[1]) / 3, atol=1e-6)


def test_reference_aggregation_leaves_out_the_coarsest_level():
    store, calls = make(propagate="none"), [call() for _ in range(2)]
    run(store, calls)
    mean = {key: (calls[0][key] + calls[1][key]).unflatten(-1, SIZES[key]) / 2 for key in SIZES}
    up = torch.nn.functional.interpolate(mean["1"], (8, 12), mode="bicubic").clamp_min(0)
    expected = sum(m / m.amax((2, 3), keepdim=True) for m in (mean["0"], up)) / 2
    assert torch.allclose(store.class_maps(options("reference")), expected, atol=1e-6)


def test_finest_aggregation_takes_one_level():
    store, calls = make(propagate="none"), [call() for _ in range(2)]
    run(store, calls)
    mean = (calls[0]["0"] + calls[1]["0"]).unflatten(-1, SIZES["0"])
    assert torch.allclose(store.class_maps(options("finest")), mean / mean.amax((2, 3), keepdim=True), atol=1e-6)


def test_numbers_of_levels_take_these_levels():
    store = make(propagate="none")
    for _ in range(3):
        store.add(call())
    assert torch.equal(store.class_maps(options("0")), store.class_maps(options("finest")))
    assert torch.equal(store.class_maps(options("0,1")), store.class_maps(options("reference")))
    alone, both = store.class_maps(options("1")), store.class_maps(options("0,1"))
    finest = store.class_maps(options("0"))
    larger = torch.nn.functional.interpolate(alone, finest.shape[-2:], mode="bicubic", align_corners=False)
    larger = larger.clamp_min(0)
    larger = larger / larger.amax((-2, -1), keepdim=True).clamp_min(1e-30)
    assert alone.shape[-2:] == store.sizes["1"] and torch.allclose(both, (finest + larger) / 2, atol=1e-6)
    with pytest.raises(DiffuMaskError, match="there is no level 7 for `aggregation=0,7`: the UNet has 0, 1, 2"):
        store.class_maps(options("0,7"))


def test_levels_that_are_not_named_are_not_propagated():
    store = make(num_calls=6, aggregation="1")
    store.add(call())
    assert store.propagated_levels() == {"1"}


@pytest.mark.parametrize("aggregation", ["paper", "reference", "finest"])
def test_class_maps_are_in_range_and_padded_phrases_stay_zero(aggregation):
    store, calls = make(num_calls=6), [call() for _ in range(6)]
    for maps in calls:
        for value in maps.values():
            value[1, 1:] = 0
    run(store, calls)
    maps = store.class_maps(options(aggregation))
    assert maps.shape == (2, 3, 8, 12) and maps.min() >= 0 and maps.max() <= 1
    assert (maps[1, 1:] == 0).all() and (maps[0].amax((1, 2)) > 0.1).all()


def test_class_maps_choose_how_often_they_were_propagated():
    store = make(num_calls=6, propagate=2)
    run(store, [call() for _ in range(6)])
    none, once, twice, auto = (store.class_maps(options("finest", p)) for p in ("none", 1, 2, "auto"))
    assert torch.equal(auto, twice) and not torch.allclose(once, twice) and not torch.allclose(none, once)
    assert once.std() < none.std() / 1.2
    with pytest.raises(DiffuMaskError, match="propagated 2 times, not 3"):
        store.class_maps(options("finest", 3))


def test_one_call_has_nothing_to_propagate():
    store = make(num_calls=1, propagate=2)
    run(store, [call()])
    assert torch.equal(store.class_maps(options("paper", 2)), store.class_maps(options("paper", "none")))


def test_memory_does_not_grow_with_the_calls():
    sizes = []
    for num in (2, 12):
        store = make(num_calls=num)
        run(store, [call() for _ in range(num)])
        sizes.append(store.num_bytes)
    assert sizes[0] == sizes[1] == 4 * 4 * 2 * 3 * (96 + 24 + 6)


@pytest.mark.parametrize(
    ("aggregation", "propagated", "tensors"), [("paper", "012", 12), ("reference", "01", 5), ("finest", "0", 4)]
)
def test_only_what_an_aggregation_reads_is_kept_and_propagated(aggregation, propagated, tensors):
    calls, every, some = [call() for _ in range(6)], make(num_calls=6), make(num_calls=6, aggregation=aggregation)
    seen = {key: torch.softmax(3 * torch.rand(h * w, h * w), -1) for key, (h, w) in SIZES.items()}
    for store in (every, some):
        for maps in calls:
            prior = store.prior()
            store.add(maps, {key: value @ seen[key].T for key, value in prior.items()})
    assert list(prior) == list(propagated)
    assert torch.equal(some.class_maps(options(aggregation)), every.class_maps(options(aggregation)))
    assert torch.equal(some.class_maps(), some.class_maps(options(aggregation)))
    assert all(torch.equal(some.levels[key], every.levels[key]) for key in SIZES)
    means = [*some._maps.values(), *(m for orders in some._propagated.values() for m in orders)]
    assert sum(kept is not None for m in means for kept in (m._sum, m._peak_sum)) == tensors
    assert (some.num_bytes < every.num_bytes) == (aggregation != "paper")


def test_an_aggregation_that_nothing_was_kept_for_is_refused():
    store = make(aggregation="finest", propagate="none")
    run(store, [call()])
    with pytest.raises(DiffuMaskError, match="kept for `aggregation=finest`: draw with `aggregation=paper`"):
        store.class_maps(options("paper"))


def test_a_phrase_is_found_in_all_rows_that_have_it():
    store = make(propagate="none")
    run(store, [call()])
    dog, cat = store["dog"], store["cat"]
    assert dog.rows == [0, 1] and cat.rows == [0] and cat.maps.shape == (1, 8, 12)
    assert torch.equal(dog.maps, store.class_maps()[:, 0]) and torch.equal(cat.maps[0], store.class_maps()[0, 1])
    with pytest.raises(DiffuMaskError, match="no maps of 'sofa' were asked for, there are: car, cat, dog"):
        store["sofa"]


@pytest.mark.parametrize("latents", [(16, 16), (13, 9), (96, 64), (5, 64)])
def test_level_size_halves_rounding_up(latents):
    h, w = latents
    for _ in range(4):
        assert level_size(latents, h * w) == (h, w)
        h, w = (h + 1) // 2, (w + 1) // 2
    with pytest.raises(DiffuMaskError, match="are no level of latents"):
        level_size(latents, latents[0] * latents[1] - 1)


def test_wrong_options_are_named():
    assert [propagation_times(p) for p in ("auto", "none", 1, 4)] == [1, 0, 1, 4]
    for wrong in (0, 5, True, "often"):
        with pytest.raises(DiffuMaskError, match="`propagate` must be auto or none or a whole number from 1 to 4"):
            make(propagate=wrong)
    store = make()
    with pytest.raises(DiffuMaskError, match="no UNet call gave maps yet"):
        store.class_maps()


def accumulated(calls, attention, times):
    """Dataset Diffusion's form (arXiv 2309.14303): the mean of self-attention to a power, on the mean of the maps."""
    maps = torch.stack(calls).mean(0)
    return maps @ torch.linalg.matrix_power(torch.stack(attention).mean(0), times).T


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(("jitter", "least"), [(0, 1 - 1e-6), (0.3, 0.99)])
def test_propagation_beside_accumulated_attention_to_a_power(times, jitter, least):
    # attention of neighbours, as images have it; each call's differs by the jitter
    place = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij"), -1).view(-1, 2)
    base = -(torch.cdist(place, place) ** 2) / 2
    object_ = ((place - torch.tensor([3.0, 5.0])).norm(dim=1) < 2.5).float()
    store, kept, seen = make(propagate=times, num_calls=24), [], []
    for _ in range(24):
        maps = (object_ + jitter * torch.rand(2, 3, 96)).clamp(min=0)
        attention = torch.softmax(base + jitter * torch.randn(96, 96), -1)
        prior = store.prior()
        store.add({"0": maps}, {"0": prior["0"] @ attention.T} if prior else None)
        kept.append(maps)
        seen.append(attention)
    ours, theirs = store._propagated["0"][-1].mean(), accumulated(kept, seen, times)
    both = torch.stack([ours.flatten(0, 1), theirs.flatten(0, 1)])
    for mine, other in both.unbind(1):
        assert torch.corrcoef(torch.stack([mine, other]))[0, 1] > least
    raw = torch.corrcoef(torch.stack([kept[0][0, 0], theirs[0, 0]]))[0, 1]
    assert raw < 0.97  # a map that was not propagated is another one
