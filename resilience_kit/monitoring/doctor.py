"""`resilience-kit doctor`: what is set, what is installed, what can be reached, and what to do about what is wrong."""

import functools
import hashlib
import os
import platform
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience_kit import pricing, vocabularies
from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.doctor_services import endpoint_checks, store_checks
from resilience_kit.monitoring.doctor_settings import check_settings, settings_checks
from resilience_kit.monitoring.findings import Check, Finding, run_check
from resilience_kit.monitoring.visible_text import visible

if TYPE_CHECKING:
    from rich.table import Table

# What users and SDKs name the variables that hold a deployment or a model.
MODEL_VARIABLES = (
    "AZURE_OPENAI_DEPLOYMENT",
    "AZURE_OPENAI_DEPLOYMENT_NAME",
    "AZURE_OPENAI_CHAT_DEPLOYMENT_NAME",
    "OPENAI_MODEL",
    "OPENAI_CHAT_MODEL_ID",
)
_DISTRIBUTION = "resilience-kit"
# For those who work on the kit, not for those who use it.
_OWN_EXTRAS = frozenset({"bench", "dev", "examples"})
# tiktoken 0.14 downloads a vocabulary from here, and keeps it under the SHA-1 of its URL.
_VOCABULARIES = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_DEADLINE = 10.0
_LONGEST = 2_000
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True, slots=True)
class _Requirement:
    """A library that the kit needs, always or for an extra, and the version of it that is installed."""

    name: str
    least: str
    extra: str
    installed: str | None

    @property
    def is_met(self) -> bool:
        return self.installed is not None and _numbers(self.installed) >= _numbers(self.least)

    def __str__(self) -> str:
        return f"{self.name} {self.installed or 'missing'}"


def examine(models: Sequence[str] = (), *, deadline: float = _DEADLINE) -> tuple[Finding, ...]:
    """Run all checks, one after another; each makes a finding, also one that raises or hangs.

    Args:
        models: Models or deployments whose tokenizer and prices are looked for. Default: those that the environment
            names (AZURE_OPENAI_DEPLOYMENT, OPENAI_MODEL and their kin), else gpt-4o.
        deadline: Seconds that each check may take.

    Example:
        >>> from resilience_kit.monitoring.doctor import examine
        >>> [finding.check for finding in examine()][:2]
        ['python', 'libraries']
    """

    def run(checks: Iterable[Check]) -> list[Finding]:
        return [run_check(check, deadline=deadline) for check in checks]

    findings = run((check_python, check_libraries, check_extras, check_settings))
    can_read = findings[-1].verdict != "failed"
    if can_read:
        findings += run(settings_checks())
    for model in models or configured_models():
        findings += run((functools.partial(check_tokenizer, model), functools.partial(check_prices, model)))
    findings += run(endpoint_checks())
    if not can_read:
        return (*findings, Finding("store", "failed", "not looked for, as the settings cannot be read"))
    first, *others = store_checks()
    findings += run((first,))
    # each would say again that it is not reached
    if findings[-1].verdict != "failed":
        findings += run(others)
    return tuple(findings)


def configured_models() -> tuple[str, ...]:
    """The models and deployments that the environment names; gpt-4o where it names none."""
    names = (os.environ.get(variable) for variable in MODEL_VARIABLES)
    return tuple(dict.fromkeys(name for name in names if name)) or (vocabularies.DEFAULT_MODEL,)


