"""Generation: from a folder of originals to a store of their edits.

config     what to make
run        the whole of it, resumable at any moment
worker     one shard
quality    a verdict on every edit
editors/   how an image is edited (procedural, diffusers)
engines/   where shards are made (this machine, Ray)
"""

from dali_diffusemix.generate.config import GenerateConfig, PromptFile
from dali_diffusemix.generate.run import Interrupted, Summary, generate, list_originals

__all__ = ["GenerateConfig", "Interrupted", "PromptFile", "Summary", "generate", "list_originals"]
