"""Stores: images on disk, made once by processes that may be killed at any moment, read ever after by many.

An edit store holds edits:

    store.json                       what was asked for: settings, prompts, and the work ordered so far ("segments")
    catalog/                         the originals; a row never shifts
    shards/edits-000000.tar          edits as WebDataset has them, one group for each original
                       .idx          DALI's index of the tar (`wds2idx`, v1.2)
                       .npy          one row for each edit, rejected ones too: `SHARD_ROW`
                       .json         settings, sizes, hashes, verdicts; written last: a shard without it is not there
    index.npy, starts.npy            derived from the shards: the accepted edits, sorted by original, prompt, variant
    index.json                       of which shards they are derived

A segment is a box of work, originals x prompts x variants, cut into shards along the originals. Shards are numbered by
the segments alone, never by when or where they were made, so that a later run knows which are missing.

A packed store holds originals, in shards of the same four files:

    store.json                       settings, and how many originals make a shard
    listed/                          the catalog of the folder that is packed, whose rows the shards name
    shards/originals-000000.tar      one member for each original (.idx, .npy: `ORIGINAL_SHARD_ROW`, .json)
    catalog/                         derived: the originals that were packed, with the sizes that they have here
    index.npy                        derived: where they lie, a row for each row of catalog/
    index.json                       of which shards these are derived; written last: without it a store is unfinished

A store may be read where it lies behind a URL; `remote` then makes a copy of it in a local folder.
"""

from dali_diffusemix.store.layout import (
    DENIED,
    INDEX_ROW,
    NOT_YET,
    ORIGINAL_INDEX_ROW,
    ORIGINAL_SHARD_ROW,
    REJECTIONS,
    SHARD_ROW,
    VERDICTS,
    WHOLE,
    Part,
    Shard,
    UnfinishedStoreWarning,
)
from dali_diffusemix.store.readers import EditStore, OriginalStore, ShardFiles, index_is_current, shard_files
from dali_diffusemix.store.writer import BegunShard, OriginalShardWriter, OriginalStoreWriter, ShardWriter, StoreWriter

__all__ = [
    "DENIED",
    "INDEX_ROW",
    "NOT_YET",
    "ORIGINAL_INDEX_ROW",
    "ORIGINAL_SHARD_ROW",
    "REJECTIONS",
    "SHARD_ROW",
    "VERDICTS",
    "WHOLE",
    "BegunShard",
    "EditStore",
    "OriginalShardWriter",
    "OriginalStore",
    "OriginalStoreWriter",
    "Part",
    "Shard",
    "ShardFiles",
    "ShardWriter",
    "StoreWriter",
    "UnfinishedStoreWarning",
    "index_is_current",
    "shard_files",
]
