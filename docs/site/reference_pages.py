"""Pages of the reference, read from the code: commands, options, error messages."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from braggflux.merge.config import MergeConfig
from braggflux.pipelines.cli import build_parser
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipelines", "integrator", "merge", "fixtures")
#: Root of the exceptions whose message the user sees as one line.
ERROR = "UserError"


def commands_page() -> str:
    """Help of every command: description, arguments, options in their groups."""
    parser = build_parser()
    parts = [
        "# Commands\n\nWritten from the program's own help. Exit codes: 0 success, 2 a mistake in "
        "what was given (one line on stderr), 130 interrupted.\n",
        f"```text\n{plain(parser.format_usage())}\n```\n",
        *option_tables(parser),
    ]
    for name, command in subcommands(parser).items():
        parts += [f"\n## braggflux {name}\n\n{description(command.description or '')}\n"]
        parts += option_tables(command)
        for below, nested in subcommands(command).items():
            parts += [
                f"\n### braggflux {name} {below}\n\n{description(nested.description or '')}\n"
            ]
            parts += option_tables(nested)
    return "\n".join(parts)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of the commands below a parser, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def description(text: str) -> str:
    """Docstring of a command as Markdown: its examples are code."""
    before, _, examples = text.strip().partition("\nExamples\n--------\n")
    before = re.sub(r"``(.+?)``", r"`\1`", before).replace("<", "&lt;")
    return before + (f"\n\n```bash\n{examples.strip()}\n```" if examples else "")


def option_tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Give a table for each group of arguments."""
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help is not argparse.SUPPRESS
            and not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        ]
        if actions:
            rows = [
                f"| `{invocation(a)}`{{ .flag }} | {cell(expanded(a, parser))} |" for a in actions
            ]
            title = (group.title or "options").replace("positional arguments", "arguments")
            yield "\n".join([f"\n| {title} | |", "|---|---|", *rows]) + "\n"


def expanded(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """Help text with its %-formats filled in."""
    return parser._get_formatter()._expand_help(action) if action.help else ""


def invocation(action: argparse.Action) -> str:
    """Names and value of an option, or the name of an argument."""
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    shown = " ".join(value) if isinstance(value, tuple) else value
    return f"{', '.join(action.option_strings)} {shown}".strip()


def options_page() -> str:
    """Every option of `run`, `process` and of `merge`: key, default, type, help."""
    head = (
        "# Options\n\nEvery option by its key: `--set KEY=VALUE` on the command line, or a YAML "
        "file for `--config`. Flags are options with a name of their own "
        "([commands](commands.md)). The `config.yaml` of a run holds all of them.\n"
    )
    parts = [head, "\n## Of `run` and `process`\n", *option_rows(RunConfig())]
    parts += ["\n## Of `merge`\n", *option_rows(MergeConfig())]
    return "\n".join(parts)


def option_rows(options: Any, prefix: str = "", title: str = "") -> Iterator[str]:
    """Give the table of a dataclass, then those of its sections."""
    hints, texts = get_type_hints(type(options)), schema.field_help(type(options))
    values = {name: getattr(options, name) for name in texts}
    plain_values = {n: v for n, v in values.items() if not is_dataclass(v)}
    rows = [
        f"| `{prefix}{name}` | {cell(texts[name])} | {schema.type_name(hints[name])} "
        f"| `{default(value)}` |"
        for name, value in plain_values.items()
    ]
    if title:
        yield f"\n### {title}\n"
    if rows:
        yield "\n".join(["| key | | value | default |", "|---|---|---|---|", *rows]) + "\n"
    for name, value in values.items():
        if is_dataclass(value):
            first = (type(value).__doc__ or "").partition("\n")[0]
            yield from option_rows(value, f"{prefix}{name}.", f"`{prefix}{name}`: {first}")


def default(value: Any) -> str:
    """Value as a YAML file has it."""
    plain_value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain_value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def errors_page() -> str:
    """Every refusal in the program's own words, by the place that says it."""
    parts = [
        "# Every error message\n\nWhat the program refuses, in its own words; `...` stands for "
        "what it fills in. Search the page for a piece of the line that you see. Exit code 2.\n"
    ]
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    kinds = {ERROR} | {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == ERROR for base in node.bases)
    }
    for path, tree in trees.items():
        if lines := sorted(set(messages(tree, kinds))):
            module = str(path.relative_to(ROOT))
            summary = ast.get_docstring(tree) or ""
            first = re.sub(r":\w+:`", "`", " ".join(summary.split("\n\n")[0].split()))
            parts += [f"\n## `{module}`\n\n{cell(first)}\n", *(f"- {cell(m)}" for m in lines)]
    return "\n".join(parts) + "\n"


def messages(tree: ast.Module, kinds: set[str]) -> Iterator[str]:
    """Give the texts of the errors of these kinds that a module raises."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in kinds and node.args:
            text = " ".join(literal(node.args[0]).split())
            if len(text.replace("...", "").split()) > 3:
                yield text


def literal(node: ast.expr) -> str:
    """Text of a string expression, with `...` for what is computed."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(literal(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return literal(left) + literal(right)
    return "..."


def cell(text: str) -> str:
    """Text that may stand in a table or list: no bars, no tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def plain(text: str) -> str:
    """Usage without its margin."""
    return text.strip()
