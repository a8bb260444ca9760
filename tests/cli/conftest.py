"""A full model, texts, and one bundle and update made from them by the program itself, once for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from offsite_fl.cli import app
from tests.conftest import make_pico, make_tokenizer

Run = Callable[..., Result]


def run_cli(*arguments: object, code: int = 0) -> Result:
    """Run the program; the exit code must be ``code``, and nothing but an exit may come out of it."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="offsite-fl")
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: object) -> Any:
    """Run the program with ``--json``: stdout must be one JSON document, parsed strictly."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} isn't JSON")

    return json.loads(run_cli(*arguments, "--json").stdout, parse_constant=refuse)


def error_of(*arguments: object, code: int = 1) -> str:
    """Run the program, which must fail with one line on stderr after what it said about its stages."""
    result = run_cli(*arguments, code=code)
    assert not result.stdout
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and result.stderr.rstrip().endswith(said[0]), result.stderr
    return said[0]


@dataclass(frozen=True)
class World:
    """Paths of what the tests share; read only."""

    home: Path
    model: Path
    text: Path
    bundle: Path
    update: Path
    made: dict[str, Any]
    tuned: dict[str, Any]


TUNING = ("--block-size", 16, "--batch-size", 4, "--max-steps", 4, "--lr", 1e-2)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pico LLaMA of 6 blocks on disk, its bundle with 1 + 2 + 1 blocks, and an update from 4 steps."""
    home = tmp_path_factory.mktemp("cli")
    model, text, bundle, update = home / "model", home / "text.txt", home / "bundle", home / "update.safetensors"
    make_pico("llama").save_pretrained(model)  # type: ignore[operator]
    make_tokenizer().save_pretrained(model)
    text.write_text("the cat sat on the mat and the dog lay by the door. " * 20)
    emulator = "layer-drop:keep=2+quantize:bits=8,group=16"
    ends = ("--first", 1, "--last", 1, "--calibration", text, "--block-size", 16)
    made = run_json("bundle", model, "--emulator", emulator, "--out", bundle, *ends)
    tuned = run_json("tune", bundle, "--data", text, "--out", update, *TUNING)
    return World(home, model, text, bundle, update, made, tuned)
