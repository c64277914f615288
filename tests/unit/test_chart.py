"""The chart: KubeRay would accept what it renders, and it is safe and complete by default."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from pathflip.cli import app
from serve.config import from_arguments
from tests import charts, kuberay
from tests.unit.test_manifests import lock

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "platform" / "helm" / "pathflip"
JOBS = sorted((ROOT / "platform" / "helm" / "jobs").glob("*.yaml"))
CRDS = os.environ.get("PATHFLIP_KUBERAY_CRDS")
PEER = {"podSelector": {"matchLabels": {"app": "proxy"}}}
CASES: dict[str, dict[str, Any]] = {
    **{path.stem: yaml.safe_load(path.read_text("utf-8")) for path in JOBS},
    "kind": {
        **yaml.safe_load((ROOT / "platform" / "helm" / "kind.yaml").read_text("utf-8")),
        "job": {
            "command": ["python", "-m", "jobs.ingest", "/archive/slides", "--archive", "/archive/a"]
        },
    },
    "cluster": {
        "run": "cluster",
        "gcs": {"backend": "rocksdb", "rocksdb": {"storageClass": "ssd"}},
        "volumes": [],
        "serviceAccount": "bucket-reader",
        "image": {"pullSecrets": ["registry"]},
    },
    "service": {
        "run": "service",
        "service": {"config": (ROOT / "platform/serve/cpu.yaml").read_text("utf-8")},
        "networkPolicy": {"egress": []},
        "groups": {"gpu": None},
    },
    "service-gpu": {
        "run": "service",
        "service": {
            "config": (ROOT / "platform/serve/gpu.yaml").read_text("utf-8"),
            "upgrade": {"gatewayClass": "istio"},
        },
        "gcs": {"backend": "redis", "redis": {"secret": "redis"}},
        "networkPolicy": {"clients": [PEER], "monitoring": [{"namespaceSelector": {}}]},
        "environment": {"HF_HUB_OFFLINE": "1"},
        "secrets": ["object-store"],
        "head": {"nodeSelector": {"disk": "ssd"}},
        "image": {"pullSecrets": ["registry"]},
    },
    "open": {"run": "cluster", "networkPolicy": {"enabled": False}},
}


@functools.cache
def _documents(case: str) -> dict[str, Any]:
    texts = charts.render(CHART, CASES[case], name="demo", revision=3)
    documents = [yaml.safe_load(text) for text in texts.values()]
    return {document["kind"]: document for document in documents}


def rendered(case: str) -> dict[str, Any]:
    """Resources of a case, by kind."""
    return copy.deepcopy(_documents(case))


def ray_of(documents: dict[str, Any]) -> dict[str, Any]:
    """The one resource of KubeRay among them."""
    (kind,) = documents.keys() - {"NetworkPolicy"}
    found: dict[str, Any] = documents[kind]
    return found


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    """Spec of the Ray cluster that a resource makes."""
    spec: dict[str, Any] = resource["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def templates(resource: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (who, pod template) of every pod of a resource."""
    cluster = cluster_of(resource)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in resource["spec"]:
        yield "submitter", resource["spec"]["submitterPodTemplate"]


# -- KubeRay and Helm accept it -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_kuberay_knows_every_field(case: str) -> None:
    resource = ray_of(rendered(case))
    assert kuberay.faults(resource, kuberay.SPECS[resource["kind"]]) == []


@pytest.mark.skipif(
    not CRDS, reason="PATHFLIP_KUBERAY_CRDS names no folder of KubeRay's definitions"
)
def test_the_definitions_of_kuberay_accept_every_case_and_our_table() -> None:
    theirs = kuberay.definitions(Path(CRDS or ""))
    for kind, schema in kuberay.SPECS.items():
        assert kuberay.unknown(schema, theirs[kind]) == []
    for case in CASES:
        resource = ray_of(rendered(case))
        assert kuberay.faults(resource, theirs[resource["kind"]]) == [], case


@pytest.mark.parametrize("case", CASES)
def test_helm_renders_the_same(case: str, tmp_path: Path) -> None:
    ours = charts.render(CHART, CASES[case], name="demo", revision=3)
    theirs = {name: text for name, text in by_helm(CASES[case], tmp_path).items() if text.strip()}
    assert {name: yaml.safe_load(text) for name, text in theirs.items()} == {
        name: yaml.safe_load(text) for name, text in ours.items()
    }


