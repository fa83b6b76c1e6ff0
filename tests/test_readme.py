"""The README keeps its word; that its blocks run and its links lead somewhere is in test_docs.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_setup_is_the_two_commands_of_the_makefile_and_nothing_else():
    (commands,) = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_table_of_settings_has_every_name_and_default_of_the_file():
    variables = re.findall(r"^(\w+)=(\S+)", (ROOT / "rate-limiting.env").read_text(encoding="utf-8"), re.MULTILINE)

    for name, default in variables:
        shown = name if not name.startswith(("ADX_", "COORDINATOR_")) else name.split("_")[0] + "_…"
        (row,) = [line for line in README.splitlines() if f"`{shown}`" in line and line.startswith("|")]
        assert default in row
