"""A study's recipe: one base run, methods as overrides of it, parts that compare them. Imports no torch.

A *cell* is a method and a seed: one training run, made once however many parts name it. Everything that cells must share to
be comparable (target, evaluation, seed of the anchors and the data order) is refused in a method's overrides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specauf.config import LOOKUP, RunConfig, digest, override
from specauf.files import at_home
from specauf.strict import ConfigError, choose, field_type, from_dict, nearest, parse_value, read_yaml, require, to_dict

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""Names of methods and parts. They become directories, and keys of overrides, which a dot would split."""


@dataclass(frozen=True)
class Method:
    """A row of the study's tables: what it changes in the base run."""

    label: str
    set: tuple[str, ...] = ()
    """`section.key=value`, as in --set."""
    start_from: str | None = None
    """Another method, whose cell of the same seed is trained first. Its weights are this one's initial weights."""
    minutes_as: str | None = None
    """Another method, whose cell of the same seed is trained first. This one takes as many steps as fit in its time."""
    note: str = ""

    def __post_init__(self) -> None:
        require(bool(self.label), "a method needs a label")


@dataclass(frozen=True)
class Part:
    """One comparison: methods against a baseline, on the same prompts."""

    title: str
    methods: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...] = (0,)
    """Values of train.seed."""
    prompts: int | None = None
    """Conversations per task; all of them when not given."""
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 256
    budget: str = ""
    """What the part may cost, stated before it is run."""

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "temperatures"):
            values = getattr(self, name)
            require(bool(values), f"{name} is empty")
            require(len(set(values)) == len(values), f"{name} names something twice")
        require(self.baseline in self.methods, f"the baseline {self.baseline!r} is not one of its methods")
        require(all(seed >= 0 for seed in self.seeds), "seeds are 0, 1, 2, ...")
        require(all(t >= 0 for t in self.temperatures), "temperatures are >= 0")
        told = f"prompts must be at least 2, which an interval needs; got {self.prompts}"
        require(self.prompts is None or self.prompts >= 2, told)
        require(self.max_new_tokens >= 2, f"max_new_tokens must be at least 2, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Live:
    """How much of the primary part is decoded live, at T=0, to be compared with replay."""

    prompts: int = 2
    """Per task."""
    tokens: int = 64

    def __post_init__(self) -> None:
        require(self.prompts >= 0 and self.tokens >= 2, "live: prompts is >= 0 and tokens >= 2")


@dataclass(frozen=True)
class Cell:
    """One training run."""

    method: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.method}-s{self.seed}"

    @property
    def out(self) -> Path:
        return Path(self.config.out)


@dataclass(frozen=True)
class Recording:
    """The trajectories of one temperature: as many, and as long, as any part of the study needs."""

    temperature: float
    prompts: int | None
    max_new_tokens: int
    block_size: int

    def covers(self, other: Recording, conversations: int) -> bool:
        """Whether `other` can be read out of this one, of which this many `conversations` are recorded.

        If that is fewer than `prompts`, the task has no more.
        """
        whole = self.prompts is None or conversations < self.prompts
        enough = whole or (math.inf if other.prompts is None else other.prompts) <= (self.prompts or 0)
        return enough and self.max_new_tokens >= other.max_new_tokens and self.block_size >= other.block_size


