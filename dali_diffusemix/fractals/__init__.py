"""Fractals: the bank of structural images that the mix blends in, and their rendering."""

from dali_diffusemix.fractals.bank import FractalBank, bank_from_folder, render_bank
from dali_diffusemix.fractals.flame import render

__all__ = ["FractalBank", "bank_from_folder", "render", "render_bank"]
