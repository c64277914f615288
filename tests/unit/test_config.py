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


def test_null_undoes_what_a_file_set(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\nlabel: seen\ninner: {mpp: 0.25, name: file}\n")
    loaded = load_config(Outer, file=file, overrides=["label=null", "steps=null"])
    assert loaded == Outer(inner=Inner(mpp=0.25, name="file"))
    assert load_config(Outer, file=file, overrides=["inner.mpp=null"]).inner == Inner(name="file")
    assert load_config(Outer, file=file, overrides=["inner=null"]).inner == Inner()
    again = load_config(Outer, file=file, overrides=["inner=null", "inner.name=y"])
    assert again.inner == Inner(name="y")


def test_null_is_a_value_where_nothing_is_one_of_them():
    @dataclass(frozen=True, kw_only=True)
    class Limited:
        most: int | None = 24

    assert load_config(Limited, overrides=["most=null"]).most is None
    assert load_config(Limited, overrides=["most=null", "most=3"]).most == 3


def test_what_a_base_says_is_the_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner: {mpp: 0.25}\n")
    base = Outer(steps=3, label="base", inner=Inner(mpp=9.0, name="base"))
    loaded = load_config(Outer, base=base, file=file, overrides=["label=null"], given={"steps": 4})
    assert loaded == Outer(steps=4, label=None, inner=Inner(mpp=0.25, name="base"))
    assert load_config(Outer, base=base) == base
    part = {"steps": 3, "inner": {"name": "base"}}
    loaded = load_config(Outer, base=part, file=file, overrides=["steps=7", "steps=null"])
    assert loaded == Outer(steps=3, inner=Inner(mpp=0.25, name="base"))
    with pytest.raises(ConfigError, match="Did you mean steps"):
        load_config(Outer, base={"stepps": 3})
    assert load_config(Outer, base=base, overrides=["steps=7", "steps=null"]).steps == 3


@pytest.mark.parametrize("text", ["1e-05", "1E-5", "1.e-5", "+1e-5", ".1e-4", "0.00001"])
def test_a_number_with_an_exponent_is_a_number(text, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Loose:
        value: object = None

    (tmp_path / "c.yaml").write_text(f"value: {text}\n")
    assert load_config(Loose, overrides=[f"value={text}"]).value == pytest.approx(1e-5)
    assert load_config(Loose, file=tmp_path / "c.yaml").value == pytest.approx(1e-5)


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "x1e-5"])
def test_what_is_no_number_stays_text(text):
    assert load_config(Outer, overrides=[f"label={text}"]).label == text


def test_what_is_no_yaml_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Outer, overrides=["label=[1"])
    (tmp_path / "latin.yaml").write_bytes(b"label: M\xfcller\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(Outer, file=tmp_path / "latin.yaml")
    (tmp_path / "numbers.yaml").write_text("1: x\n")
    with pytest.raises(ConfigError, match="no setting 1"):
        load_config(Outer, file=tmp_path / "numbers.yaml")


def test_a_setting_that_must_be_given_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        run: str

    with pytest.raises(ConfigError, match="run is not set"):
        load_config(Needs)
