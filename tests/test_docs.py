"""README, CONTRIBUTING and docs/ keep their word: what they show runs, prints what they say, and leads somewhere.

A block of Python runs as it is pasted, in a program of its own. A block of text that follows it directly is what it
prints. Lines of a shell that start `resilience-kit` or `python -m` are read by the command that they name.
"""

import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

import resilience_kit
from resilience_kit import azure, cli, events, monitoring, testing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED_COMMAND = re.compile(r"^    ((?:resilience-kit|python -m) .*)$", re.MULTILINE)
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]: (\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE)

BLOCKS = [
    pytest.param(code, output, id=f"{page} {number}")
    for page, text in TEXTS.items()
    for number, (code, output) in enumerate((match.groups() for match in PYTHON.finditer(text)), 1)
]
COMMANDS = [
    pytest.param(command, id=f"{page}: {command}")
    for page, text in TEXTS.items()
    for block in [*SHELL.findall(text), *INDENTED_COMMAND.findall(text)]
    for line in block.replace("\\\n", " ").splitlines()
    if (command := re.sub(r"^(?:\$ )?(?:\w+=\S+ )*", "", line.strip())).startswith(("resilience-kit ", "python -m "))
]


@pytest.fixture
def a_program_of_its_own(monkeypatch):
    """Give back at the end what a block has changed in the process, beside what every test gives back."""
    loggers = [logging.getLogger(), logging.getLogger("resilience_kit")]
    loggers += [
        logger for name, logger in logging.root.manager.loggerDict.items() if name.startswith("resilience_kit.")
    ]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers if isinstance(logger, logging.Logger)]
    environment, listeners = dict(os.environ), events._listeners
    yield
    events._replace_listeners(listeners)
    os.environ.clear()
    os.environ.update(environment)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("a_program_of_its_own")
@pytest.mark.parametrize(("code", "output"), BLOCKS)
def test_a_python_block_runs_as_it_is_pasted_and_prints_what_the_page_says(code, output, tmp_path, capsys):
    script = tmp_path / "pasted.py"
    script.write_text(code, encoding="utf-8")

    exec(compile(code, script, "exec"), {"__name__": "__main__"})  # noqa: S102 - this is what a reader does

    if output is not None:
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("page", TEXTS)
def test_all_python_of_a_page_stands_where_it_is_run(page):
    assert TEXTS[page].count("```python") + TEXTS[page].count("```py\n") == len(PYTHON.findall(TEXTS[page]))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_a_page_shows_is_one_that_the_program_takes(command, monkeypatch):
    program, *arguments = shlex.split(command, comments=True)
    if program == "python":
        module, *options = arguments[1:]
        found = importlib.util.find_spec(module)
        if found.submodule_search_locations:
            found = importlib.util.find_spec(f"{module}.__main__")
        source = Path(found.origin).read_text(encoding="utf-8")
        if ROOT in Path(found.origin).parents:
            assert [option for option in options if option.startswith("-") and f'"{option}"' not in source] == []
        return
    group = typer.main.get_command(cli.app)
    context = group.make_context(program, arguments)
    while group.__class__.__name__ == "TyperGroup":
        name, group, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        context = group.make_context(name, arguments, parent=context)


def commands_of(group, prefix=""):
    """All commands of the program by the words that name them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


@pytest.mark.parametrize("name", [name for name, _ in commands_of(typer.main.get_command(cli.app))])
def test_the_reference_tells_each_option_of_a_command_with_its_default(name):
    command = dict(commands_of(typer.main.get_command(cli.app)))[name]
    section = TEXTS["docs/reference/command_line.md"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    expected = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        option = parameter.name.upper() if parameter.param_type_name == "argument" else max(parameter.opts, key=len)
        default = parameter.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        default = "" if default is None or default is False else f"`{shown}`"
        expected.append(f"| `{option}` | {'required' if parameter.required else default} | {parameter.help} |")

    assert command.help.splitlines()[0] in section
    assert re.findall(r"^\| `.*$", section, re.MULTILINE) == expected


@pytest.mark.parametrize("package", [resilience_kit, azure, monitoring, testing])
def test_the_reference_has_each_public_name(package):
    told = "\n".join(text for page, text in TEXTS.items() if page.startswith("docs/reference/"))
    names = set(re.findall(rf"^::: {package.__name__}\.(\w+)$", told, re.MULTILINE))

    # there for those who expect it there
    assert set(package.__all__) - names <= ({"get_all_resilience_stats"} if package is azure else set())


def test_the_reference_has_each_event():
    names = set(re.findall(r"^::: resilience_kit\.events\.(\w+)$", TEXTS["docs/reference/events.md"], re.MULTILINE))

    kinds = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)]
    assert {kind.__name__ for kind in kinds} <= names


def test_the_list_of_rooms_has_each_module():
    folder = Path(resilience_kit.__file__).parent
    rooms = {path.name for path in folder.glob("[!_]*.py")} | {
        f"{path.parent.name}/" for path in folder.glob("*/__init__.py")
    }

    assert rooms <= set(re.findall(r"`([\w./]+)`", TEXTS["CONTRIBUTING.md"]))


# The links


def anchors(page):
    """The names of a page's headings that GitHub and the site agree upon, and those of the docstrings on it."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    names = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        on_github = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        on_the_site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", shown.lower()).strip())
        if on_github == on_the_site:
            names.add(on_github)
    return names


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", FENCED.sub("", TEXTS[page]))
    lost = []
    for link in (unquote("".join(groups)) for groups in LINK.findall(text)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_another_host(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}

    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own pages

    assert built.returncode == 0, built.stderr
    loaded = re.compile(r"<(?:script|img|iframe|link|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s>]*")
    pages = {page: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")}
    assert [(page.name, foreign) for page, html in pages.items() for foreign in loaded.findall(html)] == []
