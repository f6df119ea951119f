import shutil

from diffumask_fast.models.hashing import weight_hash


def test_the_hash_sees_every_weight(tiny_folder, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    before = weight_hash(copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weight_hash(copy) != before
