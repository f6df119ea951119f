"""learning/segmenters.py: every family learns, is kept, and comes back."""

import json

import numpy as np
import pytest
import torch
from learning_samples import dataset, tiny_model
from torch.nn import functional as F

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.evaluation import evaluate, predict
from diffumask_fast.learning.options import EvaluateOptions, LearnOptions, TrainOptions
from diffumask_fast.learning.segmenters import FAMILIES, _nearest, load_segmenter, new_segmenter, normalised
from diffumask_fast.learning.training import train

CLASSES = {0: "background", 7: "car", 12: "dog"}


def images(count=2, height=40, width=72, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("noise") / "data")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_learns_is_kept_and_comes_back(family, noise, tmp_path):
    start = tiny_model(family, tmp_path / "start")
    learning = LearnOptions(segmenter=str(start), steps=2, batch_size=2, lr=1e-3)
    summary = train(TrainOptions(noise, tmp_path / "out", learning=learning, device="cpu"))
    assert summary["steps"] == 2 and summary["loss"] > 0 and list(summary["classes"].values()) == [*CLASSES.values()]
    segmenter = load_segmenter(tmp_path / "out")
    before = new_segmenter(str(start), CLASSES, 64).model.state_dict()
    after = segmenter.model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after if before[name].ndim > 1)
    found = segmenter.predict(images())
    assert found.shape == (2, 3, 40, 72) and found.dtype == torch.float32
    assert torch.allclose(found.sum(1), torch.ones(2, 40, 72), atol=1e-5)
    assert torch.equal(found, load_segmenter(tmp_path / "out").predict(images()))
    assert set(np.unique(segmenter.masks(images()))) <= set(CLASSES)
    assert segmenter.class_ids == {"car": 7, "dog": 12}
    figures = evaluate(EvaluateOptions(str(tmp_path / "out"), noise, device="cpu"))
    assert set(figures["per_class_iou"]) == {"car", "dog"} and 0 <= figures["miou"] <= 1


def test_tiny_has_one_to_two_million_weights():
    segmenter = new_segmenter("tiny", {value: str(value) for value in range(21)}, 128)
    assert 1e6 < sum(part.numel() for part in segmenter.model.parameters()) < 2e6


def test_the_loss_is_the_cross_entropy_of_known_pixels():
    torch.manual_seed(0)
    segmenter = new_segmenter("tiny", CLASSES, 64)
    segmenter.model.eval()
    pixels, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    labels[:, :20] = 255
    logits = F.interpolate(segmenter.model(pixels).logits, (64, 64), mode="bilinear", align_corners=False)
    expected = -logits.log_softmax(1).gather(1, labels.clamp(max=2)[:, None])[:, 0][labels != 255].mean()
    assert segmenter.loss(pixels, labels).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("family", ["mask2former", "eomt"])
def test_an_image_without_a_known_pixel_has_no_part_in_the_loss(family, tmp_path):
    segmenter = new_segmenter(str(tiny_model(family, tmp_path)), CLASSES, 64)
    segmenter.model.eval()
    pixels, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    labels[0] = 255
    torch.manual_seed(1)
    alone = segmenter.loss(pixels[1:], labels[1:])
    torch.manual_seed(1)
    assert segmenter.loss(pixels, labels).item() == alone.item()


def test_probabilities_of_masks_are_transformers_own(tmp_path):
    """Mask2Former's image processor makes the same semantic map."""
    from transformers import Mask2FormerImageProcessor

    segmenter = new_segmenter(str(tiny_model("mask2former", tmp_path)), CLASSES, 64)
    segmenter.model.eval()
    picture = images(1, 64, 64)
    with torch.inference_mode():
        said = segmenter.model(normalised(torch.from_numpy(picture).permute(0, 3, 1, 2)))
    processor = Mask2FormerImageProcessor()
    own = processor.post_process_semantic_segmentation(said, [(64, 64)])[0]
    assert (segmenter.predict(picture).argmax(1)[0] == own).float().mean() > 0.99


def test_normalised_is_that_of_the_models_processor():
    from transformers import SegformerImageProcessor

    picture = images(1, 32, 32)
    own = SegformerImageProcessor(do_resize=False)(picture[0], return_tensors="pt")["pixel_values"]
    assert torch.allclose(normalised(torch.from_numpy(picture).permute(0, 3, 1, 2)), own, atol=1e-5)


def test_a_larger_picture_is_not_seen_through_its_padding():
    segmenter = new_segmenter("tiny", CLASSES, 64)
    segmenter.model.eval()
    picture = images(1, 64, 96)
    assert torch.equal(predict_whole(segmenter, picture), segmenter.predict(picture))
    odd = predict(segmenter, [picture[0, :50, :70], picture[0]])
    assert [mask.shape for mask in odd] == [(50, 70), (64, 96)]


