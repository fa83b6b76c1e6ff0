"""A simulator of Azure OpenAI: a real HTTP server on loopback with the service's quotas, headers, errors and faults."""

import asyncio
import inspect
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Literal, Self, TypedDict, get_args

try:
    from starlette.requests import ClientDisconnect, Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from resilience_kit.testing.asgi_responses import (
        error_response,
        never_answer,
        paced_response,
        reset,
        unless_client_leaves,
    )
    from resilience_kit.testing.background_server import BackgroundServer
except ImportError as error:
    raise ImportError("The simulator needs starlette and uvicorn: pip install 'resilience-kit[testing]'") from error

from resilience_kit.errors import ConfigurationError
from resilience_kit.testing.exchange import (
    Responder,
    SimulatedAnswer,
    SimulatedRequest,
    answer_briefly,
    completions_charged,
    count_prompt_tokens,
    operation_at,
    read_request,
    reserved_completion_tokens,
    tokens_by_length,
)
from resilience_kit.testing.faults import Fault, FaultPlan
from resilience_kit.testing.reception import Reception
from resilience_kit.testing.server_windows import RequestWindow, ServerQuota, TokenWindow
from resilience_kit.testing.simulator_stats import SimulatorStats
from resilience_kit.testing.wire_errors import (
    NOT_FOUND,
    SIMULATOR_FAILED,
    UNAUTHORIZED,
    Dialect,
    ErrorStyle,
    Headers,
    RetryAfterSpelling,
    faulty,
    level_headers,
    malformed,
    rate_limited,
    remaining_headers,
)
from resilience_kit.testing.wire_format import Reply, streamed_body, whole_body

AbsentMaxTokens = Literal["cheap", "dear"] | int
Latency = float | tuple[float, float] | Callable[[SimulatedRequest], float]

_CHEAP_COMPLETION = 16
_MODEL_CONTEXT = 128_000
_API_VERSION = "2024-10-21"


class ClientOptions(TypedDict):
    """What the Azure clients of the openai SDK need in order to reach a simulator."""

    azure_endpoint: str
    api_key: str
    api_version: str


