"""`save_state` and `load_state`: live sequences and their cache to a directory, and back in any process."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.bits import NUMBERS, bits, numbers, takes_bits
from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import GroupLayout, KVSpec
from kvjax.cache.named import is_ours, method_named, method_table
from kvjax.cache.policies.optional import placed
from kvjax.cache.state import Cache, Group, empty_cache
from kvjax.convert.array_store import load_arrays, save_arrays
from kvjax.convert.directory import names_in, replaced
from kvjax.errors import CheckpointError, ConfigError, RequestError
from kvjax.generate.live import check_live
from kvjax.generate.state import State

STATE_FILE, ARRAYS_FOLDER, VALUE_FILE = "kvjax_state.json", "arrays", "value_{}"
"""What is static, what is not, and arguments of methods that are files of their own."""

FORMAT = 1
"""Of directories written; others are not read."""

PAGES_PER_TRIP = 256
"""Pages moved at once between device and host: a bound on what that takes on the device."""

METHODS = ("policy", "codec", "select")


def save_state(state: State, path: str | Path) -> None:
    """Writes live sequences and their cache; `load_state` gives them back bit for bit, in any process.

    Of the pools only pages in use are written, a page that forks share once. The state stays usable. The directory is
    written beside `path` and takes its place at the end, so that nothing is ever seen half-written; a saved state that
    is there is replaced, any other non-empty directory is left alone. It holds `kvjax_state.json`, with the tokens and
    all that is static, and an orbax checkpoint, `arrays`, with checksums of both. The model is not part of it.

    Raises:
      CheckpointError: `path` may not be replaced or cannot be written, or a policy, codec or select of your own cannot
        be written as its name and arguments (numbers, texts, tuples of them).
      RequestError: the state was consumed.
    """
    check_live(state)
    with replaced(Path(path), _check_replaceable) as folder:
        try:
            content, own = _content(state, folder)
        except ConfigError as error:
            raise CheckpointError(f"cannot save this state: {error}") from error
        content["arrays"] = save_arrays(folder / ARRAYS_FOLDER, _arrays(state))
        text = json.dumps({"format": FORMAT, "checksum": _checksum(content), "state": content})
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        config, layouts, contexts = _static(json.loads(text)["state"], folder, own)
        groups = (*state.cache.groups, *state.cache.context)
        if config != state.config or (*layouts, *contexts) != tuple(group.layout for group in groups):
            raise CheckpointError(
                f"cannot save this state: {state.config!r} would not be read back as itself; the constructors of your "
                "own methods must take all that makes two of them unequal, under the names of their attributes"
            )


def load_state(path: str | Path, methods: Iterable[type] = ()) -> State:
    """Live sequences that `save_state` wrote, to be continued by `extend` with the model they were made with.

    Tokens and log-probabilities that follow are those that would have followed, bit for bit, on the same device and
    version of jax. Pools are as large as they were, and lie on the default device wherever they lay before.

    Args:
      methods: classes of your own that the cache was made with, beside kvjax's policies, codecs and selects.

    Raises:
      CheckpointError: there is no saved state, or it is damaged, incomplete, or of another format, or needs a class
        that is not among `methods`.
      RequestError: `methods` are no classes.
    """
    path = Path(path).expanduser()
    source = path / STATE_FILE
    if not source.is_file():
        raise CheckpointError(
            f"{path} holds no saved state: there is no file {STATE_FILE} in it; give a directory that kvjax.save_state "
            "wrote (kvjax.load reads models)"
        )
    content = _read(source)
    own = _own(content, methods, source)
    try:
        config, layouts, contexts = _static(content, path, own)
        cache = _empty(content, layouts, contexts)
        known = content["arrays"]
        tokens = tuple(map(tuple, content["tokens"]))
        pending, lengths, last = content["pending"], tuple(content["prompt_lengths"]), content["last"]
        copies = int(content.get("copies", 1))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source} does not describe a state that this kvjax can hold ({type(error).__name__}: {error}); load it "
            "with the version that saved it"
        ) from error
    arrays = load_arrays(path / ARRAYS_FOLDER, known)
    hidden = jnp.asarray(arrays["last"]) if last else None
    return State(_placed(cache, arrays, source), config, tokens, hidden, pending, lengths, copies)


def _content(state: State, folder: Path) -> tuple[dict[str, Any], tuple[type, ...]]:
    """All that is static, as JSON holds it, and the classes it names that are not kvjax's. Writes values into files."""
    cache, files = state.cache, _Files(folder)
    groups = (*cache.groups, *cache.context)
    configs = (state.config, *(config for _, config in state.config.overrides))
    chosen = [(what, getattr(one, what)) for one in (*configs, *(group.layout for group in groups)) for what in METHODS]
    own = {type(method): None for what, method in chosen if method is not None and not is_ours(what, method)}

    def layout_table(group: Group) -> dict[str, Any]:
        layout = group.layout
        return {
            **_plain(layout, files.keep),
            "layers": list(layout.layers),
            "window": layout.window,
            "dtype": layout.dtype,
            "spec": dataclasses.asdict(layout.spec),
            "pages": [group.table.shape[2], group.num_pages],
        }

    content = {
        "config": {
            **_plain(state.config, files.keep),
            "memory_bytes": state.config.memory_bytes,
            "overrides": [
                {**_plain(config, files.keep), "memory_bytes": config.memory_bytes, "layers": list(layers)}
                for layers, config in state.config.overrides
            ],
        },
        "own": [kind.__name__ for kind in own],
        "groups": [layout_table(group) for group in cache.groups],
        "context": [layout_table(group) for group in cache.context],
        "recurrent": [[list(leaf.shape[1:]) for leaf in layer] for layer in cache.recurrent],
        "batch": cache.batch,
        "tokens": [list(map(int, tokens)) for tokens in state.tokens],
        "pending": state.pending,
        "prompt_lengths": list(state.prompt_lengths),
        "copies": state.copies,
        "last": state.last is not None,
    }
    return content, tuple(own)


