"""The names: what was declared of each, what shares state under it, and the settings and test mode of the process.

This is the only place where the kit keeps something global.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field as dataclass_field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from resilience_kit.errors import ConfigurationError
from resilience_kit.forking import new_reentrant_lock

if TYPE_CHECKING:
    from pydantic import SecretStr

    from resilience_kit.fleet.fleets import Fleet
    from resilience_kit.settings import ResilienceSettings


@dataclass(slots=True)
class Mode:
    """How the process runs: its settings once they are read, its fleets, and what a test has switched off."""

    settings: "ResilienceSettings | None" = None
    disabled: bool = False
    skips_waiting: bool = False
    seconds_skipped: float = 0.0
    # by URL, prefix and deadline: in other words, one but for a program that changes its settings
    fleets: "dict[tuple[SecretStr, str, float], Fleet]" = dataclass_field(default_factory=dict)


mode = Mode()


@dataclass(frozen=True, slots=True)
class Value:
    """A parameter's effective value, and where it came from: argument, environment, configure() or default."""

    value: Any
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


def effective(argument: Any, default: Any = None, *, setting: str | None = None) -> Value:
    """The value of a parameter: the argument where there is one, else the setting, else the default."""
    if argument is not None:
        return Value(argument, "argument")
    if setting is None:
        return Value(default, "default")
    # pydantic takes 0.15 s to import: paid by the first call, not by `import resilience_kit`
    from resilience_kit.settings import current_settings

    settings = current_settings()
    return Value(getattr(settings, setting), settings.source(setting))


class Named(Protocol):
    """What is kept under a name."""

    parameters: dict[str, Value]

    def statistics(self) -> Any:
        """Where it stands now: a dataclass of counts."""
        ...

    def reset(self) -> None:
        """Forget all that was learnt from calls."""


