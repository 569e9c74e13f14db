"""The diffusers editor: runs image-editing pipelines of diffusers, by hub id or folder.

config    the options, checked against what the model's class takes
adapters  one class for each class of pipelines: its defaults, its sizes, its call
editor    batches of edits
loading   from files to a pipeline on a device: scheduler, LoRA, quantization, cache
files     a model's files: found, checked, hashed

An edit depends on its own image, prompt and seed. Most classes are called with one image at a time, so an edit is the
same to the bit alone and in any batch. InstructPix2Pix and Stable Diffusion's image to image work in batches, where
each edit has its own generator; only rounding depends on the size of the batch.
"""

from dali_diffusemix.generate.editors.diffusers.config import DiffusersConfig
from dali_diffusemix.generate.editors.diffusers.editor import DiffusersEditor
from dali_diffusemix.generate.editors.diffusers.loading import SCHEDULERS

__all__ = ["SCHEDULERS", "DiffusersConfig", "DiffusersEditor"]
