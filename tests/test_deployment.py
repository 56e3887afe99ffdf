"""Prometheus' rules, Grafana's dashboard and the compose files of docker/, against the code and each other."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from service.metrics import Metrics

DOCKER = Path(__file__).parents[1] / "docker"
PROMETHEUS = DOCKER / "prometheus"
RULES = sorted(PROMETHEUS.glob("rules/*.yml"))
UNIT_TESTS = PROMETHEUS / "tests/rules_test.yml"
DASHBOARD = DOCKER / "grafana/dashboards/xlora.json"


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
    promtool_finds_nothing(promtool, "check", "config", "--lint-fatal", PROMETHEUS / "prometheus.yml")


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
    assert keyed["scrape_configs"][0].pop("authorization") == {"credentials_file": "/run/secrets/xlora_admin_key"}
    assert plain == keyed


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
        *("Overview", "Latency", "Gate", "Engine")
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


def test_dashboard_shows_every_metric_of_the_service():
    text = DASHBOARD.read_text() + "".join(rule["expr"] for rule in rules() if "record" in rule)
    registry = Metrics(CollectorRegistry()).registry
    families = [family.name for collector in registry._collector_to_names for family in collector.describe()]
    assert [name for name in families if name not in text] == []
