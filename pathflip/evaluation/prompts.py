"""Prompts of zero-shot evaluation: templates, classes, and the tasks of a suite.

A task file is YAML::

    templates: [CLASSNAME]           # or single, or ensemble; a task may have its own
    neutral: tissue                  # for contrast: neutral
    tasks:
    - name: necrosis                 # presence of a finding
      label: necrosis                # column of the slides' labels
      kind: presence
      prompts: [areas of necrosis]
      negative_prompts: [no necrosis]
      score: local
      contrast: none
    - name: TP53                     # binary: the score is positive minus negative
      label: TP53_mutation
      kind: binary
      prompts: [a TP53 gene mutation]
      negative_prompts: [no TP53 gene mutation]
    - name: organ
      label: organ
      kind: multiclass
      classes: {colon: [colonic mucosa], lung: [lung parenchyma, lung]}

A task of tiles is a file of its own (:func:`read_tile_task`); those of public sets are in
``pathflip/templates/tasks``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from pathflip.errors import ConfigError
from pathflip.interop.tables import clean, is_unknown, read_text

PLACEHOLDER = "CLASSNAME"
TEMPLATES: tuple[str, ...] = (
    "a histopathology image of CLASSNAME.",
    "an H&E stained section showing CLASSNAME.",
    "a whole slide image with CLASSNAME.",
    "CLASSNAME.",
    "CLASSNAME is present.",
    "CLASSNAME is seen on this slide.",
    "there is CLASSNAME.",
    "the sections show CLASSNAME.",
    "microscopy reveals CLASSNAME.",
    "histology consistent with CLASSNAME.",
    "a tissue section containing CLASSNAME.",
    "a slide diagnosed as CLASSNAME.",
    "features of CLASSNAME are identified.",
    "a pathology specimen with CLASSNAME.",
    "a haematoxylin and eosin image of CLASSNAME.",
    "morphology typical of CLASSNAME.",
    "the biopsy demonstrates CLASSNAME.",
    "the resection specimen contains CLASSNAME.",
    "light microscopy of CLASSNAME.",
    "an example of CLASSNAME under the microscope.",
)
"""The ensemble; the first is ``single``. Written for this project."""
NEUTRAL = "tissue"

Kind = Literal["binary", "multiclass", "presence"]
Source = Literal["global", "local", "sum"]
Contrast = Literal["negation", "others", "neutral", "none"]

_POSITIVE = frozenset({"1", "1.0", "true", "yes", "positive", "pos", "present", "mutated"})
_NEGATIVE = frozenset(
    {"0", "0.0", "false", "no", "negative", "neg", "absent", "wild type", "wildtype", "wild-type"}
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A zero-shot classification task.

    Attributes:
        name: Name of the task in the results.
        label: Column of the slides' labels; ``name`` by default.
        kind: ``binary`` (a property with two states), ``multiclass``, or ``presence`` (of a
            finding).
        prompts: Names of the positive class.
        negative_prompts: Names of the negative one, for ``contrast: negation``.
        classes: {label value: names} of ``multiclass``.
        templates: ``single``, ``ensemble`` or templates with CLASSNAME; None for the file's.
        score: ``global``, cosine of slide and text; ``local``, cosine of the text and what its
            own attention over the regions gathers; ``sum`` of both.
        contrast: Score subtracted from the positive one: that of the negative prompts, the mean of
            the other tasks of the same group, that of the neutral prompt, or none.
        group: Group of tasks that are contrasted by ``others``.
        positive: Label values that are positive; by default 1, true, yes, positive, present and
            mutated, and then only 0, false, no, negative, absent and wild type are negative.
    """

    name: str
    label: str = ""
    kind: Kind = "presence"
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    templates: tuple[str, ...] = (PLACEHOLDER,)
    score: Source = "global"
    contrast: Contrast = "none"
    group: str = "findings"
    positive: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)

        def wrong(message: str, hint: str) -> ConfigError:
            return ConfigError(f"Task {self.name!r}: {message}.", hint=hint, code="tasks")

        for name, allowed in (("kind", Kind), ("score", Source), ("contrast", Contrast)):
            if getattr(self, name) not in get_args(allowed):
                raise wrong(
                    f"{name} is {getattr(self, name)!r}", f"Use {', '.join(get_args(allowed))}."
                )
        if self.kind == "multiclass":
            if len(self.classes) < 2 or not all(self.classes.values()):
                raise wrong("it needs two classes or more, each with a name", "Give classes: {…}.")
        elif not self.prompts:
            raise wrong("it has no prompts", "Give prompts: [what a slide shows].")
        if self.contrast == "negation" and self.kind != "multiclass" and not self.negative_prompts:
            raise wrong("contrast negation needs negative_prompts", "Give them, or contrast: none.")
        for template in self.templates:
            if PLACEHOLDER not in template:
                raise wrong(f"template {template!r} lacks {PLACEHOLDER}", f"Write {PLACEHOLDER}.")

    def texts(self, names: Sequence[str]) -> list[str]:
        """Return the names in all templates."""
        return [
            template.replace(PLACEHOLDER, name) for name in names for template in self.templates
        ]

    def is_positive(self, value: str | None) -> bool | None:
        """Return whether a label is positive; None for an unknown value.

        Raises:
            ConfigError: The value is neither.
        """
        text = clean(value or "")
        if self.positive:
            if text in self.positive:
                return True
            return None if is_unknown(text) else False
        folded = text.lower()
        if is_unknown(text):
            return None
        if folded in _POSITIVE or folded in _NEGATIVE:
            return folded in _POSITIVE
        raise ConfigError(
            f"Task {self.name!r}: the label {self.label} is {value!r}.",
            hint=f"Say which values are positive, for example positive: [{value}].",
            code="tasks",
        )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The tasks of a file.

    Attributes:
        tasks: Tasks, in their order in the file.
        neutral: Prompt of ``contrast: neutral``.
    """

    tasks: tuple[Task, ...]
    neutral: str = NEUTRAL


@dataclass(frozen=True, kw_only=True)
class TileTask:
    """Classes of a set of tiles, with their prompts.

    Attributes:
        name: Name in the results.
        classes: {label of the set: names}; the first name is the one of ``npe``.
        layout: Layout of the set, see :mod:`pathflip.interop.tile_sets`; None for folders or CSV.
        mpp: µm per pixel of its tiles, where they do not say so themselves.
        leave_out: Labels of the set that are passed over.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    layout: str | None = None
    mpp: float | None = None
    leave_out: tuple[str, ...] = ()

    def one_prompt(self) -> dict[str, tuple[str, ...]]:
        """Return the classes with their first names only."""
        return {label: names[:1] for label, names in self.classes.items()}


