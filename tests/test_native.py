import platform

import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, attend_cpp, native, winograd

OLDER = ["-march=x86-64-v3", "-march=x86-64"] if platform.machine() == "x86_64" else []


@pytest.mark.parametrize("flag", OLDER)
def test_processors_without_the_widest_vectors_get_the_same(flag, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", tuple(flag if "-march" in x else x for x in native.FLAGS))
    older = native.library.__wrapped__()
    monkeypatch.setattr(winograd, "library", lambda: older)
    monkeypatch.setattr(attend_cpp, "library", lambda: older)
    assert older.panel() == 16
    for dtype, limit in ((torch.float32, 5e-6), (torch.bfloat16, 2**-8)):
        image, weight = torch.randn(2, 32, 5, 7).to(dtype), (torch.randn(48, 32, 3, 3) / 17).to(dtype)
        truth = F.conv2d(image.double(), weight.double(), padding=1)
        found = winograd.convolve(image, winograd.transform(weight), None, 48)
        assert relative(found.double(), truth) < limit
        q, k, columns = torch.randn(2, 37, 48).to(dtype), torch.randn(2, 19, 48).to(dtype), torch.rand(1, 19, 3)
        where = {"heads": 2, "first_conditional": 1}
        truth = attend(q.double(), k.double(), k.double(), columns.double(), **where, impl="reference")
        found = attend(q, k, k, columns, **where, impl="cpp")
        assert relative(found[0].double(), truth[0]) < limit and relative(found[1], truth[1]) < 5e-6


def script(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("text, said", [
    ("#!/bin/sh\nexit 3\n", r"\(exit code 3\)"),
    ("#!/bin/sh\necho note >&2; printf 'error: no \\377' >&2; exit 1\n", r"\(error: no .\)"),
    ("\x01", "Exec format error"),
    ("#!/bin/sh\n", "cannot open shared object file"),
])  # fmt: skip
def test_a_compiler_that_fails_is_one_sentence(text, said, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"{script(tmp_path, 'cxx', text)} -m64")
    with pytest.raises(
        DiffuMaskError, match=f"cxx gives no kernels that can be used .*{said}.*: see to the compiler .CXX"
    ):
        native.library.__wrapped__()


def test_without_a_compiler_or_a_temporary_folder(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -m64")
    assert native.compiler() == ["g++", "-m64"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.compiler() == ["g++"]
    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", lambda: open("/no/such/folder"))
    with pytest.raises(DiffuMaskError, match="No such file.*TMPDIR.*`engine=torch`"):
        native.library.__wrapped__()
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with pytest.raises(DiffuMaskError, match="needs a C\\+\\+ compiler.*`engine=torch`"):
        native.library.__wrapped__()
