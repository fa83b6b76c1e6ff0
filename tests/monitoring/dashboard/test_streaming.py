"""The stream of figures: built once for all, bounded, and only while somebody looks."""

import asyncio
import json

from resilience_kit import rate_limited
from resilience_kit.monitoring.dashboard import streaming
from resilience_kit.monitoring.dashboard.streaming import EventStream, Frames


def counting():
    """Figures that tell how often they were built."""
    built = []

    def build(process):
        built.append(process)
        return {"built": len(built), "process": process}

    return built, Frames(build)


async def received(frames, messages, *, leaves_after=1, process=None):
    """Read so many frames, and leave."""
    leaves = asyncio.Event()

    async def send(message):
        messages.append(message)
        if len(messages) > leaves_after:
            leaves.set()

    async def receive():
        await leaves.wait()
        return {"type": "http.disconnect"}

    await EventStream(frames, process)({"type": "http"}, receive, send)


def test_those_who_look_together_share_a_frame():
    built, frames = counting()
    assert frames.latest(None) == frames.latest(None)
    assert built == [None]


def test_each_process_has_frames_of_its_own():
    built, frames = counting()
    texts = [json.loads(frames.latest(process))["process"] for process in ("one", "two", "one")]
    assert (texts, built) == (["one", "two", "one"], ["one", "two"])


def test_a_process_that_nobody_runs_takes_no_room_for_ever():
    _, frames = counting()
    for number in range(1_000):
        frames.latest(str(number))
    assert len(frames._newest) <= 64


async def test_a_stream_begins_with_a_frame_and_says_when_to_come_back():
    _, frames = counting()
    messages = []
    await received(frames, messages)
    assert messages[0]["headers"] == [(b"content-type", b"text/event-stream; charset=utf-8")]
    assert messages[1]["body"] == b'retry: 250\ndata: {"built":1,"process":null}\n\n'


async def test_nothing_is_built_once_the_last_has_left():
    built, frames = counting()
    await received(frames, [], leaves_after=2)
    before = len(built)
    await asyncio.sleep(1.2)
    assert (before > 0, len(built) - before, frames.streams) == (True, 0, 0)


async def test_no_frame_is_sent_twice():
    _, frames = counting()
    messages = []
    await received(frames, messages, leaves_after=3)
    bodies = [it["body"] for it in messages[1:4]]
    assert len(set(bodies)) == len(bodies)


async def test_one_who_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(streaming, "_SLOWEST_READER", 0.05)
    _, frames = counting()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await asyncio.wait_for(EventStream(frames, None)({"type": "http"}, asyncio.Event().wait, send), 5)
    assert frames.streams == 0


async def test_a_stream_ends_so_that_a_server_can_too(monkeypatch):
    monkeypatch.setattr(streaming, "_LONGEST_STREAM", 0.0)
    _, frames = counting()
    messages = []

    async def send(message):
        messages.append(message)

    await asyncio.wait_for(EventStream(frames, None)({"type": "http"}, asyncio.Event().wait, send), 5)
    assert messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_stream_that_is_cancelled_is_no_longer_counted():
    _, frames = counting()
    stream = asyncio.create_task(received(frames, [], leaves_after=100))
    await asyncio.sleep(0.2)
    assert frames.streams == 1
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    assert frames.streams == 0


def test_too_many_are_told_to_come_later(serve, monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_STREAMS", 1)
    client = serve()
    with client.stream("GET", "/events") as first:
        # kept, since an iterator that is dropped closes the connection
        lines = first.iter_lines()
        next(lines)
        assert client.get("/events").status_code == 503


def test_the_stream_tells_what_the_api_tells(serve):
    rate_limited("chat")(lambda: "four")()
    client = serve()
    with client.stream("GET", "/events") as stream:
        line = next(it for it in stream.iter_lines() if it.startswith("data: "))
    assert json.loads(line.removeprefix("data: "))["limits"] == client.get("/api/now").json()["limits"]