class AzureOpenAISimulator:
    """An Azure OpenAI service on this machine, to test against.

    It is a context manager, `with` and `async with` alike. While it is entered, a thread of its own serves chat
    completions, responses and embeddings at `endpoint`, with and without streaming, for the clients `AzureOpenAI` and
    `OpenAI` of the openai SDK, and for any other HTTP client.

    Args:
        rpm: Requests per minute; None is unlimited.
        tpm: Tokens per minute; None is unlimited. A request is charged when it arrives: its prompt and its
            `max_tokens` times `best_of` or `n`.
        period: Seconds that a minute lasts here.
        token_window: "fixed" counts tokens anew each period, the first of which starts at construction or `reset`;
            "sliding" counts those of the last period.
        request_window: Over how many seconds of a minute `rpm` is evaluated too: with 1, 600 requests per minute are
            also 10 in each second; with 10, they are 100 in ten seconds. The seconds scale with `period`.
        count_refused: Whether requests that the quota refuses count towards `rpm`.
        absent_max_tokens: Tokens charged for a completion without `max_tokens`. "cheap" is 16; "dear" is the model's
            context of 128,000, or what `tpm` has room for.
        count_prompt: Counts a prompt's tokens; one for each four characters by default.
        latency: Seconds between admission and answer; or the least and the most; or a function of the request.
        responder: What the model answers: a function of the request that returns a text or a `SimulatedAnswer`, or an
            awaitable of either. It runs in the simulator's event loop. If it raises, the client gets a 500, and the
            error is raised in an `ExceptionGroup` at the end of the `with` block, or noted on the error that ends it.
        faults: What goes wrong: one entry per request that is well-formed, None for nothing; at the end nothing goes
            wrong any more. May be endless.
        fault_rate: The share of requests, from 0 to 1, that a random one of `faults` happens to, instead of playing
            `faults` in order.
        headers: "full" sends `x-ratelimit-limit-*`, `-remaining-*` and `-reset-*`; "remaining" only those; "off" none.
        header_lag: By how many admissions the headers lag behind.
        responses_remaining_unknown: Whether `x-ratelimit-remaining-*` is -1 on the Responses API.
        retry_after_spelling: How a 429 says when to come back. "retry-after" is in whole seconds, "message" leaves it
            to the message, and "none" says nothing.
        error_style: Whose words a 429 uses.
        seed: Makes random latencies and faults repeat.
        host: Where to listen.
        port: Where to listen; 0 takes a free one.

    Raises:
        ConfigurationError: If an option has a value that it cannot have.

    Example:
        >>> from openai import AzureOpenAI
        >>> with AzureOpenAISimulator(rpm=60, tpm=1_000) as azure, AzureOpenAI(**azure.client_options()) as client:
        ...     messages = [{"role": "user", "content": "Hello!"}]
        ...     completion = client.chat.completions.create(model="gpt-4o", messages=messages, max_tokens=20)
        ...     print(completion.choices[0].message.content, azure.stats.admitted)
        A simulated answer to: Hello! 1
    """

    def __init__(
        self,
        *,
        rpm: float | None = None,
        tpm: float | None = None,
        period: float = 60.0,
        token_window: TokenWindow = "fixed",  # noqa: S107 - tokens of text, no secret
        request_window: RequestWindow = 10,
        count_refused: bool = False,
        absent_max_tokens: AbsentMaxTokens = "cheap",
        count_prompt: Callable[[str], int] = tokens_by_length,
        latency: Latency = 0.0,
        responder: Responder = answer_briefly,
        faults: Iterable[Fault | None] = (),
        fault_rate: float | None = None,
        headers: Headers = "full",
        header_lag: int = 0,
        responses_remaining_unknown: bool = False,
        retry_after_spelling: RetryAfterSpelling = "retry-after-ms",
        error_style: ErrorStyle = "azure",
        seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        _check_choice("token_window", token_window, get_args(TokenWindow))
        _check_choice("request_window", request_window, get_args(RequestWindow))
        _check_choice("headers", headers, get_args(Headers))
        _check_choice("retry_after_spelling", retry_after_spelling, get_args(RetryAfterSpelling))
        _check_choice("error_style", error_style, get_args(ErrorStyle))
        if isinstance(absent_max_tokens, str):
            _check_choice("absent_max_tokens", absent_max_tokens, ("cheap", "dear"))
        if period <= 0:
            raise ConfigurationError(f"period={period!r} must be more than 0 seconds")
        if header_lag < 0:
            raise ConfigurationError(f"header_lag={header_lag!r} must be 0 or more admissions")
        make_quota = partial(
            ServerQuota,
            request_limit=_limit(rpm),
            token_limit=_limit(tpm),
            period=period,
            token_window=token_window,
            request_window=request_window,
            count_refused=count_refused,
        )
        self._reception = Reception(make_quota, FaultPlan(faults, fault_rate, seed), header_lag)
        self._dialect = Dialect(headers, retry_after_spelling, error_style, responses_remaining_unknown)
        self._absent_max_tokens = absent_max_tokens
        self._count_prompt = count_prompt
        self._latency = latency
        self._responder = responder
        self._random = random.Random(seed)  # noqa: S311 - no secret: the same seed must give the same latencies
        self._address = (host, port)
        self._process = os.getpid()
        self._failures: list[Exception] = []
        self._server: BackgroundServer | None = None

    def __enter__(self) -> Self:
        if self._server is not None:
            raise RuntimeError("The simulator is running already.")
        self._process = os.getpid()
        self._server = BackgroundServer(self._serve, *self._address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        failures, self._failures = self._failures, []
        if error is not None:
            for failure in failures:
                error.add_note(f"The simulator failed to answer: {failure!r}")
        elif failures:
            raise ExceptionGroup("The simulator failed to answer.", failures)

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    @property
    def endpoint(self) -> str:
        """The URL to give to a client as its Azure endpoint, "http://127.0.0.1:PORT".

        Raises:
            RuntimeError: If the simulator is not running.
        """
        if self._server is None:
            raise RuntimeError("The simulator is not running: use it in a with statement.")
        return self._server.endpoint

    @property
    def stats(self) -> SimulatorStats:
        """A snapshot of what the simulator saw since its start or its last reset.

        Raises:
            ConfigurationError: This is a forked child; so it is with all that changes the simulator.
        """
        return self._own_reception().stats()

    def client_options(self) -> ClientOptions:
        """Return what `AzureOpenAI(**...)` and `AsyncAzureOpenAI(**...)` need."""
        return ClientOptions(azure_endpoint=self.endpoint, api_key="simulated", api_version=_API_VERSION)

    def reset(self) -> None:
        """Forget what was counted, injected and raised so far; a script of faults goes on where it is."""
        self._own_reception().reset()
        self._failures.clear()

    def set_quota(
        self,
        *,
        rpm: float | Literal["unchanged"] | None = "unchanged",
        tpm: float | Literal["unchanged"] | None = "unchanged",
    ) -> None:
        """Change the quota from now on; what was counted stays counted.

        Args:
            rpm: Requests per minute; None is unlimited.
            tpm: Tokens per minute; None is unlimited.
        """
        self._own_reception().set_limits(
            requests=None if rpm == "unchanged" else _limit(rpm),
            tokens=None if tpm == "unchanged" else _limit(tpm),
        )

    def inject(self, fault: Fault, *, times: int = 1) -> None:
        """Let a fault happen to the next requests, before what `faults` says.

        Args:
            fault: What goes wrong.
            times: To how many requests.
        """
        self._own_reception().inject(fault, times)

    def _own_reception(self) -> Reception:
        if os.getpid() != self._process:
            raise ConfigurationError(
                "this is a forked child, and the simulator counts in the process that started it: ask and change it "
                "there, or start another one here. Its endpoint serves both."
            )
        return self._reception

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reception.in_flight() as number:
            request = Request(scope, receive)
            try:
                content = await request.body()
            except ClientDisconnect:
                return
            response = await unless_client_leaves(receive, self._respond(number, request, content))
            if response is not None:
                await response(scope, receive, send)

    async def _respond(self, number: int, request: Request, content: bytes) -> ASGIApp:
        target = operation_at(request.url.path)
        if target is None or request.method != "POST":
            return error_response(NOT_FOUND, {})
        if not (request.headers.get("api-key") or request.headers.get("authorization")):
            return error_response(UNAUTHORIZED, {})
        try:
            asked = read_request(request.url.path, *target, request.headers, content)
        except ValueError as error:
            return error_response(malformed(str(error)), {})
        try:
            return await self._admit(number, asked, request.query_params.get("api-version", "v1"))
        except Exception as error:  # noqa: BLE001 - whatever the user's functions raise is raised again at exit
            self._failures.append(error)
            return error_response(SIMULATOR_FAILED, {})

    async def _admit(self, number: int, asked: SimulatedRequest, api_version: str) -> ASGIApp:
        prompt_tokens = count_prompt_tokens(asked, self._count_prompt)
        verdict = self._reception.judge(prompt_tokens + self._reserved_tokens(asked, prompt_tokens))
        problem = None
        if verdict.refusal is not None:
            problem = rate_limited(self._dialect, asked.operation, api_version, verdict.refusal)
        elif verdict.fault is not None:
            problem = faulty(self._dialect, asked.operation, api_version, verdict.fault)
        headers = {"x-request-id": f"simulated-{number}"}
        if problem is not None:
            headers |= remaining_headers(self._dialect, asked.operation, verdict.level)
            return error_response(problem, headers)
        kind = verdict.fault.kind if verdict.fault is not None else None
        if kind == "connection_reset":
            return reset
        if kind == "time_out":
            return never_answer
        await asyncio.sleep(self._latency_of(asked))
        filtered = SimulatedAnswer(finish_reason="content_filter")
        answer = filtered if kind == "output_filter" else await self._answer(asked)
        reply = Reply(number, int(time.time()), asked, answer, prompt_tokens)
        headers |= level_headers(self._dialect, asked.operation, verdict.level)
        return self._success(reply, verdict.fault, headers)

    def _success(self, reply: Reply, fault: Fault | None, headers: dict[str, str]) -> ASGIApp:
        self._reception.count_usage(reply.prompt_tokens, reply.completion_tokens)
        streams = bool(reply.request.body.get("stream"))
        pieces = streamed_body(reply) if streams else [whole_body(reply)]
        cuts = fault is not None and fault.kind == "cut_mid_stream"
        if cuts:
            self._reception.count_cut()
        return paced_response(
            pieces,
            headers,
            "text/event-stream" if streams else "application/json",
            delay=fault.delay if fault is not None else 0.0,
            cut_after=fault.after if fault is not None and cuts else None,
        )

    def _reserved_tokens(self, asked: SimulatedRequest, prompt_tokens: int) -> float:
        if self._absent_max_tokens == "cheap":
            absent: float = _CHEAP_COMPLETION
        elif self._absent_max_tokens == "dear":
            room = (self._reception.token_limit - prompt_tokens) / completions_charged(asked)
            absent = max(0, int(min(_MODEL_CONTEXT, room)))
        else:
            absent = self._absent_max_tokens
        return reserved_completion_tokens(asked, absent)

    def _latency_of(self, asked: SimulatedRequest) -> float:
        if callable(self._latency):
            return self._latency(asked)
        if isinstance(self._latency, tuple):
            return self._random.uniform(*self._latency)
        return self._latency

    async def _answer(self, asked: SimulatedRequest) -> SimulatedAnswer:
        answer = self._responder(asked)
        if inspect.isawaitable(answer):
            answer = await answer
        return SimulatedAnswer(answer) if isinstance(answer, str) else answer


def _limit(per_minute: float | None) -> float:
    return math.inf if per_minute is None else per_minute


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(f"{name}={value!r} must be one of {expected}")
