"""convert/pickled_maps.py: arrays, and nothing that a pickle could do besides."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffumask_fast.convert.pickled_maps import read_maps
from diffumask_fast.dropin.class_folder import pack_maps
from diffumask_fast.errors import DiffuMaskError

MAPS = {number: np.random.default_rng(number).random((6, 9), np.float32) for number in range(20)}


def npy(pickled, descr="|O", shape=()):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + pickled


def written(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, ">f4"])
def test_what_numpy_saves_is_read(tmp_path, kind):
    maps = {number: array.astype(kind) for number, array in MAPS.items()}
    maps[3] = np.asfortranarray(maps[3])
    np.save(tmp_path / "x.npy", maps)
    found = read_maps(tmp_path / "x.npy")
    assert list(found) == list(range(20)) and all(array.dtype == np.float32 for array in found.values())
    assert all((found[number] == maps[number].astype(np.float32)).all() for number in maps)


def test_what_the_drop_in_writes_is_read(tmp_path):
    truth = np.random.default_rng(0).random((512, 512), np.float32)
    found = read_maps(written(tmp_path / "x.npy", pack_maps({4: truth})))
    assert len(found) == 20 and (found[4] == truth).all() and not found[5].any()


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "call", [(os.system, "touch HACKED"), (eval, "open('HACKED', 'w')"), (np.load, "x", None, True)]
)
def test_code_is_not_run(tmp_path, monkeypatch, protocol, call):
    monkeypatch.chdir(tmp_path)
    for value in (Runs(*call), {0: Runs(*call)}, np.array({0: Runs(*call)}, object)):
        with pytest.raises(DiffuMaskError, match="is no dictionary of maps and nothing else"):
            read_maps(written(tmp_path / "x.npy", npy(pickle.dumps(value, protocol))))
    assert not (tmp_path / "HACKED").exists()


def pickled(value):
    return pickle.dumps(np.array(value, dtype=object), protocol=3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(b""),
        npy(b"."),
        npy(b"\x80\x03" + b"r" + struct.pack("<I", 2**31) + b"."),  # a place that would take gigabytes
        npy(b"\x80\x03" + b"B" + struct.pack("<I", 2**31 - 1) + b"."),
        npy(b"\x80\x03" + b"N0" * 6000 + b"N."),
        npy(pickled({0: MAPS[0]})[:2] + b"N0" + pickled({0: MAPS[0]})[2:]),  # a step that no array takes
        npy(pickled({})),
        npy(pickled([MAPS[0]])),
        npy(pickled({0: 5})),
        npy(pickled({"0": MAPS[0]})),
        npy(pickled({-1: MAPS[0]})),
        npy(pickled({0: MAPS[0], 1: MAPS[1][:3]})),
        npy(pickled({0: np.zeros(4, np.float32)})),
        npy(pickled({0: np.zeros((2, 2), np.int64)})),
        npy(pickled({0: np.zeros((2, 0), np.float32)})),
        npy(pickled({0: np.array([[None]], object)})),
        npy(pickle.dumps({0: MAPS[0]}, 3)),
        npy(pickled({0: MAPS[0]}), shape=(2,)),
        npy(np.zeros(4).tobytes(), "<f8", (4,)),
        npy(pickled({0: MAPS[0]}))[:-9],
    ],
)
def test_anything_else_is_one_sentence(tmp_path, data):
    with pytest.raises(DiffuMaskError, match="is no dictionary of maps and nothing else") as error:
        read_maps(written(tmp_path / "x.npy", data))
    assert "\n" not in str(error.value)


def test_missing_and_too_large(tmp_path):
    with pytest.raises(DiffuMaskError, match="No such file"):
        read_maps(tmp_path / "x.npy")
    with pytest.raises(DiffuMaskError, match="more than 100 bytes"):
        read_maps(written(tmp_path / "x.npy", bytes(101)), most_bytes=100)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_pickles_are_maps_or_one_sentence(tmp_path, data):
    content = bytearray(npy(pickled({number: MAPS[number][:2, :2] for number in (0, 1)})))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        found = read_maps(written(tmp_path / "x.npy", bytes(content)))
        assert all(array.ndim == 2 for array in found.values())
    except DiffuMaskError as error:
        assert "\n" not in str(error)
