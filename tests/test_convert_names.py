"""convert/names.py: no key, class name or file name leads out of the folder."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffumask_fast.convert.names import check_classes, file_stem, inside, key_of
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import is_file_stem

HOSTILE = ("../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "", ".", "..", "-x", " x", "a\nb", "x" * 201, "c:d", "\ud800")


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_keys_are_refused(key):
    with pytest.raises(DiffuMaskError, match="is no safe file name"):
        file_stem(key)


def test_stems_hold_no_dot():
    assert file_stem("dog+traffic-light-000042.blur-0") == "dog+traffic-light-000042+blur-0"


@pytest.mark.parametrize(
    "name", ["a:b", "../x", "a/b", "two  spaces", "x\ny", "background", "", "'); import os", "x" * 81]
)
def test_hostile_class_names_are_refused(name):
    with pytest.raises(DiffuMaskError):
        check_classes({0: "background", 3: name})


def test_a_class_that_would_be_taken_for_ignored_pixels_is_refused():
    with pytest.raises(DiffuMaskError, match="'ignored' cannot be a class, for formats call pixels so"):
        check_classes({0: "background", 3: "ignored"})


def test_class_names_may_have_spaces():
    check_classes({0: "background", 3: "traffic light", 254: "wall-other_2", 7: "Straße"})


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=300), st.integers(0, 10**6))
def test_any_name_becomes_a_key(name, number):
    try:
        key = key_of(name, number)
    except DiffuMaskError as error:
        assert "no readable text" in str(error)
    else:
        assert is_file_stem(key, "_-+.") and key in (name, key) and file_stem(key)


@pytest.mark.parametrize("name", [*HOSTILE[:3], *HOSTILE[3:8], "a/../b", "a//b", "./a", "a/.", 3, None, ["a"]])
def test_files_outside_are_refused(tmp_path, name):
    if name == "a/b":
        assert inside(tmp_path, name) == tmp_path / "a" / "b"
        return
    with pytest.raises(DiffuMaskError, match="is no name of a file in"):
        inside(tmp_path, name)


def test_links_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(DiffuMaskError, match="link is a link"):
        inside(tmp_path, "link/passwd")