def by_helm(values: dict[str, Any], folder: Path) -> dict[str, str]:
    """Texts of the templates as Helm renders them: the program, or its library for Python."""
    if shutil.which("helm"):
        file = folder / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        words = ["helm", "template", "demo", str(CHART), "--values", str(file)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        parts = re.split(r"^---\n# Source: pathflip/templates/(.*)\n", done.stdout, flags=re.M)
        texts = dict(zip(parts[1::2], parts[2::2], strict=True))
        # `helm template` is always of the first revision.
        return {
            name: text.replace("name: demo-1\n", "name: demo-3\n") for name, text in texts.items()
        }
    helm = pytest.importorskip("helm_python.chart")
    with helm.Chart.load(str(CHART)) as chart:
        made = chart.render(values, name="demo", namespace="default", revision=3)
    return {Path(name).name: text for name, text in made.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rum": "job"}, "rum"),
        ({"run": "jobs"}, "run"),
        ({"run": "job"}, "say what to run"),
        ({"job": {"command": ["python", "-c", "print(1); exit()"]}}, "command"),
        ({"job": {"command": ["a", "$HOME"]}}, "command"),
        ({"run": "service"}, "service.config"),
        ({"run": "cluster", "gcs": {"backend": "redis"}}, "gcs.redis.secret"),
        ({"run": "cluster", "gcs": {"backend": "etcd"}}, "backend"),
        ({"run": "cluster", "groups": {"cpu": {"maximum": 3}}}, "maximum"),
        ({"run": "cluster", "groups": {"cpu": None, "gpu": None}}, "groups"),
        ({"run": "cluster", "spill": "20 GB"}, "spill"),
        ({"run": "cluster", "image": {"cpu": "pathflip"}}, "image"),
        ({"run": "cluster", "user": 0}, "user"),
        ({"run": "cluster", "environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "environment"),
        ({"run": "cluster", "environment": {"HF_TOKEN": "x"}}, "environment"),
    ],
)
def test_values_that_are_wrong_or_secret_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(charts.ChartError, match=message):
        charts.render(CHART, values, name="demo")


# -- it is safe -----------------------------------------------------------------------------------


def restricted_faults(spec: dict[str, Any]) -> list[str]:
    """Rules of the profile ``restricted`` of Kubernetes' pod security standards that are broken."""
    found = []
    pod = spec.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or pod.get("runAsUser", 0) == 0:
        found.append("may run as root")
    if pod.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("system calls are not filtered")
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            found.append(f"{key} is on")
    allowed = {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
        "projected", "secret", "name",
    }  # fmt: skip
    for volume in spec.get("volumes", []):
        if not volume.keys() <= allowed:
            found.append(f"{volume['name']}: a volume of the host")
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        found += container_faults(container)
    return found


def container_faults(container: dict[str, Any]) -> list[str]:
    """Rules of the same profile that a container breaks."""
    name, security = container.get("name", "autoscaler"), container.get("securityContext", {})
    found = []
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        found.append(f"{name} keeps privileges")
    if security.get("capabilities", {}).get("drop") != ["ALL"]:
        found.append(f"{name} keeps capabilities")
    if any("hostPort" in port for port in container.get("ports", [])):
        found.append(f"{name} has a port of the host")
    return found


def faults(resource: dict[str, Any]) -> list[str]:
    """Faults that would leave the cluster open, idle for ever, unbounded, or cut short."""
    found = []
    cluster = cluster_of(resource)
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("no token mode")
    if cluster["rayVersion"] != lock("cpu")["ray"]:
        found.append("rayVersion differs from the lock")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("work is scheduled on the head")
    if not cluster["enableInTreeAutoscaling"] or cluster["autoscalerOptions"]["version"] != "v2":
        found.append("not autoscaler v2")
    found += container_faults(cluster["autoscalerOptions"])
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] >= 1:
            found.append(f"{group['groupName']}: replicas out of order")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        found += spill_faults(group)
    for who, template in templates(resource):
        spec = template["spec"]
        found += [f"{who}: {fault}" for fault in restricted_faults(spec)]
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            limits = container["resources"]["limits"]
            requests = container["resources"]["requests"]
            if not {"cpu", "memory"} <= limits.keys() & requests.keys():
                found.append(f"{who}: cpu and memory are not bounded")
        named = who == "head" or "serviceAccountName" in spec
        if not named and spec.get("automountServiceAccountToken") is not False:
            found.append(f"{who}: holds a token of Kubernetes")
    return found


def spill_faults(group: dict[str, Any]) -> list[str]:
    """Ways in which a Ray node may fill its machine's disk or memory, or be ended too early."""
    who, spec = group.get("groupName", "head"), group["template"]["spec"]
    (container,) = spec["containers"]
    parameters = group["rayStartParams"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    found = []
    if not set(mounts.values()) <= volumes.keys():
        found.append(f"{who}: mounts an unknown volume")
    for path in ("/tmp/ray", parameters.get("object-spilling-directory", "nowhere")):
        if "sizeLimit" not in volumes.get(mounts.get(path, ""), {}).get("emptyDir", {}):
            found.append(f"{who}: {path} is not bounded")
    if not 0 < int(parameters.get("object-store-memory", 0)) <= 8 << 30:
        found.append(f"{who}: memory for objects is not bounded")
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    if env.get("RAY_AUTH_MODE") != "token":
        found.append(f"{who}: RAY_AUTH_MODE is not token")
    if not 0 < float(env.get("RAY_local_fs_capacity_threshold", 1)) < 1:
        found.append(f"{who}: spills until the disk is full")
    drain = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "inf"))
    if spec.get("terminationGracePeriodSeconds", 30) <= drain:
        found.append(f"{who}: killed before it has drained")
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_safe(case: str) -> None:
    assert faults(ray_of(rendered(case))) == []


