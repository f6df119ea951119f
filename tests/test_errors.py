"""errors.py: a sentence names parameters, the command line writes them as flags."""

from diffumask_fast.errors import DiffuMaskError


def test_parameters_become_flags():
    error = DiffuMaskError("`shard_size` is 0; `engine=onnx` needs `engine_path`, a folder of `Other` or `a b`")
    assert error.as_flags() == "--shard-size is 0; --engine onnx needs --engine-path, a folder of `Other` or `a b`"
    assert error.as_flags("_").startswith("--shard_size is 0; --engine onnx needs --engine_path")
