"""dataset/licence.py: what a card says, and nothing that it does not say."""

import pytest

from diffumask_fast import mini
from diffumask_fast.dataset.licence import Licence, licence_of


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\nbody", Licence("mit")),
        ('---\r\ntags:\r\n- a\r\nlicense: "apache-2.0"\r\n---\r\n', Licence("apache-2.0")),
        (
            "---\nlicense: other\nlicense_name: x-1\nlicense_link: LICENSE.md\n---\n",
            Licence("other", "x-1", "LICENSE.md"),
        ),
        ("---\nlicense_name: x\n---\n", Licence()),
        ("---\ntags: [a]\n---\nlicense: mit\n---\n", Licence()),
        ("license: mit\n", Licence()),
        ("---\nlicense: <script>\n---\n", Licence()),
        ("---\nlicense:\n- mit\n---\n", Licence()),
    ],
)
def test_the_front_matter_alone_is_read(tmp_path, text, licence):
    (tmp_path / "README.md").write_text(text, encoding="utf-8", newline="")
    assert licence_of(tmp_path) == licence


def test_no_card_or_none_that_can_be_read_is_unknown(tmp_path):
    assert licence_of(None) == licence_of(tmp_path) == licence_of(tmp_path / "nowhere") == Licence("unknown")
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) == Licence()


def test_the_embedded_model_has_one():
    assert str(licence_of(mini.folder())) == "apache-2.0"