def head(cluster: dict[str, Any]) -> Any:
    return cluster["headGroupSpec"]["template"]["spec"]


def worker(cluster: dict[str, Any]) -> Any:
    return cluster["workerGroupSpecs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda c: c.pop("authOptions"), "no token mode"),
        (lambda c: c.update(rayVersion="2.9.0"), "lock"),
        (lambda c: c["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "on the head"),
        (lambda c: c["autoscalerOptions"].pop("version", c), "autoscaler v2"),
        (lambda c: c["autoscalerOptions"]["securityContext"].clear(), "autoscaler keeps"),
        (lambda c: c["workerGroupSpecs"][0].update(minReplicas=9), "replicas"),
        (lambda c: c["workerGroupSpecs"][0]["rayStartParams"].clear(), "nowhere is not bounded"),
        (lambda c: head(c)["volumes"][0]["emptyDir"].clear(), "/tmp/ray is not bounded"),
        (lambda c: head(c)["containers"][0]["env"].clear(), "until the disk is full"),
        (lambda c: head(c).update(terminationGracePeriodSeconds=60), "drained"),
        (lambda c: head(c).pop("securityContext"), "root"),
        (lambda c: head(c)["securityContext"].pop("seccompProfile"), "system calls"),
        (lambda c: worker(c).update(hostNetwork=True), "hostNetwork"),
        (lambda c: worker(c)["volumes"].append({"name": "x", "hostPath": {}}), "of the host"),
        (lambda c: worker(c)["containers"][0].pop("securityContext"), "keeps"),
        (lambda c: worker(c)["containers"][0]["resources"]["limits"].pop("memory"), "bounded"),
        (lambda c: worker(c)["volumes"].pop(), "unknown volume"),
        (lambda c: worker(c).pop("automountServiceAccountToken"), "token of Kubernetes"),
    ],
)
def test_a_planted_fault_is_found(plant: Callable[[dict[str, Any]], Any], fault: str) -> None:
    resource = ray_of(rendered("ingest"))
    plant(cluster_of(resource))
    try:
        found = faults(resource)
    except KeyError as missing:
        found = [f"not autoscaler v2: no {missing}"]
    assert any(fault in one for one in found), found


@pytest.mark.parametrize("case", [case for case in CASES if case != "open"])
def test_network_policy_covers_every_pod_and_lets_nobody_else_in(case: str) -> None:
    documents = rendered(case)
    spec, resource = documents["NetworkPolicy"]["spec"], ray_of(documents)
    for who, template in templates(resource):
        labels = template["metadata"]["labels"]
        assert spec["podSelector"]["matchLabels"].items() <= labels.items(), who
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    # An entry without `from` would let everybody in, and an empty peer everybody of the cluster.
    assert all(rule.get("from") and all(rule["from"]) for rule in spec["ingress"])
    served = [
        rule
        for rule in spec["ingress"]
        if rule.get("ports") and 8000 in {port["port"] for port in rule["ports"]}
    ]
    assert bool(served) == (resource["kind"] == "RayService")
    assert all(rule.get("ports") or rule.get("to") for rule in spec["egress"])
    assert all(
        "169.254.0.0/16" in peer["ipBlock"]["except"]
        for rule in spec["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ), "the cloud's metadata service could be asked"


def test_no_secret_is_in_the_chart() -> None:
    for case in CASES:
        documents = rendered(case)
        assert "Secret" not in documents
        words = json.dumps(documents)
        assert not re.search(r'"(redisPassword|password)": "', words)
    names = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert names["secrets"] == []


# -- jobs -----------------------------------------------------------------------------------------


def words_of(module: str) -> list[str]:
    """Words of ``pathflip`` that a module of jobs stands for."""
    if module == "pathflip.cli":
        return []
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__main__.py"
    (found,) = re.findall(r"main\(\[(.*), \*sys\.argv\[1:\]\]\)", path.read_text("utf-8"))
    return [word.strip('" ') for word in found.split(",")]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_command_of_every_job_is_one_the_command_line_accepts(path: Path) -> None:
    resource = ray_of(rendered(path.stem))
    given = yaml.safe_load(path.read_text("utf-8"))["job"]["command"]
    assert given == words_after_both_shells(resource["spec"]["entrypoint"])
    python, m, module, *rest = given
    assert (python, m) == ("python", "-m")
    command: Any = typer.main.get_command(app)
    words = [*words_of(module), *rest]
    while hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    command.make_context(module, list(words))
    mounted = {
        mount["mountPath"]
        for _, template in templates(resource)
        for mount in template["spec"]["containers"][0].get("volumeMounts", [])
    }
    for word in (word for word in given if word.startswith("/")):
        assert any(word == at or word.startswith(at + "/") for at in mounted), word


def test_every_command_that_runs_on_a_cluster_is_a_job_of_the_chart() -> None:
    def on_clusters(command: Any, *words: str) -> Iterator[str]:
        for name, one in getattr(command, "commands", {}).items():
            yield from on_clusters(one, *words, name)
        if any("--address" in parameter.opts for parameter in command.params):
            yield " ".join(words)

    given = set()
    for path in JOBS:
        _, _, module, *rest = yaml.safe_load(path.read_text("utf-8"))["job"]["command"]
        words = [*words_of(module), *rest]
        first = next(at for at, word in enumerate(words) if word.startswith(("-", "/")))
        given.add(" ".join(words[:first]))
    again = {"slides retry"}  # an ingest of slides that the archive knows
    assert given == set(on_clusters(typer.main.get_command(app))) - again


def words_after_both_shells(entrypoint: str) -> list[str]:
    """Command of a job as it arrives, by way of KubeRay's shell, ``ray job submit`` and Ray's."""
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {entrypoint} ;"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    line = subprocess.list2cmdline(words)  # as `ray job submit` does
    printed = subprocess.run(
        line.replace("python -m jobs.attempts", "printf '%s\\n'", 1),
        shell=True, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert printed[:5] == ["--waits", "30,120,480", "--accept", "3", "--"]
    return printed[5:]


def test_a_job_goes_on_in_new_clusters_and_ends_in_time() -> None:
    resource = ray_of(rendered("ingest"))
    assert resource["metadata"]["name"] == "demo-3", "an upgrade makes a new job, which resumes"
    spec = resource["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"]


def test_groups_with_gpus_have_them_and_the_image_for_them() -> None:
    (group,) = cluster_of(ray_of(rendered("pretrain")))["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["image"].endswith(":gpu")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert group["template"]["spec"]["tolerations"]
    command = ray_of(rendered("pretrain"))["spec"]["entrypoint"]
    assert f"max_workers={group['minReplicas']}" in command, "training takes what is there at once"


# -- the service ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["service", "service-gpu"])
def test_service_finds_its_tokens_and_has_time_to_end_answers(case: str) -> None:
    resource = ray_of(rendered(case))
    config = yaml.safe_load(resource["spec"]["serveConfigV2"])
    assert config == yaml.safe_load(CASES[case]["service"]["config"])
    settings = from_arguments(config["applications"][0]["args"])
    for _, template in templates(resource):
        spec = template["spec"]
        (copied,) = spec["initContainers"]
        assert copied["command"][:3] == ["install", "-m", "600"]
        assert copied["command"][-1] == str(settings.token_file)
        env = {one["name"]: one["value"] for one in spec["containers"][0]["env"]}
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert settings.drain_s < drain < spec["terminationGracePeriodSeconds"]
    assert resource["spec"]["excludeHeadPodFromServeSvc"]
    # Without a port of this name KubeRay makes no service.
    (container,) = head(cluster_of(resource))["containers"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert named["serve"] == config["http_options"]["port"]
    upgrade = resource["spec"]["upgradeStrategy"]
    incremental = case == "service-gpu"
    assert (upgrade["type"] == "NewClusterWithIncrementalUpgrade") == incremental
    if incremental:
        steps = upgrade["clusterUpgradeOptions"]
        assert 0 < steps["stepSizePercent"] <= steps["maxSurgePercent"] <= 100


def test_what_the_head_knows_is_kept_where_it_is_told() -> None:
    redis = cluster_of(ray_of(rendered("service-gpu")))["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"] == {
        "name": "redis",
        "key": "password",
    }
    rocksdb = cluster_of(ray_of(rendered("cluster")))["gcsFaultToleranceOptions"]
    assert rocksdb == {"backend": "rocksdb", "storage": {"size": "1Gi", "storageClassName": "ssd"}}
    assert "gcsFaultToleranceOptions" not in cluster_of(ray_of(rendered("ingest")))
