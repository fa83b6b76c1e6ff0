"""The house as it was designed: who may import whom, what is public, and how large a room may grow."""

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import grimp
import pytest
from importlinter import api
from importlinter.application import use_cases

from resilience_kit import events

ROOT = Path(__file__).parent.parent
SETUP = str(ROOT / "setup.cfg")
CONTRACTS = api.read_configuration(SETUP)["contracts_options"]
DECORATORS = {f"resilience_kit.{name}" for name in ("circuit_breaking", "rate_limiting", "retrying", "token_budgeting")}
# What brings a package of an extra in when it is imported; all else asks for an extra's package where it is used.
NEEDS_AN_EXTRA = {
    "resilience_kit.cli",
    "resilience_kit.monitoring.dashboard",
    "resilience_kit.monitoring.otel",
    "resilience_kit.monitoring.prometheus",
    "resilience_kit.monitoring.terminal",
    "resilience_kit.testing.asgi_responses",
    "resilience_kit.testing.background_server",
    "resilience_kit.testing.simulator",
}
WITHOUT_EXTRAS = """\
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import resilience_kit
for found in pkgutil.walk_packages(resilience_kit.__path__, "resilience_kit.", onerror=lambda name: None):
    try:
        importlib.import_module(found.name)
    except (ImportError, SystemExit):
        print(found.name)
"""
PROGRAMS = [
    path for folder in ("resilience_kit", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
MOST_LINES = 500


def normal(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def packages_of_extras():
    """The import names of what the extras bring, but for those that only serve development."""
    optional = {
        normal(re.match(r"[\w.-]+", requirement)[0])
        for requirement in metadata.requires("resilience-kit")
        if re.search(r"extra == .(?!dev|bench|examples)", requirement)
    }
    return {
        name
        for name, distributions in metadata.packages_distributions().items()
        if optional & {normal(distribution) for distribution in distributions}
    }


def imported_from_the_kit(text):
    """The modules of the kit that a text imports from, and the names."""
    for module, names, one in re.findall(
        r"^\s*(?:>>> )?from (resilience_kit[\w.]*) import (?:\(([^)]*)\)|(.*))", text, re.MULTILINE
    ):
        for name in re.findall(r"\w+(?: as \w+)?", re.sub(r"#.*", "", names or one)):
            yield module, name.split(" as ")[0]


# Who imports whom


@pytest.mark.parametrize("contract", CONTRACTS, ids=[contract["name"] for contract in CONTRACTS])
def test_each_contract_of_setup_cfg_is_kept(contract, capsys):
    is_kept = use_cases.lint_imports(
        SETUP, limit_to_contracts=(contract["id"],), cache_dir=None, is_debug_mode=True, no_logo=True
    )
    assert is_kept, capsys.readouterr().out


def test_only_the_stack_knows_all_four_decorators():
    graph = grimp.build_graph("resilience_kit", exclude_type_checking_imports=True, cache_dir=None)
    knowing = [module for module in graph.modules if graph.find_modules_directly_imported_by(module) >= DECORATORS]
    assert knowing == ["resilience_kit.stack"]


def test_a_module_can_be_imported_without_the_extras_unless_it_is_nothing_without_one():
    finished = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", WITHOUT_EXTRAS, *packages_of_extras()], capture_output=True, text=True, check=True
    )
    assert set(finished.stdout.split()) == NEEDS_AN_EXTRA


# What is public

MODULES_WITH_ALL = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PROGRAMS
    if path.is_relative_to(ROOT / "resilience_kit") and re.search(r"^__all__ = ", path.read_text("utf-8"), re.MULTILINE)
]
each_module_with_all = pytest.mark.parametrize("module", MODULES_WITH_ALL)


@each_module_with_all
def test_all_is_sorted_and_has_each_name_once(module):
    public = importlib.import_module(module).__all__
    assert public == sorted(set(public))


@each_module_with_all
def test_each_name_in_all_is_there(module):
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_documentation_and_examples_import_is_public(path):
    hidden = [
        f"{module}.{name}"
        for module, name in imported_from_the_kit(path.read_text("utf-8"))
        if name not in getattr(importlib.import_module(module), "__all__", ())
    ]
    assert hidden == []


def test_all_events_are_public():
    kinds = {
        kind.__name__ for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)
    }
    assert set(events.__all__) == kinds | {"subscribe"}


# How large


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_enough_to_be_read_at_once(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MOST_LINES
