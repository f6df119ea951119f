"""Lists the tests that were skipped, by name, at the end of a run; where CI is set, a skipped test fails the run.

A test that needs a tool skips itself in the ordinary way, `skipif(shutil.which("cc") is None, reason="cc is absent")`
or `pytest.importorskip("cv2")`. Tests for a GPU are marked `gpu` and deselected instead.
"""

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `gpu` where there is none, whatever `-m` says."""
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not torch_sees_a_gpu():
        config.hook.pytest_deselected(items=for_gpu)
        items[:] = [item for item in items if item not in for_gpu]


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")


def skipped(reporter: pytest.TerminalReporter) -> list[tuple[str, str]]:
    """Return (test id, reason) of everything skipped; an expected failure is not a skip."""
    return [(report.nodeid, reason_of(report)) for report in reporter.stats.get("skipped", [])]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and in_ci() and skipped(reporter) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    absent = skipped(terminalreporter)
    if absent:
        terminalreporter.section("not run" + (": in CI that is a failure" if in_ci() else ""))
        for name, reason in absent:
            terminalreporter.line(f"{name}: {reason}")
