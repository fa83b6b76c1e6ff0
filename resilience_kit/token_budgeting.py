"""@token_budget: an agent's prompts stay below its maximum, and its calls within its budget."""

import functools
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar, get_args, overload

from resilience_kit import call_tokens, decorating, pricing, token_counting, truncating
from resilience_kit.agents import current_agent
from resilience_kit.errors import ConfigurationError
from resilience_kit.events import BudgetSettled, Truncated, emit, is_heard, tell
from resilience_kit.layers import Call, Guard, Parameters, Passage, name_of
from resilience_kit.registry import Value, mode
from resilience_kit.token_budgets import (
    NOTHING,
    Budget,
    BudgetConfiguration,
    Reservation,
    refusal,
    token_budgets,
)
from resilience_kit.validating import check_callable, check_numbers, check_texts, is_number

if TYPE_CHECKING:
    from resilience_kit.settings import ResilienceSettings

P = ParamSpec("P")
R = TypeVar("R")

OnExceed = Literal["raise", "truncate", "wait"]
Per = Literal["minute", "hour", "day"] | float | None

_PERIODS = {"minute": 60.0, "hour": 3_600.0, "day": 86_400.0}
# What is told of a call that says nothing of its usage: reserved tokens, those of prompt and answer, US dollars, model.
_NOTHING_KNOWN = (0, 0, 0, None, None)

_log = logging.getLogger(__name__)


class _Accounting(Passage):
    """One call's stay where there is nothing to keep to: what it used is only told."""

    __slots__ = ("_agent", "_budget", "_layer", "_model", "_usage")

    def __init__(self, layer: "TokenBudgeting", agent: str, budget: Budget) -> None:
        self._layer = layer
        self._agent = agent
        self._budget = budget
        self._usage: call_tokens.Usage | None = None
        # of the answer: Azure answers with the model's name where a request says the deployment's
        self._model: str | None = None

    def observe(self, item: Any, /) -> None:
        if not isinstance(item, str):
            self._usage = call_tokens.usage_of(item) or self._usage
            self._model = call_tokens.model_of(item) or self._model

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        if error is not None:
            return
        if not isinstance(result, str):
            self.observe(result)
        usage = self._usage
        if usage is not None:
            self._tell(0, usage, self._cost(usage))
        elif current_agent() is None and self._agent == self._budget.agent and not is_heard(BudgetSettled):
            self._budget.count_unheard()
        else:
            tell(BudgetSettled, self._agent, _NOTHING_KNOWN)

    def _tell(self, reserved: int, usage: call_tokens.Usage, usd: float | None) -> None:
        used = (reserved, usage.prompt_tokens, usage.completion_tokens, usd, self._model or self._layer.model)
        tell(BudgetSettled, self._agent, used)

    def _cost(self, usage: call_tokens.Usage) -> float | None:
        models = (self._layer.model,) if self._model is None else (self._model, self._layer.model)
        usd = pricing.cost_usd(usage, *models)
        if usd is None and pricing.are_at_hand():
            _say_unknown(models[0])
        return usd


class _Budgeting(_Accounting):
    """One call's stay in a budget, which holds what the call may use and then takes what it used."""

    __slots__ = ("_prompt_tokens", "_reservation", "_text")

    def __init__(
        self, layer: "TokenBudgeting", agent: str, budget: Budget, reservation: Reservation, prompt_tokens: int
    ) -> None:
        super().__init__(layer, agent, budget)
        self._reservation = reservation
        self._prompt_tokens = prompt_tokens
        self._text: list[str] = []

    def observe(self, item: Any, /) -> None:
        super().observe(item)
        if self._usage is None:
            self._text.append(call_tokens.text_of(item))

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        if error is not None:
            self._budget.settle(self._reservation, NOTHING)
            return
        used = NOTHING
        try:
            self.observe(result)
            usage = self._usage or self._counted()
            usd = self._cost(usage)
            # the price was known before the call: what was reserved is the best guess if it is not any more
            used = self._budget.amount(usage, self._reservation.amount.usd if usd is None else usd)
        finally:
            self._budget.settle(self._reservation, used)
        self._tell(self._reservation.amount.tokens, usage, usd)

    def _counted(self) -> call_tokens.Usage:
        """The usage where the result does not say: its text if it is text, else what was reserved for it."""
        if text := "".join(self._text):
            completion = token_counting.count_tokens(text, model=self._layer.model)
        else:
            completion = self._reservation.amount.tokens - self._prompt_tokens
        return call_tokens.Usage(self._prompt_tokens, completion)


@functools.lru_cache(maxsize=256)
def _say_unknown(model: str) -> None:
    """Said once of a model: what it costs would otherwise be missed in silence."""
    _log.warning(
        "no price is known for the model %r: what its calls cost is not counted; pricing.set_prices() takes it", model
    )


