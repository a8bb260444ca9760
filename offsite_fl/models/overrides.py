"""What structure can't tell about a model family, as data: one row per ``config.model_type``, or per config entry."""

from __future__ import annotations

# Families whose stack mixes classes of blocks: the path, inside the unwrapped model, of the list that offsite-tuning
# works on. All other families are found by structure.
BLOCK_PATHS: dict[str, str] = {
    "jamba": "model.layers",
}
# Families whose config needn't hold the depth: the dictionary in it, and the entry there by which a client sets it.
DEPTH_TABLES: dict[str, tuple[str, str]] = {
    "timm_wrapper": ("model_args", "depth"),
}
# Families whose base model holds the classifier too: the modules, of which a model may have some, that are its head.
HEADS: dict[str, tuple[str, ...]] = {
    "timm_wrapper": ("timm_model.head", "timm_model.head_dist"),
}
# Entries that a library may take for an address of a model ("hf-hub:owner/name"): foreign data may have plain names.
NAMES_ALONE = ("architecture", "backbone")
# Entries by which transformers finds a backbone's config: where they aren't a timm backbone's own, it asks the hub.
HUB_BACKBONES = ("backbone", "backbone_kwargs", "use_timm_backbone")
# Flags that tie a block's function to its absolute index, which a client doesn't have.
INDEX_DEPENDENT_FLAGS = ("scale_attn_by_inverse_layer_idx",)
# Families whose blocks have no MLP channel and no attention head that can be taken out: state spaces, experts in one
# tensor beside fused projections or head counts that the config fixes.
NO_UNITS = ("dbrx", "falcon_mamba", "gpt_oss", "jetmoe", "mamba", "mamba2")
# Entries that list the indices of some blocks; in a cut network they name the places that these blocks have there.
INDEX_LISTS = ("mlp_only_layers", "attn_layer_indices")
# Entries that give some blocks settings of their own, under their indices.
INDEX_TABLES = ("per_layer_config",)
# Entries that say how many blocks at the front are of another kind.
LEADING_COUNTS = ("first_k_dense_replace",)
# Counts that say how deep the full model is and that nothing reads where layer_types has an entry for each block.
SECOND_DEPTHS = ("max_window_layers",)
# Entries that transformers derives from the depth (names of a backbone's stages); none of the tasks here reads them.
DERIVED = ("stage_names", "out_features", "out_indices")
