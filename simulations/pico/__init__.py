"""A small language model that is pre-trained here within two minutes, so that experiments are fast *and* real.

    python -m simulations.pico      # make it, or say where it is

It is an ordinary Hugging Face folder with a tokenizer of its own, made from the public books of the King James
Bible (law and histories); adapting it to the others (poetry, prophets, gospels, letters) is a change of domain.
"""

from simulations.pico.make import pico_folder
from simulations.pico.recipe import Recipe

__all__ = ["Recipe", "pico_folder"]
