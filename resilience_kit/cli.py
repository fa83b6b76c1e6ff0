"""The command `resilience-kit`."""

import contextlib
import pkgutil
import sys
import threading
from typing import Annotated, NoReturn

from resilience_kit.errors import ConfigurationError
from resilience_kit.testing.faults import Fault
from resilience_kit.testing.server_windows import RequestWindow, TokenWindow
from resilience_kit.testing.wire_errors import ErrorStyle, Headers, RetryAfterSpelling


def _exit_for_missing(error: ImportError) -> NoReturn:
    sys.stderr.write(f"{error}\nThis command needs more packages: pip install 'resilience-kit[cli,testing]'\n")
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
        raise typer.BadParameter(str(error)) from error
    try:
        with azure:
            typer.echo(f"Simulated Azure OpenAI at {azure.endpoint} until Ctrl-C. Point clients at it with:")
            typer.echo(f"  export AZURE_OPENAI_ENDPOINT={azure.endpoint} AZURE_OPENAI_API_KEY=simulated")
            _wait_for_interrupt()
    except OSError as error:
        raise typer.BadParameter(f"cannot listen on {host}:{port}: {error}") from error
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
        raise typer.BadParameter(f"{function}: {error}. Write it as package.module:function.") from error
    try:
        report = explained(found)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(report)
    raise typer.Exit(1 if report.warnings else 0)


def _wait_for_interrupt() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
