"""store: what is written comes back, in any order of making; what is damaged, foreign or newer is refused by name."""

import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dali_diffusemix.catalog import Catalog
from dali_diffusemix.errors import StoreError
from dali_diffusemix.plan import MixSpec, Planner, TrainCrop
from dali_diffusemix.store import (
    VERDICTS,
    EditStore,
    Shard,
    ShardWriter,
    StoreWriter,
    UnfinishedStoreWarning,
    Wish,
    layout,
    readers,
)

SETTINGS = {"editor": "none", "size": 8}
PROMPTS = ("autumn", "a sketch with crayon", "ukiyo-e")
ODD = [
    b"ants/plain.jpg",
    b"ants/two.dots.jpg",
    b"ants/same name.png",
    b"ants/same name.jpg",
    b"ants/'quotes\" and %25 percent.jpg",
    b"ants/not \xff\xfe utf-8.jpg",
    "ants/gr\u00fc\u00df\u96ea.jpg".encode(),
    b"bees.v2/.hidden.deep/x.jpg",
    b"bees.v2/" + b"long name. " * 22 + b".jpg",
    b"a long folder name, that fits in a header of its own" * 2 + b"/x.jpg",
    b"bees.v2/" + b"\xff" * 250,
]


def catalog_of(paths: Iterable[bytes]) -> Catalog:
    paths = list(paths)
    return Catalog.from_arrays(paths, [0] * len(paths), ["all"], np.full((len(paths), 2), 9))


def originals(count: int) -> Catalog:
    return catalog_of(f"all/{row}.jpg".encode() for row in range(count))


def jpeg_of(original: int, prompt: int, variant: int) -> bytes:
    """Something that differs for every edit, in length too."""
    return f"edit {original} {prompt} {variant} ".encode() * (1 + (original * 7 + prompt * 3 + variant) % 60)


def rejected(original: int, prompt: int) -> bool:
    return original % 5 == 3 and prompt == 0


def fill(store: Path, catalog: Catalog, shard: Shard) -> None:
    with ShardWriter(store, catalog, shard) as writer:
        for original in shard.rows:
            for prompt in shard.prompts:
                for variant in shard.variants:
                    seed = original << 40
                    if rejected(original, prompt):
                        writer.add(original, prompt, variant, seed=seed, image=None, verdict=VERDICTS[1])
                    else:
                        jpeg = jpeg_of(original, prompt, variant)
                        writer.add(
                            original, prompt, variant, seed=seed, image=jpeg, height=8 + original, width=4, score=0.5
                        )


def build(
    store: Path, catalog: Catalog, prompts: Iterable[str] = PROMPTS, variants: int = 2, per_shard: int = 4
) -> list[Shard]:
    with StoreWriter.open(store, catalog, SETTINGS) as writer:
        writer.order(Wish(prompts=dict.fromkeys(prompts), variants=variants, originals_per_shard=per_shard))
        missing = [shard for shard in writer.shards() if shard.number not in writer.done()]
        for shard in missing:
            fill(store, writer.catalog, shard)
        writer.finish()
    return missing


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def expected(originals: int, prompts: int = 3, variants: int = 2) -> list[tuple[int, int, int]]:
    return [
        (original, prompt, variant)
        for original in range(originals)
        for prompt in range(prompts)
        for variant in range(variants)
        if not rejected(original, prompt)
    ]


def check(store: EditStore, rows: list[tuple[int, int, int]]) -> None:
    """The store holds exactly these edits."""
    index = store.index
    assert list(zip(*(index[name].tolist() for name in ("original", "prompt", "variant")), strict=True)) == rows
    assert len(store) == len(rows)
    for edit, row in enumerate(rows):
        assert store.encoded(edit).tobytes() == jpeg_of(*row)
        assert store.prompt_of(edit) == PROMPTS[row[1]]
        assert store.starts[row[0]] <= edit < store.starts[row[0] + 1]
    edits = np.arange(len(rows))
    np.testing.assert_array_equal(store.originals_of(edits), [row[0] for row in rows])
    np.testing.assert_array_equal(store.sizes(edits), [(8 + row[0], 4) for row in rows])
    assert store.starts.shape == (len(store.catalog) + 1,) and store.starts.dtype == np.int64


