"""Pico configurations of many families, as data: what to build, by which task, and what its forward pass takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.tasks import build_model
from tests.conftest import make_tokenizer

DEPTH, HIDDEN, VOCAB, IMAGE = 6, 32, 64, 16
Batch = dict[str, torch.Tensor]

DECODER: dict[str, Any] = {
    "num_hidden_layers": DEPTH,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
}
ENCODER: dict[str, Any] = {
    "num_hidden_layers": DEPTH,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT: dict[str, Any] = {"n_layer": DEPTH, "n_embd": HIDDEN, "n_head": 4, "n_positions": 64}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
SEQ2SEQ: dict[str, Any] = {
    "d_model": HIDDEN,
    "encoder_layers": 3,
    "decoder_layers": DEPTH,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = ENCODER | {"image_size": IMAGE, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Family:
    """One row of the matrix: its ``model_type``, the task, what makes it tiny, and what is peculiar about it.

    ``path`` is where its blocks lie; ``first`` the fewest blocks that a split must leave in front as adapter.
    """

    kind: str
    task: str
    path: str
    config: dict[str, Any] = field(repr=False)
    first: int = 0


def _row(kind: str, path: str, config: dict[str, Any], task: str = "causal-lm", first: int = 0) -> Family:
    return Family(kind, task, path, config, first)


FAMILIES: dict[str, Family] = {
    "gpt2": _row("gpt2", "transformer.h", GPT),
    "gptj": _row("gptj", "transformer.h", GPT | {"rotary_dim": 4}),
    "gpt_neox": _row("gpt_neox", "gpt_neox.layers", ENCODER),
    "opt": _row("opt", "model.decoder.layers", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "bloom": _row("bloom", "transformer.h", {"n_layer": DEPTH, "hidden_size": HIDDEN, "n_head": 4}),
    "falcon": _row("falcon", "transformer.h", ENCODER | {"ffn_hidden_size": 48}),
    "llama2": _row("llama", "model.layers", DECODER | {"num_key_value_heads": 4}),
    "llama3": _row(
        "llama",
        "model.layers",
        DECODER
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": _row("mistral", "model.layers", DECODER),
    "mixtral": _row("mixtral", "model.layers", DECODER | EXPERTS | {"num_local_experts": 4}),
    "qwen2": _row("qwen2", "model.layers", DECODER | {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen3": _row("qwen3", "model.layers", DECODER),
    "qwen3_moe": _row("qwen3_moe", "model.layers", DECODER | EXPERTS | {"num_experts": 4}),
    "gemma2": _row("gemma2", "model.layers", DECODER),
    "gemma3": _row("gemma3_text", "model.layers", DECODER),
    "phi3": _row("phi3", "model.layers", DECODER),
    "olmo2": _row("olmo2", "model.layers", DECODER),
    "stablelm": _row("stablelm", "model.layers", DECODER),
    "cohere": _row("cohere", "model.layers", DECODER),
    "granite": _row("granite", "model.layers", DECODER),
    "smollm3": _row("smollm3", "model.layers", DECODER),
    "starcoder2": _row("starcoder2", "model.layers", DECODER),
    "mamba": _row(
        "mamba", "backbone.layers", {"num_hidden_layers": DEPTH, "hidden_size": HIDDEN, "state_size": 4, "expand": 2}
    ),
    "bert": _row("bert", "bert.encoder.layer", ENCODER, "sequence-classification"),
    "roberta": _row("roberta", "roberta.encoder.layer", ENCODER, "sequence-classification"),
    "deberta-v2": _row(
        "deberta-v2",
        "deberta.encoder.layer",
        ENCODER
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "conv_kernel_size": 3,
        },
        "sequence-classification",
    ),
    "modernbert": _row("modernbert", "model.layers", ENCODER | {"local_attention": 4}, "sequence-classification"),
    "t5": _row(
        "t5",
        "decoder.block",
        {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": DEPTH, "num_heads": 4},
        "seq2seq-lm",
    ),
    "bart": _row("bart", "model.decoder.layers", SEQ2SEQ, "seq2seq-lm"),
    "vit": _row("vit", "vit.layers", VISION, "image-classification"),
    "deit": _row("deit", "deit.layers", VISION, "image-classification"),
    "beit": _row("beit", "beit.layers", VISION, "image-classification"),
    "dinov2": _row("dinov2", "dinov2.encoder.layer", VISION, "image-classification"),
    "clip_vision": _row("clip_vision_model", "encoder.layers", VISION, "features"),
    "siglip_vision": _row("siglip_vision_model", "encoder.layers", VISION, "features"),
    "llava": _row(
        "llava",
        "model.language_model.layers",
        {
            "text_config": DECODER | {"model_type": "llama", "vocab_size": VOCAB, "pad_token_id": 0},
            "vision_config": VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 8},
            "image_token_id": 5,
        },
        "image-text-to-text",
    ),
}


def build(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """The tiny model of a row of the table, see :func:`built`; ``changes`` go into its config."""
    family = FAMILIES[name]
    return built(replace(family, config=family.config | changes), seed=seed)


def built(family: Family, seed: int = 0) -> nn.Module:
    """A tiny model of the family in eval mode, fp32, every parameter random (norms and biases too)."""
    ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "num_labels": 3}
    ids |= {} if "text_config" in family.config else {"vocab_size": VOCAB}
    config = AutoConfig.for_model(family.kind, **(ids | copy.deepcopy(family.config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(family.task, config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15) if parameter.ndim > 1 else parameter.add_(noise * 0.1)
    return model.float().eval()


def batch_for(name: str, rows: int = 2, length: int = 12, seed: int = 1) -> Batch:
    """Random inputs of a row of the table, see :func:`batch_of`."""
    return batch_of(FAMILIES[name], rows, length, seed)


def batch_of(family: Family, rows: int = 2, length: int = 12, seed: int = 1) -> Batch:
    """Random inputs of the family's forward pass; the second row of a text is padded from position 9 on."""
    generator = torch.Generator().manual_seed(seed)
    if "patch_size" in family.config:
        return {"pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)}
    ids = torch.randint(6, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if family.task == "seq2seq-lm":
        batch["decoder_input_ids"] = torch.randint(6, VOCAB, (rows, 7), generator=generator)
    return batch


def processor_of(family: Family) -> Any:
    """An image processor for classifiers of images; else a tokenizer, which stands in for a vision tower's too."""
    images = family.task == "image-classification"
    return ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}) if images else make_tokenizer()


@contextmanager
def handing_on(model: nn.Module, places: tuple[int, ...]) -> Iterator[None]:
    """The blocks at ``places`` run, but hand on the hidden state that they got: the model as if they weren't there."""

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    stack = block_list(model, find_blocks(model))
    handles = [stack[place].register_forward_hook(leave, with_kwargs=True) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the model says of ``batch``: logits, the last hidden state of one without a head, or CLIP's products."""
    output = model(**batch)
    names = ("logits", "last_hidden_state", "logits_per_text")
    result = next(getattr(output, name) for name in names if hasattr(output, name))
    assert isinstance(result, torch.Tensor)
    return result
