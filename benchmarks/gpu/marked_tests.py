"""The tests marked ``gpu``, by pytest in a process of its own."""

import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.measuring import Measuring, SkippedError
from benchmarks.record import REPOSITORY

# A line of pytest -v: the test, and how it ended.
ENDED = re.compile(r"(?P<test>\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TIMEOUT = 90  # seconds of one test; compiling takes the longest
SHOWN = 60  # lines of pytest's output in the record of a failure


def run_tests(measuring: Measuring) -> None:
    """Run the tests, and report each."""
    measuring.needs_cuda()
    missing = [name for name in ("pytest", "pytest_timeout") if find_spec(name) is None]
    if missing:
        raise SkippedError(f"{' and '.join(missing)} is not installed")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", f"--timeout={TIMEOUT}", "--color=no"]
    command += ["-p", "no:cacheprovider", *map(str, marked_files())]
    measuring.send("begin", {"what": "pytest"})
    lines: list[str] = []
    with subprocess.Popen(  # noqa: S603, RUF100 - the command is this program's own
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pytest:
        start = time.time()
        for test, outcome in outcomes(keep(lines, pytest.stdout or [])):
            if outcome in {"FAILED", "ERROR", "XPASS"}:
                measuring.send("failure", {"what": test, "traceback": "see the section's output"})
            else:
                measuring.send("row", {"what": test, "outcome": outcome.lower(), "s": time.time() - start})
            start = time.time()
    if pytest.returncode != 0:
        measuring.send("failure", {"what": f"exit code {pytest.returncode}", "traceback": "".join(lines[-SHOWN:])})


def marked_files() -> list[Path]:
    """Return the files with tests marked ``gpu``: collecting the others would need their requirements."""
    return sorted(path for path in (REPOSITORY / "tests").rglob("*.py") if "mark.gpu" in path.read_text())


def outcomes(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each test that ended, and how."""
    for line in lines:
        if found := ENDED.match(line):
            yield found["test"], found["outcome"]


def keep(lines: list[str], stream: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a stream, print them, and append them to ``lines``."""
    for line in stream:
        print(line, end="", flush=True)
        lines.append(line)
        yield line
