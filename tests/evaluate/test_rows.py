"""The list of caches: names become methods, lists become rows, and what means nothing is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvjax import CacheConfig, codecs, policies
from kvjax.errors import ConfigError
from kvjax.evaluate.random_eviction import RandomEviction
from kvjax.evaluate.rows import rows_of

ROOT = Path(__file__).resolve().parents[2]


def rows(path: Path, text: str) -> list[tuple[str, CacheConfig]]:
    file = path / "caches.toml"
    file.write_text(text)
    return [(row.name, row.cache) for row in rows_of(file)]


def test_lists_are_swept_together_and_defaults_hold_everywhere(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        """
        [defaults]
        codec = "dense:bfloat16"
        [[cache]]
        policy = "Full"
        [[cache]]
        policy = { name = "h2o", heavy = [8, 16], recent = [4, 12] }
        [[cache]]
        label = "Int8"
        codec = "Int8"
        page_size = 8
        """,
    )
    half = codecs.Dense("bfloat16")
    assert found == [
        ("Full", CacheConfig(codec=half)),
        ("h2o 8+4", CacheConfig(codec=half, policy=policies.H2O(8, 4))),
        ("h2o 16+12", CacheConfig(codec=half, policy=policies.H2O(16, 12))),
        ("Int8", CacheConfig(codec=codecs.Int8(), page_size=8)),
    ]


def test_a_list_of_one_is_for_all_rows_so_that_an_argument_can_be_a_list(tmp_path: Path) -> None:
    found = rows(tmp_path, '[[cache]]\npolicy = { name = "FastGen", recovery = [0.5, 0.9], special = [[256]] }')
    assert found == [
        ("FastGen 0.5", CacheConfig(policy=policies.FastGen(0.5, special=(256,)))),
        ("FastGen 0.9", CacheConfig(policy=policies.FastGen(0.9, special=(256,)))),
    ]


def test_layers_can_differ(tmp_path: Path) -> None:
    text = """
    [[cache]]
    label = "half"
    overrides = [{ layers = [1, 3], policy = "tova:8" }]
    """
    assert rows(tmp_path, text) == [
        ("half", CacheConfig(overrides=(((1, 3), CacheConfig(policy=policies.TOVA(8))),))),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ('[[cache]]\npolicy = "NoSuch:3"', r"cache\[0\]: policy: 'NoSuch' is unknown; .*RandomEviction.*TOVA"),
        ('[[cache]]\npolicy = "full"\n[[cache]]\ncodec = "int3"', "cache\\[1\\]: codec: 'int3' is unknown"),
        ('[[cache]]\npolcy = "full"', "unknown key 'polcy'; allowed: .*policy"),
        ('[[cache]]\npolicy = { name = "tova", bugdet = [1, 2] }', "TOVA takes no 'bugdet'; it takes budget"),
        ('[[cache]]\npolicy = { name = "h2o", heavy = [1, 2, 3], recent = [1, 2] }', "of one length"),
        ('[[cache]]\npolicy = { name = "tova", budget = [] }', "not empty"),
        ('[[cache]]\npolicy = { name = "h2o", heavy = 3 }', "heavy, recent"),
        ('[[cache]]\npolicy = { budget = 3 }', "needs the name of a policy"),
        ('[[cache]]\npolicy = "tova:0"', "TOVA.budget must be"),
        ('[[cache]]\npolicy = "full"\n[[cache]]\npolicy = "full"', "two rows are called 'full'"),
        ('[cache]\npolicy = "full"', r"no \[\[cache\]\] table"),
        ('caches = 3', "unknown key 'caches'"),
        ('[[cache]]\noverrides = [{ policy = "full" }]', "list of `layers`"),
        ('[[cache]]\noverrides = [{ layers = [0], policy = "none" }]', r"overrides\[0\]: policy: 'none' is unknown"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows(tmp_path, text)


def test_the_repositorys_own_list_names_methods_that_exist_and_the_baseline() -> None:
    found = rows_of(ROOT / "configs" / "evaluate.toml")
    assert found[0].cache.policy == policies.Full()
    assert any(isinstance(row.cache.policy, RandomEviction) for row in found)
