"""A plugin of pytest: a test that hangs fails, with the stacks of all its processes.

pytest-timeout ends the test and prints the stacks of pytest itself. Shortly before,
this plugin aborts the processes that the test has started, and they print theirs.
"""

import sys
import threading

import psutil
import pytest

from helpers import processes

# Seconds for the processes to write their stacks, before pytest-timeout strikes.
EARLIER = processes.WRITING + 1.0
_TIMER = pytest.StashKey[threading.Timer]()
_HANGS = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item, settings):
    """Starts a second clock beside that of pytest-timeout."""
    seconds = max(settings.timeout - EARLIER, 0.0)
    timer = threading.Timer(seconds, _abort_processes, [item])
    timer.daemon = True
    item.stash[_TIMER] = timer
    timer.start()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_cancel_timer(item):
    """Stops it, if there is one: pytest-timeout asks after errors, too."""
    if timer := item.stash.get(_TIMER, None):
        timer.cancel()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test whose processes were aborted fails, even if it takes no notice."""
    report = yield
    if item.stash.get(_HANGS, False) and report.passed:
        report.outcome, report.longrepr = "failed", "its processes were aborted"
    return report


def _abort_processes(item) -> None:
    """Aborts whatever this process has started, directly or not."""
    item.stash[_HANGS] = True
    started = psutil.Process().children(recursive=True)
    print(f"{item.nodeid} hangs, with {len(started)} processes:", file=sys.stderr)
    print(processes.abort(process.pid for process in started), file=sys.stderr)
