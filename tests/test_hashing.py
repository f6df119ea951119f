import hashlib
import json
import shutil

import pytest

from diffumask_fast.models.hashing import before_calibration, weight_hash


def test_the_hash_sees_every_weight(tiny_folder, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    before = weight_hash(copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weight_hash(copy) != before


@pytest.mark.parametrize("own", [None, {"classes": ["dog"]}])
def test_a_model_that_was_calibrated_is_the_same_model(tiny_folder, tmp_path, own):
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    file, sha256 = copy / "diffumask.json", ""
    if own is not None:
        file.write_text(json.dumps(own))
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    before = weight_hash(copy)
    assert before_calibration(file) == sha256
    for threshold in (0.4, 0.5):  # and once more
        known = {**(own or {}), "mask": {"threshold": threshold}}
        file.write_text(json.dumps({**known, "calibration": {"before_sha256": before_calibration(file)}}))
        assert weight_hash(copy) == before
    for calibration in ({}, {"before_sha256": "x"}, 3):  # nothing that says what was there before
        file.write_text(json.dumps({"mask": {}, "calibration": calibration}))
        assert weight_hash(copy) != before
