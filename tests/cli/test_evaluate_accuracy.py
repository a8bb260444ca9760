"""``offsite-fl evaluate`` in accuracy: questions of one's own, and tasks of lm-eval."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from offsite_fl.data_owner import DataOwner
from offsite_fl.evaluation.choices import MultipleChoice
from offsite_fl.evaluation.rows import ROW_KEYS, ROW_LABELS
from offsite_fl.models.load import load_model
from tests.cli.conftest import World, error_of, run_cli, run_json

WORDS = ("cat", "mat", "dog", "door", "sat")
TASK = """
task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": f"the {one} by the", "choices": [one, other], "answer": i % 2}
        for i, (one, other) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_in_accuracy_on_questions_of_ones_own(world: World, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tested = ("evaluate", world.model, "--bundle", world.bundle, "--data", questions, "--accuracy", "--limit", 15)
    tuning = ("--update", world.update, "--fine-tune", questions, "--steps", 1, "--loss-on", "answer")
    told = run_json(*tested, *tuning, "--block-size", 32, "--out", out)
    assert list(told["rows"]) == list(ROW_KEYS)
    model, tokenizer = load_model(str(world.model), "causal-lm")
    test = MultipleChoice(questions, tokenizer, max_questions=15)
    assert told["rows"]["full_zero_shot"] == {"accuracy": test(model).accuracy}
    emulator = DataOwner.open(world.bundle, "float32").model
    assert told["rows"]["emulator_zero_shot"] == {"accuracy": test(emulator).accuracy}
    assert told["rows"]["plug_in"].keys() == {"accuracy"}
    assert "accuracy" in (out / "report.html").read_text() and "points" in run_cli("report", out).stdout
    record = json.loads((out / "report.json").read_text())
    assert record["data"] == {"held-out test": {"questions": 15, "chance": "50.0%"}}
    # It was tuned on the test.
    assert any(re.match(r"([0-9]+) of \1 different test examples are also among", note) for note in record["notes"])


def test_rows_on_a_task_of_lm_eval(
    world: World, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same rows lm-eval's numbers are those of ``--accuracy``; the report has a line for each task."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    task = tmp_path / "which.yaml"
    task.write_text(TASK.format(data=questions))
    tested = ("evaluate", world.model, "--bundle", world.bundle, "--limit", 15, "--update", world.update)
    by_tasks = run_json(*tested, "--tasks", task, "--out", tmp_path / "run")
    assert by_tasks["rows"] == run_json(*tested, "--data", questions, "--accuracy")["rows"]
    line = json.loads((tmp_path / "run" / "report.json").read_text())["data"]["which"]
    assert line.pop("questions") == 15
    assert line == {ROW_LABELS[key]: f"{row['accuracy']:.1%}" for key, row in by_tasks["rows"].items() if row}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "--data"),
        (("--data", "x.jsonl", "--tasks", "y.yaml"), "one of the two"),
        (("--tasks", "y.yaml", "--accuracy"), "--accuracy"),
        (("--data", "x.jsonl", "--limit", 3), "--limit"),
    ],
)
def test_one_thing_to_measure_on(world: World, given: tuple[object, ...], said: str) -> None:
    result = run_cli("evaluate", world.model, "--bundle", world.bundle, *given, code=2)
    assert said in " ".join(result.stderr.replace("│", " ").split())  # the box around it breaks lines


def test_a_task_that_is_not_there(world: World) -> None:
    assert "task file none.yaml doesn't exist" in error_of(
        "evaluate", world.model, "--bundle", world.bundle, "--tasks", "none.yaml"
    )
