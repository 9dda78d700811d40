"""The cluster manifests: against KubeRay's schemas, against each other, and against what docs/cluster.md explains.

Deployment and Job have no schema here: of them only the checks that hold for every manifest are made. Nothing is
applied to a cluster.
"""

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from packaging.requirements import Requirement

from curate.jobs.cli import app

HOUSE = Path(__file__).parents[1]
FOLDER = HOUSE / "jobs/kuberay"
PAGE = HOUSE / "docs/cluster.md"
SCHEMAS = HOUSE.parent / "shared/kuberay"
KUBERAY = {"RayCluster", "RayCronJob", "RayJob"}
BASE = "kustomization.yaml"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != BASE)
Manifest = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is a mistake: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        assert len(names) == len(set(names)), f"{node.start_mark}: a key is given twice in {names}"
        return super().construct_mapping(node, deep)


def load(name: str) -> Manifest:
    loaded = yaml.load((FOLDER / name).read_text(encoding="utf-8"), StrictLoader)
    assert isinstance(loaded, dict), f"{name}: one manifest per file"
    return loaded


def strict(schema: Any) -> Any:
    """The schema as a JSON schema that refuses unknown fields, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(field) for name, field in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-")
    }
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    if schema.get("x-kubernetes-int-or-string"):  # anyOf says it in these schemas; others leave it to the mark
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's schemas are not here")
    schema = strict(json.loads((SCHEMAS / f"{kind.lower()}.v1.schema.json").read_text(encoding="utf-8")))
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]  # left to the API server
    return jsonschema.Draft202012Validator(schema)


def mistakes(manifest: Manifest) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator(manifest["kind"]).iter_errors(manifest)]


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a manifest, outer ones first."""
    if isinstance(tree, dict):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(item)


