"""The README and docs/ keep their word: every Python block in them runs, and the set-up is two commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(README)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{page.stem} {number}")
        for page in PAGES
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
    ],
)
def test_a_python_block_runs_as_it_is_pasted(block, tmp_path):
    script = tmp_path / "pasted.py"
    script.write_text(block, encoding="utf-8")

    exec(compile(block, script, "exec"), {"__name__": "__main__"})  # noqa: S102 - this is what a reader does


def test_the_first_block_loses_no_answer_and_meets_no_refusal(capsys):
    exec(compile(BLOCKS[0], "first.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - this is what a reader does

    assert capsys.readouterr().out == "12 answers, 0 refusals\n"


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
