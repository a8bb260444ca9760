"""Families beyond the first matrix, as data: pico configurations, and what can't be done with each, in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .families import DECODER, DEPTH, ENCODER, EXPERTS, GPT, HIDDEN, IMAGE, SEQ2SEQ, VISION, VOCAB, Family

CAUSAL, SEQ, MASKED, CLASSES = "causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification"
IMAGES, FEATURES, SEEING = "image-classification", "features", "image-text-to-text"
# What may be asked of a family, and what a row may say can't be done: any split at all; to leave out one block, two
# neighbours, or the blocks at the front (no adapter there).
ANY, ONE, PAIR, FRONT = "any", "one", "pair", "front"


@dataclass(frozen=True)
class Other(Family):
    """One more family.

    ``cant`` says what can't be done with it, and a piece (a regular expression) of the message that says so; ``takes``
    what its forward pass wants, where that isn't plain text or an image; ``slow`` keeps it out of ``make test``.
    """

    cant: Mapping[str, str] = field(default_factory=dict)
    takes: str = ""
    slow: bool = True


def _quick(kind: str, path: str, config: dict[str, Any], task: str = CAUSAL, takes: str = "") -> Other:
    """A family that works and is tried in every run of the tests."""
    return Other(kind, task, path, config, takes=takes, slow=False)


def _works(kind: str, path: str, config: dict[str, Any], task: str = CAUSAL, takes: str = "") -> Other:
    """A family that works; slow or less used."""
    return Other(kind, task, path, config, takes=takes)


def _partly(
    kind: str, path: str, config: dict[str, Any], cant: dict[str, str], task: str = CAUSAL, slow: bool = True
) -> Other:
    """A family that works in part."""
    return Other(kind, task, path, config, cant=cant, slow=slow)


def _refused(kind: str, config: dict[str, Any], words: str, task: str, slow: bool = False) -> Other:
    """A family that can't be split."""
    return Other(kind, task, "", config, cant={ANY: words}, slow=slow)


