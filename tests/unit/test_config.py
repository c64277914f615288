"""Settings: defaults, YAML, overrides, and errors that name the way out."""

from dataclasses import dataclass, field

import pytest

from pathflip.config import load_config
from pathflip.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    mpp: float = 0.5
    name: str = "x"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int = 10
    inner: Inner = field(default_factory=Inner)
    label: str | None = None


def test_later_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\ninner: {mpp: 0.25, name: file}\n")
    loaded = load_config(Outer, file=file, overrides=["inner.mpp=1.5"], given={"steps": 7})
    assert loaded == Outer(steps=7, inner=Inner(mpp=1.5, name="file"))
    assert load_config(Outer) == Outer()


def test_a_part_keeps_the_defaults_of_its_place():
    """Not those of its class: two parts of a class may begin differently."""

    @dataclass(frozen=True, kw_only=True)
    class Place:
        wide: Inner = field(default_factory=lambda: Inner(mpp=2.0, name="wide"))
        deep: Outer = field(default_factory=lambda: Outer(steps=3, inner=Inner(mpp=9.0)))

    loaded = load_config(Place, overrides=["wide.name=w", "deep.inner.name=d"])
    assert loaded.wide == Inner(mpp=2.0, name="w")
    assert loaded.deep == Outer(steps=3, inner=Inner(mpp=9.0, name="d"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stepps=3"], "Did you mean steps?"),
        (["inner.mpq=3"], "Did you mean mpp?"),
        (["steps"], "no '='"),
        (["steps=many"], "steps = 'many' is not valid"),
    ],
)
def test_errors_name_the_way_out(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, overrides=overrides)
    assert words in str(caught.value)


def test_bad_files(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for name in ("list.yaml", "broken.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_config(Outer, file=tmp_path / name)
