"""Fixtures for all tests: pico models of every family, a pico tokenizer, a private cache. Nothing is downloaded."""

# ruff: noqa: E402  (the hub's switches are read when it is imported, so they are set first)
from __future__ import annotations

import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

DEPTH, HIDDEN, VOCAB = 6, 32, 64
_MODERN: dict[str, Any] = {
    "num_hidden_layers": DEPTH,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_SLIDING: dict[str, Any] = {"sliding_window": 4}

# model_type -> what its config needs to be tiny; sliding windows are short so that a wrong mask shows in the logits
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": DEPTH, "n_embd": HIDDEN, "n_head": 4, "n_positions": 128},
    "opt": {
        "num_hidden_layers": DEPTH,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
    "bloom": {"n_layer": DEPTH, "hidden_size": HIDDEN, "n_head": 4},
    "llama": _MODERN,
    "qwen2": _MODERN | _SLIDING | {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3": _MODERN | {"head_dim": 8},
    "mistral": _MODERN | _SLIDING,
    "gemma": _MODERN | {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": _MODERN | _SLIDING | {"head_dim": 8, "tie_word_embeddings": True},
    "gpt_neox": {k: v for k, v in _MODERN.items() if k != "num_key_value_heads"},
    "phi": _MODERN,
}


def make_pico(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a tiny model of ``family`` in eval mode, fp32, every parameter random (norms and biases too)."""
    settings = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0} | FAMILIES[family]
    config = AutoConfig.for_model(family, **(settings | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``family`` once for each pico family, unless it names its own."""
    named = any("family" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not named:
        metafunc.parametrize("family", sorted(FAMILIES))


@pytest.fixture
def pico() -> Callable[..., nn.Module]:
    """``pico("gpt2", seed=0, **config overrides)`` builds a tiny model: 6 blocks, hidden 32, vocabulary 64."""
    return make_pico


@pytest.fixture
def pico_llama() -> nn.Module:
    """LLaMA of 6 blocks, hidden 32, vocabulary 64, untied head."""
    return make_pico("llama")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, lower case, 64 entries; 0 pad, 1 unknown, 2 begin, 3 end; decodes without loss."""
    letters = string.ascii_lowercase + " \n" + string.digits + ".,:;!?'\"()-_[]{}+*/=<"
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *letters])}
    vocabulary |= {f"<spare{i}>": i for i in range(len(vocabulary), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Character tokenizer whose 64 entries fit the pico models."""
    return make_tokenizer()


@pytest.fixture
def pico_batch() -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, the second right-padded from 9 on: ``input_ids``, ``attention_mask``, ``labels``."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, VOCAB, (2, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    input_ids[1, 9:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that ``OFFSITE_FL_CACHE`` points to for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OFFSITE_FL_CACHE", str(folder))
    return folder