def predict_whole(segmenter, picture):
    pixels = normalised(torch.from_numpy(picture).permute(0, 3, 1, 2))
    with torch.inference_mode():
        logits = segmenter.model(pixels).logits
        return F.interpolate(logits, picture.shape[1:3], mode="bilinear", align_corners=False).softmax(1)


def test_what_is_no_segmenter_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DiffuMaskError, match="nobody/nothing is no segmenter that can be loaded .*hub id with a conn"):
        new_segmenter("nobody/nothing", CLASSES, 64)
    with pytest.raises(DiffuMaskError, match="no class to learn beside the background"):
        new_segmenter("tiny", {0: "background"}, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DiffuMaskError, match="is a bert model: give tiny"):
        new_segmenter(str(tmp_path), CLASSES, 64)
    with pytest.raises(DiffuMaskError, match="is no segmenter: name mini-oracle, or a folder that train wrote"):
        load_segmenter(tmp_path)
    (tmp_path / "segmenter.json").write_text("{")
    with pytest.raises(DiffuMaskError, match="segmenter.json is damaged"):
        load_segmenter(tmp_path)


def test_a_pickle_is_not_loaded(tmp_path):
    folder = tiny_model("segformer", tmp_path / "a", labels=3)
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DiffuMaskError, match="no segmenter that can be loaded .*safetensors"):
        new_segmenter(str(folder), CLASSES, 64)


def test_labels_of_eomts_one_size_are_those_of_the_nearest_pixels():
    labels = torch.arange(6).expand(1, 6, 6)
    assert _nearest(labels, 4)[0, 0].tolist() == [0, 2, 3, 5] and _nearest(labels, 4).dtype == torch.int64


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_not_as_train_wrote_them(name, tmp_path):
    start = tiny_model("segformer", tmp_path / "start")
    new_segmenter(str(start), CLASSES, 64).save(tmp_path / "a", {})
    new_segmenter(str(start), CLASSES, 64).save(tmp_path / "b", {})  # its head begins anew
    assert load_segmenter(tmp_path / "a").predict(images()).shape[1] == 3
    path = tmp_path / "a" / name
    if name == "config.json":  # the weights would fit, and so would no sentence be said
        path.write_text(path.read_text().replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 1.0'))
    else:
        path.write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(DiffuMaskError, match=f"{name} is not as train wrote it: bring it back, or train"):
        load_segmenter(tmp_path / "a")
    path.unlink()
    with pytest.raises(DiffuMaskError, match=f"{name} is not as train wrote it"):
        load_segmenter(tmp_path / "a")


def test_a_head_of_other_classes_begins_anew_and_that_is_told(tmp_path, caplog):
    torch.manual_seed(0)
    first = new_segmenter(str(tiny_model("segformer", tmp_path / "start")), CLASSES, 64)
    first.save(tmp_path / "first", {})
    others = {0: "background", 3: "dog", 5: "car"}  # as many, in another order
    heads = [new_segmenter(str(tmp_path / "first"), CLASSES, 64).model]
    assert caplog.messages == []
    heads.append(new_segmenter(str(tmp_path / "first"), others, 64).model)
    assert [text.partition("first ")[2] for text in caplog.messages] == [
        "has other classes than the data: its last layer, which tells them, begins anew"
    ]
    kept, anew = (
        torch.equal(head.decode_head.classifier.weight, first.model.decode_head.classifier.weight) for head in heads
    )
    assert kept and not anew
    body = (model.decode_head.linear_fuse.weight for model in (first.model, heads[1]))
    assert torch.equal(*body)


@pytest.mark.parametrize(
    ("family", "name"), [("segformer", "semantic_loss_ignore_index"), ("upernet", "loss_ignore_index")]
)
def test_a_model_that_ignored_another_label_ignores_255(family, name, tmp_path):
    start = tiny_model(family, tmp_path)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {name: 0}))
    segmenter = new_segmenter(str(start), CLASSES, 64)
    labels = torch.full((2, 64, 64), 255)
    labels[:, :32] = 0
    assert segmenter.loss(torch.randn(2, 3, 64, 64), labels).item() > 0.1


def test_many_classes_are_predicted_in_small_batches(monkeypatch):
    segmenter = new_segmenter("tiny", CLASSES, 64)
    segmenter.model.eval()
    sizes = []
    segmenter.model.register_forward_pre_hook(
        lambda model, args, words: sizes.append(len(words["pixel_values"])), with_kwargs=True
    )
    whole = segmenter.masks(images(5))
    monkeypatch.setattr("diffumask_fast.learning.segmenters.PROBABILITIES", 2 * 3 * 40 * 72)
    assert (segmenter.masks(images(5)) == whole).mean() > 0.999 and sizes == [5, 2, 2, 1]
