"""Where the calls of a scenario go: to the simulator over loopback, or in virtual time to one without a network."""

import asyncio
import random
import time
from itertools import count
from types import SimpleNamespace

import httpx2
import openai
from openai import AsyncAzureOpenAI, AzureOpenAI

from resilience_kit.testing import AzureOpenAISimulator, SimulatedAnswer
from resilience_kit.testing.faults import FaultPlan
from resilience_kit.testing.server_windows import ServerQuota
from resilience_kit.testing.wire_errors import Dialect, faulty, rate_limited

MODEL = "gpt-4o"
_PAUSES = 3
_REQUEST = httpx2.Request("POST", "http://simulated")
_DIALECT = Dialect("full", "retry-after-ms", "azure", responses_remaining_unknown=False)


def answer_to(number: int) -> str:
    """The one right answer to a question."""
    return f"answer {number:03} and nothing else"


def respond(request):
    """Answer the question that was asked, and no other."""
    # a request for embeddings holds no message
    text = request.last_user_text
    return SimulatedAnswer(answer_to(int(text.split()[1])) if text else "")


def simulator_of(scenario, responder=respond):
    """The real simulator, as the scenario wants it."""
    service, limits = scenario.service, scenario.limits
    return AzureOpenAISimulator(
        rpm=None if service.quota is None else max(6, int(limits.requests * service.quota)),
        tpm=None if service.quota is None else max(200, int(limits.tokens * service.quota)),
        period=limits.period,
        token_window=service.token_window,
        request_window=service.request_window,
        latency=service.latency,
        headers=service.headers,
        retry_after_spelling=service.spelling,
        faults=service.faults,
        fault_rate=service.fault_rate,
        seed=scenario.seed,
        responder=responder,
    )


def request_of(order):
    """What an order asks, as the SDK's arguments."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": order.prompt}],
        "max_tokens": order.max_tokens,
    }


def text_of(completion):
    """The text of a whole answer."""
    return completion.choices[0].message.content or ""


def piece_of(chunk):
    """The text in a chunk of a streamed one."""
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


class AsyncService:
    """The simulator by the SDK's async client."""

    def __init__(self, options, timeout):
        self.client = AsyncAzureOpenAI(**options, timeout=timeout, max_retries=0)

    async def ask(self, order):
        return await self.client.chat.completions.create(**request_of(order))

    async def read(self, order):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with await self.client.chat.completions.create(**request_of(order), **options) as stream:
            async for chunk in stream:
                yield chunk

    async def close(self):
        await self.client.close()


class SyncService:
    """The simulator by the SDK's sync client."""

    def __init__(self, options, timeout):
        self.client = AzureOpenAI(**options, timeout=timeout, max_retries=0)

    def ask(self, order):
        return self.client.chat.completions.create(**request_of(order))

    def read(self, order):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with self.client.chat.completions.create(**request_of(order), **options) as stream:
            yield from stream

    def close(self):
        self.client.close()


class VirtualService:
    """The simulator's quota and faults without a network, so that time may be virtual."""

    def __init__(self, scenario):
        service, limits = scenario.service, scenario.limits
        share = service.quota or 1_000.0
        self._quota = ServerQuota(
            0.0,
            request_limit=max(6, int(limits.requests * share)),
            token_limit=max(200, int(limits.tokens * share)),
            period=limits.period,
            token_window=service.token_window,
            request_window=service.request_window,
            count_refused=False,
        )
        self._plan = FaultPlan(service.faults, service.fault_rate, scenario.seed)
        self._chance = random.Random(f"latencies of {scenario.seed}")
        self._latency = service.latency
        self._timeout = scenario.client_timeout
        self.charged = 0

    async def ask(self, order):
        fault = await self._admit(order)
        if fault is not None and fault.kind == "cut_mid_stream":
            raise openai.APIConnectionError(request=_REQUEST)
        text = "" if fault is not None and fault.kind == "output_filter" else answer_to(order.number)
        usage = self._usage(order, text)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))], usage=usage)

    async def read(self, order):
        fault = await self._admit(order)
        text = "" if fault is not None and fault.kind == "output_filter" else answer_to(order.number)
        for index, word in enumerate(text.split(" ")):
            await asyncio.sleep(fault.delay if fault is not None else 0)
            if fault is not None and fault.kind == "cut_mid_stream" and index == fault.after:
                raise httpx2.RemoteProtocolError("cut", request=_REQUEST)
            piece = word if index == 0 else f" {word}"
            yield SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=piece))], usage=None)
        yield SimpleNamespace(choices=[], usage=self._usage(order, text))

    async def close(self):
        """There is nothing to close."""

    async def _admit(self, order):
        await asyncio.sleep(self._chance.uniform(*self._latency) / 2)
        fault = self._plan.next()
        if fault is not None and fault.kind in ("output_filter", "cut_mid_stream", "slow_stream"):
            problem = None
        elif fault is not None:
            problem = faulty(_DIALECT, "chat.completions", "v1", fault)
        else:
            problem = None
        if fault is not None and fault.kind == "connection_reset":
            raise openai.APIConnectionError(request=_REQUEST)
        if fault is not None and fault.kind == "time_out":
            await asyncio.sleep(self._timeout)
            raise openai.APITimeoutError(request=_REQUEST)
        if problem is None:
            refusal = self._quota.admit(asyncio.get_running_loop().time(), order.tokens)
            if refusal is not None:
                problem = rate_limited(_DIALECT, "chat.completions", "v1", refusal)
        if problem is not None:
            response = httpx2.Response(problem.status, headers=problem.headers, json=problem.body, request=_REQUEST)
            raise openai.APIStatusError(problem.body["error"]["message"], response=response, body=problem.body)
        await asyncio.sleep(self._chance.uniform(*self._latency))
        return fault

    def _usage(self, order, text):
        prompt, completion = -(-len(order.prompt) // 4), -(-len(text) // 4)
        self.charged += prompt + completion
        return SimpleNamespace(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def read_all(order, stream, piece_of=piece_of):
    """Read a stream as its order says, and close it or drop it; returns its text."""
    text, items = "", count(1)
    close = stream.aclose if hasattr(stream, "aclose") else stream.close
    try:
        async for chunk in stream:
            text += piece_of(chunk)
            item = next(items)
            if item == order.items:
                break
            if order.pause and item <= _PAUSES:
                await asyncio.sleep(order.pause)
    finally:
        if not order.is_dropped:
            await close()
    return text


def read_all_blocking(order, stream, piece_of=piece_of):
    """Do the same in a thread, which may die meanwhile."""
    text = ""
    for item, chunk in enumerate(stream, 1):
        text += piece_of(chunk)
        if order.dies:
            raise SystemExit
        if item == order.items:
            break
        if order.pause and item <= _PAUSES:
            time.sleep(order.pause)
    if not order.is_dropped:
        stream.close()
    return text
