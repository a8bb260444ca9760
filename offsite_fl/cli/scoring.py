"""What ``offsite-fl evaluate`` measures on: held-out data of the model's own task, questions, or tasks of lm-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_fl.config import TuneConfig
    from offsite_fl.evaluation.choices import MultipleChoice
    from offsite_fl.evaluation.lm_eval import LmEval
    from offsite_fl.evaluation.rows import FiveRows
    from offsite_fl.measure import Measure
    from offsite_fl.owner import ModelOwner

    Scorer = MultipleChoice | LmEval


def check_test(data: Path | None, accuracy: bool, tasks: list[str] | None, limit: int | None) -> None:
    """One thing to measure on, said before anything is loaded."""
    if (data is None) == (not tasks):
        raise typer.BadParameter("give held-out data by --data, or --tasks, one of the two", param_hint="--data")
    if accuracy and data is None:
        raise typer.BadParameter("it is for questions in --data; --tasks are in accuracy", param_hint="--accuracy")
    if limit is not None and not (accuracy or tasks):
        raise typer.BadParameter("it is for questions; --max-tokens limits text", param_hint="--limit")


def score_of(
    owner: ModelOwner,
    data: Path | None,
    accuracy: bool,
    tasks: list[str] | None,
    limit: int | None,
    config: TuneConfig,
) -> Scorer | None:
    """What gives rows in accuracy; None where the owner's task says what is measured."""
    if tasks:
        from offsite_fl.evaluation.lm_eval import LmEval

        return LmEval(tasks, owner.tokenizer, batch_size=config.batch_size, limit=limit)
    if not accuracy or data is None:
        return None
    from offsite_fl.evaluation.choices import MultipleChoice

    return MultipleChoice(
        data,
        owner.tokenizer,
        block_size=config.block_size,
        batch_size=config.batch_size,
        max_questions=limit,
        progress=True,
    )


def tested(measure: Measure, score: Scorer | None, rows: FiveRows) -> dict[str, dict[str, Any]]:
    """What the rows rest on, for the report's table of the data; of lm-eval's tasks each one's own rows."""
    from offsite_fl.evaluation.choices import MultipleChoice
    from offsite_fl.evaluation.rows import ROW_LABELS

    if score is None:
        counted = {"examples": measure.examples} if rows.measure == "accuracy" else {"tokens": measure.tokens}
        return {"held-out test": dict(counted)}
    if isinstance(score, MultipleChoice):
        return {"held-out test": {"questions": len(score.questions), "chance": f"{score.chance:.1%}"}}
    # One result for each row that was measured: without an update, the tuned ones are the untuned ones.
    keys = [key for key, _ in rows]
    measured = keys if len(score.results) == len(keys) else ["full_zero_shot", "emulator_zero_shot", "full_fine_tuning"]
    return {
        task: {"questions": count}
        | {ROW_LABELS[key]: f"{found[task]:.1%}" for key, found in zip(measured, score.results, strict=False)}
        for task, count in score.questions.items()
    }
