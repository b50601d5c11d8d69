"""The Responses API with its real clients, against the whole program as a process.

Clients that are not installed are skipped. Those of npm are looked for in one place:

    npm install --prefix .cache/clients/node openai ai @ai-sdk/openai zod
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fake_dify as fake
import pytest
from fake_dify import FakeDify
from test_agents import need
from test_end_to_end import environment, run_client, running

ROOT = Path(__file__).resolve().parent.parent
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'

pytestmark = pytest.mark.real_clock


def calls_once(request: fake.Request) -> list[fake.Step]:
    """Return the call of a tool, and text once its result is there."""
    query = str((request.json or {}).get("query"))
    return fake.chat_answer("It is sunny." if "sunny in" in query else CALL)


@contextlib.asynccontextmanager
async def program(folder: Path) -> AsyncIterator[tuple[FakeDify, str]]:
    """Give the program before three apps: an echo, one that calls a tool, JSON."""
    async with FakeDify() as dify:
        dify.app("app-chat")
        dify.app("app-tool", script=calls_once)
        dify.app("app-json", script=fake.chat_answer('{"a": 1}'))
        models = {
            name: {"key": f"app-{name}", "mode": "chat"}
            for name in ("chat", "tool", "json")
        }
        variables = {
            "MODEL_CONFIG": json.dumps(models),
            "DIFY_API_BASE": dify.base,
            "STREAM_SMOOTHING": "off",
        }
        async with running(folder, **variables) as (_, base):
            yield dify, base


def turns_of(dify: FakeDify) -> list[int]:
    """Return how many turns each conversation in Dify has."""
    return [len(row.messages) for row in dify.conversations.values()]


OPENAI_PYTHON = """
import asyncio, json, sys
import openai, pydantic
options = {"base_url": sys.argv[1], "api_key": "sk-any", "max_retries": 0}
client = openai.OpenAI(**options)
got = {}

one = client.responses.create(model="chat", input="One")
two = client.responses.create(model="chat", input="Two", previous_response_id=one.id)
got["whole"] = [one.output_text, two.output_text, two.status]
items = [{"role": "user", "content": "One"}, *one.output]
back = client.responses.create(
    model="chat", input=[*items, {"role": "user", "content": "Three"}]
)
got["sent back"] = back.output_text
got["retrieved"] = client.responses.retrieve(one.id).output_text
got["items"] = client.responses.input_items.list(one.id).data[0].content[0].text

events = list(client.responses.create(model="chat", input="Hi", stream=True))
got["events"] = [events[0].type, events[-1].type]
with client.responses.stream(model="chat", input="Hi") as stream:
    got["deltas"] = "".join(
        event.delta for event in stream if event.type == "response.output_text.delta"
    )
    got["final"] = stream.get_final_response().output_text

class Shape(pydantic.BaseModel):
    a: int

parsed = client.responses.parse(model="json", input="Hi", text_format=Shape)
got["parsed"] = parsed.output_parsed.a
with client.responses.stream(model="json", input="Hi", text_format=Shape) as stream:
    got["parsed stream"] = stream.get_final_response().output_parsed.a

