"""Message types, record keys and error codes that both sides of the wire agree on."""

from __future__ import annotations

# Message types: Flower routes "<category>.<action>" to the handler that is registered with the action.
BUNDLE_ACTION = "bundle"
QUERY_BUNDLE = f"query.{BUNDLE_ACTION}"
TRAIN_BUNDLE = f"train.{BUNDLE_ACTION}"
PATCH_ACTION = "patch"
TRAIN_PATCH = f"train.{PATCH_ACTION}"

# One record of each kind in a message: Flower's aggregation and its privacy mods refuse anything else.
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"

# Keys in the config record.
SERVER_ROUND = "server-round"  # Flower's own
PROXIMAL_MU = "proximal-mu"  # FedProx's own
CLIPPING_NORM = "clipping_norm"  # the privacy wrappers' own
DIGEST = "bundle.digest"
CLIENT = "client"
HELD = "bundle.held"
MISSING = "bundle.missing"
FILES = "bundle.files"
EVALUATES = "client.evaluates"
TUNE = "tune."
CODEC = "wire.codec"
ALGORITHM = "local.algorithm"  # what the client does in a round; a reply says what it did
OPTION = "local.option."
RUN_KEY = "local.run"  # whose state a site keeps between rounds: one random key a run
PATCH = "patch.digest"  # of the factors on the emulator; a reply says which ones its network had
PATCH_LORA = "patch.lora."
STATE_ROUND = "local.state-round"  # the last round in which this node's reply was used, 0 if there is none

# Begins the names of tensors that travel beside the adapter in the one array record: SCAFFOLD's control variates.
CONTROL = "control."
# Beside the factors of a patch: fingerprints of the public examples.
PUBLIC = "public.examples"

# Keys in the metric record that every train reply has.
NUM_EXAMPLES = "num-examples"
LOSS = "loss"

# Codes of our own error replies, far from Flower's (0 to 8). Flower hands code and reason through unchanged.
REFUSED = 200
BUNDLE_MISSING = 201
NO_VALIDATION = 202
PATCH_MISSING = 204
