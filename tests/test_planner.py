"""prompts/planner.py: samples are functions of (seed, class, index)."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest

from diffumask_fast.dataset.shard_check import digest_plan
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.planner import Plan, Recipe, load_scenes, plan
from diffumask_fast.prompts.templates import VIEWS
from diffumask_fast.prompts.vocabulary import Vocabulary

SMALL = Vocabulary.parse("aeroplane,dog,car")
SCENES = ("on the grass", "in the sky")
SEED_OF_DOG_0_IN_RUN_7 = 4018916096146284


def by_key(requests):
    return {request.key: request for request in requests}


def test_classes_in_turn_with_captions_the_world_uses():
    requests = plan(SMALL, 7, scenes=SCENES)
    keys = ["aeroplane-000000", "dog-000000", "car-000000", "aeroplane-000001", "dog-000001", "car-000001"]
    assert [request.key for request in requests] == [*keys, "aeroplane-000002"]
    assert requests[0].prompt in ("a photo of an aeroplane on the grass", "a photo of an aeroplane in the sky")
    assert requests[1].phrases == ("dog",) and requests[1].class_ids == (12,) and requests[1].classes == ("dog",)
    assert requests.dropped == 0


def test_a_sample_depends_on_seed_class_and_index_alone():
    short, long = by_key(plan(SMALL, 5, seed=3)), by_key(plan(SMALL, 60, seed=3))
    assert short.items() <= long.items()
    turned = by_key(plan(Vocabulary.parse("cat,car,dog,aeroplane,bus"), 100, seed=3))
    assert {key: turned[key] for key in long} == long
    other = by_key(plan(SMALL, 60, seed=4))
    assert all(other[key].seed != long[key].seed for key in long)
    assert len({request.seed for request in long.values()}) == 60
    assert {request.prompt for request in long.values()} > {request.prompt for request in short.values()}


def test_is_the_same_in_another_process():
    # a fixed number also guards against a change of the hash, which would change every dataset
    code = (
        "from diffumask_fast.prompts.planner import plan; from diffumask_fast.prompts.vocabulary import Vocabulary;"
        "print(plan(Vocabulary.parse('dog'), 1, seed=7)[0].seed)"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == plan(Vocabulary.parse("dog"), 1, seed=7)[0].seed == SEED_OF_DOG_0_IN_RUN_7


def test_two_classes_are_different_and_joined():
    requests = plan(SMALL, 60, seed=1, classes_per_image=2, scenes=SCENES)
    assert len({request.key for request in requests}) == 60
    assert {request.key.rsplit("-", 1)[0] for request in requests} == {
        f"{a}+{b}" for a in SMALL.names for b in SMALL.names if a != b
    }
    first = next(request for request in requests if request.key.startswith("car+aeroplane-"))
    assert first.prompt.startswith("a photo of a car and an aeroplane ")
    assert first.class_ids == (7, 1) and len(set(first.phrases)) == 2
    assert by_key(plan(SMALL, 9, seed=1, classes_per_image=2, scenes=SCENES)).items() <= by_key(requests).items()


def test_three_classes_read_well():
    prompt = plan(SMALL, 1, classes_per_image=3, scenes=["on the grass"])[0].prompt
    assert prompt in (
        "a photo of an aeroplane, a dog and a car on the grass",
        "a photo of an aeroplane, a car and a dog on the grass",
    )


def test_captions_that_do_not_fit_are_dropped_and_counted():
    requests = plan(SMALL, 30, scenes=SCENES, fits=lambda prompt, phrases: "sky" not in prompt)
    assert requests.dropped == 0 and requests[4] and requests.dropped == 1  # of what was planned
    assert all(request.prompt.endswith("on the grass") for request in requests)
    assert requests.dropped == 3
    with pytest.raises(DiffuMaskError, match="no caption fits aeroplane: .*77 tokens"):
        plan(SMALL, 1, fits=lambda prompt, phrases: False)[0]


def test_scenes_suit_their_classes():
    scenes = {"in the sky": ("aeroplane",), "on the street": ("car", "dog"), "far away": ()}
    prompts = {request.phrases[0]: set() for request in plan(SMALL, 3)}
    for request in plan(SMALL, 90, scenes=scenes):
        prompts[request.phrases[0]].add(request.prompt.split(request.phrases[0])[1].strip())
    assert prompts == {
        "aeroplane": {"in the sky", "far away"},
        "dog": {"on the street", "far away"},
        "car": {"on the street", "far away"},
    }
    pairs = plan(SMALL, 90, classes_per_image=2, scenes=scenes)
    assert all("sky" not in request.prompt for request in pairs)
    assert {request.prompt for request in plan(Vocabulary.parse("zebra"), 40, scenes=scenes)} == {
        f"a photo of a zebra {scene}" for scene in scenes
    }


def test_shipped_scenes_name_classes_of_voc():
    scenes = load_scenes()
    assert {name for names in scenes.values() for name in names} == set(Vocabulary.voc().names)
    assert len(scenes) > 20 and scenes["on the grass"] == ()


def test_any_request_is_planned_without_the_others():
    whole = plan(SMALL, 50, seed=2, classes_per_image=2, scenes=SCENES)
    assert len(whole) == 50 and list(whole) == [whole[index] for index in range(50)]
    last = plan(SMALL, 50, seed=2, classes_per_image=2, scenes=SCENES)[-3:]
    assert last == whole[47:] == tuple(whole)[47:]
    with pytest.raises(IndexError):
        whole[50]


def test_a_recipe_comes_back_from_json():
    for scenes in (None, ["here"], {"in the sky": ["aeroplane"], "far": []}):
        recipe = Recipe(SMALL, 20, 3, 2, scenes=scenes, negative_prompt="blurred")
        again = Recipe.from_json(json.loads(json.dumps(recipe.as_json())))
        assert again == recipe and list(Plan(again)) == list(Plan(recipe))


def test_templates_are_filled_literally(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("5,odd,{scene} {objects} {0} %s\n")
    template = "{objects}, photo"
    assert plan(Vocabulary.from_file(path), 1, templates=[template])[0].prompt == "a {scene} {objects} {0} %s, photo"


PLANS = {
    "de78f008da5c011883f7a6ddf835f5fc1255cd03128a7f48510b86746e546a63": lambda: plan(Vocabulary.voc(), 500),
    "02a3f70fa2e08915bae4faef10c851360336f07ca7eeafa587a9fbeb6a127862": lambda: plan(
        Vocabulary.voc(), 300, seed=7, classes_per_image=2
    ),
    "ad2ac4ebbd0f4d8fec0fcac286a01788b3f5f2df36aa45b22faa06bf209b5e3f": lambda: plan(
        Vocabulary.parse("dog,car,zebra"), 100, seed=2**62, classes_per_image=3, negative_prompt="blurred",
        templates=["{objects}, photo", "a drawing of {objects} {scene}"], scenes=["here", "on the moon"],
    ),
    "d079eba38420ed346c7e5dbaafa80189f9820af2b2b5202149da6730ef756af0": lambda: plan(
        Vocabulary.parse("potted plant,犬,naïve art,x-ray_2"), 200, seed=1, scenes={"in the sky": ["犬"], "far": []}
    ),
    "f09edbcadc26e4f83931c06c121f76fd584a2a7cad3eec9ac20bc021800ea743": lambda: plan(
        Vocabulary.parse("bird,boat"), 150, seed=3, fits=lambda prompt, phrases: "the" not in prompt
    ),
}  # fmt: skip


@pytest.mark.parametrize("sha256", PLANS)
def test_no_version_plans_otherwise(sha256):
    # the hashes of the version that first wrote datasets: another plan could not finish what was begun
    assert digest_plan(PLANS[sha256](), 64).sha256 == sha256


@pytest.mark.parametrize(
    "keywords, word",
    [
        ({"num": 0}, "at least 1"),
        ({"num": -3}, "at least 1"),
        ({"num": 1, "classes_per_image": 4}, "name more classes"),
        ({"num": 1, "classes_per_image": 0}, "`classes_per_image` is 0"),
        ({"num": 1, "templates": ["a photo"]}, "objects"),
        ({"num": 1, "templates": []}, "empty"),
        ({"num": 1, "scenes": []}, "empty"),
    ],
)
def test_refuses(keywords, word):
    with pytest.raises(DiffuMaskError, match=word):
        plan(SMALL, **keywords)


def test_rounds_take_their_classes_in_turn_and_number_them_on():
    rounds = [(2, 1, 1), (0, 3, 1), (1, 0, 0)]
    requests = Plan(Recipe(SMALL, 9, seed=3, rounds=rounds))
    keys = [f"{name}-{index:06d}" for name, index in [
        ("aeroplane", 0), ("dog", 0), ("car", 0), ("aeroplane", 1),
        ("dog", 1), ("car", 1), ("dog", 2), ("dog", 3),
        ("aeroplane", 2),
    ]]  # fmt: skip
    assert [request.key for request in requests] == keys and [requests[i].key for i in range(9)] == keys
    assert by_key(requests).items() <= by_key(plan(SMALL, 60, seed=3)).items()
    assert requests[4:6] == requests[:][4:6] and requests[-1].key == keys[-1]
    again = Recipe.from_json(json.loads(json.dumps(requests.recipe.as_json())))
    assert again == requests.recipe and hash(again) == hash(requests.recipe)
    with pytest.raises(DiffuMaskError, match="`num` is 8 and the rounds have 9 images"):
        Recipe(SMALL, 8, rounds=rounds)


DOG = ClassEntry(12, "dog", "dog", ("puppy",), ("Labrador dog", "red dog", "small puppy", "dog and cat toy", "big dog"))
CAT = ClassEntry(8, "cat", "cat", (), ("grey cat", "cat with a puppy", "black cat"))
KINDS = Vocabulary((DOG, CAT, ClassEntry(7, "car", "car")))


def kind_of(request):
    return request.prompt.removeprefix("a photo of a ").removesuffix(" here")


def test_sub_classes_take_turns():
    vocabulary = Vocabulary((DOG, ClassEntry(7, "car", "car")))
    requests = plan(vocabulary, 2 * 23, seed=5, scenes=["here"])
    kinds = [kind_of(request) for request in requests if request.classes == ("dog",)]
    assert all(set(kinds[start : start + 5]) == set(DOG.sub_classes) for start in range(0, 20, 5))
    assert kinds[:5] != list(DOG.sub_classes) and set(kinds[20:]) == set(kinds[:3])
    assert {kind: request.phrases for kind, request in zip(kinds, requests[::2], strict=True)} == {
        kind: ("puppy",) if "puppy" in kind else ("dog",) for kind in DOG.sub_classes
    }
    assert {request.prompt for request in requests[1::2]} == {"a photo of a car here"}
    assert [kind_of(request) for request in plan(vocabulary, 46, seed=6, scenes=["here"])[::2]] != kinds


@pytest.mark.parametrize("classes_per_image", [1, 2, 3])
def test_any_order_of_work_draws_the_same_sub_classes(classes_per_image):
    settings = dict(seed=3, classes_per_image=classes_per_image, scenes=SCENES)
    whole = list(plan(KINDS, 90, **settings))
    backwards = plan(KINDS, 90, **settings)
    assert [backwards[number] for number in reversed(range(90))] == whole[::-1]
    assert by_key(plan(KINDS, 30, **settings)).items() <= by_key(whole).items()
    turned = Vocabulary((KINDS.entries[2], CAT, replace(DOG, sub_classes=DOG.sub_classes[::-1])))
    assert by_key(plan(turned, 90, **settings)) == by_key(whole)
    again = Recipe.from_json(json.loads(json.dumps(backwards.recipe.as_json())))
    assert again == backwards.recipe and list(Plan(again)) == whole


def test_sub_classes_that_name_another_class_of_the_prompt_are_left_out():
    pairs = plan(KINDS, 400, classes_per_image=2, scenes=["here"])
    of_both = [request for request in pairs if set(request.classes) == {"dog", "cat"}]
    assert of_both and not any(" toy" in request.prompt or "with" in request.prompt for request in of_both)
    with_car = [request.prompt for request in pairs if set(request.classes) == {"dog", "car"}]
    assert any("dog and cat toy" in prompt for prompt in with_car)
    for request in pairs:
        for name, phrase in zip(request.classes, request.phrases, strict=True):
            assert KINDS[name].phrase_in(request.prompt) == phrase


def test_sub_classes_that_do_not_fit_are_dropped_and_counted():
    requests = plan(KINDS, 30, scenes=["here"], fits=lambda prompt, phrases: "red" not in prompt)
    assert requests[0] and requests.dropped == 1
    assert {kind_of(requests[number]) for number in range(0, 30, 3)} == set(DOG.sub_classes) - {"red dog"}
    none = plan(KINDS, 30, scenes=["here"], fits=lambda prompt, phrases: kind_of(Prompt(prompt)) not in DOG.sub_classes)
    assert none[0].prompt == "a photo of a dog here" and none.dropped == 5


class Prompt(NamedTuple):
    prompt: str


def test_sub_classes_that_fit_alone_but_not_together_are_left_out():
    entries = [
        ClassEntry(1, "dog", "dog", sub_classes=("red dog", "very very very large dog")),
        ClassEntry(2, "cat", "cat", sub_classes=("blue cat", "very very very small cat")),
    ]

    def fits(prompt, phrases):
        return all(phrase in " ".join(prompt.split()[:11]) for phrase in phrases)

    plan_of = {count: plan(Vocabulary(entries), 60, classes_per_image=count, fits=fits) for count in (1, 2)}
    for found in plan_of.values():
        assert all(fits(request.prompt, request.phrases) for request in found)
    assert any("large dog" in request.prompt for request in plan_of[1])
    together = {request.prompt.rpartition(" and ")[0] for request in plan_of[2]}
    assert together == {"a photo of a red dog", "a photo of a blue cat"}
    short = plan(Vocabulary(entries), 60, classes_per_image=2, fits=lambda prompt, phrases: True)
    assert any("large dog and a very very very small cat" in request.prompt for request in short)


def test_scenes_that_name_a_class_of_the_run_are_left_out():
    for text, scenes in (("train,bridge", True), ("train", False)):
        prompts = [request.prompt for request in plan(Vocabulary.parse(text), 400)]
        assert any("on a bridge" in prompt for prompt in prompts) != scenes
    only = plan(Vocabulary.parse("train,bridge"), 4, scenes=("on a bridge",))  # there is no other
    assert {request.prompt for request in only} == {"a photo of a train on a bridge", "a photo of a bridge on a bridge"}
    grass = [one for one in Vocabulary.shipped("ade20k")["airplane"].scenes if "grass" in one or "sky" in one]
    assert grass == [] and "on the grass" in Vocabulary.shipped("coco")["airplane"].scenes


def test_a_classs_own_templates_scenes_and_views():
    dog = replace(
        DOG, sub_classes=(), templates=("{view}, {objects} {scene}",), scenes=("in a den",), views=("near", "far")
    )
    requests = plan(Vocabulary((dog, ClassEntry(7, "car", "car"))), 80, scenes=SCENES)
    assert {request.prompt for request in requests[::2]} == {"near, a dog in a den", "far, a dog in a den"}
    assert {request.prompt for request in requests[1::2]} == {f"a photo of a car {scene}" for scene in SCENES}
    pairs = plan(Vocabulary((dog, ClassEntry(7, "car", "car"))), 80, classes_per_image=2, scenes=SCENES)
    assert {request.prompt for request in pairs[::2]} == {
        "near, a dog and a car in a den",
        "far, a dog and a car in a den",
    }
    assert all(request.prompt.startswith("a photo of a car and a dog ") for request in pairs[1::2])
    views = {request.prompt for request in plan(SMALL, 300, templates=["{objects} {view}"])}
    assert "an aeroplane from behind" in views and len(views) == 3 * len(VIEWS)


def test_plurals_and_scripts():
    vocabulary = Vocabulary.parse("people,traffic lights,sheep,собака,犬")
    prompts = [request.prompt for request in plan(vocabulary, 5, scenes=["here"])]
    assert prompts == [
        f"a photo of {words} here" for words in ("people", "traffic lights", "a sheep", "a собака", "a 犬")
    ]


def test_classes_whose_phrases_hold_each_other_share_no_prompt():
    bears = Vocabulary.parse("bear,teddy bear,dog,hot dog")
    pairs = {frozenset(request.classes) for request in plan(bears, 200, classes_per_image=2)}
    assert len(pairs) == 4 and frozenset(("bear", "teddy bear")) not in pairs
    with pytest.raises(DiffuMaskError, match="bear goes with fewer than 2 other classes"):
        plan(bears, 1, classes_per_image=3)[0]


def test_a_million_samples_take_no_memory():
    for number, request in enumerate(plan(Vocabulary.shipped("voc"), 10**6)[:40_000:10]):
        assert request.seed >= 0
        if number == 1000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**12  # KiB
