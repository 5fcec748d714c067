"""The rules of the house, read from the source: who imports whom, what is documented, what must not be in a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("kvjax", "pallas_kernels", "scripts") for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "docs/**/*.md", "docs/**/*.json", "configs/*.toml",
                    "kvjax/**/*.py", "pallas_kernels/**/*.py", "scripts/*.py", "tests/**/*.py")
    for path in ROOT.glob(pattern)
    if path.is_file()
)  # fmt: skip

# Package -> what it may import of ours, itself aside. The longest matching name rules; a name allows what lies in it.
VALUES = {"kvjax.errors", "kvjax.partition", "kvjax.typing"}
ALLOWED: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "kvjax.errors": set(),
    "kvjax.partition": set(),
    "kvjax.typing": set(),
    "kvjax.cache": VALUES,
    "kvjax.config": VALUES | {"kvjax.cache"},
    "kvjax.plan": VALUES | {"kvjax.cache", "kvjax.config"},
    "kvjax.choices": VALUES | {"kvjax.cache"},
    "kvjax.models": VALUES | {"kvjax.config"},
    "kvjax.attention": VALUES | {"kvjax.cache", "pallas_kernels"},
    "kvjax.distributed": VALUES | {"kvjax.config", "kvjax.cache", "kvjax.model"},
    "kvjax.model": VALUES | {"kvjax.config", "kvjax.models", "kvjax.attention"},
    "kvjax.convert": VALUES
    | {"kvjax.config", "kvjax.attention", "kvjax.models", "kvjax.model", "kvjax.plan", "kvjax.distributed"},
    "kvjax.checkpoint": VALUES | {"kvjax.config", "kvjax.convert", "kvjax.model", "kvjax.distributed"},
    "kvjax.chat": VALUES | {"kvjax.convert", "kvjax.model"},
    "kvjax.generate": VALUES
    | {"kvjax.config", "kvjax.cache", "kvjax.attention", "kvjax.models", "kvjax.model", "kvjax.convert"},
    "kvjax.train": VALUES
    | {
        "kvjax.config", "kvjax.cache", "kvjax.attention", "kvjax.models", "kvjax.model", "kvjax.convert",
        "kvjax.checkpoint", "kvjax.generate", "kvjax.distributed", "pallas_kernels",
    },
    "kvjax.evaluate": VALUES
    | {
        "kvjax.config", "kvjax.cache", "kvjax.attention", "kvjax.models", "kvjax.model", "kvjax.generate",
        "kvjax.train",
    },
    "kvjax.engine": {"kvjax", "pallas_kernels"},
    "kvjax": {"kvjax"},
    "scripts": {"kvjax", "pallas_kernels"},
}  # fmt: skip
# Package of others -> the only packages of ours that may import it.
RESERVED = {
    "flax": {"kvjax.models"},
    "jinja2": {"kvjax.chat"},
    "optax": {"kvjax.train"},
    "orbax": {"kvjax.convert", "kvjax.train"},
    "safetensors": {"kvjax.convert"},
    "tyro": {"scripts"},
    "matplotlib": {"scripts"},
    "torch": {"scripts", "pallas_kernels.checks"},
    "transformers": {"scripts"},
}
# What only scripts may import; `import kvjax` does not even load it.
OUTERMOST = {"kvjax.engine"}


def within(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies in it."""
    return module == package or module.startswith(package + ".")


def name_of(path: Path) -> str:
    """A file's dotted module name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at its top or within functions; `from a import b` is a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                inner = ROOT / Path(*base.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.add(f"{base}.{alias.name}" if is_module else base)
    return found


def rule_of(module: str) -> tuple[str, set[str]]:
    """The package whose rule a module obeys, and what it allows."""
    package = max((package for package in ALLOWED if within(module, package)), key=len)
    # The rule of `kvjax` is for `kvjax/__init__.py`; a new package beside it needs a rule of its own.
    assert package != "kvjax" or module == "kvjax", f"{module} has no import rule: add it to ALLOWED"
    return package, ALLOWED[package]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    module = name_of(path)
    package, allowed = rule_of(module)
    ours = {name for name in imports_of(path) if within(name, "kvjax") or within(name, "pallas_kernels")}
    wrong = {name for name in ours if not any(within(name, other) for other in {package, *allowed})}
    assert not wrong, f"{package} may not import {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_but_scripts_imports_the_engine(path: Path) -> None:
    module = name_of(path)
    if not within(module, "scripts") and not any(within(module, package) for package in OUTERMOST):
        assert not {name for name in imports_of(path) if any(within(name, package) for package in OUTERMOST)}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_others_packages_stay_where_they_belong(path: Path) -> None:
    module = name_of(path)
    for name in imports_of(path):
        owners = RESERVED.get(name.partition(".")[0])
        if owners is not None:
            assert any(within(module, owner) for owner in owners), f"{module} imports {name}; only {owners} may"


def test_the_rules_name_packages_that_exist() -> None:
    modules = {name_of(path) for path in SOURCES}
    later = {"kvjax.engine"}
    for package in set(ALLOWED) | set().union(*ALLOWED.values()) | set().union(*RESERVED.values()):
        assert package in later or any(within(module, package) for module in modules), package


@pytest.mark.parametrize("path", [path for path in SOURCES if within(name_of(path), "scripts")], ids=name_of)
def test_scripts_are_thin(path: Path) -> None:
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    # A script declares its arguments and calls kvjax; whatever wants jit or a class of its own belongs there.
    assert all(any("dataclass" in ast.unparse(mark) for mark in node.decorator_list) for node in classes)
    assert "jax.jit" not in path.read_text()
    assert len(path.read_text().splitlines()) <= 300


# Linen calls `setup` itself; what it makes is said by the class.
HOOKS = {"setup"}


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Classes, functions and methods whose names do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
                yield from (
                    method for method in methods if not method.name.startswith("_") and method.name not in HOOKS
                )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} does not say what it is"
    silent = [node.name for node in public_definitions(tree) if not ast.get_docstring(node)]
    assert not silent, f"{path.relative_to(ROOT)}: no docstring on {silent}"


# Pieced together, so that this file passes its own check.
FORBIDDEN = {
    "a package registry's host": "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "npm" + r"js\.(org|com)")),
    "a path of one machine": r"(?<![\w.$}*-])/(?:"
    + "|".join(("ro" + "ot", "ho" + "me", "wo" + "rk", "Us" + "ers"))
    + ")/",
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_names_a_registry_or_a_path_of_one_machine(path: Path) -> None:
    text = path.read_text()
    for what, pattern in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert found is None, f"{path.relative_to(ROOT)} holds {what}: {found.group()!r}"