class TokenBudgeting(Guard):
    """The layer that @token_budget puts around a function."""

    kind: ClassVar[str] = "token_budget"

    def __init__(
        self,
        agent: str,
        configuration: BudgetConfiguration,
        *,
        max_tokens: int | None,
        model: str,
        on_exceed: OnExceed,
        argument: str,
        shared: bool,
    ) -> None:
        self.name = agent
        self._is_shared = shared
        self.model = model
        self._configuration = configuration
        self._max_tokens = max_tokens
        self._on_exceed = on_exceed
        self._settings: ResilienceSettings | None = None
        self._settings_maxima: dict[str, Value] = {}
        self._arguments = call_tokens.PROMPT_ARGUMENTS if argument == "messages" else (argument,)
        token_budgets.declare(agent, configuration)

    def enter(self, call: Call, /) -> Passage | Coroutine[Any, Any, Passage]:
        """Count the prompt, cut or refuse it, and hold what the call may use."""
        current = current_agent() if self._is_shared else None
        agent = self.name if current is None else current.name
        maximum = self._maximum(agent).value
        budget = token_budgets.get(self.name, self._configuration)
        if maximum is None and not budget.is_bounded and pricing.is_ready(self.model):
            return _Accounting(self, agent, budget)
        return self._enter_counted(call, agent, maximum, budget)

    async def _enter_counted(self, call: Call, agent: str, maximum: int | None, budget: Budget) -> Passage:
        is_counted = maximum is not None or budget.is_bounded
        prompt = call_tokens.prompt_argument(call, self._arguments) if is_counted else None
        tokens = 0
        if prompt is not None:
            tokens = await call_tokens.count(call, prompt[1], self.model)
            if maximum is not None and tokens > maximum:
                tokens = await self._fit(call, prompt, tokens, maximum)
        # What is needed after the call is loaded before it: nothing waits in leave().
        if not pricing.is_ready(self.model):
            await call.waiting.offload(pricing.load, self.model)
        if budget.is_bounded and not token_counting.is_ready(self.model):
            await call.waiting.offload(token_counting.load, self.model)
        if not budget.is_bounded:
            return _Accounting(self, agent, budget)
        budget.check_model(self.model)
        asked = call_tokens.Usage(tokens, call_tokens.answer_tokens(call))
        amount = budget.amount(asked, pricing.cost_usd(asked, self.model))
        reservation = await budget.reserve(amount, call.waiting, may_wait=self._on_exceed == "wait")
        return _Budgeting(self, agent, budget, reservation, tokens)

    def check_arguments(self, function: Callable[..., Any]) -> None:
        """Refuse to guard a function whose prompt cannot be seen.

        Raises:
            ConfigurationError: A maximum or the argument's name was given, and the function takes no such argument.
        """
        parameters = Parameters.of(getattr(function, "__func__", function))
        is_named = self._arguments != call_tokens.PROMPT_ARGUMENTS
        if (is_named or self._max_tokens is not None) and not any(map(parameters.accepts, self._arguments)):
            given = f"argument={self._arguments[0]!r}" if is_named else f"max_tokens={self._max_tokens}"
            raise ConfigurationError(
                f"@token_budget({given}): {name_of(function)} takes no "
                f"{' or '.join(self._arguments)}: say argument= with the parameter that holds its prompt"
            )

    def describe(self) -> dict[str, Value]:
        """The effective parameters, and where each came from."""
        return {
            "max_tokens": self._maximum(self._agent()),
            **token_budgets.describe(self.name, self._configuration),
            "model": Value(self.model, "default" if self.model == token_counting.DEFAULT_MODEL else "argument"),
            "on_exceed": Value(self._on_exceed, "default" if self._on_exceed == "raise" else "argument"),
            "shared": Value(self._is_shared, "default" if self._is_shared == (self.name == "default") else "argument"),
            "argument": Value(" or ".join(self._arguments), "default" if len(self._arguments) > 1 else "argument"),
        }

    def _agent(self) -> str:
        """Whose call this is."""
        current = current_agent() if self._is_shared else None
        return self.name if current is None else current.name

    def _maximum(self, agent: str) -> Value:
        if self._max_tokens is not None:
            return Value(self._max_tokens, "argument")
        if self._settings is None or self._settings is not mode.settings:
            # pydantic takes 0.15 s to import: paid by the first call, not by `import resilience_kit`
            from resilience_kit.settings import current_settings

            self._settings, self._settings_maxima = current_settings(), {}
        maximum = self._settings_maxima.get(agent)
        if maximum is None:
            maximum = self._settings_maxima[agent] = Value(*self._settings.agent_max_tokens(agent))
        return maximum

    async def _fit(self, call: Call, prompt: tuple[str, Any], tokens: int, maximum: int) -> int:
        agent, (argument, value) = self._agent(), prompt
        advice = 'shorten it, raise max_tokens, or say on_exceed="truncate"'
        if self._on_exceed == "truncate":
            cut = await call_tokens.off_loop(call, value, self.model, _cut, value, maximum, self.model)
            if cut is not None:
                kept, tokens_after, removed = cut
                call.replace(argument, kept)
                emit(Truncated(name=agent, tokens_before=tokens, tokens_after=tokens_after, removed_messages=removed))
                return tokens_after
            advice = "it cannot be cut that far: shorten it, or raise max_tokens"
        raise refusal(
            f"the prompt has {tokens} tokens, and max_tokens={maximum}: {advice}",
            agent=agent,
            limit=maximum,
            requested=tokens,
            remaining=maximum,
        )


