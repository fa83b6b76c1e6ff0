"""The circuits that are shared by name: the state of each, and who is let in under it.

The states, the counters and the moves between them are pybreaker's. What pybreaker 1.4.1 does around the call is not
used: its `call()` counts no failure of a coroutine, holds its lock while the function runs, takes cancellation for a
failure and an excluded error for a success, and lets any number of trials through when half-open.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pybreaker

from resilience_kit.errors import CircuitOpenError
from resilience_kit.events import CircuitClosed, CircuitHalfOpened, CircuitOpened, CircuitRefused, Event, emit
from resilience_kit.forking import new_reentrant_lock
from resilience_kit.registry import Registry, Value, effective
from resilience_kit.waiting import now

if TYPE_CHECKING:
    from resilience_kit.fleet.fleet_circuits import CircuitNews, SharedCircuit

# A call that finds no permit for a trial may come again after so long: the store has answered by then, if it is well.
_SECONDS_TO_PERMIT = 0.05


@dataclass(frozen=True, slots=True)
class CircuitConfiguration:
    """What a decorator says of a circuit; None for what it leaves to the settings."""

    failure_threshold: int | None = None
    recovery_timeout: float | None = None
    success_threshold: int | None = None
    half_open_max_calls: int | None = None


@dataclass(frozen=True, slots=True)
class CircuitStatistics:
    """Where a circuit stands now: its state, and counts of failures and trials."""

    state: str
    failure_count: int
    success_count: int
    trials_in_flight: int


class Admission:
    """What a call was let in as: under which state of the circuit, and whether as a trial."""

    __slots__ = ("is_over", "is_trial", "state_number")

    state_number: int
    is_trial: bool
    is_over: bool


class Circuit(pybreaker.CircuitBreakerListener):
    """The one circuit of a name.

    An outcome counts only in the state in which its call was let in: a straggler of before neither closes a
    half-open circuit nor opens it again.
    """

    def __init__(self, name: str, configuration: CircuitConfiguration) -> None:
        self.name = name
        self.parameters = effective_parameters(configuration)
        values = {key: parameter.value for key, parameter in self.parameters.items()}
        self._recovery_timeout: float = values["recovery_timeout"]
        self._half_open_max_calls: int = values["half_open_max_calls"]
        self._storage = pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=values["failure_threshold"],
            reset_timeout=self._recovery_timeout,
            success_threshold=values["success_threshold"],
            listeners=[self],
            state_storage=self._storage,
            name=name,
        )
        # Reentrant: a stream that the garbage collector drops leaves wherever its thread happens to be.
        self.lock = self._lock = new_reentrant_lock()
        self._state_number = 0
        # The same while the circuit is closed, else None.
        self._closed_number: int | None = 0
        self._trials = 0
        self._open_until = 0.0
        self._last_error = ""
        self._closing_reason = "recovered"
        self._events: list[Event] = []
        # While it moves as another process did.
        self._news: CircuitNews | None = None
        # first None: the fleet may tell of it while this process is being told of the fleet
        self._shared: SharedCircuit | None = None
        self._shared = _shared(self, values)

    def statistics(self) -> CircuitStatistics:
        """Where the circuit stands now."""
        with self._lock:
            state = self._breaker.current_state.upper().replace("-", "_")
            return CircuitStatistics(state, self._breaker.fail_counter, self._breaker.success_counter, self._trials)

    def admit(self, admission: Admission | None = None) -> Admission:
        """Let a call in, as a trial if the circuit is half-open.

        Raises:
            CircuitOpenError: The circuit is open, or has all its trials under way.
        """
        admission = admission or Admission()
        # One read, without the lock: a circuit that opens just now does so just after.
        closed_number = self._closed_number
        if closed_number is None:
            self._admit_unless_open(admission)
        else:
            admission.state_number = closed_number
            admission.is_trial = admission.is_over = False
        return admission

    def _admit_unless_open(self, admission: Admission) -> None:
        is_admitted = False
        try:
            with self._lock:
                if self._breaker.current_state == pybreaker.STATE_OPEN:
                    seconds = self._open_until - now()
                    if seconds > 0:
                        raise self._refusal(f"is open for another {seconds:.1f} s", seconds)
                    self._check_trials()
                    self._breaker.half_open()
                is_trial = self._breaker.current_state == pybreaker.STATE_HALF_OPEN
                if is_trial:
                    self._check_trials()
                admission.state_number = self._state_number
                admission.is_trial, admission.is_over = is_trial, False
                self._trials += is_trial
                is_admitted = True
            self.tell()
        except BaseException:
            # a refusal, or an interrupt that comes while a listener hears of the trial
            if is_admitted:
                self.settle(admission)
            self.tell()
            raise

    def readmit(self, admission: Admission) -> None:
        """Ask again for a call that had to wait: it may have been let in under a state that is over.

        Raises:
            CircuitOpenError: As admit() would.
        """
        if not admission.is_over and admission.state_number != self._state_number:
            self.admit(admission)

    def settle(self, admission: Admission, *, failure: BaseException | None = None, success: bool = False) -> None:
        """Count an outcome: a failure, a success or neither; give a trial's permit back in any case."""
        if success and not admission.is_trial and not self._storage.counter:
            # There is no failure that it could end, and so no need for the lock.
            admission.is_over = True
            return
        with self._lock:
            admission.is_over = True
            if admission.state_number == self._state_number:
                if admission.is_trial:
                    self._trials -= 1
                    if self._shared is not None:
                        self._shared.note_trial_end(success=success)
                if failure is not None:
                    self._count_failure(failure, is_trial=admission.is_trial)
                elif success:
                    self._count_success(is_trial=admission.is_trial)
        self.tell()

    def reset(self) -> None:
        """Close the circuit and forget its failures."""
        with self._lock:
            self._close("reset")
            if self._shared is not None:
                # also where it is closed here: it may be open elsewhere
                self._shared.note_move("reset")
        self.tell()

    @property
    def trials_in_flight(self) -> int:
        """How many trials are under way."""
        return self._trials

    @property
    def seconds_open(self) -> float | None:
        """Seconds until it lets trials through, 0 or less if it does; None while it is closed."""
        state = self._breaker.current_state
        if state == pybreaker.STATE_CLOSED:
            return None
        return self._open_until - now() if state == pybreaker.STATE_OPEN else 0.0

    def follow(self, news: "CircuitNews") -> None:
        """Move as another process did; `tell` is to be called after it, without the lock."""
        with self._lock:
            self._news = news
            if news.seconds is None:
                self._close(news.reason)
            elif self._breaker.current_state == pybreaker.STATE_OPEN:
                self._open_until = now() + news.seconds
            else:
                self._breaker.open()
            self._news = None

    def state_change(self, cb: pybreaker.CircuitBreaker, old_state: Any, new_state: Any) -> None:
        """Take note of a move; pybreaker calls it, under the lock."""
        self._state_number += 1
        self._closed_number = self._state_number if new_state.name == pybreaker.STATE_CLOSED else None
        self._trials = 0
        news = self._news
        if new_state.name == pybreaker.STATE_HALF_OPEN:
            self._events.append(CircuitHalfOpened(name=self.name))
        elif new_state.name == pybreaker.STATE_CLOSED:
            self._events.append(CircuitClosed(name=self.name, reason=self._closing_reason))
            if self._shared is not None and news is None:
                self._shared.note_move(self._closing_reason)
        else:
            seconds, failures, error = self._recovery_timeout, cb.fail_counter, self._last_error
            if news is not None and news.seconds is not None:
                seconds, failures, error = news.seconds, news.failures, news.reason
            self._open_until = now() + seconds
            self._events.append(CircuitOpened(name=self.name, failures=failures, error=error, seconds=seconds))
            if self._shared is not None and news is None:
                self._shared.note_move("open", failures=failures, error=error)

    def _close(self, reason: str) -> None:
        self._closing_reason = reason
        if self._breaker.current_state == pybreaker.STATE_CLOSED:
            self._storage.reset_counter()
        else:
            self._breaker.close()
        self._closing_reason = "recovered"

    def _check_trials(self) -> None:
        if self._shared is None:
            allowed, seconds = self._half_open_max_calls, 0.0
        else:
            allowed, seconds = self._shared.trials_allowed(), _SECONDS_TO_PERMIT
        if self._trials >= allowed:
            raise self._refusal("is half-open, and all its trials are under way", seconds)

    def _count_failure(self, failure: BaseException, *, is_trial: bool) -> None:
        self._last_error = type(failure).__name__
        self._storage.increment_counter()
        if is_trial or self._breaker.fail_counter >= self._breaker.fail_max:
            self._breaker.open()

    def _count_success(self, *, is_trial: bool) -> None:
        if not is_trial:
            self._storage.reset_counter()
            return
        self._storage.increment_success_counter()
        if self._breaker.success_counter >= self._breaker.success_threshold:
            self._breaker.close()

    def _refusal(self, state: str, seconds: float) -> CircuitOpenError:
        self._events.append(CircuitRefused(name=self.name, seconds=seconds))
        if self._shared is not None:
            self._shared.note_refusal()
        return CircuitOpenError(
            f"circuit {self.name!r} {state}: nothing was sent. Try later, give the function a fallback, or call "
            f"reset_circuit_breakers({self.name!r})",
            name=self.name,
            retry_after=seconds,
        )

    def tell(self) -> None:
        """Tell listeners, and the fleet, what happened; called without the lock."""
        # A listener may take its time, or wait for a thread that asks for the state.
        while self._events:
            with self._lock:
                events, self._events = self._events, []
            for event in events:
                emit(event)
        if self._shared is not None:
            self._shared.hurry()


