"""Room Dify: recorded answers of Dify, requests for each mode, errors, reasoning."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import replay
from expected_answers import EXPECTED, Expected, Long
from hypothesis import example, given
from hypothesis import strategies as st
from work import at_most

import opendify
from opendify import (
    Answer,
    AnswerReader,
    AnswerText,
    Appendix,
    AppForm,
    AppInput,
    AppSettings,
    Attachment,
    Blocks,
    Citations,
    DeltaReader,
    DifyRequest,
    Failure,
    Finish,
    KeptText,
    Media,
    Part,
    ProxyError,
    Reasoning,
    Recast,
    Replace,
    SSEDecoder,
    Text,
    UpstreamFailed,
    Usage,
)

BASE = "http://dify.example/v1"
APP = AppSettings("app-key-of-the-tests", BASE)
BROKEN_OFF = UpstreamFailed("It broke off.")


def row_id(row: Expected) -> str:
    return f"{row.file}-{row.exchange}"


def parts_of(row: Expected) -> tuple[list[Part], AnswerReader]:
    """The parts of a recorded answer; a refusal is a failure alone."""
    status, fields = replay.status_and_headers(row.file, row.exchange)
    headers = {name.lower(): value for name, value in fields}
    body = replay.stream_bytes(row.file, row.exchange)
    reader, one_by_one = AnswerReader(row.mode, APP), AnswerReader(row.mode, APP)
    if status != 200 or not headers["content-type"].startswith("text/event-stream"):
        return [Failure(opendify.error_from_body(status, body))], reader
    events = SSEDecoder().feed(body)
    parts = reader.read(events)
    singly = [part for event in events for part in one_by_one.read([event])]
    assert repr(singly) == repr(parts)  # errors are equal to none but themselves
    if not reader.is_finished:
        parts += reader.give_up(BROKEN_OFF)
    return parts, reader


def joined(parts: list[Part], kind: type[Text] | type[Reasoning]) -> str:
    """All text of one kind, as a whole answer has it."""
    whole = Answer()
    kinds = (Text, Reasoning, Recast, Replace)
    whole.add(part for part in parts if isinstance(part, kinds))
    return whole.text if kind is Text else whole.reasoning


def only(parts: list[Part], kind: Any) -> Any:
    """The one part of a kind, None if there is none."""
    found = [part for part in parts if isinstance(part, kind)]
    assert len(found) < 2
    return found[0] if found else None


# ------------------------------------------------------------------------------
# Recorded answers
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", EXPECTED, ids=row_id)
def test_recorded_answer_is_what_was_written_down(row: Expected) -> None:
    parts, reader = parts_of(row)
    check_text(row, joined(parts, Text))
    assert joined(parts, Reasoning) == "\n\n".join(row.reasoning)
    files = [part for part in parts if isinstance(part, Media)]
    assert [(file.kind, file.url) for file in files] == [row[:2] for row in row.files]
    citations = only(parts, Citations)
    sources = citations.resources if citations else ()
    cited = [(source["position"], source["document_name"]) for source in sources]
    assert cited == row.citations
    ids = (reader.conversation_id, reader.message_id, reader.task_id)
    wanted = (row.conversation_id, row.message_id, row.task_id)
    assert ids == tuple(id_ or "" for id_ in wanted)
    check_end(row, parts)


def check_text(row: Expected, text: str) -> None:
    if isinstance(row.text, Long):
        assert row.text.matches(text)
    elif row.file == "streams/workflow-outputs-only.sse":
        assert json.loads(text) == json.loads(row.text)
    elif row.then:
        assert text.startswith(row.text)
        places = [text.index(fragment) for fragment in row.then]
        assert places == sorted(places)
    else:
        assert text == row.text


def check_end(row: Expected, parts: list[Part]) -> None:
    failure, usage, finish = (only(parts, kind) for kind in (Failure, Usage, Finish))
    if row.error:
        error: ProxyError = failure.error
        assert parts[-1] is failure
        assert (error.status, error.code) == (row.error.status, row.error.code)
        assert row.error.contains in error.message
        assert finish is None
        return
    assert failure is None
    assert finish == parts[-1] == Finish(row.finish)
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert counts == row.usage


# ------------------------------------------------------------------------------
# Reasoning
# ------------------------------------------------------------------------------

DETAILS = (
    '<details style="color:gray;background-color: #f8f8f8;padding: 8px;'
    'border-radius: 4px;" open> <summary> Thinking... </summary>'
)
MARKER = "<!--dify-deepseek-reasoning-->"


def split(*pieces: str) -> tuple[str, str]:
    """(reasoning, text) of an answer that comes in pieces."""
    said = AnswerText(Blocks())
    parts = [part for piece in pieces for part in said.add(piece)]
    parts += said.close()
    return joined(parts, Reasoning), joined(parts, Text)


REASONED = [
    pytest.param("<think>\nyes\n</think>\n\nOK", "yes", "OK", id="plugins"),
    pytest.param("<think>\n\nyes\n\n</think>OK", "yes", "OK", id="gemini"),
    pytest.param("<think>yes</think>OK", "yes", "OK", id="no-newlines"),
    pytest.param("<THINK>yes</Think>OK", "yes", "OK", id="upper-case"),
    pytest.param('<think a="1">yes</think>OK', "yes", "OK", id="attributes"),
    pytest.param("Hm. <think>a</think>OK", "a", "Hm. OK", id="text-before"),
    pytest.param("<think>never closed", "never closed", "", id="never-closed"),
    pytest.param("<think></think>OK", "", "OK", id="empty"),
    pytest.param(f"{DETAILS}yes</details>OK", "yes", "OK", id="details"),
    pytest.param(
        f"<think>\n{MARKER}a &lt; b &amp;&amp; &quot;c&#x27;\n</think>a < b",
        "a < b && \"c'",
        "a < b",
        id="deepseek",
    ),
    pytest.param(
        "a < b <b>x</b> <thin> </p", "", "a < b <b>x</b> <thin> </p", id="html"
    ),
    pytest.param("<details><summary>x", "", "<details><summary>x", id="other-details"),
    pytest.param("<thinking>a</thinking>", "", "<thinking>a</thinking>", id="thinking"),
    pytest.param("a&amp;b <think>&lt;</think>", "&lt;", "a&amp;b ", id="not-escaped"),
    *(
        pytest.param(f"<think>Hm</think>{text}", "Hm", text, id=f"named-in-{name}")
        for name, text in {
            "code": "Put it between `<think>` and `</think>`.",
            "pattern": r're.sub(r"<think>.*?</think>\n*", "", text)',
            "string": "text.split(\"</think>\\n\")[-1]; text.split('</think>')[-1]",
            "lines": '"""<think>\nHm.\n</think>\n\n"""',
            "JSON": '{"a": "<think>b</think>c", "</think>": "“<think>”"}',
            "Chinese": "“<think>”和“</think>”",
        }.items()
    ),
    pytest.param('<think>"Yes"</think>"OK"', '"Yes"', '"OK"', id="ends-with-quote"),
    pytest.param("`<think>` <think>a</think>b", "a", "`<think>` b", id="named-first"),
]


@pytest.mark.parametrize(("answer", "reasoning", "text"), REASONED)
def test_reasoning_is_told_from_text_however_it_is_cut(
    answer: str, reasoning: str, text: str
) -> None:
    assert split(answer) == (reasoning, text)
    assert split(*answer) == (reasoning, text)
    for cut in range(len(answer)):
        assert split(answer[:cut], answer[cut:]) == (reasoning, text)


def test_text_before_a_closing_tag_alone_was_reasoning() -> None:
    said = AnswerText(Blocks())
    assert said.add("I think so.</thi") == [Text("I think so.")]
    assert said.add("nk>\n\nYes") == [Recast(11), Text("Yes")]


@pytest.mark.parametrize("text", ["`x`</think>\n\n`y`", '"x"</think>y'])
def test_a_thought_without_opening_tag_may_end_with_a_quote(text: str) -> None:
    assert Recast(3) in AnswerText(Blocks()).add(text)


def test_a_tag_in_quotes_alone_makes_no_reasoning() -> None:
    text = 'Take what follows `</think>`: text.split("</think>")[-1]'
    assert split(text) == ("", text)
    assert split(*text) == ("", text)


def test_a_closing_tag_with_nothing_before_it_says_nothing() -> None:
    parts = AnswerReader("chat", APP).read([event(event="message", answer="</think>A")])
    assert parts == [Text("A")]


def test_many_tags_in_one_event_take_little_time() -> None:
    """An app that repeats its question says so much at once."""
    text = "<think>a</think>" * 60_000
    with at_most(160):
        parts = AnswerReader("chat", APP).read([event(event="message", answer=text)])
        assert joined(parts, Reasoning).count("a") == 60_000


def test_many_files_of_an_answer_are_sought_in_it_in_little_time() -> None:
    appendix = Appendix("workflow", BASE)
    for n in range(5000):
        appendix.add_file({"url": f"/files/{n}.png?sign=1"})
    appendix.add_file({"url": "/files/" + "a" * 1_000_000})
    with at_most(80):
        *files, usage = appendix.parts("://host/files/7.png " + "://x" * 30_000)
    assert len(files) == 5000 and usage == Usage()


def test_nothing_longer_than_the_longest_tag_is_held_back() -> None:
    said = AnswerText(Blocks())
    given_, out = "", ""
    for piece in [
        "<",
        "/",
        "t",
        "h",
        "<p>",
        "a < b",
        "<<<",
        "</",
        "```<",
        DETAILS[:-1],
    ]:
        given_ += piece
        parts = said.add(piece)
        out += "".join(part.text for part in parts if isinstance(part, Text))
        assert len(given_) - len(out) < len(DETAILS)
        held = given_[len(out) :]
        assert not held or held.startswith("<")


THOUGHT_TWICE = "<think>foo bar</think>x<think>baz</think>y"


@pytest.mark.parametrize("cuts", [(), (12,), (23,), (12, 23, 32), range(43)])
def test_blocks_of_reasoning_stand_apart_however_they_are_cut(
    cuts: Sequence[int],
) -> None:
    ends = [0, *cuts, len(THOUGHT_TWICE)]
    pieces = [THOUGHT_TWICE[start:end] for start, end in zip(ends, ends[1:])]
    parts = read("chat", *[event(event="message", answer=piece) for piece in pieces])
    assert joined(parts, Reasoning) == "foo bar\n\nbaz"
    assert joined(parts, Text) == "xy"


SCRAPS = st.sampled_from(
    [
        *("<think>", "</think>", "<", ">", "/", "think", "\n", "a", "é", "&lt;", "&"),
        *(MARKER, DETAILS, "</details>", "```", "< think >", "<thin", "</thi", "<p>"),
        *('"', "`<think>", "`</think>`"),
    ]
)


@given(st.lists(SCRAPS, max_size=12).map("".join), st.data())
def test_any_cut_gives_the_same_parts(answer: str, data: Any) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=6).map(sorted))
    ends = [0, *cuts, len(answer)]
    pieces = [answer[start:end] for start, end in zip(ends, ends[1:])]
    assert split(*pieces) == split(answer)


@given(st.lists(SCRAPS, max_size=12).map("".join))
@example(f"<think>{MARKER}&lt;think>")
def test_no_character_is_lost_but_tags_and_their_newlines(answer: str) -> None:
    said = AnswerText(Blocks())
    parts = said.add(answer) + said.close()
    kept = "".join(part.text for part in parts if isinstance(part, (Text, Reasoning)))

    def plain(text: str) -> str:
        rest = html.unescape(text)
        for tag in (DETAILS, MARKER, "</details>", "<think>", "</think>", "\n"):
            rest = rest.replace(tag, "")
        # Where a tag stood, two halves of another may have met.
        return plain(rest) if rest != text else text

    assert plain(kept) == plain(answer)


# ------------------------------------------------------------------------------
# Events that the recordings lack
# ------------------------------------------------------------------------------


def event(**fields: Any) -> str:
    return json.dumps(fields)


def read(mode: str, *events: str, **options: Any) -> list[Part]:
    whole = AnswerReader(mode, APP, **options).read(events)
    reader = AnswerReader(mode, APP, **options)
    assert [part for one in events for part in reader.read([one])] == whole
    return whole


PIECES = ["a", "字", "", "\n", "<", "<think>", "</think>", "x" * 90, *"\ud83d\ude00"]


def text_event(kind: str, text: str, source: str, **more: Any) -> str:
    where = {"from_variable_selector": [source, "text"]}
    if kind == "text_chunk":
        return event(event=kind, data={"text": text, **where}, **more)
    return event(event=kind, id="1", answer=text, **where, **more)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("chat", "message"), ("agent-chat", "agent_message"), ("workflow", "text_chunk")],
)
@given(
    st.lists(
        st.tuples(st.sampled_from([*PIECES, '"', "\0"]), st.sampled_from("ab"))
        | st.sampled_from(["ping", "end"]),
        max_size=12,
    )
)
def test_deltas_are_read_alike_one_by_one_and_in_a_row(
    mode: str, kind: str, rows: list[str | tuple[str, str]]
) -> None:
    """And as those that have nothing in common, each of which is parsed."""
    fixed = {"ping": "ping", "end": event(event="message_end")}
    alike, unlike = [], []
    for number, row in enumerate(rows):
        if isinstance(row, str):
            alike.append(fixed[row])
            unlike.append(fixed[row])
        else:
            alike.append(text_event(kind, *row))
            unlike.append(text_event(kind, *row, number=number))
    assert read(mode, *alike) == read(mode, *unlike)


@pytest.mark.parametrize(
    ("mode", "kind"), [("chat", "message"), ("workflow", "text_chunk")]
)
def test_deltas_that_are_alike_are_not_parsed(
    mode: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = AnswerReader(mode, APP)
    reader.read([text_event(kind, "a", "llm")])
    monkeypatch.setattr(opendify, "read_json", None)
    rows = [text_event(kind, text, "llm") for text in ("b", "c")]
    assert reader.read(rows) == [Text("b"), Text("c")]


@pytest.mark.parametrize(
    ("url", "wanted", "name"),
    [
        (
            "/files/a%20b.png?sign=1",
            "http://dify.example/files/a%20b.png?sign=1",
            "a b.png",
        ),
        ("http://x", "http://x", ""),
        ("http://[/a.png", "http://[/a.png", "a.png"),
        ("http://[", "http://[", "["),
    ],
)
def test_a_file_is_given_whatever_its_url_is(url: str, wanted: str, name: str) -> None:
    file = event(event="message_file", type="image", url=url)
    parts = read("chat", file, event(event="message_end"))
    assert only(parts, Media) == Media("image", wanted, name)


@pytest.mark.parametrize(
    ("mode", "given"),
    [("chat", "c"), ("agent-chat", "c"), ("completion", "c"), ("advanced-chat", "abc")],
)
def test_files_of_the_user_are_not_given_back(mode: str, given: str) -> None:
    """But those that a chatflow answers with are."""
    how = {"a": "local_file", "b": "remote_url", "c": "tool_file"}
    files = [{"url": f"/files/{n}", "transfer_method": how[n]} for n in how]
    said = event(event="message", answer="Hi")
    parts = read(mode, said, event(event="message_end", files=files))
    assert "".join(part.name for part in parts if isinstance(part, Media)) == given


def test_withdrawn_text_does_not_come_back_with_the_outputs() -> None:
    outputs = {"status": "succeeded", "outputs": {"answer": "bad"}}
    parts = read(
        "advanced-chat",
        event(event="message", answer="bad"),
        event(event="message_replace", answer=""),
        event(event="workflow_finished", data=outputs),
        event(event="message_end"),
    )
    assert parts == [Text("bad"), Replace(""), Usage(), Finish("content_filter")]


def test_answer_that_is_replaced_and_stopped_was_filtered() -> None:
    parts = read(
        "advanced-chat",
        event(event="message", answer="abc"),
        event(event="message_replace", answer="No."),
        event(event="workflow_finished", data={"status": "stopped"}),
        event(event="message_end"),
    )
    assert parts[-1] == Finish("content_filter")


def test_replacement_that_goes_on_with_the_answer_is_more_of_it() -> None:
    replacing = [event(event="message_replace", answer=text) for text in ("ab", "abc")]
    parts = read("chat", event(event="message", answer="a"), *replacing)
    assert parts == [Text("a"), Text("b"), Text("c")]


@pytest.mark.parametrize(
    ("text", "url", "is_shown"),
    [
        ("see https://h/download?id=1 and/or", "https://h/download?id=2", False),
        ("see https://h/download?id=1 and/or", "https://cdn/?f=1", False),
        ("see https://h/download?id=1 and/or", "https://h/download?id=1", True),
        ("![](/files/tools/a.png?sign=1)", "/files/tools/a.png?sign=2", False),
        ("![](http://web/files/tools/a.png)", "/files/tools/a.png?sign=2", True),
        ("![](/files/tools/b.png)", "/files/tools/a.png?sign=2", False),
        ("https://h/a.png?timestamp=1&sign=1", "https://h/a.png?timestamp=2", True),
        ("![](https://h/10) and https://h/1.png", "https://h/1", False),
        ("https://h/a?id=1&b=2, https://h/a/b", "https://h/a", False),
        ("https://h/a?id=1&b=2, https://h/a/b", "https://h/a?id=1", False),
        ("http://web/files/tools/a.pngx", "/files/tools/a.png?sign=2", False),
        ("Is it https://h/a? Is it?", "https://h/a", True),
        ("It is https://h/a.", "https://h/a", True),
        ("\u56fehttps://h/a\u5427", "https://h/a", True),
    ],
)
def test_a_file_is_given_unless_the_text_shows_it(
    text: str, url: str, is_shown: bool
) -> None:
    parts = read(
        "chat",
        event(event="message", answer=text),
        event(event="message_file", type="image", url=url),
        event(event="message_end"),
    )
    assert (only(parts, Media) is None) == is_shown


def test_moderated_input_of_a_new_agent_is_answered_in_single_characters() -> None:
    pieces = [event(event="message", answer=character) for character in "No, off."]
    parts = read("agent", *pieces, event(event="message_end"))
    assert joined(parts, Text) == "No, off."
    replaced = event(event="message_replace", answer="No, off.")  # as 0.15 does
    parts = read("agent", *pieces, replaced, event(event="message_end"))
    assert (joined(parts, Text), parts[-1]) == ("No, off.", Finish("stop"))


def test_last_round_of_a_new_agent_comes_once_however_long_it_is() -> None:
    answer = "x" * (opendify.MAX_KEPT_CHARS + 1)
    pieces = (event(event=kind, answer=answer) for kind in ("agent_message", "message"))
    parts = read("agent", *pieces, event(event="message_end"))
    assert parts == [Text(answer), Usage(), Finish("stop")]


def test_text_of_a_workflow_is_replaced_as_an_answer_is() -> None:
    said = event(event="text_chunk", data={"text": "Hm"})
    replaced = event(event="text_replace", data={"text": "No."})
    assert read("workflow", said, replaced) == [Text("Hm"), Replace("No.")]


def test_replaced_text_shows_no_reasoning() -> None:
    said = event(event="message", answer="Hm")
    replaced = event(event="message_replace", answer="hidden</think>answer")
    assert read("chat", said, replaced) == [Text("Hm"), Replace("answer", "hidden")]


@pytest.mark.parametrize(
    ("replacing", "text", "reasoning"),
    [
        ("No.", "No.", "apart"),
        ("<think>how to ***</think>The ***", "The ***", "apart\n\nhow to ***"),
    ],
)
def test_reasoning_in_replaced_text_goes_with_it(
    replacing: str, text: str, reasoning: str
) -> None:
    parts = read(
        "advanced-chat",
        event(event="reasoning_chunk", data={"reasoning": "apart", "node_id": "llm"}),
        said("llm", "<think>how to build</think>\n"),
        said("llm", "The BOMB <think>again</think>"),
        event(event="message_replace", answer=replacing),
        event(event="message_end"),
    )
    assert (joined(parts, Text), joined(parts, Reasoning)) == (text, reasoning)


def test_a_block_of_reasoning_after_replaced_text_stands_apart() -> None:
    said = event(event="message", answer="<think>a</think>Hm")
    replaced = event(event="message_replace", answer="No. ")
    more = event(event="message", answer="<think>b</think>")
    assert read("chat", said, replaced, more) == [
        *(Reasoning("a", is_inline=True), Text("Hm"), Replace("No. ")),
        Reasoning("\n\nb", is_inline=True),
    ]


def test_replaced_text_takes_half_a_character_with_it() -> None:
    said = event(event="message", answer="a\ud83d")
    replaced = event(event="message_replace", answer="hidden")
    assert read("chat", said, replaced) == [Text("a"), Replace("hidden")]


def said(node: str, text: str, variable: str = "text") -> str:
    """A delta of a chatflow."""
    return event(event="message", answer=text, from_variable_selector=[node, variable])


def node_event(name: str, status: str) -> str:
    return event(event=name, data={"node_id": "llm", "status": status})


CUT_THOUGHT = said("llm", "<think>\nlet me")
CHUNK = {"from_variable_selector": ["llm", "text"]}


@pytest.mark.parametrize(
    ("mode", "events", "reasoning", "text"),
    [
        pytest.param(
            "advanced-chat",
            [CUT_THOUGHT, said("answer", "Sorry.", "answer")],
            "let me",
            "Sorry.",
            id="fail-branch",
        ),
        pytest.param(
            "advanced-chat",
            [said("llm", "<think>\nif 1 <"), said("answer", "Sorry.", "answer")],
            "if 1 <",
            "Sorry.",
            id="in-what-may-be-a-tag",
        ),
        pytest.param(
            "advanced-chat",
            [CUT_THOUGHT, said("llm2", "<think>\nso"), said("llm2", "\n</think>Yes")],
            "let me\n\nso",
            "Yes",
            id="next-node",
        ),
        pytest.param(
            "workflow",
            [
                event(event="text_chunk", data={**CHUNK, "text": "<think>\nlet me"}),
                node_event("node_finished", "exception"),
                event(event="text_chunk", data={**CHUNK, "text": "DEFAULT"}),
            ],
            "let me",
            "DEFAULT",
            id="default-value",
        ),
        pytest.param(
            "advanced-chat",
            [
                CUT_THOUGHT,
                node_event("node_retry", "retry"),
                CUT_THOUGHT,
                said("llm", " see</think>Yes"),
            ],
            "let me\n\nlet me see",
            "Yes",
            id="retry",
        ),
        pytest.param(
            "agent-chat",
            [
                event(event="agent_message", answer="<think>let me"),
                event(event="agent_thought", id="2", thought=""),
                event(event="agent_message", answer="Yes"),
            ],
            "let me",
            "Yes",
            id="round",
        ),
        pytest.param(
            "advanced-chat",
            [
                said("answer", "So: ", "answer"),
                CUT_THOUGHT.replace('"message"', '"message_file"'),
                said("answer", "Yes", "answer"),
            ],
            "let me",
            "So: Yes",
            id="text-called-a-file",
        ),
        pytest.param(
            "agent",
            [
                event(event="agent_message", answer="<think>let "),
                event(event="agent_thought", id="1", thought=""),
                event(event="agent_message", answer="me</think>Yes"),
            ],
            "let me",
            "Yes",
            id="snapshot-of-a-new-agent",
        ),
        pytest.param(
            "chat",
            [
                event(event="agent_message", answer="<think>let me"),
                event(event="agent_thought", id="1", tool="web"),
                event(event="agent_message", answer="Yes"),
            ],
            "let me",
            "Yes",
            id="round-of-an-agent-that-is-called-a-chat",
        ),
        pytest.param(
            "advanced-chat",
            [
                CUT_THOUGHT,
                event(event="agent_log", data={"node_id": "llm", "label": "CALL web"}),
                said("llm", "Yes"),
            ],
            "let me",
            "Yes",
            id="round-of-a-node",
        ),
        pytest.param(
            "workflow",
            [
                event(event="text_chunk", data={**CHUNK, "text": "<think>\nlet "}),
                event(event="agent_log", data={"node_id": "other"}),
                event(event="text_chunk", data={**CHUNK, "text": "me</think>Yes"}),
            ],
            "let me",
            "Yes",
            id="round-of-another-node",
        ),
        pytest.param(
            "advanced-chat",
            [
                CUT_THOUGHT,
                event(event="node_finished", data={"node_id": "other"}),
                said("llm", " see</think>Yes"),
            ],
            "let me see",
            "Yes",
            id="other-node-ends",
        ),
        pytest.param(
            "advanced-chat",
            [
                said("answer", "<think>", "answer"),
                said("llm", "let me", "reasoning_content"),
                said("answer", "</think>\n", "answer"),
                said("llm", "Yes"),
            ],
            "let me",
            "Yes",
            id="tags-of-the-template",
        ),
        pytest.param(
            "advanced-chat",
            [
                said("answer", "<think>", "answer"),
                said("plan", "a plan"),
                said("answer", "</think>\n", "answer"),
                CUT_THOUGHT,
                said("answer", "Sorry.", "answer"),
            ],
            "a plan\n\nlet me",
            "Sorry.",
            id="node-behind-the-tags-of-the-template",
        ),
    ],
)
def test_a_block_of_reasoning_ends_with_its_node_or_round(
    mode: str, events: list[str], reasoning: str, text: str
) -> None:
    parts = read(mode, *events, event(event="message_end"))
    assert (joined(parts, Reasoning), joined(parts, Text)) == (reasoning, text)


@pytest.mark.parametrize(
    ("mode", "events", "reasoning", "text"),
    [
        pytest.param(
            "advanced-chat",
            [
                said("answer", "Dear Ada,\n", "answer"),
                said("llm", "hmm, let "),
                said("llm", "me think"),
                said("llm", "</think>\n\nHello"),
            ],
            "hmm, let me think",
            "Dear Ada,\nHello",
            id="template",
        ),
        pytest.param(
            "advanced-chat",
            [said("llm", "t1</think>One. "), said("llm2", "t2</think>Two.")],
            "t1\n\nt2",
            "One. Two.",
            id="nodes",
        ),
        pytest.param(
            "advanced-chat",
            [said("llm", "<think>t1</think>One. "), said("llm2", "t2</think>Two.")],
            "t1\n\nt2",
            "One. Two.",
            id="first-has-both-tags",
        ),
        pytest.param(
            "agent-chat",
            [
                event(event="agent_message", answer="t1</think>One. "),
                event(event="agent_thought", id="2"),
                event(event="agent_message", answer="t2</think>Two."),
            ],
            "t1\n\nt2",
            "One. Two.",
            id="rounds",
        ),
    ],
)
def test_a_closing_tag_alone_reaches_back_to_the_begin_of_its_node_or_round(
    mode: str, events: list[str], reasoning: str, text: str
) -> None:
    parts = read(mode, *events, event(event="message_end"))
    assert (joined(parts, Reasoning), joined(parts, Text)) == (reasoning, text)


def test_surrogate_halves_are_joined_over_events() -> None:
    halves = [event(event="message", answer=half) for half in ("a\ud83d", "\ude00b")]
    assert read("chat", *halves) == [Text("a"), Text("\U0001f600b")]


def test_a_half_that_stays_alone_becomes_a_replacement_character() -> None:
    parts = read(
        "chat", event(event="message", answer="a\ud83d"), event(event="message_end")
    )
    assert joined(parts, Text) == "a\ufffd"


def test_a_half_at_the_end_of_a_block_is_a_part_of_it() -> None:
    said = event(event="message", answer="<think>a\ud83d")
    parts = read("chat", said, event(event="message_end"))
    assert (joined(parts, Reasoning), joined(parts, Text)) == ("a\ufffd", "")


def test_kept_text_is_what_was_added_halves_of_characters_too() -> None:
    kept = KeptText()
    for text in ("a", "", "\ud83d", "字"):
        kept.add(text)
    assert (kept.text, kept.size, kept.is_whole) == ("a\ud83d字", 3, True)
    kept.add("x" * opendify.MAX_KEPT_CHARS)
    assert (kept.text, kept.is_whole) == ("", False)


@pytest.mark.parametrize(
    "data",
    ["", "ping", "null", "[]", "7", '{"event":null}', '{"event":"unknown_event"}'],
)
def test_events_that_say_nothing_add_nothing(data: str) -> None:
    assert AnswerReader("chat", APP).read([data]) == []


def test_data_beside_what_an_event_says_takes_nothing_from_it() -> None:
    said = event(event="message", answer="Hi", data={"trace": "x"})
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    end = {"event": "message_end", "metadata": {"usage": usage}}
    parts = read("chat", said, event(**end, data={"trace": "x"}))
    assert parts == [Text("Hi"), Usage(1, 2), Finish("stop")]


def test_an_event_that_is_not_json_is_a_failure() -> None:
    (failure,) = AnswerReader("chat", APP).read(['{"event":"mess'])
    assert isinstance(failure, Failure)
    assert failure.error.code == "upstream_error"


NO_NUMBERS = '{"position": 1, "score": NaN, "rows": [-Infinity, 1e999, 0.5]}'


CITED = '{"event":"message_end","metadata":{"retriever_resources":[%s]}}'
OUTPUT = '{"event":"workflow_finished","data":{"outputs":{"x":%s}}}'


def test_numbers_that_json_lacks_are_null() -> None:
    wanted = {"position": 1, "score": None, "rows": [None, None, 0.5]}
    citations = only(read("chat", CITED.replace("%s", NO_NUMBERS)), Citations)
    assert citations == Citations((wanted,))
    text = joined(read("workflow", OUTPUT.replace("%s", NO_NUMBERS)), Text)
    assert text == json.dumps(wanted)


def test_what_is_nested_too_deeply_to_be_read_costs_no_answer() -> None:
    deep = '{"x":' * 100_000 + "1" + "}" * 100_000
    said = event(event="message", answer="Hi")
    output = OUTPUT.replace("%s", deep).replace("workflow", "node")
    parts = read("chat", said, output, event(event="message_end"))
    assert parts == [Text("Hi"), Usage(), Finish("stop")]


def test_what_is_nested_deeply_is_cut() -> None:
    deep = '{"x":' * 600 + "1" + "}" * 600
    citations = only(read("chat", CITED.replace("%s", deep)), Citations)
    text = joined(read("workflow", OUTPUT.replace("%s", deep)), Text)
    for cut in (json.dumps(citations.resources[0]), text):
        assert 90 < cut.count("{") <= 100
        assert cut.strip('{}"x: ') == "null"


def test_megabytes_that_nobody_reads_are_not_parsed() -> None:
    data = (
        '{"event":"loop_completed","data":' + "x" * 5000
    )  # would fail if it were parsed
    reader = AnswerReader("workflow", APP)
    reader.read([event(event="workflow_started", task_id="t", workflow_run_id="r")])
    assert reader.read([data]) == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *("data", "answer", "metadata", "usage", "outputs", "files"),
                        *("status", "retriever_resources", "text", "error", "message"),
                        *("actions", "id"),
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
    st.sampled_from([x[4:] for x in dir(AnswerReader) if x.startswith("_on_")]),
    st.sampled_from(opendify.APP_MODES),
)
def test_no_event_of_wrong_types_raises(fields: Any, name: str, mode: str) -> None:
    value = {
        **(fields if isinstance(fields, dict) else {"data": fields}),
        "event": name,
    }
    reader = AnswerReader(mode, APP, show_process=True)
    parts = reader.read([json.dumps(value)])
    assert all(isinstance(part, opendify.Part.__args__) for part in parts)  # type: ignore[attr-defined]


def test_process_lines_are_reasoning_when_wanted() -> None:
    started = event(event="node_started", data={"id": "1", "title": "LLM"})
    thought = {"event": "agent_thought", "id": "t", "tool": "clock"}
    events = [
        started,
        started,
        event(**thought),
        event(**thought, tool_input='{"zone": 1}', observation="12:00"),
        event(event="agent_thought", id="u", tool="dice", observation="6"),
        event(event="node_started", data={"id": "2", "node_type": "code"}),
        event(event="node_started", data={"id": "3"}),
        event(event="agent_log", data={"id": "4", "label": "ROUND 1"}),
        event(event="agent_log", data={"id": "5"}),
    ]
    assert read("advanced-chat", *events, show_process=True) == [
        Reasoning("Step: LLM"),
        Reasoning('\n\nTool: clock {"zone": 1}'),
        Reasoning("\n\nTool: dice"),
        Reasoning("\n\nStep: code"),
        Reasoning("\n\nROUND 1"),
    ]
    assert read("advanced-chat", *events) == []


def test_process_lines_are_short_whatever_a_tool_is_given() -> None:
    thought = event(
        event="agent_thought",
        tool="mail",
        tool_input="Dear all,\n\n" + "x" * 9999,
        observation="sent",
    )
    line = "Tool: mail Dear all, "
    short = line + "x" * (200 - len(line)) + " …"
    assert read("agent-chat", thought, show_process=True) == [Reasoning(short)]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("iteration", "Start, Code, Iteration, Variable Assigner, Code 2, Answer"),
        ("loop", "Start, Loop, Variable Assigner, Answer 2"),
    ],
)
def test_steps_of_a_run_include_those_that_repeat_others(kind: str, steps: str) -> None:
    """Dify tells of an iteration or a loop by an event of its own kind."""
    reader = AnswerReader("advanced-chat", APP, show_process=True)
    data = replay.stream_bytes(f"dify-1.12.1/advanced-{kind}-with-answer.json")
    parts = reader.read(SSEDecoder().feed(data))
    lines = "".join(part.text for part in parts if isinstance(part, Reasoning))
    told = [line.removeprefix("Step: ") for line in lines.split("\n\n")]
    assert ", ".join(dict.fromkeys(told)) == steps


@pytest.mark.parametrize("is_streamed", [True, False])
def test_reasoning_of_two_nodes_stands_apart(is_streamed: bool) -> None:
    told = {"one": "a", "two": "b"}
    chunks = [{"node_id": node, "reasoning": text} for node, text in told.items()]
    parts = read(
        "advanced-chat",
        *(event(event="reasoning_chunk", data=c) for c in chunks if is_streamed),
        event(event="message", answer="So."),
        event(event="message_end", metadata={"reasoning": told}),
    )
    assert joined(parts, Reasoning) == "a\n\nb"


@pytest.mark.parametrize("has_chunk", [True, False])
def test_reasoning_told_at_the_end_joins_the_process_lines(has_chunk: bool) -> None:
    chunk = event(event="reasoning_chunk", data={"reasoning": "Hm", "node_id": "llm"})
    parts = read(
        "advanced-chat",
        event(event="node_started", data={"id": "1", "title": "LLM"}),
        *([chunk] if has_chunk else []),
        event(event="message_end", metadata={"reasoning": {"llm": "Hm"}}),
        event(event="workflow_finished", data={"status": "succeeded"}),
        show_process=True,
    )
    assert parts[:-2] == [Reasoning("Step: LLM"), Reasoning("\n\nHm")]


def test_ids_are_learnt_from_the_first_event_that_has_them() -> None:
    reader = AnswerReader("chat", APP)
    ids = {"task_id": "t", "conversation_id": "c"}
    reader.read([event(event="agent_thought", **ids)])
    reader.read([event(event="message", answer="a", message_id="m", **ids)])
    assert (reader.task_id, reader.conversation_id, reader.message_id) == tuple("tcm")


def test_ids_are_learnt_from_an_event_that_repeats_a_long_question() -> None:
    reader = AnswerReader("workflow", APP)
    data = {"inputs": {"sys.query": "x" * 5000}}
    ids = {"task_id": "t", "workflow_run_id": "r"}
    reader.read([event(event="workflow_started", **ids, data=data)])
    assert (reader.task_id, reader.workflow_run_id) == ("t", "r")


def test_recovery_joins_a_surrogate_pair_that_broke_apart() -> None:
    reader = AnswerReader("chat", APP)
    half = event(
        event="message", answer="A \ud83d", conversation_id="c", message_id="m"
    )
    assert reader.read([half]) == [Text("A ")]
    assert reader.recover({"answer": "A 😀 B"})[0] == Text("😀 B")


def test_recovery_adds_the_rest_only_to_what_was_sent() -> None:
    reader = AnswerReader("chat", APP)
    begun = event(event="message", answer="Hel", conversation_id="c", message_id="m")
    reader.read([begun])
    assert reader.can_recover
    assert reader.recover({"answer": "Other"}) == []
    row = {"answer": "Hello"}
    assert reader.recover(row) == [Text("lo"), Usage(), Finish("stop")]


@pytest.mark.parametrize("lacking", ["answer", "conversation_id", "message_id"])
def test_only_what_came_and_can_be_found_is_recovered(lacking: str) -> None:
    reader = AnswerReader("chat", APP)
    fields = {"answer": "Hel", "conversation_id": "c", "message_id": "m", lacking: ""}
    reader.read([event(event="message", **fields)])
    assert not reader.can_recover


def test_recovered_answer_that_failed_ends_with_its_error() -> None:
    reader = AnswerReader("chat", APP)
    reader.read([event(event="message", answer="Hel")])
    row = {"answer": "Hello", "status": "error", "error": "The model is overloaded."}
    *parts, failure = reader.recover(row)
    assert parts == [Text("lo")]
    assert isinstance(failure, Failure)
    assert "The model is overloaded." in failure.error.message
    assert reader.is_finished
    assert not (reader.is_stored or reader.is_given_up)


def link(sign: str, file: str = "/files/tools/0b.png") -> str:
    """Return a link to a file, as an Answer node writes it."""
    url = f"https://dify.example{file}?timestamp={ord(sign)}0&nonce={sign * 32}"
    return f"![a cat]({url}&sign={sign * 43}=)"


@pytest.mark.parametrize(
    ("pieces", "stored", "rest"),
    [
        pytest.param([link("a"), " is"], f"{link('b')} is it", " it", id="signed-anew"),
        pytest.param([link("a")[:-9]], f"{link('b')} is it", None, id="half-a-link"),
        pytest.param([link("a", "/1")], link("b", "/2"), None, id="another-file"),
        pytest.param(["\n\nHel"], "Hello", "lo", id="stripped-before"),
        pytest.param(["Hello", " \n"], "Hello", "", id="stripped-after"),
        pytest.param(["I see. ", "N"], "I see. \nNow", "ow", id="rounds"),
        pytest.param(["Now "], "Now  then", " then", id="as-it-is"),
        pytest.param(["I s"], "I am", None, id="another"),
        pytest.param([" \n"], "", None, id="nothing-stored"),
    ],
)
def test_recovery_is_not_misled_by_white_space_or_signatures(
    pieces: list[str], stored: str, rest: str | None
) -> None:
    reader = AnswerReader("agent-chat", APP)
    reader.read([event(event="agent_message", answer=piece) for piece in pieces])
    parts = reader.recover({"answer": stored})
    assert (joined(parts, Text) if parts else None) == rest


def test_recovery_has_what_goes_with_the_text() -> None:
    reader = AnswerReader("chat", APP)
    begun = event(event="message", answer="Hel", conversation_id="c", message_id="m")
    image = {"type": "image", "url": "/files/a.png?sign=1", "belongs_to": "assistant"}
    seen = event(event="message_file", **image)
    reader.read([begun, seen])
    own = {"type": "image", "url": "/files/mine.png", "belongs_to": "user"}
    source = {"document_name": "doc", "content": "text"}
    assert reader.recover(
        {
            "answer": "Hello",
            "message_files": [own, image, {**image, "url": "/files/b.png"}],
            "retriever_resources": [source],
            "message_tokens": 7,
            "answer_tokens": 2,
        }
    ) == [
        Text("lo"),
        Media("image", "http://dify.example/files/a.png?sign=1", "a.png"),
        Media("image", "http://dify.example/files/b.png", "b.png"),
        Citations((source,)),
        Usage(7, 2),
        Finish("stop"),
    ]


@pytest.mark.parametrize("is_new", [True, False], ids=["new-order", "old-order"])
def test_chatflow_whose_text_was_lost_is_answered_by_its_outputs(is_new: bool) -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    last = [
        event(event="message_end", metadata={"usage": usage}),
        event(event="workflow_finished", data={"outputs": {"answer": "the whole"}}),
    ]
    parts = read("advanced-chat", *(last if is_new else last[::-1]))
    assert parts == [Text("the whole"), Usage(2, 3), Finish("stop")]


def test_chatflow_without_a_word_ends_when_nothing_more_comes() -> None:
    reader = AnswerReader("advanced-chat", APP)
    assert reader.read([event(event="message_end")]) == []
    assert reader.is_closing
    assert reader.give_up(BROKEN_OFF) == [Usage(), Finish("stop")]
    assert not reader.is_given_up


def test_event_that_is_no_json_spoils_no_answer_of_which_it_is_the_last() -> None:
    last = event(event="workflow_finished", data={"outputs": {"answer": "all"}})
    assert read(
        "advanced-chat", event(event="message", answer="all"), last, "{oops"
    ) == [Text("all"), Usage(), Finish("stop")]


def test_chatflow_whose_outputs_say_nothing_ends_with_its_message() -> None:
    """It does not wait for one more event, which would take a second."""
    reader = AnswerReader("advanced-chat", APP)
    assert reader.read([event(event="workflow_finished", data={"outputs": {}})]) == []
    assert reader.read([event(event="message_end")]) == [Usage(), Finish("stop")]


FORM = {
    "TYPE": "human_input_required",
    "form_id": "f",
    "form_content": "Send it?",
    "actions": [{"id": "y", "title": "Yes"}, {"id": "n", "title": "No"}],
}
ASKED = "Send it?\n\nActions: Yes, No"
PAUSED = event(event="workflow_paused", data={})


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "lost"])
@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        ([FORM], ASKED),
        ([FORM, {**FORM, "form_content": "Sure?"}], f"{ASKED}\n\nSure?{ASKED[8:]}"),
        ([{"TYPE": "scheduled_pause", "message": "Till noon."}], "Till noon."),
        ([{"TYPE": "scheduled_pause"}, 5], "Input is needed."),
    ],
)
def test_pause_says_what_it_waits_for(
    is_told: bool, reasons: list[Any], text: str
) -> None:
    forms = [row for row in reasons if row != 5]
    told = [event(event="human_input_required", data=row) for row in forms if is_told]
    paused = event(event="workflow_paused", data={"reasons": reasons})
    parts = read("advanced-chat", *told, paused)
    assert joined(parts, Text) == text
    assert parts[-1] == Finish("stop")


@pytest.mark.parametrize("mode", ["advanced-chat", "workflow"])
@pytest.mark.parametrize(
    ("data", "usage"),
    [
        ({"total_tokens": 9}, Usage(6, 3)),
        ({"total_tokens": "9"}, Usage(6, 3)),
        ({"total_tokens": None}, Usage(4, 3)),
        ({}, Usage(4, 3)),
    ],
)
def test_run_that_pauses_tells_what_it_has_used(
    mode: str, data: dict[str, Any], usage: Usage
) -> None:
    """Its nodes do not tell all: a workflow that is used as a tool has no usage."""
    told = {"usage": {"prompt_tokens": 4, "completion_tokens": 3}}
    node = {"node_type": "llm", "outputs": told}
    paused = event(event="workflow_paused", data={"reasons": [FORM], **data})
    parts = read(mode, event(event="node_finished", data=node), paused)
    assert parts[-2:] == [usage, Finish("stop")]


@pytest.mark.parametrize(
    ("more", "thought", "text"),
    [
        ([], "let me\n\n", ASKED),
        ([said("llm", " see</think>Yes")], "let me\n\n\n\n see", f"{ASKED}Yes"),
    ],
    ids=["cut", "goes-on"],
)
def test_what_a_pause_waits_for_is_no_thought_of_a_model(
    more: list[str], thought: str, text: str
) -> None:
    asked = event(event="human_input_required", data=FORM)
    parts = read("advanced-chat", CUT_THOUGHT, asked, *more, PAUSED)
    assert (joined(parts, Reasoning), joined(parts, Text)) == (thought, text)
    assert parts[-1] == Finish("stop")


# ------------------------------------------------------------------------------
# What an answer is put together from
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["message", "text_chunk"])
def test_delta_reader_reads_what_is_like_its_example(kind: str) -> None:
    deltas, field = DeltaReader(), "answer" if kind == "message" else "text"
    first, other, nothing = (
        text_event(kind, "a", "llm"),
        text_event(kind, "c", "other"),
        event(event=kind, id="2"),
    )
    assert deltas.texts_of(iter([first])) == ([], first)
    deltas.learn(first, {field: "a"})
    alike = [text_event(kind, text, "llm") for text in ('b"\n', "", "c")]
    rest = iter([*alike, other, *alike, alike[0][:-1]])
    assert deltas.texts_of(rest) == (['b"\n', "", "c"], other)
    assert deltas.texts_of(rest) == (['b"\n', "", "c"], alike[0][:-1])
    assert deltas.texts_of(rest) == ([], None)
    deltas.learn(nothing, {})
    assert deltas.texts_of(iter(alike)) == ([], alike[0])


@pytest.mark.parametrize(
    "of", [{"answer": "a"}, {"text": "a"}, {"text": "b", "more": {"answer": "a"}}]
)
def test_another_text_in_an_event_is_not_its_own(of: Any) -> None:
    before = [event(event="message", of=of, answer=text) for text in "abc"]
    behind = [event(event="message", answer=text, of=of) for text in "abc"]
    alone = [event(event="message", answer=None, of={"text": text}) for text in "abc"]
    assert read("chat", *before, *behind, *alone) == [Text(text) for text in "abcabc"]


def test_text_is_completed_where_it_begins_alike() -> None:
    text = AnswerText(Blocks())
    assert text.add("<think>a", "</think>Hel") == [
        Reasoning("a", is_inline=True),
        Text("Hel"),
    ]
    assert text.complete("Hello") is None
    assert text.complete("<think>a</think>Hello <") == [Text("lo ")]
    assert text.close() == [Text("<")]


def test_text_is_replaced_where_it_begins_otherwise() -> None:
    text = AnswerText(Blocks())
    assert text.add("Hel") == [Text("Hel")]
    assert text.replace("Hello") == [Text("lo")]
    assert not text.is_replaced
    assert text.replace("<think>a</think>No") == [Replace("No", "a")]
    assert (text.is_replaced, text.kept.text) == (True, "<think>a</think>No")


def test_text_too_long_to_be_kept_is_replaced_and_never_completed() -> None:
    text, said = AnswerText(Blocks()), "x" * (opendify.MAX_KEPT_CHARS + 1)
    text.add(said)
    assert text.complete(f"{said}y") is None
    assert text.replace("No.") == [Replace("No.")]


def test_blocks_of_reasoning_stand_apart() -> None:
    blocks = Blocks()
    assert blocks.add(("step", "1"), "Step: A") == [Reasoning("Step: A")]
    assert not blocks.has_thought  # the app did not
    assert blocks.add(("node", "1"), "b") == [Reasoning("\n\nb")]
    assert blocks.add(("node", "1"), "c") == [Reasoning("c")]
    assert blocks.add(("log", "1"), "d") == [Reasoning("\n\nd")]
    assert blocks.has_thought


def test_each_line_of_reasoning_comes_once() -> None:
    row = {"id": "1"}
    blocks = Blocks(has_lines=True)
    assert blocks.add_whole("step", row, "Step: LLM") == [Reasoning("Step: LLM")]
    assert blocks.add_whole("log", row, "R 1") == [Reasoning("\n\nR 1")]
    assert blocks.add_whole("step", row, "") == []
    assert blocks.add_whole("step", row, "Step: LLM") == []
    assert Blocks().add_whole("step", row, "Step: LLM") == []


def test_what_is_new_of_a_thought_is_reasoning() -> None:
    blocks = Blocks()
    rounds = [{"id": "1", "thought": text} for text in ("a", "ab")]
    thoughts = [blocks.add_round(row, is_thought=True) for row in rounds]
    assert thoughts == [[Reasoning("a")], [Reasoning("b")]]
    assert blocks.add_round({**rounds[0], "id": "2"}, is_thought=False) == []


def test_appendix_leaves_out_files_that_the_answer_has() -> None:
    appendix = Appendix("workflow", BASE)
    appendix.add_node({"node_type": "llm", "outputs": {"usage": USAGE_ROW}})
    found = {"result": [{"metadata": {"position": 1}, "content": "c"}]}
    appendix.add_node({"node_type": "knowledge-retrieval", "outputs": found})
    appendix.add_run({"files": [{"url": f"/files/{name}"} for name in "ab"]})
    assert appendix.parts("![a](http://files.example/files/a)") == [
        Media("custom", "http://dify.example/files/b", "b"),
        Citations(({"position": 1, "content": "c"},)),
        Usage(2, 3),
    ]


@pytest.mark.parametrize(
    ("mode", "kind"), [("workflow", "code"), ("advanced-chat", "knowledge-retrieval")]
)
def test_what_else_nodes_call_their_result_is_not_cited(mode: str, kind: str) -> None:
    """A chatflow lists what it has retrieved at its end."""
    appendix = Appendix(mode, BASE)
    found = {"result": [{"metadata": {"position": 1}, "content": "c"}]}
    appendix.add_node({"node_type": kind, "outputs": found})
    assert appendix.parts("") == [Usage()]


def test_address_of_a_file_may_be_a_remote_one_or_missing() -> None:
    appendix, address = Appendix("chat", BASE), "https://host/a.png"
    for remote in (address, ""):
        appendix.add_file({"type": "image", "url": None, "remote_url": remote})
    assert appendix.parts("") == [Media("image", address, "a.png"), Usage()]


@pytest.mark.parametrize("where", ["outputs", "process_data"])
def test_usage_of_a_node_is_found_wherever_it_is_told(where: str) -> None:
    appendix = Appendix("workflow", BASE)
    appendix.add_node({"node_type": "llm", where: {"usage": USAGE_ROW}})
    assert appendix.parts("") == [Usage(2, 3)]


@pytest.mark.parametrize(
    ("total", "usage"), [(9, Usage(6, 3)), (2, Usage(0, 2)), (None, Usage(2, 3))]
)
def test_run_corrects_the_usage_of_its_nodes(total: int | None, usage: Usage) -> None:
    """No count is below zero, though a run may tell less than its nodes."""
    appendix = Appendix("workflow", BASE)
    appendix.add_node({"node_type": "llm", "outputs": {"usage": USAGE_ROW}})
    appendix.add_run({"total_tokens": total})
    assert appendix.parts("") == [usage]


USAGE_ROW = {"prompt_tokens": 2, "completion_tokens": 3}


# ------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------

COMMON = {"inputs": {"lang": "de"}, "user": "ada"}


@pytest.mark.parametrize("mode", opendify.CHAT_MODES)
def test_chat_request_streams_and_names_no_title(mode: str) -> None:
    request = opendify.dify_request(mode, "Hi", COMMON, conversation_id="c-1")
    body = {
        "inputs": {"lang": "de"},
        "user": "ada",
        "response_mode": "streaming",
        "query": "Hi",
        "auto_generate_name": False,
        "conversation_id": "c-1",
    }
    assert request == DifyRequest("/chat-messages", body)


def test_workflow_request_puts_the_text_into_its_variable() -> None:
    request = opendify.dify_request("workflow", "Hi", COMMON, variable="text")
    inputs = {"lang": "de", "text": "Hi"}
    body = {"inputs": inputs, "user": "ada", "response_mode": "streaming"}
    assert request == DifyRequest("/workflows/run", body)


def test_completion_request_gives_the_query_twice_for_old_apps() -> None:
    request = opendify.dify_request("completion", "Hi", COMMON, variable="query")
    assert request.path == "/completion-messages"
    assert request.body["query"] == request.body["inputs"]["query"] == "Hi"


@pytest.mark.parametrize(
    ("mode", "path"),
    [
        ("chat", "/chat-messages/t%2F1/stop"),
        ("completion", "/completion-messages/t%2F1/stop"),
        ("workflow", "/workflows/tasks/t%2F1/stop"),
    ],
)
def test_stop_path(mode: str, path: str) -> None:
    assert opendify.stop_path(mode, "t/1") == path


def form(*inputs: AppInput) -> AppForm:
    return AppForm(inputs)


def taking(files: opendify.Json, limits: object = None) -> AppForm:
    """The form of an app without inputs that takes files by these rules."""
    return opendify.parse_form({"file_upload": files, "system_parameters": limits})


TEXT, REQUIRED = "text-input", {"required": True}


@pytest.mark.parametrize(
    ("inputs", "variable"),
    [
        pytest.param(
            [AppInput("a", TEXT, REQUIRED), AppInput("prompt", TEXT)],
            "prompt",
            id="name",
        ),
        pytest.param(
            [AppInput("a", TEXT), AppInput("b", TEXT, REQUIRED)], "b", id="only"
        ),
        pytest.param(
            [AppInput("a", "paragraph", REQUIRED), AppInput("b", TEXT, REQUIRED)],
            "a",
            id="first",
        ),
        pytest.param(
            [AppInput("a", TEXT), *(AppInput(n, TEXT, REQUIRED) for n in "bc")],
            "a",
            id="first-of-several",
        ),
        pytest.param(
            [AppInput("n", "number"), AppInput("z", TEXT)], "z", id="no-number"
        ),
    ],
)
def test_query_variable(inputs: list[AppInput], variable: str) -> None:
    app = AppSettings("app-key")
    assert opendify.query_variable("workflow", form(*inputs), app) == variable


@pytest.mark.parametrize("mode", ["completion", "workflow"])
@pytest.mark.parametrize(
    "app",
    [
        pytest.param(AppSettings("k", system_variable="tools"), id="system"),
        pytest.param(AppSettings("k", history_variable="tools"), id="history"),
        pytest.param(AppSettings("k", inputs={"tools": "saw"}), id="preset"),
        pytest.param(AppSettings("k", tools="inputs"), id="tools"),
    ],
)
def test_message_replaces_no_other_text_that_the_app_is_given(
    mode: str, app: AppSettings
) -> None:
    tools, task = AppInput("tools", TEXT, REQUIRED), AppInput("task", TEXT)
    assert opendify.query_variable(mode, form(tools, task), app) == "task"
    assert opendify.query_variable(mode, form(tools), app) == "tools"


@pytest.mark.parametrize("mode", ["completion", "workflow"])
def test_message_replaces_no_text_that_users_are_not_asked_for(mode: str) -> None:
    """A field "Hidden & Pre-Filled" has a value that the app's maker knows."""
    names, app = ("product", "input", "task"), AppSettings("app-key")
    rows = [
        {"text-input": {"variable": name, "hide": name != "task"}} for name in names
    ]
    told = opendify.parse_form({"user_input_form": rows})
    assert opendify.query_variable(mode, told, app) == "task"
    told = opendify.parse_form({"user_input_form": rows[:2]})
    assert opendify.query_variable(mode, told, app) == "input"


