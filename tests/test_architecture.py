"""The rules of the house that no linter knows: arrows, sizes, documented settings, nothing unsafe."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path for name in ("agent", "env", "runtime") for path in (ROOT / name).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70

PRINTS = {
    "agent/cli.py": None,
    "runtime/node/commands.py": 1,
    "runtime/node/run.py": 2,
    "runtime/testbed/load.py": 1,
    "runtime/testbed/shaping.py": 2,
}
"""Where the packages may print, and how often: the command line, and what a process tells the one that started it."""

REQUIRED_FIELDS = {
    "Deployment.model",
    "Deployment.nodes",
    "LinkConfig.between",
    "LinkConfig.emulate",
    "LoadConfig.model",
    "LoadConfig.target",
    "ModelConfig.spec",
    "NodeConfig.address",
    "NodeConfig.name",
    "NodeConfig.tier",
    "RelayConfig.target",
    "WorkerConfig.model",
    "WorkerConfig.tier",
}
"""Settings that no default could be right for; positional arguments of a command show it by their type."""

UNSAFE = re.compile(
    r"\bimport (c?pickle|dill|cloudpickle|marshal|shelve)\b"
    r"|from (c?pickle|dill|cloudpickle|marshal|shelve) import (?!UnpicklingError$)"
    r"|(send|recv)_pyobj|\bshell=True|(?<![\w.])(eval|exec)\(|weights_only=False"
)
"""Whatever could run code that came over the wire or out of a file. Catching a refused pickle is allowed."""


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


def _is_config(node: ast.AST) -> bool:
    """A keyword-only dataclass is a set of options; other dataclasses are records."""
    return isinstance(node, ast.ClassDef) and any(
        isinstance(mark, ast.Call)
        and ast.unparse(mark.func).endswith("dataclass")
        and any(word.arg == "kw_only" for word in mark.keywords)
        for mark in node.decorator_list
    )


def test_imports_follow_the_contracts():
    linter = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("module", ["runtime", "runtime.deployment", "runtime.planning.problem", "agent.cli"])
def test_deciding_and_asking_for_help_load_no_torch(module: str):
    code = f"import sys, {module}; print([m for m in ('torch', 'zmq', 'gymnasium') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*PACKAGES, *SCRIPTS, *TESTS], ids=_name)
def test_a_file_and_its_functions_can_be_read_at_a_sitting(path: Path):
    assert path.read_text(encoding="utf-8").count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in _nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_setting_is_documented_and_has_a_default():
    undocumented, required = [], set()
    for path in PACKAGES:
        for config in filter(_is_config, _nodes(path)):
            assert isinstance(config, ast.ClassDef)
            for field, after in zip(config.body, [*config.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    name = f"{config.name}.{ast.unparse(field.target)}"
                    if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                        undocumented.append(name)
                    if field.value is None and "Positional" not in ast.unparse(field.annotation):
                        required.add(name)
    assert undocumented == []
    assert required == REQUIRED_FIELDS


@pytest.mark.parametrize("path", [*PACKAGES, *SCRIPTS], ids=_name)
def test_nothing_unsafe_is_called(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line}" for number, line in enumerate(lines, 1) if UNSAFE.search(line)] == []


@pytest.mark.parametrize("path", PACKAGES, ids=_name)
def test_only_the_command_line_and_the_ready_line_print(path: Path):
    prints = [
        node.lineno
        for node in _nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    allowed = PRINTS.get(_name(path), 0)
    assert allowed is None or len(prints) <= allowed, f"prints in lines {prints}"


def test_git_keeps_every_package():
    ignored = subprocess.run(
        ["git", "check-ignore", *map(_name, PACKAGES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ignored.stdout == ""
