"""The manifests of deploy/kubernetes: Kubernetes takes them, the daemons take their configurations, and they agree."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import kubernetes_validate
import pytest
import yaml

import transocks.cli
import usocksd.cli

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
# What is applied as it is; the other kustomization is a component.
ROOTS = ["usocksd/base", "usocksd/daemonset", "usocksd/monitored", "transocks/node", "transocks/gateway", "transocks/sidecar-example"]  # fmt: skip
KUBERNETES = "1.37"
Resource: TypeAlias = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Resource]]:
    """The resources of each root, as kustomize makes them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    found = {}
    for root in ROOTS:
        command = ["kubectl", "kustomize", str(FOLDER / root)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[root] = list(yaml.load_all(done.stdout, yaml.CSafeLoader))
    return found


def test_kubernetes_takes_them(rendered: dict[str, list[Resource]]) -> None:
    found = {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("kustomization.yaml")}
    assert found == {*ROOTS, "transocks/sidecar"}
    foreign = set()
    for resource in everything(rendered):
        try:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            foreign.add(resource["kind"])
    assert foreign == {"ServiceMonitor"}, "of the Prometheus operator"


def test_the_daemons_take_their_configurations(
    rendered: dict[str, list[Resource]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        (name, text)
        for resource in everything(rendered)
        if resource["kind"] == "ConfigMap"
        for name, text in resource["data"].items()
    }
    assert {name for name, _ in texts} == {"usocksd.toml", "transocks.toml"}
    for name, text in texts:
        file = tmp_path / name
        file.write_text(text)
        main = {"usocksd": usocksd.cli.main, "transocks": transocks.cli.main}[file.stem]
        assert main(["check", "-q", str(file)]) == 0, capsys.readouterr()


def test_what_they_refer_to_is_there(rendered: dict[str, list[Resource]]) -> None:
    container = (FOLDER.parent / "container" / "Containerfile").read_text()
    for resources in rendered.values():
        maps = {each["metadata"]["name"]: each["data"] for each in resources if each["kind"] == "ConfigMap"}
        for workload in (each for each in resources if each["kind"] in ("Deployment", "DaemonSet")):
            pod = workload["spec"]["template"]["spec"]
            volumes = {each["name"]: each for each in pod["volumes"]}
            ours = [
                each for each in (*pod.get("initContainers", ()), *pod["containers"]) if each["image"] == "transocks"
            ]
            assert ours
            configs = []
            for each in ours:
                security = pod.get("securityContext", {}) | each["securityContext"]
                assert security["readOnlyRootFilesystem"]
                assert security["capabilities"]["drop"] == ["ALL"]
                assert security["seccompProfile"] == {"type": "RuntimeDefault"}
                assert set(each["resources"]) == {"requests", "limits"}
                if "rules" not in each["command"]:
                    assert not security["capabilities"].get("add")
                    assert security["runAsNonRoot"]
                    assert f"useradd --uid {security['runAsUser']} " in container
                ports = {port["name"]: port["containerPort"] for port in each.get("ports", ())}
                probes = [probe["httpGet"] for key, probe in each.items() if key.endswith("Probe")]
                assert all(ports[probe["port"]] in (1082, 1083) for probe in probes)
                for mount in each["volumeMounts"]:
                    volume = volumes[mount["name"]]
                    if "configMap" in volume:
                        text = maps[volume["configMap"]["name"]][mount["subPath"]]
                        configs.append(tomllib.loads(text))
                        assert mount["mountPath"] == f"/etc/{each['command'][0]}.toml"
                    else:
                        assert configs[-1]["control"].startswith(mount["mountPath"] + "/")
            # systemd gives a stop 10 seconds more than the daemon needs, and so do these. (30 is the default.)
            delays = [float(setting["value"]) for each in ours for setting in each.get("env", ())]
            assert pod.get("terminationGracePeriodSeconds", 30) >= sum(delays) + configs[0]["timeouts"]["stop"] + 10


def everything(rendered: dict[str, list[Resource]]) -> Iterator[Resource]:
    for resources in rendered.values():
        yield from resources
