"""What the tree promises: import directions, dependencies, forbidden habits, sizes, top level."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("integrator", "merge", "pipelines", "fixtures")

FOUNDATIONS = (
    "integrator.crystal",
    "integrator.distributions",
    "integrator.records",
    "integrator.types",
)
# merge, from below: files, then the observations as tensors, the model's parts, the model
SMALL = (
    *(*FOUNDATIONS, "integrator.errors", "integrator.atomic", "integrator.torch_file"),
    *("merge.config", "merge.rows", "merge.hat_functions"),
)
DATA = (*SMALL, "merge.io", "merge.data")
PARTS = (*DATA, "merge.scale", "merge.prior", "merge.likelihood")
MODEL = (*PARTS, "merge.model", "merge.problem")
BELOW = ("integrator", "merge")
BASICS = (*BELOW, "pipelines.config", "pipelines.workspace")
#: Module prefix -> what of ours it may import (all in ``braggflux``); the most specific counts.
#: Each may also import from itself.
MAY_IMPORT = {
    "": ("integrator", "merge", "pipelines"),  # braggflux itself: public names, imported when used
    "integrator.errors": (),
    "integrator.atomic": ("integrator.errors",),
    "integrator.torch_file": ("integrator.atomic", "integrator.errors"),
    "integrator.crystal": ("integrator.errors",),
    "integrator.processes": ("integrator.errors",),
    "integrator.records": (),
    "integrator.distributions": ("integrator.records", "integrator.errors"),
    "integrator.types": ("integrator.distributions", "integrator.records"),
    "integrator.prediction": (*FOUNDATIONS, "integrator.io", "integrator.errors"),
    "integrator": (),
    "merge": (),
    "merge.config": (),
    "merge.hat_functions": (),
    "merge.rows": (*FOUNDATIONS, "integrator.errors"),
    "merge.io": (*SMALL, "integrator.io", "merge.output.merged_table", "merge.output.half_sets"),
    "merge.data": (*SMALL, "merge.io"),
    "merge.problem": (*DATA, "merge.indexing.operators"),
    "merge.prior": SMALL,
    "merge.scale": DATA,
    "merge.likelihood": (*DATA, "merge.scale.base"),
    "merge.model": (*PARTS, "integrator.processes"),
    "merge.output": MODEL,
    "merge.fit": (*MODEL, "merge.output", "integrator.processes"),
    "merge.stream": (*MODEL, "merge.output", "merge.fit", "integrator.processes"),
    "merge.indexing": (*MODEL, "merge.output", "merge.fit", "merge.stream"),
    "merge.indexing.operators": DATA,
    "fixtures": (
        "integrator.crystal",
        "integrator.types",
        "integrator.io",
        "integrator.errors",
        "integrator.atomic",
        "integrator.torch_file",
    ),
    "pipelines": BELOW,
    "pipelines.config": BELOW,
    "pipelines.workspace": (*BELOW, "pipelines.config", "pipelines.maps"),
    "pipelines.maps": BELOW,
    "pipelines.simulate": BELOW,
    "pipelines.inputs": BASICS,
    "pipelines.integration": (*BASICS, "pipelines.maps"),
    "pipelines.merging": (*BASICS, "pipelines.maps", "pipelines.inputs"),
    "pipelines.report": (*BASICS, "pipelines.maps"),
    "pipelines.compare": (*BASICS, "pipelines.report"),
    "pipelines.view": (
        *BASICS,
        "pipelines.maps",
        "pipelines.report",
        "pipelines.integration",
    ),
    "pipelines.deposition": (*BASICS, "pipelines.report"),
    "pipelines.dials": (
        *(*BASICS, "pipelines.report", "pipelines.compare", "pipelines.integration"),
        "pipelines.deposition",
    ),
    "pipelines.commands": (*BELOW, "pipelines"),
    "pipelines.api": (*BELOW, "pipelines"),
    # The doors to the simulator.
    "pipelines.commands.simulate": ("pipelines", "fixtures", "integrator.errors"),
    "pipelines.api.simulation": ("pipelines", "fixtures", "integrator.errors"),
}
TOP_LEVEL = {
    "pyproject.toml",
    "integrator",
    "merge",
    "pipelines",
    "tests",
    "fixtures",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "CITATION.cff",
    "Makefile",
    "mkdocs.yml",
    "docs",
    "benchmarks",
}
MAX_LINES, MAX_FUNCTION_LINES, MAX_COMMAND_LINES, MAX_MODULES = 400, 60, 80, 12
#: Name to import by, where it is not that of the distribution.
IMPORT_NAMES = {"pyyaml": "yaml"}
#: Not on PyPI for every platform, or for developers: code that needs them says so when missing.
OPTIONAL = {"dxtbx", "dials", "dials_data"}

#: Never imported here: numba imports it where it is installed, and needs a current one.
PINNED = {"coverage"}


@dataclass(frozen=True)
class Source:
    """One module, parsed once for all tests.

    Parameters
    ----------
    name : str
        Without the common ``braggflux``, for which the name is empty.
    imports : frozenset of str
        Absolute names of all imported modules; `from a import b` counts as `a.b`.
    """

    path: Path
    name: str
    text: str
    tree: ast.Module
    imports: frozenset[str]

    @property
    def ours(self) -> set[str]:
        """Names imported from our packages, without the common ``braggflux``."""
        return {n.removeprefix("braggflux.") for n in self.imports if is_within(n, "braggflux")}

    def calls(self) -> Iterator[ast.Call]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))


def parsed(path: Path, name: str) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return Source(path, name, text, tree, frozenset(found))


def is_within(module: str, prefix: str) -> bool:
    return not prefix or module == prefix or module.startswith(prefix + ".")


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    paths = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    modules = [parsed(p, n.removesuffix(".__init__")) for p, n in zip(paths, names, strict=True)]
    return [parsed(ROOT / ".src" / "braggflux" / "__init__.py", ""), *modules]


def test_import_directions(sources):
    idle = [p for p in MAY_IMPORT if not any(is_within(source.name, p) for source in sources)]
    wrong = [f"the rule of {prefix} is of nothing" for prefix in idle]
    for source in sources:
        rule = max((p for p in MAY_IMPORT if is_within(source.name, p)), key=len)
        wrong += [
            f"{source.name} must not import {name}"
            for name in sorted(source.ours)
            if not any(is_within(name, allowed) for allowed in (rule, *MAY_IMPORT[rule]))
        ]
        wrong += [
            f"{source.name} imports {name} without `braggflux.`"
            for name in sorted(source.imports)
            if name.split(".")[0] in (*PACKAGES, "tests")
        ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_catch_what_they_should(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from braggflux.merge.model import merger\nimport braggflux.integrator.io\n")
    assert parsed(file, "x").ours == {"merge.model.merger", "integrator.io"}
    assert not any(is_within("merge.model.merger", a) for a in MAY_IMPORT["integrator"])
    assert not any(is_within("integrator.io", a) for a in MAY_IMPORT["merge"])
    assert not any(is_within("integrator.model", a) for a in MAY_IMPORT["fixtures"])


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Modules that import each other, directly or over others."""
    reached = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return sorted(
        {tuple(sorted(m for m in reached[n] if n in reached[m])) for n in graph if n in reached[n]}
    )