class Configuration(Protocol):
    """What a decorator declares of a name: a frozen dataclass, with None for what it leaves out."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


ConfigurationT = TypeVar("ConfigurationT", bound=Configuration)
NamedT = TypeVar("NamedT", bound=Named)


class Registry(Generic[ConfigurationT, NamedT]):
    """One kind of named thing: declared when functions are decorated, built at the first call.

    `kind` names it in messages, `section` in statistics; `is_shared` tells whether a reset is to reach other processes,
    also where this one has not used the name yet.

    Two declarations of one name may complete each other; where they contradict each other, the later one fails.
    """

    def __init__(
        self,
        kind: str,
        section: str,
        build: Callable[[str, ConfigurationT], NamedT],
        parameters: Callable[[ConfigurationT], dict[str, Value]],
        *,
        is_shared: Callable[[], bool] = bool,
    ) -> None:
        self.kind = kind
        self.section = section
        self._is_shared = is_shared
        self._build = build
        self._parameters = parameters
        self._lock = new_reentrant_lock()
        self._declared: dict[str, ConfigurationT] = {}
        # What was declared outside of isolated(): it counts for a function that was decorated there.
        self._declared_outside: dict[str, ConfigurationT] = {}
        self._items: dict[str, NamedT] = {}
        self._private: set[str] = set()
        all_registries.append(self)

    def declare(self, name: str, configuration: ConfigurationT) -> None:
        """Note what a decorator says of a name.

        Raises:
            ConfigurationError: Another declaration says otherwise, or the name is in use with other values.
        """
        with self._lock:
            earlier = self._declared.get(name)
            if earlier is None:
                self._declared[name] = configuration
                return
            merged = self._merge(name, earlier, configuration)
            if merged != earlier and name in self._items:
                raise ConfigurationError(
                    f"{self.kind} {name!r} is in use already: this declaration adds {_given(configuration)} to "
                    f"{_given(earlier)}. Say it where the name is used first, or use another name."
                )
            self._declared[name] = merged

    def get(self, name: str, configuration: ConfigurationT) -> NamedT:
        """What is shared under a name, built now if this is its first use."""
        item = self._items.get(name)
        if item is not None:
            return item
        with self._lock:
            if name not in self._items:
                if name not in self._declared and name in self._declared_outside:
                    configuration = self._declared_outside[name]
                self.declare(name, configuration)
                self._items[name] = self._build(name, self._declared[name])
            return self._items[name]

    def describe(self, name: str, configuration: ConfigurationT) -> dict[str, Value]:
        """The effective parameters of a name, also before its first use."""
        with self._lock:
            item = self._items.get(name)
            declared = {**self._declared_outside, **self._declared}
            return self._parameters(declared.get(name, configuration)) if item is None else item.parameters

    def items(self) -> dict[str, NamedT]:
        """All that is in use, by name."""
        with self._lock:
            return {name: item for name, item in self._items.items() if name not in self._private}

    def start_anew(self) -> None:
        """Forget in a forked child what its parent used: the threads that hold it are not there to give it back."""
        self._items = {}

    def is_private(self, name: str) -> bool:
        """Whether a name is a simulation's."""
        return name in self._private

    def reset(self, name: str | None = None) -> None:
        """Put one name, or all, back to the start."""
        items = self.items()
        if name is not None and name not in items and name not in self._declared:
            known = listed({*items, *self._declared})
            raise ConfigurationError(f"there is no {self.kind} {name!r}. Known names: {known}")
        if self._is_shared():
            with self._lock:
                declared = {**self._declared}
            items |= {
                key: self.get(key, declared[key]) for key in declared.keys() - items.keys() if name in (None, key)
            }
        for key, item in items.items():
            if name in (None, key):
                item.reset()

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Start with no names in use, and put those of before back at the end."""
        with self._lock:
            before = self._declared, self._items, self._declared_outside
            self._declared_outside = {**self._declared_outside, **self._declared}
            self._declared, self._items = {}, {}
        try:
            yield
        finally:
            with self._lock:
                self._declared, self._items, self._declared_outside = before

    @contextmanager
    def private(self, name: str) -> Iterator[None]:
        """Keep a name out of statistics and resets, and forget it at the end: a simulation's, on a clock of its own."""
        with self._lock:
            self._private.add(name)
            kept: list[dict[str, Any]] = [self._declared, self._items]
        try:
            yield
        finally:
            with self._lock:
                self._private.discard(name)
                # another thread may have begun or ended a test in isolation meanwhile
                for by_name in (*kept, self._declared, self._items):
                    by_name.pop(name, None)

    def _merge(self, name: str, earlier: ConfigurationT, later: ConfigurationT) -> ConfigurationT:
        values: dict[str, Any] = {}
        for field in fields(earlier):
            old, new = getattr(earlier, field.name), getattr(later, field.name)
            if old is not None and new is not None and old != new:
                raise ConfigurationError(
                    f"{self.kind} {name!r} has two configurations: {_given(earlier)} was declared before, and now "
                    f"{_given(later)}. Say the same in both places, leave it out in one, or use another name."
                )
            values[field.name] = new if old is None else old
        return type(earlier)(**values)


all_registries: "list[Registry[Any, Any]]" = []
_fleets_of_the_parent: list[Any] = []


def start_anew() -> None:
    """Use all names for the first time again, as in a process that has just started."""
    for registry in all_registries:
        registry.start_anew()
    # not closed, and kept from the garbage collector: the sockets are the parent's
    _fleets_of_the_parent.append(mode.fleets)
    mode.fleets = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)


def listed(names: Iterable[str]) -> str:
    """Names in a message; one that a line or a terminal would obey is written as Python does."""
    return ", ".join(name if name.isprintable() else repr(name) for name in sorted(names)) or "none yet"


def _given(configuration: Configuration) -> str:
    """A declaration as it was written: only what it does not leave out."""
    values = {field.name: getattr(configuration, field.name) for field in fields(configuration)}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None) or "the defaults"
