"""Who decays, and for whom the optimiser holds state (faults 19 and 23)."""

import torch

from offsite_fl.config import TuneConfig
from offsite_fl.tuning.optimizer import make_optimizer, undecayed


def test_biases_and_norms_of_every_family_are_spared(pico, family):
    model = pico(family)
    spared = undecayed(model)
    for name, parameter in model.named_parameters():
        # in these families exactly the vectors are biases and norm weights
        assert (id(parameter) in spared) == (parameter.ndim == 1), name


def test_decay_moves_matrices_only(pico):
    model = pico("gpt2")
    block = dict(model.transformer.h[0].named_parameters())
    before = {name: p.detach().clone() for name, p in block.items()}
    optimizer = make_optimizer(model, block, TuneConfig(lr=0.1, weight_decay=0.5))
    for parameter in block.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in block.items():
        factor = 0.95 if parameter.ndim == 2 else 1.0  # AdamW: w * (1 - lr * decay), no gradient
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)
    assert {id(p) for p in optimizer.state} == {id(p) for p in block.values()}


def test_kinds(pico):
    model = pico("llama")
    part = {"w": model.model.layers[0].mlp.up_proj.weight}
    assert type(make_optimizer(model, part, TuneConfig())) is torch.optim.AdamW
    sgd = make_optimizer(model, part, TuneConfig(optimizer="sgd"))
    assert type(sgd) is torch.optim.SGD and len(sgd.param_groups) == 1
