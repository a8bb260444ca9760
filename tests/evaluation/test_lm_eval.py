"""lm-eval on models in memory: its numbers are those of our own scorer on the same rows, and it leaves no trace."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offsite_fl.data.examples import encode_pair
from offsite_fl.errors import ConfigError, DataError, ModelError
from offsite_fl.evaluation.choices import MultipleChoice
from offsite_fl.evaluation.lm_eval import LmEval, tuning_rows

ROWS = [
    {"prompt": "the cat", "choices": ["sat", "sang a song", "sat down", "x"], "answer": 3},
    {"prompt": "is it so?", "choices": ["yes", "no", "n"], "answer": 1},
    {"prompt": "is it so?", "choices": ["yes", "no", "n"], "answer": 2},
    {"prompt": "a dog ran to the house of", "choices": ["mice", "a man", "the dog", "nobody at all"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list:
{metrics}
"""


def task(folder: Path, name: str = "tiny", metrics: tuple[str, ...] = ("acc", "acc_norm"), rows: Any = ROWS) -> Path:
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = "".join(f"  - metric: {metric}\n    aggregation: mean\n    higher_is_better: true\n" for metric in metrics)
    path.write_text(TASK.format(name=name, data=data, metrics=listed))
    return path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own for the data library."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_numbers_are_those_of_our_own_scorer(pico, pico_tokenizer, tmp_path, family) -> None:
    model = pico(family)
    path = task(tmp_path)
    own = MultipleChoice(tmp_path / "tiny.jsonl", pico_tokenizer)
    for normalised in (False, True):
        own.normalised = normalised
        tasks = LmEval([path], pico_tokenizer, batch_size=3, normalised=normalised)
        assert tasks.questions == {"tiny": 4}
        assert tasks(model).accuracy == pytest.approx(own(model).accuracy)
    assert own.result(model).acc != own.result(model).acc_norm  # so that the two can be told apart
    assert LmEval([path], pico_tokenizer, limit=2).questions == {"tiny": 2}


@pytest.mark.usefixtures("quiet")
def test_several_tasks_twice_and_nothing_is_left_changed(pico_llama, pico_tokenizer, tmp_path) -> None:
    tasks = LmEval(
        [task(tmp_path), task(tmp_path, "half", ("acc",), [ROWS[0] | {"answer": i} for i in (0, 3)])], pico_tokenizer
    )
    pico_llama.train()
    before = {name: value.clone() for name, value in pico_llama.state_dict().items()}
    drawn = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    first, second = tasks(pico_llama), tasks(pico_llama)
    same = random.getstate() == drawn[0] and np.random.get_state()[1].tolist() == drawn[1]
    assert same  # said so briefly: the states fill pages
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert pico_llama.training and all(torch.equal(value, before[n]) for n, value in pico_llama.state_dict().items())
    assert first == second and tasks.results[0] == tasks.results[1]
    assert set(tasks.results[0]) == {"tiny", "half"} and tasks.results[0]["half"] in (0.0, 0.5)
    assert first.accuracy == pytest.approx(sum(tasks.results[0].values()) / 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("quiet")
def test_the_generator_of_a_gpu_is_left_as_it_was(pico_llama, pico_tokenizer, tmp_path) -> None:
    tasks, model = LmEval([task(tmp_path)], pico_tokenizer), pico_llama.to("cuda")
    torch.cuda.manual_seed_all(5)
    before = torch.cuda.get_rng_state()
    tasks(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.usefixtures("quiet")
def test_what_is_wrong_is_named(pico_llama, pico_tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match=r"task file none\.yaml doesn't exist"):
        LmEval(["none.yaml"], pico_tokenizer)
    with pytest.raises(DataError, match="no task was given"):
        LmEval([], pico_tokenizer)
    path = task(tmp_path)
    with pytest.raises(DataError, match="'tiny' is given twice"):
        LmEval([path, path], pico_tokenizer)
    (tmp_path / "tiny.jsonl").unlink()
    with pytest.raises(DataError, match=r"task .*tiny\.yaml: lm-eval can't load it: FileNotFoundError"):
        LmEval([path], pico_tokenizer)
    with pytest.raises(DataError, match=r"'odd' has no accuracy.*\['acc_bytes'\]"):
        LmEval([task(tmp_path, "odd", ("acc_bytes",))], pico_tokenizer)(pico_llama)
    with pytest.raises(ModelError, match="config"):
        LmEval([task(tmp_path)], pico_tokenizer).accuracies(torch.nn.Linear(2, 2))


@pytest.mark.usefixtures("quiet")
def test_rows_to_tune_on_are_the_text_that_is_scored(pico_llama, pico_tokenizer, tmp_path) -> None:
    """The tokens of prompt and right choice are lm-eval's own, split at the same place."""
    from lm_eval.models.huggingface import HFLM

    path = task(tmp_path)
    with pytest.raises(DataError, match="'tiny' has no training split"):
        tuning_rows(path)
    path.write_text(path.read_text() + "training_split: test\n")
    rows = tuning_rows(path)
    assert rows["prompt"][:] == [row["prompt"] for row in ROWS]
    assert rows["answer"][:] == [" x", " no", " n", " mice"]
    held = HFLM(pretrained=pico_llama, tokenizer=pico_tokenizer)
    for row in rows:
        asked = held._encode_pair(row["prompt"], row["answer"])
        assert encode_pair(pico_tokenizer, row["prompt"], row["answer"]) == asked
    path.write_text(path.read_text().replace("multiple_choice", "loglikelihood"))
    with pytest.raises(DataError, match="kind loglikelihood"):
        tuning_rows(path)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, pico_tokenizer: Any) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'offsite-fl\[lm-eval\]'"):
        LmEval(["t.yaml"], pico_tokenizer)
