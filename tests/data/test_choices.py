"""Rows of multiple choice, and the pairs that they become for tuning."""

import json

import pytest
from datasets import Dataset

from offsite_fl.data.choices import ChoiceColumns, read_questions
from offsite_fl.data.examples import IGNORE, TextOptions, to_examples
from offsite_fl.errors import DataError


def _file(folder, *rows):
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_answer_is_an_index_or_the_choice_itself(tmp_path):
    path = _file(
        tmp_path,
        {"prompt": "p", "choices": ["a", "b", "c"], "answer": 2},
        {"prompt": "q", "choices": ["1", "0"], "answer": "0"},  # text, so not the index 0
    )
    questions = read_questions(path)
    assert [(q.prompt, q.right, q.answer) for q in questions] == [("p", "c", 2), ("q", "0", 1)]
    table = Dataset.from_list([{"q": "p", "o": ["a", "b"], "a": 1}])
    assert read_questions(table, ChoiceColumns("q", "o", "a"))[0].right == "b"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"choices": "a b"}, "column 'choices': a value of type str, must be a list of texts"),
        ({"choices": None}, "column 'choices': a value of type NoneType"),
        ({"choices": ["a"]}, "1 choices, must be at least two that differ"),
        ({"choices": ["a", "a "]}, "2 choices, must be at least two that differ"),
        ({"choices": ["a", ""]}, "choice 1 is empty"),
        ({"choices": ["a", 3]}, "choice 1 is empty or no text"),
        ({"answer": 2}, "column 'answer': index 2 is outside the 2 choices"),
        ({"answer": -1}, "index -1 is outside"),
        ({"answer": "c"}, "the answer is none of the 2 choices"),
        ({"answer": True}, "a value of type bool, must be an index"),
        ({"answer": None}, "a value of type NoneType, must be an index"),
        ({"prompt": 1}, "column 'prompt': a value of type int, must be text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, wrong, said):
    good = {"prompt": "p", "choices": ["a", "b"], "answer": 0}
    path = _file(tmp_path, good, good | wrong)
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert f"{path}, line 2, " in str(error.value) and said in str(error.value)
    with pytest.raises(DataError, match="line 2, "):  # a data owner who tunes on it reads the same
        to_examples(path, None, block_size=8, loss_on="answer")


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(DataError, match="multiple choice needs a column 'choices'"):
        read_questions(_file(tmp_path, {"prompt": "p", "choice": ["a", "b"], "answer": 0}))


def test_tuning_takes_the_prompt_and_the_right_choice(pico_tokenizer):
    """A question becomes the example that a pair of prompt and answer becomes: leading space, loss on the answer."""
    questions = Dataset.from_list([{"prompt": "q: a", "choices": ["no", "yes"], "answer": 1}])
    pair = Dataset.from_list([{"prompt": "q: a", "answer": "yes"}])
    for loss_on in ("answer", "all"):
        made = to_examples(questions, pico_tokenizer, block_size=32, loss_on=loss_on)
        assert made[:] == to_examples(pair, pico_tokenizer, block_size=32, loss_on=loss_on)[:]
    asked = pico_tokenizer.convert_tokens_to_ids(list(" yes"))
    assert to_examples(questions, pico_tokenizer, block_size=32, loss_on="answer")["labels"][0] == [IGNORE] * 4 + asked
    renamed = questions.rename_columns({"prompt": "p", "choices": "c", "answer": "a"})
    named = TextOptions(prompt="p", answer="a", choices="c")
    assert to_examples(renamed, pico_tokenizer, block_size=32, columns=named)["input_ids"][:] == made["input_ids"][:]
