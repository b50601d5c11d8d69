"""A scripted Dify server on a loopback socket, speaking the recorded wire format.

    async with FakeDify() as dify:
        dify.app("app-key", mode="chat", script=chat_answer("Hello", " there"))
        ...  # send requests to dify.base, with the key app-key
        assert dify.requests[-1].json["query"] == "Hi"

An answer is a list of steps: `Send` an event, `Wait` for a gate, `Sleep`, `Hang`,
`Reset`, `Close`, `Status`, `Raw`; or a function from the request to such a list. When
the steps are used up, the stream ends as Dify ends it, with the last chunk.

Bodies, headers and framing are those of Dify 1.12.1 (or of an older release, by the
app's `version`). Everything that was received is kept in `requests`, `stops` and
`uploads`; what the model would have been shown, turn by turn, in `contexts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.parser
import email.policy
import json
import re
import socket
import struct
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Callable, Union
from urllib.parse import parse_qsl, unquote, urlsplit

Event = dict[str, Any]

# A time that does not depend on the clock: 2026-11-23 06:48:25 UTC.
CREATED_AT = 1795416505

# Dify's server closes a connection that was idle for this long.
KEEP_ALIVE_S = 2.0

# A ping goes out this often while an answer streams.
PING_S = 10.0

PATIENCE_S = 20.0  # for `until`, in the loop's time
CHAT_MODES = ("chat", "agent-chat", "advanced-chat", "agent")
FLOW_MODES = ("advanced-chat", "workflow")
NO_PARENT = "00000000-0000-0000-0000-000000000000"


# ------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """One chunk of the stream: an event, its envelope added, or bytes as they are.

    The first one sends the head as well; `Send(b"")` sends nothing but the head.
    """

    data: bytes | Event


@dataclass(frozen=True)
class Wait:
    """Go on when the gate is set."""

    gate: asyncio.Event


@dataclass(frozen=True)
class Sleep:
    """Go on after some seconds of the loop's time."""

    seconds: float


@dataclass(frozen=True)
class Hang:
    """Say nothing more (but pings) until the client leaves or stops the run."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection (RST)."""


@dataclass(frozen=True)
class Close:
    """End the connection, without the last chunk."""


@dataclass(frozen=True)
class Status:
    """Answer with this status and body instead of a stream."""

    code: int
    body: bytes | str | Event = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Bytes on the wire, without any framing; the head must be among them."""

    data: bytes


Step = Union[Send, Wait, Sleep, Hang, Reset, Close, Status, Raw]
Script = Union[Sequence[Step], Callable[["Request"], Sequence[Step]]]

PING = Send({"event": "ping"})


# ------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------


def usage_of(prompt: int, completion: int) -> Event:
    """Return a usage object as Dify writes it."""
    return {
        "prompt_tokens": prompt,
        "prompt_unit_price": "0.001",
        "prompt_price_unit": "0.001",
        "prompt_price": f"{prompt / 1e6:.6f}",
        "completion_tokens": completion,
        "completion_unit_price": "0.002",
        "completion_price_unit": "0.001",
        "completion_price": f"{2 * completion / 1e6:.6f}",
        "total_tokens": prompt + completion,
        "total_price": f"{(prompt + 2 * completion) / 1e6:.6f}",
        "currency": "USD",
        "latency": 1.0120629479999934,
        "time_to_first_token": None,
        "time_to_generate": None,
    }


def message(text: str, **fields: Any) -> Send:
    """Return one text delta of a chat, chatflow or completion app."""
    return Send({"event": "message", "answer": text, **fields})


def message_end(
    usage: tuple[int, int] = (14, 8), resources: Sequence[Event] = ()
) -> Send:
    """Return the event that ends an answer."""
    metadata = {
        "annotation_reply": None,
        "retriever_resources": list(resources),
        "usage": usage_of(*usage),
    }
    return Send({"event": "message_end", "metadata": metadata})


def error_event(
    text: str = "the model failed",
    code: str = "completion_request_error",
    status: int = 400,
) -> Send:
    """Return an error inside the stream; nothing follows it."""
    return Send({"event": "error", "code": code, "status": status, "message": text})


def chat_answer(
    *pieces: str,
    delay: float = 0,
    usage: tuple[int, int] = (14, 8),
    resources: Sequence[Event] = (),
) -> list[Step]:
    """Return the answer of a chat app; `delay` is the pause before each piece."""
    texts = _paced([message(piece) for piece in pieces], delay)
    return [*texts, message(""), message_end(usage, resources)]


def completion_answer(*pieces: str) -> list[Step]:
    """Return the answer of a completion app."""
    return chat_answer(*pieces, usage=(6, 8))


def agent_thought(thought_id: str = "1", position: int = 1, **fields: Any) -> Send:
    """Return a snapshot of an agent's step; the same id names the same step."""
    known = uuid.uuid5(uuid.NAMESPACE_OID, thought_id)
    event = {"event": "agent_thought", "id": str(known), "position": position}
    return Send({**event, **fields})


def agent_answer(
    *pieces: str,
    tool: str = "",
    tool_input: str = "",
    observation: str = "",
    before: Sequence[str] = (),
    delay: float = 0,
) -> list[Step]:
    """Return the answer of an agent app.

    With `tool`, a first round says `before`, calls the tool and observes; the pieces
    are the second round.
    """
    steps: list[Step] = []
    if tool:
        call = {"thought": "".join(before), "tool": tool, "tool_input": tool_input}
        steps += [agent_thought("1", 1), *_paced(_agent_messages(before), delay)]
        steps += [*_agent_messages(["", ""]), agent_thought("1", 1, **call)]
        steps += [agent_thought("1", 1, **call, observation=observation)]
    number = 2 if tool else 1
    steps += [agent_thought(str(number), number)]
    steps += _paced(_agent_messages(pieces), delay)
    steps += _agent_messages([""])
    steps += [agent_thought(str(number), number, thought="".join(pieces))]
    return [*steps, message_end((52, 6))]


def chatflow_answer(
    *pieces: str, order: str = "old", delay: float = 0, usage: tuple[int, int] = (14, 8)
) -> list[Step]:
    """Return the answer of a chatflow: start, llm and answer nodes.

    Args:
        pieces: the text, as it is streamed.
        order: of the last two events: "old" (to 1.12) ends with `message_end`, "new"
            (from 1.13.1) with `workflow_finished`; "lost" (1.13.0) has no
            `message_end`.
        delay: seconds before each piece.
        usage: prompt and completion tokens of the llm node.
    """
    selector = {"from_variable_selector": ["llm", "text"]}
    texts = _paced([message(piece, **selector) for piece in pieces], delay)
    answer = {"answer": "".join(pieces), "files": []}
    finished = workflow_finished(outputs=answer, total_tokens=sum(usage))
    ends = {
        "old": [finished, message_end(usage)],
        "new": [message_end(usage), finished],
        "lost": [finished],
    }
    return [
        *_run_begins(texts, "".join(pieces), usage),
        *_node("answer", outputs=answer),
        *ends[order],
    ]