@dataclass(frozen=True)
class Study:
    title: str
    out: Path
    base: RunConfig
    methods: Mapping[str, Method]
    parts: Mapping[str, Part]
    """The first is the primary one."""
    live: Live = field(default_factory=Live)

    def config(self, method: str, seed: int) -> RunConfig:
        """The run of a cell. `train.max_steps` is the recipe's, even where another method's time decides instead."""
        found = self.methods[method]
        config = override(self.base, [*found.set, f"train.seed={seed}"])
        drafter = config.drafter
        if found.start_from is not None:
            source = self.cell_dir(found.start_from, seed) / "checkpoint"
            drafter = dataclasses.replace(drafter, init_from=str(source))
        return dataclasses.replace(config, out=str(self.cell_dir(method, seed)), drafter=drafter)

    def cell_dir(self, method: str, seed: int) -> Path:
        return self.out / "cells" / f"{method}-s{seed}"

    def cells(self, parts: Iterable[str] | None = None) -> list[Cell]:
        """In the order of training: part by part, and in a part seed by seed, so that early results can be compared.

        The cells that a cell needs come before it.
        """
        wanted: dict[tuple[str, int], None] = {}
        for key in parts or self.parts:
            for seed in self.parts[key].seeds:
                for method in self.parts[key].methods:
                    for name in (*self.needs(method), method):
                        wanted.setdefault((name, seed))
        return [Cell(method, seed, self.config(method, seed)) for method, seed in wanted]

    def needs(self, method: str) -> list[str]:
        """Methods to train first, in order: the one it starts from, the one whose time it gets, and what those need."""
        found: dict[str, None] = {}

        def visit(name: str, way: tuple[str, ...]) -> None:
            for key in ("start_from", "minutes_as"):
                other: str | None = getattr(self.methods[name], key)
                if other is not None:
                    require(other not in way, f"methods.{name}: {key} leads back to itself")
                    visit(other, (*way, other))
                    found.setdefault(other)

        visit(method, (method,))
        return list(found)

    def block_size(self, method: str) -> int:
        return self._block_sizes[method]

    @functools.cached_property
    def _block_sizes(self) -> dict[str, int]:
        return {name: override(self.base, m.set).drafter.block_size for name, m in self.methods.items()}

    def block_sizes(self, part: str | None = None) -> list[int]:
        """Those of the methods of a part, or of all parts."""
        keys = self.parts if part is None else [part]
        return sorted({self.block_size(m) for key in keys for m in self.parts[key].methods})

    def lookup(self, block_size: int) -> str:
        """The name of prompt lookup, which every part measures unlisted, at a block size; no suffix at the base run's."""
        return LOOKUP if block_size == self.base.drafter.block_size else f"{LOOKUP}-b{block_size}"

    def recordings(self, parts: Iterable[str] | None = None) -> list[Recording]:
        """One per temperature of the named parts. Its size covers all parts of the study, named or not."""
        found = []
        for t in dict.fromkeys(t for key in parts or self.parts for t in self.parts[key].temperatures):
            users = [part for part in self.parts.values() if t in part.temperatures]
            counts = [part.prompts for part in users]
            prompts = None if None in counts else max(c for c in counts if c is not None)
            longest = max(part.max_new_tokens for part in users)
            found.append(Recording(t, prompts, longest, max(self.block_sizes())))
        return found

    def recording(self, key: str, temperature: float) -> Recording:
        """The recording that this part alone needs."""
        part = self.parts[key]
        return Recording(temperature, part.prompts, part.max_new_tokens, max(self.block_sizes(key)))

    def live_recording(self) -> Recording:
        """The recording that the live sample of the first part needs."""
        key, part = next(iter(self.parts.items()))
        prompts = min(self.live.prompts, part.prompts or self.live.prompts)
        return Recording(0.0, prompts, self.live.tokens, max(self.block_sizes(key)))


SECTIONS = ("title", "out", "base", "methods", "parts", "live")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's recipe, strictly. Raises `ConfigError` naming the file and the key, or the override."""
    data = read_yaml(Path(path), "no such study", "Those that ship with specauf are recipes/study_*.yaml")
    for item in overrides if isinstance(data, dict) else ():
        _override(data, item)
    return study_of(data, str(path))