def tile_tasks() -> dict[str, Path]:
    """Return {name: file} of the tasks that come with pathflip."""
    folder = Path(__file__).resolve().parents[1] / "templates" / "tasks"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_tile_task(source: str | Path) -> TileTask:
    """Read a task of tiles: a name that comes with pathflip, or a YAML file.

    ::

        layout: nct-crc              # left out: a folder per class, or a CSV
        mpp: 0.5
        classes: {TUM: [colorectal adenocarcinoma], NORM: [normal colonic mucosa]}
        leave_out: [BACK]

    Raises:
        ConfigError: There is none of that name, or the file is missing or malformed (``tasks``).
    """
    builtin = tile_tasks()
    path = builtin.get(str(source), Path(source))
    if str(source) not in builtin and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"There is no task {str(source)!r}.",
            hint=f"Known: {', '.join(builtin)}; or give a YAML file.",
            code="tasks",
        )
    content = _yaml(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("classes"), Mapping):
        raise ConfigError(
            f"{path} has no classes.", hint="Write classes: {label: [names]}.", code="tasks"
        )
    _known(content, ("layout", "mpp", "classes", "leave_out"), where=str(path))
    classes = {_name(key): _names(value) for key, value in content["classes"].items()}
    mpp = content.get("mpp")
    if len(classes) < 2 or not all(classes.values()):
        raise ConfigError(
            f"{path} needs two classes or more, each with a name.",
            hint="Write classes: {label: [names]}.",
            code="tasks",
        )
    if mpp is not None and not (isinstance(mpp, int | float) and 0.05 <= mpp <= 10):
        raise ConfigError(
            f"{path}: mpp is {mpp!r}.", hint="Give µm per pixel, 0.05 to 10.", code="tasks"
        )
    return TileTask(
        name=path.stem,
        classes=classes,
        layout=None if content.get("layout") is None else str(content["layout"]),
        mpp=None if mpp is None else float(mpp),
        leave_out=_names(content.get("leave_out")),
    )


