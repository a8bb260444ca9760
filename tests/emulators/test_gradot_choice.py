"""GradOT: what stays is what its scores say, against the whole model's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.gcs import PARTNERS
from offsite_fl.emulators.gradot import GradOT
from offsite_fl.models.linears import linear_weight

from .conftest import compressed, share

MakeContext = Callable[..., Context]
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


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


def direction_terms(context: Context, position: int, path: str) -> tuple[Tensor, Tensor]:
    """Shift and slope of each direction of a matrix, [rank], from ``G D A`` and ``g`` as they are."""
    inputs, outputs, gradient = naive_moments(context, position, path)
    u, s, vt = torch.linalg.svd(own_weight(context, position, path), full_matrices=False)
    parts = [s[k] * torch.outer(u[:, k], vt[k]) for k in range(len(s))]
    shifts = torch.stack([(outputs @ part @ inputs).abs().sum() for part in parts])
    return shifts, torch.stack([(gradient * part).sum() for part in parts])


def channel_parts(context: Context, position: int, channels: list[int]) -> dict[str, Tensor]:
    """What taking these channels of an MLP out takes from each of its matrices."""
    parts = {}
    for path in MLP:
        weight = own_weight(context, position, path)
        where = (slice(None), channels) if path == "mlp.down_proj" else (channels, slice(None))
        parts[path] = torch.zeros_like(weight)
        parts[path][where] = weight[where]
    return parts


def channel_terms(context: Context, position: int) -> tuple[Tensor, Tensor]:
    """Shift and slope of each channel of an MLP alone, [64]."""
    shifts, slopes = torch.zeros(64).double(), torch.zeros(64).double()
    moments = {path: naive_moments(context, position, path) for path in MLP}
    for channel in range(64):
        for path, part in channel_parts(context, position, [channel]).items():
            inputs, outputs, gradient = moments[path]
            shifts[channel] += (outputs @ part @ inputs).abs().sum()
            slopes[channel] += (gradient * part).sum()
    return shifts, slopes


def own_weight(context: Context, position: int, path: str) -> Tensor:
    return linear_weight(context.block(position).get_submodule(path)).detach().double()


@pytest.mark.parametrize("normalise", [True, False])
def test_the_ranks_that_stay(normalise: bool, pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Rank 6 of 32: 5 % of 32 rounded up is 2, the largest always, and the 4 best by score of the rest."""
    context, lam = context_of(pico_llama), 0.6
    block = compressed(GradOT(lam_mha=lam, normalise=normalise, keep_mha=0.4, keep_mlp=0.5), context).at(3)
    for path in ("self_attn.q_proj", "self_attn.o_proj"):
        u, s, vt = torch.linalg.svd(own_weight(context, 3, path))
        scores = normalised(*direction_terms(context, 3, path), lam, normalise)
        kept = [0, 1, *(2 + scores[2:].topk(4).indices).tolist()]
        new = block.get_submodule(path)
        assert new.rank == 6
        assert_close(new.up.weight @ new.down.weight, ((u[:, kept] * s[kept]) @ vt[kept]).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_channels_that_stay(normalise: bool, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context, lam = context_of(pico_llama), 0.6
    block = compressed(GradOT(lam_mlp=lam, normalise=normalise, keep_mha=0.5, keep_mlp=0.25), context).at(1)
    kept = normalised(*channel_terms(context, 1), lam, normalise).topk(16).indices.sort().values
    full = context.block(1).mlp
    assert torch.equal(block.mlp.gate_proj.weight, full.gate_proj.weight[kept])
    assert torch.equal(block.mlp.up_proj.weight, full.up_proj.weight[kept])
    assert torch.equal(block.mlp.down_proj.weight, full.down_proj.weight[:, kept])


def test_global_allocation_by_plain_scores(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """The loss counts in attention, not in MLPs; each is shared out among its own kind, by score a byte.

    Shares of 0.4 and 0.25 are ranks of 6 (32x32, of 64 numbers each) and 4 (16x32, of 48), and 16 of 64 channels.
    """
    context = context_of(pico_llama)
    method = GradOT(lam_mha=0.6, lam_mlp=0.0, keep_mha=0.4, keep_mlp=0.25, allocation="global")
    built = compressed(method, context)
    matrices = [(position, path) for position in (1, 2, 3, 4) for path in ATTENTION]
    terms = [direction_terms(context, *matrix) for matrix in matrices]
    pooled = normalised(torch.cat([t[0] for t in terms]), torch.cat([t[1] for t in terms]), 0.6, True)
    scores = dict(zip(matrices, pooled.split([len(t[0]) for t in terms]), strict=True))
    # The largest directions, 5 % rounded up, come before all scores.
    kept = {matrix: list(range(len(score) // 16)) for matrix, score in scores.items()}
    budget = 4 * (2 * 6 * 64 + 2 * 4 * 48)

    def held(matrix: tuple[int, str], count: int) -> int:
        """Numbers of two factors, or of the matrix as it is where they would be no fewer."""
        rows = len(scores[matrix])
        return min(count * (32 + rows), 32 * rows)

    candidates = [(m, k) for m, score in scores.items() for k in range(len(score)) if k not in kept[m]]
    for matrix, k in sorted(candidates, key=lambda c: -float(scores[c[0]][c[1]]) / (32 + len(scores[c[0]]))):
        others = sum(held(other, len(ranks)) for other, ranks in kept.items() if other != matrix)
        if others + held(matrix, len(kept[matrix]) + 1) <= budget:
            kept[matrix].append(k)
    assert len({len(ranks) for ranks in kept.values()}) > 2
    for (position, path), ranks in kept.items():
        u, s, vt = torch.linalg.svd(own_weight(context, position, path), full_matrices=False)
        new = built.at(position).get_submodule(path)
        if held((position, path), len(ranks)) == own_weight(context, position, path).numel():
            assert new.weight is context.block(position).get_submodule(path).weight
            continue
        assert new.rank == len(ranks)
        expected = (u[:, ranks] * s[ranks]) @ vt[ranks]
        assert_close(new.up.weight @ new.down.weight, expected.float(), rtol=1e-3, atol=1e-4)
    shifts = {position: channel_terms(context, position)[0] for position in (1, 2, 3, 4)}
    least = torch.cat(list(shifts.values())).topk(4 * 16).values.min()
    for position, shift in shifts.items():
        full = context.block(position).mlp.up_proj.weight
        assert torch.equal(built.at(position).mlp.up_proj.weight, full[shift >= least])


@pytest.mark.parametrize("allocation", ["matrix", "global"])
def test_swaps_lower_the_score_of_what_goes_together(
    allocation: Literal["matrix", "global"], pico_llama: nn.Module, context_of: MakeContext
) -> None:
    """``||G D A||_1 - lam g . D`` of all channels that go, where keeping one of them instead of another lowers it.

    In block 2 every second channel does the opposite of the one before it: a pair that goes together changes nothing,
    and the single scores, which don't know that, tear pairs apart.
    """
    with torch.no_grad():
        mlp = pico_llama.model.layers[2].mlp
        for rows in (mlp.gate_proj.weight, mlp.up_proj.weight):
            rows[1::2] = rows[::2]
        mlp.down_proj.weight[:, 1::2] = -mlp.down_proj.weight[:, ::2]
    context, lam = context_of(pico_llama), 0.6
    method = GradOT(lam_mlp=lam, normalise=False, keep_mha=0.4, keep_mlp=0.25, allocation=allocation)
    plain, swapped = compressed(method, context), compressed(replace(method, refine=1), context)
    moments = {path: naive_moments(context, 2, path) for path in MLP}

    def joint(kept: set[int]) -> float:
        total = 0.0
        for path, part in channel_parts(context, 2, [c for c in range(64) if c not in kept]).items():
            inputs, outputs, gradient = moments[path]
            total += float((outputs @ part @ inputs).abs().sum() + lam * (gradient * part).sum())
        return total

    def kept_by(built: Emulator) -> set[int]:
        columns, full = (block.mlp.down_proj.weight.T for block in (built.at(2), context.block(2)))
        return {int(row.nonzero()) for row in (columns[:, None] == full).all(-1)}

    before, after = kept_by(plain), kept_by(swapped)
    alone = normalised(*channel_terms(context, 2), lam, False)
    partners = sorted(before, key=lambda c: float(alone[c]))[:PARTNERS]
    swaps = [(before - {out}) | {new} for new in set(range(64)) - before for out in partners]
    assert min(map(joint, swaps)) < 0.999 * joint(before), "there must be something to gain"
    assert len(after) == len(before) and joint(after) < 0.999 * joint(before)


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