def test_no_import_circle(sources):
    modules = {s.name: s for s in sources if s.path.name != "__init__.py"}
    graph = {
        name: {m for n in source.ours for m in (n, n.rpartition(".")[0]) if m in modules}
        for name, source in modules.items()
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]
    assert not circles(graph)


def names_of(requirements: list[str]) -> set[str]:
    """Names that distributions are imported by."""
    found = {re.match(r"[\w.-]+", text).group().lower() for text in requirements}
    return {IMPORT_NAMES.get(name, name) for name in found}


def test_what_is_imported_is_declared_and_the_other_way_round(sources):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = {name.split(".")[0] for source in sources for name in source.imports}
    imported -= {*sys.stdlib_module_names, "braggflux", *OPTIONAL}
    extras = project["optional-dependencies"]
    extra = {n for name in extras if name not in {"dev", "docs"} for n in names_of(extras[name])}
    assert imported == names_of(project["dependencies"]) - PINNED | extra
    of_tests = {
        name.split(".")[0]
        for path in (ROOT / "tests").rglob("*.py")
        for name in parsed(path, path.stem).imports
    }
    references = {"reciprocalspaceship"}
    assert references <= of_tests & names_of(project["optional-dependencies"]["dev"])


def forbidden_habits(source: Source) -> Iterator[str]:
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "IPython", "pdb"}
    yield from {n.split(".")[0] for n in source.imports} & banned_modules
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"
    for node in source.calls():
        name = getattr(node.func, "id", "")
        if name in {"print", "eval", "exec", "breakpoint", "__import__"}:
            yield f"line {node.lineno}: {name}"
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if keywords.get("allow_pickle") is True or keywords.get("weights_only") is False:
            yield f"line {node.lineno}: reads pickles"
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if (owner, called) == ("torch", "load") and keywords.get("weights_only") is not True:
            yield f"line {node.lineno}: torch.load"
        if (owner, called) in {("yaml", "load"), ("yaml", "unsafe_load")}:
            yield f"line {node.lineno}: yaml.{called}"


def test_no_forbidden_habits(sources, tmp_path):
    found = [f"{source.name}: {habit}" for source in sources for habit in forbidden_habits(source)]
    assert not found, "\n".join(found)
    file = tmp_path / "x.py"
    file.write_text(
        "import pickle\ntry:\n    print(1)\nexcept:\n    torch.load(x)\n"
        "numpy.load(x, allow_pickle=True)\nyaml.load(x)\n"
    )
    assert len(list(forbidden_habits(parsed(file, "x")))) == 6


def too_long(source: Source) -> Iterator[str]:
    is_command = source.path.parent == ROOT / "pipelines" / "commands"
    n_lines, limit = len(source.text.splitlines()), MAX_COMMAND_LINES if is_command else MAX_LINES
    if n_lines > limit:
        yield f"{n_lines} lines, {limit} allowed"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            documented = first.end_lineno - first.lineno + 1 if is_text else 0
            length = node.end_lineno - node.lineno + 1 - documented
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name}: {length} lines, {MAX_FUNCTION_LINES} allowed"


def test_sizes(sources):
    found = [f"{source.name}: {problem}" for source in sources for problem in too_long(source)]
    assert not found, "\n".join(found)


def test_no_folder_holds_too_many_modules(sources):
    n_modules = Counter(s.path.parent for s in sources if s.path.name != "__init__.py")
    full = {str(k.relative_to(ROOT)): n for k, n in n_modules.items() if n > MAX_MODULES}
    assert not full, f"{MAX_MODULES} allowed: {full}"


def test_modules_are_documented(sources):
    silent = [s.name for s in sources if s.text.strip() and not ast.get_docstring(s.tree)]
    assert not silent


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
        if path.is_file() and path.parent.name != "vendor":  # libraries of the report, unmodified
            assert path.stat().st_size < 400_000, f"{name} is large"
            assert b"\0" not in path.read_bytes()[:4096], f"{name} is binary"


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))