def workflow_answer(
    *pieces: str,
    outputs: Event | None = None,
    status: str = "succeeded",
    error: str | None = None,
    delay: float = 0,
    usage: tuple[int, int] = (6, 8),
) -> list[Step]:
    """Return a workflow run: start, llm and end nodes.

    Without pieces there are no `text_chunk` events, only `outputs`. A run that failed
    (`status="failed"`) has no outputs.
    """
    texts = _paced([text_chunk(piece) for piece in pieces], delay)
    if outputs is None:
        outputs = {"text": "".join(pieces)} if status == "succeeded" else {}
    finished = workflow_finished(
        status=status, outputs=outputs, error=error, total_tokens=sum(usage)
    )
    begin = _run_begins(texts, "".join(pieces), usage, status=status, error=error)
    if status in ("failed", "stopped"):
        return [*begin, finished]
    return [*begin, *_node("end", outputs=outputs), finished]


def text_chunk(text: str) -> Send:
    """Return one text delta of a workflow."""
    selector = ["llm", "text"]
    data = {"text": text, "from_variable_selector": selector}
    return Send({"event": "text_chunk", "data": data})


def workflow_finished(**data: Any) -> Send:
    """Return the event that ends a run; `data` overrides a succeeded run's."""
    return Send({"event": "workflow_finished", "data": data})


def _agent_messages(pieces: Iterable[str]) -> list[Step]:
    return [Send({"event": "agent_message", "answer": piece}) for piece in pieces]


def _paced(steps: Sequence[Step], delay: float) -> list[Step]:
    """Return the steps, each after a pause."""
    if not delay:
        return list(steps)
    return [part for step in steps for part in (Sleep(delay), step)]


def _run_begins(
    texts: Sequence[Step], text: str, usage: tuple[int, int], **llm: Any
) -> list[Step]:
    """Return a run up to the end of its llm node."""
    outputs = {
        "text": text,
        "reasoning_content": "",
        "usage": usage_of(*usage),
        "finish_reason": "stop",
    }
    cost = {"total_tokens": sum(usage), "total_price": "0.000030", "currency": "USD"}
    started, finished = _node("llm", outputs=outputs, execution_metadata=cost, **llm)
    begin: list[Step] = [Send({"event": "workflow_started"}), *_node("start")]
    return [*begin, started, *texts, finished]


def _node(node: str, **finished: Any) -> list[Step]:
    """Return the two events of a node."""
    title = "LLM" if node == "llm" else node.title()
    known = str(uuid.uuid5(uuid.NAMESPACE_OID, node))
    data = {"id": known, "node_id": node, "node_type": node, "title": title}
    return [
        Send({"event": "node_started", "data": data}),
        Send({"event": "node_finished", "data": {**data, **finished}}),
    ]


def replay(file: str, exchange: int = 0) -> list[Step]:
    """Return the recorded response of an exchange, byte for byte.

    Args:
        file: the recording, as `replay.reads` takes it.
        exchange: its number within the recording.
    """
    from replay import reads  # noqa: PLC0415 - only recordings need it

    received = reads(file, exchange)
    end = [] if _is_whole(b"".join(received)) else [Close()]
    return [*map(Raw, received), *end]


def _is_whole(data: bytes) -> bool:
    """Tell whether a response says where it ends, and does, and stays open."""
    head, _, body = data.partition(b"\r\n\r\n")
    if re.search(rb"(?im)^connection: *close", head):
        return False
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    if length:
        return len(body) >= int(length.group(1))
    return body.endswith(b"0\r\n\r\n")


