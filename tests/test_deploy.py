"""The files in deploy/ against the schemas and the server that will read them."""

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from served import provide_tritonserver

from sjepa_deploy.serving.server import find_server

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
BY_KIND = {manifest["kind"]: manifest for manifest in MANIFESTS}


def container():
    (only,) = BY_KIND["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_manifests_follow_the_schemas_of_kubernetes(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_fit_each_other():
    labels = BY_KIND["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert BY_KIND["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert BY_KIND["Service"]["spec"]["selector"] == labels
    assert BY_KIND["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    scaler = BY_KIND["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == BY_KIND["Deployment"]["metadata"]["name"]
    ports = {port["name"] for port in container()["ports"]}
    assert {port["targetPort"] for port in BY_KIND["Service"]["spec"]["ports"]} <= ports
    assert {container()[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} <= ports
    volumes = {volume["name"] for volume in BY_KIND["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes
    (rule,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_a_pod_has_time_to_end():
    flag = next(word for word in container()["command"] if word.startswith("--exit-timeout-secs="))
    sleep = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = BY_KIND["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert sleep + int(flag.partition("=")[2]) < grace


def test_compose_is_limited_watched_and_on_loopback():
    for service in COMPOSE["services"].values():
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    triton = COMPOSE["services"]["triton"]
    assert triton["healthcheck"]["test"][-1].endswith(container()["readinessProbe"]["httpGet"]["path"])
    assert set(COMPOSE["services"]["prometheus"]["depends_on"]) == {"triton"}
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["triton:8002"]


def test_the_server_knows_every_flag(pytestconfig):
    provide_tritonserver(pytestconfig.cache.mkdir("tritonserver"))
    told = subprocess.run([find_server().program, "--help"], capture_output=True, text=True, check=False, timeout=60)
    known = set(re.findall(r"^\s*--([a-z0-9-]+)", told.stdout + told.stderr, re.MULTILINE))
    assert "model-repository" in known
    for command in (COMPOSE["services"]["triton"]["command"], container()["command"]):
        assert command[0] == "tritonserver"
        assert {word[2:].partition("=")[0] for word in command[1:]} <= known
