"""The house: which room may import which, and that every file has a room."""

import ast

import pytest
from conftest import ROOT

# A room imports from the rooms before it and from itself, also inside a function. The scripts that
# are read beside the paper are rooms of their own.
ORDER = (
    ("metrics", "runtime"),
    ("data",),
    ("student",),
    ("sampling", "training"),
    ("evaluation",),
    ("scale_model",),
    ("spd",),
    ("selfdistill", "evaluate"),
    ("apo",),
    ("experiment", "tools"),  # use all of them and nothing uses them
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SCRIPTS = {"data", "student", "sampling", "training", "spd", "selfdistill", "apo", "evaluate"}
FOLDERS = {"metrics", "runtime", "evaluation", "scale_model", "experiment", "tools"}


def sources():
    """{path: room} of every Python file outside tests/, a file without a place included as None."""
    found = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/**/*.py")]:
        name = path.relative_to(ROOT)
        if name.parts[0] in ("tests", "runs") or name.parts[0].startswith("."):
            continue
        room = name.stem if len(name.parts) == 1 else name.parts[0]
        found[path] = room if len(name.parts) <= 2 and room in RANK else None
    return found


def imported(path):
    """[(line, dotted name)] of what a file imports, wherever it does.

    `from a import b` gives a.b too.
    """
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.name if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return names


def modules_of(path, room):
    """Modules of the same room that a file imports, by file name."""
    inside = {other.stem for other in path.parent.glob("*.py")} - {"__init__"}
    for _, name in imported(path):
        first, _, rest = name.partition(".")
        if first == room and rest.split(".")[0] in inside:
            yield rest.split(".")[0]
        elif room == "tools" and first in inside:  # scripts beside each other
            yield first


def test_there_are_eight_scripts_and_every_file_has_a_room():
    homeless = [str(path.relative_to(ROOT)) for path, room in sources().items() if room is None]
    assert homeless == []
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS == set(RANK) - FOLDERS


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = sources()[path]
    tools = {file.stem for file in (ROOT / "tools").glob("*.py")}
    for line, name in imported(path):
        first = name.split(".")[0]
        other = "tools" if room == "tools" and first in tools and first not in RANK else first
        if other in RANK:
            one_way = RANK[other] < RANK[room] or other == room
            assert one_way, f"{path}:{line}: {room} imports {name}"
        else:
            assert first not in tools, f"{path}:{line}: {room} imports {name} of tools/"


@pytest.mark.parametrize("room", sorted(FOLDERS))
def test_there_is_no_circle_inside_a_room(room):
    graph = {
        path.stem: set(modules_of(path, room)) - {path.stem}
        for path in (ROOT / room).glob("*.py")}
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"a circle in {room}/: {graph}"
        for name in free:
            del graph[name]