# ------------------------------------------------------------------------------
# What is received, what is remembered
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part of a multipart body; a plain field has no `filename`."""

    name: str
    filename: str | None
    mime_type: str | None
    data: bytes


@dataclass(frozen=True)
class Request:
    """One request, parsed."""

    method: str
    path: str  # below the base: "/chat-messages"
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes
    json: Any  # None if the body is not JSON
    parts: list[Part]
    key: str  # the app key, "" without one
    connection: int  # counts from 1
    number: int  # on its connection, counts from 1
    target: str  # as it was on the request line

    @property
    def user(self) -> str:
        """The end user, wherever it was sent."""
        plain = [part for part in self.parts if part.filename is None]
        fields = {part.name: part.data.decode() for part in plain}
        in_json = self.json.get("user") if isinstance(self.json, dict) else None
        user = in_json or fields.get("user") or self.query.get("user") or ""
        return str(user)


@dataclass(frozen=True)
class Upload:
    """A file that was uploaded."""

    id: str
    key: str
    user: str
    name: str
    mime_type: str
    data: bytes


@dataclass(frozen=True)
class Stop:
    """A stop that was asked for, and whether it met a running turn."""

    task_id: str
    user: str
    key: str
    path: str
    effective: bool


@dataclass
class Message:
    """One stored turn."""

    id: str
    query: str
    answer: str = ""
    recalled: str | None = None  # what the model is shown of it, if that is not all
    status: str = "normal"
    error: str | None = None
    inputs: Event = field(default_factory=dict)
    files: list[Event] = field(default_factory=list)


@dataclass
class Conversation:
    """A stored conversation of one user with one app."""

    id: str
    key: str
    user: str
    messages: list[Message] = field(default_factory=list)


@dataclass
class App:
    """An app: what it is and how it answers; see `FakeDify.app`."""

    key: str
    mode: str = "chat"
    name: str = "Demo"
    description: str = ""
    parameters: Event = field(default_factory=dict)
    version: str = "1.12.1"
    script: Script | None = None
    memory: bool = False
    overrides: Mapping[str, Script] = field(default_factory=dict)
    transcript: str | None = None
    audio: bytes = b"ID3\x04fake audio"
    stop_delay_s: float = 0.05
    stoppable: bool = True

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tuple(int(part) for part in self.version.split("."))

    @property
    def is_flow(self) -> bool:
        """Tell whether the app runs a workflow."""
        return self.mode in FLOW_MODES

    def all_parameters(self) -> Event:
        """Return the body of GET /parameters."""
        return {**DEFAULT_PARAMETERS, **self.parameters}


@dataclass
class Turn:
    """One running turn."""

    app: App
    request: Request
    task_id: str
    run_id: str
    conversation: Conversation
    message: Message
    stopped: asyncio.Event
    text: str = ""  # streamed so far, as Dify stores it
    position: int = 0  # of the last agent thought
    ended: bool = False  # a terminal event was sent
    run: Event = field(default_factory=dict)  # as it ended
    total_steps: int = 0

    def note(self, event: Event) -> None:
        """Learn from an event what will be stored."""
        kind = event["event"]
        data = event.get("data") or {}
        if kind in ("message", "agent_message", "message_file"):
            self.text += event.get("answer") or ""
        elif kind == "message_replace":
            self.text = event.get("answer") or ""
        elif kind == "agent_thought":
            if event.get("position", 0) > self.position and self.text:
                self.text += "\n"  # Dify stores the rounds so, but streams them not
            self.position = event.get("position", 0)
        elif kind == "node_finished":
            self.total_steps += 1
        elif kind == "message_end" or data.get("status") in ("succeeded", "stopped"):
            self.ended, self.run = True, data
        elif kind == "error":
            self.message.status = "error"
            self.message.error = event.get("message")


DEFAULT_PARAMETERS: Event = {
    "opening_statement": "",
    "suggested_questions": [],
    "suggested_questions_after_answer": {"enabled": False},
    "speech_to_text": {"enabled": False},
    "text_to_speech": {"enabled": False, "language": "", "voice": ""},
    "retriever_resource": {"enabled": True},
    "annotation_reply": {"enabled": False},
    "more_like_this": {"enabled": False},
    "user_input_form": [],
    "sensitive_word_avoidance": {"configs": [], "enabled": False, "type": ""},
    "file_upload": {
        "image": {
            "detail": "high",
            "enabled": False,
            "number_limits": 3,
            "transfer_methods": ["remote_url", "local_file"],
        }
    },
    "system_parameters": {
        "image_file_size_limit": 10,
        "video_file_size_limit": 100,
        "audio_file_size_limit": 50,
        "file_size_limit": 15,
        "workflow_file_upload_limit": 10,
    },
}


def text_input(variable: str, *, required: bool = True, **more: Any) -> Event:
    """Return one entry of `user_input_form`: a paragraph."""
    entry = {"label": variable, "required": required, "variable": variable, **more}
    return {"paragraph": {"max_length": None, "options": [], "default": "", **entry}}


# ------------------------------------------------------------------------------
# Events on the wire
# ------------------------------------------------------------------------------


def _workflow_started(turn: Turn) -> Event:
    inputs = {
        **turn.message.inputs,
        "sys.files": [],
        "sys.user_id": turn.request.user,
        "sys.app_id": WORKFLOW_ID,
        "sys.workflow_id": WORKFLOW_ID,
        "sys.workflow_run_id": turn.run_id,
    }
    if turn.app.mode == "advanced-chat":
        inputs["sys.query"] = turn.message.query
        inputs["sys.dialogue_count"] = len(turn.conversation.messages)
    identity = {"id": turn.run_id, "workflow_id": WORKFLOW_ID}
    return {**identity, "inputs": inputs, "created_at": CREATED_AT}


def _workflow_finished(turn: Turn) -> Event:
    return {
        "id": turn.run_id,
        "workflow_id": WORKFLOW_ID,
        "status": "succeeded",
        "outputs": {},
        "error": None,
        "elapsed_time": 0.251058,
        "total_tokens": 0,
        "total_steps": turn.total_steps,
        "created_by": {"id": WORKFLOW_ID, "user": turn.request.user},
        "created_at": CREATED_AT,
        "finished_at": CREATED_AT,
        "exceptions_count": 0,
        "files": [],
    }


def _node_started(_: Turn) -> Event:
    return {
        "id": "",
        "node_id": "",
        "node_type": "",
        "title": "",
        "index": 1,
        "predecessor_node_id": None,
        "inputs": None,
        "inputs_truncated": False,
        "created_at": CREATED_AT,
        "extras": {},
        "iteration_id": None,
        "loop_id": None,
        "agent_strategy": None,
    }


def _node_finished(_: Turn) -> Event:
    return {
        "id": "",
        "node_id": "",
        "node_type": "",
        "title": "",
        "index": 1,
        "predecessor_node_id": None,
        "inputs": {},
        "inputs_truncated": False,
        "process_data": {},
        "process_data_truncated": False,
        "outputs": {},
        "outputs_truncated": False,
        "status": "succeeded",
        "error": None,
        "elapsed_time": 0.009056,
        "execution_metadata": None,
        "created_at": CREATED_AT,
        "finished_at": CREATED_AT,
        "files": [],
        "iteration_id": None,
        "loop_id": None,
    }


WORKFLOW_ID = "c68a9e12-4c38-4b90-95fa-823d9802ddee"
DATA_OF_EVENT: dict[str, Callable[[Turn], Event]] = {
    "workflow_started": _workflow_started,
    "workflow_finished": _workflow_finished,
    "node_started": _node_started,
    "node_finished": _node_finished,
}
FIELDS_OF_EVENT: dict[str, Event] = {
    "message": {"id": "", "answer": "", "from_variable_selector": None},
    "agent_message": {"id": "", "answer": ""},
    "message_end": {"id": "", "metadata": {}, "files": None},
    "message_replace": {"answer": "", "reason": ""},
    "agent_thought": {
        "id": "",
        "position": 1,
        "thought": "",
        "observation": "",
        "tool": "",
        "tool_labels": {},
        "tool_input": "",
        "message_files": [],
    },
}
HAS_MESSAGE_ID = ("message", "agent_message", "message_end", "message_file")


def whole_event(event: Event, turn: Turn) -> Event:
    """Return the event with its envelope and the fields it always has, in order."""
    kind = event["event"]
    fields = {**FIELDS_OF_EVENT.get(kind, {}), **event}
    if kind in HAS_MESSAGE_ID and not fields.get("id"):
        fields["id"] = turn.message.id
    if kind in DATA_OF_EVENT:
        fields["data"] = {**DATA_OF_EVENT[kind](turn), **event.get("data", {})}
    if kind == "message_end" and turn.app.release < (1, 4):
        fields["metadata"] = _old_metadata(fields["metadata"])
    return {"event": kind, **{**_envelope(kind, "data" in fields, turn), **fields}}


def _old_metadata(metadata: Event) -> Event:
    """Return what releases before 1.4 put there: no empty parts, fewer fields."""
    old = {key: value for key, value in metadata.items() if value}
    usage = dict(old.get("usage", {}))
    for newer in ("time_to_first_token", "time_to_generate"):
        usage.pop(newer, None)
    return {**old, "usage": usage} if usage else old


def _envelope(kind: str, has_data: bool, turn: Turn) -> Event:
    """Return the fields that all events of the app's mode share."""
    run = {"workflow_run_id": turn.run_id}
    task = {} if kind == "error" else {"task_id": turn.task_id}
    if turn.app.mode == "workflow":
        return {**run, **task}
    chat = {"conversation_id": turn.conversation.id}
    if turn.app.mode == "completion":
        chat = {}
    mine = {"message_id": turn.message.id, "created_at": CREATED_AT, **task}
    return {**chat, **mine, **(run if has_data else {})}


def encode_event(event: Event, release: tuple[int, ...] = (1, 12, 1)) -> bytes:
    """Return the event in the bytes of a release: compact UTF-8 from 1.8.1 on."""
    if event.get("event") == "ping":
        return b"event: ping\n\n"
    if release >= (1, 8, 1):
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    else:
        text = json.dumps(event)
    return b"data: " + text.encode("utf-8", "surrogatepass") + b"\n\n"


class _Stream:
    """The streamed answer to one request: head, chunks, end."""

    def __init__(self, connection: _Connection, turn: Turn) -> None:
        self._connection = connection
        self._turn = turn
        self.begun = False

    def event(self, event: Event) -> None:
        """Write one event as one chunk."""
        if event.get("event") != "ping":
            event = whole_event(event, self._turn)
            self._turn.note(event)
        self.chunk(encode_event(event, self._turn.app.release))

    def chunk(self, data: bytes) -> None:
        """Write the head if that is still to do, then one chunk unless it is empty."""
        if not self.begun:
            self.begun = True
            stream = {"Content-Type": "text/event-stream; charset=utf-8"}
            chunked = {"Transfer-Encoding": "chunked", **stream}
            self._connection.write(_head(200, chunked, self._turn.app.version))
        if data:
            self._connection.write(b"%X\r\n%b\r\n" % (len(data), data))

    def finish(self) -> None:
        """Write the last chunk."""
        self.chunk(b"")
        self._connection.write(b"0\r\n\r\n")


