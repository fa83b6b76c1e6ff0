"""The command line (extra `cli`): what a shell can ask of the kit, here about this file's own function.

pip install 'resilience-kit[cli]'
python examples/with_cli.py
"""

import shlex
import subprocess
import sys
from pathlib import Path

from resilience_kit import resilient

COMMANDS = [
    "resilience-kit explain with_cli:ask",
    "resilience-kit plan --rpm 600 --tpm 150000 --agents 8 --prompt-tokens 200-2000 --output-tokens 900 --latency 1-3",
]


@resilient("chat", requests_per_minute=600)
def ask(prompt: str) -> str:
    """Stand here for the call of your model."""
    return "An answer"


def main() -> None:
    """Run each command, as you would type it."""
    for command in COMMANDS:
        print(f"\n$ {command}", flush=True)
        # the one of this environment, also where it is not on the PATH
        program = Path(sys.executable).with_name("resilience-kit")
        subprocess.run([program, *shlex.split(command)[1:]], cwd=Path(__file__).parent, check=True)  # noqa: S603


if __name__ == "__main__":
    main()
