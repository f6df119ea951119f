"""dataset/card.py: the hub's libraries read the card, and nobody's README.md is lost."""

import dataclasses
import logging

import pytest
from huggingface_hub import DatasetCard
from samples import contents, draw, requests

from diffumask_fast.dataset.card import kind_of, write_card
from diffumask_fast.dataset.folder import open_folder
from diffumask_fast.dataset.licence import Licence, licence_of
from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.dataset.storage import place
from diffumask_fast.prompts.vocabulary import Vocabulary

MODEL = {"id": "owner/some_model", "weights": "ab" * 32}
OPEN = Licence("other", "some-licence", "https://a.b/c")


def dataset(folder, num=7, classes="dog,pottedplant", model=MODEL, options=None):
    asked = requests(num, classes)
    vocabulary = Vocabulary.parse(classes)
    with open_run(folder, asked, options or {"seed": 3}, {}, 4, model=model, vocabulary=vocabulary) as run:
        for index in run.missing_shards():
            run.write_rows(
                index, [make_row(dataclasses.replace(draw(r), drawn=bool(model))) for r in run.requests_of(index)]
            )
    return folder


def test_the_hubs_library_reads_the_front_matter(tmp_path):
    write_card(dataset(tmp_path), OPEN)
    card = DatasetCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    known = card.data.to_dict()
    assert (known["license"], known["license_name"], known["license_link"]) == OPEN
    assert known["task_categories"] == ["image-segmentation"] and known["size_categories"] == ["n<1K"]
    assert "synthetic" in known["tags"] and known["pretty_name"] == "7 images with masks of 2 classes"
    assert known["configs"][0]["data_files"] == [{"split": "train", "path": "data/shard-*.parquet"}]
    assert [feature["name"] for feature in known["dataset_info"]["features"]][:3] == ["key", "image", "mask"]
    assert "hf upload OWNER/NAME . --repo-type dataset" in card.content and "some-licence" in card.content


def test_datasets_opens_the_folder_and_takes_the_shards_alone(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = dataset(tmp_path / "set")
    write_card(folder, Licence())
    (folder / "preview.png").write_bytes(make_row(draw(requests(1)[0]))["image"]["bytes"])
    (folder / "other.parquet").write_bytes(b"nonsense")
    data = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 7 and data[0]["key"] == "dog-000000" and data[0]["image"].size == data[0]["mask"].size
    assert list(data[0]["map_sizes"]) == [[3, 5]] and data[1]["classes"] == ["pottedplant"]


def test_figures_are_those_of_the_rows(tmp_path):
    folder = dataset(tmp_path, num=40)
    write_card(folder, Licence())
    text = (folder / "README.md").read_text("utf-8")
    rejected = sum(request.seed % 3 == 0 for request in requests(40, "dog,pottedplant"))
    assert 0 < rejected and f"{40 - rejected} of them are accepted; the rejected" in text
    assert f"| too small | {rejected} |" in text and "| 12 | dog | 20 |" in text and "| seed | 3 |" in text
    assert "| licence | unknown: see the model |" in text and "<code>owner/some\\_model</code>" in text


def test_equal_datasets_have_equal_cards(tmp_path):
    for name in ("a", "b"):
        write_card(dataset(tmp_path / name), OPEN)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    before = contents(tmp_path / "a")
    write_card(tmp_path / "a", OPEN)
    assert contents(tmp_path / "a") == before


def test_what_no_model_drew_is_not_called_synthetic(tmp_path):
    write_card(dataset(tmp_path, model=None), Licence())
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "synthetic" not in text and "No model of this program drew the images" in text


@pytest.mark.parametrize("change", ["another's", "edited", "appended", "another line end", "link", "folder"])
def test_a_card_that_is_not_as_we_wrote_it_is_left(tmp_path, caplog, change):
    folder = dataset(tmp_path / "set")
    write_card(folder, OPEN)
    path = folder / "README.md"
    data = path.read_bytes()
    if change in ("link", "folder"):
        path.rename(tmp_path / "elsewhere") if change == "link" else path.unlink()
        path.symlink_to(tmp_path / "elsewhere") if change == "link" else path.mkdir()
    else:
        changes = {"another's": b"mine", "edited": data.replace(b"other", b"mit"), "appended": data + b"mine"}
        path.write_bytes(changes.get(change, data.replace(b"\n", b"\r\n")))
    before = contents(tmp_path)
    with caplog.at_level(logging.WARNING, "diffumask_fast"):
        write_card(folder, Licence())
    assert contents(tmp_path) == before and "it is left, and no card is written" in caplog.text


def test_a_card_at_an_address(tmp_path):
    url = place(f"memory://{tmp_path.name}/set")
    write_card(dataset(url), OPEN)
    before = (url / "README.md").read_bytes()
    assert b"license_name" in before and licence_of(url) == OPEN
    (url / "README.md").put(before + b"mine")
    write_card(url, Licence())
    assert (url / "README.md").read_bytes() == before + b"mine"


def test_the_loras_in_the_model_are_named(tmp_path):
    files = ["style.safetensors:0.8", "owner/name/a_b.safetensors:-1.0"]
    known = {"lora": files, "lora_sha256": {"style.safetensors": "ef"}}
    write_card(dataset(tmp_path, options=known), OPEN)
    text = (tmp_path / "README.md").read_text("utf-8")
    rest = "licence unknown: see where it is from |"
    assert f"| LoRA in it | <code>style.safetensors</code>, scale 0.8, SHA-256 <code>ef</code>, {rest}" in text
    assert rf"<code>owner/name/a\_b.safetensors</code>, scale -1.0, SHA-256 <code>unknown</code>, {rest}" in text


def test_hostile_texts_stay_texts(tmp_path):
    nasty = "<script>alert(1)</script> | `a` \n---\n[x](http://a.b) $x$"
    write_card(dataset(tmp_path, options={"scheduler": nasty, "nested": {"a|b": [nasty]}}, model={"id": nasty}), OPEN)
    card = DatasetCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert r"\<script\>alert(1)\</script\> \| \`a\` --- \[x\](http://a.b) \$x\$" in card.content
    assert "<script" not in card.content.replace(r"\<script", "") and "| nested.a\\|b |" in card.content


def test_kinds_of_reasons():
    assert (
        kind_of("pottedplant covers 0.3% of it, less than 5", ["plant", "pottedplant"])
        == "… covers … of it, less than …"
    )
    assert kind_of("the catalogue has cat 2", ["cat"]) == "the catalogue has … …"


def test_a_card_is_no_part_of_the_data(tmp_path):
    folder = dataset(tmp_path)
    write_card(folder, OPEN)
    with open_folder(folder) as place:
        assert place.begun() is not None
