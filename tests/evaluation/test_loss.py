"""The chunked loss against plain cross entropy over full logits."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offsite_fl.errors import DataError
from offsite_fl.evaluation import loss as module
from offsite_fl.evaluation.loss import LossResult, causal_nll, evaluate_loss, plain_head

SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **more))


def gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=5.0))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_head=2, n_layer=2, n_positions=32))


def batch(rows=3, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[-1, 6:], labels[-1, 6:], labels[0, :4] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum")


@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), gpt2, gemma2])
@pytest.mark.parametrize("elements", [61 * 5, 2**24])
def test_value_and_every_gradient_equal_plain_cross_entropy(make, elements, monkeypatch):
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(module, "_chunk", lambda rows, vocabulary: max(1, elements // vocabulary))
    model, data = make().eval(), batch()
    total, tokens = causal_nll(model, data)
    assert tokens == 5 + 8 + 5  # row 0 predicts positions 4..8, row 1 1..8, row 2 1..5
    (total / 3).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = plain(model, data)
    (expected / 3).backward()
    torch.testing.assert_close(total, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_head_with_bias():
    hidden, weight, bias = torch.randn(7, 4), torch.randn(11, 4), torch.randn(11)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    targets = torch.arange(7)
    module._linear_nll(hidden, weight, bias, targets).backward()
    found = [t.grad.clone() for t in (hidden, weight, bias)]
    hidden.grad = weight.grad = bias.grad = None
    F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum").backward()
    for mine, tensor in zip(found, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, tensor.grad)


def test_plain_heads_are_told_from_capped_ones():
    assert plain_head(llama()) is not None
    assert plain_head(gpt2()) is not None
    # the cap of 30 can't be seen on the tiny logits of a fresh model by comparing logits
    torch.manual_seed(0)
    assert plain_head(Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=30.0))) is None


def test_probe_keeps_the_mode_and_is_repeated_for_a_new_head():
    model = llama().train()
    head = plain_head(model)
    assert model.training and model.model.layers[0].training
    model.lm_head = torch.nn.Linear(16, 61, bias=True)
    assert plain_head(model) is model.lm_head is not head
    assert not model.lm_head._forward_hooks


def test_frozen_head_gets_no_gradient_and_full_logits_never_exist(monkeypatch):
    model, data = llama(), batch()
    monkeypatch.setattr(module, "_chunk", lambda rows, vocabulary: 4)
    plain_head(model)  # the probe itself runs the head
    model.lm_head.weight.requires_grad_(False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        total, _ = causal_nll(model, data)
    assert not any(s[-1:] == (61,) for s in sizes)
    total.backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None


def test_autocast_and_mixed_dtypes_stay_close():
    model, data = llama().eval(), batch()
    expected = plain(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(causal_nll(model, data)[0], expected, rtol=2e-2, atol=0)
    torch.testing.assert_close(causal_nll(model.bfloat16(), data)[0], expected, rtol=2e-2, atol=0)


def test_evaluate_weighs_tokens_not_batches_and_restores_modes():
    model = gpt2().train()
    model.transformer.h[0].eval()
    long, short = batch(4, 12, seed=2), batch(2, 8, seed=3)
    result = evaluate_loss(model, [long, short])
    assert model.training and not model.transformer.h[0].training
    model.eval()
    sums = [plain(model, b).item() for b in (long, short)]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in (long, short)]
    assert result.tokens == sum(tokens)
    assert result.loss == pytest.approx(sum(sums) / sum(tokens), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_padding_changes_nothing():
    model, data = llama().eval(), batch(2, 7, seed=5)
    padded = {
        "input_ids": F.pad(data["input_ids"], (0, 3), value=9),
        "attention_mask": F.pad(data["attention_mask"], (0, 3)),
        "labels": F.pad(data["labels"], (0, 3), value=-100),
    }
    torch.testing.assert_close(causal_nll(model, data)[0], causal_nll(model, padded)[0])


def test_nothing_to_predict():
    data = batch()
    data["labels"][:] = -100
    with pytest.raises(DataError, match="no token to predict"):
        evaluate_loss(llama(), [data])
    assert LossResult(1000.0, 1).perplexity == math.inf
