"""The small model in miniature: a few steps on a few verses made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from offsite_fl.errors import ConfigError, DataError
from simulations.pico import Recipe, make, pico_folder
from simulations.pico.pretrain import grow, new_model, pretrain
from simulations.pico.tokenizer import train_tokenizer

TEXT = "\n\n".join(
    f"Chapter {n}\n\nAnd the {who} went up to the {where}, and said, Let us make {n} {what}."
    for n in range(60)
    for who, where, what in [("king", "mountain", "altars"), ("shepherd", "river", "tents")]
)
TINY = Recipe(
    hidden=16,
    mlp=32,
    heads=2,
    kv_heads=1,
    vocabulary=300,
    positions=64,
    stages=((1, 6), (2, 3), (4, 3)),
    block_size=32,
    lr=6e-3,
    batch_size=2,
)


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    return pretrain(TINY, TEXT, train_tokenizer(TEXT, 300, 64), progress=False)


def test_size_of_the_default_model() -> None:
    recipe = Recipe()
    assert recipe.depth == 12
    with torch.device("meta"):
        model = new_model(replace(recipe, stages=((12, 1),)), train_tokenizer(TEXT, recipe.vocabulary, 64))
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6


def test_the_tokenizer_gives_any_text_back() -> None:
    tokenizer = train_tokenizer(TEXT, 300, 64)
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1
    for text in ("And the king said,\n\nLet us go.", "Grüße, 世界 \t 42!", "  two  spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # "went up to the" came 120 times, so it takes fewer tokens than letters by far
    assert len(tokenizer(" went up to the")["input_ids"]) <= 5


def test_training_is_reproducible_and_lowers_the_loss(trained: LlamaForCausalLM) -> None:
    tokenizer = train_tokenizer(TEXT, 300, 64)
    again = pretrain(TINY, TEXT, tokenizer, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:64]])
    untrained = new_model(TINY, tokenizer)
    with torch.no_grad():
        assert trained(input_ids=ids, labels=ids).loss < untrained(input_ids=ids, labels=ids).loss - 0.3
    assert trained.config.num_hidden_layers == 4 and not trained.training
    other = pretrain(replace(TINY, seed=1), TEXT, tokenizer, progress=False)
    assert not torch.equal(next(trained.parameters()), next(other.parameters()))


def test_grown_blocks_are_shares_of_the_shallow_ones(trained: LlamaForCausalLM) -> None:
    grown = grow(trained, 8)
    assert len(grown.model.layers) == grown.config.num_hidden_layers == 8
    assert [block.self_attn.layer_idx for block in grown.model.layers] == list(range(8))
    for place, block in enumerate(grown.model.layers):
        origin = trained.model.layers[place // 2]
        assert torch.equal(block.self_attn.q_proj.weight, origin.self_attn.q_proj.weight)
        assert torch.equal(block.mlp.down_proj.weight, origin.mlp.down_proj.weight / 2)
    assert grown.lm_head.weight is grown.model.embed_tokens.weight
    ids = torch.arange(32)[None]
    with torch.no_grad():
        before, after = trained(input_ids=ids).logits, grown(input_ids=ids).logits
        elsewhere = new_model(replace(TINY, stages=((8, 1),), seed=5), train_tokenizer(TEXT, 300, 64))(input_ids=ids)
    assert (after - before).norm() < 0.5 * (elsewhere.logits - before).norm()


def test_new_blocks_at_the_ends_change_nothing_yet(trained: LlamaForCausalLM) -> None:
    grown = grow(trained, 6)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids).logits, grown(input_ids=ids).logits)
    assert [bool(block.mlp.down_proj.weight.any()) for block in grown.model.layers] == [False, *[True] * 4, False]
    assert bool(grown.model.layers[0].mlp.up_proj.weight.any())  # so that gradients reach the writers
    other = grow(trained, 6, seed=1).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(grown.model.layers[0].mlp.up_proj.weight, other)


def test_the_folder_is_made_once_and_opens_like_any_other(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico_folder(TINY, text=TEXT, progress=False)
    assert folder.parent == cache_dir and [p.name for p in cache_dir.iterdir()] == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 4 and len(tokenizer) == model.config.vocab_size == 300
    with torch.no_grad():
        assert model(**tokenizer("And the king", return_tensors="pt")).logits.shape[-1] == 300

    monkeypatch.setattr(make, "pretrain", None)
    assert pico_folder(TINY, text=TEXT, progress=False) == folder


def test_the_default_model_is_found_by_a_link(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "Recipe", lambda: TINY)
    monkeypatch.setattr(make, "public_books", lambda: TEXT)
    folder = pico_folder(progress=False)
    assert make.pico_link().resolve() == folder.resolve() and make.pico_link().parent == cache_dir
    monkeypatch.setattr(make, "Recipe", lambda: replace(TINY, seed=1))
    other = pico_folder(progress=False)
    assert other != folder and make.pico_link().resolve() == other.resolve()


def test_recipe_and_text_name_the_folder() -> None:
    assert TINY.digest(TEXT) == replace(TINY).digest(TEXT)
    assert len({TINY.digest(TEXT), TINY.digest(TEXT + "x"), replace(TINY, lr=1e-3).digest(TEXT)}) == 3


def test_a_run_that_ends_half_way_leaves_nothing(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make, "pretrain", ended)
    with pytest.raises(KeyboardInterrupt):
        pico_folder(TINY, text=TEXT, progress=False)
    assert not list(cache_dir.iterdir())


def test_missing_texts_say_what_to_run(cache_dir: Path) -> None:
    with pytest.raises(DataError, match="make texts"):
        pico_folder()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "at least one block"),
        ({"stages": ((2, 5), (3, 5))}, "multiple of those before"),
        ({"stages": ((2, 0),)}, "needs a step"),
        ({"hidden": 30, "heads": 4}, "multiple of heads"),
        ({"kv_heads": 3, "heads": 4, "hidden": 32}, "multiple of kv-heads"),
    ],
)
def test_recipes_that_make_no_model(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)
