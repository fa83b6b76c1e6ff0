# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers make of decorated functions: they stay what they were. Checked by mypy and pyright, not run."""

from collections.abc import AsyncGenerator, Generator
from typing import assert_type

from resilience_kit import circuit_protected, rate_limited, resilient, retry_on_429, token_budget


def say(text: str, *, times: int = 1) -> list[str]:
    return [text] * times


async def say_later(text: str, *, times: int = 1) -> list[str]:
    return [text] * times


def spell(text: str, *, times: int = 1) -> Generator[str, int, bool]:
    yield text * times
    return True


async def spell_later(text: str, *, times: int = 1) -> AsyncGenerator[str, int]:
    yield text * times


class BareLimited:
    @rate_limited
    def say(self, text: str) -> list[str]:
        return [text]

    @rate_limited
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @rate_limited
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @rate_limited
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @rate_limited
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @rate_limited
    async def help_later(text: str) -> list[str]:
        return [text]


class CalledLimited:
    @rate_limited("chat", requests_per_minute=600, max_wait=5)
    def say(self, text: str) -> list[str]:
        return [text]

    @rate_limited("chat", requests_per_minute=600, max_wait=5)
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @rate_limited("chat", requests_per_minute=600, max_wait=5)
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @rate_limited("chat", requests_per_minute=600, max_wait=5)
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @rate_limited("chat", requests_per_minute=600, max_wait=5)
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @rate_limited("chat", requests_per_minute=600, max_wait=5)
    async def help_later(text: str) -> list[str]:
        return [text]


async def check_rate_limited(bare: BareLimited, called: CalledLimited) -> None:
    assert_type(rate_limited(say)("four", times=2), list[str])
    assert_type(await rate_limited(say_later)("four", times=2), list[str])
    assert_type(rate_limited(spell)("four", times=2), Generator[str, int, bool])
    assert_type(rate_limited(spell_later)("four", times=2), AsyncGenerator[str, int])
    decorate = rate_limited("chat", requests_per_minute=600, max_wait=5)
    assert_type(decorate(say)("four", times=2), list[str])
    assert_type(await decorate(say_later)("four", times=2), list[str])
    assert_type(decorate(spell)("four", times=2), Generator[str, int, bool])
    assert_type(decorate(spell_later)("four", times=2), AsyncGenerator[str, int])
    for host in (bare, called):
        assert_type(host.say("four"), list[str])
        assert_type(await host.say_later("four"), list[str])
        assert_type(host.spell("four"), Generator[str, int, bool])
        assert_type(host.spell_later("four"), AsyncGenerator[str, int])
        assert_type(host.make("four"), list[str])
        assert_type(await host.help_later("four"), list[str])


class BareRetried:
    @retry_on_429
    def say(self, text: str) -> list[str]:
        return [text]

    @retry_on_429
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @retry_on_429
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @retry_on_429
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @retry_on_429
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @retry_on_429
    async def help_later(text: str) -> list[str]:
        return [text]


class CalledRetried:
    @retry_on_429(max_retries=5, retry_transient=True)
    def say(self, text: str) -> list[str]:
        return [text]

    @retry_on_429(max_retries=5, retry_transient=True)
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @retry_on_429(max_retries=5, retry_transient=True)
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @retry_on_429(max_retries=5, retry_transient=True)
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @retry_on_429(max_retries=5, retry_transient=True)
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @retry_on_429(max_retries=5, retry_transient=True)
    async def help_later(text: str) -> list[str]:
        return [text]


async def check_retry_on_429(bare: BareRetried, called: CalledRetried) -> None:
    assert_type(retry_on_429(say)("four", times=2), list[str])
    assert_type(await retry_on_429(say_later)("four", times=2), list[str])
    assert_type(retry_on_429(spell)("four", times=2), Generator[str, int, bool])
    assert_type(retry_on_429(spell_later)("four", times=2), AsyncGenerator[str, int])
    decorate = retry_on_429(max_retries=5, retry_transient=True)
    assert_type(decorate(say)("four", times=2), list[str])
    assert_type(await decorate(say_later)("four", times=2), list[str])
    assert_type(decorate(spell)("four", times=2), Generator[str, int, bool])
    assert_type(decorate(spell_later)("four", times=2), AsyncGenerator[str, int])
    for host in (bare, called):
        assert_type(host.say("four"), list[str])
        assert_type(await host.say_later("four"), list[str])
        assert_type(host.spell("four"), Generator[str, int, bool])
        assert_type(host.spell_later("four"), AsyncGenerator[str, int])
        assert_type(host.make("four"), list[str])
        assert_type(await host.help_later("four"), list[str])


class BareProtected:
    @circuit_protected
    def say(self, text: str) -> list[str]:
        return [text]

    @circuit_protected
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @circuit_protected
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @circuit_protected
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @circuit_protected
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @circuit_protected
    async def help_later(text: str) -> list[str]:
        return [text]


class CalledProtected:
    @circuit_protected("chat", failure_threshold=3)
    def say(self, text: str) -> list[str]:
        return [text]

    @circuit_protected("chat", failure_threshold=3)
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @circuit_protected("chat", failure_threshold=3)
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @circuit_protected("chat", failure_threshold=3)
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @circuit_protected("chat", failure_threshold=3)
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @circuit_protected("chat", failure_threshold=3)
    async def help_later(text: str) -> list[str]:
        return [text]