# Round trips ---------------------------------------------------------------------------------------------------------


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    build(tmp_path / "store", originals(10))
    store = EditStore.open(tmp_path / "store")
    check(store, expected(10))
    assert dict(store.settings) == SETTINGS and store.prompts == PROMPTS
    jpeg = store.encoded(0)
    assert jpeg.dtype == np.uint8 and not jpeg.flags.writeable and not jpeg.flags.owndata
    assert isinstance(store.index.base, np.ndarray)  # mapped, not read


def test_a_shard_has_a_row_for_every_edit_and_hashes_of_its_files(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    rows = np.load(tmp_path / "shards" / "edits-000000.npy", allow_pickle=False)
    assert rows.dtype == layout.SHARD_ROW and len(rows) == 4 * 3 * 2
    assert (rows["seed"] == rows["original"].astype(np.uint64) << np.uint64(40)).all()
    bad = rows[rows["verdict"] == 1]
    assert bad["original"].tolist() == [3, 3] and not bad["length"].any() and np.isnan(bad["score"]).all()
    record = json.loads((tmp_path / "shards" / "edits-000000.json").read_text())
    assert record["verdicts"] == {"accepted": 22, "unreadable original": 2}
    assert record["settings"] == SETTINGS and record["prompts"] == dict(zip("012", PROMPTS, strict=True))
    for kind, file in record["files"].items():
        data = (tmp_path / "shards" / f"edits-000000.{kind}").read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_planner_takes_a_store_as_its_edits(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    store = EditStore.open(tmp_path)
    mix = MixSpec(fractal_weight=0)
    planner = Planner(seed=0, crop=TrainCrop(8), sizes=store.catalog.sizes, mix=mix, edits=store)
    plan = planner.batch(0, np.arange(10))
    mixed = plan.edit >= 0
    assert mixed.any()
    np.testing.assert_array_equal(store.originals_of(plan.edit[mixed]), np.arange(10)[mixed])


def test_more_shards_than_may_be_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_OPEN_SHARDS", 2)
    build(tmp_path, originals(12), per_shard=1)
    store = EditStore.open(tmp_path)
    rows = expected(12)
    views = [store.encoded(edit) for edit in range(len(store))]  # outlive their maps
    for view, row in zip(views, rows, strict=True):
        assert view.tobytes() == jpeg_of(*row)


def sees(store: EditStore, edit: int) -> tuple[int, bytes]:
    return len(store), store.encoded(edit).tobytes()


def test_a_pickled_store_is_small_and_sees_the_same_edits(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    store = EditStore.open(tmp_path)
    store.encoded(0)
    assert len(pickle.dumps(store)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sees, (store, 5)) == (len(store), store.encoded(5).tobytes())


def test_a_pickled_store_does_not_see_what_was_added_since(tmp_path: Path) -> None:
    build(tmp_path, originals(10), PROMPTS[:2])
    before = EditStore.open(tmp_path)
    data = pickle.dumps(before)
    build(tmp_path, originals(10), PROMPTS)
    after = pickle.loads(data)
    np.testing.assert_array_equal(after.index, before.index)
    assert after.encoded(7).tobytes() == before.encoded(7).tobytes()
    assert len(EditStore.open(tmp_path)) > len(before)


# Growing --------------------------------------------------------------------------------------------------------------


def test_shards_do_not_depend_on_the_order_of_making(tmp_path: Path) -> None:
    build(tmp_path / "forward", originals(10))
    with StoreWriter.open(tmp_path / "backward", originals(10), SETTINGS) as writer:
        writer.order(Wish(prompts=dict.fromkeys(PROMPTS), variants=2, originals_per_shard=4))
        for shard in reversed(writer.shards()):
            fill(tmp_path / "backward", writer.catalog, shard)
        writer.finish()
    assert content(tmp_path / "forward") == content(tmp_path / "backward")


def test_a_second_run_has_nothing_to_do_and_changes_nothing(tmp_path: Path) -> None:
    assert len(build(tmp_path, originals(10))) == 3
    before = content(tmp_path)
    assert build(tmp_path, originals(10)) == []
    assert content(tmp_path) == before


def test_more_prompts_and_variants_add_to_a_store_and_change_no_shard(tmp_path: Path) -> None:
    build(tmp_path, originals(10), PROMPTS[:1], variants=1)
    before = content(tmp_path / "shards")
    build(tmp_path, originals(10), PROMPTS[:2], variants=1, per_shard=3)
    build(tmp_path, originals(10), PROMPTS, variants=2)
    after = content(tmp_path / "shards")
    assert before.items() <= after.items()
    check(EditStore.open(tmp_path), expected(10))
    assert build(tmp_path, originals(10), PROMPTS[1:], variants=1) == []  # all of it is there


@given(
    st.lists(
        st.tuples(
            st.integers(1, 9), st.sets(st.sampled_from("abcde"), min_size=1), st.integers(1, 4), st.integers(1, 4)
        ),
        max_size=5,
    )
)
def test_every_edit_is_ordered_exactly_once(orders: list[tuple[int, set[str], int, int]]) -> None:
    header = layout.Header(settings={}, prompts=(), segments=(), rules={}, fingerprint="")
    rows, wanted, count = 0, set(), 0
    for more, prompts, variants, per_shard in orders:
        earlier = list(header.shards(Path()))
        rows += more  # originals may come later too
        header = header.with_boxes(sorted(prompts), variants, rows, per_shard)
        shards = list(header.shards(Path()))
        assert shards[: len(earlier)] == earlier
        assert [shard.number for shard in shards] == list(range(header.shard_count))
        wanted |= {(row, prompt, variant) for row in range(rows) for prompt in prompts for variant in range(variants)}
        edits = [
            (row, header.prompts[prompt], variant)
            for shard in shards
            for row in shard.rows
            for prompt in shard.prompts
            for variant in shard.variants
        ]
        count = sum(map(len, shards))
        assert len(edits) == len(set(edits)) == count and set(edits) == wanted


@given(st.lists(st.text(max_size=20), unique=True, max_size=8), st.integers(0, 8))
def test_slugs_differ_and_stay(prompts: list[str], some: int) -> None:
    def slugs(prompts: list[str]) -> tuple[str, ...]:
        return layout.Header(settings={}, prompts=tuple(prompts), segments=(), rules={}, fingerprint="").slugs

    all_slugs = slugs(prompts)
    assert len(set(all_slugs)) == len(prompts)
    assert slugs(prompts[:some]) == all_slugs[:some]
    assert all(slug and slug.isascii() and slug.replace("-", "").isalnum() for slug in all_slugs)


def test_the_slugs_of_prompts() -> None:
    prompts = ("a sketch with crayon", "ukiyo-e", "雪", "Ukiyo e")
    header = layout.Header(settings={}, prompts=prompts, segments=(), rules={}, fingerprint="")
    assert header.slugs == ("a-sketch-with-crayon", "ukiyo-e", "prompt--2", "ukiyo-e--3")


# Other readers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> EditStore:
    """One shard of originals with all kinds of names; the fourth has no autumn."""
    build(tmp_path, catalog_of(ODD), variants=1, per_shard=len(ODD))
    return EditStore.open(tmp_path)


def test_the_tar_is_deterministic_and_has_a_group_for_each_original(odd: EditStore) -> None:
    with tarfile.open(odd.path / "shards" / "edits-000000.tar") as tar:
        members = tar.getmembers()
        for edit, member in enumerate(members):
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.type) == ("", "", tarfile.REGTYPE)
            assert member.offset_data == odd.index["offset"][edit] and member.size == odd.index["length"][edit]
            file = tar.extractfile(member)
            assert file is not None and file.read() == odd.encoded(edit).tobytes()
    assert (odd.path / "shards" / "edits-000000.tar").stat().st_size % tarfile.RECORDSIZE == 0
    assert members[0].name == "ants/plain%2Ejpg.autumn.0.jpg"
    assert members[-2].name.endswith("%FF.a-sketch-with-crayon.0.jpg")
    assert len({member.name for member in members}) == len(odd)


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_a_shard(odd: EditStore) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    samples = list(webdataset.WebDataset(str(odd.path / "shards" / "edits-000000.tar"), shardshuffle=False))
    assert len(samples) == len(ODD)
    for original, sample in enumerate(samples):
        for prompt, slug in enumerate(("autumn", "a-sketch-with-crayon", "ukiyo-e")):
            wanted = None if rejected(original, prompt) else jpeg_of(original, prompt, 0)
            assert sample.get(f"{slug}.0.jpg") == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_index", [True, False])
def test_dali_reads_a_shard(odd: EditStore, with_index: bool) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    tar = str(odd.path / "shards" / "edits-000000.tar")

    @pipeline_def(batch_size=len(ODD), num_threads=1, device_id=None)
    def pipeline() -> Any:
        return tuple(
            fn.readers.webdataset(
                paths=[tar],
                index_paths=[tar.replace(".tar", ".idx")] if with_index else [],
                ext=["autumn.0.jpg", "a-sketch-with-crayon.0.jpg", "ukiyo-e.0.jpg"],
                missing_component_behavior="empty",
            )
        )

    pipe = pipeline()
    pipe.build()
    outputs = pipe.run()
    for prompt, output in enumerate(outputs):
        for original in range(len(ODD)):
            wanted = b"" if rejected(original, prompt) else jpeg_of(original, prompt, 0)
            assert np.asarray(output.at(original)).tobytes() == wanted


def test_the_index_for_dali_is_the_one_that_dali_makes(odd: EditStore, tmp_path: Path) -> None:
    tool = pytest.importorskip("wds2idx", reason="DALI is not installed")
    theirs = tmp_path / "theirs.idx"
    with tool.IndexCreator(str(odd.path / "shards" / "edits-000000.tar"), str(theirs), verbose=False) as creator:
        creator.create_index()
    ours = (odd.path / "shards" / "edits-000000.idx").read_text().splitlines()
    assert len(ours) == 1 + len(ODD)
    for our, their in zip(ours, theirs.read_text().splitlines(), strict=True):
        # Where a name is so long that it has a header of its own, wds2idx 2.4 takes that for the file.
        assert our == their or "%FF%FF%FF" in our or "long%20name" in our


# Unfinished -----------------------------------------------------------------------------------------------------------


def test_an_unfinished_store_serves_what_is_there_and_says_what_is_missing(tmp_path: Path) -> None:
    with StoreWriter.open(tmp_path, originals(10), SETTINGS) as writer:
        writer.order(Wish(prompts=dict.fromkeys(PROMPTS), variants=2, originals_per_shard=4))
        with pytest.raises(StoreError, match="none of its 3 shards"):
            EditStore.open(tmp_path)
        for shard in (writer.shards()[0], writer.shards()[2]):
            fill(tmp_path, writer.catalog, shard)
    with pytest.warns(UnfinishedStoreWarning, match="1 of its 3 shards are missing"):
        store = EditStore.open(tmp_path)
    check(store, [row for row in expected(10) if not 4 <= row[0] < 8])
    data = pickle.dumps(store)
    build(tmp_path, originals(10))
    check(pickle.loads(data), [row for row in expected(10) if not 4 <= row[0] < 8])
    check(EditStore.open(tmp_path), expected(10))


@pytest.mark.parametrize("lost", ["index.json", "shards and index"])
def test_without_its_index_a_store_derives_it_in_memory(tmp_path: Path, lost: str) -> None:
    build(tmp_path, originals(10), PROMPTS[:2])
    with StoreWriter.open(tmp_path, originals(10), SETTINGS) as writer:
        if lost == "index.json":
            (tmp_path / lost).unlink()
        else:  # killed between the last shard and the index
            writer.order(Wish(prompts=dict.fromkeys(PROMPTS), variants=2, originals_per_shard=4))
            for shard in writer.shards()[3:]:
                fill(tmp_path, writer.catalog, shard)
    with pytest.warns(UnfinishedStoreWarning, match="index is not finished"):
        store = EditStore.open(tmp_path)
    check(store, expected(10, 2 if lost == "index.json" else 3))
    build(tmp_path, originals(10), store.prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(EditStore.open(tmp_path), expected(10, len(store.prompts)))


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter.open(tmp_path, originals(4), SETTINGS) as writer:
        writer.order(Wish(prompts=dict.fromkeys(PROMPTS), variants=1, originals_per_shard=4))
        (shard,) = writer.shards()
        with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, writer.catalog, shard) as shard_writer:
            shard_writer.add(0, 0, 0, seed=0, image=b"x")
            assert list((tmp_path / "shards").iterdir())
            raise KeyboardInterrupt
        with (
            pytest.raises(StoreError, match="needs 12 edits, got 1"),
            ShardWriter(tmp_path, writer.catalog, shard) as w,
        ):
            w.add(0, 0, 0, seed=0, image=b"x")
        assert not list((tmp_path / "shards").iterdir())


def test_a_file_that_vanishes_while_shards_are_listed_hides_no_shard(tmp_path: Path) -> None:
    """Another part renames its temporary files meanwhile; a link to nothing is listed, and has no size either."""
    build(tmp_path, originals(10))
    before = content(tmp_path)
    (tmp_path / "shards" / ".edits-000009.tar.0123abcd.tmp").symlink_to("nowhere")
    check(EditStore.open(tmp_path), expected(10))
    assert build(tmp_path, originals(10)) == []
    assert content(tmp_path) == before


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    before = content(tmp_path)
    for name in (".store.json.{}.tmp", "catalog/.labels.npy.{}.tmp", "shards/.edits-000001.tar.{}.tmp"):
        (tmp_path / name.format("0123abcd")).write_bytes(b"half")
    build(tmp_path, originals(10))
    assert content(tmp_path) == before


# Damage ---------------------------------------------------------------------------------------------------------------


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("kind", ["tar", "idx", "npy"])
@pytest.mark.parametrize("how", ["cut", "gone", "longer"])
def test_a_damaged_shard_is_named_and_made_anew(
    tmp_path: Path, kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path, originals(10))
    before = content(tmp_path)
    file = tmp_path / "shards" / f"edits-000001.{kind}"
    size = file.stat().st_size
    if how == "gone":
        file.unlink()
    else:
        os.truncate(file, size - 100 if how == "cut" else size + 1)
    with pytest.raises(StoreError, match=rf"edits-000001\.{kind}.*{'missing' if how == 'gone' else size}.*generate"):
        EditStore.open(tmp_path)
    assert [shard.number for shard in build(tmp_path, originals(10))] == [1]
    assert "Shard 1" in caplog.text
    assert content(tmp_path) == before


def test_a_shard_cut_short_while_the_store_is_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    store = EditStore.open(tmp_path)
    os.truncate(tmp_path / "shards" / "edits-000000.tar", 512)
    with pytest.raises(StoreError, match=r"edits-000000\.tar.*found 512"):
        store.encoded(0)


@pytest.mark.parametrize("name", ["store.json", "index.json", "shards/edits-000000.json"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 3}, "'version' must be 1.*, found 3; update"),
        ({"magic": "tar"}, "'magic' must be"),
        (None, "is damaged"),
    ],
)
def test_other_versions_and_damaged_json_are_refused(
    tmp_path: Path, name: str, fields: Mapping[str, object] | None, message: str
) -> None:
    build(tmp_path, originals(10))
    if fields is None:
        (tmp_path / name).write_bytes(b'{"magic": "dali_')
    else:
        change(tmp_path / name, **fields)
    if name.startswith("shards"):
        (tmp_path / "index.json").unlink()  # else a reader has no use for it
        with pytest.raises(StoreError, match=message), StoreWriter.open(tmp_path, originals(10), SETTINGS) as writer:
            writer.done()
    with pytest.raises(StoreError, match=message):
        EditStore.open(tmp_path)


