"""Rules about the sources themselves: who imports whom, what is never used, what is documented."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room imports rooms of lower rank and itself, nothing else of the project. Equal ranks don't know each other.
RANKS = {
    "errors": 0,
    "registry": 0,
    "version": 0,
    "config": 1,
    "sizes": 1,
    "patch": 2,
    "update": 2,
    "repair": 3,
    "models": 3,
    "data": 4,
    "evaluation": 5,
    "emulators": 6,
    "tuning": 6,
    "heads": 6,
    "bundle": 7,
    "wire": 7,
    "data_owner": 8,
    # Above its twin, because the owner's emulated network is the client's own. A client app knows no owner at all.
    "owner": 9,
    "local": 9,
    "client_app": 10,
    "alignment": 10,
    "measure": 10,
    "choosing": 11,
    "strategies": 11,
    "apps": 12,
    "comparing": 12,
    "cli": 13,
    "offsite_fl": 14,  # the package's own __init__: a facade over everything, so nothing inside may import it
    "simulations": 15,
}
# The registry raises errors, and errors import nothing: the one step that is allowed inside rank 0.
SAME_RANK = {("registry", "errors")}

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec", "yaml.load", "os.system"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE = sources("offsite_fl", "strategies")
ALL = [*PACKAGE, *sources("simulations")]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "offsite_fl":
        return parts[0]
    return "offsite_fl" if parts[1] == "__init__" else parts[1]


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, relative imports resolved against ``package``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            if module == "offsite_fl":  # from offsite_fl import config: the room is in the name
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def rooms_imported(text: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """The project's rooms that a file imports, with the line."""
    found = []
    for line, module in imported_modules(ast.parse(text), package):
        first, *rest = module.split(".")
        if first == "offsite_fl":
            found.append((line, rest[0] if rest and rest[0] in RANKS else "offsite_fl"))
        elif first in ("simulations", "strategies", "tests"):
            found.append((line, first))
    return found


def violations(room: str, imports: list[tuple[int, str]]) -> list[str]:
    return [
        f"line {line}: {room} (rank {RANKS[room]}) imports {other}"
        for line, other in imports
        if other != room and (room, other) not in SAME_RANK and RANKS.get(other, 99) >= RANKS[room]
    ]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_uses(text: str) -> list[str]:
    """Pickle in any form, evaluation of text, and anything but ``trust_remote_code=False``."""
    tree = ast.parse(text)
    found = [
        f"line {line}: imports {module}"
        for line, module in imported_modules(tree, ())
        if UNSAFE_MODULES & set(module.split("."))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in UNSAFE_CALLS:
                found.append(f"line {node.lineno}: calls {dotted(node.func)}")
            for keyword in node.keywords:
                refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle") and not refused:
                    found.append(f"line {node.lineno}: {keyword.arg} isn't the literal False")
    return found


def undocumented(text: str) -> list[str]:
    """Public functions and classes, and the module itself, without a docstring; ruff holds the methods."""
    tree = ast.parse(text)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(node.name)
    return missing


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parent.parts
    if package[0] == "strategies":
        package = ("offsite_fl", *package)
    bad = violations(room_of(path), rooms_imported(path.read_text(), package))
    # Inside the repository the folder has another name than when installed; only the installed one may be imported.
    bad += [
        f"line {line}: import offsite_fl.strategies, not strategies"
        for line, module in imported_modules(ast.parse(path.read_text()), package)
        if module.split(".")[0] == "strategies"
    ]
    assert not bad, bad


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_and_no_remote_code(path: Path) -> None:
    assert not unsafe_uses(path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_are_documented(path: Path) -> None:
    assert not undocumented(path.read_text())


def test_every_source_has_a_rank() -> None:
    assert {room_of(path) for path in ALL} <= set(RANKS)


def test_every_subpackage_is_listed_for_the_build() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in sources("offsite_fl")}
    folders |= {"offsite_fl." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources("strategies")}
    assert folders <= listed


@pytest.mark.parametrize(
    ("room", "text", "package"),
    [
        ("config", "from offsite_fl.models.blocks import find_blocks", ("offsite_fl",)),
        ("models", "import offsite_fl.cli", ("offsite_fl", "models")),
        ("tuning", "from ..emulators import base", ("offsite_fl", "tuning")),
        ("bundle", "def f():\n    from offsite_fl import owner", ("offsite_fl", "bundle")),
        ("wire", "from offsite_fl import ModelOwner", ("offsite_fl", "wire")),
        ("strategies", "import simulations.pico", ("offsite_fl", "strategies")),
    ],
)
def test_the_import_scan_sees_a_wrong_direction(room: str, text: str, package: tuple[str, ...]) -> None:
    assert violations(room, rooms_imported(text, package))


@pytest.mark.parametrize(
    ("room", "text", "package"),
    [
        ("models", "from .blocks import find_blocks\nfrom ..errors import ModelError", ("offsite_fl", "models")),
        ("strategies", "from offsite_fl.owner import ModelOwner\nimport flwr", ("offsite_fl", "strategies")),
        ("simulations", "import offsite_fl\nfrom simulations.texts import bible", ("simulations",)),
    ],
)
def test_the_import_scan_lets_the_right_direction_pass(room: str, text: str, package: tuple[str, ...]) -> None:
    assert not violations(room, rooms_imported(text, package))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import dumps",
        "import torch.utils.pickle",
        "import torch\ntorch.load('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "numpy.load('x', allow_pickle=True)",
        "eval('1 + 1')",
    ],
)
def test_the_safety_scan_sees(text: str) -> None:
    assert unsafe_uses(text)


def test_the_safety_scan_lets_ordinary_code_pass() -> None:
    assert not unsafe_uses("import json\nmodel.eval()\nAutoConfig.for_model('llama', trust_remote_code=False)")


def test_the_tests_that_the_table_of_faults_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*$", text, re.MULTILINE)
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(rows) >= 16 and len(named) >= len(rows)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing
