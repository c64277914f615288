"""Charts rendered without Helm: the part of its template language that our chart uses, no more.

What the language has and this has not is an error here, so that a chart that this renders is
rendered by Helm too; where Helm is at hand, tests compare the two.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>-?\d+)|(?P<set>:=)|(?P<mark>[(),|])"""
    r"""|(?P<name>\$?\w*(?:\.\w+)+|\$\w*|\.|\w+))"""
)


class ChartError(Exception):
    """A chart that cannot be rendered: values that are wrong, or language that is not known."""


@dataclass
class _Node:
    """Text, an action, or a block (if, range, define) with its bodies."""

    kind: str
    words: str = ""
    body: list[_Node] = field(default_factory=list)
    other: list[_Node] = field(default_factory=list)


def _parse(source: str) -> list[_Node]:
    """Return the tree of a template."""
    root = _Node("root")
    stack: list[tuple[_Node, list[_Node]]] = [(root, root.body)]
    at, trim = 0, False
    for action in _ACTION.finditer(source):
        text = source[at : action.start()]
        text = text.lstrip() if trim else text
        stack[-1][1].append(_Node("text", text.rstrip() if action[1] else text))
        at, trim = action.end(), bool(action[3])
        words = action[2]
        if words.startswith("/*"):
            continue
        head, _, rest = words.partition(" ")
        if head in ("if", "range", "define"):
            node = _Node(head, rest)
            stack[-1][1].append(node)
            stack.append((node, node.body))
        elif head == "else":
            node = stack.pop()[0]
            if rest.startswith("if "):
                inner = _Node("if", rest[3:])
                node.other.append(inner)
                stack.append((node, node.other))
                stack[-1] = (inner, inner.body)
            elif rest:
                raise ChartError(f"not known here: {{{{ {words} }}}}")
            else:
                stack.append((node, node.other))
        elif head == "end":
            stack.pop()
            if not stack:
                raise ChartError("an end too many")
        else:
            stack[-1][1].append(_Node("action", words))
    if len(stack) != 1:
        raise ChartError(f"an end is missing: {stack[-1][0].words}")
    text = source[at:]
    root.body.append(_Node("text", text.lstrip() if trim else text))
    return root.body


def _to_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=False, sort_keys=True, width=10_000).rstrip()


def _text(value: object) -> str:
    """Value as Go prints it."""
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _indented(spaces: int, text: str) -> str:
    return "\n".join(" " * spaces + line for line in text.split("\n"))


def _fail(message: str) -> str:
    raise ChartError(message)


def _required(message: str, value: object) -> object:
    return value if value not in (None, "") else _fail(message)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *numbers: sum(numbers),
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "dict": lambda *words: dict(zip(words[::2], words[1::2], strict=True)),
    "eq": lambda left, right: left == right,
    "fail": _fail,
    "index": lambda value, key: value[key],
    "join": lambda between, values: between.join(map(_text, values)),
    "list": lambda *values: list(values),
    "ne": lambda left, right: left != right,
    "not": lambda value: not value,
    "nindent": lambda spaces, text: "\n" + _indented(spaces, text),
    "quote": lambda value: json.dumps(_text(value)),
    "required": _required,
    "toYaml": _to_yaml,
}


