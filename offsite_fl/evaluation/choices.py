"""Multiple choice: which of its choices a causal language model finds most likely after the prompt.

As lm-eval does it (``acc`` and ``acc_norm`` of its ``multiple_choice`` tasks): a choice's score is the sum of the
log-probabilities of its tokens given the prompt, and the model's answer is the choice with the largest score.
``acc_norm`` divides each score by the number of characters of the choice first, the space that sets it off not counted.

Prompt and choice become tokens by :func:`~offsite_fl.data.examples.encode_pair`, the function that makes the examples
to tune on, so that a model is asked exactly as it was taught.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from offsite_fl.data.choices import ChoiceColumns, Question, read_questions
from offsite_fl.data.examples import encode_pair
from offsite_fl.data.loader import pad_id_of
from offsite_fl.data.sources import Source, read_table
from offsite_fl.errors import ConfigError, DataError
from offsite_fl.evaluation.loss import evaluating, token_log_probabilities
from offsite_fl.evaluation.rows import Row


@dataclass(frozen=True)
class ChoiceResult:
    """What a model got right of ``questions`` questions, as shares in [0, 1].

    ``acc`` by the plain scores, ``acc_norm`` by the scores per character; ``chance`` is what guessing would get.
    """

    acc: float
    acc_norm: float
    chance: float
    questions: int


@dataclass(frozen=True)
class _Run:
    """One sequence to put through the model, and what is read off it: ``(choice, position, token)`` each."""

    ids: list[int]
    wanted: list[tuple[int, int, int]]


class MultipleChoice:
    """A test of multiple choice, made once and put to any number of models.

    Args:
        test: a file or ``datasets.Dataset`` with ``prompt``, ``choices`` and ``answer``
            (:func:`~offsite_fl.data.choices.read_questions`).
        tokenizer: the model's.
        block_size: tokens that prompt and choice may have together; a longer prompt loses its beginning, as in tuning.
        batch_size: sequences put through the model at a time; no influence on the numbers beyond rounding.
        max_questions: use only the first so many (None: all).
        normalised: rows hold ``acc_norm`` instead of ``acc``.
        columns: other names of the columns.

    Raises ``DataError`` for rows that hold no question, and for choices that the block size has no room for.
    """

    def __init__(
        self,
        test: Source,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int = 128,
        batch_size: int = 8,
        max_questions: int | None = None,
        normalised: bool = False,
        columns: ChoiceColumns | None = None,
        progress: bool = False,
    ) -> None:
        if batch_size < 1 or (max_questions is not None and max_questions < 1):
            raise ConfigError(f"batch-size ({batch_size}) and max-questions ({max_questions}) must be at least 1")
        table = read_table(test)
        self.questions = read_questions(table, columns)[:max_questions]
        self.normalised, self.progress = normalised, progress
        self._batch_size, self._pad = batch_size, pad_id_of(tokenizer)
        # A choice's place in one list of all choices, so that sequences of many questions can share a batch.
        self._runs: list[_Run] = []
        first = 0
        for row, question in enumerate(self.questions):
            self._runs += _runs(question, first, tokenizer, block_size, table.where(row))
            first += len(question.choices)
        self._choices = first
        self._runs.sort(key=lambda run: len(run.ids))  # batches of like length have little padding

    @property
    def tokens(self) -> int:
        """How many tokens go through a model for one result."""
        return sum(len(run.ids) for run in self._runs)

    @property
    def chance(self) -> float:
        """What guessing gets right, as a share."""
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    def __call__(self, model: nn.Module) -> Row:
        """The accuracy of ``model``, as a row of a result; its mode is restored afterwards."""
        result = self.result(model)
        return Row(accuracy=result.acc_norm if self.normalised else result.acc)

    def result(self, model: nn.Module) -> ChoiceResult:
        """Both accuracies of ``model``."""
        right = normed = 0
        for question, scores in zip(self.questions, self.scores(model), strict=True):
            lengths = torch.tensor([len(choice) for choice in question.choices], dtype=torch.float64)
            right += int(scores.argmax()) == question.answer
            normed += int((scores / lengths).argmax()) == question.answer
        count = len(self.questions)
        return ChoiceResult(right / count, normed / count, self.chance, count)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> list[Tensor]:
        """Log-likelihood in nats of each choice, one fp64 tensor ``[choices]`` a question, on the CPU.

        ``model`` is a causal language model with the signature of Hugging Face; it runs where its parameters lie.
        """
        device = next(model.parameters()).device
        sums = torch.zeros(self._choices, dtype=torch.float64)
        batches = [self._runs[i : i + self._batch_size] for i in range(0, len(self._runs), self._batch_size)]
        with evaluating(model):
            for batch in track(batches, "asking", disable=not self.progress, transient=True):
                rows, choices, positions, targets = zip(*_wanted(batch), strict=True)
                at = (torch.tensor(part, device=device) for part in (rows, positions, targets))
                found = token_log_probabilities(model, _padded(batch, self._pad, device), *at)
                sums.index_add_(0, torch.tensor(choices), found.double().cpu())
        return list(torch.split(sums, [len(question.choices) for question in self.questions]))


def _runs(
    question: Question, first: int, tokenizer: PreTrainedTokenizerBase, block_size: int, where: str
) -> Iterator[_Run]:
    """The sequences that ``question`` needs, its choices numbered from ``first``.

    A causal model's output at a position depends on what stands before it alone. So the last token of a choice needn't
    be read, and a sequence that another one begins with is read off that one: choices of one token cost one run.
    """
    kept: list[_Run] = []
    pairs = [_pair(question.prompt, choice, tokenizer, block_size, where) for choice in question.choices]
    for number, (context, target) in sorted(enumerate(pairs), key=lambda pair: -sum(map(len, pair[1]))):
        ids = (context + target)[:-1]
        run = next((run for run in kept if run.ids[: len(ids)] == ids), None)
        if run is None:
            run = _Run(ids, [])
            kept.append(run)
        start = len(context) - 1
        run.wanted.extend((first + number, start + i, token) for i, token in enumerate(target))
    yield from kept


def _pair(
    prompt: str, choice: str, tokenizer: PreTrainedTokenizerBase, block_size: int, where: str
) -> tuple[list[int], list[int]]:
    """Prompt and choice as in tuning, except that a choice must be whole and have something before it."""
    context, target = encode_pair(tokenizer, prompt, choice, block_size)
    full = len(context) + len(target) >= block_size
    if not context or (full and target != encode_pair(tokenizer, prompt, choice)[1]):
        raise DataError(
            f"{where}: a choice of {len(target)} tokens or more leaves no room for a prompt in {block_size}, or there "
            "is no prompt; write one, or set block-size higher"
        )
    return context, target


def _wanted(batch: Sequence[_Run]) -> Iterator[tuple[int, int, int, int]]:
    """``(row, choice, position, token)`` of everything that is read off a batch."""
    for row, run in enumerate(batch):
        for choice, position, token in run.wanted:
            yield row, choice, position, token


def _padded(batch: Sequence[_Run], pad: int, device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, T]``, padded on the right."""
    shape = (len(batch), max(len(run.ids) for run in batch))
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    for row, run in enumerate(batch):
        ids[row, : len(run.ids)] = torch.tensor(run.ids)
        mask[row, : len(run.ids)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
