"""The Serve config file and the command's flags against Ray's schema and our own settings. No cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service import cli
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.server_process import ROOT

CONFIG = ROOT / "docker/ray-serve.yaml"


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'xlora-service[ray]')")


@pytest.fixture(scope="module")
def isolated() -> Iterator[Callable[[str], Any]]:
    """What programs print as JSON, run one after another by one process that has imported Ray: Ray does not live with
    warnings that are errors.
    """
    command = [sys.executable, "-c", "import sys, json\nfor line in sys.stdin: exec(json.loads(line), {})"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def printed(program: str) -> Any:
            print(json.dumps(program), file=process.stdin)
            line = process.stdout.readline()
            assert line, "it failed: its traceback is above"
            return json.loads(line)

        yield printed
        process.stdin.close()


def test_the_config_file_is_what_ray_and_we_understand(isolated: Callable[[str], Any]) -> None:
    """... built as `serve deploy` builds it, and with what `xlora-serve cluster` puts before the replicas."""
    program = f"""
import json, yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.schema import ServeDeploySchema
from service.cluster.launch import proxy_variables
from service.cluster.replica import ClusterArguments, application
from service.settings import load_settings
config = ServeDeploySchema.model_validate(yaml.safe_load(open({str(CONFIG)!r})))
[app] = config.applications
arguments = ClusterArguments.model_validate(app.args)
args = {{**app.args, "settings": {{**app.args["settings"], "device": "cpu"}}}}  # `auto` would ask a cluster for GPUs
built = build(application, args)._bound_deployment._deployment_config.autoscaling_config
module, name = app.import_path.split(":")
print(json.dumps({{
    "path": (module, name) == (application.__module__, application.__name__),
    "environment": config.controller_options.runtime_env["env_vars"],
    "expected": proxy_variables(load_settings(arguments.settings)),
    "settings": sorted(arguments.settings),
    "replicas": [built.min_replicas, built.max_replicas] == [arguments.replicas, arguments.max_replicas],
}}))
"""
    found = isolated(program)
    assert found["path"]
    assert found["replicas"]
    assert found["environment"] == found["expected"]
    assert set(found["settings"]) <= set(Settings.model_fields)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"replicas": 3}, {"num_replicas": 3, "autoscaling": None, "queued": 3 * 36}),
        ({"replicas": 1, "max_replicas": 4}, {"num_replicas": None, "autoscaling": [1, 4, 8], "queued": 4 * 36}),
    ],
)
def test_flags_become_the_deployment(
    isolated: Callable[[str], Any], arguments: dict[str, int], expected: dict[str, Any]
) -> None:
    """Bounds follow from the settings: what a replica may hold, what may wait, how long a drain takes."""
    settings = {"max_num_seqs": 16, "max_queued_requests": 20, "drain_seconds": 30, "threads": 2, "device": "cpu"}
    program = f"""
import json
from service.cluster.replica import ClusterArguments, application
deployment = application(ClusterArguments(settings={settings!r}, **{arguments!r}))._bound_deployment
config, auto = deployment._deployment_config, deployment._deployment_config.autoscaling_config
print(json.dumps({{
    "num_replicas": None if auto else config.num_replicas,
    "autoscaling": auto and [auto.min_replicas, auto.max_replicas, auto.target_ongoing_requests],
    "ongoing": config.max_ongoing_requests, "queued": config.max_queued_requests,
    "drain": config.graceful_shutdown_timeout_s, "actor": deployment.ray_actor_options,
    "refusal": config.backpressure_config.status_code,
}}))
"""
    found = isolated(program)
    assert {name: found[name] for name in expected} == expected
    assert found["ongoing"] >= 16 + 20
    assert found["refusal"] == 429
    assert 30 <= found["drain"] <= 35
    assert (found["actor"]["num_cpus"], found["actor"]["num_gpus"]) == (2, 0)


def test_every_rank_of_a_replica_has_its_own(isolated: Callable[[str], Any]) -> None:
    """Ray shows a replica the GPUs that it counts, and no others."""
    settings = {"tensor_parallel": 2, "threads": 3, "device": "cuda"}
    program = f"""
import json
from service.cluster.replica import ClusterArguments, application
print(json.dumps(application(ClusterArguments(settings={settings!r}))._bound_deployment.ray_actor_options))
"""
    found = isolated(program)
    assert (found["num_cpus"], found["num_gpus"]) == (6, 2)


def test_metrics_of_replicas_are_merged_by_family(isolated: Callable[[str], Any]) -> None:
    """Each family once, each series under its replica; counters keep their names, histograms their buckets."""
    program = """
import json
from prometheus_client import CollectorRegistry
from service.cluster.replica import merged
from service.observability.metrics import Metrics
replicas = {name: Metrics(CollectorRegistry()) for name in "ab"}
replicas["a"].observe_tokens(3, [])
replicas["b"].observe_tokens(4, [])
replicas["b"].queue_time.observe(0.3)
print(json.dumps(merged({name: one.registry.collect() for name, one in replicas.items()}).decode()))
"""
    lines = isolated(program).splitlines()
    assert 'xlora_generated_tokens_total{replica="a"} 3.0' in lines
    assert 'xlora_generated_tokens_total{replica="b"} 4.0' in lines
    assert 'xlora_queue_time_seconds_bucket{le="0.5",replica="b"} 1.0' in lines
    assert 'xlora_queue_time_seconds_bucket{le="0.25",replica="b"} 0.0' in lines
    alone = Metrics(CollectorRegistry()).render().decode().splitlines()
    types = [line for line in alone if line.startswith("# TYPE") and "_created" not in line]
    assert [line for line in lines if line.startswith("# TYPE") and "_created" not in line] == types


def test_keys_do_not_travel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XLORA_API_KEYS", "a-key-of-the-test")
    program = """
import sys
from service import cli
sys.exit(cli.main(["cluster", "--address", "127.0.0.9:1"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "XLORA_API_KEYS does not travel" in done.stderr
    assert "a-key-of-the-test" not in done.stderr


@pytest.mark.parametrize(
    "argv", [["--replicas", "0"], ["--max-replicas", "x"], ["--max-header-bytes", "4096"], ["--replicas"]]
)
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.build_parser().parse_args(["cluster", *argv])
    assert end.value.code == 2
