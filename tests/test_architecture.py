"""What the tree promises: import directions, forbidden habits, sizes and the top level."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("integrator", "merge", "pipelines", "fixtures")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
COMMANDS = sorted((ROOT / "pipelines" / "commands").glob("*.py"))

FOUNDATIONS = (
    "integrator.crystal",
    "integrator.distributions",
    "integrator.records",
    "integrator.types",
)
#: Module prefix -> what of ours it may import (all in ``braggflux``); the most specific counts.
MAY_IMPORT = {
    "integrator.errors": (),
    "integrator.atomic": ("integrator.errors",),
    "integrator.crystal": ("integrator.crystal", "integrator.errors"),
    "integrator.records": (),
    "integrator.distributions": (
        "integrator.distributions",
        "integrator.errors",
        "integrator.records",
    ),
    "integrator.types": ("integrator.distributions", "integrator.records"),
    "integrator": ("integrator",),
    "merge": ("merge", *FOUNDATIONS, "integrator.errors", "integrator.atomic"),
    "merge.io": ("merge", *FOUNDATIONS, "integrator.errors", "integrator.atomic", "integrator.io"),
    "fixtures": (
        "fixtures",
        "integrator.crystal",
        "integrator.types",
        "integrator.io",
        "integrator.errors",
        "integrator.atomic",
    ),
    "pipelines": ("pipelines", "integrator", "merge"),
    # `braggflux simulate` is the one door to the simulator.
    "pipelines.commands.simulate": ("pipelines", "fixtures", "integrator.errors"),
}
TOP_LEVEL = {
    "pyproject.toml",
    "integrator",
    "merge",
    "pipelines",
    "tests",
    "fixtures",
    "README.md",
    "LICENSE",
    "Makefile",
    "docs",
    "benchmarks",
}
MAX_LINES, MAX_FUNCTION_LINES, MAX_COMMAND_LINES = 400, 60, 80


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def imports(path: Path) -> set[str]:
    """Absolute names of all imported modules; `from a import b` counts as `a.b`."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Names imported from our packages, without the common ``braggflux``."""
    return {n.removeprefix("braggflux.") for n in imports(path) if is_within(n, "braggflux")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_import_directions(path):
    module = name_of(path)
    rule = max((p for p in MAY_IMPORT if is_within(module, p)), key=len)
    wrong = {n for n in ours(path) if not any(is_within(n, a) for a in MAY_IMPORT[rule])}
    assert not wrong, f"{module} must not import {sorted(wrong)}"
    bare = {n for n in imports(path) if n.split(".")[0] in (*PACKAGES, "tests")}
    assert not bare, f"{module} imports {sorted(bare)} without `braggflux.`"


def test_the_rules_catch_what_they_should(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from braggflux.merge.model import merger\nimport braggflux.integrator.io\n")
    assert ours(file) == {"merge.model.merger", "integrator.io"}
    assert not any(is_within("merge.model.merger", a) for a in MAY_IMPORT["integrator"])
    assert not any(is_within("integrator.io", a) for a in MAY_IMPORT["merge"])
    assert not any(is_within("integrator.model", a) for a in MAY_IMPORT["fixtures"])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or over others."""
    reached = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return sorted(
        {tuple(sorted(m for m in reached[n] if n in reached[m])) for n in graph if n in reached[n]}
    )


def test_no_import_circle():
    modules = {name_of(path): path for path in MODULES if path.name != "__init__.py"}
    graph = {
        name: {m for n in ours(path) for m in (n, n.rpartition(".")[0]) if m in modules}
        for name, path in modules.items()
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]
    assert not circles(graph)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_forbidden_habits(path):
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "IPython", "pdb"}
    assert not {n.split(".")[0] for n in imports(path)} & banned_modules
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            banned = {"print", "eval", "exec", "breakpoint", "__import__"}
            assert node.func.id not in banned, f"line {node.lineno}: {node.func.id}"
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        assert keywords.get("allow_pickle") is not True, f"line {node.lineno}"
        assert keywords.get("weights_only") is not False, f"line {node.lineno}"
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if (owner, called) == ("torch", "load"):
            assert keywords.get("weights_only") is True, f"line {node.lineno}: torch.load"
        assert (owner, called) not in {("yaml", "load"), ("yaml", "unsafe_load")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes(path):
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = MAX_COMMAND_LINES if path in COMMANDS else MAX_LINES
    assert n_lines <= limit, f"{n_lines} lines, {limit} allowed"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            documented = first.end_lineno - first.lineno + 1 if is_text else 0
            length = node.end_lineno - node.lineno + 1 - documented
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_documented(path):
    assert ast.get_docstring(tree_of(path)) or not path.read_text().strip()


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "-C", str(ROOT), "ls-files"]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()


def test_top_level():
    found = {name.split("/")[0] for name in tracked_files()}
    visible = {name for name in found if not name.startswith(".")}
    assert visible <= TOP_LEVEL, f"not wanted at the top: {sorted(visible - TOP_LEVEL)}"
    assert TOP_LEVEL - {"docs", "benchmarks"} <= visible, f"missing: {sorted(TOP_LEVEL - visible)}"


def test_no_large_or_binary_files_are_tracked():
    for name in tracked_files():
        path = ROOT / name
        if path.is_file():
            assert path.stat().st_size < 400_000, f"{name} is large"
            assert b"\0" not in path.read_bytes()[:4096], f"{name} is binary"


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))
