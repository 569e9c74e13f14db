"""Stores: images on disk, written once by processes that may be killed at any moment, then read by many.

An edit store holds edits:

    store.json                       the order: settings, prompts, and the work ordered so far ("segments")
    catalog/                         the originals; a row never shifts
    shards/edits-000000.tar          edits as WebDataset has them, one group for each original
                       .idx          DALI's index of the tar (`wds2idx`, v1.2)
                       .npy          one row for each edit, rejected ones too: `SHARD_ROW`
                       .json         settings, sizes, hashes, verdicts; written last: without it a shard does not exist
    index.npy, starts.npy            derived from the shards: the accepted edits, sorted by original, prompt, variant
    index.json                       the shards that they are derived from
    scores/NAME/                     columns of scores, if `score` made any; see `scores`
    ../NAME.decisions.jsonl          beside the store: the edits that people rejected

A segment is a box of work, originals x prompts x variants, cut into shards along the originals; or a list of edits in
orders/, for prompts that only some classes have and for edits that are made again. The segments alone number the
shards, whenever and wherever they are made, so a later run knows which are missing. No shard ever changes: where two
have the same edit, the later one counts.

A packed store holds originals, in shards of the same four files:

    store.json                       settings, and the number of originals per shard
    listed/                          the catalog of the packed folder; the shards name its rows
    shards/originals-000000.tar      one member for each original (.idx, .npy: `ORIGINAL_SHARD_ROW`, .json)
    catalog/                         derived: the packed originals, with their packed sizes
    index.npy                        derived: their locations, a row for each row of catalog/
    index.json                       the shards that these are derived from; written last: without it a store is not
                                     finished

A store at a URL can be read, too; `mirror` copies it into a local folder.

layout     names, tables and JSON of both kinds
shards     one shard, written and read
index      one table of all shards
decisions  the edits that people rejected
selection  the edits that are used
ordering   the edits that are missing
catalogs   the store's originals and those given
writer     the run that adds to a store
readers    EditStore, OriginalStore
decisions  the edits that people rejected, in a file beside a store
mirror     copies of stores at URLs
pack       makes packed stores
scores     columns of scores of edits
"""

from dali_diffusemix.store.decisions import Decisions, EditName
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
    EditKey,
    Part,
    Rule,
    Shard,
    UnfinishedStoreWarning,
)
from dali_diffusemix.store.ordering import Redo, Wish
from dali_diffusemix.store.readers import (
    EditStore,
    OriginalStore,
    RawShards,
    check_order,
    index_is_current,
    kind_at,
    order_problems,
    shard_records,
)
from dali_diffusemix.store.selection import Selection
from dali_diffusemix.store.shards import BegunShard, DamagedShard, OriginalShardWriter, ShardRecord, ShardWriter
from dali_diffusemix.store.writer import OriginalStoreWriter, StoreWriter

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
    "DamagedShard",
    "Decisions",
    "EditKey",
    "EditName",
    "EditStore",
    "OriginalShardWriter",
    "OriginalStore",
    "OriginalStoreWriter",
    "Part",
    "RawShards",
    "Redo",
    "Rule",
    "Selection",
    "Shard",
    "ShardRecord",
    "ShardWriter",
    "StoreWriter",
    "UnfinishedStoreWarning",
    "Wish",
    "check_order",
    "index_is_current",
    "kind_at",
    "order_problems",
    "shard_records",
]
