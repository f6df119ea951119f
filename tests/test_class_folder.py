"""dropin/class_folder.py: the files are, byte for byte, what the paper's program's next scripts read."""

import pickletools
import warnings

import numpy as np

from diffumask_fast.dropin.class_folder import pack_maps, packed_size


def test_old_and_new_numpy_can_read_it():
    data = pack_maps({11: np.ones((512, 512))})
    start = data.index(b"\n") + 1
    opcodes = list(pickletools.genops(data[start:]))
    assert {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"} == {
        "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"
    }  # fmt: skip
    assert not any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in opcodes)
    assert opcodes[0][1] <= 4  # Python 3.8's highest is 5, its NumPy's 4


def test_size_without_unpickling(tmp_path):
    one = np.random.default_rng(0).random((512, 512), np.float32)
    sizes = [len(pack_maps({index: one + index for index in indices})) for indices in ([11], [0], [19, 3], range(20))]
    assert sizes == [packed_size(n) for n in (1, 1, 2, 20)] and sizes[0] < 2.2e6
    path = tmp_path / "x.npy"
    path.write_bytes(pack_maps({4: one, 7: one * 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = np.load(path, allow_pickle=True).item()
    assert (maps[4] == one).all() and (maps[7] == one * 2).all() and not maps[0].any()
