"""The command `resilience-kit`."""

import contextlib
import json
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

from resilience_kit.errors import ConfigurationError, ResilienceError
from resilience_kit.testing.faults import Fault
from resilience_kit.testing.server_windows import RequestWindow, TokenWindow
from resilience_kit.testing.wire_errors import ErrorStyle, Headers, RetryAfterSpelling


def _exit_for_missing(error: ImportError, extras: str = "cli,testing") -> NoReturn:
    sys.stderr.write(f"{error}\nThis command needs more packages: pip install 'resilience-kit[{extras}]'\n")
    sys.exit(2)


try:
    import typer
except ImportError as missing:
    _exit_for_missing(missing)

_RANDOM_FAULTS = (
    Fault.rate_limit(retry_after=1.0),
    Fault.capacity(retry_after=1.0),
    Fault.internal_error(),
    Fault.unavailable(),
    Fault.connection_reset(),
    Fault.cut_mid_stream(),
)

_RANGE = "NUMBER|LEAST-MOST"

app = typer.Typer(no_args_is_help=True, add_completion=False)


def main() -> None:
    """Run the command line."""
    app()


# With a callback typer asks for a command's name even while there is only one command.
@app.callback()
def _resilience_kit() -> None:
    """Make calls to LLM services behave well."""


@app.command()
def simulator(
    *,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free port.")] = 8765,
    rpm: Annotated[float | None, typer.Option(help="Requests per minute; unlimited if not given.")] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens per minute; unlimited if not given.")] = None,
    period: Annotated[float, typer.Option(help="Seconds that a minute lasts.")] = 60.0,
    token_window: Annotated[TokenWindow, typer.Option(help="How tokens are counted.")] = "fixed",  # noqa: S107 - no secret
    request_window: Annotated[
        RequestWindow, typer.Option(help="Over how many seconds of a minute requests are evaluated.")
    ] = 10,
    absent_max_tokens: Annotated[int, typer.Option(help="Tokens charged for a completion without max_tokens.")] = 16,
    latency: Annotated[tuple[float, float], typer.Option(help="The least and the most seconds to an answer.")] = (0, 0),
    fault_rate: Annotated[float, typer.Option(help="The share of requests, 0 to 1, that a random fault meets.")] = 0.0,
    headers: Annotated[Headers, typer.Option(help="Which x-ratelimit headers are sent.")] = "full",
    header_lag: Annotated[int, typer.Option(min=0, help="By how many admissions the headers lag.")] = 0,
    retry_after_spelling: Annotated[
        RetryAfterSpelling, typer.Option(help="How a 429 says when to come back.")
    ] = "retry-after-ms",
    error_style: Annotated[ErrorStyle, typer.Option(help="Whose words a 429 uses.")] = "azure",
    seed: Annotated[int, typer.Option(help="Makes random latencies and faults repeat.")] = 0,
) -> None:
    """Serve a simulated Azure OpenAI until Ctrl-C."""
    # Imported here, so that other commands work without the extra.
    try:
        from resilience_kit.testing.simulator import AzureOpenAISimulator
    except ImportError as missing:
        _exit_for_missing(missing)
    try:
        azure = AzureOpenAISimulator(
            rpm=rpm,
            tpm=tpm,
            period=period,
            token_window=token_window,
            request_window=request_window,
            absent_max_tokens=absent_max_tokens,
            latency=latency,
            faults=_RANDOM_FAULTS if fault_rate else (),
            fault_rate=fault_rate or None,
            headers=headers,
            header_lag=header_lag,
            retry_after_spelling=retry_after_spelling,
            error_style=error_style,
            seed=seed,
            host=host,
            port=port,
        )
    except ConfigurationError as error:
        raise _refusal(error) from error
    try:
        with azure:
            typer.echo(f"Simulated Azure OpenAI at {azure.endpoint} until Ctrl-C. Point clients at it with:")
            typer.echo(f"  export AZURE_OPENAI_ENDPOINT={azure.endpoint} AZURE_OPENAI_API_KEY=simulated")
            _wait_for_interrupt()
    except (OSError, ValueError, TypeError) as error:
        # a host that no resolver takes is one of the last two
        raise _refusal(f"cannot listen on {host}:{port}: {error}") from error
    stats = azure.stats
    typer.echo(f"{stats.requests} requests: {stats.admitted} admitted, {stats.refused} refused, {stats.faults} faults.")


