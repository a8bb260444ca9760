"""How public and private text are divided: no example on two sides, and a short text is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from offsite_fl.choosing.parts import Parts, digest_of, name_of, read_parts
from offsite_fl.choosing.settings import Settings
from offsite_fl.config import LossOn, TuneConfig
from offsite_fl.data.examples import to_examples
from offsite_fl.data.sources import Source
from offsite_fl.errors import DataError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def different(blocks: int, begin: int = 0) -> Dataset:
    """So many blocks of 4 characters, one token each, all different; ``begin`` makes others."""
    rows = range(begin, begin + blocks)
    text = "".join("".join(ALPHABET[(row // 26**place) % 26] for place in range(4)) for row in rows)
    return Dataset.from_dict({"text": [text]})


def settings(**changes: int) -> Settings:
    given = {"calibration_tokens": 40, "held_out_tokens": 8, "test_tokens": 12} | changes
    return Settings(tune=TuneConfig(block_size=4, progress=False), **given)  # type: ignore[arg-type]


def read(tokenizer: PreTrainedTokenizerFast, given: Settings, *sources: Any) -> Parts:
    """What a comparison of a language model with this tokenizer reads."""

    def examples(source: Source, block_size: int, loss_on: LossOn) -> Dataset:
        return to_examples(source, tokenizer, block_size=block_size, loss_on=loss_on)

    return read_parts(examples, 0, given, *sources)


def rows(examples: Dataset) -> set[tuple[int, ...]]:
    return {tuple(ids) for ids in examples["input_ids"]}


def parts(texts: Parts) -> Iterator[Dataset]:
    yield from (texts.calibration, texts.public)
    if texts.private is not None:
        yield from (texts.private.train, texts.private.validation, texts.private.test)


def test_public_text(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 100 blocks methods get the first 10, and the 2 behind them are held out."""
    texts = read(pico_tokenizer, settings(), different(100))
    whole = read(pico_tokenizer, settings(calibration_tokens=400), different(100))
    assert (len(texts.calibration), len(texts.public)) == (10, 2)
    assert not rows(texts.calibration) & rows(texts.public)
    begin = [whole.calibration[i]["input_ids"] for i in range(12)]
    assert [*texts.calibration["input_ids"], *texts.public["input_ids"]] == begin


def test_of_a_short_text_an_eighth_is_held_out(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = read(pico_tokenizer, settings(calibration_tokens=4000, held_out_tokens=400), different(32))
    assert (len(texts.calibration), len(texts.public)) == (28, 4)


def test_too_short(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"2 example\(s\) of 4 tokens, at least 3"):
        read(pico_tokenizer, settings(), different(2))


def test_private_text_in_three_parts(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 200 examples a tenth is for the test (12 tokens are 3), of the other 180 a tenth, at most 16, validates."""
    texts = read(pico_tokenizer, settings(), different(100), [different(120, 1000), different(80, 2000)])
    assert texts.private is not None
    sizes = [len(part) for part in (texts.private.train, texts.private.validation, texts.private.test)]
    assert sizes == [162, 16, 3]
    sets = [rows(part) for part in parts(texts)]
    assert all(not one & other for i, one in enumerate(sets) for other in sets[i + 1 :])


def test_a_test_set_of_its_own(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = read(pico_tokenizer, settings(), different(100), different(50, 1000), different(20, 3000))
    assert texts.private is not None
    assert (len(texts.private.train), len(texts.private.validation), len(texts.private.test)) == (45, 5, 3)


def test_digests_tell_texts_apart(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    one = read(pico_tokenizer, settings(), different(100), different(50, 1000))
    other = read(pico_tokenizer, settings(), different(100), different(50, 1001))
    assert set(one.digests()) == {"calibration", "public", "train", "validation", "test"}
    assert one.digests()["public"] == other.digests()["public"]
    assert one.digests()["train"] != other.digests()["train"]
    a, b = {"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}, {"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]]}
    assert digest_of(Dataset.from_dict(a)) != digest_of(Dataset.from_dict(b))


def test_names() -> None:
    assert name_of("/somewhere/public.txt") == "public.txt"
    assert name_of(different(3)) == "dataset of 1 rows"


def test_test_data_that_are_tuned_on_are_told(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    """Three blocks of four characters are measured on; the last two of them are the first two that are tuned on."""
    calibration, private = different(100, 5000), different(40, 100)
    apart = read(pico_tokenizer, settings(), calibration, private, different(3, 900))
    mixed = read(pico_tokenizer, settings(), calibration, private, different(3, 99))
    assert apart.leak() is None and read(pico_tokenizer, settings(), calibration).leak() is None
    assert str(mixed.leak()).startswith("2 of 3 different test examples are also among those that are tuned on")
