"""Agents that were written for OpenAI run unmodified on Dify apps.

Each client runs a script of its own in a process, and prints what it got as JSON. The
apps behind the proxy answer as models do: with a call, well or badly written, until
they have seen the tool's result; with JSON, in a fence or in chatter; or hopelessly.

A client that is not installed is skipped. Those of npm are looked for in
`.cache/clients/node`: `npm install --prefix .cache/clients/node ai @ai-sdk/openai
@ai-sdk/openai-compatible zod`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fake_dify as fake
import pytest
from clients import ROOT
from test_end_to_end import environment
from test_handlers import Proxy, proxy

from opendify import user_of_key

JSONObject = dict[str, Any]
NAMES = {"agents": "openai-agents", "langchain_openai": "langchain-openai"}
NODE_FOLDER = ROOT / ".cache" / "clients" / "node"


# ------------------------------------------------------------------------------
# Apps, as models are
# ------------------------------------------------------------------------------

# How models write that they want to know Oslo's weather.
CALLS = {
    "as-asked": "I'll look that up.\n\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "fenced": '```json\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n```',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    'get_weather\n```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
    "sloppy": "{'name': 'get_weather', 'arguments': {'city': 'Oslo',},}",
}
SUNNY = "It is sunny in Oslo: 20 °C."
CITY = '{"name": "Oslo", "people": 700000, "twins": [{"name": "Bonn"}]}'
OBJECTS = {"bare": CITY, "chatty": f"Sure! Here you are:\n\n```json\n{CITY}\n```\n"}
HOPELESS = "I'm sorry, but I can't do that."


def pieces_of(text: str) -> list[str]:
    """Return a text in the pieces of a model."""
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def caller(call: str) -> fake.Script:
    """Return the script of an app that calls a tool, then tells of its result."""

    def script(request: fake.Request) -> list[fake.Step]:
        is_known = "20 degrees" in request.json["query"]
        return fake.chat_answer(*pieces_of(SUNNY if is_known else call))

    return script


@contextlib.asynccontextmanager
async def apps(folder: Path) -> AsyncIterator[tuple[Proxy, Path]]:
    """Give a proxy with a model for each of the answers above, and a folder."""
    scripts = {name: caller(call) for name, call in CALLS.items()}
    for name, text in {**OBJECTS, "hopeless": HOPELESS}.items():
        scripts[name] = fake.chat_answer(*pieces_of(text))
    models = {name: {"key": f"app-{name}", "mode": "chat"} for name in scripts}
    variables = {"MODEL_CONFIG": json.dumps(models), "STREAM_MAX_LAG": "0.02"}
    async with proxy(variables=variables) as served:
        for name, script in scripts.items():
            served.dify.app(f"app-{name}", script=script, memory=True)
        yield served, folder


async def run(served: Proxy, command: list[str], **options: Any) -> JSONObject:
    """Return what a client's script prints, parsed; it is given the base URL."""
    client = await asyncio.create_subprocess_exec(
        *[*command, f"http://127.0.0.1:{served.port}/v1"],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )
    try:
        output, errors = await client.communicate()
    finally:
        if client.returncode is None:
            client.kill()
    assert client.returncode == 0, errors.decode() + output.decode()
    got: JSONObject = json.loads(output.decode().splitlines()[-1])
    return got


def need(package: str) -> None:
    """Skip the test if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        name = NAMES.get(package, package)
        pytest.skip(f"{name} is not installed beside the tests: pip install {name}")


async def run_python(
    package: str, script: str, folder: Path
) -> tuple[JSONObject, list[fake.Request]]:
    """Run a script that needs a package; return what it got, and what Dify was asked.

    Skips the test if the package is not installed.
    """
    need(package)
    quiet = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "OPENAI_API_KEY": "sk-any",
        "LLM_USER_PATH": str(folder),
    }
    async with apps(folder) as (served, _):
        got = await run(
            served,
            [sys.executable, "-c", PREAMBLE + script],
            env={**environment(), **quiet},
        )
        return got, served.turns


PREAMBLE = (
    f"""
import json, sys
base, got = sys.argv[1], {{}}
callers, objects = {list(CALLS)!r}, {list(OBJECTS)!r}
"""
    + """
def get_weather(city: str) -> str:
    "The weather of a city."
    return f"20 degrees in {city}"
"""
)
SHAPES = """
from pydantic import BaseModel

class Twin(BaseModel):
    name: str

class City(BaseModel):
    "A city."
    name: str
    people: int
    twins: list[Twin]