@pytest.mark.parametrize("fields", [{"segments": 3}, {"prompts": ["one"]}, {"settings": None}])
def test_fields_of_the_wrong_kind_are_refused(tmp_path: Path, fields: Mapping[str, object]) -> None:
    build(tmp_path, originals(10))
    change(tmp_path / "store.json", **fields)
    with pytest.raises(StoreError, match=r"store\.json.*damaged"):
        EditStore.open(tmp_path)


def test_a_damaged_header_is_no_store_of_another_kind(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    text = (tmp_path / "store.json").read_text()
    for damaged in (text[:100], "[]", ""):
        (tmp_path / "store.json").write_text(damaged)
        with pytest.raises(
            StoreError, match=r"store\.json.*damaged.*; bring back a copy of it, or make a new"
        ) as caught:
            EditStore.open(tmp_path)
        assert "another folder" not in str(caught.value)
    (tmp_path / "store.json").write_text(text.replace(".store", ".other"))
    with pytest.raises(StoreError, match=r"'magic' must be .*; use another folder"):
        EditStore.open(tmp_path)


def test_a_catalog_that_cannot_be_written_has_the_remedy_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "catalog").touch()
    with (
        pytest.raises(StoreError, match=r"cannot be written .*the same command again") as caught,
        StoreWriter.open(tmp_path, originals(3), SETTINGS),
    ):
        pass
    assert "DALI_DIFFUSEMIX_CACHE" not in str(caught.value)