def _plain(choices: CacheConfig | GroupLayout, keep: Callable[[Any], Any]) -> dict[str, Any]:
    """What a config and a layout have in common."""
    methods = {what: getattr(choices, what) for what in METHODS}
    tables = {what: None if method is None else method_table(method, keep) for what, method in methods.items()}
    return {**tables, "page_size": choices.page_size, "num_pages": choices.num_pages}


class _Files:
    """Arguments that know how to `save` themselves, such as a calibration, each in a file of its own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._kept: dict[Any, str] = {}

    def keep(self, value: Any) -> Any:
        """The table that stands for a value; ConfigError for one that is neither plain nor can be saved."""
        if not callable(getattr(value, "save", None)):
            raise ConfigError(f"{value!r:.80} is neither a number nor a text nor a tuple of them, and has no `save`")
        if value not in self._kept:
            self._kept[value] = VALUE_FILE.format(len(self._kept))
            value.save(self._folder / self._kept[value])
        return {"file": self._kept[value]}


def _static(
    content: dict[str, Any], folder: Path, own: tuple[type, ...]
) -> tuple[CacheConfig, tuple[GroupLayout, ...], tuple[GroupLayout, ...]]:
    """The config, and the layouts of groups and context, that `_content` was given."""

    def given(value: Any) -> Any:
        """An argument that lies in a file is given as that file's path."""
        return str(folder / value["file"]) if isinstance(value, dict) and "file" in value else value

    def methods(table: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for what in METHODS:
            named = table[what]
            if named is not None:
                named = {key: given(value) for key, value in named.items()}
                mine = [kind for kind in own if kind.__name__ == named["name"]]
                named = method_named(what, named, f"{STATE_FILE}: {what}", mine)
            found[what] = named
        return found

    def config_of(table: dict[str, Any], overrides: tuple[Any, ...] = ()) -> CacheConfig:
        sizes = {name: table[name] for name in ("page_size", "num_pages", "memory_bytes")}
        return CacheConfig(**sizes, **methods(table), overrides=overrides)

    def layout_of(table: dict[str, Any]) -> GroupLayout:
        spec, layers, chosen = KVSpec(**table["spec"]), tuple(table["layers"]), methods(table)
        sizes = {name: table[name] for name in ("page_size", "num_pages", "window", "dtype")}
        policy = placed(chosen["policy"], layers, spec.layers)
        return GroupLayout(layers, spec, policy, chosen["codec"], select=chosen["select"], **sizes)

    table = content["config"]
    config = config_of(table, tuple((tuple(other["layers"]), config_of(other)) for other in table["overrides"]))
    groups, context = (tuple(map(layout_of, content[name])) for name in ("groups", "context"))
    return config, groups, context


def _arrays(state: State) -> dict[str, np.ndarray]:
    """Every array of a state on the host, of pools only the pages in use."""
    arrays = {}
    for name, leaf, group in _leaves(state.cache):
        found = np.asarray(leaf) if group is None else _gather(leaf, _in_use(np.asarray(group.refs)))
        arrays[name] = numbers(found) if _as_bits(name, group) else found
    if state.last is not None:
        arrays["last"] = np.asarray(state.last)
    return arrays


def _placed(cache: Cache, arrays: dict[str, np.ndarray], source: Path) -> Cache:
    """The cache of these shapes with the arrays in it, on the default device."""
    leaves = list(_leaves(cache))
    if missing := [name for name, _, _ in leaves if name not in arrays]:
        raise CheckpointError(f"{source} lists no array {missing[0]}; save the state again")
    numbers = {id(group): arrays[f"{name}.refs"] for name, group in _groups(cache)}
    placed = []
    for name, leaf, group in leaves:
        found = arrays[name]
        if _as_bits(name, group) and leaf.dtype in NUMBERS:
            found = bits(found)
        pages = None if group is None else _in_use(numbers[id(group)])
        shape = leaf.shape if pages is None else (len(pages), *leaf.shape[1:])
        if (found.shape, found.dtype) != (shape, leaf.dtype):
            raise CheckpointError(
                f"{source}: {name} should be {leaf.dtype}{list(shape)}, and is {found.dtype}{list(found.shape)}; "
                "save the state again"
            )
        placed.append(jnp.asarray(found) if pages is None else _scatter(leaf, pages, found))
    return jax.tree.unflatten(jax.tree.structure(cache), placed)


def _empty(content: dict[str, Any], layouts: tuple[GroupLayout, ...], contexts: tuple[GroupLayout, ...]) -> Cache:
    """The shapes and dtypes of the cache that was saved."""
    pages = [tuple(table["pages"]) for table in (*content["groups"], *content["context"])]
    recurrent = tuple(tuple(map(tuple, layer)) for layer in content["recurrent"])

    def make() -> Cache:
        made = empty_cache((*layouts, *contexts), content["batch"], pages, recurrent)
        return dataclasses.replace(made, groups=made.groups[: len(layouts)], context=made.groups[len(layouts) :])

    return jax.eval_shape(make)


def _groups(cache: Cache) -> Iterator[tuple[str, Group]]:
    """Name and group."""
    for part in ("groups", "context"):
        yield from ((f"{part}.{number}", group) for number, group in enumerate(getattr(cache, part)))


def _leaves(cache: Cache) -> Iterator[tuple[str, Any, Group | None]]:
    """Name, array, and for one whose first axis are pages the group, in the order of `jax.tree.leaves`."""
    groups = dict(_groups(cache))
    for path, leaf in jax.tree_util.tree_flatten_with_path(cache)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        part, _, rest = name.partition(".")
        number, _, field = rest.partition(".")
        paged = field.partition(".")[0] in ("k", "v", "page_state")
        yield name, leaf, groups[f"{part}.{number}"] if paged and f"{part}.{number}" in groups else None


def _as_bits(name: str, group: Group | None) -> bool:
    """Whether integers in this pool are short floats; they are saved as what they are."""
    if group is None:
        return False
    return takes_bits(group.layout.select if name.split(".")[2] == "page_state" else group.layout.codec)


def _in_use(refs: np.ndarray) -> np.ndarray:
    """Numbers of the pages that somebody holds, ascending: int32[n]."""
    return np.flatnonzero(refs > 0).astype(np.int32)


@jax.jit
def _pick(pool: jax.Array, pages: jax.Array) -> jax.Array:
    return pool[pages]


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool: jax.Array, pages: jax.Array, content: jax.Array) -> jax.Array:
    return pool.at[pages].set(content, mode="drop")


