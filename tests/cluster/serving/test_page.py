"""The page of serving tells of the API and of services what the code does."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
import yaml

from dora_diffusion.cli import main as cli
from dora_diffusion.cluster.serving.engine import ApiRequest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "howto" / "serve.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def parsed(words):
    assert words[0] == "serve"
    return cli.read_settings(cli.build_parser().parse_args(words))


@pytest.mark.parametrize("name", ApiRequest.model_fields)
def test_every_field_of_a_request_is_in_the_table(name):
    rows = {
        field: cells
        for fields, *cells in re.findall(r"^\| (`.*`) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
        for field in re.findall(r"`(\w+)`", fields)
    }
    default, values = rows[name]
    field = ApiRequest.model_fields[name]
    assert default == ("required" if field.is_required() else json.dumps(field.default))
    numbers = [
        bound
        for limit in field.metadata
        for kind in ("ge", "le", "min_length", "max_length", "multiple_of")
        if (bound := getattr(limit, kind, None)) and name != "adapter"
    ]
    assert all(f"{bound:g}" in values for bound in numbers), numbers


def test_the_unit_of_systemd_starts_what_there_is_and_lets_it_end():
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str
    unit.read_string(block("ini"))
    service = unit["Service"]
    args = parsed(service["ExecStart"].split()[1:])
    # With its replicas killed first, nothing is answered; nor with less time than a request has.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > args.timeout
    assert str(args.token_file).endswith(service["LoadCredential"].partition(":")[0])


def test_the_compose_file_starts_what_there_is_and_lets_it_end():
    serve = yaml.safe_load(block("yaml"))["services"]["serve"]
    args = parsed(serve["command"])
    assert int(serve["stop_grace_period"].removesuffix("s")) > args.timeout
    assert serve["ports"] == [f"127.0.0.1:{args.port}:{args.port}"]
    assert f"127.0.0.1:{args.port}/ready" in serve["healthcheck"]["test"][-1]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert all(f"\nARG {name}=" in dockerfile for name in serve["build"]["args"])
    (variable,) = serve["environment"]
    from dora_diffusion.cluster.serving.deploy import TOKEN_VARIABLE

    assert variable == TOKEN_VARIABLE