@app.command()
def explain(
    function: Annotated[str, typer.Argument(help="A decorated function, as package.module:function or :Class.method.")],
) -> None:
    """Tell the layers around a function, outermost first, and what is wrong with their order."""
    from resilience_kit.stack import explain as explained

    # As python -m does, so that a module of the current folder is found.
    sys.path.insert(0, "")
    try:
        found = pkgutil.resolve_name(function)
    except (ImportError, AttributeError, ValueError) as error:
        raise _refusal(f"{function}: {error}. Write it as package.module:function.") from error
    try:
        report = explained(found)
    except ConfigurationError as error:
        raise _refusal(error) from error
    typer.echo(_visible(report))
    raise typer.Exit(1 if report.warnings else 0)


@app.command()
def plan(
    *,
    rpm: Annotated[int, typer.Option(help="The quota's requests per minute.")],
    tpm: Annotated[int, typer.Option(help="The quota's tokens per minute.")],
    agents: Annotated[int, typer.Option(help="How many ask, each with one call at a time.")],
    prompt_tokens: Annotated[str, typer.Option(metavar=_RANGE, help="Tokens of a prompt.")],
    output_tokens: Annotated[str, typer.Option(metavar=_RANGE, help="Tokens of an answer.")],
    latency: Annotated[str, typer.Option(metavar=_RANGE, help="Seconds from sending a call to its answer.")],
    max_concurrent: Annotated[int | None, typer.Option(help="Calls under way at once; as needed if not given.")] = None,
    min_interval: Annotated[float | None, typer.Option(help="Seconds between the starts of two calls.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="What calls ask for as max_tokens; the most output tokens if not given.")
    ] = None,
    calls_per_minute: Annotated[
        float | None, typer.Option(help="Calls that each agent starts; the next with the answer if not given.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long to measure.")] = 10,
    token_window: Annotated[TokenWindow, typer.Option(help="How the server counts tokens.")] = "fixed",  # noqa: S107 - no secret
    request_window: Annotated[RequestWindow, typer.Option(help="Over how many seconds requests are evaluated.")] = 10,
    seed: Annotated[int, typer.Option(help="Another one draws other random times and tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Foresee what agents get out of a quota, and which settings they need."""
    from resilience_kit.planning import plan as planned

    try:
        found = planned(
            requests_per_minute=rpm,
            tokens_per_minute=tpm,
            agents=agents,
            prompt_tokens=_range(prompt_tokens),
            output_tokens=_range(output_tokens),
            latency=_range(latency),
            max_concurrent=max_concurrent,
            min_interval=min_interval,
            max_tokens=max_tokens,
            calls_per_minute=calls_per_minute,
            minutes=minutes,
            token_window=token_window,
            request_window=request_window,
            seed=seed,
        )
    except ConfigurationError as error:
        raise _refusal(error) from error
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else found)


def _refusal(text: object) -> typer.BadParameter:
    """A wrong argument; text from elsewhere may be in what is said of it."""
    return typer.BadParameter(_visible(text))


def _visible(text: object) -> str:
    from resilience_kit.monitoring.visible_text import visible_lines

    return visible_lines(text)


def _wait_for_interrupt() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _range(text: str) -> tuple[float, float]:
    least, _, most = text.partition("-")
    try:
        return float(least), float(most or least)
    except ValueError as error:
        raise _refusal(f"{text!r}: expected a number, or the least and the most, as 200-3000") from error


@app.command()
def dashboard(
    *,
    host: Annotated[str, typer.Option(help="Where to listen; any but this machine needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free port.")] = 8766,
    title: Annotated[str, typer.Option(help="What the page is headed.")] = "resilience_kit",
    history: Annotated[
        str | None, typer.Option(help="Where programs write their history. Default: resilience-history.sqlite3.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token. Default: the variable RESILIENCE_DASHBOARD_TOKEN.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which the page may be asked for, beside this machine's own.")
    ] = None,
) -> None:
    """Show a fleet, or a history, on a page in the browser; a program shows itself with create_app()."""
    try:
        from resilience_kit.monitoring.dashboard.command import run_dashboard
    except ImportError as missing:
        _exit_for_missing(missing, "cli,dashboard")
    try:
        run_dashboard(
            host=host,
            port=port,
            title=title,
            history=history,
            token_file=token_file,
            allowed_hosts=allowed_host or (),
        )
    except ConfigurationError as error:
        raise _refusal(error) from error


@app.command()
def report(
    *,
    since: Annotated[str, typer.Option(help="How far back, such as 30m, 12h, 7d or 2w.")] = "7d",
    history: Annotated[
        str, typer.Option(metavar="FILE|URL", help="The history's file, or its URL of SQLAlchemy's.")
    ] = "resilience-history.sqlite3",
    html: Annotated[Path, typer.Option(metavar="FILE", help="Where the page is written.")] = Path(
        "resilience-report.html"
    ),
    csv: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures are written.")] = Path(
        "resilience-report.csv"
    ),
) -> None:
    """Write what a history holds as a page to read and as figures to compute with."""
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.report import report_on, seconds_of, to_csv, to_html

    try:
        found = report_on(History(history), seconds=seconds_of(since))
    except ImportError as missing:
        _exit_for_missing(missing, "cli,history")
    except ConfigurationError as error:
        raise _refusal(error) from error
    try:
        html.write_text(to_html(found), encoding="utf-8")
        csv.write_text(to_csv(found), encoding="utf-8")
    except OSError as error:
        raise _refusal(f"cannot write {error.filename}: {error.strerror}") from error
    typer.echo(_visible(f"Wrote {html} and {csv}, of {len(found.samples)} samples."))


alerts = typer.Typer(no_args_is_help=True, help="Rules that watch limits, circuits, budgets and agents.")
app.add_typer(alerts, name="alerts")

_RULES = typer.Option(help="A TOML file of rules; the default ones if not given.")


@alerts.command("check")
def check_alerts(file: Annotated[str, typer.Argument(help="A TOML file of rules.")]) -> None:
    """Tell which rules a file puts in force, or what is wrong with it."""
    from resilience_kit.monitoring.alert_rules import load_rules

    try:
        said = load_rules(file)
    except ConfigurationError as error:
        raise _refusal(error) from error
    for rule in said.rules:
        lasting = f" for {rule.for_seconds:g} s" if rule.for_seconds else ""
        names = "" if rule.names is None else f" of {', '.join(map(repr, rule.names))}"
        watched = f"{rule.name}: {rule.severity} when {rule.measure}{names}"
        typer.echo(_visible(f"{watched} is above {rule.above:g}{lasting}"))
    typer.echo(f"{len(said.rules)} rules, {len(said.silences)} silences.")


@alerts.command("test")
def fire_alert(
    *,
    rules: Annotated[str | None, _RULES] = None,
    rule: Annotated[str, typer.Option(help="The rule that is to fire.")] = "circuit-open",
    webhook: Annotated[
        str | None,
        typer.Option(
            envvar="RESILIENCE_ALERTS_WEBHOOK_URL",
            help="Where to send it, signed with the key in RESILIENCE_ALERTS_WEBHOOK_SECRET; better given as a "
            "variable, since other users of the machine can see a command's options.",
        ),
    ] = None,
) -> None:
    """Fire one alert, to see that it reaches whom it should."""
    from resilience_kit.monitoring.alert_delivery import Webhook, WebhookRefusedError
    from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, load_rules
    from resilience_kit.monitoring.alerts import example_alert

    try:
        known = {each.name: each for each in (DEFAULT_RULES if rules is None else load_rules(rules).rules)}
        if rule not in known:
            raise _refusal(f"there is no rule {rule!r}: expected one of {', '.join(known)}")
        secret = os.environ.get("RESILIENCE_ALERTS_WEBHOOK_SECRET", "")
        receiver = None if webhook is None else Webhook(webhook, secret=secret, max_retries=2)
    except ConfigurationError as error:
        raise _refusal(error) from error
    alert = example_alert(known[rule], time.time())
    typer.echo(_visible(f"{alert.severity}: {alert.text}"))
    if receiver is None:
        typer.echo("No webhook was given, so it went no further: set RESILIENCE_ALERTS_WEBHOOK_URL for one.")
        return
    try:
        receiver(alert)
    except WebhookRefusedError as error:
        typer.echo(f"It was not delivered: {error}.")
        raise typer.Exit(1) from error
    except Exception as error:
        # its message may hold the address, which is a secret
        typer.echo(f"It was not delivered: {type(error).__name__}.")
        raise typer.Exit(1) from error
    typer.echo("The webhook took it.")


@app.command()
def doctor(
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="A model or deployment to look for; again for each further one.")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Show each variable, library and extra too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check settings, tokenizer, prices, endpoint, store and libraries, and say what to do about what is wrong.

    No key is shown or sent, and no request that costs. It ends with 1 where a check failed; warnings do not count.
    """
    try:
        from rich.console import Console
    except ImportError as missing:
        _exit_for_missing(missing, "cli")
    from resilience_kit.monitoring import doctor as checks

    findings = checks.examine(model or ())
    if as_json:
        typer.echo(json.dumps(checks.as_json(findings), indent=2))
    else:
        Console().print(checks.as_table(findings, with_details=details))
    raise typer.Exit(0 if checks.is_well(findings) else 1)


_Url = Annotated[str | None, typer.Option(help="Look at a running dashboard, such as http://127.0.0.1:8766.")]
_History = Annotated[str | None, typer.Option(help="Look at a history: its file, or its URL.")]
_Process = Annotated[str | None, typer.Option(help="One process alone; all if not given.")]


@app.command()
def top(
    *,
    url: _Url = None,
    history: _History = None,
    process: _Process = None,
    once: Annotated[bool, typer.Option("--once", help="Print the figures once, and end.")] = False,
) -> None:
    """Watch circuits, quotas, agents, retries and waits live, until Ctrl-C.

    The figures are the whole fleet's where RESILIENCE_STORE is set. Else say where they are: with --url those of a
    dashboard (whose token is read from RESILIENCE_DASHBOARD_TOKEN), with --history those of a file.
    """
    try:
        from resilience_kit.monitoring import terminal
    except ImportError as missing:
        _exit_for_missing(missing, "cli")
    from resilience_kit.monitoring.overview_sources import open_source

    with _told_as_errors(), open_source(url=url, history=history, process=process) as read:
        if once:
            terminal.print_once(read)
        else:
            terminal.watch(read)


@app.command()
def stats(
    *,
    url: _Url = None,
    history: _History = None,
    process: _Process = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the figures of now once; see `top` for where they come from."""
    try:
        from resilience_kit.monitoring import terminal
    except ImportError as missing:
        _exit_for_missing(missing, "cli")
    from resilience_kit.monitoring.overview_sources import open_source

    with _told_as_errors(), open_source(url=url, history=history, process=process) as read:
        if as_json:
            typer.echo(json.dumps(read().to_dict(), indent=2))
        else:
            terminal.print_once(read)


@contextlib.contextmanager
def _told_as_errors() -> Iterator[None]:
    """End with 1 and the text of an error of the kit's; text from elsewhere may be in it."""
    try:
        yield
    except ResilienceError as error:
        typer.echo(_visible(error), err=True)
        raise typer.Exit(1) from error
