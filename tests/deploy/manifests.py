"""Reads the manifests under deploy/, renders them with kustomize, and validates them against published schemas."""

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from tests.conftest import REPOSITORY

KUBERNETES = REPOSITORY / "deploy/kubernetes"
KSERVE = REPOSITORY / "deploy/kserve"
# The oldest version that all fields exist in, and the newest whose schemas the package holds.
OLDEST, NEWEST = "1.27", kubernetes_validate.latest_version()

Manifest = dict[str, Any]


def load(path: Path) -> Manifest:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


def resources(folder: Path) -> dict[str, Manifest]:
    """The complete objects in the files that a kustomization and its components name, by file name."""
    kustomization = load(folder / "kustomization.yaml")
    found: dict[str, Manifest] = {}
    for name in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        if (folder / name).is_dir():
            found |= resources((folder / name).resolve())
        else:
            found[name] = load(folder / name)
    return found


def validate(manifest: Manifest) -> None:
    """Compares an object with the schemas of Kubernetes; fields that a schema does not know are errors.

    Raises:
        kubernetes_validate.ValidationError: A field is unknown, missing or of the wrong type.
    """
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(copy.deepcopy(manifest), version, strict=True)


def kustomize() -> list[str] | None:
    """The command that renders a kustomization; None if this machine has none."""
    if path := shutil.which("kustomize"):
        return [path, "build"]
    if path := shutil.which("kubectl"):
        return [path, "kustomize"]
    return None


def render(folder: Path) -> dict[tuple[str, str], Manifest]:
    """What `kubectl apply -k FOLDER` would apply, by kind and name."""
    done = subprocess.run([*(kustomize() or ()), str(folder)], check=True, capture_output=True, text=True)
    assert not done.stderr, done.stderr  # it warns of fields that will disappear
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}


def containers_of(manifest: Manifest) -> Manifest:
    """The only container of a Deployment or a ServingRuntime."""
    pod = manifest["spec"] if manifest["kind"] == "ServingRuntime" else manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return container


def environment_of(container: Manifest) -> dict[str, str]:
    """The environment variables of a container."""
    return {variable["name"]: variable["value"] for variable in container["env"]}


def queries(dashboard: Path) -> Iterator[tuple[str, str]]:
    """The title of each panel of a Grafana dashboard with each of its queries; variables have values."""
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$namespace", "production")
            yield panel["title"], query
