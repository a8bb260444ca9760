"""Round after round on the same network, with a quantised frozen middle (fault 31)."""

import gc

import pytest
import torch
from datasets import Dataset

from offsite_fl.config import TuneConfig
from offsite_fl.models.linears import QuantizedLinear, named_linears, replace_module
from offsite_fl.tuning.lora import add_lora
from offsite_fl.tuning.tune import tune


@pytest.fixture(params=[8, 4])
def quantised(pico_llama, request):
    for block in pico_llama.model.layers[1:-1]:
        for path, linear in list(named_linears(block)):
            replace_module(block, path, QuantizedLinear.from_linear(linear, bits=request.param, group=16))
    return pico_llama


def examples():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 64, (8, 12), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_rounds_on_a_quantised_base_go_on_and_leave_nothing_behind(quantised, frozen_dtype):
    config = TuneConfig(
        lr=0.02, max_steps=3, lora_rank=2, frozen_dtype=frozen_dtype, device="cpu", progress=False, proximal_mu=0.01
    )
    blocks = {0: quantised.model.layers[0], 1: quantised.model.layers[-1]}
    packed = {n: b.clone() for n, b in quantised.named_buffers() if n.endswith(("packed", "scales"))}
    factors, losses, alive, data = None, [], [], examples()
    for round_ in range(4):
        lora = add_lora(blocks, config.lora, seed=0)
        if factors is not None:
            lora.load(factors)
        result = tune(quantised, lora.parameters(), data, config)
        lora.remove()
        factors = {name: tensor.clone() for name, tensor in result.tensors.items()}  # an average of one client
        losses.append(result.train_loss)
        del result, lora
        if round_ > 0:
            alive.append(live_tensors())
    # Not round by round: how a small step in bf16 rounds differs between processors.
    assert max(losses[1:]) < losses[0] and losses[-1] == min(losses)
    assert alive[0] == alive[1] == alive[2]
    for name, buffer in quantised.named_buffers():
        assert name not in packed or torch.equal(buffer, packed[name])
