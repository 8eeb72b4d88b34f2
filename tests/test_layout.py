"""The order of the modules: which may import which, how long they are, and how they call."""

import ast
import io
import tokenize
from graphlib import TopologicalSorter

import pytest
from conftest import PRODUCT, REPOSITORY

COMMANDS = {"simclr", "simclr_lin", "plot", "compare"}
ROOMS = {"images", "training", "evaluation", "system"}
FLOORS = {  # where a module may import from, its own room left out
    "config": set(),
    "models": set(),
    "system": {"config", "models"},
    "images": {"config", "system"},
    "training": {"config", "models", "system"},
    "evaluation": {"config", "images", "system", "training.optim"},
    **{command: {"config", "models", *ROOMS} for command in COMMANDS},
}


def module(path):
    """The name by which a file of the repository is imported."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in PRODUCT}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def imports(text):
    """The modules that a source text imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def ours(text):
    """The imports of `text` that are in MODULES."""
    return {name for name in imports(text) if name in MODULES}


def runs_up(name, imported):
    """Whether the module `name` may not import the module `imported`."""
    room = name.split(".")[0]
    allowed = set() if name == "system.errors" else {room, *FLOORS[room]}
    return not {imported, imported.split(".")[0]} & allowed


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_up(name):
    assert [imported for imported in ours(TEXTS[name]) if runs_up(name, imported)] == []


def test_an_import_that_runs_up_would_be_found():
    late = "def f():\n    import config\n    from training import optim, state as s\n"
    assert ours(f"{late}from images.folder import load_images\nimport torch") == {
        "config", "training.optim", "training.state", "images.folder",
    }  # fmt: skip
    assert runs_up("images.augment", "training.optim") and runs_up("training.optim", "images")
    assert runs_up("system.errors", "system.files") and runs_up("config", "system.errors")
    assert runs_up("evaluation.results", "training.run") and runs_up("plot", "compare")
    assert not runs_up("evaluation.classifiers", "training.optim")
    assert not runs_up("training.run", "training.state") and not runs_up("system.files", "config")


def test_imports_form_no_cycle():
    graph = {name: ours(text) - {name} for name, text in TEXTS.items()}
    assert sum(map(len, graph.values())) > 40  # the imports are really found
    TopologicalSorter(graph).prepare()


def test_files_lie_where_they_belong():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == {"config", "models", *COMMANDS}
    assert {path.parent.name for path in PRODUCT if path.parent != REPOSITORY} == ROOMS


def test_simclr_needs_few_modules_and_compare_neither_training_nor_tensorboard():
    assert len(ours(TEXTS["simclr"])) <= 12
    needed, new = set(), {"compare"}
    while new:
        needed |= new
        new = {name for module in new for name in ours(TEXTS[module])} - needed
    assert "evaluation.results" in needed
    for name in needed:
        assert not name.startswith("training") and "tensorboard" not in TEXTS[name], name


DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef


def code_lines(text):
    """The numbers of the lines that are neither blank nor comment nor docstring."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            found |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            found -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return found


def test_the_house_is_small():
    text = '"""A docstring\nof two lines."""\n\n# a comment\nx = """a\nb"""  # no docstring\n'
    assert code_lines(text) == {5, 6}
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert sum(lines.values()) <= 3500
    assert sum(len(code_lines(text)) for text in TEXTS.values()) <= 2400
    assert {name: n for name, n in lines.items() if n > 250} == {}
    for name, text in TEXTS.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (name, node.name)


@pytest.mark.parametrize("name", MODULES)
def test_a_call_says_which_value_is_what(name):
    """At most five values by position; in the two scripts no tuple spliced into a call."""
    for node in ast.walk(ast.parse(TEXTS[name])):
        if isinstance(node, ast.Call):
            spliced = any(isinstance(value, ast.Starred) for value in node.args)
            assert len(node.args) <= 5, ast.unparse(node)
            assert not spliced or name not in ("simclr", "simclr_lin"), ast.unparse(node)


POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
EVERYWHERE = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV"}  # signals of Windows
EVERYWHERE |= {"SIG_DFL", "SIG_IGN"}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_stands_against_windows(name):
    """No module, signal or function that only POSIX systems have, and no encoding left to them."""
    tree = ast.parse(TEXTS[name])
    assert not POSIX_ONLY & set(imports(TEXTS[name]))
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if isinstance(node, ast.Attribute) and text.startswith("signal.SIG"):
            assert node.attr in EVERYWHERE, f"{text}: take it by getattr"
        assert text not in ("os.fork", "os.getuid", "os.geteuid", "os.killpg", "os.sysconf"), text
        if isinstance(node, ast.Call) and text.split("(")[0].endswith(
            (".read_text", ".write_text")
        ):
            assert "encoding=" in text, f"{text}: Windows would take its own encoding"