def test_workflow_without_text_input_is_refused_with_its_inputs() -> None:
    size = AppInput("size", "select", {**REQUIRED, "options": ["S", "L"]})
    with pytest.raises(
        opendify.BadRequest, match=r"size \(select, required, one of S, L"
    ) as caught:
        opendify.query_variable("workflow", form(size), AppSettings("app-key"))
    assert "`query_variable` to any name" in caught.value.message
    named = AppSettings("app-key", query_variable="any name")
    assert opendify.query_variable("workflow", form(size), named) == "any name"
    assert opendify.query_variable("completion", form(), AppSettings("k")) == "query"


A_FILE = {"dify_model_identity": "__dify__file__", "url": "/f"}


@pytest.mark.parametrize(
    ("outputs", "variable", "text"),
    [
        ({"text": "a", "x": 1}, "", "a"),
        ({"x": 1, "result": "r"}, "", "r"),
        ({"x": "only"}, "", "only"),
        ({"x": [1, "é"]}, "", '[1, "é"]'),
        ({"x": None}, "", ""),
        ({"text": None}, "", ""),
        ({"x": None, "y": 1}, "x", ""),
        ({"x": 0}, "", "0"),
        ({"x": 1, "y": None}, "", '{"x": 1, "y": null}'),
        ({"text": "a", "x": 1}, "x", "1"),
        ({"text": "", "answer": "a"}, "", "a"),
        ({"text": "", "x": 1}, "", ""),
        ({"f": A_FILE}, "", ""),
        ({"f": [A_FILE, {"f": A_FILE}], "x": "only"}, "", "only"),
        ({"result": {"caption": "hi", "img": A_FILE}}, "", '{"caption": "hi"}'),
        ({"x": [{}, None, 0, A_FILE], "y": []}, "", '{"x": [{}, null, 0], "y": []}'),
        ({"f": A_FILE, "x": 1}, "f", ""),
        ({"result": "r"}, "nope", "r"),
        ({}, "", ""),
    ],
)
def test_output_that_is_the_answer(
    outputs: dict[str, Any], variable: str, text: str
) -> None:
    assert opendify.answer_from_outputs(outputs, variable, "workflow") == text


