"""What a hostile world may send, how many of it a test looks at, and whether time grows faster than it."""

import time

from hypothesis import settings, strategies as st

from resilience_kit.monitoring.visible_text import visible

# Characters that terminals, logs, tables, parsers of numbers and encoders take for something else than text.
_NASTY = st.sampled_from(
    [
        *(
            "\n",
            "\r",
            "\0",
            "\x1b[2J",
            "\x7f",
            "\x85",
            "\x9b31m",
            "\u202e",
            "\u2066",
            "\u2028",
            "\ufeff",
            "\ud800",
            "\udc80",
        ),
        *(
            "=",
            "+",
            "-",
            "@",
            "\t",
            '"',
            "'",
            "\\",
            "<",
            "&",
            "{",
            "}",
            "%",
            "$",
            ":",
            ";",
            ",",
            ".",
            " ",
            "0",
            "9" * 20,
        ),
        *("\u0663", "\u00b2", "\uff11", "1e999", "nan", "inf", "é", "中", "😀", "a\u0301", "None", "true"),
    ]
)
TEXTS = st.lists(_NASTY | st.text(max_size=5), max_size=8).map("".join)
NAMES = TEXTS.filter(bool)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**53, 2**63, 1e308, -1e308, float("nan"), float("inf"), -0.0, True]),
)
LEAVES = st.one_of(st.none(), TEXTS, NUMBERS, st.binary(max_size=10))
# Any shape of plain values, those that JSON cannot say included.
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.integers(), inner, max_size=4),
    max_leaves=10,
)


def examples(number):
    """So many examples of a test as a rule, and as many times more as the profile has more than usual."""
    return settings(max_examples=number * settings.default.max_examples // 100)


def nested(value, *, times, key=None):
    """A value within so many lists, or dicts with a key."""
    for _ in range(times):
        value = [value] if key is None else {key: value}
    return value


def told(errors, work, *arguments, **named):
    """What a call says that ends in a documented error; None where it ends well."""
    try:
        work(*arguments, **named)
    except errors as error:
        return str(error)
    return None


def growth(work, make, size):
    """By how much the time of a function grows when what it gets becomes four times as large: 4 where it is linear.

    It is this thread's own time, and the least of some runs, so that it does not matter what else the machine does.
    """
    small, large = (min(_seconds(work, make(many)) for _ in range(3)) for many in (size, 4 * size))
    return large / max(small, 20e-6)


def _seconds(work, value):
    began = time.thread_time()
    work(value)
    return time.thread_time() - began


def is_harmless(text):
    """Whether all of a text may be shown and logged as it is: line breaks and tabs are not among that."""
    return visible(text, longest=len(text)) == text
