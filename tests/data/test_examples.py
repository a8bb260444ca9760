"""Packing, masking and splitting, with the expected ids written out by a tokenizer of one token a character."""

import pytest
from datasets import Dataset

from offsite_fl.data.examples import IGNORE, TextOptions, encode_pair, split_examples, to_examples
from offsite_fl.errors import ConfigError, DataError

EOS = 3


@pytest.fixture
def ids(pico_tokenizer):
    return lambda text: pico_tokenizer.convert_tokens_to_ids(list(text))


def test_documents_are_joined_by_eos_and_cut_into_full_blocks(pico_tokenizer, ids):
    data = Dataset.from_dict({"text": ["abcd", "  ", "efg"]})
    examples = to_examples(data, pico_tokenizer, block_size=4)
    stream = [*ids("abcd"), EOS, *ids("efg"), EOS]
    assert examples["input_ids"][:] == [stream[:4], stream[4:8]]  # the ninth token fills no block
    assert examples["labels"][:] == examples["input_ids"][:]


def test_pairs_are_masked_to_the_answer(pico_tokenizer, ids):
    data = Dataset.from_dict({"prompt": ["q: a", "q: b "], "answer": ["yes", "no"]})
    examples = to_examples(data, pico_tokenizer, block_size=32, loss_on="answer")
    assert examples["input_ids"][:] == [ids("q: a yes"), ids("q: b no")]
    assert examples["labels"][:] == [[IGNORE] * 4 + ids(" yes"), [IGNORE] * 5 + ids("no")]
    everything = to_examples(data, pico_tokenizer, block_size=32)
    assert everything["labels"][:] == everything["input_ids"][:]


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(pico_tokenizer, ids):
    assert encode_pair(pico_tokenizer, "abcdef", "xy", 5) == (ids("ef"), ids(" xy"))
    assert encode_pair(pico_tokenizer, "ab", "stuvwxyz", 4) == ([], ids(" stu"))
    assert encode_pair(pico_tokenizer, "ab\n", "x") == (ids("ab\n"), ids("x"))
    assert encode_pair(pico_tokenizer, "", "x") == ([], ids("x"))


def test_a_token_across_the_seam_belongs_to_the_answer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # words carry their leading space, as in GPT-2
    backend = Tokenizer(models.WordLevel({"q": 0, ":": 1, "Ġyes": 2, "Ġ": 3, "yes": 4, "<unk>": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    for prompt in ("q:", "q: "):
        assert encode_pair(tokenizer, prompt, "yes") == ([0, 1], [2])


def test_a_begin_token_is_kept_where_the_tokenizer_adds_one(pico_tokenizer, ids):
    from tokenizers.processors import TemplateProcessing

    pico_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    assert encode_pair(pico_tokenizer, "ab", "x") == ([2, *ids("ab")], ids(" x"))
    assert encode_pair(pico_tokenizer, "abcdef", "x", 4) == ([2, *ids("f")], ids(" x"))


def test_columns_by_other_names(pico_tokenizer):
    data = Dataset.from_dict({"question": ["a"], "reply": ["b"]})
    options = TextOptions(prompt="question", answer="reply")
    assert len(to_examples(data, pico_tokenizer, block_size=8, loss_on="answer", columns=options)) == 1


def test_text_and_pairs_in_one_table(pico_tokenizer):
    data = Dataset.from_dict({"text": ["abcdefgh"], "prompt": ["a"], "answer": ["b"]})
    assert to_examples(data, pico_tokenizer, block_size=8)["input_ids"][0] != [4, 30, 5]
    assert len(to_examples(data, pico_tokenizer, block_size=8)["input_ids"][0]) == 8
    assert len(to_examples(data, pico_tokenizer, block_size=8, loss_on="answer")["input_ids"][0]) == 3


@pytest.mark.parametrize(
    ("content", "loss_on", "message"),
    [
        ('{"txt": "a"}', "all", "line 1: needs column 'text' or 'prompt' and 'answer'; no 'text': did you mean 'txt'"),
        ('{"text": "abc"}', "answer", r"needs columns 'prompt' and 'answer' \(loss is on answers only\); no 'prompt'"),
        ('{"prompt": "a", "anwser": "b"}', "all", "no 'answer': did you mean 'anwser'"),
        ('{"text": "abc"}', "all", "column 'text': 4 tokens, too few for one block of 8; .*block-size to 4 or less"),
        ('{"text": "abc"}\n{"text": null}', "all", "line 2, column 'text': missing, must be text"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": " "}',
            "all",
            "line 2, column 'answer': the answer",
        ),
        ('{"prompt": "", "answer": "b"}', "answer", "line 1, column 'prompt': prompt and answer make one token"),
        ('{"prompt": 4, "answer": "b"}', "answer", "line 1, column 'prompt': a value of type int, must be text"),
    ],
)
def test_wrong_columns_and_values(tmp_path, pico_tokenizer, content, loss_on, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        to_examples(path, pico_tokenizer, block_size=8, loss_on=loss_on)
    assert "d.jsonl" in str(caught.value)


def test_unknown_loss(pico_tokenizer):
    with pytest.raises(ConfigError, match="did you mean 'answer'"):
        to_examples(Dataset.from_dict({"text": ["a"]}), pico_tokenizer, block_size=8, loss_on="answers")


def numbered(values):
    return Dataset.from_dict({"input_ids": [[v, v + 1] for v in values], "labels": [[v, v + 1] for v in values]})


def test_splits_share_nothing_not_even_copies():
    examples = numbered([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 3)
    train, validation = split_examples(examples, 0.2, seed=7)
    seen, held = ({tuple(ids) for ids in part["input_ids"]} for part in (train, validation))
    assert not seen & held and len(seen) == 8 and len(held) == 2
    assert len(train) + len(validation) == 30
    again = split_examples(examples, 0.2, seed=7)
    assert again[0].to_dict() == train.to_dict() and again[1].to_dict() == validation.to_dict()
    assert split_examples(examples, 0.2, seed=8)[1].to_dict() != validation.to_dict()


def test_split_ends():
    examples = numbered(range(3))
    assert split_examples(examples, 0.0, 0) == (examples, None)
    assert [len(part) for part in split_examples(examples, 0.01, 0)] == [2, 1]
    assert [len(part) for part in split_examples(examples, 0.99, 0)] == [1, 2]
    with pytest.raises(DataError, match="1 distinct example can't be split"):
        split_examples(numbered([4, 4]), 0.5, 0)
    with pytest.raises(ConfigError):
        split_examples(examples, 1.0, 0)


def test_examples_that_are_made_already_pass(pico_tokenizer):
    made = to_examples(Dataset.from_dict({"text": ["abcdefgh"]}), pico_tokenizer, block_size=4)
    assert to_examples(made, pico_tokenizer, block_size=4, loss_on="answer") is made
