"""Which backend serves a call, and what the library may know of backends."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import attention, attention_weights
from pallas_kernels.attention.api import BACKENDS
from pallas_kernels.checks.lowering import abstract_h100

ROOT = Path(pallas_kernels.__file__).parents[1]
# Operations, and arithmetic in plain jnp: that of a softmax, for policies with a tally of their own, and that of a pass
# over blocks of pages, for codecs that no kernel knows. What runs on one kind of device is chosen by dispatch alone.
OPEN_TO_THE_LIBRARY = {
    "pallas_kernels",
    "pallas_kernels.softmax",
    "pallas_kernels.paged_attention.blocks",
    "pallas_kernels.paged_attention.reference",
}


def test_every_operation_is_exported() -> None:
    for name in pallas_kernels.__all__:
        assert callable(getattr(pallas_kernels, name))
    folders = {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/api.py")}
    assert folders <= set(pallas_kernels.__all__)


def test_the_library_imports_operations_and_no_backend() -> None:
    found = set()
    for path in sorted((ROOT / "kvjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name for name in names if name.startswith("pallas_kernels")}
            # A name that is itself a module would be one way in.
            if isinstance(node, ast.ImportFrom) and node.module == "pallas_kernels":
                assert {alias.name for alias in node.names} <= set(pallas_kernels.__all__), path
    assert found
    assert found <= OPEN_TO_THE_LIBRARY


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "xla"])
def test_a_backend_without_the_second_pass_leaves_it_to_xla(backend: str) -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 5, heads, 8)), jnp.float32) for heads in (4, 2))
    _, lse = attention(q, k, k, backend="xla")
    options = dict(lse=lse, row_weights=jnp.ones((1, 5)))
    expected = attention_weights(q, k, **options, backend="xla")
    np.testing.assert_array_equal(attention_weights(q, k, **options, backend=backend), expected)
    with pytest.raises(ValueError, match="no backend 'nonsense'"):
        attention_weights(q, k, **options, backend="nonsense")


def test_one_name_serves_both_passes_of_a_prompt() -> None:
    """The first pass is the named kernel, for a machine that is not here, and the second reads its log-sum-exp."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        _, lse = attention(q, k, v, backend="mosaic_gpu")
        return attention_weights(q, k, lse=lse, row_weights=jnp.ones(q.shape[:2]), backend="mosaic_gpu")

    shapes = [jax.ShapeDtypeStruct((1, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    with jax.sharding.use_abstract_mesh(abstract_h100()):
        lowered = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.shape == (1, 2, 128)