def test_a_file_within_an_output_follows_as_a_link() -> None:
    outputs = {"result": {"caption": "hi", "img": {**A_FILE, "type": "image"}}}
    data = {"status": "succeeded", "outputs": outputs}
    parts = read("workflow", event(event="workflow_finished", data=data))
    media = Media("image", "http://dify.example/f", "f")
    assert parts[:2] == [Text('{"caption": "hi"}'), media]


@pytest.mark.parametrize(
    ("outputs", "text"),
    [({"answer": "a", "text": "b"}, "a"), ({"answer": None}, ""), ({"text": "b"}, "")],
)
def test_output_of_a_chatflow_that_is_the_answer(
    outputs: dict[str, Any], text: str
) -> None:
    assert opendify.answer_from_outputs(outputs, "text", "advanced-chat") == text


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------

PNG = Attachment("cat.png", "image/png", b"\x89PNG")
PDF = Attachment("a.pdf", "application/pdf", b"%PDF")
LINK = Attachment("cat.png", "image/*", url="https://host/cat.png")
CUSTOM = {
    "allowed_file_types": ["image", "custom"],
    "allowed_file_extensions": [".PDF"],
}
UPLOADS = {
    "enabled": True,
    "allowed_file_types": ["image"],
    "allowed_file_upload_methods": ["local_file"],
    "number_limits": 2,
}


