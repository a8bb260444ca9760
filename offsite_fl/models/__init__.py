"""Find the blocks of a Hugging Face model, cut it by a split, rebuild the small network, put the adapter back."""
