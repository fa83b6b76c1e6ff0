"""The fleet that this process is in, by the settings in force."""

import atexit
from dataclasses import dataclass

from resilience_kit.fleet.connection import Connection
from resilience_kit.fleet.membership import Member
from resilience_kit.registry import mode
from resilience_kit.settings import current_settings


@dataclass(frozen=True, slots=True)
class Fleet:
    """All processes that share a store and a prefix, as this one reaches them."""

    connection: Connection
    member: Member

    def close(self) -> None:
        """Leave it, and close all that is open."""
        self.member.close()


def current_fleet() -> Fleet | None:
    """The fleet by the settings in force, joined now if this is its first use; None if no store is set.

    Raises:
        ConfigurationError: The extra `fleet` is not installed, or a setting is not what was expected.

    Example:
        >>> from resilience_kit.fleet.fleets import current_fleet
        >>> current_fleet() is None  # RESILIENCE_STORE is not set
        True
    """
    settings = current_settings()
    url, prefix, deadline = (
        settings.resilience_store,
        settings.resilience_store_prefix,
        settings.resilience_store_deadline_seconds,
    )
    if url is None:
        return None
    fleet = mode.fleets.get((url, prefix, deadline))
    if fleet is None:
        connection = Connection(url.get_secret_value(), prefix=prefix, deadline=deadline)
        # one of two threads that come at once wins; the other's was not started
        fleet = mode.fleets.setdefault((url, prefix, deadline), Fleet(connection, Member(connection)))
    fleet.member.start()
    return fleet


class Onlooker(Member):
    """A member that only reads: it gives no sign of life, as it takes no share of any quota."""

    def start(self) -> None:
        """Begin nothing."""

    def lost(self, error: Exception) -> None:
        """Ask again the next time: there is no worker to find the store again."""


def fleet_to_look_at(*, deadline: float) -> Fleet | None:
    """The fleet by the settings in force for who only shows what it does; None if no store is set.

    Args:
        deadline: Seconds that a call to the store may take.

    Raises:
        ConfigurationError: The extra `fleet` is not installed, or a setting is not what was expected.

    Example:
        >>> from resilience_kit.fleet.fleets import fleet_to_look_at
        >>> fleet_to_look_at(deadline=2.0) is None  # RESILIENCE_STORE is not set
        True
    """
    settings = current_settings()
    if settings.resilience_store is None:
        return None
    connection = Connection(
        settings.resilience_store.get_secret_value(), prefix=settings.resilience_store_prefix, deadline=deadline
    )
    return Fleet(connection, Onlooker(connection))


@atexit.register
def _leave_all() -> None:
    for fleet in mode.fleets.values():
        fleet.close()
