# SPDX-License-Identifier: BSD-3-Clause
"""Run tests of CPython's own suite, in the guest, and write what became of each.

Usage: in_guest.py RESULTS SECONDS NAME...   where a NAME is test.test_poll, test.test_socket.BasicTCPTest, ..., or a pattern
of tests of one module, such as test.test_socket.*TCP*

RESULTS gets a JSON line when a test starts ({"start": ID}) and one when it ends ({"test": ID, "outcome": OUTCOME, "why": ...}):
ok, skip, fail, hang (no end within SECONDS) or crash. A test that hangs or crashes takes its process with it, so the tests run
in a child, and the next child goes on behind it. The suites are not changed; only their own patience is (test.support), as
their --timeout would do it: they run on an emulated processor. Needs Python 3.11 and nothing of this project.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import traceback
import unittest
from collections.abc import Callable
from typing import Any

PATIENCE = {"LOOPBACK_TIMEOUT": 60.0, "INTERNET_TIMEOUT": 60.0, "SHORT_TIMEOUT": 120.0, "LONG_TIMEOUT": 600.0}


class Results(unittest.TestResult):
    """Writes each outcome at once."""

    def __init__(self, path: str, seconds: float, done: set[str]) -> None:
        super().__init__()
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # for the life of the process
        self.seconds = seconds
        self.done = done
        self.failed: list[str] = []

    def write(self, **line: Any) -> None:
        print(json.dumps(line), file=self.file, flush=True)

    def outcome(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        self.write(test=test.id(), outcome=outcome, why=why)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.failed = []
        self.write(start=test.id())
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def stopTest(self, test: unittest.TestCase) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.failed:
            self.outcome(test, "fail", "\n".join(self.failed))
        super().stopTest(test)

    def failure(self, test: unittest.TestCase, err: Any) -> None:
        text = "".join(traceback.format_exception(*err))[-1500:]
        if isinstance(test, unittest.TestCase):
            self.failed.append(text)
        else:  # setUpClass and the like: no test was started
            self.outcome(test, "fail", text)

    def addSuccess(self, test: unittest.TestCase) -> None:
        if not self.failed:
            self.outcome(test, "ok")

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self.failure(test, err)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.failure(test, err)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.failure(test, err)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.outcome(test, "skip", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.outcome(test, "ok")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self.failed.append("unexpected success")


def only(suite: Any, wanted: Callable[[str], Any]) -> unittest.TestSuite:
    """The tests whose names are wanted."""
    left = unittest.TestSuite()
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            left.addTest(only(test, wanted))
        elif wanted(test.id()):
            left.addTest(test)
    return left


def child(path: str, seconds: float, names: list[str]) -> None:
    support: Any = importlib.import_module("test.support")
    for name, value in PATIENCE.items():
        setattr(support, name, value)
    support.use_resources = ["cpu", "network", "subprocess", "walltime"]  # no gigabytes of disk
    done = {line["test"] for line in read(path) if "test" in line}
    suite = unittest.TestSuite()
    for name in names:
        if "*" in name:
            module = unittest.defaultTestLoader.loadTestsFromName(".".join(name.split(".")[:2]))
            suite.addTest(only(module, re.compile(fnmatch.translate(name)).fullmatch))
        else:
            suite.addTest(unittest.defaultTestLoader.loadTestsFromName(name))
    results = Results(path, seconds, done)
    only(suite, lambda test: test not in done).run(results)
    results.write(end=True)


def read(path: str) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    return []


def main(path: str, seconds: str, names: list[str]) -> None:
    while True:
        command = [sys.executable, "-W", "ignore", __file__, "--child", path, seconds, *names]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              start_new_session=True) as process:  # fmt: skip
            _, errors = process.communicate()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what its tests left behind
        lines = read(path)
        if lines and "end" in lines[-1]:
            return
        text = errors.decode(errors="replace")
        if not lines or "start" not in lines[-1]:
            raise SystemExit(f"the tests ended between two of them:\n{text}")
        outcome = "hang" if "Timeout (" in text else "crash"
        with open(path, "a", encoding="utf-8") as out:
            print(json.dumps({"test": lines[-1]["start"], "outcome": outcome, "why": text[-3000:]}), file=out)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    else:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
