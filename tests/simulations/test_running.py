"""What the commands of the repository's apps have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from offsite_fl.errors import OffsiteError
from simulations import classify
from simulations.running import _typed, emptied, finish, parse, settings_of


def test_settings_are_flat_with_dotted_keys(tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text('model = "m"\ntune.lr = 1e-3\n[data]\ncorpus = "c"\n')
    assert settings_of(file) == {"model": "m", "tune.lr": 1e-3, "data.corpus": "c"}


def test_values_of_the_command_line_have_the_types_of_toml() -> None:
    given = ["3", "1e-4", "true", "false", "low-rank:keep=0.5", ""]
    assert [_typed(text) for text in given] == [3, 1e-4, True, False, "low-rank:keep=0.5", ""]


def test_a_setting_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = parse(argparse.ArgumentParser(), ["--set", "emulator=low-rank:keep=0.5", "--set", "seed=1"], None)
    assert found.set == {"emulator": "low-rank:keep=0.5", "seed": "1"} and found.out is None
    with pytest.raises(SystemExit):
        parse(argparse.ArgumentParser(), ["--set", "seed"], None)
    assert "--set 'seed' isn't KEY=VALUE" in capsys.readouterr().err


def test_only_the_folder_of_an_earlier_run_is_emptied(tmp_path: Path) -> None:
    earlier = tmp_path / "run"
    (earlier / "flower").mkdir(parents=True)
    assert emptied(earlier) == earlier and not list(earlier.iterdir())
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear.txt").touch()
    with pytest.raises(OffsiteError, match="won't be emptied"):
        emptied(other)
    assert (other / "dear.txt").exists()


def test_an_error_is_told_and_ends_with_1(tmp_path: Path) -> None:
    def fail() -> None:
        raise OffsiteError("no [such] model")

    assert (finish(fail, tmp_path), finish(lambda: None, tmp_path)) == (1, 0)


@pytest.mark.parametrize("task", classify.TASKS)
def test_a_tasks_settings_are_keys_of_the_app(task: str) -> None:
    """Flower takes over keys of a file that the app doesn't know; our app would refuse them when it runs."""
    file, _ = classify.TASKS[task]
    own = settings_of(classify.APP / "pyproject.toml")
    known = {key.removeprefix("tool.flwr.app.config.") for key in own}
    assert file is None or settings_of(file).keys() <= known