@pytest.mark.parametrize("name", ["index.npy", "starts.npy"])
@pytest.mark.parametrize("how", ["cut", "other", "pickle", "text", "gone"])
def test_a_damaged_index_is_refused_and_made_anew(tmp_path: Path, name: str, how: str) -> None:
    build(tmp_path, originals(10))
    before = content(tmp_path)
    file = tmp_path / name
    if how == "cut":
        os.truncate(file, file.stat().st_size - 8)
    elif how == "gone":
        file.unlink()
    elif how == "text":
        file.write_text("no array at all")
    else:
        np.save(file, np.zeros(3) if how == "other" else np.array([{}], object), allow_pickle=True)
    with pytest.raises(StoreError, match=rf"{name}.*generate") as caught:
        EditStore.open(tmp_path)
    assert "allow_pickle" not in str(caught.value)
    build(tmp_path, originals(10))
    assert content(tmp_path) == before


def test_a_store_that_is_not_there_or_has_lost_its_catalog(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no edit store"):
        EditStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no edit store"):
        EditStore.open(tmp_path)
    build(tmp_path, originals(10))
    (tmp_path / "catalog" / "catalog.json").unlink()
    with pytest.raises(StoreError, match="own catalog"):
        EditStore.open(tmp_path)
    originals(11).save(tmp_path / "catalog")
    with pytest.raises(StoreError, match="fingerprint"):
        EditStore.open(tmp_path)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_field_by_field(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    before = content(tmp_path)
    other = {"editor": "none", "size": 9, "steps": 4}
    with pytest.raises(StoreError) as caught, StoreWriter.open(tmp_path, originals(10), other):
        pass
    assert "size: 8 in the store, 9 asked for" in str(caught.value)
    assert "steps: None in the store, 4 asked for" in str(caught.value)
    assert "editor:" not in str(caught.value)
    assert content(tmp_path) == {**before, ".lock": (tmp_path / ".lock").read_bytes()}


def test_other_originals_are_refused_with_the_difference(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    none = catalog_of([f"all/{row}.jpg".encode() for row in range(10, 21)])
    message = (
        r"it has 10, given are 11; 10 only in the store \(for one 'all/0.jpg'\), 11 not in the store \(.*'all/10.jpg'"
    )
    with pytest.raises(StoreError, match=message), StoreWriter.open(tmp_path, none, SETTINGS):
        pass
    others = catalog_of([f"all/{row}.jpg".encode() for row in range(2, 13)])
    with pytest.raises(StoreError, match=r"of the 11 given it lacks 3 \(for one 'all/10.jpg'\)"):
        EditStore.open(tmp_path).reindexed(others)


@pytest.mark.parametrize("rows", [[*reversed(range(10))], [7, 2, 3], [0]], ids=str)
def test_edits_are_paired_with_originals_by_path(tmp_path: Path, rows: list[int]) -> None:
    """Some of the store's originals, in any order, keep their edits; pickled, too."""
    build(tmp_path, originals(10))
    store = EditStore.open(tmp_path)
    assert store.reindexed(originals(10)) is store
    some = store.reindexed(catalog_of([f"all/{row}.jpg".encode() for row in rows]))
    for ordered in (some, pickle.loads(pickle.dumps(some))):
        assert ordered.starts[-1] == len(ordered)
        for place, row in enumerate(rows):
            edits = range(ordered.starts[place], ordered.starts[place + 1])
            theirs = range(store.starts[row], store.starts[row + 1])
            assert (ordered.originals_of(np.array(edits)) == place).all()
            assert [ordered.encoded(edit).tobytes() for edit in edits] == [
                store.encoded(edit).tobytes() for edit in theirs
            ]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"thesis\.tex"), StoreWriter.open(tmp_path, originals(3), SETTINGS):
        pass
    assert list(content(tmp_path)) == ["thesis.tex"]


def test_shards_of_a_lost_store_are_not_taken_for_those_of_a_new_one(tmp_path: Path) -> None:
    build(tmp_path, originals(10))
    (tmp_path / "store.json").unlink()
    with pytest.raises(StoreError, match=r"has shards, but no store\.json"):
        build(tmp_path, originals(10))


@pytest.mark.parametrize("place", ["file", "file/store"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StoreError, match="cannot be written"),
        StoreWriter.open(tmp_path / place, originals(3), SETTINGS),
    ):
        pass


HOLD = """
import sys
from dali_diffusemix.catalog import Catalog
from dali_diffusemix.store import StoreWriter
catalog = Catalog.from_arrays([f"all/{row}.jpg" for row in range(10)], [0] * 10, ["all"], [[9, 9]] * 10)
with StoreWriter.open(sys.argv[1], catalog, {"editor": "none", "size": 8}):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def test_one_run_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=rf"process {holder.pid} on .* is writing"):
            build(tmp_path, originals(10))
        holder.kill()
    build(tmp_path, originals(10))
    assert (tmp_path / ".lock").read_bytes() == b""
    check(EditStore.open(tmp_path), expected(10))