@pytest.mark.parametrize(
    ("uploads", "files", "reason"),
    [
        pytest.param({}, [PNG], "takes no files", id="off"),
        pytest.param(
            {"image": {"enabled": False}}, [PNG], "takes no files", id="old-off"
        ),
        pytest.param(UPLOADS, [PNG, PNG, PNG], "takes 2 files", id="count"),
        pytest.param(UPLOADS, [PDF], "type image, not document", id="kind"),
        pytest.param(
            {"enabled": True, **CUSTOM},
            [Attachment("a.bin", data=b"x")],
            "type image, custom, .PDF, not .bin",
            id="extension",
        ),
        pytest.param(UPLOADS, [LINK], "takes no URLs", id="method"),
        *(
            pytest.param(
                {"image": {"enabled": True, "transfer_methods": [method]}},
                *([file], reason),
                id=f"only-{method}-before-0.10",
            )
            for method, file, reason in (
                ("local_file", LINK, "takes no URLs"),
                ("remote_url", PNG, "takes URLs only"),
            )
        ),
        pytest.param(
            UPLOADS,
            [Attachment("big.png", "image/png", b"x" * 1048577)],
            "1 MB",
            id="size",
        ),
    ],
)
def test_files_that_the_app_would_refuse_are_refused_by_name(
    uploads: dict[str, Any], files: list[Attachment], reason: str
) -> None:
    limits = {"image_file_size_limit": "1"}
    with pytest.raises(opendify.BadRequest, match=reason) as error:
        opendify.check_files(taking(uploads, limits), files, {})
    assert repr(files[-1].name) in error.value.message