def study_of(data: Any, where: str) -> Study:
    """A study from the content of its recipe, which errors call `where`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping with {', '.join(SECTIONS)}")
    for key in data:
        if key not in SECTIONS:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), SECTIONS)} Valid: {', '.join(SECTIONS)}")
    for key in ("title", "out"):
        require(isinstance(data.get(key), str) and data[key] != "", f"{where}: {key} is missing, or no text")
    base = data.get("base")
    require(not (isinstance(base, dict) and "out" in base), f"{where}: base.out is not allowed; `out` is beside `base`")
    methods = _named(Method, data, "methods", where)
    for name in methods:
        require(
            not name.startswith(LOOKUP),
            f"{where}: methods.{name}: {LOOKUP} is in every part already, and owns such names",
        )
    study = Study(
        title=data["title"],
        out=at_home(data["out"]),
        base=from_dict(RunConfig, base, f"{where}: base"),
        methods=methods,
        parts=_named(Part, data, "parts", where),
        live=from_dict(Live, data.get("live"), f"{where}: live"),
    )
    _check(study, where)
    return study


def _named(kind: type[Any], data: dict[str, Any], section: str, where: str) -> dict[str, Any]:
    entries = data.get(section)
    require(isinstance(entries, dict) and bool(entries), f"{where}: {section} is missing, or no mapping of names")
    assert isinstance(entries, dict)
    found = {}
    for name, value in entries.items():
        require(
            isinstance(name, str) and NAME.fullmatch(name) is not None,
            f"{where}: {section}: {name!r} cannot be a name: small letters, digits, - and _ (quote a number)",
        )
        require(isinstance(value, dict), f"{where}: {section}.{name}: expected a mapping, got {value!r}")
        for needed in (f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING):
            require(needed in value, f"{where}: {section}.{name}: {needed} is missing")
        found[name] = from_dict(kind, value, f"{where}: {section}.{name}")
    return found


def _check(study: Study, where: str) -> None:
    """Raise `ConfigError` when parts and methods do not fit together, or methods differ in what they must share."""
    for key, part in study.parts.items():
        for name in part.methods:
            _require_known(name, study.methods, "method", f"{where}: parts.{key}.methods")
    seen: dict[str, str] = {}
    for name, method in study.methods.items():
        at = f"{where}: methods.{name}"
        for other in ("start_from", "minutes_as"):
            if (named := getattr(method, other)) is not None:
                _require_known(named, study.methods, "method", f"{at}.{other}")
        try:
            study.needs(name)
            config = override(study.base, method.set)
        except ConfigError as error:
            raise ConfigError(f"{at}: {error}") from None
        _check_shared(study.base, config, at)
        content = digest(to_dict(config) | {"from": method.start_from, "as": method.minutes_as})
        if content in seen:
            raise ConfigError(f"{at} is the same run as methods.{seen[content]}: name one of them in both parts")
        seen[content] = name
    require(
        study.base.eval.sampling.proposal == "greedy",
        f"{where}: base.eval.sampling.proposal: a study replays, which needs the greedy one",
    )
    primary, first = next(iter(study.parts.items()))
    require(
        0.0 in first.temperatures or not study.live.prompts,
        f"{where}: parts.{primary} is decoded live at temperature 0, which is not among its temperatures: add it, or set "
        "live.prompts to 0",
    )
    require(
        study.live.tokens <= first.max_new_tokens or not study.live.prompts,
        f"{where}: live.tokens is {study.live.tokens}, which parts.{primary} with max_new_tokens {first.max_new_tokens} does "
        "not record",
    )


def _check_shared(base: RunConfig, config: RunConfig, at: str) -> None:
    for section in ("out", "target", "eval"):
        same = getattr(base, section) == getattr(config, section)
        require(same, f"{at}: `set` changes {section}, which all methods share")
    require(config.train.seed == base.train.seed, f"{at}: `set` changes train.seed; seeds belong to the parts")
    for name in ("enable_thinking", "seed", "heldout"):  # another split would train on what others are measured by
        same = getattr(config.data, name) == getattr(base.data, name)
        require(same, f"{at}: `set` changes data.{name}, which all methods share")
    require(config.train.minutes is None, f"{at}: train.minutes is not for studies; give max_steps, or minutes_as")
    require(config.train.max_steps is not None, f"{at}: train.max_steps is not set, in `base` or here")


def known_parts(study: Study, names: Sequence[str]) -> list[str]:
    """The named parts, in the recipe's order; all of them when none is named. Raises `ConfigError` on an unknown one."""
    for name in names:
        _require_known(name, study.parts, "part")
    return [key for key in study.parts if key in names or not names]


def _require_known(name: str, choices: Iterable[str], what: str, where: str = "") -> None:
    """Raise `ConfigError` with the nearest of `choices` when `name` is none of them."""
    try:
        choose(name, [str(choice) for choice in choices], what)  # a recipe's key may be a number
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _override(data: dict[str, Any], item: str) -> None:
    """Apply `section.key=value` to a recipe's content. Methods and parts have to exist already."""
    key, separator, value = item.partition("=")
    require(bool(separator), f"override {item!r}: write it as section.key=value")
    *parents, last = key.split(".")
    node: Any = data
    for depth, parent in enumerate(parents):
        if depth == 0:
            _require_known(parent, SECTIONS, "section", f"override {item!r}")
        if depth == 1 and parents[0] in ("methods", "parts"):
            _require_known(parent, node, parents[0].removesuffix("s"), f"override {item!r}")
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        require(isinstance(node, dict), f"override {item!r}: {'.'.join(parents[: depth + 1])!r} is no section")
    require(bool(parents) or last in SECTIONS, f"override {item!r}: unknown key {last!r}{nearest(last, SECTIONS)}")
    whole = not parents and last in ("base", "methods", "parts", "live")
    require(not whole, f"override {item!r}: {key!r} is a section; set its keys")
    node[last] = parse_value(field_type(Study, [*parents, last]), value, f"override {item!r}")