class _Blocking:
    """The answer in one piece, for `response_mode` other than streaming."""

    begun = False

    def __init__(self, connection: _Connection, turn: Turn) -> None:
        self._connection = connection
        self._turn = turn
        self._metadata: Event = {}
        self._run: Event = {}
        self._error: Event | None = None

    def event(self, event: Event) -> None:
        """Learn from one event."""
        if event.get("event") == "ping":
            return
        event = whole_event(event, self._turn)
        self._turn.note(event)
        if event["event"] == "message_end":
            self._metadata = event["metadata"]
        elif event["event"] == "workflow_finished":
            only_streamed = ("created_by", "exceptions_count", "files")
            data = event["data"]
            self._run = {key: data[key] for key in data if key not in only_streamed}
        elif event["event"] == "error":
            self._error = event

    def chunk(self, data: bytes) -> None:
        """Ignore bytes: what they mean is unknown."""

    def finish(self) -> None:
        """Write the response."""
        turn = self._turn
        if self._error:
            error = {key: self._error[key] for key in ("code", "message", "status")}
            self._connection.respond(error["status"], error, turn.app)
        elif turn.app.mode == "workflow":
            run = {"task_id": turn.task_id, "workflow_run_id": turn.run_id}
            self._respond({**run, "data": self._run})
        else:
            self._respond(self._whole_answer())

    def _respond(self, body: Event) -> None:
        """Write an answer, which Dify formats in its own way."""
        app = self._turn.app
        charset = "; charset=utf-8" if app.release >= (1,) else ""
        headers = {"Content-Type": f"application/json{charset}"}
        self._connection.respond(200, json.dumps(body).encode(), app, headers)

    def _whole_answer(self) -> Event:
        turn = self._turn
        ids = {"id": turn.message.id, "message_id": turn.message.id}
        if turn.app.mode in CHAT_MODES:
            ids["conversation_id"] = turn.conversation.id
        return {
            "event": "message",
            "task_id": turn.task_id,
            **ids,
            "mode": turn.app.mode,
            "answer": turn.text,
            "metadata": self._metadata,
            "created_at": CREATED_AT,
        }


# ------------------------------------------------------------------------------
# HTTP
# ------------------------------------------------------------------------------

NOT_FOUND_PAGE = (
    b"<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n"
    b"<h1>Not Found</h1>\n<p>The requested URL was not found on the server. If you "
    b"entered the URL manually please check your spelling and try again.</p>\n"
)


def _head(code: int, headers: Mapping[str, str], version: str) -> bytes:
    """Return a response head with the lines that gunicorn and Dify add."""
    expose = {"Access-Control-Expose-Headers": "X-Env, X-Trace-Id, X-Version"}
    new = tuple(int(part) for part in version.split(".")) >= (1,)
    lines = {
        "Server": "gunicorn",
        "Date": "Mon, 23 Nov 2026 06:48:26 GMT",
        "Connection": "keep-alive",
        **headers,
        "Access-Control-Allow-Origin": "*",
        **(expose if new else {}),
        "X-Version": version,
        "X-Env": "PRODUCTION",
    }
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {code} {_phrase(code)}\r\n{text}\r\n".encode("latin-1")


def _phrase(code: int) -> str:
    """Return the reason phrase as werkzeug writes it."""
    try:
        phrase = HTTPStatus(code).phrase.upper()
    except ValueError:
        return "UNKNOWN"
    return {413: "REQUEST ENTITY TOO LARGE"}.get(code, phrase)


class _Refused(Exception):
    """A JSON error of Dify's."""

    def __init__(self, status: int, code: str, text: str) -> None:
        self.status = status
        self.body: Event = {"code": code, "message": text, "status": status}


def _crash() -> _Refused:
    """Return the error for what Dify did not expect."""
    refused = _Refused(500, "unknown", "Internal Server Error")
    refused.body = {
        "message": "Internal Server Error",
        "code": "unknown",
        "status": 500,
    }
    return refused


class _Gone(Exception):
    """The client has closed or reset the connection."""


class _Connection:
    """One accepted connection: requests in, bytes out."""

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.served = 0
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()

    async def read_request(self, prefix: str, idle_s: float) -> Request | None:
        """Return the next request, or None at the end or when idle for too long."""
        try:
            if not self._buffer:
                await asyncio.wait_for(self._fill(), idle_s)
            head = (await self._until(b"\r\n\r\n")).decode("latin-1")
            line, *lines = head.rstrip("\r\n").split("\r\n")
            method, target, _ = line.split(" ")
            pairs = [field_line.split(":", 1) for field_line in lines]
            headers = {name.lower(): value.strip() for name, value in pairs}
            if headers.get("expect") == "100-continue":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await self._body(headers)
        except (_Gone, asyncio.TimeoutError):
            return None
        self.served += 1
        return self._request(method, target, headers, body, prefix)

    def _request(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
        prefix: str,
    ) -> Request:
        url = urlsplit(target)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return Request(
            method=method,
            path=url.path[len(prefix) :] if url.path.startswith(prefix) else "",
            query=dict(parse_qsl(url.query)),
            headers=headers,
            body=body,
            json=_json_or_none(body),
            parts=parse_multipart(headers.get("content-type", ""), body),
            key=key.strip() if scheme.lower() == "bearer" else "",
            connection=self.number,
            number=self.served,
            target=target,
        )

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self._exactly(int(headers.get("content-length", "0")))
        body = b""
        while True:
            size = int((await self._until(b"\r\n")).split(b";")[0], 16)
            data = await self._exactly(size + 2)
            if size == 0:
                return body
            body += data[:-2]

    async def _fill(self) -> None:
        try:
            data = await self._reader.read(65536)
        except OSError:
            data = b""
        if not data:
            raise _Gone
        self._buffer += data

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            await self._fill()
        return await self._exactly(self._buffer.index(mark) + len(mark))

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._fill()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def left(self) -> None:
        """Return when the client has left; keep what it sends until then."""
        with contextlib.suppress(_Gone):
            while True:
                await self._fill()

    def write(self, data: bytes) -> None:
        """Write bytes, if there is still someone to read them."""
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the client has room for more."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def respond(
        self,
        code: int,
        body: bytes | str | Event,
        app: App,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a whole response; a dict becomes JSON as Dify writes it."""
        kind = {"Content-Type": "text/html; charset=utf-8"}
        if not isinstance(body, (bytes, str)):
            kind = {"Content-Type": "application/json"}
            body = json.dumps(body) + "\n"
        data = body.encode() if isinstance(body, str) else body
        lines = {**kind, "Content-Length": str(len(data)), **(headers or {})}
        if code == HTTPStatus.UNAUTHORIZED and app.release >= (1,):
            lines.setdefault("WWW-Authenticate", 'Bearer realm="api"')
        self.write(_head(code, lines, app.version) + data)

    async def close(self) -> None:
        """Close the connection; what was written still arrives."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def reset(self) -> None:
        """Drop the connection with a reset."""
        sock = self._writer.get_extra_info("socket")
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def parse_multipart(content_type: str, body: bytes) -> list[Part]:
    """Return the parts of a multipart body; none if it is something else."""
    if not content_type.lower().startswith("multipart/"):
        return []
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1")
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    parts = []
    for part in parser.parsebytes(head + body).iter_parts():
        disposition = str(part.get("content-disposition", ""))
        name = re.search(r'\bname="([^"]*)"', disposition)
        data = part.get_payload(decode=True)
        parts.append(
            Part(
                name=name.group(1) if name else "",
                filename=part.get_filename(),
                mime_type=part.get_content_type() if "content-type" in part else None,
                data=data if isinstance(data, bytes) else b"",
            )
        )
    return parts