@pytest.mark.parametrize(
    "uploads",
    [UPLOADS, {"image": {"enabled": True, "number_limits": 3}}],
    ids=["new", "before-0.10"],
)
def test_files_that_the_app_takes_pass(uploads: dict[str, Any]) -> None:
    uploaded = replace(LINK, upload_id="u")  # as Dify lists it: with both
    opendify.check_files(taking(uploads), [PNG, uploaded], {})


ALL_KINDS = {"enabled": True, "allowed_file_types": ["image", "document"]}
ONLY_IMAGES = {"allowed_file_types": ["image"]}
A_PICTURE = AppInput("pic", "file", rules=ONLY_IMAGES)
A_DOCUMENT = AppInput("doc", "file", rules={"allowed_file_types": ["document"]})
PICTURES = AppInput("pics", "file-list", rules=ONLY_IMAGES)
TWO_PICTURES = PICTURES._replace(rules={**ONLY_IMAGES, "max_length": 2})


@pytest.mark.parametrize(
    ("fields", "files", "refused"),
    [
        pytest.param([A_DOCUMENT], [PNG], PNG, id="kind"),
        pytest.param([A_PICTURE], [PNG, LINK], LINK, id="second"),
        pytest.param([A_PICTURE], [PNG, PNG], PNG, id="twice-the-same"),
        pytest.param([A_PICTURE, A_DOCUMENT], [PDF, PNG], None, id="one-each"),
        pytest.param([PICTURES], [PNG, LINK, PNG], None, id="list"),
        pytest.param([TWO_PICTURES], [PNG, PNG], None, id="full-list"),
        pytest.param([TWO_PICTURES], [PNG, PNG, LINK], LINK, id="list-overflows"),
        pytest.param([TWO_PICTURES, A_PICTURE], [PNG] * 3, None, id="next-to-a-list"),
        pytest.param([AppInput("any", "file")], [PDF], None, id="any-kind"),
        pytest.param([AppInput("given", "file")], [PDF], PDF, id="given"),
    ],
)
def test_files_without_an_input_are_refused_unless_they_go_beside(
    fields: list[AppInput], files: list[Attachment], refused: Attachment | None
) -> None:
    given = {"given": {"type": "document"}}
    opendify.check_files(AppForm(tuple(fields), ALL_KINDS), files, given)
    if not refused:
        opendify.check_files(form(*fields), files, given)
        return
    with pytest.raises(opendify.BadRequest, match="no file input left") as error:
        opendify.check_files(form(*fields), files, given)
    assert repr(refused.name) in error.value.message
    assert not opendify.has_room(form(*fields), files, given)


