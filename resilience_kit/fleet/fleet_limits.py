"""The ledger of a limit in the fleet that this process is in."""

import threading
from collections.abc import Callable

from resilience_kit.fleet.fleet_ledger import FleetLedger
from resilience_kit.fleet.fleets import current_fleet
from resilience_kit.fleet.limit_store import ValkeyLimits
from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.settings import current_settings


def joined(
    name: str,
    own: WindowLedger,
    *,
    max_concurrent: int,
    min_interval: float,
    lock: threading.Lock,
    in_flight: Callable[[], int],
    look: Callable[[], None],
) -> FleetLedger | None:
    """The ledger of a limit in the fleet that this process is in, if it is in one."""
    fleet = current_fleet()
    if fleet is None:
        return None
    return FleetLedger(
        name,
        own,
        ValkeyLimits(fleet.connection, name, fleet.member.id, fleet.member.channel),
        fleet,
        max_concurrent=max_concurrent,
        min_interval=min_interval,
        on_failure=current_settings().on_store_failure,
        lock=lock,
        in_flight=in_flight,
        look=look,
    )
