"""What the documentation shows runs as it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
RUNS = ("attention_variants", "converting", "finetuning", "forks_and_snapshots")
"""Pages whose Python blocks, one after another, are a program."""


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNS)
def test_the_examples_of_a_page_run(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
