"""Which number of a config is the depth is found by trying; what has one entry a block is cut with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.cut_config import cut_config
from offsite_fl.models.tasks import build_model

from .families import FAMILIES, build


def cut(name: str, sources: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    model = build(name, **changes)
    return cut_config(model, find_blocks(model), sources, FAMILIES[name].task)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("llama2", ["num_hidden_layers"]),
        ("gpt2", ["n_layer"]),
        ("bart", ["decoder_layers"]),
        ("t5", ["num_decoder_layers"]),
        ("llava", ["text_config", "num_hidden_layers"]),
    ],
)
def test_the_depth_of_each_kind_of_config(name: str, way: list[str]) -> None:
    value: Any = cut(name, (0, 2, 5))
    for key in way:
        value = value[key]
    assert value == 3


def test_other_numbers_that_equal_the_depth_stay() -> None:
    # 6 blocks in the encoder too, 6 heads, a feed-forward of 6: only the decoder's count is the depth
    sizes = {"encoder_layers": 6, "d_model": 36, "decoder_attention_heads": 6, "decoder_ffn_dim": 6}
    plain = cut("bart", (0, 5), **sizes)
    assert plain["decoder_layers"] == 2
    assert {key: plain[key] for key in sizes} == sizes


def test_lists_with_an_entry_a_block_are_cut() -> None:
    plain = cut("smollm3", (0, 3, 5), no_rope_layers=[1, 1, 0, 0, 1, 0])
    assert plain["no_rope_layers"] == [1, 0, 0] and len(plain["layer_types"]) == 3


def test_lists_of_the_encoder_are_left_alone() -> None:
    # LED keeps one window for each block of its encoder, which is as deep as its decoder here
    sizes = {"d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = AutoConfig.for_model("led", vocab_size=64, attention_window=[2, 4, 2, 4], **sizes, **heads)
    with torch.device("meta"):
        model = build_model("seq2seq-lm", config)
    plain = cut_config(model, find_blocks(model), (0, 3), "seq2seq-lm")
    assert plain["decoder_layers"] == 2 and plain["attention_window"] == [2, 4, 2, 4]


def test_lists_of_indices_name_the_new_places() -> None:
    plain = cut("qwen3_moe", (0, 2, 3, 5), mlp_only_layers=[0, 3])
    assert plain["mlp_only_layers"] == [0, 2]


def test_infinite_entries_are_left_to_the_familys_default() -> None:
    config = AutoConfig.for_model("mamba2", num_hidden_layers=3, hidden_size=16, num_heads=4, head_dim=8, n_groups=1)
    with torch.device("meta"):
        model = build_model("causal-lm", config)
    plain = cut_config(model, find_blocks(model), (0, 2), "causal-lm")
    assert config.time_step_limit[1] == float("inf") and "time_step_limit" not in plain


def test_nothing_tells_where_the_model_came_from() -> None:
    model: Any = build("llava")
    model.config._name_or_path = model.config.text_config._name_or_path = "/home/owner/secret"
    model.config.text_config.architectures = ["SecretForCausalLM"]
    plain = cut_config(model, find_blocks(model), (0, 5), "image-text-to-text")
    assert "ecret" not in str(plain) and "dtype" not in plain["text_config"]


def test_a_config_without_a_depth_is_refused() -> None:
    config = AutoConfig.for_model("mobilenet_v2", image_size=32)
    with torch.device("meta"):
        model = build_model("image-classification", config)
    with pytest.raises(ModelError, match=r"no entry that alone makes mobilenet_v2.layer shorter.*no entry is 16"):
        cut_config(model, find_blocks(model), (0, 2), "image-classification")


def test_counts_of_leading_blocks_follow() -> None:
    heads = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "deepseek_v2", num_hidden_layers=5, first_k_dense_replace=2, vocab_size=64, **heads, **experts, **sizes
    )
    with torch.device("meta"):
        model = build_model("causal-lm", config)
    counts = [
        cut_config(model, find_blocks(model), sources, "causal-lm")["first_k_dense_replace"]
        for sources in ((0, 1, 4), (1, 3, 4), (2, 3, 4))
    ]
    assert counts == [2, 1, 0]
