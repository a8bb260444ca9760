"""Tasks of lm-eval (EleutherAI's evaluation harness) on a model in memory: full, emulated or plugged in.

lm-eval comes with the extra ``lm-eval``. A task is a YAML file of one's own, with data files beside it, or the name of
a task that lm-eval ships, whose data come from the hub. Nothing is fetched for a file whose ``dataset_path`` is a kind
of file (``json``, ``parquet``, ``csv``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import nn
from transformers import PreTrainedTokenizerBase

from offsite_fl.errors import ConfigError, DataError, ModelError
from offsite_fl.evaluation.loss import evaluating
from offsite_fl.evaluation.rows import Row
from offsite_fl.models.tasks import need_next_token

# What a task calls its share of right answers; exact_match is what WebQuestions has in place of acc.
METRICS = ("acc", "exact_match")
NORMALISED = ("acc_norm", "exact_match")


class LmEval:
    """A set of tasks, loaded once and put to any number of models, zero-shot unless a task says otherwise.

    Args:
        tasks: YAML files (``.yaml``, ``.yml``), or names of tasks or groups that lm-eval ships.
        tokenizer: the model's. Prompt and choice are joined as lm-eval does it: the choice after ``target_delimiter``,
            a space unless the task has its own.
        batch_size: sequences put through the model at a time.
        limit: use only the first so many documents of each task (None: all).
        normalised: take ``acc_norm`` where a task has it.

    Raises ``ConfigError`` where lm-eval isn't installed, ``DataError`` for a task that can't be loaded.
    """

    def __init__(
        self,
        tasks: Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        limit: int | None = None,
        normalised: bool = False,
    ) -> None:
        self.tokenizer, self.batch_size, self.limit = tokenizer, batch_size, limit
        self._metrics = NORMALISED if normalised else METRICS
        self._tasks = load_tasks(tasks)
        self.results: list[dict[str, float]] = []
        """What each call found, in the order of the calls: accuracy in [0, 1] by task."""

    @property
    def questions(self) -> dict[str, int]:
        """Documents that are asked, by task."""
        sizes = {name: len(task.eval_docs) for name, task in self._tasks.items()}
        return sizes if self.limit is None else {name: min(self.limit, size) for name, size in sizes.items()}

    def __call__(self, model: nn.Module) -> Row:
        """The mean of the tasks' accuracies, as a row of a result; what each task had is kept in :attr:`results`."""
        found = self.accuracies(model)
        self.results.append(found)
        return Row(accuracy=sum(found.values()) / len(found))

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in [0, 1] by task. ``model`` is left as it was, and so is every random generator."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        need_next_token(model)
        if not hasattr(model, "config"):
            raise ModelError(f"lm-eval needs a Hugging Face model with a config, got {type(model).__name__}")
        with evaluating(model), _generators_kept():
            held = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
            told = lm_eval.simple_evaluate(
                model=held,
                tasks=list(self._tasks.values()),
                task_manager=TaskManager(include_defaults=False),  # the tasks are loaded, nothing is to be looked up
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        return {name: _accuracy(name, told["results"][name], self._metrics) for name in self._tasks}


def require_lm_eval() -> None:
    """Raise ``ConfigError`` if the extra is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tasks need lm-eval, which comes with the extra 'lm-eval': pip install 'offsite-fl[lm-eval]'"
        ) from error


def load_tasks(tasks: Sequence[str | Path]) -> dict[str, Any]:
    """lm-eval's task objects by name; a group stands for its tasks."""
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    files = [str(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    if missing := [path for path in files if not Path(path).is_file()]:
        raise DataError(f"task file {missing[0]} doesn't exist")
    manager = TaskManager(include_defaults=len(files) < len(tasks))  # looking through all that it ships takes seconds
    found: dict[str, Any] = {}
    for task in map(str, tasks):
        try:
            loaded = manager.load(task)["tasks"]
        except Exception as error:  # whatever its loaders, the data library or the hub's client raise
            raise DataError(f"task {task}: lm-eval can't load it: {type(error).__name__}: {error}") from error
        if doubled := sorted(found.keys() & loaded.keys()):
            raise DataError(f"task {doubled[0]!r} is given twice; give each task a name of its own")
        found |= loaded
    if not found:
        raise DataError("no task was given; name a YAML file or a task of lm-eval")
    return found


def tuning_rows(task: str | Path) -> Dataset:
    """The training split of one task as pairs to tune on, ``prompt`` and ``answer``, word for word as the task asks.

    The answer brings the delimiter that the task puts before a choice (a space, as a rule), and the prompt is the
    task's own. So what is trained is the very text that is scored; the original offsite-tuning code (arXiv 2302.04870)
    trained without the space.

    Raises ``DataError`` for a task without a training split, or one that isn't multiple choice.
    """
    rows = [row for name, loaded in load_tasks([task]).items() for row in _training(name, loaded)]
    return Dataset.from_list(rows)


def _training(name: str, task: Any) -> Iterator[dict[str, str]]:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise DataError(f"task {name!r} is of the kind {task.OUTPUT_TYPE}, rows to tune on are made of multiple choice")
    if not task.has_training_docs():
        raise DataError(f"task {name!r} has no training split; write its rows by hand (docs/quality.md)")
    for number, doc in enumerate(task.training_docs()):
        prompt, choices, target = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
        right = target[0] if isinstance(target, list) and target else target  # several answers may be accepted
        if not isinstance(prompt, str) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise DataError(f"task {name!r}, training row {number}: needs a text and the index of a right choice")
        yield {"prompt": prompt, "answer": f"{task.config.target_delimiter}{choices[right]}"}


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the process's random generators back: lm-eval seeds them, and a federation draws nodes and noise there."""
    python, array = random.getstate(), np.random.get_state()
    try:
        # lm-eval seeds the generators of all GPUs too; one that isn't used yet is not to be woken for that.
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _accuracy(task: str, told: Mapping[str, Any], metrics: Sequence[str]) -> float:
    """The first of ``metrics`` among a task's results, whose keys are ``metric,filter``."""
    for wanted in (*metrics, *METRICS):
        for key, value in told.items():
            if key.partition(",")[0] == wanted:
                return float(value)
    have = sorted(key.partition(",")[0] for key in told if "," in key and "stderr" not in key)
    raise DataError(f"task {task!r} has no accuracy: none of {', '.join(METRICS)} is among its metrics {have}")
