"""Writes rules.yaml beside this file: docker/prometheus/rules as the PrometheusRule that the Prometheus operator takes.

    python3 docker/kubernetes/monitoring/make_rules.py

The operator takes no rule files, and kustomize makes nothing but ConfigMaps of files. A test compares the two.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parents[1] / "prometheus/rules"
HEAD = """\
# Made of docker/prometheus/rules by make_rules.py: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: xlora
spec:
  groups:
"""


def rendered() -> str:
    """The rule files' groups, one file after another, under the head of the resource."""
    groups = [path.read_text("utf-8").partition("groups:\n")[2] for path in sorted(RULES.glob("*.yml"))]
    return HEAD + "\n".join(textwrap.indent(one.strip("\n") + "\n", "  ") for one in groups)


if __name__ == "__main__":
    (HERE / "rules.yaml").write_text(rendered(), "utf-8")