def _are_shared() -> bool:
    """Whether there is a store, through which circuits reach other processes."""
    # pydantic takes 0.15 s to import
    from resilience_kit.settings import current_settings

    return current_settings().resilience_store is not None


def _shared(circuit: Circuit, values: dict[str, Any]) -> "SharedCircuit | None":
    """The fleet's side of a circuit, where there is a fleet."""
    # what a process without a store does not need, it does not load
    if not _are_shared():
        return None
    from resilience_kit.fleet.fleet_circuits import SharedCircuit
    from resilience_kit.fleet.fleets import current_fleet

    fleet = current_fleet()
    if fleet is None:
        return None
    return SharedCircuit(
        circuit,
        fleet,
        max_trials=values["half_open_max_calls"],
        success_threshold=values["success_threshold"],
    )


def effective_parameters(configuration: CircuitConfiguration) -> dict[str, Value]:
    """What a circuit is made of, from what was declared and from the settings."""
    return {
        "failure_threshold": effective(configuration.failure_threshold, setting="circuit_breaker_failure_threshold"),
        "recovery_timeout": effective(configuration.recovery_timeout, setting="circuit_breaker_recovery_timeout"),
        "success_threshold": effective(configuration.success_threshold, setting="circuit_breaker_success_threshold"),
        "half_open_max_calls": effective(configuration.half_open_max_calls, 1),
    }


circuits: Registry[CircuitConfiguration, Circuit] = Registry(
    "circuit", "circuit_breakers", Circuit, effective_parameters, is_shared=_are_shared
)
