"""own_files.py: what we did not write is not written over, and links are not followed."""

import os

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import SIGN, check_no_link, check_own, unlinked


def test_nothing_and_our_own_may_be_written(tmp_path):
    check_own(tmp_path / "new.png")
    (tmp_path / "ours.png").write_bytes(b"\x89PNG" + SIGN.encode())
    check_own(tmp_path / "ours.png")
    (tmp_path / "table").write_text("x" * 4000 + "mark")
    check_own(tmp_path / "table", "mark")


@pytest.mark.parametrize("data", [b"", b"notes", b"x" * 5000 + SIGN.encode()])
def test_another_s_file_is_refused(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(DiffuMaskError, match="a is there and was not written by this program: move it away"):
        check_own(tmp_path / "a")


def test_folders_links_and_names_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "ours").write_text(SIGN)
    (tmp_path / "link").symlink_to("ours")
    (tmp_path / "broken").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "link", tmp_path / "broken", tmp_path / ("x" * 300)):
        with pytest.raises(DiffuMaskError) as caught:
            check_own(path)
        assert "\n" not in str(caught.value)


def test_a_link_to_a_file_a_folder_or_nothing_is_refused_and_one_to_a_device_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    for number, target in enumerate(["file", ".", "nowhere"]):
        path = tmp_path / f"link{number}"
        path.symlink_to(target)
        with pytest.raises(DiffuMaskError, match="is a link, and writing does not follow links: move it away"):
            check_no_link(path)
    (tmp_path / "null").symlink_to(os.devnull)
    for path in (tmp_path / "null", tmp_path / "file", tmp_path / "new", tmp_path):
        check_no_link(path)


def test_no_part_of_a_path_is_a_link(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "images")
    assert unlinked(tmp_path, "images", "a.png") == tmp_path / "images" / "a.png"
    with pytest.raises(DiffuMaskError, match="elsewhere is a link, and links in data are not followed"):
        unlinked(tmp_path, "elsewhere", "a.png")
