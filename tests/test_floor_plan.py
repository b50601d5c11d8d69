"""The file keeps the shape that its docstring promises."""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Union

import pytest

FILE = Path(__file__).parent.parent / "opendify.py"

# Lines of code that a room may have: comments, docstrings, blank lines not counted.
BUDGETS = {
    "Settings": 241,
    "Errors": 93,
    "SSE": 64,
    "JSON": 96,
    "Turn": 213,
    "Calls": 850,
    "Dify": 831,
    "Ids": 65,
    "OpenAI": 695,
    "Responses": 454,
    "Conversations": 501,
    "Pacer": 131,
    "Wire": 492,
    "Upstream": 722,
    "Answers": 519,
    "Handlers": 922,
    "Server": 295,
    "Page": 264,
    "Command line": 488,
}
OPTIONAL = {"Calls", "Page"}
WHOLE_BUDGET = 8002
FUNCTION_LINES = 50  # one screen
CLASS_LINES = 150  # of code

PURE = set(list(BUDGETS)[: list(BUDGETS).index("Wire")])
IMPURE_MODULES = {
    *("asyncio", "ssl", "socket", "os", "time", "random", "uuid", "logging", "sqlite3"),
    *("select", "selectors", "subprocess", "threading", "secrets"),
}
IMPURE = {room: IMPURE_MODULES for room in PURE}
IMPURE["Conversations"] = IMPURE_MODULES - {"sqlite3"}  # said at its door
FOREIGN_PACKAGES = {"h11", "dotenv"}

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Room(NamedTuple):
    """One room: its number and title, its first line, the line after its last."""

    number: int
    title: str
    start: int
    end: int


class House:
    """The file, parsed."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.lines = source.splitlines()
        banner = re.compile(r"# (\d+)\. (.+)")
        found = [(number, banner.fullmatch(line)) for number, line in self._numbered()]
        starts = [(line, int(m[1]), m[2].strip()) for line, m in found if m]
        ends = [line for line, *_ in starts[1:]] + [len(self.lines) + 1]
        self.rooms = [
            Room(number, title, line, end)
            for (line, number, title), end in zip(starts, ends)
        ]

    def _numbered(self) -> Iterator[tuple[int, str]]:
        return enumerate(self.lines, 1)

    def promised(self) -> list[tuple[int, str]]:
        """Return the list of rooms in the docstring."""
        text = ast.get_docstring(self.tree) or ""
        entries = re.findall(r"(?m)^ *(\d+)\. (\S+(?: \S+)*?)(?:  |$)", text)
        return [(int(number), title) for number, title in entries]

    def room_at(self, line: int) -> Room:
        """Return the room of a line; what stands above the first is the head."""
        inside = [room for room in self.rooms if room.start <= line]
        return inside[-1] if inside else Room(0, "head", 1, 1)

    @functools.cached_property
    def code_lines(self) -> set[int]:
        """The lines that hold code."""
        skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
        skip |= {tokenize.INDENT, tokenize.DEDENT}
        code: set[int] = set()
        text = io.StringIO("\n".join(self.lines) + "\n")
        for token in tokenize.generate_tokens(text.readline):
            if token.type not in skip:
                code.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            code -= _docstring_lines(node)
        return code

    @functools.cached_property
    def definitions(self) -> dict[str, Room]:
        """The room that defines each module-level name."""
        rooms: dict[str, Room] = {}
        for node in self.tree.body:
            for name in _defined(node):
                rooms.setdefault(name, self.room_at(node.lineno))
        return rooms

    @functools.cached_property
    def uses(self) -> list[tuple[str, Room, int]]:
        """Each use of a module-level name: the name, the room, the line."""
        names = _free_names(self.tree, frozenset())
        return [(name.id, self.room_at(name.lineno), name.lineno) for name in names]

    def attributes(self) -> Iterator[tuple[str, Room, int]]:
        """Yield each `x._name` but `self._name`, and its room and line."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Attribute) or not _is_private(node.attr):
                continue
            if getattr(node.value, "id", "") not in ("self", "cls"):
                yield node.attr, self.room_at(node.lineno), node.lineno


def _docstring_lines(node: ast.AST) -> set[int]:
    if not isinstance(node, Documented) or ast.get_docstring(node) is None:
        return set()
    statement = node.body[0]
    return set(range(statement.lineno, (statement.end_lineno or 0) + 1))


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a module-level statement defines, imports aside."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [name for target in targets for name in ast.walk(target)]
        return [name.id for name in names if isinstance(name, ast.Name)]
    return []


def _free_names(node: ast.AST, bound: frozenset[str]) -> Iterator[ast.Name]:
    """Yield the names that are read, those of a function's own variables aside."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        inside = list(ast.walk(node))
        stored = [n.id for n in inside if isinstance(n, ast.Name) and _is_stored(n)]
        bound |= {*stored, *(n.arg for n in inside if isinstance(n, ast.arg))}
    if isinstance(node, ast.Name) and node.id not in bound and not _is_stored(node):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _free_names(child, bound)


def _imported(node: ast.AST) -> set[str]:
    """Return the top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or ".").split(".")[0]}
    return set()


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _length(node: Function) -> int:
    """Return the lines of a function, its docstring aside."""
    return (node.end_lineno or 0) - node.lineno + 1 - len(_docstring_lines(node))


