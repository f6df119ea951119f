"""report/page.py: one file that needs nothing else, whatever the dataset, and in which texts stay texts."""

import base64
import dataclasses
import hashlib
import json
import re
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import PROGRAM, browser
from samples import contents, draw, requests

from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.dataset.writer import write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augment import augment
from diffumask_fast.learning.options import AugmentOptions
from diffumask_fast.prompts.vocabulary import ClassEntry, Vocabulary
from diffumask_fast.report.options import ReportOptions
from diffumask_fast.report.page import write_report

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> {{script}} \u2028 \\u003c"
ALL = {"sample", "best", "worst", "rejected"}
MODEL = {"id": "mini", "weights": "ab" * 32}


def dataset(folder, num=12, change=lambda sample: sample, shards=None, classes="dog,car", vocabulary=None, **keywords):
    vocabulary = vocabulary or Vocabulary.parse(classes)
    asked = requests(num, classes, **keywords)
    options = {"seed": 1, "nested": {"a": None}}
    with open_run(folder, asked, options, {"torch": "2"}, 5, model=MODEL, vocabulary=vocabulary) as run:
        for index in run.missing_shards()[:shards]:
            run.write_rows(index, [make_row(change(draw(request))) for request in run.requests_of(index)])
    return folder


def rewritten(folder, change):
    """Change rows of the first shard, which is then as an older version wrote it, without a mark."""
    asked = requests(5)
    write_shard(folder, 0, [change(make_row(draw(request))) for request in asked])
    return folder


class Page(HTMLParser):
    """The elements of a page: tag, attributes, text."""

    def __init__(self, path):
        super().__init__()
        self.found = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        self.found.append(["", {}, ""])

    def handle_data(self, text):
        if self.found:
            self.found[-1][2] += text

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def data_of(path):
    (data, script) = Page(path).all("script")
    assert data[0] == {"type": "application/json", "id": "data"} and script[0] == {}
    return json.loads(data[1])


def report(folder, **keywords):
    summary = write_report(ReportOptions(folder, **keywords))
    return summary, data_of(keywords.get("out") or folder / "report.html")


def test_figures_and_pictures_are_in_the_page(tmp_path):
    summary, data = report(dataset(tmp_path, num=23))
    accepted = sum(draw(request).accepted for request in requests(23))
    assert summary == {
        "page": str(tmp_path / "report.html"), "images": 23, "accepted": accepted, "shown": 23, "twins": 0,
    }  # fmt: skip
    assert (data["rows"], data["accepted"], data["missing"], data["damaged"]) == (23, accepted, 0, 0)
    assert {one["name"]: one["images"] for one in data["classes"]} == {"dog": 12, "car": 11}
    assert [one["colour"] for one in data["classes"]] == ["#808080", "#400080"]
    assert data["sizes"] == [[40, 24, 23]] and data["reasons"] == [["too small", 23 - accepted]]
    assert 0.3 < data["background"] < 0.37 and 0.3 < data["ignored"] < 0.37
    keys = {entry["key"] for entry in data["entries"]}
    assert keys == {request.key for request in requests(23)} and data["views"].keys() == ALL
    worst = [min(data["entries"][place]["quality"]) for place in data["views"]["worst"]]
    assert worst == sorted(worst) and len(worst) == accepted
    run = dict(data["run"])
    assert ["id", "mini"] in run["model"] and ["torch", "2"] in run["environment"]
    assert ["nested.a", "not set"] in run["options"]


