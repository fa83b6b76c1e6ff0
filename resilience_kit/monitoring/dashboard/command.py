"""What `resilience-kit dashboard` does: shows a fleet or a history, in a process of its own."""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from resilience_kit.errors import ConfigurationError
from resilience_kit.fleet.fleets import fleet_to_look_at
from resilience_kit.monitoring.dashboard.app import application_of
from resilience_kit.monitoring.dashboard.figures import Figures
from resilience_kit.monitoring.dashboard.outlook import Outlook
from resilience_kit.monitoring.dashboard.security import LOOPBACK_NAMES, Guard
from resilience_kit.monitoring.dashboard.serving import TOKEN_VARIABLE, check_address, serve
from resilience_kit.monitoring.dashboard.sources import FleetProcesses, RecordedProcesses, Source
from resilience_kit.monitoring.fleet_samples import FleetSamples
from resilience_kit.monitoring.history import DEFAULT_PLACE, History
from resilience_kit.monitoring.visible_text import visible
from resilience_kit.settings import current_settings

# Seconds that the store may take to answer: nobody waits for it but who looks at the page.
_DEADLINE = 2.0


def run_dashboard(
    *, host: str, port: int, title: str, history: str | None, token_file: Path | None, allowed_hosts: Sequence[str]
) -> None:
    """Serve until Ctrl-C.

    Raises:
        ConfigurationError: The address needs a token, the token cannot be read or can be guessed, or the port is taken.
    """
    token = _token(token_file)
    check_address(host, has_token=token is not None)
    guard = Guard(token, (*LOOPBACK_NAMES, host, socket.gethostname(), *allowed_hosts))
    store = current_settings().resilience_store
    recorded = History(history or DEFAULT_PLACE) if history is not None or store is None else None
    fleet = fleet_to_look_at(deadline=_DEADLINE)
    source: Source = (
        FleetProcesses(FleetSamples(fleet)) if recorded is None or fleet is not None else RecordedProcesses(recorded)
    )
    figures = Figures(title, source, history=recorded, outlook=Outlook(recorded))
    what = "the fleet" if store is not None else f"the history at {recorded.place}" if recorded is not None else ""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError, TypeError) as error:
        # a host that no resolver takes is one of the last two
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot listen on {visible(host)}:{port}: {reason}") from error
    with listener:
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not listened on
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}/"
        sys.stdout.write(f"Showing {what} at {url} until Ctrl-C.\n")
        sys.stdout.flush()
        serve(application_of(figures, guard), listener=listener)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--token-file {visible(file)}: cannot be read: {type(error).__name__}") from error
