"""Task files and class lists: what they mean and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pathflip.errors import ConfigError
from pathflip.evaluation.prompts import (
    PLACEHOLDER,
    TEMPLATES,
    Task,
    read_classes,
    read_tasks,
    templates_of,
)


def test_templates_are_distinct_and_hold_the_name() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) >= 20
    assert all(template.count(PLACEHOLDER) == 1 for template in TEMPLATES)
    assert templates_of("single") == TEMPLATES[:1]
    assert templates_of("ensemble") == TEMPLATES
    task = Task(name="a", prompts=("x", "y"), templates=("a CLASSNAME", "CLASSNAME b"))
    assert task.texts(task.prompts) == ["a x", "x b", "a y", "y b"]


def test_a_task_made_in_python_is_of_the_label_of_its_name() -> None:
    assert Task(name="mucin", prompts=("mucin",)).label == "mucin"
    assert Task(name="mucin", label="mucinous", prompts=("mucin",)).label == "mucinous"


def test_a_task_file(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(
        """
templates: single
neutral: glass
tasks:
- {name: TP53, label: tp53, kind: binary, prompts: a mutation, negative_prompts: [none]}
- {name: organ, kind: multiclass, classes: {0: lung, 1: [colon, bowel]}, templates: [CLASSNAME]}
- {name: mucin, prompts: [mucin], score: local}
"""
    )
    suite = read_tasks(file)
    gene, organ, mucin = suite.tasks
    assert suite.neutral == "glass"
    assert (gene.kind, gene.contrast, gene.label) == ("binary", "negation", "tp53")
    assert gene.texts(gene.prompts) == [TEMPLATES[0].replace(PLACEHOLDER, "a mutation")]
    assert organ.classes == {"0": ("lung",), "1": ("colon", "bowel")}
    assert organ.texts(organ.classes["1"]) == ["colon", "bowel"]
    assert (mucin.kind, mucin.contrast, mucin.label) == ("presence", "none", "mucin")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: 3", "no list of tasks"),
        ("tasks: []", "no task"),
        ("tasks: [{prompts: [a]}]", "no name"),
        ("tasks: [{name: a, promts: [a]}]", "Did you mean prompts"),
        ("task: []\ntasks: [{name: a, prompts: [a]}]", "no setting 'task'"),
        ("tasks: [{name: a}]", "no prompts"),
        ("tasks: [{name: a, prompts: [a], kind: regression}]", "kind is 'regression'"),
        ("tasks: [{name: a, prompts: [a], kind: binary}]", "needs negative_prompts"),
        ("tasks: [{name: a, kind: multiclass, classes: {a: x}}]", "two classes"),
        ("tasks: [{name: a, kind: multiclass, classes: [x, y]}]", "not a mapping"),
        ("tasks: [{name: a, prompts: [a], templates: [plain]}]", "lacks CLASSNAME"),
        ("tasks: [{name: a, prompts: [a]}, {name: a, prompts: [b]}]", "two tasks named 'a'"),
        ("tasks: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_task_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_tasks(file)


def test_labels_are_positive_negative_or_unknown() -> None:
    task = Task(name="a", prompts=("a",))
    assert [task.is_positive(v) for v in ("1", "Mutated", "0", "wild type", "", "NA", None)] == [
        True, True, False, False, None, None, None,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="is 'high'"):
        task.is_positive("high")
    graded = Task(name="a", prompts=("a",), positive=("high",))
    assert [graded.is_positive(v) for v in ("high", "low", "")] == [True, False, None]


def test_classes_from_names_and_files(tmp_path: Path) -> None:
    both = {"lung": ("lung",), "colon": ("colon",)}
    assert read_classes("lung, colon") == both
    (tmp_path / "a.txt").write_text("lung\n\ncolon\n")
    assert read_classes(str(tmp_path / "a.txt")) == both
    (tmp_path / "b.yaml").write_text("classes: {lung: lung, bowel: [colon, rectum]}")
    assert read_classes(str(tmp_path / "b.yaml")) == {
        "lung": ("lung",),
        "bowel": ("colon", "rectum"),
    }
    (tmp_path / "c.json").write_text('["lung", "colon"]')
    assert read_classes(str(tmp_path / "c.json")) == both
    with pytest.raises(ConfigError, match="two are needed"):
        read_classes("lung")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_classes(str(tmp_path / "missing.yaml"))