# ------------------------------------------------------------------------------
# The server
# ------------------------------------------------------------------------------

WRONG_MODE = {
    "/chat-messages": ("not_chat_app", CHAT_MODES),
    "/completion-messages": ("app_unavailable", ("completion",)),
    "/workflows/run": ("not_workflow_app", ("workflow",)),
}
WRONG_MODE_TEXT = {
    "not_chat_app": "Please check if your app mode matches the right API route.",
    "app_unavailable": "App unavailable, please check your app configurations.",
    "not_workflow_app": "Please check if your app mode matches the right API route.",
}
STOP_PATHS = re.compile(
    r"(/chat-messages|/completion-messages|/workflows)(?:/tasks)?/([^/]+)/stop"
)
BROWSER = "The browser (or proxy) sent a request that this server could not understand."
NOT_JSON = (
    "Did not attempt to load JSON data because the request Content-Type was not "
    "'application/json'."
)
AUDIO_TYPES = ("mp3", "m4a", "wav", "amr", "mpga")


class FakeDify:
    """The server; use it as `async with FakeDify() as dify`."""

    def __init__(
        self,
        *,
        version: str = "1.12.1",
        keep_alive_s: float = KEEP_ALIVE_S,
        ping_s: float = PING_S,
    ) -> None:
        """Set the release, how long idle connections stay open, and when pings go."""
        self.version = version
        self.base = ""
        self.requests: list[Request] = []
        self.stops: list[Stop] = []
        self.uploads: dict[str, Upload] = {}
        self.contexts: list[list[tuple[str, str]]] = []
        self.conversations: dict[str, Conversation] = {}
        self.runs: dict[str, Turn] = {}  # of workflows
        self.connections = 0  # accepted so far
        self.open_connections = 0  # open now
        self._apps: dict[str, App] = {}
        self._turns: dict[str, Turn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._keep_alive_s = keep_alive_s
        self._ping_s = ping_s
        self._ids = 0
        self._refusals = 0
        self._server: asyncio.AbstractServer | None = None
        self._changed: asyncio.Event | None = None

    def app(self, key: str, **settings: Any) -> App:
        """Add an app, or replace the one with this key.

        Args:
            key: the key that selects it.
            settings: any field of `App`. `mode`, `name`, `version`; `parameters`, laid
                over the defaults of GET /parameters; `script`, the answer of every
                turn; `memory`, which makes it remember conversations and refuse
                unknown ones; `overrides`, path -> script for other endpoints
                ("/info", "/files/upload", "stop", …); `transcript` and `audio` for
                the two audio endpoints; `stop_delay_s`, `stoppable`.
        """
        self._apps[key] = App(key, **{"version": self.version, **settings})
        return self._apps[key]

    def refuse_next(self) -> None:
        """Close the next connection without reading from it."""
        self._refusals += 1

    @property
    def running(self) -> int:
        """How many turns are running."""
        return len(self._turns)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds; it is asked whenever something happened.

        Raises:
            asyncio.TimeoutError: it did not hold within 20 s of the loop's time.
        """
        assert self._changed is not None

        async def wait(changed: asyncio.Event) -> None:
            while not condition():
                changed.clear()
                await changed.wait()

        await asyncio.wait_for(wait(self._changed), PATIENCE_S)

    async def __aenter__(self) -> FakeDify:
        """Listen on a free port of 127.0.0.1."""
        self._changed = asyncio.Event()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.base = f"http://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything; raise what went wrong in a script."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        for result in results:
            if isinstance(result, Exception):
                raise result

    # Connections...

    def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        connection = _Connection(self.connections, reader, writer)
        self._tasks.add(asyncio.ensure_future(self._serve(connection)))

    async def _serve(self, connection: _Connection) -> None:
        self.open_connections += 1
        self._tell()
        try:
            if self._refusals:
                self._refusals -= 1
                return
            while await self._serve_one(connection):
                self._tell()
        finally:
            self.open_connections -= 1
            self._tell()
            await connection.close()

    async def _serve_one(self, connection: _Connection) -> bool:
        """Serve one request and tell whether another may follow."""
        idle_s = self._keep_alive_s
        request = await connection.read_request("/v1", idle_s)
        if request is None:
            return False
        self.requests.append(request)
        self._tell()
        app = self._apps.get(request.key, App("", version=self.version))
        try:
            self._authenticate(request)
            if not app.key:
                raise _Refused(401, "unauthorized", "Access token is invalid")
            keep = await self._answer(connection, request, app)
        except _Refused as refused:
            connection.respond(refused.status, refused.body, app)
            keep = True
        await connection.drain()
        return keep and request.headers.get("connection", "").lower() != "close"

    def _authenticate(self, request: Request) -> None:
        """Refuse what does not come with a key.

        Raises:
            _Refused: as recorded.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not key:
            text = "Authorization header must be provided and start with 'Bearer'"
            raise _Refused(401, "unauthorized", text)
        if scheme.lower() != "bearer":
            text = "Authorization scheme must be 'Bearer'"
            raise _Refused(401, "unauthorized", text)

    async def _answer(
        self, connection: _Connection, request: Request, app: App
    ) -> bool:
        stop = STOP_PATHS.fullmatch(request.path)
        override = app.overrides.get("stop" if stop else request.path)
        if override is not None:
            turn = self._new_turn(app, request)
            return await self._run(connection, turn, _steps(override, request))
        if stop:
            self._stop(connection, request, app, stop)
            return True
        if request.path in WRONG_MODE and request.method == "POST":
            return await self._serve_turn(connection, request, app)
        handler = ENDPOINTS.get((request.method, request.path))
        if request.path.startswith("/workflows/run/"):
            self._get_run(connection, request, app)
        elif handler is not None:
            handler(self, connection, request, app)
        elif request.path in {path for _, path in ENDPOINTS} | set(WRONG_MODE):
            text = "The method is not allowed for the requested URL."
            raise _Refused(405, "method_not_allowed", text)
        else:
            connection.respond(404, NOT_FOUND_PAGE, app)
        return True

    # Turns...

    async def _serve_turn(
        self, connection: _Connection, request: Request, app: App
    ) -> bool:
        _check_json_and_user(request)
        _check_mode(request.path, app)
        _check_fields(request, app)
        turn = self._new_turn(app, request)
        _check_inputs(turn)
        self._check_files(turn)
        turn.conversation.messages.append(turn.message)
        if app.mode in CHAT_MODES:
            self.conversations[turn.conversation.id] = turn.conversation
        elif app.mode == "workflow":
            self.runs[turn.run_id] = turn
        context = _context(turn.conversation)
        self.contexts.append(context)
        if app.script is not None:
            return await self._run(connection, turn, _steps(app.script, request))
        pieces = _remembered(context) if app.memory else _echo(turn, context)
        return await self._run(connection, turn, DEFAULT_ANSWER[app.mode](*pieces))

    def _new_turn(self, app: App, request: Request) -> Turn:
        body = request.json if isinstance(request.json, dict) else {}
        inputs = body.get("inputs") if isinstance(body.get("inputs"), dict) else {}
        query = body.get("query") or _first_text(inputs)
        files = list(body.get("files") or ())
        return Turn(
            app=app,
            request=request,
            task_id=self._new_id(),
            run_id=self._new_id(),
            conversation=self._conversation(app, request, body),
            message=Message(
                self._new_id(), str(query), inputs=dict(inputs or {}), files=files
            ),
            stopped=asyncio.Event(),
        )

    def _conversation(self, app: App, request: Request, body: Event) -> Conversation:
        """Return the conversation that a request continues, or a new one.

        Raises:
            _Refused: the app remembers conversations, but not this one.
        """
        wanted = body.get("conversation_id") if app.mode in CHAT_MODES else None
        if not wanted:
            return Conversation(self._new_id(), app.key, request.user)
        known = self.conversations.get(str(uuid.UUID(str(wanted).strip())))
        mine = known and (known.key, known.user) == (app.key, request.user)
        if known and mine:
            return known
        if app.memory:
            raise _Refused(404, "not_found", _no_conversation(app, request))
        return Conversation(str(wanted), app.key, request.user)

    def _check_files(self, turn: Turn) -> None:
        """Refuse uploads that do not exist, as apps with vision do."""
        settings = turn.app.all_parameters()["file_upload"]
        if not (settings.get("enabled") or settings.get("image", {}).get("enabled")):
            return
        for file in turn.request.json.get("files") or ():
            known = file.get("upload_file_id") in self.uploads
            if file.get("transfer_method") == "local_file" and not known:
                raise _Refused(400, "invalid_param", "Invalid upload file")

    async def _run(
        self, connection: _Connection, turn: Turn, steps: Sequence[Step]
    ) -> bool:
        """Play the steps until they end, the client leaves or the run is stopped."""
        answer = _answer_to(turn, connection)
        self._turns[turn.task_id] = turn
        self._tell()
        playing = asyncio.ensure_future(_play(steps, connection, answer, turn.app))
        stopped = asyncio.ensure_future(turn.stopped.wait())
        left = asyncio.ensure_future(connection.left())
        beating = asyncio.ensure_future(self._ping(answer, steps))
        race: set[asyncio.Future[Any]] = {playing, stopped, left}
        try:
            await asyncio.wait(race, return_when=asyncio.FIRST_COMPLETED)
            if not (playing.done() or left.done()):
                playing.cancel()
                await asyncio.wait({left}, timeout=turn.app.stop_delay_s)
                if not left.done():
                    _end_stopped(answer, turn)
                    _store(turn)
                    return True
            if playing.done() and not playing.cancelled():
                _store(turn)
                return playing.result()
            _store_abandoned(turn, steps)
            return False
        finally:
            del self._turns[turn.task_id]
            await _cancel(playing, stopped, left, beating)

    async def _ping(self, answer: _Stream | _Blocking, steps: Sequence[Step]) -> None:
        """Send a ping from time to time, unless the steps write the head."""
        while not any(isinstance(step, (Raw, Status)) for step in steps):
            await asyncio.sleep(self._ping_s)
            answer.event({"event": "ping"})

    def _stop(
        self, connection: _Connection, request: Request, app: App, match: re.Match[str]
    ) -> None:
        """Answer a stop, and stop the turn if it is this user's and app's."""
        _check_json_and_user(request)
        _check_mode(match.group(1).replace("/workflows", "/workflows/run"), app)
        task_id = unquote(match.group(2))
        turn = self._turns.get(task_id)
        mine = turn is not None and (turn.app.key, turn.request.user) == (
            app.key,
            request.user,
        )
        anyone = turn is not None and turn.app.mode == "workflow"
        effective = (mine or anyone) and turn is not None and turn.app.stoppable
        path = request.path
        self.stops.append(Stop(task_id, request.user, app.key, path, effective))
        if turn is not None and effective:
            turn.stopped.set()
            if turn.app.mode == "agent-chat":  # recalls the rounds that are over
                turn.message.recalled = ""
        connection.respond(200, {"result": "success"}, app)
        self._tell()

    # Other endpoints...

    def _get_info(self, connection: _Connection, _: Request, app: App) -> None:
        body: Event = {"name": app.name, "description": app.description, "tags": []}
        if app.release >= (1, 4):
            body.update(mode=app.mode, author_name="admin")
        connection.respond(200, body, app)

    def _get_parameters(self, connection: _Connection, _: Request, app: App) -> None:
        connection.respond(200, app.all_parameters(), app)

    def _get_site(self, connection: _Connection, _: Request, app: App) -> None:
        if app.release < (1,):
            return connection.respond(404, NOT_FOUND_PAGE, app)
        body = {
            "title": app.name,
            "chat_color_theme": None,
            "chat_color_theme_inverted": False,
            "icon_type": "emoji",
            "icon": "\U0001f916",
            "icon_background": "#FFEAD5",
            "description": None,
            "copyright": None,
            "privacy_policy": None,
            "custom_disclaimer": "",
            "default_language": "en-US",
            "show_workflow_steps": True,
            "use_icon_as_answer_icon": False,
            "icon_url": None,
        }
        return connection.respond(200, body, app)

    def _get_conversations(
        self, connection: _Connection, request: Request, app: App
    ) -> None:
        _check_mode("/chat-messages", app)
        mine = [
            {
                "id": conversation.id,
                "name": conversation.messages[0].query[:20],
                "inputs": conversation.messages[0].inputs,
                "status": "normal",
                "introduction": "",
                "created_at": CREATED_AT,
                "updated_at": CREATED_AT,
            }
            for conversation in reversed(list(self.conversations.values()))
            if (conversation.key, conversation.user) == (app.key, request.user)
        ]
        connection.respond(200, _page(mine, request), app)

    def _get_messages(
        self, connection: _Connection, request: Request, app: App
    ) -> None:
        _check_mode("/chat-messages", app)
        known = self.conversations.get(request.query.get("conversation_id", ""))
        if not known or (known.key, known.user) != (app.key, request.user):
            raise _Refused(404, "not_found", _no_conversation(app, request))
        stored: list[Event] = [
            {
                "id": message.id,
                "conversation_id": known.id,
                "parent_message_id": NO_PARENT,
                "inputs": message.inputs,
                "query": message.query,
                "answer": message.answer,
                "feedback": None,
                "retriever_resources": [],
                "created_at": CREATED_AT,
                "agent_thoughts": [],
                "message_files": [*filter(None, map(self._stored, message.files))],
                "status": message.status,
                "error": message.error,
            }
            for message in known.messages
        ]
        limit = int(request.query.get("limit", "20"))
        ids = [row["id"] for row in stored]
        if first_id := request.query.get("first_id"):
            stored = stored[: ids.index(first_id)]
        more = len(stored) > limit
        page = {"limit": limit, "has_more": more, "data": stored[-limit:]}
        connection.respond(200, page, app)

    def _stored(self, file: Event) -> Event | None:
        """Return an uploaded file of a stored message, with a URL that will expire."""
        upload = self.uploads.get(file.get("upload_file_id", ""))
        if not upload:
            return None
        return {
            "id": upload.id,
            "filename": upload.name,
            "type": file["type"],
            "url": f"/files/{upload.id}/file-preview?timestamp=1&nonce=2&sign=3",
            "mime_type": upload.mime_type,
            "size": len(upload.data),
            "transfer_method": "local_file",
            "belongs_to": "user",
            "upload_file_id": upload.id,
        }

    def _get_run(self, connection: _Connection, request: Request, app: App) -> None:
        _check_mode("/workflows/run", app)
        turn = self.runs.get(request.path.rpartition("/")[2])
        if not turn or turn.app.key != app.key:
            raise _Refused(404, "not_found", "Workflow run not found")
        inputs = json.dumps({**turn.message.inputs, "sys.files": []})
        connection.respond(200, {**turn.run, "inputs": inputs}, app)

    def _post_upload(self, connection: _Connection, request: Request, app: App) -> None:
        files = [part for part in request.parts if part.filename is not None]
        _check_upload(files)
        file = files[0]
        name = file.filename or ""
        upload = Upload(
            self._new_id(), app.key, request.user, name, file.mime_type or "", file.data
        )
        self.uploads[upload.id] = upload
        body: Event = {
            "id": upload.id,
            "name": name,
            "size": len(file.data),
            "extension": name.rpartition(".")[2] if "." in name else "",
            "mime_type": upload.mime_type,
            "created_by": WORKFLOW_ID,
            "created_at": CREATED_AT,
        }
        connection.respond(201, body, app)

    def _post_audio(self, connection: _Connection, request: Request, app: App) -> None:
        """Transcribe: say the app's `transcript`, or how many bytes there were."""
        files = [part for part in request.parts if part.filename is not None]
        if not files:
            raise _Refused(400, "bad_request_key_error", BROWSER)
        if not app.all_parameters()["speech_to_text"]["enabled"]:
            raise _Refused(400, "invalid_param", "Speech to text is not enabled")
        kind, _, subtype = (files[0].mime_type or "").partition("/")
        if kind != "audio" or subtype not in AUDIO_TYPES:
            raise _Refused(415, "unsupported_audio_type", "Audio type not allowed.")
        heard = f"transcribed {len(files[0].data)} bytes"
        connection.respond(200, {"text": app.transcript or heard}, app)

    def _post_speech(self, connection: _Connection, request: Request, app: App) -> None:
        body = request.json if isinstance(request.json, dict) else {}
        if not app.all_parameters()["text_to_speech"]["enabled"]:
            raise _Refused(400, "invalid_param", "TTS is not enabled")
        if not (body.get("text") or body.get("message_id")):
            raise _Refused(400, "invalid_param", "Text is required")
        headers = {"Transfer-Encoding": "chunked", "Content-Type": "audio/mpeg"}
        connection.write(_head(200, headers, app.version))
        for piece in (app.audio[:4], app.audio[4:]):
            connection.write(b"%X\r\n%b\r\n" % (len(piece), piece))
        connection.write(b"0\r\n\r\n")

    # Small things...

    def _new_id(self) -> str:
        """Return a fresh id; the same ones in every run."""
        self._ids += 1
        return str(uuid.uuid5(uuid.NAMESPACE_OID, str(self._ids)))

    def _tell(self) -> None:
        """Wake whoever waits for something to happen."""
        if self._changed is not None:
            self._changed.set()


Handler = Callable[[FakeDify, _Connection, Request, App], None]
ENDPOINTS: dict[tuple[str, str], Handler] = {
    ("GET", "/info"): FakeDify._get_info,
    ("GET", "/parameters"): FakeDify._get_parameters,
    ("GET", "/site"): FakeDify._get_site,
    ("GET", "/conversations"): FakeDify._get_conversations,
    ("GET", "/messages"): FakeDify._get_messages,
    ("POST", "/files/upload"): FakeDify._post_upload,
    ("POST", "/audio-to-text"): FakeDify._post_audio,
    ("POST", "/text-to-audio"): FakeDify._post_speech,
}


# ------------------------------------------------------------------------------
# Checks before a turn
# ------------------------------------------------------------------------------


def _check_json_and_user(request: Request) -> None:
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind.lower() != "application/json":
        raise _Refused(415, "unsupported_media_type", NOT_JSON)
    if request.json is None and request.body.strip() != b"null":
        raise _Refused(400, "bad_request", BROWSER)
    if not isinstance(request.json, dict):
        raise _crash()
    if not request.json.get("user"):
        raise _Refused(400, "invalid_param", "Arg user must be provided.")
    if len(request.user) > 255:
        raise _crash()


def _check_mode(path: str, app: App) -> None:
    code, modes = WRONG_MODE[path]
    if app.mode not in modes:
        raise _Refused(400, code, WRONG_MODE_TEXT[code])


def _check_fields(request: Request, app: App) -> None:
    body = request.json
    errors = _field_errors(body, app)
    if errors:
        raise _invalid(errors, app)
    if app.mode not in CHAT_MODES:
        return
    conversation_id = body.get("conversation_id")
    if conversation_id and not isinstance(conversation_id, str):
        raise _crash()
    if conversation_id and not _is_uuid(conversation_id):
        text = "Value error, conversation_id must be a valid UUID"
        error = _pydantic(text, "value_error", conversation_id)
        raise _invalid({"conversation_id": error}, app)
    agent = app.mode in ("agent-chat", "agent")
    if agent and body.get("response_mode") != "streaming":
        text = "Agent Chat App does not support blocking mode"
        raise _Refused(400, "invalid_param", text)
    if not body["query"]:
        raise _Refused(400, "invalid_param", "query is required")


def _field_errors(body: Event, app: App) -> dict[str, str]:
    """Return what is wrong with the required fields, by field."""
    wanted: dict[str, tuple[type, str, str]] = {
        "inputs": (dict, "Input should be a valid dictionary", "dict_type")
    }
    if app.mode in CHAT_MODES:
        wanted["query"] = (str, "Input should be a valid string", "string_type")
    errors = {}
    for name, (kind, text, code) in wanted.items():
        if name not in body:
            errors[name] = _pydantic("Field required", "missing", body)
        elif not isinstance(body[name], kind):
            errors[name] = _pydantic(text, code, body[name])
    return errors


def _pydantic(text: str, code: str, value: Any) -> str:
    """Return an error in the words of the library that Dify uses from 1.11 on."""
    shown = repr(value)
    if len(shown) > 50:
        shown = f"{shown[:25]}...{shown[-24:]}"
    return (
        f"  {text} [type={code}, input_value={shown}, "
        f"input_type={type(value).__name__}]\n    For further information visit "
        f"https://errors.pydantic.dev/2.11/v/{code}"
    )


def _invalid(errors: Mapping[str, str], app: App) -> _Refused:
    """Return the refusal of a body with bad fields."""
    if app.release < (1, 11):
        refused = _Refused(400, "invalid_param", "")
        text = "Missing required parameter in the JSON body"
        field_name = next(iter(errors))
        refused.body = {"code": "invalid_param", "message": text, "params": field_name}
        return refused
    payload = {
        "completion": "CompletionRequestPayload",
        "workflow": "WorkflowRunPayload",
    }.get(app.mode, "ChatRequestPayload")
    count = (
        "1 validation error" if len(errors) == 1 else f"{len(errors)} validation errors"
    )
    lines = [f"{count} for {payload}"]
    lines += [f"{name}\n{error}" for name, error in errors.items()]
    return _Refused(400, "invalid_param", "\n".join(lines))


def _check_inputs(turn: Turn) -> None:
    """Refuse a turn without the app's required inputs."""
    for entry in turn.app.all_parameters()["user_input_form"]:
        for form in entry.values():
            value = turn.message.inputs.get(form["variable"])
            if form.get("required") and value is None:
                text = f"{form['variable']} is required in input form"
                raise _Refused(400, "invalid_param", text)


def _check_upload(files: Sequence[Part]) -> None:
    if not files:
        raise _Refused(400, "no_file_uploaded", "Please upload your file.")
    if len(files) > 1:
        raise _Refused(400, "too_many_files", "Only one file is allowed.")
    name = files[0].filename or ""
    if not name:
        text = "The specified filename does not exist."
        raise _Refused(400, "filename_not_exists_error", text)
    if "/" in name or "\\" in name:
        raise _Refused(400, "invalid_param", "Filename contains invalid characters")
    if files[0].mime_type is None:
        raise _Refused(415, "unsupported_file_type", "File type not allowed.")


def _no_conversation(app: App, request: Request) -> str:
    if app.release < (1,):
        return "Conversation Not Exists."
    path = f"/v1{request.path}"
    like = f"/api{request.path}"
    return (
        f"Conversation Not Exists. You have requested this URI [{path}] but did you "
        f"mean {path} or {like} or {path}/<string:task_id>/stop ?"
    )


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text.strip())
    except ValueError:
        return False
    return True


