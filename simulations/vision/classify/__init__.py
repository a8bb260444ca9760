"""Data owners tune a classifier that none of them ever holds: a Flower App for images, and for text with an encoder."""
