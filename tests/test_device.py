import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.device import resolve_device, resolve_dtype


def test_dtype_and_device():
    assert resolve_dtype(None, torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.float16
    assert resolve_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(DiffuMaskError, match="no dtype int8"):
        resolve_dtype("int8", torch.device("cpu"))
    if not torch.cuda.is_available():
        assert resolve_device(None).type == "cpu"
        with pytest.raises(DiffuMaskError, match="no CUDA device"):
            resolve_device("cuda")