LAYERS, DECODER_LAYERS, TOWER = "model.layers", "model.decoder.layers", "model.language_model.layers"
SMALL = {"embedding_size": 16}
TEXT_TOWER = DECODER | {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LLAMA_TOWER = TEXT_TOWER | {"model_type": "llama"}
THREE_AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
MIXED = {"num_experts": 4, "num_local_experts": 4, **EXPERTS}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": DEPTH, "num_heads": 4}
SOUND = {"max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 8}
PYRAMID = {"image_size": 32, "hidden_sizes": [8, 16, 24, 32]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2]}
STAGES = "no two of the same shapes"
BY_RULE = "in this family a block depends on its index"


def _without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


OTHERS: dict[str, Other] = {
    # Encoders of text
    "xlm-roberta": _quick("xlm-roberta", "roberta.encoder.layer", ENCODER, CLASSES),
    "distilbert": _quick(
        "distilbert",
        "distilbert.transformer.layer",
        {"n_layers": DEPTH, "dim": HIDDEN, "hidden_dim": 48, "n_heads": 4, "max_position_embeddings": 64},
        CLASSES,
    ),
    "electra": _quick("electra", "electra.encoder.layer", ENCODER | SMALL, CLASSES),
    "mpnet": _quick("mpnet", "mpnet.encoder.layer", ENCODER, CLASSES),
    "deberta": _quick("deberta", "deberta.encoder.layer", ENCODER, CLASSES),
    "nomic_bert": _quick("nomic_bert", "nomic_bert.layers", ENCODER, MASKED),
    "camembert": _quick("camembert", "roberta.encoder.layer", ENCODER, MASKED),
    "xlnet": _quick(
        "xlnet", "transformer.layer", {"n_layer": DEPTH, "d_model": HIDDEN, "n_head": 4, "d_inner": 48}, CLASSES
    ),
    "layoutlm": _quick("layoutlm", "layoutlm.encoder.layer", ENCODER, CLASSES),
    "longformer": _works("longformer", "longformer.encoder.layer", ENCODER | {"attention_window": [4] * 6}, CLASSES),
    "roformer": _quick("roformer", "roformer.encoder.layer", ENCODER, CLASSES),
    "mobilebert": _works("mobilebert", "mobilebert.encoder.layer", ENCODER, CLASSES),
    "eurobert": _quick("eurobert", LAYERS, DECODER, MASKED),
    "roberta-prelayernorm": _quick("roberta-prelayernorm", "roberta_prelayernorm.encoder.layer", ENCODER, CLASSES),
    "rembert": _quick(
        "rembert",
        "rembert.encoder.layer",
        ENCODER | {"input_embedding_size": 16, "output_embedding_size": 16},
        CLASSES,
    ),
    "megatron-bert": _quick("megatron-bert", "bert.encoder.layer", ENCODER, CLASSES),
    "convbert": _works("convbert", "convbert.encoder.layer", ENCODER | {"embedding_size": HIDDEN}, CLASSES),
    "ernie": _quick("ernie", "ernie.encoder.layer", ENCODER, CLASSES),
    "gte": _quick("gte", "gte.layers", ENCODER, CLASSES),
    "jina_embeddings_v3": _works("jina_embeddings_v3", "roberta.layers", ENCODER, CLASSES),
    "big_bird": _quick("big_bird", "bert.encoder.layer", ENCODER | {"attention_type": "original_full"}, CLASSES),
    "albert": _refused("albert", ENCODER | SMALL, r"1 block\(s\) can't be split", CLASSES),
    "esm": _refused(
        "esm", ENCODER | {"token_dropout": False}, "contact_head.regression.weight changes with it", MASKED
    ),
    "funnel": _refused(
        "funnel",
        {"d_model": HIDDEN, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [2, 2]},
        "no list of repeated blocks.*2 x ModuleList",
        CLASSES,
    ),
    # Decoders of text
    "phi": _quick("phi", LAYERS, DECODER),
    "gemma": _quick("gemma", LAYERS, DECODER),
    "gpt_oss": _quick("gpt_oss", LAYERS, DECODER | MIXED),
    "deepseek_v3": _quick(
        "deepseek_v3",
        LAYERS,
        _without(DECODER, "head_dim") | ROUTED | LATENT | {"first_k_dense_replace": 2, "qk_rope_head_dim": 4},
    ),
    "deepseek_v2": _quick(
        "deepseek_v2", LAYERS, DECODER | ROUTED | LATENT | {"first_k_dense_replace": 2, "qk_rope_head_dim": 8}
    ),
    "glm": _quick("glm", LAYERS, DECODER),
    "glm4": _quick("glm4", LAYERS, DECODER),
    "glm4_moe": _works("glm4_moe", LAYERS, DECODER | ROUTED | {"first_k_dense_replace": 2, "n_shared_experts": 1}),
    "nemotron": _quick("nemotron", LAYERS, DECODER),
    "olmo": _quick("olmo", LAYERS, DECODER),
    "olmo3": _works("olmo3", LAYERS, DECODER),
    "olmoe": _works("olmoe", LAYERS, DECODER | MIXED),
    "dbrx": _works(
        "dbrx",
        "transformer.blocks",
        {
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": DEPTH,
            "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        },
    ),
    "jetmoe": _works("jetmoe", LAYERS, DECODER | MIXED | {"kv_channels": 8}),
    "persimmon": _works("persimmon", LAYERS, ENCODER),
    "xglm": _works(
        "xglm",
        LAYERS,
        {
            "num_layers": DEPTH,
            "d_model": HIDDEN,
            "ffn_dim": 48,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "cohere2": _works("cohere2", LAYERS, DECODER),
    "exaone4": _works("exaone4", LAYERS, DECODER | {"sliding_window_pattern": 2}),
    "gpt_neo": _works(
        "gpt_neo",
        "transformer.h",
        {
            "num_layers": DEPTH,
            "hidden_size": HIDDEN,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            "max_position_embeddings": 64,
            "window_size": 4,
        },
    ),
    "gpt_bigcode": _works("gpt_bigcode", "transformer.h", GPT),
    "mpt": _works("mpt", "transformer.blocks", {"d_model": HIDDEN, "n_heads": 4, "n_layers": DEPTH, "max_seq_len": 64}),
    "codegen": _works("codegen", "transformer.h", GPT | {"rotary_dim": 4}),
    "biogpt": _works("biogpt", "biogpt.layers", ENCODER),
    "qwen2_moe": _works("qwen2_moe", LAYERS, DECODER | MIXED | {"shared_expert_intermediate_size": 24}),
    "qwen3_next": _works(
        "qwen3_next",
        LAYERS,
        DECODER
        | MIXED
        | {
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "full_attention_interval": 2,
        },
    ),
    "qwen3_5": _works(
        "qwen3_5_text",
        LAYERS,
        DECODER
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "full_attention_interval": 2,
        },
    ),
    "mamba2": _works(
        "mamba2",
        "backbone.layers",
        {
            "num_hidden_layers": DEPTH,
            "hidden_size": HIDDEN,
            "state_size": 4,
            "expand": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "falcon_mamba": _works(
        "falcon_mamba", "backbone.layers", {"num_hidden_layers": DEPTH, "hidden_size": HIDDEN, "state_size": 4}
    ),
    "bamba": _works(
        "bamba",
        LAYERS,
        DECODER
        | {
            "attn_layer_indices": [1, 4],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
        },
    ),
    "lfm2": _works(
        "lfm2", LAYERS, DECODER | {"layer_types": ["conv", "full_attention", "conv"] * 2, "block_multiple_of": 8}
    ),
    "hunyuan_v1_dense": _works("hunyuan_v1_dense", LAYERS, DECODER),
    "ernie4_5": _quick("ernie4_5", LAYERS, DECODER),
    "granitemoe": _quick("granitemoe", LAYERS, DECODER | MIXED),
    "phimoe": _quick("phimoe", LAYERS, DECODER | MIXED),
    "helium": _quick("helium", LAYERS, DECODER),
    "bitnet": _works("bitnet", LAYERS, DECODER),
    "seed_oss": _works("seed_oss", LAYERS, DECODER),
    "arcee": _quick("arcee", LAYERS, DECODER),
    "apertus": _works("apertus", LAYERS, DECODER),
    "ministral": _works("ministral", LAYERS, DECODER),
    "modernbert-decoder": _partly(
        "modernbert-decoder", LAYERS, ENCODER | {"local_attention": 4}, {FRONT: f"{BY_RULE}, attn_norm is.*first=1"}
    ),
    "gemma4": _quick(
        "gemma4_text",
        LAYERS,
        DECODER
        | {
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "jamba": _partly(
        "jamba",
        LAYERS,
        DECODER
        | MIXED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        {ONE: f"{BY_RULE}, the block is JambaAttentionDecoderLayer here and JambaMambaDecoderLayer there"},
        slow=False,
    ),
    "llama4": _partly(
        "llama4_text",
        LAYERS,
        DECODER | MIXED | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        {ONE: f"{BY_RULE}, is_moe_layer"},
    ),
    "recurrent_gemma": _partly(
        "recurrent_gemma",
        LAYERS,
        DECODER | {"lru_width": HIDDEN, "block_types": ["recurrent", "attention"]},
        {ONE: f"{BY_RULE}, temporal_block is"},
    ),
    "rwkv": _partly(
        "rwkv",
        "rwkv.blocks",
        {
            "num_hidden_layers": DEPTH,
            "hidden_size": HIDDEN,
            "attention_hidden_size": HIDDEN,
            "intermediate_size": 48,
        },
        {FRONT: f"{BY_RULE}, pre_ln is missing here and LayerNorm there"},
    ),
    "minimax": _partly(
        "minimax",
        LAYERS,
        DECODER | MIXED,
        dict.fromkeys((ONE, PAIR, FRONT), "self_attn.num_hidden_layers = 6 here and [45] there"),
        slow=False,
    ),
    "gemma3n": _refused(
        "gemma3n_text",
        DECODER
        | {
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        "model.embed_tokens_per_layer.weight changes with it",
        CAUSAL,
    ),
    # Encoder and decoder
    "mbart": _quick("mbart", DECODER_LAYERS, SEQ2SEQ, SEQ),
    "marian": _quick(
        "marian", DECODER_LAYERS, SEQ2SEQ | {"decoder_vocab_size": VOCAB, "decoder_start_token_id": 2}, SEQ
    ),
    "whisper": _quick(
        "whisper", DECODER_LAYERS, _without(SEQ2SEQ, "max_position_embeddings") | SOUND, "speech-seq2seq", "sound"
    ),
    "pegasus": _works("pegasus", DECODER_LAYERS, SEQ2SEQ, SEQ),
    "m2m_100": _works("m2m_100", DECODER_LAYERS, SEQ2SEQ, SEQ),
    "blenderbot": _works("blenderbot", DECODER_LAYERS, SEQ2SEQ, SEQ),
    "led": _works(
        "led",
        "led.decoder.layers",
        _without(SEQ2SEQ, "max_position_embeddings")
        | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        SEQ,
    ),
    "umt5": _works("umt5", "decoder.block", T5, SEQ),
    "mt5": _partly("mt5", "decoder.block", T5, {FRONT: "has_relative_attention_bias.*first=1"}, SEQ),
    "longt5": _partly("longt5", "decoder.block", T5, {FRONT: "has_relative_attention_bias.*first=1"}, SEQ),
    # Vision
    "dinov3_vit": _quick("dinov3_vit", "model.layer", VISION, FEATURES),
    "siglip2": _quick(
        "siglip2_vision_model",
        "encoder.layers",
        _without(_without(VISION, "image_size"), "max_position_embeddings") | {"num_patches": 16},
        FEATURES,
        "patches",
    ),
    "vit_mae": _quick(
        "vit_mae",
        "layers",
        VISION
        | {
            "decoder_num_hidden_layers": 2,
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
            "mask_ratio": 0.0,
        },
        FEATURES,
        "image in order",
    ),
    "vit_msn": _works("vit_msn", "vit.layers", VISION, IMAGES),
    "data2vec-vision": _works("data2vec-vision", "data2vec_vision.encoder.layer", VISION, IMAGES),
    "dinov2_with_registers": _works("dinov2_with_registers", "dinov2_with_registers.encoder.layer", VISION, IMAGES),
    "ijepa": _works("ijepa", "ijepa.layers", VISION, IMAGES),
    "dpt": _works("dpt", "encoder.layer", VISION, FEATURES),
    "videomae": _works("videomae", "encoder.layer", VISION | {"num_frames": 2}, FEATURES, "video"),
    "swin": _refused("swin", SWIN | {"window_size": 2}, STAGES, IMAGES),
    "swinv2": _refused("swinv2", SWIN | {"window_size": 2}, STAGES, IMAGES),
    "convnext": _refused("convnext", PYRAMID | {"num_stages": 4, "depths": [1, 1, 2, 1]}, STAGES, IMAGES),
    "convnextv2": _refused("convnextv2", PYRAMID | {"num_stages": 4, "depths": [1, 1, 2, 1]}, STAGES, IMAGES),
    "segformer": _refused(
        "segformer",
        PYRAMID | {"num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
        STAGES,
        IMAGES,
    ),
    "resnet": _refused("resnet", PYRAMID | {"embedding_size": 8, "depths": [1, 1, 1, 1]}, STAGES, IMAGES),
    "regnet": _refused(
        "regnet", PYRAMID | {"embedding_size": 8, "depths": [1, 1, 1, 1], "groups_width": 8}, STAGES, IMAGES
    ),
    "pvt": _refused("pvt", PYRAMID | {"num_attention_heads": [1] * 4, "depths": [1] * 4}, STAGES, IMAGES),
    "hiera": _refused(
        "hiera", {"image_size": [32, 32], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}, STAGES, IMAGES
    ),
    "poolformer": _refused("poolformer", {"image_size": 32}, STAGES, IMAGES, slow=True),
    "levit": _refused("levit", {"image_size": 32}, STAGES, IMAGES, slow=True),
    "mobilevit": _refused(
        "mobilevit", {"image_size": 32}, r"2 x MobileViTMobileNetLayer \+ 3 x MobileViTLayer", IMAGES, slow=True
    ),
    "mobilenet_v2": _refused("mobilenet_v2", {"image_size": 32}, "no entry is 16", IMAGES),
    "efficientnet": _refused("efficientnet", {"image_size": 32}, "no entry is 55", IMAGES, slow=True),
    "yolos": _refused(
        "yolos", VISION | {"image_size": [IMAGE, IMAGE]}, "mid_position_embeddings changes with it", FEATURES
    ),
    # Text and images
    "qwen2_vl": _quick(
        "qwen2_vl",
        TOWER,
        {
            "text_config": TEXT_TOWER | THREE_AXES,
            "vision_config": {
                "depth": 4,
                "embed_dim": HIDDEN,
                "hidden_size": HIDDEN,
                "num_heads": 4,
                "patch_size": 4,
                "mlp_ratio": 1,
            },
        },
        SEEING,
    ),
    "qwen2_5_vl": _quick(
        "qwen2_5_vl",
        TOWER,
        {
            "text_config": TEXT_TOWER | THREE_AXES,
            "vision_config": {
                "depth": 4,
                "hidden_size": HIDDEN,
                "out_hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "fullatt_block_indexes": [1],
            },
        },
        SEEING,
    ),
    "gemma3": _quick("gemma3", TOWER, {"text_config": TEXT_TOWER, "vision_config": VISION}),
    "qwen3_vl": _works(
        "qwen3_vl",
        TOWER,
        {
            "text_config": TEXT_TOWER | THREE_AXES,
            "vision_config": {
                "depth": 4,
                "hidden_size": HIDDEN,
                "out_hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "deepstack_visual_indexes": [1],
            },
        },
        SEEING,
    ),
    "idefics3": _works(
        "idefics3",
        "model.text_model.layers",
        {"text_config": TEXT_TOWER | {"model_type": "llama"}, "vision_config": VISION},
        SEEING,
    ),
    "smolvlm": _works(
        "smolvlm",
        "model.text_model.layers",
        {"text_config": TEXT_TOWER | {"model_type": "llama"}, "vision_config": VISION},
        SEEING,
    ),
    "mistral3": _works(
        "mistral3",
        TOWER,
        {
            "text_config": TEXT_TOWER | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral"},
        },
        SEEING,
    ),
    "paligemma": _works(
        "paligemma",
        TOWER,
        {
            "text_config": _without(TEXT_TOWER, "sliding_window") | {"model_type": "gemma"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": HIDDEN},
            "projection_dim": HIDDEN,
        },
        SEEING,
    ),
    "llava_next": _works(
        "llava_next",
        TOWER,
        {
            "text_config": LLAMA_TOWER,
            "vision_config": VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 8},
        },
        SEEING,
    ),
    "internvl": _works(
        "internvl",
        TOWER,
        {
            "text_config": TEXT_TOWER | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [IMAGE, IMAGE], "patch_size": [4, 4]},
        },
        SEEING,
    ),
    "clip": _works(
        "clip",
        "text_model.encoder.layers",
        {"text_config": ENCODER | {"vocab_size": VOCAB}, "vision_config": VISION | {"num_hidden_layers": 3}},
        FEATURES,
        "text and image",
    ),
    "blip": _works(
        "blip",
        "text_decoder.bert.encoder.layer",
        {"text_config": ENCODER | {"vocab_size": VOCAB, "encoder_hidden_size": HIDDEN}, "vision_config": VISION},
        SEEING,
        "text and image",
    ),
    "mllama": _refused(
        "mllama",
        {
            "text_config": TEXT_TOWER | {"cross_attention_layers": [1]},
            "vision_config": {
                "image_size": IMAGE,
                "patch_size": 4,
                "hidden_size": HIDDEN,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "intermediate_size": 48,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
            },
        },
        "5 x MllamaSelfAttentionDecoderLayer",
        SEEING,
    ),
}


# Through timm's wrapper in transformers, where timm is installed.
_TIMM = {"img_size": IMAGE, "patch_size": 4, "embed_dim": HIDDEN, "depth": DEPTH, "num_heads": 4}


def _timm(architecture: str, task: str = IMAGES, **arguments: Any) -> Other:
    config = {"architecture": architecture, "model_args": _TIMM | arguments}
    return Other("timm_wrapper", task, "timm_model.blocks", config, takes="image", slow=False)


TIMM: dict[str, Other] = {
    "ViT": _timm("vit_tiny_patch16_224"),
    "ViT, features": _timm("vit_tiny_patch16_224", FEATURES),
    "ViT of CLIP": _timm("vit_base_patch16_clip_224"),
    "ViT of DINOv2": _timm("vit_small_patch14_dinov2"),
    "DeiT 3": _timm("deit3_small_patch16_224"),
    "EVA-02": _timm("eva02_tiny_patch14_224"),
    "EVA-02, features": _timm("eva02_tiny_patch14_224", FEATURES),
    "EVA-02 of CLIP": _timm("eva02_base_patch16_clip_224"),
}
