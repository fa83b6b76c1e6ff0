import ast
import copy
import doctest
import importlib
import inspect
import itertools
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from importlib import metadata, resources
from types import ModuleType

import pybreaker
import pytest

import resilience_kit
from resilience_kit import azure, errors, monitoring, testing
from resilience_kit.errors import (
    CircuitOpenError,
    ConfigurationError,
    RateLimitTimeoutError,
    ResilienceError,
    StackOrderWarning,
    StoreContentError,
    StoreUnavailableError,
    TokenBudgetExceededError,
)
from resilience_kit.monitoring import dashboard

# Run as a program, this one ends the process.
MODULES = [
    info.name
    for info in pkgutil.walk_packages(resilience_kit.__path__, "resilience_kit.")
    if not info.name.endswith("__main__")
]
LAZY_PACKAGES = [resilience_kit, azure, monitoring, testing]
PACKAGES = [*LAZY_PACKAGES, dashboard]
PUBLIC = [(package, name) for package in PACKAGES for name in package.__all__]
PUBLIC_FUNCTIONS = [getattr(package, name) for package, name in PUBLIC if inspect.isfunction(getattr(package, name))]
PUBLIC_CLASSES = [getattr(package, name) for package, name in PUBLIC if inspect.isclass(getattr(package, name))]
PUBLIC_METHODS = [
    function
    for kind in PUBLIC_CLASSES
    for name, method in vars(kind).items()
    if inspect.isfunction(function := getattr(method, "__func__", method))
    and not name.startswith("_")
    and function.__module__.startswith("resilience_kit.")
]
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
# Names of durations and times that do not carry their unit.
DURATION = re.compile(
    r"at|(.*_)?(backoff|delay|elapsed|interval|latency|period|retry_after|since|timeout|until|wait)(_p\d+)?"
)

each_module = pytest.mark.parametrize("module", MODULES)
each_public_name = pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
each_public_function = pytest.mark.parametrize("function", PUBLIC_FUNCTIONS)
each_public_class = pytest.mark.parametrize("kind", PUBLIC_CLASSES, ids=[kind.__name__ for kind in PUBLIC_CLASSES])
each_public_method = pytest.mark.parametrize(
    "method", PUBLIC_METHODS, ids=[method.__qualname__ for method in PUBLIC_METHODS]
)
each_package = pytest.mark.parametrize("package", PACKAGES, ids=[package.__name__ for package in PACKAGES])
each_lazy_package = pytest.mark.parametrize(
    "package", LAZY_PACKAGES, ids=[package.__name__ for package in LAZY_PACKAGES]
)


@pytest.fixture(autouse=True, scope="module")
def every_submodule():
    """Import all modules first: an imported submodule becomes an attribute of its package."""
    for module in MODULES:
        importlib.import_module(module)


# The public names


@each_package
def test_all_is_what_is_imported_for_type_checkers_and_at_run_time(package):
    tree = ast.parse(inspect.getsource(package))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resilience_kit.")
        for alias in node.names
    }
    # who counts and who logs is not for import, nor what makes names lazy
    assert imported - {"log_events", "lazy_names"} == set(package.__all__)


@each_lazy_package
def test_what_is_loaded_lazily_has_a_home_for_each_public_name(package):
    lazy = {name for names in package._HOMES.values() for name in names}
    assert lazy == set(package.__all__) - {"VirtualTimeLoop", "disabled", "isolated", "no_waiting"}


def parameters_of(function):
    return [
        f"{STARS.get(parameter.kind, '')}{parameter.name}"
        for parameter in inspect.signature(function).parameters.values()
    ]


def parts_of(kind):
    """What a class is made from; of an error, what it carries beside its message."""
    if issubclass(kind, BaseException) and "__init__" not in vars(kind):
        return []
    return [it for it in parameters_of(kind) if not (issubclass(kind, BaseException) and it == "message")]


