import json
import shutil

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.manifest import (
    check_build,
    check_runtime,
    check_sources,
    hash_files,
    read_manifest,
    versions,
)
from diffumask_fast.models.hashing import weight_hash


@pytest.fixture
def copy(static_engine, tmp_path):
    return shutil.copytree(static_engine, tmp_path / "engine")


def change(folder, **fields):
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read_limits(folder):
    return json.loads((folder / "engine.json").read_text())["limits"]


def test_the_manifest_says_what_the_engine_is(static_engine, mini_engine, tiny_folder):
    manifest = read_manifest(static_engine)
    assert set(manifest.parts) == {"unet", "text_encoder", "vae"}
    assert manifest.files == hash_files(static_engine) and "unet.onnx.data" in manifest.files
    assert manifest.sources["unet/config.json"] and manifest.versions == versions()
    assert manifest.limits.rows == (4, 4) and manifest.limits.propagated == () and manifest.limits.max_phrases == 2
    assert manifest.limits.divisors == {"0": 1, "1": 2, "2": 4}
    assert str(tiny_folder.parent) not in (static_engine / "engine.json").read_text()
    assert read_manifest(mini_engine).limits.rows == (1, 8) and read_manifest(mini_engine).model == "mini"


def test_the_hash_is_of_what_decides(copy):
    before = read_manifest(copy).sha256
    change(copy, checked={}, model="another name")
    assert read_manifest(copy).sha256 == before
    for field, value in (("dtype", "fp16"), ("limits", read_manifest(copy).limits.as_json() | {"max_phrases": 3})):
        kept = json.loads((copy / "engine.json").read_text())[field]
        change(copy, **{field: value})
        assert read_manifest(copy).sha256 != before
        change(copy, **{field: kept})
    assert read_manifest(copy).sha256 == before


def test_a_cut_off_or_altered_file_is_refused(copy):
    graph = copy / "unet.onnx.data"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-8])
    with pytest.raises(DiffuMaskError, match="unet.onnx.data is cut off or altered: export the model again"):
        read_manifest(copy)
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DiffuMaskError, match="cut off or altered"):
        read_manifest(copy)
    graph.unlink()
    with pytest.raises(DiffuMaskError, match="unet.onnx.data is missing"):
        read_manifest(copy)


def test_a_folder_inside_the_engine_changes_nothing(copy):
    (copy / "dataset").mkdir()
    assert read_manifest(copy).files == hash_files(copy)


def test_a_damaged_manifest_is_refused(copy):
    text = (copy / "engine.json").read_text()
    without_files = json.dumps(json.loads(text) | {"files": {}})
    without_parts = json.dumps(json.loads(text) | {"parts": {}})
    for broken in (text[:-20], "[]", "{}", text.replace('"rows"', '"row"'), without_files, without_parts):
        (copy / "engine.json").write_text(broken)
        with pytest.raises(DiffuMaskError, match="engine.json is damaged"):
            read_manifest(copy)


def test_a_folder_that_is_no_engine_is_refused(tiny_folder, tmp_path):
    for folder in (tiny_folder, tmp_path / "nowhere"):
        with pytest.raises(DiffuMaskError, match="is no exported engine"):
            read_manifest(folder)


def test_an_engine_of_another_version_is_refused(copy):
    change(copy, versions={**versions(), "diffumask_fast": "0.0.9"})
    with pytest.raises(DiffuMaskError, match="written by diffumask-fast 0.0.9 and this is"):
        read_manifest(copy)
    old = read_limits(copy)
    old["columns"] = old.pop("max_phrases")
    for number, limits in ((1, old), (99, read_limits(copy))):
        change(copy, versions=versions(), format=number, limits=limits)
        words = f"has format {number}, and this program reads 2: export the model again"
        with pytest.raises(DiffuMaskError, match=words):
            read_manifest(copy)


def test_an_older_runtime_is_refused_and_a_newer_one_is_not(copy):
    change(copy, versions={**versions(), "onnxruntime": "1.32.0"})
    manifest = read_manifest(copy)
    for version in ("1.9.0", "1.31.1"):
        with pytest.raises(DiffuMaskError, match=f"checked with onnxruntime 1.32.0 and {version} is older"):
            check_runtime(manifest, version, copy)
    for version in ("1.32.0", "1.32.1+cu130", "2.0"):
        check_runtime(manifest, version, copy)


def test_another_library_or_gpu_than_it_was_built_for_is_refused(copy):
    change(copy, engine="tensorrt", target="9.0")
    manifest = read_manifest(copy)
    manifest.versions["tensorrt"] = "11.4.0"
    check_build(manifest, copy, "11.4.0", "9.0")
    with pytest.raises(DiffuMaskError, match="built by tensorrt 11.4.0 and 11.5.0 is installed"):
        check_build(manifest, copy, "11.5.0", "9.0")
    with pytest.raises(DiffuMaskError, match="compute capability 9.0 and the one here has 8.9"):
        check_build(manifest, copy, "11.4.0", "8.9")
    with pytest.raises(DiffuMaskError, match="there is none here.*`engine=torch`"):
        check_build(manifest, copy, "11.4.0", None)


def test_other_weights_are_refused_and_absent_ones_are_not(copy, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    manifest = read_manifest(copy)
    assert check_sources(manifest, model, copy) == weight_hash(model)
    whole = weight_hash(model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DiffuMaskError, match="other weights than .*unet/diffusion_pytorch_model.safetensors differs"):
        check_sources(manifest, model, copy)
    weights.unlink()
    assert check_sources(manifest, model, copy) == whole
    (model / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert check_sources(manifest, model, copy) != whole
