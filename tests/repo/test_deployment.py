"""Prometheus' rules, Grafana's dashboard and the compose files of docker/, against the code and each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.proxy import CONFIGURATION, MISSING, drain_delay, installed, proxy
from tests.support.server_process import free_port

DOCKER = Path(__file__).parents[2] / "docker"
PROMETHEUS = DOCKER / "prometheus"
RULES = sorted(PROMETHEUS.glob("rules/*.yml"))
UNIT_TESTS = PROMETHEUS / "tests/rules_test.yml"
DASHBOARD = DOCKER / "grafana/dashboards/xlora.json"
PROXY_DASHBOARD = DOCKER / "grafana/dashboards/proxy.json"
CALLED = {"page", "ticket"}  # the severities of alerts


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in load(path)["groups"] for rule in group["rules"]]


def promtool_finds_nothing(promtool: str, *arguments: str | Path) -> None:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def known_series() -> set[str]:
    """Every series that a scrape of the service or a recording rule can bring."""
    registry = CollectorRegistry()
    Metrics(registry)
    names = {name for given in registry._collector_to_names.values() for name in given}
    names |= {f"{name}_{part}" for name in names for part in ("bucket", "sum", "count")}
    return names | {"up"} | {rule["record"] for rule in rules() if "record" in rule}


def series_in(expression: str) -> set[str]:
    return set(re.findall(r"(?:\w+:)?xlora_\w+(?::\w+)?", re.sub(r"\{[^}]*\}", "", expression)))


def test_prometheus_configuration(promtool):
    for name in ("prometheus.yml", "prometheus.ray.yml"):
        promtool_finds_nothing(promtool, "check", "config", "--lint-fatal", PROMETHEUS / name)


def test_rules_are_well_formed(promtool):
    promtool_finds_nothing(promtool, "check", "rules", "--lint-fatal", *RULES)


def test_rules_record_and_fire_as_their_unit_tests_say(promtool):
    promtool_finds_nothing(promtool, "test", "rules", UNIT_TESTS)


def test_every_alert_has_a_unit_test_in_which_it_fires():
    tested = {
        case["alertname"]
        for test in load(UNIT_TESTS)["tests"]
        for case in test.get("alert_rule_test", ())
        if case.get("exp_alerts")
    }
    assert {rule["alert"] for rule in rules() if "alert" in rule} == tested


def test_rules_read_series_that_exist():
    for rule in rules():
        assert series_in(rule["expr"]) <= known_series(), rule


def test_the_two_configurations_differ_in_the_key_only():
    plain, keyed = load(PROMETHEUS / "prometheus.yml"), load(PROMETHEUS / "prometheus.keys.yml")
    assert [one["job_name"] for one in plain["scrape_configs"]] == ["xlora", "haproxy"]
    assert keyed["scrape_configs"][0].pop("authorization") == {"credentials_file": "/run/secrets/xlora_admin_key"}
    assert plain == keyed


def test_the_configuration_for_ray_differs_in_the_target_and_the_replicas_label_only():
    plain, ray = load(PROMETHEUS / "prometheus.yml"), load(PROMETHEUS / "prometheus.ray.yml")
    [port] = {target.split(":")[1] for target in ray["scrape_configs"][0].pop("static_configs")[0]["targets"]}
    assert int(port) == load(DOCKER / "ray-serve.yaml")["http_options"]["port"]
    renamed = ray["scrape_configs"][0].pop("metric_relabel_configs")
    assert [rule.get("target_label", rule.get("action")) for rule in renamed] == ["instance", "labeldrop"]
    plain["scrape_configs"][0].pop("dns_sd_configs")
    plain["scrape_configs"].pop()  # Ray has proxies of its own
    assert plain == ray


def test_every_alert_reaches_a_receiver(amtool: str) -> None:
    """... of its severity, at the address where the compose files have Alertmanager and the pager."""
    path = DOCKER / "alertmanager/alertmanager.yml"
    done = subprocess.run([amtool, "check-config", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    severities = {rule["labels"]["severity"] for rule in rules() if "alert" in rule}
    assert severities == CALLED
    for severity in severities:
        command = [amtool, "config", "routes", "test", f"--config.file={path}", f"severity={severity}"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == severity
    services = compose("compose.yaml")["services"]
    [target] = load(PROMETHEUS / "prometheus.yml")["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert services["alertmanager"]["ports"] == [f"127.0.0.1:${{ALERTMANAGER_PORT:-9093}}:{target.split(':')[1]}"]
    [address] = [part for part in services["pager"]["entrypoint"] if part.startswith("0.0.0.0:")]
    for receiver in load(path)["receivers"]:
        [hook] = receiver["webhook_configs"]
        assert hook["url"] == f"http://pager:{address.split(':')[1]}/{receiver['name']}"


def panels(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in node.get("panels", ()):
        yield panel
        yield from panels(panel)


def test_dashboard_reads_series_that_exist():
    for panel in panels(json.loads(DASHBOARD.read_text())):
        for target in panel.get("targets", ()):
            assert series_in(target["expr"]) <= known_series(), (panel["title"], target)


def test_dashboard_uses_the_provisioned_data_source_and_panels_do_not_overlap():
    source = load(DOCKER / "grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    assert [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"] == [
        *("Overview", "Latency", "Gate", "Engine", "Processes")
    ]
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
            assert panel["description"], panel["title"]


def test_the_proxy_s_dashboard_reads_what_the_proxy_has(tmp_path: Path) -> None:
    """HAProxy itself says which series there are."""
    if not installed():
        pytest.skip(MISSING)
    port = free_port()
    with proxy([free_port()], tmp_path, port), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        there = set(re.findall(r"^(haproxy_\w+)", answer.read().decode(), re.M))
    expressions = [
        target["expr"]
        for panel in panels(json.loads(PROXY_DASHBOARD.read_text()))
        for target in panel.get("targets", ())
    ]
    assert set(re.findall(r"haproxy_\w+", " ".join(expressions))) <= there
    assert len(expressions) >= 6


def test_dashboard_shows_every_metric_of_the_service():
    text = DASHBOARD.read_text() + "".join(rule["expr"] for rule in rules() if "record" in rule)
    registry = Metrics(CollectorRegistry()).registry
    families = [family.name for collector in registry._collector_to_names for family in collector.describe()]
    assert [name for name in families if name not in text] == []


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's own tags: `!reset` takes out what an earlier file has given."""


