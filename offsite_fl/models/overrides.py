"""What structure can't tell about a model family, as data: one row per ``config.model_type``."""

from __future__ import annotations

# Families with more than one stack of blocks, or whose stack mixes classes: the path, inside the unwrapped model, of
# the list that offsite-tuning works on (the one that writes text). All other families are found by structure.
BLOCK_PATHS: dict[str, str] = {
    "bart": "decoder.layers",
    "gemma3": "language_model.layers",
    "jamba": "model.layers",
    "llava": "language_model.layers",
    "t5": "decoder.block",
}
