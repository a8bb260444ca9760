"""Help, version and lists; the program starts without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

from offsite_fl.emulators import describe_emulators
from offsite_fl.version import __version__
from tests.cli.conftest import run_cli, run_json

COMMANDS = ("choose", "bundle", "inspect", "tune", "plug", "evaluate", "report", "emulators", "strategies")


def test_version_and_help() -> None:
    assert run_cli("--version").stdout == f"offsite-fl {__version__}\n"
    said = run_cli("--help").stdout
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    assert "--json" in run_cli(command, "--help").stdout


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'transformers', 'flwr', 'datasets', 'peft', 'numpy', 'matplotlib'}"
    code = f"import sys, offsite_fl.cli; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_emulators() -> None:
    told = run_json("emulators")
    assert [entry["name"] for entry in told] == [method.name for method in describe_emulators()]
    assert {"key": "bits", "type": "int", "default": "8"} in next(e for e in told if e["name"] == "quantize")["options"]
    assert "keep (float, default 0.5)" in run_cli("emulators").stdout


def test_strategies() -> None:
    told = {entry["name"]: entry for entry in run_json("strategies")}
    assert {"fedavg", "fedadam", "krum", "flora", "flexlora", "ffa-lora", "rolora"} <= told.keys()
    assert {"key": "eta", "type": "float", "default": "0.1"} in told["fedadam"]["options"]
    assert {"key": "min-train-nodes", "type": "int", "default": "2"} in told["flora"]["options"]
    assert {"key": "client-learning-rate", "type": "float", "default": None} in told["qfedavg"]["options"]
    assert told["flora"]["summary"].startswith("FLoRA: fresh factors each round")
    listed = run_cli("strategies").stdout
    assert "fedavg" in listed and listed.count("min-train-nodes") == 1  # told once, above the table