@pytest.mark.parametrize(
    ("app", "files", "wanted"),
    [
        (form(A_PICTURE, A_DOCUMENT), [PNG, PDF], True),
        (form(A_PICTURE, A_DOCUMENT), [PNG, PNG], False),
        (form(PICTURES), [PNG, PNG], False),  # Dify does not say how many it takes
        (form(TWO_PICTURES), [PNG, PNG], True),
        (form(TWO_PICTURES), [PNG, PNG, PNG], False),
        (form(TWO_PICTURES, A_DOCUMENT), [PNG, PNG, PDF], True),
        (taking(UPLOADS), [PNG, PNG], True),
        (taking(UPLOADS), [PNG, PNG, PNG], False),
        (taking(UPLOADS), [PNG, PDF], False),  # it takes no documents
        (taking({"image": {"enabled": True}}), [PNG, PNG], False),
        (form(), [PNG], False),
    ],
)
def test_room_for_files(app: AppForm, files: list[Attachment], wanted: bool) -> None:
    assert opendify.has_room(app, files, {}) == wanted


def test_refusal_of_a_file_tells_what_the_inputs_take() -> None:
    app = form(TWO_PICTURES, A_DOCUMENT, AppInput("any", "file"))
    with pytest.raises(opendify.BadRequest) as error:
        opendify.check_files(app, [PNG, PNG, PNG, LINK], {})
    limits = "(pics: image; 2 at a time. doc: document; 1 at a time. any: 1 at a time)"
    assert limits in error.value.message