def _gather(pool: jax.Array, pages: np.ndarray) -> np.ndarray:
    """These pages of a pool, on the host. Trips are of one size, so that no number of pages compiles anew."""
    trip = min(PAGES_PER_TRIP, pool.shape[0])
    content = np.empty((len(pages), *pool.shape[1:]), pool.dtype)
    for start in range(0, len(pages), trip):
        some = pages[start : start + trip]
        padded = np.pad(some, (0, trip - len(some)))
        content[start : start + trip] = np.asarray(_pick(pool, padded))[: len(some)]
    return content


def _scatter(pool: jax.ShapeDtypeStruct, pages: np.ndarray, content: np.ndarray) -> jax.Array:
    """A pool of zeros but for these pages."""
    trip, made = min(PAGES_PER_TRIP, pool.shape[0]), jnp.zeros(pool.shape, pool.dtype)
    for start in range(0, len(pages), trip):
        some = pages[start : start + trip]
        padded = np.pad(some, (0, trip - len(some)), constant_values=pool.shape[0])
        filler = np.zeros((trip - len(some), *pool.shape[1:]), pool.dtype)
        made = _put(made, padded, np.concatenate([content[start : start + trip], filler]))
    return made


def _read(source: Path) -> dict[str, Any]:
    """The content of the JSON file, once its format and checksum are known to be right."""
    try:
        table = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what is no UTF-8 or no JSON is a ValueError
        raise CheckpointError(f"{source} cannot be read: {error}; copy the directory again") from error
    content = table.get("state") if isinstance(table, dict) else None
    if not isinstance(content, dict) or "format" not in table:
        raise CheckpointError(f"{source} is no file of kvjax.save_state; copy the directory again")
    if table["format"] != FORMAT:
        raise CheckpointError(
            f"{source} has format {table['format']!r}, this kvjax reads format {FORMAT}; load it with the version that "
            "saved it"
        )
    if table.get("checksum") != _checksum(content):
        raise CheckpointError(f"{source} is damaged or was edited, its checksum is another; copy the directory again")
    return content