def documented_beside(kind):
    """The fields that have a docstring of their own."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    return [
        field.target.id
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    ]


def documented(thing, section):
    """The names that a section of the docstring explains."""
    return list(explanations(thing, section))


def explanations(thing, section):
    """What a section of the docstring says, by name."""
    text = inspect.getdoc(thing).partition(f"{section}:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    ([\w*]+): (.*(?:\n     +.*)*)", text, re.MULTILINE))


def test_a_star_import_brings_all_public_names():
    names = {}
    exec("from resilience_kit import *", names)  # noqa: S102 - a star import is what is tested
    assert names.keys() - {"__builtins__"} == set(resilience_kit.__all__)


@each_public_name
def test_each_public_name_is_no_module(package, name):
    assert not isinstance(getattr(package, name), ModuleType)


@each_public_name
def test_each_public_name_comes_from_the_kit(package, name):
    assert getattr(package, name).__module__.startswith("resilience_kit.")


@each_public_name
def test_each_public_name_is_documented_by_a_sentence(package, name):
    assert re.match(r"[A-Z].*[.:;]$", inspect.getdoc(getattr(package, name)).splitlines()[0])


@each_public_function
def test_each_public_function_documents_its_parameters(function):
    assert documented(function, "Args") == parameters_of(function)


@each_public_class
def test_each_public_class_documents_what_it_is_made_of(kind):
    assert parts_of(kind) in (documented(kind, "Args"), documented(kind, "Attributes"), documented_beside(kind))


@each_public_method
def test_each_public_method_documents_its_parameters(method):
    assert documented(method, "Args") == [it for it in parameters_of(method) if it not in ("self", "cls")]


@pytest.mark.parametrize(
    "thing", [*PUBLIC_FUNCTIONS, *PUBLIC_CLASSES, *PUBLIC_METHODS], ids=lambda thing: thing.__qualname__
)
def test_each_duration_says_its_unit(thing):
    explained = explanations(thing, "Args") | explanations(thing, "Attributes")
    assert [name for name, text in explained.items() if DURATION.fullmatch(name) and "econd" not in text] == []


@each_public_method
def test_each_public_method_is_documented_by_a_sentence(method):
    assert re.match(r"[A-Z0-9].*[.:;]$", inspect.getdoc(method).splitlines()[0])


@each_public_function
def test_each_public_function_has_an_example(function):
    assert ">>> " in inspect.getdoc(function)


@each_public_class
def test_each_public_class_has_an_example(kind):
    assert ">>> " in inspect.getdoc(kind)


@each_package
def test_an_unknown_attribute_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=rf"^module '{package.__name__}' has no attribute 'retry_on_430'$"):
        package.retry_on_430  # noqa: B018 - asking is what raises


@each_package
def test_dir_tells_all_public_names(package):
    assert set(package.__all__) <= set(dir(package))


def test_a_lazy_name_is_looked_up_once():
    resilience_kit.explain  # noqa: B018 - asking is what loads it
    assert "explain" in vars(resilience_kit)


def test_importing_the_package_loads_nothing_heavy_and_nothing_optional():
    program = (
        "import sys, resilience_kit; "
        "print(*{'openai', 'tiktoken', 'starlette', 'river', 'redis', 'pydantic', 'pydantic_settings', 'typer', "
        "'rich', 'genai_prices', 'uvicorn', 'structlog', 'tenacity', 'aiolimiter', "
        "'sqlalchemy', 'sqlite3'} & sys.modules.keys())"
    )
    # coverage, which follows into processes, loads sqlite3
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    finished = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert finished.stdout.split() == []


def test_the_package_says_that_it_is_typed():
    assert resources.files("resilience_kit").joinpath("py.typed").is_file()


def test_the_package_is_installed_under_its_name():
    assert metadata.metadata("resilience-kit")["Name"] == "resilience-kit"


@each_module
def test_each_module_says_in_a_docstring_what_it_is(module):
    assert importlib.import_module(module).__doc__.splitlines()[0].endswith((".", ":"))


@each_module
def test_the_examples_in_docstrings_run(module):
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    for example in found:
        with testing.isolated():
            runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


# The errors

ERRORS = [
    ResilienceError("message"),
    ConfigurationError("message"),
    RateLimitTimeoutError("message", name="chat", retry_after=1.5),
    CircuitOpenError("message", name="chat", retry_after=2.5),
    TokenBudgetExceededError(
        "message", agent="MathAgent", limit=3, requested=2, remaining=1, unit="USD", retry_after=4.5
    ),
    StoreUnavailableError("message", name="resilience", reason="TimeoutError"),
    StoreContentError("message", key="resilience:{limit:chat}:quota"),
    StackOrderWarning("message", code="code"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def test_each_error_of_the_kit_is_looked_at_here():
    public = {getattr(resilience_kit, name) for name in resilience_kit.__all__}
    assert {type(error) for error in ERRORS} == {
        kind for kind in public if isinstance(kind, type) and issubclass(kind, Exception)
    }


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ResilienceError, (Exception,)),
        (ConfigurationError, (ResilienceError, ValueError)),
        (RateLimitTimeoutError, (ResilienceError, TimeoutError)),
        (CircuitOpenError, (ResilienceError, pybreaker.CircuitBreakerError)),
        (TokenBudgetExceededError, (ResilienceError,)),
        (StoreUnavailableError, (ResilienceError,)),
        (StoreContentError, (ResilienceError,)),
        (StackOrderWarning, (UserWarning,)),
    ],
)
def test_errors_are_caught_as_what_they_are(error, bases):
    assert issubclass(error, bases[0])
    assert issubclass(error, bases[-1])


def test_the_tree_of_errors_in_the_docstring_is_the_one_in_the_code():
    drawn = set(re.findall(r"[A-Z]\w+(?:Error|Warning)\b", errors.__doc__.partition("What the decorated")[0]))
    assert drawn == {type(error).__name__ for error in ERRORS} | {
        "ValueError",
        "TimeoutError",
        "CircuitBreakerError",
        "UserWarning",
    }


def everything_of(error):
    return type(error), str(error), error.args, vars(error)


@each_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_keeps_its_data_when_it_is_pickled(error, protocol):
    assert everything_of(pickle.loads(pickle.dumps(error, protocol))) == everything_of(error)  # noqa: S301 - our own


@each_error
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_an_error_keeps_its_data_when_it_is_copied(error, copied):
    assert everything_of(copied(error)) == everything_of(error)


def test_an_error_keeps_its_notes_when_it_is_pickled():
    error = RateLimitTimeoutError("message", name="chat", retry_after=None)
    error.add_note("a note")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["a note"]  # noqa: S301 - our own


def test_an_error_comes_back_from_another_process():
    program = (
        "import pickle, sys; from resilience_kit import CircuitOpenError; "
        "sys.stdout.buffer.write(pickle.dumps(CircuitOpenError('ill', name='chat', retry_after=2.5)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)  # noqa: S603 - our own program
    assert everything_of(pickle.loads(finished.stdout)) == everything_of(  # noqa: S301 - our own
        CircuitOpenError("ill", name="chat", retry_after=2.5)
    )


def test_a_users_error_beneath_ours_keeps_its_data_too():
    error = MyLimitError("message", name="chat", retry_after=1.0)
    error.customer = "Contoso"
    assert everything_of(copy.copy(error)) == everything_of(error)


class MyLimitError(RateLimitTimeoutError):
    """An error of a program that uses the kit."""