"""
ALL_SUNNY = dict.fromkeys(CALLS, SUNNY)
OSLO: JSONObject = json.loads(CITY)
ALL_OSLO = dict.fromkeys(OBJECTS, OSLO)


# ------------------------------------------------------------------------------
# OpenAI's own client
# ------------------------------------------------------------------------------

OPENAI = """
import asyncio, openai
class get_weather(BaseModel):
    city: str

options = {"base_url": base, "api_key": "sk-any"}
client = openai.OpenAI(**options)
completions = client.chat.completions
hi = [{"role": "user", "content": "Tell me about Oslo."}]
tools = [openai.pydantic_function_tool(get_weather)]


def loop(model, ask):
    messages = list(hi)
    for _ in range(3):
        message = ask(model=model, messages=messages, tools=tools)
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            city = call.function.parsed_arguments.city
            content = f"20 degrees in {city}"
            row = {"role": "tool", "tool_call_id": call.id, "content": content}
            messages.append(row)


def whole(**fields):
    return completions.parse(**fields).choices[0].message


def streamed(**fields):
    with completions.stream(**fields) as events:
        for event in events:
            pass
        return events.get_final_completion().choices[0].message


async def together(**fields):
    async with openai.AsyncOpenAI(**options) as client:
        answer = await client.chat.completions.parse(**fields)
        return answer.choices[0].message


asks = {"parse": whole, "stream": streamed}
for name, ask in asks.items():
    got[f"{name} tools"] = {model: loop(model, ask) for model in callers}
    fields = {"messages": hi, "response_format": City}
    parsed = {model: ask(model=model, **fields).parsed for model in objects}
    got[name] = {model: city.model_dump() for model, city in parsed.items()}
    try:
        ask(model="hopeless", **fields)
    except openai.APIStatusError as error:
        got[f"{name} hopeless"] = [error.status_code, error.code, error.message]
fields["model"] = "bare"
got["async"] = asyncio.run(together(**fields)).parsed.model_dump()
print(json.dumps(got))
"""


@pytest.mark.real_clock
async def test_openai_parse_and_stream(tmp_path: Path) -> None:
    got, turns = await run_python("openai", SHAPES + OPENAI, tmp_path)
    for name in ("parse", "stream"):
        status, code, message = got.pop(f"{name} hopeless")
        assert (status, code) == (502, "response_format_unsatisfied")
        assert "not the JSON that was asked for" in message
    assert got == {
        "parse": ALL_OSLO,
        "parse tools": ALL_SUNNY,
        "stream": ALL_OSLO,
        "stream tools": ALL_SUNNY,
        "async": OSLO,
    }
    # Once more each, and no retry by the client.
    assert len([turn for turn in turns if turn.key == "app-hopeless"]) == 4


# ------------------------------------------------------------------------------
# Agents in Python
# ------------------------------------------------------------------------------

LANGCHAIN = """
from typing import Any
from langchain_openai import ChatOpenAI
def chat(model, **more):
    return ChatOpenAI(model=model, base_url=base, api_key="sk-any", **more)

question = "What is the weather in Oslo?"
bound = {model: chat(model).bind_tools([get_weather]) for model in callers}
calls = {model: llm.invoke(question).tool_calls for model, llm in bound.items()}
got["calls"] = {m: [[c["name"], c["args"]] for c in row] for m, row in calls.items()}
got["streamed calls"] = {}
for model, llm in bound.items():
    answer = None
    for chunk in llm.stream(question):
        answer = chunk if answer is None else answer + chunk
    got["streamed calls"][model] = [[c["name"], c["args"]] for c in answer.tool_calls]
forced = chat("as-asked").bind_tools([get_weather], tool_choice="any")
got["forced"] = len(forced.invoke(question).tool_calls)
methods = ("json_schema", "json_mode")
got["structured"] = {
    method: {
        model: chat(model).with_structured_output(City, method=method)
        .invoke(question).model_dump()
        for model in objects
    }
    for method in methods
}
try:
    chat("hopeless").with_structured_output(City).invoke(question)
except Exception as error:
    got["hopeless"] = [error.status_code, error.code]
got["stop"] = chat("bare").invoke(question, stop=["people"]).content
print(json.dumps(got))
"""
LANGCHAIN_AGENT = """
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

