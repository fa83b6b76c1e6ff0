"""Semantic Kernel (extra `semantic-kernel`): a chat service whose every call goes through the kit.

    pip install 'resilience-kit[semantic-kernel]'
    python examples/with_semantic_kernel.py

Something that answers as Azure would stands here for Azure: give your own endpoint and key, and it is Azure.
"""

import asyncio
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from semantic_kernel import Kernel

from resilience_kit import get_all_resilience_stats
from resilience_kit.azure import create_resilient_azure_service


class Azure(BaseHTTPRequestHandler):
    """Gives one answer to all questions."""

    def do_POST(self) -> None:
        """Answer, and say what that used."""
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Four."}}
        usage = {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "gpt-4o"}
        body = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


async def ask(endpoint: str, key: str) -> None:
    """Ask the kernel, and see what that used."""
    kernel = Kernel()
    kernel.add_service(create_resilient_azure_service("math", key, endpoint, "gpt-4o", "MathAgent", min_interval=0))
    print(await kernel.invoke_prompt("What is 2 + 2?"))
    print(get_all_resilience_stats()["agents"]["MathAgent"]["completion_tokens"], "tokens in the answer")


def main() -> None:
    """Ask what stands for Azure."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Azure) as azure:
        Thread(target=azure.serve_forever, daemon=True).start()
        asyncio.run(ask(f"http://127.0.0.1:{azure.server_port}", "KEY"))
        azure.shutdown()


if __name__ == "__main__":
    main()
