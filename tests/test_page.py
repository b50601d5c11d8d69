"""The page at /: its policy and its size; in a browser, what one sees and does.

The tests in a browser need the package `playwright` and a Chromium (Debian's
`chromium`, or the one named by CHROMIUM); without them they are skipped. Those of
accessibility need `axe-core-python`, too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import html.parser
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import fake_dify as fake
import pytest
from fake_dify import FakeDify
from sites import listening

import opendify

JSONObject = dict[str, Any]
PATIENCE_MS = 60_000
MOST_BYTES = 16_000  # loads at once over any line
CLIENT_KEY = "sk-client"
PICTURE = "https://files.example/cat.png"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6"
    "kgAAAABJRU5ErkJggg=="
)
EVIL = "<img src=x onerror=alert(1)> [x](javascript:alert(1))"
CODE = f"![a cat]({PICTURE})\n"
ARABIC = "مرحبا بالعالم."
TEXTS = {
    "code": f"Write\n```md\n{CODE}```\nor so.",
    "brackets": "[" * 60_000,
    "arabic": ARABIC,
    "labels": r"[](https://docs.example/1) [a \[b\]](https://docs.example/2)",
}
HELD = {"ponder": "<think>Now I think. Now I", "hang": "And then"}  # without an end
SOURCE = {
    "position": 1,
    "dataset_name": "Handbook",
    "document_name": "leave.pdf",
    "score": 0.87,
    "content": "Thirty days a year.",
    "doc_metadata": {"link": "https://docs.example/leave"},
}
BARE_SOURCE = {"position": 2, "document_name": "notes.txt", "content": None}
NAMESAKES = [
    {"document_name": name, "doc_metadata": {"link": f"https://{host}.example/"}}
    for name, host in [("Home", "a"), ("Home", "b"), (None, "c")]
]


# ------------------------------------------------------------------------------
# A server, in a thread of its own: the browser's driver has this one
# ------------------------------------------------------------------------------


def answer(request: fake.Request) -> list[fake.Step]:
    """Return what the app says to a question."""
    query = request.json["query"]
    words = [f"word{number} " for number in range(12)]
    if "rich" in query:
        return [
            fake.message("<think>First I think.</think>"),
            fake.message(f"See [the handbook](https://docs.example/a_(b)) {EVIL}"),
            fake.message(f"\n\n![a cat]({PICTURE})"),
            fake.message_end(resources=[SOURCE, BARE_SOURCE]),
        ]
    if "namesakes" in query:
        return [fake.message("See."), fake.message_end(resources=NAMESAKES)]
    if "refuse" in query:
        body = {"code": "invalid_param", "message": "no such input", "status": 400}
        return [fake.Status(400, body)]
    if "break" in query:
        return [fake.message("Half an"), fake.error_event("the model fell over")]
    for word, text in {**TEXTS, **HELD}.items():
        if word in query:
            end = fake.Hang() if word in HELD else fake.message_end()
            return [fake.message(text), end]
    return fake.chat_answer(*words, delay=0 if "at once" in query else 0.03)


@dataclass
class Site:
    """A running OpenDify and the fake Dify behind it."""

    dify: FakeDify
    url: str


@contextlib.asynccontextmanager
async def serving(variables: Mapping[str, str]) -> AsyncIterator[Site]:
    """Serve a site: the model `desk` answers, `gone` has a wrong key."""
    async with FakeDify() as dify:
        dify.app("app-good", name="Helpdesk", mode="chat", script=answer)
        models = json.dumps({"desk": "app-good", "gone": "app-bad"})
        given = {"MODEL_CONFIG": models, "DIFY_API_BASE": dify.base}
        settings = opendify.parse_settings({**given, **variables})
        async with listening(settings) as (_, _, port):
            yield Site(dify, f"http://127.0.0.1:{port}/")


@contextlib.contextmanager
def running_site(**variables: str) -> Iterator[Site]:
    """Give a site; its loop runs in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(step: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(step, loop).result(10)

    async def start() -> Any:
        return serving(variables)

    context = run(start())
    try:
        yield run(context.__aenter__())
        run(context.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Give a site that asks for no key."""
    with running_site() as made:
        yield made


@pytest.fixture(scope="module")
def guarded() -> Iterator[Site]:
    """Give a site that wants a key."""
    with running_site(VALID_API_KEYS=CLIENT_KEY) as made:
        yield made


class Got(NamedTuple):
    """A response."""

    status: int
    headers: Message
    text: str


def get(url: str, method: str = "GET") -> Got:
    """Return the response to a request."""
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return Got(response.status, response.headers, response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Got(error.code, error.headers, error.read().decode())


# ------------------------------------------------------------------------------
# Without a browser
# ------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """What a page holds: texts of styles and scripts, addresses, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.blocks: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.attributes: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attrs:
            self.attributes.append(name)
            if name in ("src", "href", "action", "srcset", "data", "formaction"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._tag in ("style", "script"):
            self.blocks.append((self._tag, data))

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def hash_of(text: str) -> str:
    """Return the source expression of an inline text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def test_policy_allows_exactly_what_the_page_holds(site: Site) -> None:
    got = get(site.url)
    (_, style), (_, script) = Outline(got.text).blocks
    policy = got.headers["content-security-policy"].split("; ")
    assert dict(row.split(" ", 1) for row in policy) == {
        "default-src": "'none'",
        "script-src": hash_of(script),
        "style-src": hash_of(style),
        "connect-src": "'self'",
        "img-src": "https: http: data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_page_comes_with_safe_headers(site: Site) -> None:
    got = get(site.url)
    wanted = {
        "content-type": "text/html; charset=utf-8",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache, no-transform",
    }
    assert {name: got.headers[name] for name in wanted} == wanted
    assert (got.status, opendify.__version__ in got.text) == (200, True)


def test_page_needs_nothing_from_elsewhere(site: Site) -> None:
    text = get(site.url).text
    outline = Outline(text)
    assert outline.addresses == ["data:,"]
    assert [n for n in outline.attributes if n == "style" or n.startswith("on")] == []
    assert re.findall(r"https?://[\w.-]+|@import|url\(", text) == []


def test_script_writes_no_html(site: Site) -> None:
    (_, (_, script)) = Outline(get(site.url).text).blocks
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\("
    )
    assert re.findall(banned, script) == []


def test_head_is_answered_without_the_page(site: Site) -> None:
    whole, head = get(site.url), get(site.url, "HEAD")
    assert (head.status, head.text) == (200, "")
    assert head.headers["content-length"] == str(len(whole.text.encode()))


def test_page_is_only_at_the_root(site: Site) -> None:
    statuses = [get(site.url + path).status for path in ("v1", "v1/", "index.html")]
    assert statuses == [404, 404, 404]


def test_page_is_open_and_apps_are_not_when_keys_are_set(guarded: Site) -> None:
    statuses = [get(guarded.url + path).status for path in ("", "v1/models", "apps")]
    assert statuses == [200, 401, 401]
    assert CLIENT_KEY not in get(guarded.url).text


def test_apps_tell_how_they_do(site: Site) -> None:
    desk, gone = json.loads(get(site.url + "apps").text)["data"]
    assert desk == {"id": "desk", "name": "Helpdesk", "mode": "chat"}
    assert (gone["id"], sorted(gone)) == ("gone", ["error", "id"])
    assert "app-bad" not in gone["error"]


def test_page_is_small(site: Site) -> None:
    assert len(get(site.url).text.encode()) < MOST_BYTES


# ------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------

KEYLESS = {"color_scheme": "light", "locale": "en-US"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Give a headless Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, names)), ""
    )
    if not importlib.util.find_spec("playwright"):
        pytest.skip("the page is tried in a browser where `playwright` is installed")
    if not found:
        pytest.skip("the page is tried in a browser where there is a Chromium")
    api = importlib.import_module("playwright.sync_api")
    with api.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


@dataclass
class Tab:
    """A page that is open, and what it did besides."""

    page: Any
    messages: list[str] = field(default_factory=list)  # of the console
    elsewhere: list[str] = field(default_factory=list)  # requests to other origins

    def ask(self, question: str) -> None:
        """Ask in the playground, by keyboard."""
        self.page.focus("#text")
        self.page.keyboard.type(question)
        self.page.keyboard.press("Enter")

    def focus(self) -> str:
        """Return what has the focus."""
        here = "document.activeElement.id || document.activeElement.dataset.copy"
        return self.page.evaluate(here) or ""

    def text(self, selector: str) -> str:
        """Return the text of an element as soon as it has some."""
        shown = self.page.locator(f"{selector}:not(:empty)").last
        shown.wait_for(state="attached", timeout=PATIENCE_MS)
        return str(shown.text_content()).strip()

    def hang(self) -> None:
        """Ask what is never answered to its end; return when some text is there."""
        self.ask("hang on")
        self.page.locator(".answer > .text", has_text="And then").wait_for()

    def is_done(self) -> None:
        """Wait for the end of an answer."""
        sending = self.page.locator("#send", has_text=re.compile("Send|发送"))
        sending.wait_for(timeout=PATIENCE_MS)


@contextlib.contextmanager
def opened(browser: Any, url: str = "about:blank", **options: Any) -> Iterator[Tab]:
    """Open a page in a fresh profile."""
    context = browser.new_context(**{**KEYLESS, **options})
    tab = Tab(context.new_page())
    picture = {"content_type": "image/png", "body": PIXEL}
    context.route("https://files.example/**", lambda route: route.fulfill(**picture))
    tab.page.on("console", lambda message: tab.messages.append(message.text))
    tab.page.on("pageerror", lambda error: tab.messages.append(str(error)))

    def note(request: Any) -> None:
        if not request.url.startswith((url, "data:")):
            tab.elsewhere.append(request.url)

    tab.page.on("request", note)
    tab.page.goto(url)
    try:
        yield tab
    finally:
        context.close()


@pytest.fixture
def tab(browser: Any, site: Site) -> Iterator[Tab]:
    """Give the page, loaded."""
    with opened(browser, site.url) as made:
        made.text("#apps .good")
        yield made


def test_page_loads_silently_and_shows_the_apps(tab: Tab) -> None:
    rows = [row.split("\n") for row in tab.page.locator("#apps li").all_inner_texts()]
    assert rows[0] == ["desk", "Helpdesk · chat · ready"]
    assert (rows[1][0], "MODEL_CONFIG" in rows[1][1]) == ("gone", True)
    assert (tab.messages, tab.elsewhere) == ([], [])


@pytest.mark.parametrize("width", [360, 1280])
def test_message_is_typed_at_once(browser: Any, site: Site, width: int) -> None:
    """And a phone shows the apps nevertheless."""
    size = {"width": width, "height": 740}
    with opened(browser, site.url, viewport=size) as tab:
        tab.text("#apps .good")
        assert (tab.focus(), tab.page.evaluate("scrollY")) == ("text", 0)


def test_page_without_an_app_says_so(browser: Any) -> None:
    with running_site(MODEL_CONFIG="{}") as mine, opened(browser, mine.url) as tab:
        assert tab.text("#apps li") == "No app is configured."
        assert (_complaints(tab), tab.messages) == ([], [])


def test_apps_are_listed_before_they_have_answered(browser: Any) -> None:
    """A name is not said twice."""
    models = json.dumps({"Helpdesk": "app-good"})
    with running_site(MODEL_CONFIG=models) as mine, opened(browser) as tab:
        shown = []

        def look(route: Any) -> None:
            shown.append(tab.text("#apps li"))
            route.continue_()

        tab.page.route("**/apps", look)
        tab.page.goto(mine.url)
        shown.append(tab.text("#apps .good"))
    assert shown == ["Helpdeskchecking…", "Helpdeskchat · ready"]


def test_chosen_model_is_kept_when_the_apps_are_checked_again(tab: Tab) -> None:
    tab.page.select_option("#model", "gone")
    tab.page.evaluate("document.querySelector('#model').firstChild.id = 'old'")
    tab.page.click("#again")
    tab.page.locator("#model:not(:has(#old))").wait_for(state="attached")
    assert tab.page.input_value("#model") == "gone"
    tab.page.evaluate("document.querySelector('#model').selectedOptions[0].text = '-'")
    tab.page.click("#again")
    tab.page.locator("#model:not(:has-text('-'))").wait_for(state="attached")
    assert tab.page.input_value("#model") == "desk"


def test_answer_appears_while_it_comes(tab: Tab) -> None:
    lengths: list[int] = []
    tab.ask("tell me")
    while len(lengths) < 2 or lengths[-1] != lengths[-2]:
        lengths.append(len(tab.text(".answer > .text")))
        tab.page.wait_for_timeout(80)
    tab.is_done()
    assert tab.text(".answer > .text").endswith("word11")
    assert len(set(lengths)) > 2
    assert tab.text("#said") == tab.text(".answer > .text")
    assert tab.page.locator("details:visible, #hint").count() == 0
    assert tab.messages == []


def test_smoothing_is_switched_and_measured(tab: Tab) -> None:
    seen = {}
    for name in ("on", "off"):
        tab.page.set_checked("#smooth", name == "on")
        tab.ask("tell me")
        tab.is_done()
        seen[name] = [tab.text(f"#n{n}") for n in range(3)]
        drawn = [tab.page.get_attribute(f"#{id_}", "d") for id_ in ("bars", "first")]
        assert all(drawn)
        assert bool(tab.page.get_attribute("#lags", "d")) == (name == "on")
    assert seen["off"][2] == "0.00 s"
    assert float(seen["on"][2].split()[0]) > 0
    assert all(re.fullmatch(r"\d\.\d\d s", row[0]) for row in seen.values())
    assert all(re.fullmatch(r"\d+", row[1]) for row in seen.values())


def test_chart_is_drawn_until_the_answer_ends(tab: Tab) -> None:
    tab.page.evaluate("""() => {
        const { setInterval, clearInterval } = window, live = window.live = new Set();
        window.setInterval = (...given) => {
            const id = setInterval(...given);
            return live.add(id), id;
        };
        window.clearInterval = (id) => { clearInterval(id), live.delete(id); };
    }""")
    tab.hang()
    assert tab.page.evaluate("live.size") == 1
    tab.page.locator("#n0", has_text=" s").wait_for(timeout=PATIENCE_MS)
    tab.page.keyboard.press("Escape")
    tab.is_done()
    assert tab.page.evaluate("live.size") == 0


def test_pieces_that_come_at_once_have_no_rate(tab: Tab) -> None:
    tab.page.set_checked("#smooth", False)
    tab.ask("tell me at once")
    tab.is_done()
    assert tab.text(".answer > .text").endswith("word11")
    assert [tab.text(f"#n{n}")[-2:] for n in range(3)] == [" s", "–", " s"]


def test_thoughts_are_open_until_the_answer_begins(tab: Tab) -> None:
    thoughts = tab.page.locator(".answer details .text")
    tab.ask("ponder")
    thoughts.get_by_text("Now I think.").wait_for()
    tab.page.keyboard.press("Escape")
    tab.is_done()
    tab.page.fill("#text", "")
    tab.ask("something rich")
    tab.is_done()
    assert [thoughts.nth(n).is_visible() for n in range(2)] == [True, False]
    assert tab.page.locator("summary", has_text="Thinking").last.is_visible()


def test_reasoning_files_links_and_sources_are_shown(tab: Tab) -> None:
    tab.ask("something rich")
    tab.is_done()
    assert tab.page.text_content("details .text") == "First I think."
    link = tab.page.locator(".answer > .text a")
    assert [(x.text_content(), x.get_attribute("href")) for x in link.all()] == [
        ("the handbook", "https://docs.example/a_(b)")
    ]
    assert link.get_attribute("target") == "_blank"
    picture = tab.page.locator(".answer img")
    assert (picture.get_attribute("alt"), picture.get_attribute("src")) == (
        "a cat",
        PICTURE,
    )
    source = tab.page.locator("details").last
    assert source.locator("summary").text_content() == "Sources"
    assert source.locator("a").get_attribute("href") == "https://docs.example/leave"
    assert source.locator("p").all_text_contents() == [
        "leave.pdfThirty days a year.",
        "notes.txt",
    ]


def test_sources_of_one_name_lead_each_to_its_own_page(tab: Tab) -> None:
    """One that has no name goes by its address."""
    tab.ask("which namesakes")
    tab.is_done()
    links = tab.page.locator("details", has_text="Sources").locator("a").all()
    assert [(x.text_content(), x.get_attribute("href")) for x in links] == [
        ("Home", "https://a.example/"),
        ("Home", "https://b.example/"),
        ("https://c.example/", "https://c.example/"),
    ]


def test_markup_of_an_answer_is_text(tab: Tab) -> None:
    tab.ask("something rich")
    tab.is_done()
    assert EVIL in tab.page.text_content(".answer > .text")
    assert (tab.messages, tab.elsewhere) == ([], [PICTURE])


def test_links_have_the_names_that_an_answer_gives(tab: Tab) -> None:
    tab.ask("labels")
    tab.is_done()
    names = tab.page.locator(".answer a").all_text_contents()
    assert names == ["https://docs.example/1", "a [b]"]


def test_code_of_an_answer_is_shown_as_it_is(tab: Tab) -> None:
    tab.ask("some code")
    tab.is_done()
    assert tab.text(".answer pre") == CODE.strip()
    assert tab.text(".answer > .text") == f"Write\n{CODE}or so."
    assert tab.elsewhere == []


def test_text_from_right_to_left_begins_at_the_right(tab: Tab) -> None:
    tab.page.fill("#text", f"{ARABIC}\n(arabic)")
    tab.page.press("#text", "Enter")
    tab.is_done()
    order = """(box, last) => {
        const range = document.createRange(), text = box.firstChild;
        const [first, stop] = [0, last].map((at) => {
            range.setStart(text, at), range.setEnd(text, at + 1);
            return range.getBoundingClientRect().left;
        });
        return stop < first;
    }"""
    for box in (".user", ".answer > .text"):
        assert tab.page.locator(box).evaluate(order, len(ARABIC) - 1)


def test_answer_of_brackets_does_not_stop_the_page(tab: Tab) -> None:
    tab.ask("brackets")
    tab.is_done()
    assert len(tab.text(".answer > .text")) == 60_000


def test_question_is_in_sight_where_one_had_read_above(tab: Tab) -> None:
    tab.page.evaluate("document.querySelector('#log').style.height = '3rem'")
    tab.ask("tell me at once")
    tab.is_done()
    tab.page.evaluate("document.querySelector('#log').scrollTop = -9e9")
    assert tab.page.evaluate("document.querySelector('#log').scrollTop") < 0
    tab.hang()
    assert tab.page.evaluate("document.querySelector('#log').scrollTop") == 0


def test_history_is_sent_until_a_new_chat(tab: Tab, site: Site) -> None:
    before = len(site.dify.requests)
    for question in ("tell me one", "tell me two"):
        tab.ask(question)
        tab.is_done()
    tab.page.click("#clear")
    assert (tab.page.is_visible("#hint"), tab.focus()) == (True, "text")
    tab.ask("tell me three")
    tab.is_done()
    sent = site.dify.requests[before:]
    asked = [row.json for row in sent if row.path.endswith("/chat-messages")]
    words = [row["query"].split()[-1] for row in asked]
    assert words == ["one", "two", "three"]
    assert [bool(row.get("conversation_id")) for row in asked] == [False, True, False]


def test_nothing_is_not_sent(tab: Tab) -> None:
    tab.ask("  ")
    tab.page.click("#send")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".answer").count() == 0
    assert tab.messages == []


@pytest.mark.parametrize(
    ("question", "words"),
    [
        pytest.param(
            "refuse this",
            ["no such input", "HTTP 400", "req_", "invalid_param"],
            id="refused",
        ),
        pytest.param("break it", ["the model fell over"], id="inside-the-stream"),
    ],
)
def test_error_is_shown_and_the_question_kept(
    tab: Tab, question: str, words: list[str]
) -> None:
    tab.ask(question)
    shown = tab.text("[role=alert]")
    assert [word for word in words if word not in shown] == []
    tab.is_done()
    assert tab.page.input_value("#text") == question


def test_error_is_shown_when_the_server_is_gone(browser: Any) -> None:
    with running_site() as mine, opened(browser, mine.url) as tab:
        tab.text("#apps .good")
        tab.page.context.set_offline(True)
        tab.ask("tell me")
        assert tab.text("[role=alert]") == "OpenDify can't be reached."


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        pytest.param(502, "<html>", "HTTP 502", id="of-a-gateway"),
        pytest.param(
            200,
            'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n',
            "The answer broke off.",
            id="cut",
        ),
    ],
)
def test_what_is_no_answer_is_an_error(
    tab: Tab, status: int, body: str, shown: str
) -> None:
    """Something stands between, or fell over."""
    answer = {"status": status, "body": body}
    tab.page.route("**/chat/completions", lambda route: route.fulfill(**answer))
    tab.ask("tell me")
    assert tab.text("[role=alert]") == shown
    tab.is_done()


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_answer_is_stopped_and_the_next_question_kept(tab: Tab, way: str) -> None:
    tab.hang()
    tab.page.keyboard.type("and")
    tab.page.keyboard.press("Enter")  # sends nothing yet, and stops nothing
    assert tab.page.text_content("#send") == "Stop"
    if way == "Escape":
        tab.page.keyboard.press(way)
    else:
        tab.page.click("#send")
    assert tab.text("[role=alert]") == "Stopped."
    tab.is_done()
    assert tab.page.input_value("#text") == "and"


def test_new_chat_drops_the_question_that_runs(tab: Tab) -> None:
    tab.hang()
    tab.page.click("#clear")
    tab.is_done()
    assert tab.page.input_value("#text") == ""
    assert tab.page.locator(".answer").count() == 0


def test_all_is_reached_by_keyboard(tab: Tab) -> None:
    reached = []
    for _ in range(16):
        tab.page.keyboard.press("Tab")
        reached.append(tab.focus())
    wanted = "send base client settings theme again apps model smooth clear log text"
    assert [name for name in reached if name][:12] == wanted.split()
    tab.page.focus("#log")
    outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_shift_enter_breaks_the_line(tab: Tab) -> None:
    tab.page.focus("#text")
    for key in ("a", "Shift+Enter", "b"):
        tab.page.keyboard.press(key)
    assert tab.page.input_value("#text") == "a\nb"


@pytest.mark.parametrize("key", ["Enter", "Escape"])
def test_keys_of_an_input_method_send_and_stop_nothing(tab: Tab, key: str) -> None:
    """Safari says of its last key that nothing is being composed any more."""
    tab.hang()
    if key == "Enter":
        tab.page.keyboard.press("Escape")
        tab.is_done()
    tab.page.fill("#text", "你好")
    event = {"key": key, "keyCode": 229, "bubbles": True, "cancelable": True}
    typed = "(box, event) => box.dispatchEvent(new KeyboardEvent('keydown', event))"
    assert tab.page.locator("#text").evaluate(typed, event)
    assert tab.page.input_value("#text") == "你好"
    assert tab.page.text_content("#send") == {"Enter": "Send", "Escape": "Stop"}[key]


CLIENTS = [
    *("Open WebUI", "LobeChat", "NextChat", "Cherry Studio", "Chatbox", "Continue"),
    *("openai-python", "curl"),
]


def test_settings_of_clients_are_copied(browser: Any, site: Site) -> None:
    rights = ["clipboard-read", "clipboard-write"]
    with opened(browser, site.url, permissions=rights) as tab:
        tab.text("#apps .good")
        assert tab.page.locator("#client option").all_inner_texts() == CLIENTS
        for client in CLIENTS:
            tab.page.select_option("#client", client)
            tab.page.click("[data-copy=settings]")
            copied = tab.page.evaluate("navigator.clipboard.readText()")
            assert copied.strip() == tab.page.text_content("#settings")
            assert site.url[:-1] in copied
            assert not re.search(r"<\w+>", copied)
        tab.page.click("[data-copy=base]")
        assert tab.page.evaluate("navigator.clipboard.readText()") == site.url + "v1"
        assert tab.text("#said") == "Copied"
        buttons = tab.page.locator("[data-copy]")
        assert buttons.all_inner_texts() == ["Copied", "Copy"]
        tab.page.select_option("#client", CLIENTS[0])
        assert buttons.all_inner_texts() == ["Copy", "Copy"]


def test_settings_hold_the_chosen_model_and_the_key(tab: Tab) -> None:
    assert tab.text("#settings").endswith("OPENAI_API_KEY=any")
    tab.page.select_option("#client", "LobeChat")
    for model in ("desk", "gone"):
        tab.page.select_option("#model", model)
        assert tab.text("#settings").endswith(f"OPENAI_MODEL_LIST=-all,+{model}")


def test_settings_hold_any_name_of_a_model(browser: Any) -> None:
    name = """Bob's "test" \\ 助手"""
    models = json.dumps({name: "app-good"})
    with running_site(MODEL_CONFIG=models) as site, opened(browser, site.url) as tab:
        tab.text("#apps .good")
        tab.page.select_option("#client", "curl")
        words = shlex.split(tab.page.text_content("#settings"))
    assert json.loads(words[words.index("-d") + 1])["model"] == name


def test_wrong_key_is_asked_for_again(browser: Any, guarded: Site) -> None:
    with opened(browser, guarded.url) as tab:
        assert tab.focus() == "key"
        assert (tab.messages, tab.page.locator("#apps li").count()) == ([], 0)
        assert _complaints(tab) == []
        for wrong in ("wrong", "“pasted”", "密钥"):  # no header can hold the latter
            tab.page.evaluate("document.querySelector('#apps').replaceChildren()")
            tab.page.keyboard.type(wrong)  # in place of the one before, unseen
            tab.page.keyboard.press("Enter")
            assert "Incorrect API key" in tab.text("#apps .error")
            assert (tab.page.is_visible("#door"), tab.focus()) == (True, "key")
            assert tab.page.input_value("#key") == wrong
        tab.page.reload()
        assert "Incorrect API key" in tab.text("#apps .error")
        assert (tab.page.is_visible("#door"), tab.focus()) == (True, "key")


def test_browser_that_keeps_nothing_may_chat(browser: Any, guarded: Site) -> None:
    """Where cookies are blocked, one may not even ask for the storage of the tab."""
    with opened(browser) as tab:
        tab.page.add_init_script(
            "Object.defineProperty(window, 'sessionStorage', { get() { "
            "throw new DOMException('denied', 'SecurityError'); } });"
        )
        tab.page.goto(guarded.url)
        tab.page.keyboard.type(CLIENT_KEY)
        tab.page.keyboard.press("Enter")
        tab.text("#apps .good")
        tab.ask("tell me")
        tab.is_done()
        assert tab.text(".answer > .text").endswith("word11")


def test_key_is_asked_for_and_kept_in_the_tab_only(browser: Any, guarded: Site) -> None:
    with opened(browser, guarded.url) as tab:
        assert tab.text("#settings").endswith("OPENAI_API_KEY=YOUR-KEY")
        tab.page.select_option("#client", "LobeChat")
        tab.page.focus("#key")
        tab.page.keyboard.type(CLIENT_KEY)
        tab.page.keyboard.press("Enter")
        tab.text("#apps .good")
        assert (tab.page.is_hidden("#door"), tab.focus()) == (True, "text")
        kept = tab.page.evaluate("[{...sessionStorage}, {...localStorage}]")
        assert kept == [{"api-key": CLIENT_KEY}, {}]
        assert tab.page.context.cookies() == []
        assert CLIENT_KEY not in tab.text("#settings")
        assert tab.text("#settings").endswith("+desk")
        tab.ask("tell me")
        tab.is_done()
        assert tab.text(".answer > .text").endswith("word11")
        tab.page.context.set_offline(True)
        tab.page.click("#again")
        tab.page.locator("#apps", has_text="can't be reached").wait_for()
        assert tab.page.is_hidden("#door")  # it is not the key's fault


LOOKS = [  # every two of them together
    pytest.param("light", "en-US", 360, id="light-english-phone"),
    pytest.param("dark", "zh-CN", 360, id="dark-chinese-phone"),
    pytest.param("light", "zh-CN", 1280, id="light-chinese-desktop"),
    pytest.param("dark", "en-US", 1280, id="dark-english-desktop"),
]


@pytest.mark.parametrize(("scheme", "locale", "width"), LOOKS)
def test_looks(browser: Any, site: Site, scheme: str, locale: str, width: int) -> None:
    """Theme and language are the browser's, nothing is cut off, axe is content."""
    options = {"color_scheme": scheme, "locale": locale}
    size = {"width": width, "height": 740}
    with opened(browser, site.url, viewport=size, **options) as tab:
        tab.text("#apps .good")
        assert tab.text("#h2") == {"en-US": "Playground", "zh-CN": "试用"}[locale]
        assert tab.page.get_attribute("html", "lang") in (locale, locale[:2])
        tab.ask("something rich")
        tab.is_done()
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        assert _complaints(tab) == []
        first = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.page.click("#theme")
        then = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        themes = ["rgb(244, 246, 245)", "rgb(16, 20, 21)"]
        assert [first, then] == (themes if scheme == "light" else themes[::-1])
        assert _complaints(tab) == []


def _complaints(tab: Tab) -> list[str]:
    """Return what axe finds, if it is installed."""
    spec = importlib.util.find_spec("axe_core_python")
    if not spec or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations)))
    tab.page.evaluate((folder / "axe.min.js").read_text(encoding="utf-8"))
    found = tab.page.evaluate("axe.run()")
    return [f"{row['id']}: {row['help']}" for row in found["violations"]]
