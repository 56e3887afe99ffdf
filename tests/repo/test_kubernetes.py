"""The manifests of docker/kubernetes against Kubernetes' schemas, the service's flags and metrics, and each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.api.middleware.security import OPEN_ROUTES
from service.cli import build_parser
from service.observability.metrics import Metrics
from service.settings import Settings

KUBERNETES = Path(__file__).parents[2] / "docker/kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
OF_OTHERS = {"monitoring.coreos.com/v1"}  # schemas that Kubernetes itself does not have
VERSION = "1.31"


def manifest(name: str) -> Any:
    return yaml.safe_load((KUBERNETES / name).read_text())


def pod() -> Any:
    return manifest("base/deployment.yaml")["spec"]["template"]["spec"]


def container() -> Any:
    (only,) = pod()["containers"]
    return only


def rendered(folder: str) -> list[Any]:
    """What kubectl would send to the cluster."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check_schema(resource: Any) -> None:
    if resource["apiVersion"] not in OF_OTHERS:
        kubernetes_validate.validate(resource, VERSION, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_fit_the_schemas(path: Path) -> None:
    if path.parent.name != "gpu":  # a patch is no whole resource
        check_schema(yaml.safe_load(path.read_text()))


def test_a_wrong_field_would_be_found() -> None:
    wrong = manifest("base/deployment.yaml")
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(wrong)


@pytest.mark.parametrize("folder", ["base", "gpu", "monitoring"])
def test_kustomize_renders_what_fits_the_schemas(folder: str) -> None:
    resources = rendered(folder)
    for resource in resources:
        check_schema(resource)
    kinds = {resource["kind"] for resource in resources}
    assert kinds == (
        {"ServiceMonitor", "HorizontalPodAutoscaler"}
        if folder == "monitoring"
        else {"Deployment", "Service", "PodDisruptionBudget"}
    )


def test_the_gpu_overlay_adds_a_gpu_and_takes_nothing_away() -> None:
    (deployment,) = [one for one in rendered("gpu") if one["kind"] == "Deployment"]
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    assert found["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "XLORA_DEVICE", "value": "cuda"} in found["env"]
    assert all(variable in found["env"] for variable in container()["env"])
    for key in ("securityContext", "readinessProbe", "args"):
        assert found[key] == container()[key]
    shared = {"name": "shm", "mountPath": "/dev/shm"}  # what ranks exchange data through
    assert [mount for mount in found["volumeMounts"] if mount != shared] == container()["volumeMounts"]
    assert shared in found["volumeMounts"]


def test_every_listed_file_exists_and_every_file_is_listed() -> None:
    listed = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        whole = yaml.safe_load(path.read_text())
        patches = [one["path"] for one in whole.get("patches", ())]
        listed |= {(path.parent / name).resolve() for name in [*whole["resources"], *patches]}
    assert {path for path in listed if path.is_file()} == {path.resolve() for path in MANIFESTS}
    assert all(path.exists() for path in listed)


def test_the_pod_is_locked_down() -> None:
    whole, security = pod(), container()["securityContext"]
    assert whole["securityContext"]["runAsNonRoot"] is True
    assert f"USER {whole['securityContext']['runAsUser']}:" in (KUBERNETES.parents[1] / "Dockerfile").read_text()
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert whole["automountServiceAccountToken"] is False
    assert {"name": "tmp", "mountPath": "/tmp"} in container()["volumeMounts"]


def test_flags_and_variables_are_the_service_s() -> None:
    """Kubernetes' service links would be unknown XLORA_ variables, with which the service does not start."""
    build_parser().parse_args(container()["args"])
    for variable in container()["env"]:
        assert variable["name"].removeprefix("XLORA_").lower() in Settings.model_fields
    assert pod()["enableServiceLinks"] is False
    mounted = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    for variable in container()["env"]:
        if variable["name"].endswith("_FILE"):
            assert variable["value"].startswith(f"{mounted['keys']}/")


def test_the_pod_has_time_to_drain() -> None:
    arguments = build_parser().parse_args(container()["args"])
    probe = container()["readinessProbe"]
    assert float(arguments.drain_delay) > probe["periodSeconds"] * probe["failureThreshold"]
    assert float(arguments.drain_delay) + float(arguments.drain_seconds) + 5 <= pod()["terminationGracePeriodSeconds"]


def test_probes_ask_what_answers_without_a_key_on_the_port_of_the_service() -> None:
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {probe["path"] for probe in probes.values()} <= OPEN_ROUTES
    (port,) = container()["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    (service,) = manifest("base/service.yaml")["spec"]["ports"]
    assert (service["targetPort"], service["name"]) == (port["name"], "http")


def test_everything_selects_the_same_pods() -> None:
    labels = {"app.kubernetes.io/name": "xlora"}
    deployment = manifest("base/deployment.yaml")["spec"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"] == labels
    assert manifest("base/service.yaml")["spec"]["selector"] == labels
    assert manifest("base/disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    target = manifest("monitoring/autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("base/deployment.yaml")["metadata"]["name"])


def test_monitoring_reads_what_the_service_has() -> None:
    monitor = manifest("monitoring/monitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"] == {"app.kubernetes.io/name": "xlora"}
    (endpoint,) = monitor["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    (volume,) = [one for one in pod()["volumes"] if one["name"] == "keys"]
    assert endpoint["authorization"]["credentials"]["name"] == volume["secret"]["secretName"]
    (metric,) = manifest("monitoring/autoscaler.yaml")["spec"]["metrics"]
    registry = CollectorRegistry()
    Metrics(registry)
    name = metric["pods"]["metric"]["name"]
    assert name in registry._collector_to_names[registry._names_to_collectors[name]]
    assert re.search(rf"seriesQuery: '{name}\{{", (KUBERNETES / "monitoring/kustomization.yaml").read_text())