def _first_text(inputs: Any) -> str:
    """Return the first input that is a text."""
    values = inputs.values() if isinstance(inputs, dict) else ()
    return next((value for value in values if isinstance(value, str)), "")


def _page(items: Sequence[Event], request: Request) -> Event:
    limit = int(request.query.get("limit", "20"))
    return {"limit": limit, "has_more": len(items) > limit, "data": items[:limit]}


# ------------------------------------------------------------------------------
# Playing a script
# ------------------------------------------------------------------------------


def _steps(script: Script, request: Request) -> Sequence[Step]:
    return script(request) if callable(script) else script


def _answer_to(turn: Turn, connection: _Connection) -> _Stream | _Blocking:
    body = turn.request.json if isinstance(turn.request.json, dict) else {}
    streaming = body.get("response_mode") == "streaming"
    return _Stream(connection, turn) if streaming else _Blocking(connection, turn)


async def _play(
    steps: Sequence[Step],
    connection: _Connection,
    answer: _Stream | _Blocking,
    app: App,
) -> bool:
    """Play all steps and tell whether the connection may be used again."""
    raw = False
    for step in steps:
        if isinstance(step, Status):
            connection.respond(step.code, step.body, app, step.headers)
            return True
        if isinstance(step, Reset):
            await connection.drain()
            connection.reset()
            return False
        if isinstance(step, Close):
            return False
        if isinstance(step, Raw):
            raw = True
            connection.write(step.data)
        elif isinstance(step, Send):
            _send(step, answer)
        else:
            await _pause(step)
        await connection.drain()
    if not raw:
        answer.finish()
    return True


