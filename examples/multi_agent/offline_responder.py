"""What the simulator answers in the place of a model: simple rules that make the agents use their tools for real."""

import json
import re

from examples.multi_agent.telemetry import OPERATIONS, REGIONS, TABLE
from resilience_kit.testing import SimulatedAnswer, SimulatedRequest

_WORDS_OF_TELEMETRY = re.compile(r"request|error|fail|latenc|region|telemetry|slow|operation|status", re.IGNORECASE)
_EXPRESSION = re.compile(r"(?:(?:sqrt|sin|cos|tan|exp|log|abs)(?=\s*\()|\bpi\b|\d+(?:\.\d+)?|[-+*/%()^\s])+")
_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:%|per ?cent) of (\d+(?:\.\d+)?)")
_SAID_IN_WORDS = {" plus ": " + ", " minus ": " - ", " times ": " * ", " divided by ": " / ", "^": "**"}

_GROUPS = {"region": "Region", "operation": "Operation", "status": "Status", "hour": "Hour = bin(Timestamp, 1h)"}
_MEASURES = {
    r"error rate": "ErrorRate = round(100.0 * countif(Status >= 500) / count(), 2)",
    r"error|fail": "Errors = countif(Status >= 500)",
    r"p95|95th": "P95Ms = round(percentile(LatencyMs, 95), 1)",
    r"slowest|longest|maximum": "MaximumMs = max(LatencyMs)",
    r"latenc|slow": "AverageMs = round(avg(LatencyMs), 1)",
    r"": "Requests = count()",
}


def respond(request: SimulatedRequest) -> SimulatedAnswer:
    """Answer as a model would: choose the tool that is offered, or phrase what it found."""
    tools = [tool["function"]["name"] for tool in request.tools]
    last = request.messages[-1]
    if last["role"] == "tool":
        return SimulatedAnswer(_phrase(request, last["content"]))
    question = request.last_user_text
    match tools:
        case ["pick_agents"]:
            return SimulatedAnswer(tool_calls=(("pick_agents", {"agents": _agents_for(question)}),))
        case ["calculate"]:
            return SimulatedAnswer(tool_calls=(("calculate", {"expression": find_expression(question) or question}),))
        case ["run_kql"]:
            return SimulatedAnswer(tool_calls=(("run_kql", {"query": write_kql(question)}),))
    findings = [line.partition(": ")[2] for line in question.splitlines() if re.match(r"(Math|ADX)Agent: ", line)]
    return SimulatedAnswer(" ".join(findings) or "I know arithmetic and the telemetry of requests: ask about those.")


def find_expression(question: str) -> str | None:
    """Return the longest piece of arithmetic in a question."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", question)
    text = _PERCENTAGE.sub(r"\1 / 100 * \2", text)
    for words, sign in _SAID_IN_WORDS.items():
        text = text.replace(words, sign)
    pieces = [match[0].strip() for match in _EXPRESSION.finditer(text)]
    sums = [piece for piece in pieces if re.search(r"\d\s*[-+*/%]|\w\(", piece)]
    return max(sums, key=len, default=None)


def write_kql(question: str) -> str:
    """Return a query for what a question asks of the sample table."""
    asked = question.lower()
    lines = [TABLE]
    lines += [f'| where Region == "{region}"' for region in REGIONS if region in asked]
    lines += [f'| where Operation == "{operation}"' for operation in OPERATIONS if operation in asked]
    measure = next(measure for words, measure in _MEASURES.items() if re.search(words, asked))
    grouped = re.search(r"(?:by|per|each|which|what) (region|operation|status|hour)", asked)
    if grouped is None:
        return "\n".join([*lines, f"| summarize {measure}"])
    lines.append(f"| summarize {measure} by {_GROUPS[grouped[1]]}")
    column = measure.partition(" ")[0]
    wants_one = re.search("most|highest|slowest|longest", asked)
    return "\n".join([*lines, f"| top 1 by {column}" if wants_one else f"| order by {column} desc"])


def _agents_for(question: str) -> list[str]:
    math = ["MathAgent"] if find_expression(question) else []
    return math + (["ADXAgent"] if _WORDS_OF_TELEMETRY.search(question) else [])


def _phrase(request: SimulatedRequest, result: str) -> str:
    call = request.messages[-2]["tool_calls"][0]["function"]
    if result.startswith("error: "):
        return f"That cannot be answered: {result.removeprefix('error: ')}."
    if call["name"] == "calculate":
        return f"{json.loads(call['arguments'])['expression']} = {result}."
    rows = [", ".join(f"{name} {value}" for name, value in row.items()) for row in json.loads(result)]
    return f"The telemetry says: {'; '.join(rows)}."
