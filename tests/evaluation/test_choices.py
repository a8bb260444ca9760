"""Scores of choices against a plain version that asks one choice at a time, over the whole sequence."""

import math

import pytest
import torch
from datasets import Dataset

from offsite_fl.data.examples import IGNORE, encode_pair, to_examples
from offsite_fl.errors import ConfigError, DataError, ModelError
from offsite_fl.evaluation.choices import MultipleChoice
from offsite_fl.evaluation.loss import token_log_probabilities

QUESTIONS = [
    {"prompt": "the cat", "choices": ["sat", "sang a song", "sat down", "x"], "answer": 1},
    {"prompt": "is it so?", "choices": ["yes", "no", "n"], "answer": "no"},
    {"prompt": "a long prompt that fills most of the room:\n", "choices": ["b", "c"], "answer": 0},
]


def _plain(model, tokenizer, prompt, choice, block_size=128):
    context, target = encode_pair(tokenizer, prompt, choice, block_size)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + target])).logits[0].double()
    total = 0.0
    for i, token in enumerate(target):
        row = logits[len(context) + i - 1].tolist()
        total += row[token] - math.log(sum(math.exp(value) for value in row))
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])  # gemma2 caps its logits: no plain head
def test_scores_equal_the_plain_version(pico, pico_tokenizer, family):
    model = pico(family).train()
    for batch_size in (1, 3, 64):
        test = MultipleChoice(Dataset.from_list(_texts()), pico_tokenizer, batch_size=batch_size)
        found = test.scores(model)
        assert model.training
        model.eval()
        for question, scores in zip(QUESTIONS, found, strict=True):
            plain = [_plain(model, pico_tokenizer, question["prompt"], choice) for choice in question["choices"]]
            assert scores.tolist() == pytest.approx(plain, abs=1e-4)
        model.train()


def _texts():
    """A column of a dataset has one type: answers as text."""
    return [
        q | {"answer": q["answer"] if isinstance(q["answer"], str) else q["choices"][q["answer"]]} for q in QUESTIONS
    ]


def test_the_score_of_the_right_choice_is_minus_the_loss_of_tuning(pico_llama, pico_tokenizer):
    """Trained as scored: the tuning example's loss on the answer is the scorer's number, also where a prompt is cut."""
    data = Dataset.from_list(_texts())
    for block_size in (128, 16):
        scores = MultipleChoice(data, pico_tokenizer, block_size=block_size).scores(pico_llama)
        examples = to_examples(data, pico_tokenizer, block_size=block_size, loss_on="answer")
        for question, example, found in zip(QUESTIONS, examples, scores, strict=True):
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            assert ids.shape[1] <= block_size
            answers = int((labels != IGNORE).sum())
            with torch.no_grad():
                loss = float(pico_llama(input_ids=ids, labels=labels).loss) * answers
            right = question["choices"].index(_texts()[QUESTIONS.index(question)]["answer"])
            assert float(found[right]) == pytest.approx(-loss, abs=1e-3)


class Fixed(MultipleChoice):
    """Scores that a test gives by hand."""

    def scores(self, model):
        return [torch.tensor(values, dtype=torch.float64) for values in self.given]


def test_accuracies_by_hand(pico_tokenizer, pico_llama):
    rows = [
        {"prompt": "p", "choices": ["ab", "abcdefgh"], "answer": 1},
        {"prompt": "p", "choices": ["ab", "abcdefgh"], "answer": 0},
        {"prompt": "p", "choices": ["a", "b", "c", "d"], "answer": 3},
    ]
    test = Fixed(Dataset.from_list(rows), pico_tokenizer)
    # per character: -1 and -0.5, -1 and -1.5
    test.given = [[-2.0, -4.0], [-2.0, -12.0], [-3.0, -2.0, -1.0, -4.0]]
    found = test.result(pico_llama)
    assert (found.acc, found.acc_norm, found.questions) == (1 / 3, 2 / 3, 3)
    assert found.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert test(pico_llama).accuracy == 1 / 3
    test.normalised = True
    assert test(pico_llama).accuracy == 2 / 3


def test_choices_of_one_token_cost_one_run_of_the_prompt(pico_tokenizer, pico_llama):
    rows = [{"prompt": "which letter? ", "choices": list("abcd"), "answer": 0}]
    test = MultipleChoice(Dataset.from_list(rows), pico_tokenizer)
    assert test.tokens == len("which letter? ")
    seen = []
    handle = pico_llama.register_forward_pre_hook(lambda m, args, kwargs: seen.append(1), with_kwargs=True)
    inner = pico_llama.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
    scores = test.scores(pico_llama)[0]
    handle.remove(), inner.remove()
    assert seen[-1] == (1, 14)
    assert scores.tolist() == pytest.approx([_plain(pico_llama, pico_tokenizer, "which letter? ", c) for c in "abcd"])
    # "sat" and "so" but for its last letter begin "sat down" and are read off it; "no" isn't
    rows = [{"prompt": "it", "choices": ["sat", "so", "sat down", "no"], "answer": 0}]
    assert MultipleChoice(Dataset.from_list(rows), pico_tokenizer).tokens == len("it sat dow") + len("it n")


def test_first_questions_only(pico_tokenizer):
    assert len(MultipleChoice(Dataset.from_list(_texts()), pico_tokenizer, max_questions=2).questions) == 2
    with pytest.raises(ConfigError, match="max-questions"):
        MultipleChoice(Dataset.from_list(_texts()), pico_tokenizer, max_questions=0)


def test_a_choice_without_room_or_prompt_is_refused(pico_tokenizer):
    rows = [{"prompt": "p", "choices": ["a" * 30, "b"], "answer": 0}]
    with pytest.raises(DataError, match="dataset, row 0: a choice of 16 tokens or more leaves no room"):
        MultipleChoice(Dataset.from_list(rows), pico_tokenizer, block_size=16)
    rows = [{"prompt": "", "choices": ["a", "b"], "answer": 0}]
    with pytest.raises(DataError, match="there is no prompt"):
        MultipleChoice(Dataset.from_list(rows), pico_tokenizer)


def test_another_task_is_refused(pico_tokenizer):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", vocab_size=64, **settings))
    with pytest.raises(ModelError):
        MultipleChoice(Dataset.from_list(_texts()), pico_tokenizer).scores(model)


def test_tokens_at_one_position_in_chunks(pico_llama, monkeypatch):
    monkeypatch.setattr("offsite_fl.evaluation.loss._chunk", lambda rows, vocabulary: 2)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    asked = torch.tensor([[1, 2, 7], [0, 3, 5], [0, 0, 4], [1, 2, 9], [0, 1, 60], [0, 1, 61]])
    with torch.no_grad():
        plain = pico_llama(**inputs).logits.log_softmax(-1)[asked[:, 0], asked[:, 1], asked[:, 2]]
    found = token_log_probabilities(pico_llama, inputs, *asked.T)
    assert torch.allclose(found, plain, atol=1e-5)
