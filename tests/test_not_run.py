from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SOURCE = """
import pytest, shutil
@pytest.mark.skipif(shutil.which("no-such-compiler") is None, reason="no-such-compiler is absent")
def test_compiles(): pass
def test_reads(): pytest.importorskip("no_such_module")
def test_runs(): pass
"""


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_skipped_tests_are_named_and_fail_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, code: int
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makepyfile(not_run=(Path(__file__).parent / "not_run.py").read_text(encoding="utf-8"), test_some=SOURCE)
    pytester.makeconftest("pytest_plugins = ['not_run']")
    result = pytester.runpytest_subprocess()
    assert result.ret == code
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*not run*", "test_some.py::test_compiles: no-such-compiler is absent"])
    result.stdout.fnmatch_lines(["test_some.py::test_reads: could not import 'no_such_module'*"])


def test_nothing_is_printed_without_a_skip(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    pytester.makepyfile(not_run=(Path(__file__).parent / "not_run.py").read_text(encoding="utf-8"))
    pytester.makepyfile(test_some="def test_runs(): pass")
    pytester.makeconftest("pytest_plugins = ['not_run']")
    result = pytester.runpytest_subprocess()
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*not run*")
