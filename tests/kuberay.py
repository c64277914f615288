"""Shape of KubeRay's resources, version 1.7.0, as far as our chart uses them: closed JSON schemas.

Names and types were taken from the custom resource definitions of that release. Where a copy of
those is at hand (``PATHFLIP_KUBERAY_CRDS`` names its folder: ``ray-operator/config/crd/bases`` of
that tag), tests/unit/test_chart.py checks the chart against them, and this table too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def some(schema: Schema) -> Schema:
    """A list of such things, one at least."""
    return {"type": "array", "items": schema, "minItems": 1}


def only(*required: str, **properties: Schema) -> Schema:
    """An object that has these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


RESOURCES = only(
    "requests", "limits",
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)  # fmt: skip
SECURITY = only(allowPrivilegeEscalation=FLAG, capabilities=only("drop", drop=some(TEXT)))
CONTAINER = only(
    "name", "image", "resources", "securityContext",
    name=TEXT,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    command=some(TEXT),
    env=some(only("name", "value", name=TEXT, value=TEXT)),
    envFrom=some(only("secretRef", secretRef=only("name", name=TEXT))),
    ports=some(only("containerPort", "name", containerPort=COUNT, name=TEXT)),
    resources=RESOURCES,
    securityContext=SECURITY,
    volumeMounts=some(
        only("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG),
    ),
)  # fmt: skip
VOLUME = {
    **only(
        "name",
        name=TEXT,
        emptyDir=only("sizeLimit", medium={"const": "Memory"}, sizeLimit=QUANTITY),
        secret=only(
            "secretName", secretName=TEXT, items=some(only("key", "path", key=TEXT, path=TEXT))
        ),
        persistentVolumeClaim=only("claimName", claimName=TEXT, readOnly=FLAG),
    ),
    "minProperties": 2,
    "maxProperties": 2,
}
POD = only(
    "metadata", "spec",
    metadata=only(labels=TEXTS),
    spec=only(
        "securityContext", "containers",
        restartPolicy={"const": "Never"},
        serviceAccountName=TEXT,
        automountServiceAccountToken=FLAG,
        securityContext=only(
            runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT,
            fsGroupChangePolicy={"enum": ["OnRootMismatch", "Always"]},
            seccompProfile=only("type", type=TEXT),
        ),
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=TEXTS,
        tolerations=some(only(key=TEXT, operator=TEXT, effect=TEXT, value=TEXT)),
        imagePullSecrets=some(only("name", name=TEXT)),
        initContainers=some(CONTAINER),
        containers=some(CONTAINER),
        volumes=some(VOLUME),
    ),
)  # fmt: skip
CLUSTER = only(
    "rayVersion", "headGroupSpec", "workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=only("mode", mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=only(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
        imagePullPolicy=TEXT,
        resources=RESOURCES,
        securityContext=SECURITY,
    ),
    gcsFaultToleranceOptions=only(
        backend={"enum": ["redis", "rocksdb"]},
        redisAddress=TEXT,
        redisPassword=only(
            valueFrom=only(secretKeyRef=only("name", "key", name=TEXT, key=TEXT)),
        ),
        storage=only(size=QUANTITY, storageClassName=TEXT),
    ),
    headGroupSpec=only("template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=some(
        only(
            "groupName", "minReplicas", "maxReplicas", "template",
            groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT,
            rayStartParams=TEXTS, template=POD,
        )
    ),
)  # fmt: skip
JOB = only(
    "entrypoint", "rayClusterSpec",
    entrypoint=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=POD,
    rayClusterSpec=CLUSTER,
)  # fmt: skip
SERVICE = only(
    "rayClusterConfig", "serveConfigV2",
    excludeHeadPodFromServeSvc=FLAG,
    upgradeStrategy=only(
        "type",
        type={"enum": ["NewClusterWithIncrementalUpgrade", "NewCluster", "None"]},
        clusterUpgradeOptions=only(
            "gatewayClassName", "intervalSeconds", "stepSizePercent",
            gatewayClassName=TEXT, intervalSeconds=COUNT, stepSizePercent=COUNT,
            maxSurgePercent=COUNT,
        ),
    ),
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
)  # fmt: skip
SPECS: dict[str, Schema] = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}


def faults(document: Schema, spec: Schema) -> list[str]:
    """Parts of a resource that do not fit the schema of its spec."""
    assert document["apiVersion"] == "ray.io/v1"
    found = jsonschema.Draft202012Validator(spec).iter_errors(document["spec"])
    return [f"{error.json_path}: {error.message}" for error in found]


def definitions(folder: Path) -> dict[str, Schema]:
    """Schemas of the specs in custom resource definitions; objects have no properties but those."""
    specs = {}
    for kind in SPECS:
        file = folder / f"ray.io_{kind.lower()}s.yaml"
        versions = yaml.load(file.read_bytes(), yaml.CSafeLoader)["spec"]["versions"]
        (version,) = [one for one in versions if one["name"] == "v1"]
        specs[kind] = _closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return specs


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items() if key != "format"}
    if "properties" in schema and isinstance(schema.get("type"), str):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def unknown(ours: Schema, theirs: Schema, path: str = "$") -> list[str]:
    """Properties of a schema that another one has not, or has with another type."""
    if "items" in ours:
        return unknown(ours["items"], theirs.get("items", {}), f"{path}[]")
    found = []
    for name, one in ours.get("properties", {}).items():
        other = theirs.get("properties", {}).get(name)
        if other is None:
            found.append(f"{path}.{name} is not there")
        elif "type" in one and one["type"] != other.get("type", one["type"]):
            found.append(f"{path}.{name} is {other['type']}")
        elif not set(one.get("enum", ())) <= set(other.get("enum", one.get("enum", ()))):
            found.append(f"{path}.{name} is one of {other['enum']}")
        else:
            found += unknown(one, other, f"{path}.{name}")
    missing = set(theirs.get("required", ())) - set(ours.get("required", ()))
    found += [f"{path}.{name} is required" for name in missing if "properties" in ours]
    return found
