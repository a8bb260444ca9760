"""GradOT: what stays is what its scores say, against the whole model's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.gradot import GradOT

from .conftest import compressed, share

MakeContext = Callable[..., Context]


def naive_moments(context: Context, position: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and g from the whole model's own autograd, fp64, over real tokens."""
    linear = context.block(position).get_submodule(path)
    xs, gys = [], []
    for batch in context.calibration:
        seen: list[Tensor] = []
        handle = linear.register_forward_hook(lambda _, args, y, seen=seen: seen.extend((args[0], y)))
        logits = context.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        handle.remove()
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        (gy,) = torch.autograd.grad(loss, seen[1])
        real = batch["attention_mask"].bool()
        xs.append(seen[0].detach()[real].double())
        gys.append(gy[real].double())
    x, gy = torch.cat(xs), torch.cat(gys)
    return x.T @ x / len(x), gy.T @ gy / len(x), gy.T @ x / len(x)


def normalised(shifts: Tensor, slopes: Tensor, lam: float, normalise: bool) -> Tensor:
    if not normalise:
        return shifts + lam * slopes
    return shifts / shifts.mean() + lam * slopes / slopes.abs().mean()


@pytest.mark.parametrize("normalise", [True, False])
def test_the_ranks_that_stay(normalise: bool, pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Rank 6 of 32: 5 % of 32 rounded up is 2, the largest always, and the 4 best by score of the rest."""
    context, lam = context_of(pico_llama), 0.6
    block = compressed(GradOT(lam_mha=lam, normalise=normalise, keep_mha=0.4, keep_mlp=0.5), context).at(3)
    for path in ("self_attn.q_proj", "self_attn.o_proj"):
        inputs, outputs, gradient = naive_moments(context, 3, path)
        weight = context.block(3).get_submodule(path).weight.detach().double()
        u, s, vt = torch.linalg.svd(weight)
        shifts = torch.stack([(outputs @ (s[k] * torch.outer(u[:, k], vt[k])) @ inputs).abs().sum() for k in range(32)])
        slopes = torch.stack([(gradient * (s[k] * torch.outer(u[:, k], vt[k]))).sum() for k in range(32)])
        scores = normalised(shifts, slopes, lam, normalise)
        kept = [0, 1, *(2 + scores[2:].topk(4).indices).tolist()]
        new = block.get_submodule(path)
        assert new.rank == 6
        assert_close(new.up.weight @ new.down.weight, ((u[:, kept] * s[kept]) @ vt[kept]).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_channels_that_stay(normalise: bool, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context, lam = context_of(pico_llama), 0.6
    block = compressed(GradOT(lam_mlp=lam, normalise=normalise, keep_mha=0.5, keep_mlp=0.25), context).at(1)
    shifts, slopes = torch.zeros(64).double(), torch.zeros(64).double()
    for path in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        inputs, outputs, gradient = naive_moments(context, 1, path)
        weight = context.block(1).get_submodule(path).weight.detach().double()
        for channel in range(64):
            part = torch.zeros_like(weight)
            where = (slice(None), channel) if path == "mlp.down_proj" else (channel, slice(None))
            part[where] = weight[where]
            shifts[channel] += (outputs @ part @ inputs).abs().sum()
            slopes[channel] += (gradient * part).sum()
    kept = normalised(shifts, slopes, lam, normalise).topk(16).indices.sort().values
    full = context.block(1).mlp
    assert torch.equal(block.mlp.gate_proj.weight, full.gate_proj.weight[kept])
    assert torch.equal(block.mlp.up_proj.weight, full.up_proj.weight[kept])
    assert torch.equal(block.mlp.down_proj.weight, full.down_proj.weight[:, kept])


@pytest.mark.parametrize("score", ["gcs", "random"])
@pytest.mark.parametrize("allocation", ["matrix", "global"])
def test_the_largest_directions_always_stay(
    allocation: Literal["matrix", "global"],
    score: Literal["gcs", "random"],
    pico_llama: nn.Module,
    context_of: MakeContext,
) -> None:
    """At top = 0.25 the 4 of a 16 x 32 matrix, at the rank 4 or 5 that a share of 0.45 gives it."""
    context = context_of(pico_llama)
    built = compressed(GradOT(0.45, top=0.25, allocation=allocation, score=score), context)
    for position in built.positions:
        weight = context.block(position).self_attn.k_proj.weight.detach()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        new = built.at(position).self_attn.k_proj
        product = new.up.weight @ new.down.weight
        assert_close((u.T @ product @ vt.T)[:4, :4], torch.diag(s[:4]), rtol=1e-4, atol=1e-4)


def test_the_controls(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    block = compressed(GradOT(score="magnitude", keep_mha=0.4, keep_mlp=0.25), context).at(2)
    full = context.block(2)
    u, s, vt = torch.linalg.svd(full.self_attn.q_proj.weight.detach())
    new = block.self_attn.q_proj
    assert_close(new.up.weight @ new.down.weight, (u[:, :6] * s[:6]) @ vt[:6], rtol=1e-3, atol=1e-4)
    everything = torch.cat([full.mlp.gate_proj.weight, full.mlp.up_proj.weight, full.mlp.down_proj.weight.T], dim=1)
    kept = everything.norm(dim=1).topk(16).indices.sort().values
    assert torch.equal(block.mlp.up_proj.weight, full.mlp.up_proj.weight[kept])

    def random_rows(seed: int, position: int) -> Tensor:
        seeded = replace(context, seed=seed)
        return compressed(GradOT(score="random", keep_mha=0.5, keep_mlp=0.25), seeded).at(position).mlp.up_proj.weight

    assert torch.equal(random_rows(1, 2), random_rows(1, 2))
    assert not torch.equal(random_rows(1, 2), random_rows(2, 2))


def test_global_allocation_gives_where_it_matters(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Block 3 writes nothing: its channels cost nothing, and others take their bytes. The total stays."""
    with torch.no_grad():
        pico_llama.model.layers[3].mlp.down_proj.weight.zero_()
    context = context_of(pico_llama)
    built = {a: compressed(GradOT(0.5, 0.0, 0.0, allocation=a), context) for a in ("matrix", "global")}
    widths = {a: [built[a].at(p).mlp.up_proj.out_features for p in (1, 2, 3, 4)] for a in built}
    assert max(widths["matrix"]) - min(widths["matrix"]) <= 1
    assert widths["global"][2] == 1 and sum(widths["global"]) == sum(widths["matrix"])
    assert abs(share(built["global"], context) - share(built["matrix"], context)) <= 0.01


def test_only_so_many_tokens_are_read(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Batches of 4 x 16 tokens: of 40 tokens two rows are read, of 64 the first batch, of 1 the first row."""
    whole = context_of(pico_llama)
    first = whole.calibration[0]
    method = GradOT(keep_mha=0.5, keep_mlp=0.5)
    for tokens, rows in ((40, 2), (64, 4), (1, 1)):
        head: Batch = {name: value[:rows] for name, value in first.items()}
        ours = compressed(replace(method, tokens=tokens), whole).at(2).state_dict()
        theirs = compressed(method, replace(whole, calibration=(head,))).at(2).state_dict()
        assert_close(ours, theirs)
    many = compressed(replace(method, tokens=96), whole).at(2).mlp.up_proj.weight
    assert not torch.equal(many, compressed(replace(method, tokens=1), whole).at(2).mlp.up_proj.weight)
