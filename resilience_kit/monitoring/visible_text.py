"""Names as a terminal may show them: they are the users', and a terminal obeys what some characters say."""


def visible(text: object, *, longest: int = 200) -> str:
    r"""A text on one line, in which each character that is not printed is written as Python would.

    Escape sequences, line breaks and characters that turn the direction of a line are among those. Of a text with
    more than `longest` characters the start is shown.

    Example:
        >>> from resilience_kit.monitoring.visible_text import visible
        >>> print(visible("Writer\x1b[2J"))
        Writer\x1b[2J
    """
    written = str(text)
    if len(written) > longest:
        written = f"{written[: longest - 1]}…"
    if written.isprintable():
        return written
    return "".join(it if it.isprintable() else it.encode("unicode_escape").decode() for it in written)


def visible_lines(text: object) -> str:
    """A text of several lines, each as `visible` shows it."""
    return "\n".join(visible(line, longest=1_000) for line in str(text).split("\n"))
