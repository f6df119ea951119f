import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import session
from diffumask_fast.export.onnx_export import need_exporter
from diffumask_fast.export.session import OnnxSession, runtime

CPU = torch.device("cpu")


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DiffuMaskError, match=r"pip install 'diffumask-fast\[onnx\]'"):
        runtime()


def test_a_library_that_was_half_removed_says_how_to_mend_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(DiffuMaskError, match=r"InferenceSession.*pip uninstall -y onnxruntime onnxruntime-gpu, then"):
        runtime()


@pytest.mark.parametrize("found, named", [(["onnxruntime-gpu"], "[gpu]"), (["onnxruntime"], "[onnx]"), ([], "[onnx]")])
def test_advice_brings_no_second_runtime(monkeypatch, found, named):
    monkeypatch.setattr(session, "installed", lambda: found)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DiffuMaskError, match="pip install") as caught:
        need_exporter()
    assert f"'diffumask-fast{named}'" in str(caught.value)


def test_a_graph_that_two_libraries_in_one_module_cannot_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "installed", lambda: list(session.PACKAGES))
    (tmp_path / "unet.onnx").write_bytes(b"nonsense")
    with pytest.raises(DiffuMaskError, match=r"cannot run .*: pip uninstall -y onnxruntime onnxruntime-gpu, then"):
        OnnxSession(tmp_path / "unet.onnx", CPU)


def test_threads_are_those_of_torch_or_as_told(static_engine):
    graph = static_engine / "vae.onnx"
    assert OnnxSession(graph, CPU)._session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert OnnxSession(graph, CPU, threads=1)._session.get_session_options().intra_op_num_threads == 1


def test_outputs_are_new_tensors_of_the_right_type(static_engine):
    session = OnnxSession(static_engine / "vae.onnx", CPU)
    latents = torch.randn(2, 4, 8, 12)
    first = session.run({"latents": latents}, {"image": (2, 3, 64, 96)})["image"]
    kept = first.clone()
    second = session.run({"latents": latents.half()}, {"image": (2, 3, 64, 96)})["image"]
    assert first.dtype == torch.float32 and first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept) and first.std() > 0


def test_a_file_that_is_no_graph_is_one_sentence(tmp_path):
    (tmp_path / "unet.onnx").write_bytes(b"\x08\x0a nonsense")
    with pytest.raises(DiffuMaskError, match="cannot run .*unet.onnx on cpu .*export it again"):
        OnnxSession(tmp_path / "unet.onnx", CPU)


def test_a_session_that_lost_cuda_is_refused_and_never_draws_on_the_cpu(static_engine, monkeypatch):
    monkeypatch.setattr(OnnxSession, "_providers", lambda self, ort: ["CPUExecutionProvider"])
    with pytest.raises(DiffuMaskError, match="would draw on the CPU: install"):
        OnnxSession(static_engine / "vae.onnx", torch.device("cuda"))


def test_on_cuda_it_runs_on_a_stream_of_its_own(monkeypatch):
    session, own = OnnxSession.__new__(OnnxSession), SimpleNamespace(cuda_stream=7)
    session.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    providers = session._providers(
        SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"], preload_dlls=lambda: None)
    )
    assert providers[0] == ("CUDAExecutionProvider", {"user_compute_stream": "7", "device_id": "1"})
    assert session._stream is own


@pytest.mark.skipif("CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers(),
                    reason="this onnxruntime has CUDA")  # fmt: skip
def test_cuda_without_a_cuda_build_is_refused(static_engine):
    with pytest.raises(DiffuMaskError, match=r"has no CUDA: pip uninstall -y .*diffumask-fast\[gpu\]"):
        OnnxSession(static_engine / "vae.onnx", torch.device("cuda"))
