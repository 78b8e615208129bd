"""The container recipes: linted, valid by the Compose specification, and starting what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml
from command_line import parsed
from compose_spec import PyCompose

CONTAINER = Path(__file__).parents[2] / "deploy/container"
HADOLINT = Path(sys.executable).with_name("hadolint")


def test_the_container_file_is_clean_and_starts_the_service() -> None:
    file = CONTAINER / "Dockerfile"
    done = subprocess.run([HADOLINT, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = file.read_text()
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*\])$", text, re.MULTILINE)[0])
        for word in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["sphereface2"]
    settings = parsed(*command)["settings"]
    assert settings.host == "0.0.0.0" and settings.keys is not None
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001"]


def test_the_compose_file_is_valid_and_its_parts_fit() -> None:
    given = (CONTAINER / "compose.yaml").read_text()
    set_ = re.sub(r"\$\{\w+:\?[^}]*\}", "/somewhere", given)  # as the environment would
    set_ = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", set_)
    PyCompose.from_yaml(set_).validate()
    services = yaml.safe_load(set_)["services"]
    proxy, service, database = services["proxy"], services["service"], services["database"]
    options = parsed(*service["command"])
    assert options["gallery"] == "postgresql+psycopg://sphereface2@database/sphereface2"
    settings = options["settings"]
    assert settings.behind_proxy is True
    user = database["environment"]
    assert (user["POSTGRES_USER"], user["POSTGRES_DB"]) == ("sphereface2", "sphereface2")
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert {str(options["checkpoint"]), str(Path(str(settings.keys)).parent)} == mounted
    assert service["read_only"] and proxy["read_only"]
    # Nobody reaches the service or the database but through the proxy.
    assert [name for name, one in services.items() if "ports" in one] == ["proxy"]
    assert (CONTAINER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    template = CONTAINER / proxy["volumes"][0].split(":")[0]
    variables = set(re.findall(r"\$\{([A-Z]+(?:_[A-Z]+)*)\}", template.read_text()))
    assert variables == set(proxy["environment"])
    assert proxy["environment"]["SERVICE"] == "service:8000"
