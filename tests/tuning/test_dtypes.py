"""Frozen bf16 beside trained fp32, with and without autocast."""

import pytest
import torch

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.loss import causal_nll, plain_head
from offsite_fl.tuning.dtypes import prepare_dtypes, resolve_device


def ends(model):
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return {f"adapter.{k}.{n}": p for k, i in enumerate((0, -1)) for n, p in blocks[i].named_parameters()}


def test_every_family_runs_in_two_dtypes(pico, family, pico_batch):
    model = pico(family)
    expected, tokens = causal_nll(model, pico_batch)
    trained = ends(model)
    head = plain_head(model)
    assert prepare_dtypes(model, trained, TuneConfig(frozen_dtype="bfloat16", device="cpu")) is torch.bfloat16
    ids = {id(p) for p in trained.values()}
    assert all(p.dtype == (torch.float32 if id(p) in ids else torch.bfloat16) for p in model.parameters())
    assert {id(p) for p in ends(model).values()} == ids
    assert plain_head(model) is head  # casting hooks don't cost the fast loss
    inputs = {name: pico_batch[name] for name in ("input_ids", "attention_mask")}
    assert model(**inputs).logits.isfinite().all()
    total, _ = causal_nll(model, pico_batch)
    assert total.item() / tokens == pytest.approx(expected.item() / tokens, abs=0.1)
    total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_nll(model, pico_batch)[0].item() / tokens == pytest.approx(expected.item() / tokens, abs=0.1)


def test_back_to_one_dtype_leaves_no_hooks(pico_llama, pico_batch):
    prepare_dtypes(pico_llama, ends(pico_llama), TuneConfig(frozen_dtype="bfloat16", device="cpu"))
    prepare_dtypes(pico_llama, ends(pico_llama), TuneConfig(frozen_dtype="auto", device="cpu"))
    assert {p.dtype for p in pico_llama.parameters()} == {torch.float32}
    assert not any(m._forward_pre_hooks for m in pico_llama.modules())


def test_auto_on_cpu_is_fp32_and_buffers_stay(pico_llama):
    pico_llama.to(torch.bfloat16)
    pico_llama.register_buffer("scales", torch.ones(2, dtype=torch.float16))
    assert prepare_dtypes(pico_llama, ends(pico_llama), TuneConfig(device="cpu")) is torch.float32
    assert {p.dtype for p in pico_llama.parameters()} == {torch.float32}
    assert pico_llama.scales.dtype is torch.float16


def test_devices():
    assert resolve_device(TuneConfig(device="cpu")) == torch.device("cpu")
    for wrong in ("tpu-9", "cuda:99"):
        with pytest.raises(ConfigError, match=wrong):
            resolve_device(TuneConfig(device=wrong))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_cuda_is_bf16(pico_llama):
    assert prepare_dtypes(pico_llama.cuda(), ends(pico_llama), TuneConfig()) is torch.bfloat16