def is_well(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed; a warning is no failure."""
    return all(finding.verdict != "failed" for finding in findings)


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Findings in plain JSON."""
    return [asdict(finding) for finding in findings]


def as_table(findings: Iterable[Finding], *, with_details: bool = False) -> "Table":
    """Findings to be printed by rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        # Text is printed as it is: nothing in it is markup
        said = Text(visible(finding.found, longest=_LONGEST))
        if finding.advice:
            said.append(f"\n→ {visible(finding.advice, longest=_LONGEST)}", style="cyan")
        for detail in finding.details if with_details else ():
            said.append(f"\n  {visible(detail)}", style="dim")
        table.add_row(Text(finding.verdict, style=_COLOURS[finding.verdict]), Text(visible(finding.check)), said)
    return table


# What is installed


def check_python() -> Finding:
    """Which Python this is; the package does not install on one that is too old."""
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    try:
        return Finding("python", "ok", f"{found}, resilience-kit {metadata.version(_DISTRIBUTION)}")
    except metadata.PackageNotFoundError:
        return Finding(
            "python",
            "warning",
            f"{found}, resilience-kit from a folder: what it needs is not known",
            "Install it: pip install resilience-kit",
        )


def check_libraries() -> Finding:
    """Whether the libraries that the kit always needs are there, and new enough."""
    needed = [it for it in _requirements() if not it.extra]
    unmet = [it for it in needed if not it.is_met]
    details = tuple(map(str, needed))
    if not unmet:
        return Finding("libraries", "ok", f"all {len(needed)} are new enough", details=details)
    missing = ", ".join(f"{it.name}>={it.least} (here: {it.installed or 'none'})" for it in unmet)
    return Finding("libraries", "failed", f"needed: {missing}", "pip install --upgrade resilience-kit", details)


def check_extras() -> Finding:
    """Which extras are installed; one whose libraries are too old does not work."""
    extras = defaultdict[str, list[_Requirement]](list)
    for it in _requirements():
        if it.extra and it.extra not in _OWN_EXTRAS:
            extras[it.extra].append(it)
    there = [extra for extra, needed in extras.items() if all(it.is_met for it in needed)]
    old = [str(it) for needed in extras.values() for it in needed if it.installed is not None and not it.is_met]
    details = tuple(
        f"{extra}: {', '.join(map(str, needed))}"
        + ("" if extra in there else f" (pip install 'resilience-kit[{extra}]')")
        for extra, needed in extras.items()
    )
    found = f"installed: {', '.join(there) or 'none'}"
    absent = ", ".join(extra for extra in extras if extra not in there)
    if old:
        return Finding(
            "extras",
            "warning",
            f"{found}; too old: {', '.join(dict.fromkeys(old))}",
            f"pip install --upgrade 'resilience-kit[{absent.replace(' ', '')}]'",
            details,
        )
    return Finding("extras", "ok", f"{found}; not installed: {absent or 'none'}", details=details)


def _requirements() -> tuple[_Requirement, ...]:
    """What the package's metadata say that it needs; nothing where it is not installed."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ()
    return tuple(map(_requirement, lines))


def _requirement(line: str) -> _Requirement:
    needed, _, marker = line.partition(";")
    name = re.split(r"[^\w.-]", needed.strip(), maxsplit=1)[0]
    least = re.search(r">=\s*([\d.]+)", needed)
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        installed = None
    return _Requirement(name, least[1] if least else "0", extra[1] if extra else "", installed)


def _numbers(version: str) -> tuple[int, ...]:
    """The release in a version, to be compared: (1, 2) of 1.2.0rc1."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(it) for it in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


# What is known of a model


def check_tokenizer(model: str) -> Finding:
    """Whether tokens are counted for a model without a network."""
    encoding = vocabularies.encoding_name(model)
    if vocabularies.is_packaged(encoding):
        return Finding("tokenizer", "ok", f"{model} is counted with {encoding}, from the extra offline")
    if _is_cached(encoding):
        return Finding("tokenizer", "ok", f"{model} is counted with {encoding}, from tiktoken's cache")
    return Finding(
        "tokenizer",
        "warning",
        f"{model} is counted with {encoding}, which the first call downloads, else tokens are estimated, too high",
        "pip install 'resilience-kit[offline]'",
    )


def check_prices(model: str) -> Finding:
    """Whether it is known what a model costs."""
    try:
        pricing.check_model(model)
    except ConfigurationError:
        advice = "Set them with pricing.set_prices()"
        if not pricing.are_at_hand():
            advice = f"pip install 'resilience-kit[cost]', or s{advice[1:]}"
        return Finding("prices", "warning", f"none is known for {model}: its calls are not in any sum of costs", advice)
    return Finding("prices", "ok", f"known for {model}")


def _is_cached(encoding: str) -> bool:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = str(Path(tempfile.gettempdir(), "data-gym-cache"))
    url = _VOCABULARIES.format(encoding)
    # tiktoken's name of a file, not a matter of security
    return bool(folder) and Path(folder, hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).is_file()