def _cut(prompt: Any, maximum: int, model: str) -> tuple[Any, int, int] | None:
    """Cut a prompt. Returns it, its tokens, and how many messages it lost; None if it cannot be cut that far."""
    if isinstance(prompt, str):
        text = truncating.truncate_text(prompt, max_tokens=maximum, model=model)
        return text, token_counting.count_tokens(text, model=model), 0
    try:
        truncation = truncating.truncate_messages(prompt, max_tokens=maximum, model=model)
    except TypeError:
        # not messages, but what an embedding takes: texts or the ids of tokens
        return None
    return (truncation.messages, truncation.tokens_after, truncation.removed_messages) if truncation.fits else None


def _seconds_of(per: Any) -> float | None:
    if isinstance(per, str) and per in _PERIODS:
        return _PERIODS[per]
    if per is None or (is_number(per) and per > 0):
        return per
    raise ConfigurationError(f'@token_budget(per={per!r}): expected "minute", "hour", "day", seconds above 0, or None')


@overload
def token_budget(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def token_budget(
    agent: str = "default",
    *,
    max_tokens: int | None = None,
    budget_tokens: int | None = None,
    budget_usd: float | None = None,
    per: Per = None,
    model: str = token_counting.DEFAULT_MODEL,
    on_exceed: OnExceed = "raise",
    argument: str = "messages",
    shared: bool | None = None,
) -> decorating.Decorator: ...
def token_budget(
    agent: Any = "default",
    *,
    max_tokens: int | None = None,
    budget_tokens: int | None = None,
    budget_usd: float | None = None,
    per: Per = None,
    model: str = token_counting.DEFAULT_MODEL,
    on_exceed: OnExceed = "raise",
    argument: str = "messages",
    shared: bool | None = None,
) -> Any:
    """Keep an agent's prompts below a maximum, and its calls within a budget.

    What a call may use is reserved before it and settled with the response's `usage` after it, or by counting the
    text where the result is text; a failed or cancelled call gives it back.

    Args:
        agent: Functions with the same agent share one budget, over all threads and event loops, and over all processes
            that have the same RESILIENCE_STORE, each of which keeps to its own bounds for what all use.
        max_tokens: The longest prompt in tokens. Default: the agent's own variable, as MATH_AGENT_MAX_TOKENS for
            "MathAgent" or "math_agent", else no bound.
        budget_tokens: Most tokens, of prompts and answers, in a period. Default: no bound.
        budget_usd: Most US dollars in a period (extra `cost`, or prices of your own). Default: no bound.
        per: The period: "minute", "hour", "day", a number of seconds, or None for the life of the process; in a store,
            the budget then holds until `reset_all()`, or until nobody has used it for 30 days.
        model: The model whose vocabulary counts, and whose price where the answer does not name a model of its own, or
            none whose price is known. Prices are those of `pricing.set_prices`, else of genai-prices.
        on_exceed: "raise"; "truncate" cuts a prompt above `max_tokens`, the oldest messages first, and raises where
            a budget is spent; "wait" waits for the next period where a budget is spent.
        argument: The parameter that holds the prompt. Default: `messages`, else `input` or `prompt`.
        shared: Whether calls inside `with agent("..."):` count for that agent, and keep to its maximum; the budget
            stays the one that is named here. Default: where no agent is named here.

    Raises:
        ConfigurationError: An argument cannot work, or the agent has another budget elsewhere; from a call: it has
            another period in another process.
        TokenBudgetExceededError: From a call: it was not sent.

    Example:
        >>> from resilience_kit import token_budget
        >>> @token_budget("MathAgent", max_tokens=4_000, budget_tokens=1_000_000, per="day")
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("What is 2 + 2?")
        'four'
    """
    if not isinstance(agent, str):
        check_callable("token_budget", agent)
        return token_budget()(agent)
    check_numbers("token_budget", above=0, whole=True, max_tokens=max_tokens, budget_tokens=budget_tokens)
    check_numbers("token_budget", above=0, budget_usd=budget_usd)
    check_texts("token_budget", model=model, argument=argument)
    if on_exceed not in get_args(OnExceed):
        raise ConfigurationError(f'@token_budget(on_exceed={on_exceed!r}): expected "raise", "truncate" or "wait"')
    seconds = _seconds_of(per)
    if on_exceed == "wait" and seconds is None:
        raise ConfigurationError('@token_budget(on_exceed="wait"): say per=, or there is nothing to wait for')
    if budget_usd is not None:
        pricing.check_model(model)
    layer = TokenBudgeting(
        agent,
        BudgetConfiguration(budget_tokens, budget_usd, seconds),
        max_tokens=max_tokens,
        model=model,
        on_exceed=on_exceed,
        argument=argument,
        shared=agent == "default" if shared is None else shared,
    )

    def decorate(function: Callable[P, R], /) -> Callable[P, R]:
        check_callable("token_budget", function)
        layer.check_arguments(function)
        return decorating.guarded(function, layer)

    return decorate