def _send(step: Send, answer: _Stream | _Blocking) -> None:
    if isinstance(step.data, bytes):
        answer.chunk(step.data)
    else:
        answer.event(step.data)


async def _pause(step: Wait | Sleep | Hang) -> None:
    if isinstance(step, Wait):
        await step.gate.wait()
    elif isinstance(step, Sleep):
        await asyncio.sleep(step.seconds)
    else:
        await asyncio.Event().wait()


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is still running, and wait for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _end_stopped(answer: _Stream | _Blocking, turn: Turn) -> None:
    """End a stream as Dify does after a stop."""
    stopped = {"status": "stopped", "error": "Stopped by user."}
    if turn.app.is_flow:
        answer.event({"event": "workflow_finished", "data": stopped})
    if turn.app.mode == "workflow":
        return answer.finish()
    if not turn.app.is_flow or turn.app.release < (1, 13):
        end = message_end((0, 0)).data
        assert isinstance(end, dict)
        answer.event(end)
    return answer.finish()


# ------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------


def _context(conversation: Conversation) -> list[tuple[str, str]]:
    """Return what the model is shown: all turns, the running one's query last."""
    *before, current = conversation.messages
    shown: list[tuple[str, str]] = []
    for message in before:
        recalled = message.answer if message.recalled is None else message.recalled
        shown += [("user", message.query), ("assistant", recalled)]
    return [*shown, ("user", current.query)]