asked = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}]}
got["invoked"], got["streamed"] = {}, {}
for model in callers:
    llm = ChatOpenAI(model=model, base_url=base, api_key="sk-any")
    agent = create_agent(llm, tools=[get_weather], system_prompt="Be kind.")
    got["invoked"][model] = agent.invoke(asked)["messages"][-1].content
    texts = [
        chunk.content for chunk, about in agent.stream(asked, stream_mode="messages")
        if about["langgraph_node"] == "model"
    ]
    got["streamed"][model] = "".join(texts)
print(json.dumps(got))
"""
WEATHER_CALL = [["get_weather", {"city": "Oslo"}]]


@pytest.mark.real_clock
async def test_langchain_chat_model(tmp_path: Path) -> None:
    got, _ = await run_python("langchain_openai", SHAPES + LANGCHAIN, tmp_path)
    assert got == {
        "calls": dict.fromkeys(CALLS, WEATHER_CALL),
        "streamed calls": dict.fromkeys(CALLS, WEATHER_CALL),
        "forced": 1,
        "structured": {"json_schema": ALL_OSLO, "json_mode": ALL_OSLO},
        "hopeless": [502, "response_format_unsatisfied"],
        "stop": '{"name": "Oslo", "',
    }


@pytest.mark.real_clock
async def test_langchain_agent(tmp_path: Path) -> None:
    need("langchain_openai")
    got, _ = await run_python("langchain", LANGCHAIN_AGENT, tmp_path)
    streamed = {**ALL_SUNNY, "as-asked": f"I'll look that up.\n\n{SUNNY}"}
    assert got == {"invoked": ALL_SUNNY, "streamed": streamed}


OPENAI_AGENTS = """
import asyncio
import agents
from openai import AsyncOpenAI
agents.set_tracing_disabled(True)
tools = [agents.function_tool(get_weather)]
client = AsyncOpenAI(base_url=base, api_key="sk-any")

def agent(model, **more):
    chat = agents.OpenAIChatCompletionsModel(model=model, openai_client=client)
    return agents.Agent(name="a", instructions="Be kind.", model=chat, **more)

async def main():
    names = ("run", "streamed", "forced", "typed")
    for name in names:
        got[name] = {}
    settings = agents.ModelSettings(tool_choice="required")
    for model in callers:
        one = agent(model, tools=tools)
        got["run"][model] = (await agents.Runner.run(one, "Weather?")).final_output
        result = agents.Runner.run_streamed(one, "Weather?")
        async for event in result.stream_events():
            pass
        got["streamed"][model] = result.final_output
        one = agent(model, tools=tools, model_settings=settings)
        got["forced"][model] = (await agents.Runner.run(one, "Weather?")).final_output
    for model in objects:
        result = await agents.Runner.run(agent(model, output_type=City), "Oslo?")
        got["typed"][model] = result.final_output.model_dump()

asyncio.run(main())
print(json.dumps(got))
"""


@pytest.mark.real_clock
async def test_openai_agents(tmp_path: Path) -> None:
    got, _ = await run_python("agents", SHAPES + OPENAI_AGENTS, tmp_path)
    tools = dict.fromkeys(["run", "streamed", "forced"], ALL_SUNNY)
    assert got == {**tools, "typed": ALL_OSLO}


LITELLM = """
import litellm

litellm.suppress_debug_info = True
parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
function = {"name": "get_weather", "parameters": parameters}
tools = [{"type": "function", "function": function}]

def ask(model, messages, stream):
    fields = {"tools": tools, "stream": stream, "api_base": base, "api_key": "sk-any"}
    answer = litellm.completion(f"openai/{model}", messages, **fields)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=messages)
    return answer.choices[0]

def loop(model, stream):
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    for _ in range(3):
        choice = ask(model, messages, stream)
        if choice.finish_reason != "tool_calls":
            return choice.message.content
        messages.append(choice.message.model_dump())
        for call in choice.message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            content = f"20 degrees in {city}"
            row = {"role": "tool", "tool_call_id": call.id, "content": content}
            messages.append(row)

for stream in (False, True):
    got["streamed" if stream else "whole"] = {m: loop(m, stream) for m in callers}
print(json.dumps(got))
"""


@pytest.mark.real_clock
async def test_litellm(tmp_path: Path) -> None:
    got, _ = await run_python("litellm", LITELLM, tmp_path)
    assert got == {"whole": ALL_SUNNY, "streamed": ALL_SUNNY}


README = (ROOT / "README.md").read_text(encoding="utf-8")
LLM_LINE = README.partition("`extra-openai-models.yaml`")[2].split("`")[3]
LLM = (
    f"""
import os, pathlib
line = {LLM_LINE!r}.replace("http://127.0.0.1:5000/v1", base)
lines = [line.replace("my-model", name) for name in [*callers, *objects]]
"""
    + """