def placed_files(form: AppForm, files: Sequence[Attachment]) -> dict[str, Any]:
    """What a request has of files."""
    inputs, beside = opendify.place_files(form, files, {})
    return {"inputs": inputs, "files": opendify.files_beside(form, beside)}


def test_files_go_to_file_inputs_first() -> None:
    fields = (A_PICTURE, AppInput("x", "text-input"))
    files = [replace(PDF, upload_id="u-2"), replace(PNG, upload_id="u-1")]
    placed = placed_files(AppForm(fields), files)
    by_upload = {"transfer_method": "local_file", "upload_file_id": "u-1"}
    image = {"type": "image", **by_upload}
    document = {"type": "document", **by_upload, "upload_file_id": "u-2"}
    assert placed == {"inputs": {"pic": image}, "files": [document]}


def test_file_that_comes_twice_fills_two_fields() -> None:
    url = "https://x/cat.png"
    file = opendify.Attachment("cat.png", url=url)
    fields = (AppInput("first", "file"), AppInput("second", "file"))
    placed = placed_files(AppForm(fields), [file] * 3)
    image = {"type": "image", "transfer_method": "remote_url", "url": url}
    assert placed == {"inputs": {"first": image, "second": image}, "files": [image]}


A_FIELD = {"variable": "doc", "type": "file-list", **CUSTOM}


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"file_upload": {"enabled": True, **CUSTOM}}, id="beside"),
        pytest.param({"user_input_form": [{"file-list": A_FIELD}]}, id="in-a-field"),
    ],
)
def test_file_that_is_taken_for_its_extension_is_custom(
    parameters: dict[str, Any],
) -> None:
    """Dify refuses a document of an app that takes images and `.pdf` as custom."""
    app = opendify.parse_form(parameters)
    opendify.check_files(app, [PNG, PDF], {})
    placed = placed_files(app, [PNG, PDF])
    files = placed["files"] or placed["inputs"]["doc"]
    assert [row["type"] for row in files] == ["image", "custom"]
    link = Attachment("a.md", url="https://host/a.md")
    for refused in (
        link,
        *(Attachment(f"a.{end}", data=b"#") for end in ("md", "bin")),
    ):
        with pytest.raises(opendify.BadRequest):
            opendify.check_files(app, [refused], {})


def test_link_whose_name_is_not_known_passes_where_extensions_are_listed() -> None:
    """Dify learns the name of a file from its server."""
    app = taking({"enabled": True, **CUSTOM})
    opendify.check_files(app, [Attachment("f", url="https://host/f")], {})
    any_custom = {"enabled": True, "allowed_file_types": ["custom"]}
    opendify.check_files(taking(any_custom), [Attachment("a.bin")], {})


def test_many_files_that_have_no_room_take_little_time() -> None:
    """A request may bring so many, beside those of earlier messages."""
    files = [Attachment("a.pdf", url=str(n)) for n in range(9999)]
    for app in (form(TWO_PICTURES), taking({"enabled": True, "number_limits": 3})):
        with at_most(40):
            for _ in range(1000):
                assert not opendify.has_room(app, files, {})


def test_many_files_take_little_time() -> None:
    songs, pictures = (
        [Attachment(name, url=str(n)) for n in range(9999)]
        for name in ("a.mp3", "a.png")
    )
    with at_most(80):
        placed = placed_files(form(PICTURES), [*songs, *pictures])
        said = {
            kind: [
                {"type": kind, "transfer_method": "remote_url", "url": str(n)}
                for n in range(9999)
            ]
            for kind in ("audio", "image")
        }
        assert placed == {"inputs": {"pics": said["image"]}, "files": said["audio"]}


def test_upload_is_multipart_with_name_type_and_user() -> None:
    head, end = opendify.upload_head(PNG, "edge"), opendify.upload_end("ada", "edge")
    assert head + PNG.data + end == (
        b'--edge\r\nContent-Disposition: form-data; name="file"; '
        b'filename="cat.png"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n'
        b'--edge\r\nContent-Disposition: form-data; name="user"\r\n\r\nada\r\n'
        b"--edge--\r\n"
    )


# ------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------


USED_UP = "Workflow execution quota limit reached for tenant 6f0a"
NO_CREDITS = "Run failed: No credits remaining"


@pytest.mark.parametrize(
    ("status", "code", "message", "in_run", "wanted"),
    [
        (401, "unauthorized", "bad", False, (502, "upstream_error", True)),
        (403, "forbidden", "off", False, (502, "upstream_error", True)),
        (
            404,
            "not_found",
            "Conversation Not Exists.",
            False,
            (404, "not_found", False),
        ),
        (404, "not_found", "Workflow not found", False, (400, "not_found", False)),
        (400, "not_chat_app", "x", False, (400, "not_chat_app", False)),
        (400, "invalid_param", "Too many requests. …", False, (429, None, False)),
        (429, "rate_limit_error", "x", False, (429, None, False)),
        (429, "rate_limit_error", USED_UP, False, (429, "insufficient_quota", True)),
        (400, "invalid_param", USED_UP, True, (429, "insufficient_quota", True)),
        (400, "invalid_param", NO_CREDITS, True, (429, "insufficient_quota", True)),
        (
            400,
            "invalid_param",
            "Run failed: Insufficient credits remaining",
            True,
            (429, "insufficient_quota", True),
        ),
        (400, "provider_quota_exceeded", "x", False, (429, None, True)),
        (500, "internal_server_error", "x", False, (502, "upstream_error", False)),
        (400, "completion_request_error", "x", True, (502, None, True)),
        (401, "invalid_api_key", "the provider's", True, (502, None, True)),
        (400, "invalid_param", "Run failed: 429", True, (429, None, False)),
        (
            400,
            "invalid_param",
            "Read timed out.",
            True,
            (504, "upstream_timeout", False),
        ),
        (
            400,
            "invalid_param",
            "timeout must be > 0",
            False,
            (400, "invalid_param", False),
        ),
    ],
)
def test_error_of_dify(
    status: int, code: str, message: str, in_run: bool, wanted: Any
) -> None:
    error = opendify.error_from_dify(status, code, message, in_run=in_run)
    defaults = {429: "insufficient_quota" if "quota" in code else "rate_limit_exceeded"}
    wanted_code = wanted[1] or defaults.get(error.status, code)
    assert (error.status, error.code, error.is_final) == (
        wanted[0],
        wanted_code,
        wanted[2],
    )


