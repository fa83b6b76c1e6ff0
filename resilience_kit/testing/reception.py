"""Where each request is refused, admitted or met by a fault, and counted; safe to use from several threads."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from resilience_kit.forking import new_lock
from resilience_kit.testing.faults import Fault, FaultPlan
from resilience_kit.testing.server_windows import QuotaLevel, Refusal, ServerQuota
from resilience_kit.testing.simulator_stats import Admission, Books, Rejection, SimulatorStats

# These happen to an answer, so that their requests must be admitted; all others come instead of one.
_FAULTS_OF_ANSWERS = ("output_filter", "cut_mid_stream", "slow_stream")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a request: it is refused, or it meets a fault, or neither.

    Attributes:
        refusal: Why the quota refuses it.
        fault: What goes wrong.
        level: What the headers say that is left of the quota.
    """

    refusal: Refusal | None
    fault: Fault | None
    level: QuotaLevel


class Reception:
    """The quota, the faults and the books behind one lock.

    Args:
        make_quota: Makes an unused quota whose fixed windows count from the given time.
        fault_plan: What goes wrong.
        header_lag: By how many admissions the levels of verdicts lag behind.
    """

    def __init__(self, make_quota: Callable[[float], ServerQuota], fault_plan: FaultPlan, header_lag: int) -> None:
        self._lock = new_lock()
        self._make_quota = make_quota
        self._quota = make_quota(time.monotonic())
        self._fault_plan = fault_plan
        self._levels: deque[QuotaLevel] = deque(maxlen=header_lag + 1)
        self._books = Books()

    def reset(self) -> None:
        """Forget what was counted and injected; requests that are in flight stay so."""
        with self._lock:
            limits = self._quota.request_limit, self._quota.token_limit
            self._quota = self._make_quota(time.monotonic())
            self._quota.request_limit, self._quota.token_limit = limits
            self._levels.clear()
            self._fault_plan.forget_injected()
            self._books = Books(in_flight=self._books.in_flight, max_in_flight=self._books.in_flight)

    def set_limits(self, requests: float | None, tokens: float | None) -> None:
        """Change the limits per minute; None leaves one as it is, and `math.inf` is unlimited."""
        with self._lock:
            if requests is not None:
                self._quota.request_limit = requests
            if tokens is not None:
                self._quota.token_limit = tokens

    def inject(self, fault: Fault, times: int) -> None:
        """Let a fault happen to the next requests."""
        with self._lock:
            self._fault_plan.inject(fault, times)

    def stats(self) -> SimulatorStats:
        """Return a snapshot of the books."""
        with self._lock:
            return self._books.snapshot()

    @property
    def token_limit(self) -> float:
        """Tokens per minute; `math.inf` if unlimited."""
        return self._quota.token_limit

    @contextmanager
    def in_flight(self) -> Iterator[int]:
        """Count a request, and count it as in flight in the block; yields its number."""
        with self._lock:
            self._books.requests += 1
            self._books.in_flight += 1
            self._books.max_in_flight = max(self._books.max_in_flight, self._books.in_flight)
            number = self._books.requests
        try:
            yield number
        finally:
            with self._lock:
                self._books.in_flight -= 1

    def judge(self, tokens: float) -> Verdict:
        """Decide on a request that is charged so many tokens if it is admitted."""
        with self._lock:
            now = time.monotonic()
            fault = self._fault_plan.next()
            if fault is not None and fault.kind not in _FAULTS_OF_ANSWERS:
                self._books.faults += 1
                if fault.kind.endswith("429"):
                    self._books.rejections.append(Rejection(now, tokens, fault.kind))
                return Verdict(None, fault, self._lagging_level(now))
            refusal = self._quota.admit(now, tokens)
            if refusal is not None:
                self._books.rejections.append(Rejection(now, tokens, refusal.reason))
                return Verdict(refusal, None, self._lagging_level(now))
            self._books.admissions.append(Admission(now, tokens))
            self._books.faults += fault is not None
            self._levels.append(self._quota.level(now))
            return Verdict(None, fault, self._lagging_level(now))

    def count_usage(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what an answer says of its usage."""
        with self._lock:
            self._books.prompt_tokens += prompt_tokens
            self._books.completion_tokens += completion_tokens

    def count_cut(self) -> None:
        """Count a body that was cut."""
        with self._lock:
            self._books.streams_cut += 1

    def _lagging_level(self, now: float) -> QuotaLevel:
        return self._levels[0] if self._levels else self._quota.level(now)
