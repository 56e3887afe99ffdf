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

DOCKER = Path(__file__).parents[2] / "docker"
KUBERNETES = DOCKER / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
OF_OTHERS = {"monitoring.coreos.com/v1"}  # schemas that Kubernetes itself does not have
PATCHES = {"gpu/gpu.yaml", "model/model.yaml"}  # no whole resources
SERVICE = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
KINDS = {
    "base": SERVICE,
    "gpu": SERVICE,
    "model": SERVICE | {"PersistentVolumeClaim"},
    "monitoring": {"ServiceMonitor", "PrometheusRule", "ConfigMap", "HorizontalPodAutoscaler"},
}
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
    if f"{path.parent.name}/{path.name}" not in PATCHES:
        check_schema(yaml.safe_load(path.read_text()))


def test_a_wrong_field_would_be_found() -> None:
    wrong = manifest("base/deployment.yaml")
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(wrong)


@pytest.mark.parametrize("folder", KINDS)
def test_kustomize_renders_what_fits_the_schemas(folder: str) -> None:
    resources = rendered(folder)
    for resource in resources:
        check_schema(resource)
    assert {resource["kind"] for resource in resources} == KINDS[folder]


def overlaid(folder: str) -> tuple[Any, Any]:
    """The pod and the container of an overlay, which takes nothing away that the base has."""
    (deployment,) = [one for one in rendered(folder) if one["kind"] == "Deployment"]
    whole = deployment["spec"]["template"]["spec"]
    (found,) = whole["containers"]
    for key in ("securityContext", "readinessProbe", "args"):
        assert found[key] == container()[key]
    for key, of in (("env", container()), ("volumeMounts", container()), ("volumes", pod())):
        names = {one["name"] for one in (whole if key == "volumes" else found)[key]}
        assert {one["name"] for one in of[key]} <= names
    return whole, found


def test_the_gpu_overlay_adds_a_gpu_and_takes_nothing_away() -> None:
    _, found = overlaid("gpu")
    assert found["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "XLORA_DEVICE", "value": "cuda"} in found["env"]
    shared = {"name": "shm", "mountPath": "/dev/shm"}  # what ranks exchange data through
    assert [mount for mount in found["volumeMounts"] if mount != shared] == container()["volumeMounts"]
    assert shared in found["volumeMounts"]


def test_the_model_overlay_serves_from_the_volume_it_mounts() -> None:
    whole, found = overlaid("model")
    (claim,) = [one for one in rendered("model") if one["kind"] == "PersistentVolumeClaim"]
    (volume,) = [one for one in whole["volumes"] if one["name"] == "models"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"], "readOnly": True}
    (mount,) = [one for one in found["volumeMounts"] if one["name"] == "models"]
    (model,) = [one["value"] for one in found["env"] if one["name"] == "XLORA_MODEL"]
    assert mount["readOnly"] is True
    assert model.startswith(f"{mount['mountPath']}/")


def test_every_listed_file_exists_and_every_file_is_listed() -> None:
    listed = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        whole = yaml.safe_load(path.read_text())
        patches = [one["path"] for one in whole.get("patches", ())]
        listed |= {(path.parent / name).resolve() for name in [*whole["resources"], *patches]}
    listed.discard(DOCKER / "grafana")
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


def test_no_stream_is_cut_by_a_stop() -> None:
    """Whatever was begun before the pod left the endpoints has its whole --request-timeout before the kill."""
    arguments = build_parser().parse_args(container()["args"])
    probe = container()["readinessProbe"]
    assert float(arguments.drain_delay) > probe["periodSeconds"] * probe["failureThreshold"]
    assert float(arguments.drain_seconds) >= Settings.model_fields["request_timeout"].default
    assert float(arguments.drain_delay) + float(arguments.drain_seconds) + 5 <= pod()["terminationGracePeriodSeconds"]


def test_an_apply_leaves_the_number_of_pods_to_the_autoscaler() -> None:
    """With `replicas` in it every apply would take an autoscaled service back to that number."""
    for folder in ("base", "gpu", "model"):
        (deployment,) = [one for one in rendered(folder) if one["kind"] == "Deployment"]
        assert "replicas" not in deployment["spec"]
    assert manifest("monitoring/autoscaler.yaml")["spec"]["minReplicas"] >= 2


def test_the_threads_are_the_cores_that_the_pod_asks_for() -> None:
    (threads,) = [one for one in container()["env"] if one["name"] == "XLORA_THREADS"]
    assert threads["valueFrom"] == {"resourceFieldRef": {"resource": "requests.cpu", "divisor": "1"}}
    for requests in (container()["resources"]["requests"], overlaid("gpu")[1]["resources"]["requests"]):
        assert int(requests["cpu"]) >= 1  # a part of a core would be rounded up


def test_pods_are_spread_over_hosts_and_zones() -> None:
    labels = manifest("base/deployment.yaml")["spec"]["selector"]["matchLabels"]
    spread = {one["topologyKey"]: one["labelSelector"]["matchLabels"] for one in pod()["topologySpreadConstraints"]}
    assert spread == {"kubernetes.io/hostname": labels, "topology.kubernetes.io/zone": labels}


def test_the_network_is_closed_but_for_callers_of_the_service() -> None:
    policy = manifest("base/network.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == manifest("base/service.yaml")["spec"]["selector"]
    assert (policy["policyTypes"], policy["egress"]) == (["Ingress", "Egress"], [])
    (ingress,) = policy["ingress"]
    assert ingress["ports"] == [{"port": container()["ports"][0]["name"], "protocol": "TCP"}]
    assert ingress["from"]


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


def test_rules_and_dashboards_are_those_of_compose(promtool: str, tmp_path: Path) -> None:
    """Prometheus itself reads what the operator would hand it."""
    resources = {one["kind"]: one for one in rendered("monitoring")}
    files = [yaml.safe_load(path.read_text()) for path in sorted((DOCKER / "prometheus/rules").glob("*.yml"))]
    again = "python3 docker/kubernetes/monitoring/make_rules.py"
    groups = [group for file in files for group in file["groups"]]
    assert resources["PrometheusRule"]["spec"]["groups"] == groups, f"run {again}"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(resources["PrometheusRule"]["spec"]))
    done = subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    boards = {path.name: path.read_text() for path in (DOCKER / "grafana/dashboards").glob("*.json")}
    del boards["proxy.json"]  # of compose's HAProxy
    assert resources["ConfigMap"]["data"] == boards
    assert len(yaml.safe_dump(resources["ConfigMap"])) < 256 << 10  # what an apply keeps as an annotation
