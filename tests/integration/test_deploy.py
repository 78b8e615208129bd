"""The launch recipes: shell and YAML are sound, and what they start is a `fit` that parses."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as kubernetes
import pytest
import yaml
from command_line import parsed
from torch.distributed.run import get_args_parser

from sphereface2.training import config as configuration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# Without it a node that joins a job later waits for ever (test_cluster.py has such a job).
NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
FIT = ["--config", "configs/ms1m_iresnet100.yaml", "--run-folder", "runs/ms1m"]


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def survives(given: Any, kept: Any, where: str = "") -> None:
    """A key that the schema does not know is dropped by its reader."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert key in kept, f"{where}.{key} is unknown"
            survives(value, kept[key], f"{where}.{key}")
    elif isinstance(given, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            survives(one, other, f"{where}[{index}]")
    else:
        assert given == kept, where


def started(command: list[str], folder: Path, **environment: str) -> list[list[str]]:
    """The arguments of every torchrun that a script starts, with stand-ins for what is not here."""
    log = folder / "started"
    stubs = {
        "torchrun": f'printf "%s\\0" "$@" >> {log}; printf "\\n" >> {log}; '
        f'[ "${NO_SHARED_STORE}" = 1 ]',
        "srun": 'while [[ "$1" == -* ]]; do shift; done; "$@"; "$@"',
        "scontrol": "echo node0; echo node1",
    }
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PATH": path, **environment})
    return [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]


def check_fit(words: list[str]) -> Any:
    """torchrun's words start our command, which understands its own; torchrun's part of them."""
    options = get_args_parser().parse_args(words)
    assert (options.module, options.training_script) == (True, "sphereface2")
    assert options.training_script_args[0] == "fit"
    arguments = parsed(*options.training_script_args)
    assert arguments["run_folder"], "without it a restart would begin anew"
    path = ROOT / "configs" / Path(arguments["config"]).name
    settings = configuration.load(path, arguments["settings"])
    assert settings.head["sharded"] is True
    return options


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", DEPLOY / name], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, DEPLOY / name], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_torchrun_script(tmp_path: Path) -> None:
    command = ["bash", str(DEPLOY / "torchrun.sh"), *FIT]
    (words,) = started(command, tmp_path, HEAD="gpu0", NODES="3")
    options = check_fit(words)
    assert (options.nnodes, options.rdzv_endpoint) == ("3", "gpu0:29500")
    assert options.max_restarts > 0


def test_slurm_script(tmp_path: Path) -> None:
    script = DEPLOY / "slurm.sbatch"
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    options = dict(
        word.removeprefix("--").partition("=")[::2]
        for line in lines
        for word in shlex.split(line.removeprefix("#SBATCH"))
    )
    assert options["ntasks-per-node"] == "1"  # torchrun starts the others
    assert "requeue" in options and options["signal"].startswith("B:USR1@")
    told = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": options["nodes"],
    }
    both = started(["bash", str(script), *FIT], tmp_path, **told)
    assert both[0] == both[1]
    parsed = check_fit(both[0])
    assert parsed.nnodes == options["nodes"]
    assert parsed.rdzv_endpoint == "node0:29242"


@pytest.mark.parametrize("index", [0, 1])
def test_kubernetes_manifest(index: int, tmp_path: Path) -> None:
    service, job = manifests("kubernetes.yaml")
    survives(service, kubernetes.IoK8sApiCoreV1Service.from_dict(service).to_dict())
    survives(job, kubernetes.IoK8sApiBatchV1Job.from_dict(job).to_dict())
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    nodes = job["spec"]["completions"]
    assert nodes == job["spec"]["parallelism"] == int(environment["NODES"])
    environment["JOB_COMPLETION_INDEX"] = str(index)
    (words,) = started([*container["command"], *container["args"]], tmp_path, **environment)
    options = check_fit(words)
    port = container["ports"][0]["containerPort"]
    assert options.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{port}"
    assert options.rdzv_conf == f"is_host={'true' if index == 0 else 'false'}"
    assert options.nnodes == str(nodes)


def test_kubeflow_trainjob() -> None:
    (job,) = manifests("kubeflow-trainjob.yaml")
    survives(job, kubernetes.TrainerV1alpha1TrainJob.from_dict(job).to_dict())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert {"name": NO_SHARED_STORE, "value": "1"} in trainer["env"]
    check_fit(trainer["args"])


def test_kubeflow_pytorchjob() -> None:
    (job,) = manifests("kubeflow-pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert spec.keys() == {"nprocPerNode", "elasticPolicy", "pytorchReplicaSpecs"}
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert elastic.keys() == {"rdzvBackend", "minReplicas", "maxReplicas", "maxRestarts"}
    assert worker.keys() == {"replicas", "restartPolicy", "template"}
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    template = worker["template"]
    survives(template, kubernetes.IoK8sApiCoreV1PodTemplateSpec.from_dict(template).to_dict())
    (container,) = template["spec"]["containers"]
    assert (container["name"], container["command"]) == ("pytorch", ["torchrun"])
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert {"name": NO_SHARED_STORE, "value": "1"} in container["env"]
    check_fit(container["args"])


def test_every_recipe_has_its_line() -> None:
    text = (DEPLOY / "README.md").read_text()
    files = [path.name for path in DEPLOY.iterdir() if path.is_file() and path.name != "README.md"]
    assert [name for name in files if f"`{name}`" not in text] == []


def test_kubernetes_manifests_of_the_service() -> None:
    parts = manifests("kubernetes-service.yaml")
    pods = {}
    for part in parts:
        kind, spec = part["kind"], part["spec"]
        if kind == "Service":
            survives(part, kubernetes.IoK8sApiCoreV1Service.from_dict(part).to_dict())
        elif kind in ("StatefulSet", "Deployment"):
            template = spec["template"]
            pods[part["metadata"]["name"]] = template["spec"]
            parsed_pod = kubernetes.IoK8sApiCoreV1PodTemplateSpec.from_dict(template).to_dict()
            survives(template, parsed_pod)
            assert template["metadata"]["labels"] == spec["selector"]["matchLabels"]
    database, service = pods["database"]["containers"][0], pods["sphereface2"]["containers"][0]
    options = parsed(*service["args"])
    settings = options["settings"]
    assert (settings.host, settings.behind_proxy) == ("0.0.0.0", True)
    assert options["gallery"] == "postgresql+psycopg://sphereface2@database/sphereface2"
    given = {item["name"]: item.get("value") for item in database["env"]}
    assert (given["POSTGRES_USER"], given["POSTGRES_DB"]) == ("sphereface2", "sphereface2")
    passwords = [
        next(item["valueFrom"] for item in one["env"] if item["name"].endswith("PASSWORD"))
        for one in (database, service)
    ]
    assert passwords[0] == passwords[1]
    mounts = {mount["mountPath"] for mount in service["volumeMounts"]}
    assert {str(options["checkpoint"]), str(Path(str(settings.keys)).parent), "/tmp"} == mounts
    for pod in pods.values():
        volumes = {volume["name"] for volume in pod["volumes"]}
        claimed = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert claimed - volumes <= {"data"}