def _remembered(context: Sequence[tuple[str, str]]) -> list[str]:
    """Return the default answer of an app with memory, in pieces.

    It lists what the model was shown. Of earlier answers it gives the beginning, up to
    the first full stop: "Answer 1" says enough, and answers do not grow without end.
    """
    shown = "; ".join(
        f"{role}: {text if role == 'user' else text.partition('.')[0]}"
        for role, text in context
    )
    number = sum(role == "user" for role, _ in context)
    return re.findall(r"\s*\S+", f"Answer {number}. The model was shown: {shown}")


def _echo(turn: Turn, context: Sequence[tuple[str, str]]) -> list[str]:
    """Return the answer of the recordings' model, in its eight pieces."""
    turns = sum(role == "user" for role, _ in context)
    images = len(turn.request.json.get("files") or ())
    counts = [f" (user turns seen: {turns}", f", images: {images})"]
    query = turn.message.query.strip() or "nothing"
    return ["Hello", "!", " You", " said", ": ", query, *counts]


DEFAULT_ANSWER: dict[str, Callable[..., list[Step]]] = {
    "chat": chat_answer,
    "agent-chat": agent_answer,
    "agent": agent_answer,
    "advanced-chat": chatflow_answer,
    "completion": completion_answer,
    "workflow": workflow_answer,
}


def _store(turn: Turn) -> None:
    """Store the answer of a turn that was read to its end."""
    if turn.ended:
        turn.message.answer = turn.text if turn.app.is_flow else turn.text.strip()


def _store_abandoned(turn: Turn, steps: Sequence[Step]) -> None:
    """Store a turn whose client left: the question, and no answer.

    From 1.13 on the runs of flows go on without a client and are stored whole.
    """
    if turn.ended:
        _store(turn)
    elif turn.app.is_flow and turn.app.release >= (1, 13):
        turn.text, turn.ended = "", False
        for step in steps:
            if isinstance(step, Send) and isinstance(step.data, dict):
                turn.note(step.data)
        _store(turn)
