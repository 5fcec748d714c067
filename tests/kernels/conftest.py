"""Interpret mode runs one Python thread per warpgroup, each of which needs a thread of XLA's own to make progress.

XLA takes as many as there are cores, and on two the threads of a kernel wait for one another for ever.
"""

from __future__ import annotations

import os

# Read when the CPU backend starts, which is after all tests are collected.
os.environ.setdefault("NPROC", "16")