def _own(content: dict[str, Any], methods: Iterable[type], source: Path) -> tuple[type, ...]:
    """Of the classes given those that the cache was made with."""
    given: list[Any] = list(methods) if isinstance(methods, Iterable) else [None]
    if not all(isinstance(kind, type) for kind in given):
        raise RequestError(f"load_state takes methods=(MyPolicy, ...), the classes themselves, got {methods!r:.80}")
    named = content.get("own", ())
    missing = sorted(set(named) - {kind.__name__ for kind in given})
    if missing:
        raise CheckpointError(
            f"{source}: the cache was made with {missing[0]}, which is none of kvjax's own; give its class: "
            f"kvjax.load_state(path, methods=({missing[0]},))"
        )
    return tuple(kind for kind in given if kind.__name__ in named)


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _check_replaceable(path: Path) -> None:
    """Only nothing, an empty directory, or a saved state alone may be replaced."""
    names = names_in(path)
    if not names:
        return
    if STATE_FILE not in names:
        raise CheckpointError(f"{path} is not empty and holds no saved state; choose another directory")
    beside = VALUE_FILE.format("")
    foreign = [name for name in names if name not in (STATE_FILE, ARRAYS_FOLDER) and not name.startswith(beside)]
    if foreign:
        raise CheckpointError(
            f"{path} holds {foreign[0]!r}, which is no part of a saved state and would be lost; "
            "move it away, or choose another directory"
        )