ComposeLoader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def compose(name: str) -> dict[str, Any]:
    loaded = yaml.load((DOCKER / name).read_text("utf-8"), ComposeLoader)
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("path", sorted(DOCKER.glob("compose*.yaml")), ids=lambda path: path.stem)
def test_compose_files_fit_the_schema(path, tmp_path):
    """The schema is inside check-jsonschema: nothing is fetched. It does not know tags, so those are resolved first."""
    plain = tmp_path / "compose.json"
    plain.write_text(json.dumps(compose(path.name)))
    finds_nothing("check-jsonschema", "--builtin-schema", "vendor.compose-spec", plain)


def test_the_dockerfile_is_clean():
    finds_nothing("hadolint", "--failure-threshold", "info", DOCKER.parent / "Dockerfile")


def finds_nothing(tool: str, *arguments: str | Path) -> None:
    """Runs a tool of this environment."""
    command = [Path(sys.executable).parent / tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_knows_what_compose_builds_with():
    """An unknown argument is ignored but for a warning: the label would stay `unknown`."""
    known = set(re.findall(r"^ARG (\w+)", (DOCKER.parent / "Dockerfile").read_text(), re.M))
    given = set(compose("compose.yaml")["services"]["xlora"]["build"]["args"])
    assert "REVISION" in given
    assert given <= known


def test_containers_are_locked_down_limited_and_health_checked():
    overlay = compose("compose.replicas.yaml")["services"]["proxy"]
    for name, container in {**compose("compose.yaml")["services"], "proxy": overlay}.items():
        assert container["read_only"] is True, name
        assert container["cap_drop"] == ["ALL"], name
        assert container["security_opt"] == ["no-new-privileges:true"], name
        assert set(container["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert container["healthcheck"]["test"][0] == "CMD", name
        assert all(port.startswith("127.0.0.1:") for port in container.get("ports", ())), name
        assert not container.get("privileged"), name
        user = container.get("user", "10001:10001")  # the Dockerfile's, where compose does not say
        assert int(user.split(":")[0]) > 0, name
    assert "USER 10001:10001" in (DOCKER.parent / "Dockerfile").read_text()


def test_start_waits_for_health_and_images_are_pinned():
    services = compose("compose.yaml")["services"]
    front = compose("compose.replicas.yaml")["services"]["proxy"]
    for name, needed in (("prometheus", "xlora"), ("grafana", "prometheus")):
        assert services[name]["depends_on"] == {needed: {"condition": "service_healthy"}}
    assert front["depends_on"] == {"xlora": {"condition": "service_healthy"}}
    for container in (services["prometheus"], services["alertmanager"], services["grafana"], front):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", container["image"])


def default(text: str) -> float:
    """The number in `${NAME:-600}` or `${NAME:-615s}`."""
    found = re.fullmatch(r"\$\{\w+:-(\d+)s?\}", text)
    assert found is not None, text
    return float(found[1])


def test_no_stream_is_cut_by_a_stop() -> None:
    """A request may take --request-timeout; so long the service drains, then it is killed, and then the proxy ends."""
    container = compose("compose.yaml")["services"]["xlora"]
    flag, seconds = container["command"][1:]
    assert flag == "--drain-seconds"
    longest = Settings.model_fields["request_timeout"].default
    grace = default(container["stop_grace_period"])
    assert longest <= default(seconds) <= grace - drain_delay() - 5
    found = re.search(r"^ +hard-stop-after (\d+)s$", CONFIGURATION.read_text(), re.M)
    assert found is not None
    assert (
        longest < float(found[1]) < default(compose("compose.replicas.yaml")["services"]["proxy"]["stop_grace_period"])
    )
    assert f"--time {grace:g} " in (DOCKER.parent / "docs/operations.md").read_text()


def test_the_proxy_has_descriptors_and_memory_for_all_connections() -> None:
    """Each connection has one to a replica too, and at worst a full buffer each way on both sides."""
    text, container = CONFIGURATION.read_text(), compose("compose.replicas.yaml")["services"]["proxy"]
    connections, buffer_bytes = (
        int(re.findall(rf"^ +{name} (\d+)$", text, re.M)[0]) for name in ("maxconn", "tune.bufsize")
    )
    assert 2 * connections + 100 <= container["ulimits"]["nofile"]
    memory = int(container["deploy"]["resources"]["limits"]["memory"].removesuffix("m")) << 20
    assert 2 * connections * buffer_bytes < memory * 0.8


def test_a_replica_that_stops_serves_until_the_proxy_has_noticed():
    """The proxy's checks are a second apart, then 250 ms; the second that fails takes the replica out."""
    assert "check inter 1s fastinter 250ms fall 2 " in CONFIGURATION.read_text()
    assert drain_delay() >= 2 * (1 + 0.25)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml", "compose.keys.yaml", "compose.replicas.yaml"])
def test_variables_are_settings_and_what_is_named_exists(name):
    """An unknown XLORA_ variable keeps the service from starting; a missing file would be mounted as a directory."""
    whole = compose(name)
    for container in whole["services"].values():
        for variable in container.get("environment", {}):
            if variable.startswith("XLORA_"):
                assert variable.removeprefix("XLORA_").lower() in Settings.model_fields
        for volume in container.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in whole["volumes"]
        for secret in container.get("secrets", ()):
            assert secret in whole["secrets"]


def test_the_alert_on_missing_replicas_knows_how_many_there_should_be():
    replicated = compose("compose.replicas.yaml")["services"]["xlora"]
    assert replicated["environment"]["XLORA_WANTED_REPLICAS"] == replicated["deploy"]["replicas"]
    pod = load(DOCKER / "kubernetes/base/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    [wanted] = [variable["value"] for variable in pod["env"] if variable["name"] == "XLORA_WANTED_REPLICAS"]
    assert int(wanted) == load(DOCKER / "kubernetes/monitoring/autoscaler.yaml")["spec"]["minReplicas"]


def test_env_example_lists_every_variable_with_its_default():
    files = [path.read_text() for path in DOCKER.glob("compose*.yaml")]
    used = dict(found for text in files for found in re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    lines = (DOCKER / ".env.example").read_text().splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == used


def test_secrets_are_not_in_the_repository_or_the_image():
    assert {"/docker/.env", "/docker/secrets/"} <= set((DOCKER.parent / ".gitignore").read_text().splitlines())
    assert "!docker" not in (DOCKER.parent / ".dockerignore").read_text()


def test_the_service_is_scraped_where_it_listens():
    target = load(PROMETHEUS / "prometheus.yml")["scrape_configs"][0]["dns_sd_configs"][0]
    assert target["names"] == ["xlora"]
    assert compose("compose.yaml")["services"]["xlora"]["ports"][0].endswith(f":{target['port']}")


def test_the_proxy_listens_and_looks_where_compose_says():
    text = (DOCKER / "haproxy/haproxy.cfg").read_text()
    front = compose("compose.replicas.yaml")["services"]["proxy"]
    assert "bind :8000" in text
    assert front["ports"][0].endswith(":8000")
    assert re.search(r"server-template \w+ \d+ xlora:8000 ", text)
    timeout = re.search(r"timeout server (\d+)s", text)
    assert timeout is not None
    assert int(timeout[1]) > Settings().request_timeout
    [target] = load(DOCKER / "haproxy/targets/haproxy.yml")[0]["targets"]
    assert f"    bind :{target.removeprefix('proxy:')}\n    http-request use-service prometheus-exporter" in text
    mounted = compose("compose.replicas.yaml")["services"]["prometheus"]["volumes"]
    [pattern] = load(PROMETHEUS / "prometheus.yml")["scrape_configs"][1]["file_sd_configs"][0]["files"]
    assert mounted == [f"./haproxy/targets:{Path(pattern).parent}:ro"]
