"""Settings of the service: former names, unknown names, and checks before anything starts."""

import pytest

from pathflip.config import load_config
from pathflip.errors import CheckpointError, ConfigError
from serve.config import (
    CheckedAside,
    Replicas,
    ServeConfig,
    check_inputs,
    find_model,
    from_arguments,
)
from tests.serving import CONTEXT

GIVEN = {"archive": "a", "run": "r"}


def test_former_names_are_accepted(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("instructor: {ongoing: 7, queued: 8}\nsearch: {max_ongoing: 9}\n")
    config = load_config(
        ServeConfig, given=GIVEN, file=file, overrides=["instructor.queued=5", "ingress.ongoing=3"]
    )
    assert (config.instructor.max_ongoing, config.instructor.max_queued) == (7, 5)
    assert (config.search.max_ongoing, config.ingress.max_ongoing) == (9, 3)
    assert config.ingress.max_queued == 256, "the default of its place"
    arguments = GIVEN | {"embedder": {"queued": 1}, "grounding.ongoing": 2}
    config = from_arguments(arguments)
    assert (config.embedder.max_queued, config.grounding.max_ongoing) == (1, 2)


def test_a_later_source_wins_whatever_the_name(tmp_path):
    file = tmp_path / "serve.yaml"
    for written, override in (("ongoing", "max_ongoing"), ("max_ongoing", "ongoing")):
        file.write_text(f"search: {{{written}: 7}}\n")
        config = load_config(
            ServeConfig, given=GIVEN, file=file, overrides=[f"search.{override}=5"]
        )
        assert config.search.max_ongoing == 5
    with pytest.raises(ConfigError, match="former name of max_ongoing"):
        from_arguments(GIVEN | {"search": {"ongoing": 1, "max_ongoing": 2}})


def test_serve_gets_what_is_set():
    options = Replicas(max_ongoing=3, max_queued=4).options(drain_s=9.0)
    assert options["max_ongoing_requests"] == 3
    assert options["max_queued_requests"] == 4
    assert options["graceful_shutdown_timeout_s"] == 9.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("engine.engine.max_num_seq", 3, "max_num_seqs"),
        ("engine.flush", 3, "flush_s"),
        ("engine.fake.token", 3, "token_s"),
        ("instructor.max_replica", 3, "max_replicas"),
        ("engin.flush_s", 3, "engine"),
    ],
)
def test_the_nearest_setting_is_named(key, value, words):
    with pytest.raises(ConfigError) as caught:
        from_arguments(GIVEN | {key: value})
    assert f"Did you mean {words}?" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.engine.max_num_seqs", "many"),
        ("engine.engine.device", "tpu"),
        ("engine.backend", "transformers"),
        ("engine.flush_s", "soon"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    with pytest.raises(ConfigError, match="not valid"):
        from_arguments(GIVEN | {key: value})


@pytest.mark.parametrize(
    "key",
    [
        "engine.engine.max_num_seqs=0", "engine.engine.threads=0", "engine.engine.kv_gib=0",
        "engine.engine.gpu_memory_utilization=0", "engine.engine.gpu_memory_utilization=1.5",
        "engine.flush_s=-1", "engine.prefix_cache_mb=-1", "instructor.min_replicas=-1",
        "search.min_replicas=5", "search.max_ongoing=0", "search.queued=-2", "search.target=0",
        "grounding.gpus=-1", "drain_s=-1",
    ],
)  # fmt: skip
def test_numbers_no_service_can_run_with_are_named(world, key):
    name, _, value = key.partition("=")
    given = {"archive": str(world.archive), "run": str(world.run), name: value}
    with pytest.raises(ConfigError) as caught:
        check_inputs(from_arguments(given))
    assert name.rpartition(".")[2].removeprefix("min_").removeprefix("max_") in str(caught.value)


def test_the_context_is_checked_before_an_engine_starts(tuned):
    given = {"archive": str(tuned.archive), "run": str(tuned.run)}
    inputs = check_inputs(from_arguments(given | {"engine.engine.max_model_len": CONTEXT}))
    assert inputs.chat
    wrong = from_arguments(given | {"engine.engine.max_model_len": CONTEXT + 1})
    with pytest.raises(ConfigError, match=f"made for {CONTEXT:,}") as here:
        check_inputs(wrong)
    with pytest.raises(ConfigError) as aside:  # the same, told by another process
        CheckedAside(wrong).result()
    assert aside.value.to_dict() == here.value.to_dict()
    assert CheckedAside(from_arguments(given)).result() == check_inputs(from_arguments(given))


def test_a_language_model_needs_a_tuned_run(world, tuned, tmp_path):
    given = {"archive": str(world.archive), "run": str(world.run)}
    assert not check_inputs(from_arguments(given)).chat
    with pytest.raises(CheckpointError) as caught:
        check_inputs(from_arguments(given | {"llm": str(tuned.base)}))
    assert caught.value.code == "not_tuned"
    assert find_model(tuned.run) == (tuned.run / "model", tuned.run / "llm")
    assert find_model(tuned.run, tuned.base) == (tuned.run / "model", tuned.base)
    assert find_model(world.run, tuned.run) == (tuned.run / "model", tuned.run / "llm")
