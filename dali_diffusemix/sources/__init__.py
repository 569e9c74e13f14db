"""Sources: originals from wherever they are, listed once and read in the order of the list.

source = source_of("data/train")                 class folders
source = source_of("data/train-{000..146}.tar")  WebDataset
source = source_of("data/train-*.parquet")       Parquet
source = source_of(load_dataset("cifar100", split="train"), label="fine_label")
source = source_of((images, labels))             arrays; also any map-style dataset of (image, label)
catalog = source.catalog()
for content in source.read(range(len(catalog))): ...
"""

from dali_diffusemix.sources.given import source_of
from dali_diffusemix.sources.source import Content, Source

__all__ = ["Content", "Source", "source_of"]