def containers(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for node in nodes(manifest):
        yield from node.get("containers", ())


def pods(manifest: Manifest) -> Iterator[dict[str, Any]]:
    return (node for node in nodes(manifest) if "containers" in node)


def cluster_spec(name: str) -> dict[str, Any]:
    """The specification of a Ray cluster, without what is allowed to differ between a standing one and a job's own."""
    spec = load(name)["spec"]
    spec = spec.get("rayClusterSpec", spec)
    return {field: value for field, value in spec.items() if field != "networkPolicy"}


def commands(manifest: Manifest) -> Iterator[list[str]]:
    for node in nodes(manifest):
        if "entrypoint" in node:
            yield shlex.split(node["entrypoint"])
    for container in containers(manifest):
        if command := [*container.get("command", ()), *container.get("args", ())]:
            yield command


def parse(command: list[str]) -> None:
    """Parse one of our command lines without running it; an AssertionError or typer's own error if it is none."""
    if command[0] == "torchrun":
        assert command[3:5] == ["-m", "curate.jobs.cli"], command
        command = ["curate", *command[5:]]
    assert command[0] == "curate", command
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    verb, rest = command[1], command[2:]
    assert verb in group.commands, f"{shlex.join(command)}: no such verb"
    group.commands[verb].make_context(verb, list(rest))


def page_commands() -> list[str]:
    """The command lines in the page's code blocks, continued lines joined, comments left out."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


# --- against KubeRay's schemas -----------------------------------------------------------------------------------


def test_there_is_something_to_look_at() -> None:
    assert {load(name)["kind"] for name in FILES} >= {"RayCluster", "RayJob", "Deployment"}


@pytest.mark.parametrize("name", [name for name in FILES if load(name)["kind"] in KUBERAY])
def test_a_manifest_is_what_the_schema_says(name: str) -> None:
    assert mistakes(load(name)) == []


def misspell_a_field(spec: dict[str, Any]) -> None:
    spec["rayVerison"] = spec.pop("rayVersion")


def misspell_a_field_of_a_container(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["envfrom"] = []


def give_a_number_for_a_text(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def give_a_text_for_a_number(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["replicas"] = "2"


def invent_a_mode(spec: dict[str, Any]) -> None:
    spec["authOptions"]["mode"] = "tokens"


def leave_out_what_is_required(spec: dict[str, Any]) -> None:
    del spec["workerGroupSpecs"][0]["groupName"]


def ask_for_no_quantity(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "32 GB"


@pytest.mark.parametrize(
    ("mutate", "found"),
    [
        (misspell_a_field, "'rayVerison' was unexpected"),
        (misspell_a_field_of_a_container, "'envfrom' was unexpected"),
        (give_a_number_for_a_text, "0 is not of type 'string'"),
        (give_a_text_for_a_number, "'2' is not of type 'integer'"),
        (invent_a_mode, "'tokens' is not one of"),
        (leave_out_what_is_required, "'groupName' is a required property"),
        (ask_for_no_quantity, "'32 GB' does not match"),
    ],
)
@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob-round.yaml"])
def test_a_manifest_with_a_mistake_is_refused(name: str, mutate: Callable[[dict[str, Any]], None], found: str) -> None:
    manifest = copy.deepcopy(load(name))  # aliases of YAML are one object
    mutate(manifest["spec"].get("rayClusterSpec", manifest["spec"]))
    (line,) = mistakes(manifest)
    assert found in line


def test_a_schema_is_made_strict_where_it_is_closed_and_only_there() -> None:
    made = jsonschema.Draft202012Validator(
        strict(
            {
                "type": "object",
                "properties": {
                    "port": {"x-kubernetes-int-or-string": True},
                    "at": {"type": "string", "nullable": True},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                    "anything": {
                        "type": "object",
                        "properties": {"kind": {"type": "string"}},
                        "x-kubernetes-preserve-unknown-fields": True,
                    },
                },
            }
        )
    )
    assert made.is_valid({"port": 8265, "at": None, "labels": {"a": "b"}, "anything": {"kind": "x", "more": 1}})
    assert made.is_valid({"port": "dashboard"})
    assert not made.is_valid({"port": 8265.5})
    assert not made.is_valid({"at": 1})
    assert not made.is_valid({"labels": {"a": 1}})
    assert not made.is_valid({"anything": {"kind": 1}})
    assert not made.is_valid({"prot": 8265})


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="given twice"):
        yaml.load("spec:\n  replicas: 1\n  replicas: 2\n", StrictLoader)


# --- what the operator refuses beyond its schemas (its validation.go) ----------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if load(name)["kind"] in KUBERAY])
def test_the_operator_has_nothing_to_refuse(name: str) -> None:
    manifest = load(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
    for spec in (node for node in nodes(manifest) if "entrypoint" in node):
        assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec)
        if "clusterSelector" in spec:
            assert set(spec["clusterSelector"]) == {"ray.io/cluster"}
            assert not spec.get("backoffLimit"), "a retry would need a cluster of its own"
        assert "ttlSecondsAfterFinished" not in spec or spec.get("shutdownAfterJobFinishes")
        assert not (spec.get("shutdownAfterJobFinishes") and spec.get("deletionStrategy"))
    for spec in (node for node in nodes(manifest) if "headGroupSpec" in node):
        assert spec["authOptions"] == {"mode": "token", "secretName": "curate-ray-token"}
        assert spec["networkPolicy"]["mode"] == "DenyAllIngress"
        assert not any("egressRules" in node for node in nodes(spec["networkPolicy"]))


# --- the files agree with each other and with the project ----------------------------------------------------------


def test_one_image_everywhere_and_no_registry() -> None:
    with (HOUSE / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["tool"]["setuptools_scm"]["fallback_version"]  # an image is built without history
    images = {name: {container["image"] for container in containers(load(name))} for name in FILES}
    assert set().union(*images.values()) == {f"curate:{version}"}, images


def test_the_version_of_ray_is_the_one_that_the_image_installs() -> None:
    versions = {node["rayVersion"] for name in FILES for node in nodes(load(name)) if "rayVersion" in node}
    locked = re.findall(r"^ray==(\S+)", (HOUSE / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions == set(locked)
    with (HOUSE / "pyproject.toml").open("rb") as file:
        declared = [Requirement(line) for line in tomllib.load(file)["project"]["optional-dependencies"]["curate"]]
    (wanted,) = [requirement.specifier for requirement in declared if requirement.name == "ray"]
    assert all(version in wanted for version in versions)


def test_a_job_gets_the_same_cluster_as_the_standing_one() -> None:
    assert cluster_spec("rayjob-round.yaml") == cluster_spec("raycluster.yaml")


def test_names_of_one_file_are_found_in_another() -> None:
    cluster, scheduler, cron = (load(f"{name}.yaml") for name in ("raycluster", "scheduler", "raycronjob-rounds"))
    name = cluster["metadata"]["name"]
    assert cron["spec"]["jobTemplate"]["clusterSelector"] == {"ray.io/cluster": name}
    (command,) = commands(scheduler)
    assert command[-2:] == ["--address", f"http://{name}-head-svc:8265"]
    (rule,) = cluster["spec"]["networkPolicy"]["head"]["ingressRules"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"].items() <= scheduler["spec"]["template"]["metadata"]["labels"].items()
    assert scheduler["spec"]["selector"]["matchLabels"] == scheduler["spec"]["template"]["metadata"]["labels"]
    assert [port["port"] for port in rule["ports"]] == [8265]


@pytest.mark.parametrize("name", FILES)
def test_every_pod_is_held_to_the_same_rules(name: str) -> None:
    manifest = load(name)
    assert manifest["apiVersion"] in {"ray.io/v1", "apps/v1", "batch/v1"}
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["metadata"]) <= {"name", "labels", "annotations"}, "the namespace is the user's"
    for pod in pods(manifest):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", ())}
        assert mounts == volumes
    for container in containers(manifest):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        literal = {variable["name"] for variable in container.get("env", ()) if "value" in variable}
        assert not [variable for variable in literal if re.search("AWS_|TOKEN$|SECRET|KEY$", variable)]


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_one_of_ours(name: str) -> None:
    found = list(commands(load(name)))
    assert found or load(name)["kind"] == "RayCluster"
    for command in found:
        parse(command)
        assert "/etc/curate/recipe.toml" in command
    mounts = [mount for container in containers(load(name)) for mount in container.get("volumeMounts", ())]
    if any("containers" in node for node in nodes(load(name))):
        assert "/etc/curate" in [mount["mountPath"] for mount in mounts]


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("curate rnud recipe.toml", "no such verb"),
        ("curate train recipe.toml --sett a=b", "No such option: --sett"),
        ("curate round", "Missing parameter: recipe"),
        ("torchrun --nproc-per-node 8 -m curate.jobs.train train recipe.toml", "curate.jobs.train"),
        ("ray start --head", "'ray', 'start'"),
    ],
)
def test_a_command_that_is_not_ours_is_refused(command: str, found: str) -> None:
    with pytest.raises(Exception, match=found):
        parse(shlex.split(command))


# --- the page explains them ----------------------------------------------------------------------------------------


def test_every_secret_and_config_map_is_made_on_the_page() -> None:
    made = page_commands()
    secrets, maps, keys = set[str](), set[str](), set[str]()
    for node in (node for name in FILES for node in nodes(load(name))):
        secrets |= {node["secretName"]} if "secretName" in node else set()
        secrets |= {node[field]["name"] for field in ("secretRef", "secretKeyRef") if field in node}
        maps |= {node[field]["name"] for field in ("configMap", "configMapRef", "configMapKeyRef") if field in node}
        keys |= {node["secretKeyRef"]["key"]} if "secretKeyRef" in node else set()
    assert secrets == {"curate-ray-token", "curate-s3"}
    assert maps == {"curate-recipe"}
    for secret in secrets:
        assert any(line.startswith(f"kubectl create secret generic {secret} ") for line in made), secret
    for config_map in maps:
        assert any(line.startswith(f"kubectl create configmap {config_map} ") for line in made), config_map
    # The key that KubeRay looks for, and the file that the scheduler reads.
    assert any("curate-ray-token" in line and "=auth_token=" in line for line in made)


def test_every_manifest_is_used_on_the_page() -> None:
    assert [name for name in FILES if f"jobs/kuberay/{name}" not in "\n".join(page_commands())] == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which has kustomize within")
def test_the_base_takes_an_overlay(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "base")
    (tmp_path / BASE).write_text("resources: [base]\nimages: [{name: curate, newName: there/curate, newTag: '2'}]\n")
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
    made = list(yaml.safe_load_all(done.stdout))
    assert sorted(manifest["kind"] for manifest in made) == ["Deployment", "Job", "RayCluster"]
    images = {container["image"] for manifest in made for container in containers(manifest)}
    assert images == {"there/curate:2"}
    (cluster,) = [manifest for manifest in made if manifest["kind"] == "RayCluster"]
    assert mistakes(cluster) == []


def test_every_command_of_ours_on_the_page_is_one() -> None:
    found = [re.sub(r"^kubectl exec .* -- (?=curate)", "", line) for line in page_commands()]
    ours = [shlex.split(line, comments=True) for line in found if line.startswith("curate ")]
    assert {command[1] for command in ours} >= {"check", "submit", "show"}
    for command in ours:
        parse(command)


def test_the_page_is_short_and_says_what_was_not_tried() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 160
    assert "not applied to a cluster" in " ".join(text.split())
    for gate in ("RayClusterNetworkPolicy", "RayCronJob"):
        assert f"name={gate}" in text, "the manifests need this gate"