def templates_of(choice: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates for ``single``, ``ensemble``, one template, or a list of them."""
    if isinstance(choice, str):
        if choice == "single":
            return TEMPLATES[:1]
        if choice == "ensemble":
            return TEMPLATES
        return (choice,)
    return tuple(choice)


def read_tasks(path: str | Path) -> Suite:
    """Read a task file.

    Raises:
        ConfigError: It is missing, malformed, or a task in it is.
    """
    content = _yaml(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("tasks"), list):
        raise ConfigError(
            f"{path} has no list of tasks.",
            hint="Write tasks: [{name: …, prompts: […]}, …]; see docs/howto/evaluation.md.",
            code="tasks",
        )
    _known(content, ("version", "templates", "neutral", "tasks"), where=str(path))
    default = content.get("templates", PLACEHOLDER)
    tasks = [_task(entry, default=default, where=str(path)) for entry in content["tasks"]]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not tasks:
        raise ConfigError(
            f"{path} has {'no task' if not tasks else f'two tasks named {twice[0]!r}'}.",
            hint="Give every task its own name.",
            code="tasks",
        )
    return Suite(tasks=tuple(tasks), neutral=str(content.get("neutral", NEUTRAL)))


def read_classes(source: str) -> dict[str, tuple[str, ...]]:
    """Read classes to choose among: {class: names}.

    Args:
        source: A YAML or JSON file (a list of names, or {class: name or names}), a text file with
            a name a line, or the names themselves with commas between.

    Raises:
        ConfigError: The file cannot be read, or there are fewer than two.
    """
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        content = _yaml(path)
    elif "," not in source and path.is_file():
        content = [clean(line) for line in read_text(path).splitlines()]
    else:
        content = source.split(",")
    if isinstance(content, Mapping) and set(content) == {"classes"}:
        content = content["classes"]
    if isinstance(content, Mapping):
        classes = {_name(key): _names(value) for key, value in content.items()}
    elif isinstance(content, list):
        names = [clean(str(name)) for name in content]
        classes = {name: (name,) for name in names if name}
    else:
        classes = {}
    if len(classes) < 2 or not all(classes.values()):
        raise ConfigError(
            f"{source!r} names {len(classes)} classes; two are needed, each with a name.",
            hint="Give names with commas, or a YAML file {class: [names]}.",
            code="classes",
        )
    return classes


def _task(entry: Any, *, default: Any, where: str) -> Task:
    if not isinstance(entry, Mapping) or not entry.get("name"):
        raise ConfigError(
            f"{where}: a task has no name.", hint="Write name: … first.", code="tasks"
        )
    where = f"{where}, task {entry['name']!r}"
    _known(entry, [item.name for item in dataclasses.fields(Task)], where=where)
    values = dict(entry) | {"name": str(entry["name"])}
    values["label"] = str(entry.get("label") or "")
    for key in ("prompts", "negative_prompts", "positive"):
        if key in values:
            values[key] = _names(values[key])
    if "classes" in values:
        if not isinstance(values["classes"], Mapping):
            raise ConfigError(
                f"{where}: classes is not a mapping.", hint="Write {value: [names]}.", code="tasks"
            )
        values["classes"] = {_name(key): _names(value) for key, value in values["classes"].items()}
    values["templates"] = templates_of(values.get("templates") or default)
    if "contrast" not in values:
        values["contrast"] = "negation" if values.get("kind") == "binary" else "none"
    return Task(**values)


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_name(item) for item in items)


def _name(value: Any) -> str:
    """Return a text or a number as written; YAML reads yes, no, on and off as truth values."""
    if value is None or isinstance(value, bool | list | dict):
        raise ConfigError(
            f"{value!r} is not a name.",
            hint="Put words that YAML understands in quotes: 'yes', 'no', 'on', 'off', 'null'.",
            code="tasks",
        )
    return str(value)


def _known(given: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{where}: there is no setting {key!r}.",
                hint=f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}.",
                code="tasks",
            )


def _yaml(path: str | Path) -> Any:
    try:
        return yaml.safe_load(read_text(path, code="missing_file"))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not valid YAML: {error}.", hint="Check its indentation.", code="tasks"
        ) from error
