"""Generation: makes a store of edits from a folder of originals, once, offline.

config     which edits to make
run        a run, which can be stopped at any time and resumed
worker     one shard
originals  the images to edit, decoded
quality    a verdict on every edit
editors/   how an image is edited (procedural, diffusers, a server, the user's own)
engines/   where shards are made (this machine, Ray)
"""

from dali_diffusemix.generate.config import GenerateConfig, PromptFile
from dali_diffusemix.generate.run import Interrupted, Summary, generate, list_originals

__all__ = ["GenerateConfig", "Interrupted", "PromptFile", "Summary", "generate", "list_originals"]