tools = [{"type": "function", "name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}]
asked = client.responses.create(model="tool", input="Rome?", tools=tools)
(call,) = asked.output
got["call"] = [call.type, call.name, json.loads(call.arguments)]
got["stored call"] = client.responses.retrieve(asked.id).output == [call]
said = client.responses.create(
    model="tool", tools=tools, previous_response_id=asked.id,
    input=[{"type": "function_call_output", "call_id": call.call_id,
            "output": "sunny in Rome"}],
)
got["result"] = said.output_text

named = client.conversations.create()
for text in ("Four", "Five"):
    client.responses.create(model="chat", input=text, conversation=named.id)
got["named"] = len(client.conversations.items.list(named.id).data)
named = client.conversations.update(named.id, metadata={"a": "b"})
got["metadata"] = named.metadata
newest = client.conversations.items.list(named.id, limit=1).data[0]
said = client.conversations.items.retrieve(newest.id, conversation_id=named.id)
got["newest"] = said.content[0].text
client.conversations.items.delete(newest.id, conversation_id=named.id)
got["left"] = len(client.conversations.items.list(named.id).data)

try:
    client.responses.create(model="chat", input="Hi", previous_response_id="resp_x")
except openai.BadRequestError as error:
    got["refused"] = error.code

async def main():
    async with openai.AsyncOpenAI(**options) as client:
        async with client.responses.stream(model="chat", input="Hi") as stream:
            async for _ in stream:
                pass
            got["async"] = (await stream.get_final_response()).output_text
        stream = await client.responses.create(model="chat", input="Hi", stream=True)
        got["async events"] = [event.type async for event in stream][-1]

asyncio.run(main())
client.close()
print(json.dumps(got))
"""


def said(text: str, turns: int = 1) -> str:
    """Return what the echo says."""
    return f"Hello! You said: {text} (user turns seen: {turns}, images: 0)"


async def test_openai_python(tmp_path: Path) -> None:
    async with program(tmp_path) as (dify, base):
        got = await run_client(sys.executable, OPENAI_PYTHON, base)
        turns = turns_of(dify)
    back = got.pop("sent back")
    assert "You said" in back
    assert got == {
        "whole": [said("One"), said("Two", 2), "completed"],
        "retrieved": said("One"),
        "items": "One",
        "events": ["response.created", "response.completed"],
        "deltas": said("Hi"),
        "final": said("Hi"),
        "parsed": 1,
        "parsed stream": 1,
        "call": ["function_call", "weather", {"city": "Rome"}],
        "stored call": True,
        "result": "It is sunny.",
        "named": 4,
        "metadata": {"a": "b"},
        "newest": said("Five", 2),
        "left": 3,
        "refused": "previous_response_not_found",
        "async": said("Hi"),
        "async events": "response.completed",
    }
    assert turns[0] == 2


DEMO = """
import json, sys
import openai
with openai.OpenAI(base_url=sys.argv[1], api_key="sk-any", max_retries=0) as client:
    one = client.responses.create(model="demo", input="One")
    fields = {"model": "demo", "previous_response_id": one.id}
    two = client.responses.create(input="Two... ,,; v1.2.", **fields)
    got = {"continued": two.output_text.partition("You said: ")[2]}
    again = client.responses.retrieve(one.id)
    got["retrieved"] = again.output_text == one.output_text
print(json.dumps(got))
"""


async def test_demo_keeps_what_was_said(tmp_path: Path) -> None:
    async with running(tmp_path, "--demo") as (_, base):
        got = await run_client(sys.executable, DEMO, base)
    assert got == {"continued": "Two... ,,; v1.2.", "retrieved": True}


# Optional clients...


AGENTS = """
import asyncio, json, sys
from agents import Agent, OpenAIConversationsSession, OpenAIResponsesModel, Runner
from agents import SQLiteSession, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=sys.argv[1], api_key="sk-any", max_retries=0)
got = {}

@function_tool
def weather(city: str) -> str:
    "The weather."
    return f"sunny in {city}"

def agent(model, **more):
    model = OpenAIResponsesModel(model, client)
    return Agent(name="A", instructions="Be brief.", model=model, **more)

async def main():
    got["tool"] = (await Runner.run(agent("tool", tools=[weather]), "?")).final_output
    run = Runner.run_streamed(agent("tool", tools=[weather]), "?")
    async for _ in run.stream_events():
        pass
    got["streamed"] = run.final_output
    session = SQLiteSession("x")
    for text in ("One", "Two"):
        run = await Runner.run(agent("chat"), text, session=session)
    got["session"] = "You said: Two" in run.final_output
    named = OpenAIConversationsSession(openai_client=client)
    for text in ("One", "Two"):
        run = await Runner.run(agent("chat"), text, session=named)
    got["named"] = "You said: Two" in run.final_output
    popped = [await named.pop_item() for _ in range(2)]
    got["popped"] = [row["role"] for row in popped]
    got["left"] = len(await named.get_items())
    one = await Runner.run(agent("chat"), "One")
    two = await Runner.run(
        agent("chat"), "Two", previous_response_id=one.last_response_id
    )
    got["previous"] = "You said: Two" in two.final_output
    handing = agent("chat", handoffs=[agent("chat")])
    got["handoff"] = "You said" in (await Runner.run(handing, "Hi")).final_output

asyncio.run(main())
print(json.dumps(got))
"""


async def test_openai_agents(tmp_path: Path) -> None:
    need("agents")
    async with program(tmp_path) as (_, base):
        got = await run_client(sys.executable, AGENTS, base)
    assert got == {
        "tool": "It is sunny.",
        "streamed": "It is sunny.",
        "session": True,
        "named": True,
        "popped": ["assistant", "user"],
        "left": 2,
        "previous": True,
        "handoff": True,
    }


LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
def chat(model, **more):
    return ChatOpenAI(model=model, base_url=sys.argv[1], api_key="sk-any",
                      use_responses_api=True, max_retries=0, **more)
got = {"whole": chat("chat").invoke("Hi").text}
got["stream"] = "".join(chunk.text for chunk in chat("chat").stream("Hi"))
tool = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}
(call,) = chat("tool").bind_tools([tool]).invoke("Rome?").tool_calls
got["call"] = [call["name"], call["args"]]
model = chat("chat", use_previous_response_id=True)
one = model.invoke("One")
got["second"] = model.invoke([("user", "One"), one, ("user", "Two")]).text
print(json.dumps(got))
"""


async def test_langchain(tmp_path: Path) -> None:
    need("langchain_openai")
    async with program(tmp_path) as (_, base):
        got = await run_client(sys.executable, LANGCHAIN, base)
    assert got == {
        "whole": said("Hi"),
        "stream": said("Hi"),
        "call": ["weather", {"city": "Rome"}],
        "second": said("Two", 2),
    }


NODE = """
import { generateObject, generateText, stepCountIs, streamText, tool } from 'ai';
import { createOpenAI } from '@ai-sdk/openai';
import OpenAI from 'openai';
import { z } from 'zod';
const base = process.argv[2];
const sdk = createOpenAI({ baseURL: base, apiKey: 'sk-any' });
const got = {};
const weather = tool({
  description: 'The weather.', inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}` });
const asked = { prompt: 'Rome?', tools: { weather }, stopWhen: stepCountIs(3) };
const streamed = streamText({ model: sdk('tool'), ...asked });
await streamed.consumeStream();
got['tool streamed'] = await streamed.text;
got.tool = (await generateText({ model: sdk('tool'), ...asked })).text;
const one = streamText({ model: sdk('chat'), prompt: 'One' });
await one.consumeStream();
const two = await generateText({ model: sdk('chat'), messages: [
  { role: 'user', content: 'One' }, ...(await one.response).messages,
  { role: 'user', content: 'Two' }] });
got.second = two.text;
got.object = (await generateObject({
  model: sdk('json'), prompt: 'x', schema: z.object({ a: z.number() }) })).object;
const client = new OpenAI({ baseURL: base, apiKey: 'sk-any', maxRetries: 0 });
const stream = client.responses.stream({ model: 'chat', input: 'Hi' });
for await (const _ of stream);
got.node = (await stream.finalResponse()).output_text;
console.log(JSON.stringify(got));
"""


def node_modules() -> Path:
    """Return the folder with the packages of npm; skips the test if there is none."""
    folder = ROOT / ".cache" / "clients" / "node" / "node_modules"
    if not shutil.which("node"):
        pytest.skip("Node is not installed")
    if not all((folder / name).exists() for name in ("ai", "@ai-sdk/openai", "openai")):
        pytest.skip(f"no npm clients: see the docstring of {Path(__file__).name}")
    return folder


async def test_clients_from_npm(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "node_modules").symlink_to(node_modules())
    script = tmp_path / "node" / "client.mjs"
    script.write_text(NODE, encoding="utf-8")
    async with program(tmp_path) as (dify, base):
        client = await asyncio.create_subprocess_exec(
            *["node", str(script), base],
            env=environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await client.communicate()
        turns = sorted(turns_of(dify))
    assert client.returncode == 0, errors.decode()
    got: dict[str, Any] = json.loads(output)
    assert got == {
        "tool streamed": "It is sunny.",
        "tool": "It is sunny.",
        "second": said("Two", 2),
        "object": {"a": 1},
        "node": said("Hi"),
    }
    assert turns == [1, 1, 2, 2, 2]