def test_the_page_names_the_hashes_of_its_style_and_script_and_asks_for_nothing(tmp_path):
    report(dataset(tmp_path))
    page = Page(tmp_path / "report.html")
    (policy,) = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    for kind, text in (("style", page.all("style")[0][1]), ("script", page.all("script")[1][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _, _ in page.found}
    assert not [name for _, a, _ in page.found for name in a if name in ("src", "style") or name.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "report.html").read_text("utf-8"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", page.all("script")[1][1])


def test_hostile_texts_stay_texts(tmp_path):
    vocabulary = Vocabulary((ClassEntry(12, "dog", NASTY), ClassEntry(7, "car", "car")))

    def nasty(sample):
        sample.request = dataclasses.replace(sample.request, prompt=NASTY, negative_prompt=NASTY)
        return dataclasses.replace(sample, accepted=False, reason=NASTY)

    folder = tmp_path / "set"
    asked = [dataclasses.replace(request, prompt=NASTY, negative_prompt=NASTY) for request in requests(3)]
    with open_run(folder, asked, {"a": NASTY}, {NASTY: NASTY}, 5, model={"id": NASTY}, vocabulary=vocabulary) as run:
        run.write_rows(0, [make_row(nasty(draw(request))) for request in asked])
    _, data = report(folder)
    assert data["entries"][0]["prompt"] == data["entries"][0]["negative"] == data["entries"][0]["reason"] == NASTY
    page = Page(folder / "report.html")
    assert len(page.all("script")) == 2 and page.all("img") == [] and page.all("title")[0][1] == "Dataset report"
    assert "<" not in page.all("script")[0][1]


def test_equal_datasets_give_equal_pages(tmp_path):
    for name in ("a", "b"):
        report(dataset(tmp_path / name), out=tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    before = contents(tmp_path)
    report(tmp_path / "a", out=tmp_path / "a.html")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "empty", "link", "broken link", "folder"])
def test_what_is_not_ours_is_not_written_over(tmp_path, kind):
    folder, path = dataset(tmp_path / "set"), tmp_path / "set/report.html"
    if kind in ("file", "empty"):
        path.write_text("<p>mine, about diffumask-fast</p>" if kind == "file" else "")
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "link":
            (tmp_path / "other.html").write_text('content="diffumask-fast report"')
        path.symlink_to(tmp_path / "other.html")
    before = contents(tmp_path)
    with pytest.raises(DiffuMaskError, match="report.html is there and was not written by this program"):
        write_report(ReportOptions(folder))
    assert contents(tmp_path) == before


def test_a_dataset_that_is_not_finished_is_shown_as_far_as_it_is_there(tmp_path):
    _, data = report(dataset(tmp_path, num=12, shards=2))
    assert (data["rows"], data["missing"]) == (10, 1)


def test_what_cannot_be_shown_is_one_sentence(tmp_path):
    with pytest.raises(DiffuMaskError, match="dataset.json is missing: name the folder that generate wrote"):
        write_report(ReportOptions(tmp_path))
    dataset(tmp_path / "none", shards=0)
    with pytest.raises(DiffuMaskError, match="holds no row yet: run the command again that began it"):
        write_report(ReportOptions(tmp_path / "none"))
    mixed = dataset(tmp_path / "mixed")
    write_shard(mixed, 1, [make_row(draw(request)) for request in requests(5, seed=8)], mark="another's")
    with pytest.raises(DiffuMaskError, match="was not written for its place"):
        write_report(ReportOptions(mixed))
    damaged = dataset(tmp_path / "damaged", shards=2)
    (damaged / "data/shard-00001.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DiffuMaskError, match="cannot be read"):
        write_report(ReportOptions(damaged))
    assert not list(tmp_path.rglob("*.html*"))


def plain(sample):
    return dataclasses.replace(sample, maps=None, quality=[1.0] * len(sample.quality), accepted=True, reason="")


def ignored(sample):
    return dataclasses.replace(sample, mask=np.full_like(sample.mask, 255))


def empty(sample):
    return dataclasses.replace(sample, mask=np.zeros_like(sample.mask), accepted=False, reason="nothing is there")


KINDS = {
    "plain": ({"change": plain}, {"sample"}),
    "ignored": ({"change": ignored}, ALL),
    "empty": ({"change": empty}, {"sample", "rejected"}),
    "one class": ({"classes": "dog"}, ALL),
    "one row": ({"num": 1, "change": plain}, {"sample"}),
    "many classes": ({"classes": ",".join(f"c{n}" for n in range(200)), "num": 210}, ALL),
}


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_of_all_kinds(tmp_path, kind):
    keywords, views = KINDS[kind]
    summary, data = report(dataset(tmp_path, **keywords))
    assert data["views"].keys() == views and summary["images"] == len(data["entries"])
    assert any("maps" in entry for entry in data["entries"]) == (keywords.get("change") is not plain)
    if kind == "many classes":
        shown = {number for entry in data["entries"] for number in entry["classes"]}
        assert len(data["classes"]) == len(shown) == 200
    if kind in ("ignored", "empty"):
        assert all(one["seen"] == 0 and one["heat"] is one["area"] is None for one in data["classes"])


def test_an_augmented_dataset_says_how_its_rows_were_made(tmp_path):
    augment(AugmentOptions(dataset(tmp_path / "a"), tmp_path / "b", all=True))
    _, data = report(tmp_path / "b")
    made = [entry for entry in data["entries"] if "made" in entry]
    assert made and all(entry["sources"] for entry in made) and "source" in dict(data["run"])


def test_a_picture_that_does_not_decode_is_said_and_the_rest_is_shown(tmp_path):
    def damage(row):
        return row | {"image": {"bytes": b"x", "path": None}} if row["key"] == "dog-000001" else row

    _, data = report(rewritten(dataset(tmp_path, num=5), damage))
    (place,) = data["views"]["damaged"]
    assert data["damaged"] == 1 and "cannot be decoded" in data["entries"][place]["damaged"] and data["rows"] == 5


def test_a_dataset_at_an_address_is_shown_where_one_says(tmp_path):
    asked = requests(5)
    url = f"memory://{tmp_path.name}/set"
    with open_run(url, asked, {}, {}, 5, vocabulary=Vocabulary.parse("dog,car")) as run:
        run.write(0, [draw(request) for request in asked])
    with pytest.raises(DiffuMaskError, match="is no local folder: say by `out` where the page goes"):
        write_report(ReportOptions(url))
    _, data = report(url, out=tmp_path / "page.html")
    assert data["rows"] == 5
    with pytest.raises(DiffuMaskError, match="nowhere is no folder: make it, or name another place for page.html"):
        write_report(ReportOptions(url, tmp_path / "nowhere/page.html"))


def test_too_many_pixels_are_not_decoded(tmp_path):
    from diffumask_fast.options import ReadOptions

    _, data = report(dataset(tmp_path), reading=ReadOptions(24 * 40 - 1))
    assert data["damaged"] == 12 and data["background"] is None


needs_browser = pytest.mark.skipif(PROGRAM is None, reason="Chromium is absent")


@pytest.fixture
def tab(tmp_path):
    with browser(tmp_path / "profile") as tab:
        yield tab


def awkward(folder):
    """Write a dataset with hostile prompts, a damaged picture, twins, and rows without maps or quality."""
    asked = [dataclasses.replace(request, prompt=NASTY) for request in requests(60, classes_per_image=2)]
    vocabulary = Vocabulary.parse("dog,car")
    with open_run(folder, asked, {NASTY: NASTY}, {}, 60, model={"id": NASTY}, vocabulary=vocabulary) as run:
        rows = [make_row(draw(request, 40, 24 + index % 3)) for index, request in enumerate(asked)]
        rows[3]["image"]["bytes"] = b"x"
        rows[5]["image"] = rows[4]["image"]
        rows[5]["mask"] = rows[4]["mask"]
        rows[6] |= {"maps": [], "map_sizes": [], "quality": []}
        run.write_rows(0, [row | {"reason": NASTY, "accepted": index % 4 > 0} for index, row in enumerate(rows)])
    return folder


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 390])
def test_in_a_browser_nothing_leaves_the_page_and_prompts_stay_texts(tmp_path, tab, width):
    report(awkward(tmp_path / "set"))
    tab.open(tmp_path / "set/report.html", width, dark=width == 390)
    assert tab.run("document.title") == "Dataset report: 60 images of 2 classes"
    assert tab.run("document.querySelectorAll('script').length") == 2
    assert tab.run("document.documentElement.scrollWidth") == width  # nothing sticks out
    for layer in ("map", "none", "mask"):
        tab.run(f"document.querySelector('[name=layer][value={layer}]').click()")
    for view in ("best", "worst", "rejected", "damaged", "sample"):
        tab.run(f"document.querySelector('[name=view][value={view}]').click()")
        assert tab.run("document.querySelectorAll('#grid button').length") > 0
    tab.run("[...document.querySelectorAll('#grid button')].find((one) => one.ariaLabel.includes('rejected')).click()")
    assert NASTY in tab.run("document.getElementById('facts').textContent")
    assert tab.run("[...document.images].every((image) => image.hasAttribute('alt'))")
    assert [address for address in tab.requests if not address.startswith("data:image/")] == [
        (tmp_path / "set/report.html").as_uri()
    ]
    assert tab.problems == []


@needs_browser
@pytest.mark.slow
def test_in_a_browser_a_request_would_be_seen_and_is_refused(tmp_path, tab):
    report(dataset(tmp_path / "set"))
    tab.open(tmp_path / "set/report.html")
    asking = "const one = new Image(); one.onerror = done; one.src = 'http://127.0.0.1:9/x.png'"
    tab.run(f"new Promise((done) => {{ {asking} }})")
    tab.run("document.body.append(Object.assign(document.createElement('p'), {}))")
    tab.run("document.body.lastChild.setAttribute('style', 'color: red')")
    assert any("Content Security Policy" in problem for problem in tab.problems)


@needs_browser
@pytest.mark.slow
def test_in_a_browser_the_keyboard_does_it_all(tmp_path, tab):
    report(dataset(tmp_path / "set", num=60))
    tab.open(tmp_path / "set/report.html")
    label = "document.activeElement.ariaLabel"
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "To the pictures"
    tab.press("Enter")
    for _ in range(20):
        tab.press("Tab")
        if tab.run("document.activeElement.className") == "tile":
            break
    first = tab.run(label)
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("ArrowRight", "ArrowDown", "Home")
    assert tab.run(label) == first
    tab.press("ArrowRight")
    second = tab.run(label)
    assert second != first
    tab.press("Enter")
    assert second.startswith(tab.run("document.getElementById('viewer-title').textContent"))
    tab.press("ArrowLeft")
    assert first.startswith(tab.run("document.getElementById('viewer-title').textContent"))
    tab.press("m")
    over = "getComputedStyle(document.querySelector('#large .over')).opacity"
    assert tab.run(over) == "0"
    tab.press("Escape")
    assert not tab.run("document.getElementById('viewer').open") and tab.run(label) == second
    tab.press("Tab")
    assert tab.run("document.activeElement.id") == "more"
    tab.press("Enter")
    assert tab.run("document.querySelectorAll('#grid button').length") == 60


@needs_browser
@pytest.mark.slow
def test_in_a_browser_filters_and_slider(tmp_path, tab):
    report(dataset(tmp_path / "set", num=60))
    tab.open(tmp_path / "set/report.html")
    tab.run("input = (one, value) => { one.value = value; one.dispatchEvent(new Event('input')) }")
    tab.run("change = (id, value) => input(document.getElementById(id), value)")
    names = "[...document.querySelectorAll('#grid b')].map((one) => one.textContent)"
    tab.run("change('class', '7')")
    assert set(tab.run(names)) == {"car"} and "30 pictures" in tab.run("document.getElementById('count').textContent")
    tab.run("change('low', '0.5'); change('high', '0.75')")
    shown = tab.run("[...document.querySelectorAll('#grid .words span')].map((one) => Number(one.textContent))")
    assert shown and all(0.495 <= value <= 0.755 for value in shown) and len(shown) < 30
    tab.run("change('low', '1')")
    assert tab.run("document.getElementById('count').textContent") == "No picture is like that."
    tab.run("change('low', '0'); change('high', '1')")
    tab.run("input(document.querySelector('.opacity'), 90)")
    assert tab.run("[...document.querySelectorAll('.opacity')].map((one) => one.value)") == ["90", "90"]
    assert tab.run("getComputedStyle(document.querySelector('.over')).opacity") == "0.9"


def many(folder, num):
    """Write a dataset of noise, of which every picture is as large as it can be in a page."""
    asked = requests(num, ",".join(f"c{n}" for n in range(40)))
    made = [make_row(draw(request, 192, 256)) for request in requests(80)]
    with open_run(folder, asked, {}, {}, 500) as run:
        for index in run.missing_shards():
            wanted = [make_row(draw(request, 1, 1)) for request in run.requests_of(index)]
            pictures = [{name: row[name] for name in ("image", "mask")} for row in made]
            run.write_rows(index, [row | pictures[place % 80] for place, row in enumerate(wanted)])
    return folder


@pytest.mark.slow
def test_ten_thousand_rows_are_a_small_page_and_need_no_more_memory(tmp_path):
    peaks = []
    for num in (2000, 10000):
        options = ReportOptions(many(tmp_path / str(num), num))
        tracemalloc.start()
        summary = write_report(options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert summary["images"] == num and summary["shown"] > 100
        assert 10e6 < (options.source / "report.html").stat().st_size < 15e6
    assert peaks[1] < 1.05 * peaks[0], peaks