# ------------------------------------------------------------------------------
# The rules: each yields its complaints
# ------------------------------------------------------------------------------


def rooms_are_as_promised(house: House) -> Iterator[str]:
    """The docstring lists the banners, numbered from 1, in the house's order."""
    real = [(room.number, room.title) for room in house.rooms]
    titles = [title for title in BUDGETS if title in {title for _, title in real}]
    if real != house.promised():
        yield f"docstring: {house.promised()}, banners: {real}"
    if real != list(enumerate(titles, 1)):
        yield f"banners: {real}, expected order: {titles}"
    for title in BUDGETS:
        if title not in titles and title not in OPTIONAL:
            yield f"no room {title!r}"


def rooms_use_only_rooms_above(house: House) -> Iterator[str]:
    """No name is used above the room that defines it."""
    rooms = house.definitions
    for name, room, line in house.uses:
        if name in rooms and rooms[name].number > room.number:
            yield f"line {line}: {room.title} uses {name} of {rooms[name].title}"


def dialects_meet_only_in_the_hub(house: House) -> Iterator[str]:
    """What speaks as OpenAI does knows no name of Dify's room."""
    rooms = house.definitions
    for name, room, line in house.uses:
        is_openai = room.title in ("OpenAI", "Responses")
        if is_openai and name in rooms and rooms[name].title == "Dify":
            yield f"line {line}: {room.title} uses {name} of Dify"


def pure_rooms_are_pure(house: House) -> Iterator[str]:
    """No I/O, no clock, no randomness and no environment in the pure rooms."""
    waits = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    for node in ast.walk(house.tree):
        line = getattr(node, "lineno", 0)
        room = house.room_at(line)
        if room.title not in PURE:
            continue
        if isinstance(node, waits):
            yield f"line {line}: {room.title} waits"
        for name in _imported(node) & IMPURE[room.title]:
            yield f"line {line}: {room.title} imports {name}"
    for name, room, line in house.uses:
        if name in IMPURE.get(room.title, ()) or (name == "log" and room.title in PURE):
            yield f"line {line}: {room.title} uses {name}"


def private_names_stay_inside(house: House) -> Iterator[str]:
    """No `_private` name crosses a door."""
    rooms = house.definitions
    for name, room, line in house.uses:
        if _is_private(name) and name in rooms and rooms[name] != room:
            yield f"line {line}: {room.title} uses {name} of {rooms[name].title}"
    owners: dict[str, set[str]] = {}
    for node in ast.walk(house.tree):
        stores = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stores and isinstance(node, ast.Attribute):
            owners.setdefault(node.attr, set()).add(house.room_at(node.lineno).title)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            owners.setdefault(node.name, set()).add(house.room_at(node.lineno).title)
    for name, room, line in house.attributes():
        if name in owners and room.title not in owners[name]:
            yield f"line {line}: {room.title} uses .{name} of {owners[name]}"


def functions_fit_one_screen(house: House) -> Iterator[str]:
    """No function is longer than 50 lines, docstrings aside."""
    for node in ast.walk(house.tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if _length(node) > FUNCTION_LINES:
            yield f"line {node.lineno}: {node.name} has {_length(node)} lines"


def classes_are_small(house: House) -> Iterator[str]:
    """No class has more than 150 lines of code."""
    code = house.code_lines
    for node in ast.walk(house.tree):
        if isinstance(node, ast.ClassDef):
            count = len(
                code.intersection(range(node.lineno, (node.end_lineno or 0) + 1))
            )
            if count > CLASS_LINES:
                yield f"line {node.lineno}: {node.name} has {count} lines"


def imports_are_allowed(house: House) -> Iterator[str]:
    """Only the standard library, h11 and dotenv are imported."""
    known = getattr(sys, "stdlib_module_names", None)  # from Python 3.10 on
    for node in ast.walk(house.tree):
        for name in _imported(node):
            if known and name not in known and name not in FOREIGN_PACKAGES:
                yield f"line {getattr(node, 'lineno', 0)}: imports {name}"


def budgets_are_kept(house: House) -> Iterator[str]:
    """No room and not the whole has more lines of code than it may."""
    code = house.code_lines
    if len(code) >= WHOLE_BUDGET:
        yield f"the file has {len(code)} lines of code"
    for room in house.rooms:
        count = sum(room.start <= line < room.end for line in code)
        if count > BUDGETS.get(room.title, 0):
            yield f"{room.title} has {count} lines, may have {BUDGETS[room.title]}"


Rule = Callable[[House], Iterator[str]]
RULES: list[Rule] = [
    rooms_are_as_promised,
    rooms_use_only_rooms_above,
    dialects_meet_only_in_the_hub,
    pure_rooms_are_pure,
    private_names_stay_inside,
    functions_fit_one_screen,
    classes_are_small,
    imports_are_allowed,
    budgets_are_kept,
]


@pytest.fixture(scope="module")
def house() -> House:
    return House(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(house: House, rule: Rule) -> None:
    """Apply one rule to the file."""
    assert list(rule(house)) == []
