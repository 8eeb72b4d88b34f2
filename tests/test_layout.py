"""The order of the modules: which may import which, what lies where, and how long commands are."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import PRODUCT, REPOSITORY

COMMANDS = {"simclr", "simclr_lin", "plot", "compare"}
ROOMS = {"images", "training", "evaluation", "system"}
FLOORS = {  # where a module of each place may import from, its own place left out
    "models": set(),
    "system": {"models"},
    "images": {"system", "models"},
    "training": {"system", "models"},
    "evaluation": {"training", "images", "system", "models"},
    "config": {"evaluation", "training", "images", "system", "models"},
    **{command: {"config", "models", *ROOMS} for command in COMMANDS},
}


def module(path):
    """The name by which a file of the repository is imported."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in PRODUCT}


def imports(text):
    """The modules of this repository that a source text imports, wherever in it."""
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
    here, there = name.split(".")[0], imported.split(".")[0]
    return here != there and there not in FLOORS[here]


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_up(name):
    assert [there for there in ours(MODULES[name].read_text()) if runs_up(name, there)] == []


def test_imports_form_no_cycle():
    graph = {name: ours(path.read_text()) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 40  # the imports are really found
    TopologicalSorter(graph).prepare()


def test_an_import_that_runs_up_and_a_cycle_would_be_found():
    late = "def f():\n    import config\n    from training import optim, state as s\n"
    assert ours(late + "from images.folder import load_images\nimport torch") == {
        "config", "training.optim", "training.state", "images.folder",
    }  # fmt: skip
    assert runs_up("images.augment", "training.optim") and runs_up("training.optim", "images")
    assert runs_up("system.files", "config") and runs_up("models", "system.errors")
    assert runs_up("evaluation.results", "simclr") and runs_up("plot", "compare")
    assert not runs_up("training.state", "training.record") and not runs_up("config", "models")
    with pytest.raises(CycleError):
        TopologicalSorter({"training.state": {"training.record"}, "training.record": {
            "training.state"}}).prepare()  # fmt: skip


def test_files_lie_where_they_belong():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == {"config", "models", *COMMANDS}
    assert {path.parent.name for path in PRODUCT if path.parent != REPOSITORY} == ROOMS


def lines(path):
    return len(path.read_text().splitlines())


def test_commands_and_the_training_loop_are_short():
    for name in ("simclr", "simclr_lin"):
        assert lines(MODULES[name]) <= 200
    functions = ast.walk(ast.parse(MODULES["simclr"].read_text()))
    [train] = [node for node in functions if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno + 1 <= 45


POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
EVERYWHERE = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV"}  # signals of Windows
EVERYWHERE |= {"SIG_DFL", "SIG_IGN"}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_stands_against_windows(name):
    """No module, signal or function that only POSIX systems have, and no encoding left to them."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert not POSIX_ONLY & set(imports(ast.unparse(tree)))
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if isinstance(node, ast.Attribute) and text.startswith("signal.SIG"):
            assert node.attr in EVERYWHERE, f"{text}: take it by getattr"
        assert text not in ("os.fork", "os.getuid", "os.geteuid", "os.killpg", "os.sysconf"), text
        if isinstance(node, ast.Call) and text.split("(")[0].endswith(
            (".read_text", ".write_text")
        ):
            assert "encoding=" in text, f"{text}: Windows would take its own encoding"