folder = pathlib.Path(os.environ["LLM_USER_PATH"])
(folder / "extra-openai-models.yaml").write_text("\\n".join(lines), encoding="utf-8")
import llm

schema = {"type": "object", "properties": {"name": {"type": "string"}}}
for stream in (True, False):
    chains = got["streamed" if stream else "whole"] = {}
    for name in callers:
        model = llm.get_model(name)
        chain = model.chain("Weather?", tools=[get_weather], stream=stream)
        chains[name] = "".join(chain)
got["schema"] = {}
for name in objects:
    answer = llm.get_model(name).prompt("Oslo?", schema=schema)
    got["schema"][name] = json.loads(answer.text())
print(json.dumps(got))
"""
)


@pytest.mark.real_clock
async def test_llm_with_a_tool(tmp_path: Path) -> None:
    got, turns = await run_python("llm", LLM, tmp_path)
    assert {turn.json["user"] for turn in turns} == {user_of_key("sk-any")}
    said = {**ALL_SUNNY, "as-asked": f"I'll look that up.\n\n{SUNNY}"}
    assert got == {"streamed": said, "whole": said, "schema": ALL_OSLO}


# ------------------------------------------------------------------------------
# Agents in JavaScript
# ------------------------------------------------------------------------------

AI_SDK = """
import { generateObject, generateText, stepCountIs, streamObject, streamText,
         tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";

const [base] = process.argv.slice(-1);
const openai = createOpenAI({ baseURL: base, apiKey: "sk-any" });
const compatible = createOpenAICompatible({
  name: "dify", baseURL: base, supportsStructuredOutputs: true,
});
const providers = { chat: (m) => openai.chat(m), compatible: (m) => compatible(m) };
const execute = async ({ city }) => `20 degrees in ${city}`;
const inputSchema = z.object({ city: z.string() });
const get_weather = tool({ description: "The weather.", inputSchema, execute });
const twin = z.object({ name: z.string() });
const city = { name: z.string(), people: z.number().int(), twins: z.array(twin) };
const schema = z.object(city);
const got = {};
for (const [name, provider] of Object.entries(providers)) {
  const row = { text: {}, streamed: {}, forced: {}, object: {}, streamedObject: {} };
  for (const model of CALLERS) {
    const fields = { model: provider(model), prompt: "Weather?", tools: { get_weather },
                     stopWhen: stepCountIs(3) };
    row.text[model] = (await generateText(fields)).text;
    const stream = streamText(fields);
    await stream.consumeStream();
    row.streamed[model] = await stream.text;
    const forced = await generateText({ ...fields, toolChoice: "required",
                                        stopWhen: stepCountIs(1) });
    row.forced[model] = forced.toolCalls.map((c) => [c.toolName, c.input]);
  }
  for (const model of OBJECTS) {
    const fields = { model: provider(model), schema, prompt: "Oslo?" };
    row.object[model] = (await generateObject(fields)).object;
    const stream = streamObject(fields);
    for await (const _ of stream.partialObjectStream);
    row.streamedObject[model] = await stream.object;
  }
  try {
    const fields = { schema, prompt: "Oslo?", maxRetries: 0 };
    await generateObject({ model: provider("hopeless"), ...fields });
  } catch (error) {
    row.hopeless = [error.name, error.statusCode, error.data.error.code];
  }
  got[name] = row;
}
console.log(JSON.stringify(got));
"""


@pytest.mark.real_clock
async def test_vercel_ai_sdk(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (NODE_FOLDER / "node_modules" / "ai").exists():
        pytest.skip(
            f"there is no Node, or no AI SDK in {NODE_FOLDER.relative_to(ROOT)}"
        )
    lists = {"CALLERS": list(CALLS), "OBJECTS": list(OBJECTS)}
    script = AI_SDK
    for name, values in lists.items():
        script = script.replace(name, json.dumps(values))
    async with apps(tmp_path) as (served, _):
        command = [node, "--input-type=module", "-e", script, "--"]
        got = await run(served, command, cwd=NODE_FOLDER, env=environment())
    row = {
        "text": ALL_SUNNY,
        "streamed": ALL_SUNNY,
        "forced": dict.fromkeys(CALLS, WEATHER_CALL),
        "object": ALL_OSLO,
        "streamedObject": ALL_OSLO,
        "hopeless": ["AI_APICallError", 502, "response_format_unsatisfied"],
    }
    assert got == {"chat": row, "compatible": row}