def test_error_that_echoes_the_request_is_cut() -> None:
    """Else it would be megabytes of text for the client, and for the log."""
    message = f"422: {'x' * 990}{APP.key}{'QUJD' * 1_000_000} is no image"
    reader = AnswerReader("chat", APP)
    (failure,) = reader.read([event(event="error", message=message)])
    assert isinstance(failure, Failure)
    begin, _, end = failure.error.message.partition(" … ")
    assert begin == f"422: {'x' * 990}app-k"  # not a character more of the key
    assert end.endswith("QUJD is no image")
    assert len(end) == 1000


def test_error_that_echoes_a_file_is_understood_in_little_time() -> None:
    echo = "QUJD rate " * 400_000
    message = (
        f'[openai] {{"image": "{echo}", "error": {{"message": "Too many requests"}}}}'
    )
    with at_most(40):
        error = opendify.error_from_dify(400, "x", message, in_run=True)
        other = opendify.error_from_dify(400, "x", echo, in_run=True)
    assert (error.code, error.message) == ("rate_limit_exceeded", "Too many requests")
    assert (type(other).__name__, other.code) == ("UpstreamFailed", "x")


def test_error_tells_what_is_wrong_with_a_field() -> None:
    """Some releases say it beside their message, and have no code for it."""
    reason = "Existing conversation ID 14 is not a valid uuid."
    message = "Input payload validation failed"
    value = {"errors": {"conversation_id": reason}, "message": message}
    error = opendify.error_from_body(400, json.dumps(value).encode())
    assert (error.status, error.message) == (400, f"{message}; {reason}")


@pytest.mark.parametrize(
    ("status", "body", "wanted"),
    [
        (404, b"<html>", (502, True)),
        (404, b'{"detail": "Not Found"}', (502, True)),
        (404, b'{"error": {"message": "Invalid URL"}}', (502, True)),
        (404, b"{}", (502, True)),
        (400, b"{}", (502, True)),
        (200, b"<html>", (502, True)),
        (502, b"<html>", (502, False)),
        (504, b"", (504, False)),
        (504, b'{"message": "The upstream server is timing out"}', (504, False)),
        (408, b"<html>", (504, False)),
        (522, b"<html>", (504, False)),
        (524, b"error code: 524", (504, False)),
        (413, b"<html>", (413, False)),
        (429, b"", (429, False)),
    ],
)
def test_error_body_that_is_not_dify_s(status: int, body: bytes, wanted: Any) -> None:
    error = opendify.error_from_body(status, body)
    assert (error.status, error.is_final) == wanted
    if error.is_final:
        assert "DIFY_API_BASE" in error.message


def provider_error(status: int, **error: str) -> str:
    """A provider's error as Dify's plugins tell it."""
    return (
        "[openai_api_compatible] Error: API request failed with status code "
        f"{status}: {json.dumps({'error': error})}"
    )


RATE, QUOTA = "rate_limit_exceeded", "insufficient_quota"
TOO_LONG, REFUSED = "context_length_exceeded", "content_policy_violation"
OPENAI_S = "This model's maximum context length is 4096 tokens."
DIFY_S = "Query or prefix prompt is too long, you can reduce the prefix prompt"
ANTHROPIC_S = "prompt is too long: 200251 tokens > 200000 maximum"
AZURE_S = "It was filtered due to the prompt triggering our content management policy."
ALIBABA_S = "Output data may contain inappropriate content."


@pytest.mark.parametrize(
    ("message", "shown", "status", "code"),
    [
        (
            provider_error(429, message="You exceeded it.", code="insufficient_quota"),
            "You exceeded it.",
            429,
            QUOTA,
        ),
        (
            provider_error(402, message="Insufficient Balance"),
            "Insufficient Balance",
            429,
            QUOTA,
        ),
        (provider_error(429, message="账户余额不足"), "账户余额不足", 429, QUOTA),
        (provider_error(429, message="Max RPM: 3"), "Max RPM: 3", 429, RATE),
        (provider_error(429, message="请您控制频率"), "请您控制频率", 429, RATE),
        (
            'PluginInvokeError: {"error_type": "InvokeRateLimitError", '
            '"message": "Slow down."}',
            "Slow down.",
            429,
            RATE,
        ),
        (provider_error(400, message=OPENAI_S), OPENAI_S, 400, TOO_LONG),
        (provider_error(400, message="No.", code=TOO_LONG), "No.", 400, TOO_LONG),
        (DIFY_S, DIFY_S, 400, TOO_LONG),
        (provider_error(400, message=ANTHROPIC_S), ANTHROPIC_S, 400, TOO_LONG),
        (provider_error(400, message=AZURE_S), AZURE_S, 400, REFUSED),
        (
            provider_error(400, message="No.", code="content_filter"),
            "No.",
            400,
            REFUSED,
        ),
        (provider_error(400, message=ALIBABA_S), ALIBABA_S, 400, REFUSED),
        # A node's error may speak of timeouts of anything: its message tells.
        ('{"message": "Bad input", "timeout": 5}', "Bad input", 502, "c"),
        ("No variable generate_limit", "No variable generate_limit", 502, "c"),
    ],
)
@pytest.mark.parametrize("event_name", ["error", "workflow_finished"])
def test_error_of_a_provider_is_told_by_what_stands_around_its_message(
    event_name: str, message: str, shown: str, status: int, code: str
) -> None:
    told: dict[str, dict[str, Any]] = {
        "error": {"code": "c", "status": 400, "message": message},
        "workflow_finished": {"data": {"status": "failed", "error": message}},
    }
    parts = AnswerReader("chat", APP).read(
        [event(event=event_name, **told[event_name])]
    )
    error = only(parts, Failure).error
    is_flow = status == 502 and event_name == "workflow_finished"  # it has no code
    wanted = "upstream_error" if is_flow else code
    assert (error.message, error.status, error.code) == (shown, status, wanted)


@pytest.mark.parametrize(
    "message",
    [
        "Run failed: Failed to invoke tool x: topic is required in input form",
        'Status 404: {"code": "not_found", "message": "Conversation Not Exists."}',
    ],
)
def test_error_of_an_app_that_the_app_calls_is_not_the_caller_s(message: str) -> None:
    error = opendify.error_from_dify(200, "", message, in_run=True)
    assert (error.status, error.is_final) == (502, True)


def test_input_that_only_the_run_misses_is_the_caller_s() -> None:
    text = "topic is required in input form"
    error = opendify.error_from_dify(400, "invalid_param", text, in_run=True)
    assert isinstance(error, opendify.MissingInput)


REFUSED_INPUTS = [
    "query in input form must be less than 48 characters",
    "lang in input form must be one of the following: ['French', 'German']",
    "(type 'text-input') query in input form must be a string",
    "File validation failed for file: cat.png",
    "Invalid upload file",
    "Detected file type does not match the specified type. Please verify the file.",
]


@pytest.mark.parametrize("message", REFUSED_INPUTS)
def test_refusal_is_the_caller_s_as_a_status_and_as_an_event(message: str) -> None:
    """Flows check inputs and files behind the 200, from 1.13 on."""
    told = event(event="error", message=message, status=500)
    in_run = only(AnswerReader("workflow", APP).read([told]), Failure).error
    before = opendify.error_from_dify(400, "invalid_param", message)
    assert (in_run.status, in_run.code) == (400, None)
    assert (before.status, before.code) == (400, "invalid_param")
    assert in_run.message == before.message == message


@pytest.mark.parametrize("message", REFUSED_INPUTS)
def test_refusal_of_inputs_by_an_app_that_the_app_calls_is_a_failure(
    message: str,
) -> None:
    error = opendify.error_from_dify(400, "", f"Run failed: {message}", in_run=True)
    assert (error.status, error.is_final) == (502, True)


def test_template_that_dify_does_not_fill_in_is_not_shown() -> None:
    """As recorded: `file-upload-too-large`."""
    message = "File size exceeded. {message}"
    error = opendify.error_from_dify(413, "file_too_large", message)
    assert error.message == "File size exceeded."


def test_innermost_message_of_a_plugin_is_shown() -> None:
    inner = {"error_type": "X", "message": '{"error": {"message": "no credit left"}}'}
    message = f"[openai] Error: PluginInvokeError: {json.dumps(inner)}"
    error = opendify.error_from_dify(
        400, "completion_request_error", message, in_run=True
    )
    assert error.message == "no credit left"


# ------------------------------------------------------------------------------
# The app's form
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, "text", {"a": 1}, None, [None, 5, "x", [], {}]])
def test_form_of_a_wrong_type_has_no_inputs(rows: Any) -> None:
    assert opendify.parse_form({"user_input_form": rows}) == AppForm()


def test_form_is_read_from_the_recorded_parameters() -> None:
    recording = replay.load("dify-1.12.1/files-in-workflow.json")
    assert recording["shows"]
    tone = {"variable": "tone", "label": "Tone", "options": ["a", "b"]}
    pic = {"variable": "pic", "required": True, "type": "file"}
    parameters = {
        "user_input_form": [
            {"select": tone},
            {"file": pic},
            {"paragraph": None},
            "odd",
        ],
        "file_upload": {"enabled": False},
        "system_parameters": None,
    }
    assert opendify.parse_form(parameters) == AppForm(
        (AppInput("tone", "select", tone), AppInput("pic", "file", pic)), {}, {}
    )
