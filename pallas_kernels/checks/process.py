"""Processes that answer questions, one line each: one that hangs or crashes costs only its question."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO

START_SECONDS = 120.0
"""What a process may take to start."""
_READY = "ready"


class Lost(Exception):
    """The process hung or ended instead of answering; it is gone now, and the next question starts another."""


class Process:
    """`python -m MODULE ARGUMENTS`, started by the first question and again after it was lost."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread()

    def __enter__(self) -> Process:
        """Starts nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self.close()

    @property
    def running(self) -> bool:
        """Whether it has been started and not lost."""
        return self._process is not None

    def ask(self, question: str, seconds: float) -> str:
        """The answer to a line.

        Raises:
          Lost: there was none within `seconds`, or the process ended.
        """
        try:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(question + "\n")
            process.stdin.flush()
            return self._line(process, seconds)
        except BrokenPipeError:
            self.close()
            raise Lost("its process ended") from None
        except Lost:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, at once."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            self._reader.join()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                # What was not read by a process that is gone is nobody's loss.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self._environment,
            )
            assert process.stdout is not None
            self._process, self._lines = process, queue.SimpleQueue()
            self._reader = threading.Thread(target=_read, args=(process.stdout, self._lines), daemon=True)
            self._reader.start()
            # Libraries may print while they are imported.
            while self._line(process, START_SECONDS) != _READY:
                pass
        return self._process

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise Lost(f"no answer after {seconds:g} s") from None
        if line is None:
            raise Lost(f"its process ended with {process.wait()}")
        return line


def _read(source: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in source:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _end_with(parent: int) -> None:
    """Ends this process, whatever it waits for, once the one that asks has gone: a hung kernel would keep the GPU."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def answering() -> Iterator[tuple[IO[str], IO[str]]]:
    """The process's own side: where questions come from, and where answers go; whatever else is printed does not."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr
    print(_READY, file=answers, flush=True)
    yield sys.stdin, answers
