"""ImageNet's size without its pixels: 1.28 million originals with 9 edits each, opened by 4 processes at once.

The store's files are those of a real one but for the tars, which are as long as they should be and empty; nothing reads
an image here. The processes run this file as a script.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dali_diffusemix import FractalBank
from dali_diffusemix.catalog import Catalog
from dali_diffusemix.generate.editors import PROMPTS
from dali_diffusemix.store import SHARD_ROW, VERDICTS, Shard, StoreWriter, Wish

ORIGINALS, CLASSES = 1_281_167, 1000
RANKS = 4
SECONDS, MIB = 10.0, 2048.0
LENGTH = 20_000  # bytes of an edit


# --- the processes that are measured --------------------------------------------------------------------------------


def unshared() -> dict[str, float]:
    """MiB of this process: what it has alone, and with its share of what it has in common with others."""
    sizes: dict[str, float] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size, _ = line.split()
        sizes[name.rstrip(":")] = int(size) / 1024
    return {
        "uss": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "pss": sizes["Pss"],
        "anonymous": sizes["Anonymous"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arguments", nargs=4)
    root, edits, fractals, out = parser.parse_args().arguments
    from torch import distributed

    from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    distributed.barrier()
    before, begin = unshared(), time.perf_counter()
    dataset = DiffuseMixDataset(root, edits=edits, fractals=fractals, mix=MixSpec.paper(), crop=TrainCrop(224), seed=0)
    loader = DiffuseMixLoader(dataset, batch_size=256, shuffle=True, device="cpu")
    opened = time.perf_counter() - begin
    plan = loader.plan(0, 0)
    planned = time.perf_counter() - begin
    distributed.barrier()  # memory is shared among all that have opened the store
    found = {
        "opened_seconds": opened,
        "planned_seconds": planned,
        "before": before,
        "after": unshared(),
        "originals": len(dataset),
        "indices": plan.index.tolist(),
        "mixed": int(plan.mixed.sum()),
    }
    distributed.barrier()
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


# --- the test -------------------------------------------------------------------------------------------------------


def test_four_ranks_open_an_index_of_imagenets_size(
    tmp_path: Path, bank: FractalBank, measured: Callable[..., None]
) -> None:
    begin = time.perf_counter()
    root = tmp_path / "train"
    catalog = imagenet(root)
    write_store(tmp_path / "edits", catalog)
    measured(made_in_seconds=round(time.perf_counter() - begin, 1))

    assert bank.path is not None
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    arguments = [root, tmp_path / "edits", bank.path, tmp_path]
    begin = time.perf_counter()
    subprocess.run([*launch, __file__, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = time.perf_counter() - begin

    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    seconds = max(rank["planned_seconds"] for rank in ranks)
    total = {kind: sum(rank["after"][kind] for rank in ranks) for kind in ("uss", "pss", "anonymous")}
    added = {kind: total[kind] - sum(rank["before"][kind] for rank in ranks) for kind in total}
    measured(
        opened_seconds=round(max(rank["opened_seconds"] for rank in ranks), 3),
        planned_seconds=round(seconds, 3),
        processes_begun_and_ended_seconds=round(whole, 1),
        mib_of_all_ranks={kind: round(size) for kind, size in total.items()},
        mib_of_all_ranks_by_opening={kind: round(size, 1) for kind, size in added.items()},
    )
    assert all(rank["originals"] == ORIGINALS for rank in ranks)
    indices = [index for rank in ranks for index in rank["indices"]]
    assert len(set(indices)) == RANKS * 256
    # Nine of ten are mixed.
    assert sum(rank["mixed"] for rank in ranks) > 0.85 * len(indices)
    assert seconds <= SECONDS
    assert total["pss"] <= MIB


def imagenet(root: Path) -> Catalog:
    """ImageNet's names; the first file is there, by which a dataset sees that it has the right folder."""
    from material import write_photograph

    draw = np.random.default_rng(0)
    labels = np.sort(draw.integers(0, CLASSES, ORIGINALS)).astype(np.int32)
    classes = [f"n{1440764 + 7 * label:08}" for label in range(CLASSES)]
    paths = [f"{classes[label]}/{classes[label]}_{row}.JPEG" for row, label in enumerate(labels.tolist())]
    file = root / paths[0]
    write_photograph(file, 0, 40, 50)
    return Catalog.from_arrays(paths, labels, classes, draw.integers(200, 600, (ORIGINALS, 2)))


def write_store(folder: Path, catalog: Catalog) -> None:
    settings = {"editor": "procedural", "size": 256}
    with StoreWriter.open(folder, catalog, settings) as writer:
        writer.order(Wish(prompts=dict.fromkeys(PROMPTS), variants=1, originals_per_shard=512))
        for shard in writer.shards():
            write_shard(folder / "shards", shard, settings)
        assert sum(sum(verdicts.values()) for verdicts in writer.done().values()) == ORIGINALS * len(PROMPTS)
        writer.finish()


def write_shard(folder: Path, shard: Shard, settings: dict[str, Any]) -> None:
    """What `ShardWriter` writes, without the images."""
    rows = np.zeros(len(shard), SHARD_ROW)
    rows["original"] = np.repeat(np.arange(shard.rows.start, shard.rows.stop), len(shard.prompts))
    rows["prompt"] = np.tile(shard.prompts, len(shard.rows))
    rows["offset"] = np.arange(len(shard)) * (LENGTH + 512)
    rows["length"], rows["height"], rows["width"] = LENGTH, 256, 256
    content = io.BytesIO()
    np.save(content, rows)
    name = f"edits-{shard.number:06d}"
    files = {}
    for ending, data in (("idx", b"v1.2 0\n"), ("npy", content.getvalue())):
        (folder / f"{name}.{ending}").write_bytes(data)
        files[ending] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with (folder / f"{name}.tar").open("wb") as tar:
        files["tar"] = {"bytes": tar.truncate(len(shard) * (LENGTH + 512)), "sha256": ""}
    record = {
        "magic": "dali_diffusemix.shard",
        "version": 1,
        "shard": shard.number,
        "settings": settings,
        "rows": [shard.rows.start, shard.rows.stop],
        "prompts": {place: PROMPTS[place] for place in shard.prompts},
        "variants": [shard.variants.start, shard.variants.stop],
        "files": files,
        "verdicts": {VERDICTS[0]: len(shard), **dict.fromkeys(VERDICTS[1:], 0)},
    }
    (folder / f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
