"""The data owner's training loop: tune the adapter, or LoRA factors inside it, on the network of a bundle."""