class _Renderer:
    """The templates of a chart, and what they see."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.defined: dict[str, list[_Node]] = {}

    def render(self, nodes: list[_Node], dot: Any, variables: dict[str, Any]) -> str:
        return "".join(self._parts(nodes, dot, variables))

    def _parts(self, nodes: list[_Node], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
        for node in nodes:
            if node.kind == "text":
                yield node.words
            elif node.kind == "define":
                self.defined[json.loads(node.words)] = node.body
            elif node.kind == "if":
                chosen = node.body if self._value(node.words, dot, variables) else node.other
                yield self.render(chosen, dot, dict(variables))
            elif node.kind == "range":
                yield from self._range(node, dot, variables)
            elif found := re.fullmatch(r"(\$\w+)\s*:=\s*(.*)", node.words, re.DOTALL):
                variables[found[1]] = self._value(found[2], dot, variables)
            else:
                yield _text(self._value(node.words, dot, variables))

    def _range(self, node: _Node, dot: Any, variables: dict[str, Any]) -> Iterator[str]:
        named = re.fullmatch(r"(\$\w+), (\$\w+) := (.*)", node.words)
        values = self._value(named[3] if named else node.words, dot, variables) or ()
        pairs = sorted(values.items()) if isinstance(values, dict) else list(enumerate(values))
        for key, value in pairs:
            inner = dict(variables)
            if named:
                inner |= {named[1]: key, named[2]: value}
            yield self.render(node.body, value, inner)

    def _value(self, words: str, dot: Any, variables: dict[str, Any]) -> Any:
        tokens = []
        at = 0
        while at < len(words):
            found = _TOKEN.match(words, at)
            if not found:
                raise ChartError(f"not known here: {words[at:]!r}")
            tokens.append((found.lastgroup, found[found.lastgroup or 0]))
            at = found.end()
        value, left = self._pipeline(tokens, dot, variables)
        if left:
            raise ChartError(f"not known here: {words}")
        return value

    def _pipeline(self, tokens: list[Any], dot: Any, variables: dict[str, Any]) -> tuple[Any, Any]:
        piped: list[Any] = []
        while True:
            arguments: list[Any] = []
            name = None
            while tokens and tokens[0][1] not in ("|", ")"):
                kind, word = tokens[0]
                tokens = tokens[1:]
                if word == "(":
                    value, tokens = self._pipeline(tokens, dot, variables)
                    tokens = tokens[1:]
                    arguments.append(value)
                elif kind == "name" and word[0] not in ".$" and name is None and not arguments:
                    name = word
                else:
                    arguments.append(self._operand(kind, word, dot, variables))
            arguments += piped
            if name == "include":
                called, inner = arguments
                if called not in self.defined:
                    raise ChartError(f"no template {called}")
                value = self.render(self.defined[called], inner, {"$": inner})
            elif name:
                if name not in FUNCTIONS:
                    raise ChartError(f"no function {name}")
                value = FUNCTIONS[name](*arguments)
            else:
                (value,) = arguments
            if not tokens or tokens[0][1] == ")":
                return value, tokens
            piped, tokens = [value], tokens[1:]

    def _operand(self, kind: str, word: str, dot: Any, variables: dict[str, Any]) -> Any:
        if kind == "text":
            return json.loads(word)
        if kind == "number":
            return int(word)
        start, *path = word.split(".")
        if start and start not in variables:
            raise ChartError(f"no variable {word}")
        value = variables[start] if start else dot
        for step in filter(None, path):
            if value is None:
                raise ChartError(f"nil pointer evaluating {word}")
            value = value.get(step)
        return value


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values over those of before, as Helm merges them: maps by key, null takes a key away."""
    made = copy.deepcopy(base)
    for key, value in over.items():
        if value is None:
            made.pop(key, None)
        elif isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] = merged(made[key], value)
        else:
            made[key] = copy.deepcopy(value)
    return made


def render(chart: Path, *values: dict[str, Any], name: str, revision: int = 1) -> dict[str, str]:
    """Render a chart as ``helm template`` does.

    Args:
        chart: Folder of the chart.
        values: Values over its own; later ones win.
        name: Name of the release.
        revision: Number of the install or upgrade.

    Returns:
        Texts of its templates by file name; those that make nothing are left out.

    Raises:
        ChartError: Values do not fit, or a template fails or has what is not known here.
    """
    used = yaml.safe_load((chart / "values.yaml").read_text("utf-8"))
    for one in values:
        used = merged(used, one)
    schema = json.loads((chart / "values.schema.json").read_text("utf-8"))
    for error in jsonschema.Draft7Validator(schema).iter_errors(used):
        raise ChartError(f"{error.json_path}: {error.message}")
    root = {"Values": used, "Release": {"Name": name, "Revision": revision, "Namespace": "default"}}
    renderer = _Renderer(root)
    files = sorted((chart / "templates").iterdir())
    trees = {file.name: _parse(file.read_text("utf-8")) for file in files}
    for nodes in trees.values():
        for node in nodes:
            if node.kind == "define":
                renderer.defined[json.loads(node.words)] = node.body
    texts = {
        name: renderer.render(nodes, root, {"$": root})
        for name, nodes in trees.items()
        if not name.startswith("_")
    }
    return {name: text for name, text in texts.items() if text.strip()}