async def check_circuit_protected(bare: BareProtected, called: CalledProtected) -> None:
    assert_type(circuit_protected(say)("four", times=2), list[str])
    assert_type(await circuit_protected(say_later)("four", times=2), list[str])
    assert_type(circuit_protected(spell)("four", times=2), Generator[str, int, bool])
    assert_type(circuit_protected(spell_later)("four", times=2), AsyncGenerator[str, int])
    decorate = circuit_protected("chat", failure_threshold=3)
    assert_type(decorate(say)("four", times=2), list[str])
    assert_type(await decorate(say_later)("four", times=2), list[str])
    assert_type(decorate(spell)("four", times=2), Generator[str, int, bool])
    assert_type(decorate(spell_later)("four", times=2), AsyncGenerator[str, int])
    for host in (bare, called):
        assert_type(host.say("four"), list[str])
        assert_type(await host.say_later("four"), list[str])
        assert_type(host.spell("four"), Generator[str, int, bool])
        assert_type(host.spell_later("four"), AsyncGenerator[str, int])
        assert_type(host.make("four"), list[str])
        assert_type(await host.help_later("four"), list[str])


class BareBudgeted:
    @token_budget
    def say(self, text: str) -> list[str]:
        return [text]

    @token_budget
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @token_budget
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @token_budget
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @token_budget
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @token_budget
    async def help_later(text: str) -> list[str]:
        return [text]


class CalledBudgeted:
    @token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    def say(self, text: str) -> list[str]:
        return [text]

    @token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    async def help_later(text: str) -> list[str]:
        return [text]


async def check_token_budget(bare: BareBudgeted, called: CalledBudgeted) -> None:
    assert_type(token_budget(say)("four", times=2), list[str])
    assert_type(await token_budget(say_later)("four", times=2), list[str])
    assert_type(token_budget(spell)("four", times=2), Generator[str, int, bool])
    assert_type(token_budget(spell_later)("four", times=2), AsyncGenerator[str, int])
    decorate = token_budget("MathAgent", budget_tokens=1_000, per="day", on_exceed="wait")
    assert_type(decorate(say)("four", times=2), list[str])
    assert_type(await decorate(say_later)("four", times=2), list[str])
    assert_type(decorate(spell)("four", times=2), Generator[str, int, bool])
    assert_type(decorate(spell_later)("four", times=2), AsyncGenerator[str, int])
    for host in (bare, called):
        assert_type(host.say("four"), list[str])
        assert_type(await host.say_later("four"), list[str])
        assert_type(host.spell("four"), Generator[str, int, bool])
        assert_type(host.spell_later("four"), AsyncGenerator[str, int])
        assert_type(host.make("four"), list[str])
        assert_type(await host.help_later("four"), list[str])


class BareResilient:
    @resilient
    def say(self, text: str) -> list[str]:
        return [text]

    @resilient
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @resilient
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @resilient
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @resilient
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @resilient
    async def help_later(text: str) -> list[str]:
        return [text]


class CalledResilient:
    @resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    def say(self, text: str) -> list[str]:
        return [text]

    @resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    async def say_later(self, text: str) -> list[str]:
        return [text]

    @resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    def spell(self, text: str) -> Generator[str, int, bool]:
        yield text
        return True

    @resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    async def spell_later(self, text: str) -> AsyncGenerator[str, int]:
        yield text

    @classmethod
    @resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    def make(cls, text: str) -> list[str]:
        return [text]

    @staticmethod
    @resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    async def help_later(text: str) -> list[str]:
        return [text]


async def check_resilient(bare: BareResilient, called: CalledResilient) -> None:
    assert_type(resilient(say)("four", times=2), list[str])
    assert_type(await resilient(say_later)("four", times=2), list[str])
    assert_type(resilient(spell)("four", times=2), Generator[str, int, bool])
    assert_type(resilient(spell_later)("four", times=2), AsyncGenerator[str, int])
    decorate = resilient("chat", agent="MathAgent", max_concurrent=2, max_retries=5, per="hour")
    assert_type(decorate(say)("four", times=2), list[str])
    assert_type(await decorate(say_later)("four", times=2), list[str])
    assert_type(decorate(spell)("four", times=2), Generator[str, int, bool])
    assert_type(decorate(spell_later)("four", times=2), AsyncGenerator[str, int])
    for host in (bare, called):
        assert_type(host.say("four"), list[str])
        assert_type(await host.say_later("four"), list[str])
        assert_type(host.spell("four"), Generator[str, int, bool])
        assert_type(host.spell_later("four"), AsyncGenerator[str, int])
        assert_type(host.make("four"), list[str])
        assert_type(await host.help_later("four"), list[str])


def check_mistakes() -> None:
    """Each of these is an error to both checkers: an ignore that is not needed is one as well."""
    rate_limited(say)(4)  # type: ignore[arg-type]  # wrong on purpose
    rate_limited("chat")(say)("four", number=2)  # type: ignore[call-arg]  # wrong on purpose
    BareLimited().say(4)  # type: ignore[arg-type]  # wrong on purpose
    rate_limited(requests_per_minute="many")  # type: ignore[call-overload]  # wrong on purpose
    rate_limited(4)  # type: ignore[call-overload]  # wrong on purpose
    retry_on_429("chat")  # type: ignore[call-overload]  # wrong on purpose
    circuit_protected(fallback="four")  # type: ignore[call-overload]  # wrong on purpose
    token_budget(on_exceed="ignore")  # type: ignore[call-overload]  # wrong on purpose
    resilient(retries=3)  # type: ignore[call-overload]  # wrong on purpose
