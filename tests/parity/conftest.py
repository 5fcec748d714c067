"""Each case is built, saved by transformers and loaded by kvjax once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvjax.checkpoint import load
from kvjax.model import Model
from tests.parity.cases import Case


@pytest.fixture(scope="session")
def load_case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], tuple[Any, Model]]]:
    """case -> (the transformers model, the kvjax model read from its `save_pretrained` directory)."""
    reason = "parity tests compare with torch and transformers: pip install kvjax[parity]"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @functools.cache
    def pair(case: Case) -> tuple[Any, Model]:
        theirs = case.model()
        path = tmp_path_factory.mktemp(case.name)
        theirs.save_pretrained(path)
        return theirs, load(path, dtype="float32")

    yield pair
    torch.set_num_threads(threads)
