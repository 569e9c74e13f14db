"""`verify`, `report`, `review`, `score` and `export`: what can be done with a finished store."""

import contextlib
from pathlib import Path
from typing import Any, Final

import click

from dali_diffusemix.cli.display import Display
from dali_diffusemix.cli.options import PATH, StyledCommand, Whole, output_options

_KEPT: Final = (0.99, 0.95, 0.9, 0.5)  # shares of the edits for which `score` prints the threshold


@click.command("verify", cls=StyledCommand, short_help="Check every file and image of a store.")
@click.argument("store", type=PATH)
@click.option("--quick", is_flag=True, help="Compare checksums only, without decoding images.")
@click.option("--discard", is_flag=True, help="Mark damaged shards, to have them made again.")
@click.option("--workers", type=int, metavar="N", help="Number of threads that decode.  [default: one per core]")
@output_options
def verify_command(store: Path, quick: bool, discard: bool, workers: int | None, as_json: bool) -> None:
    """Check every file and image of STORE, which is an edit store or a packed store.

    A store consists of shards. With --discard, damaged ones are made again by the next `generate` or `pack`
    into STORE; without it nothing is changed. The exit code is 1 if something is wrong.

    \b
    Example:
      dali-diffusemix verify cache/edits
    """
    from dali_diffusemix.inspect.verify import discard as discard_damaged
    from dali_diffusemix.inspect.verify import verify

    display = Display(as_json)
    with display.progress("Verifying", "shards") as progress:
        found = verify(store, decoding=not quick, workers=workers, progress=progress)
    display.line(f"{found.shards} shards, {found.images} images, {found.bytes / 1e6:.1f} MB")
    if found.missing:
        display.line(f"{found.missing} shards are not finished; run the command that makes them again")
    display.lines(str(problem) for problem in found.problems)
    if found.damaged and discard:
        discard_damaged(store, found)
        display.line(f"{len(found.damaged)} damaged shards discarded; run the command that made them again")
    elif found.damaged:
        display.line(f"{len(found.damaged)} shards are damaged; use --discard to have them made again")
    elif not found.problems:
        display.line("nothing is wrong")
    display.result(
        {
            "store": str(store),
            "shards": found.shards,
            "missing": found.missing,
            "images": found.images,
            "bytes": found.bytes,
            "damaged": list(found.damaged),
            "problems": [{"shard": one.shard, "file": one.file, "what": one.what} for one in found.problems],
        }
    )
    if found.problems:
        click.get_current_context().exit(1)


@click.command("report", cls=StyledCommand, short_help="Write a gallery of the edits, to look at in a browser.")
@click.argument("store", type=PATH)
@click.option("--out", type=PATH, default="report", show_default=True, metavar="DIR", help="Folder to write.")
@click.option("--root", type=PATH, metavar="DIR", help="Folder of the originals.  [default: where they were]")
@click.option(
    "--limit", type=Whole(), default=10_000, show_default=True, metavar="N", help="Maximum number of edits to show."
)
@output_options
def report_command(store: Path, out: Path, root: Path | None, limit: int, as_json: bool) -> None:
    """Write a gallery of the edits in STORE, as a page that any browser opens from disk.

    The page shows originals beside their edits, with scores, settings and the reason for each rejection. It
    can be filtered by class and prompt. To reject edits yourself, use `review`.

    \b
    Example:
      dali-diffusemix report cache/edits --out report
    """
    from dali_diffusemix.inspect.report import write_report

    display = Display(as_json)
    with display.progress("Drawing", "edits") as progress:
        gallery = write_report(store, out, root=root, most=limit, progress=progress)
    shown = f"{gallery.edits} of " if gallery.edits < gallery.of else ""
    display.line(f"{shown}{gallery.of} edits in {gallery.page}")
    display.result(
        {"page": str(gallery.page), "edits": gallery.edits, "of": gallery.of, "originals": gallery.originals}
    )


@click.command("review", cls=StyledCommand, short_help="Look at the edits in a browser, and reject bad ones by hand.")
@click.argument("store", type=PATH)
@click.option("--root", type=PATH, metavar="DIR", help="Folder of the originals.  [default: where they were]")
@click.option("--port", type=Whole(1, 65535), metavar="N", help="Port on 127.0.0.1.  [default: a free one]")
@click.option("--no-open", is_flag=True, help="Print the address without opening a browser.")
@output_options
def review_command(store: Path, root: Path | None, port: int | None, no_open: bool, as_json: bool) -> None:
    """Look at the edits in STORE in a browser, and reject bad ones by hand.

    A server on this machine shows each original beside its edit. Arrow keys move, x rejects, u undoes. Each
    choice is saved at once in the file STORE.decisions.jsonl beside the store, which does not change.
    Rejected edits are not used for training.

    Only the printed address opens the page. It holds a secret, so do not pass it on. Press Ctrl-C to stop the
    server. On a remote machine, forward the port to the same number: ssh -L PORT:127.0.0.1:PORT HOST.

    \b
    Example:
      dali-diffusemix review cache/edits
    """
    from dali_diffusemix.inspect.review import ReviewServer, open_browser

    display = Display(as_json)
    server = ReviewServer(store, root=root, port=port)
    view = server.view
    with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
        display.line(f"{len(view.rows)} edits at {server.address}")
        if not view.originals.found:
            display.line("Originals were not found; use --root to show them beside their edits.")
        display.line("Press Ctrl-C to end.")
        display.result(
            {
                "address": server.address,
                "port": server.port,
                "edits": len(view.rows),
                "originals": view.originals.found,
                "decisions": str(view.decisions.file),
            }
        )
        if not no_open:
            open_browser(server)
        server.run()
    rejected = int(view.rejected().sum())
    display.line(f"{rejected} {'edit is' if rejected == 1 else 'edits are'} rejected, in {view.decisions.file}")


@click.command("score", cls=StyledCommand, short_help="Score the edits with CLIP or with your own function.")
@click.argument("store", type=PATH)
@click.option("--with", "scorer", required=True, metavar="SCORER", help="What scores: clip:MODEL, or module:function.")
@click.option("--name", metavar="NAME", help="Name of the scores.  [default: clip, or the function's]")
@click.option("--root", type=PATH, metavar="DIR", help="Folder of the originals.  [default: where they were]")
@click.option("--overwrite", is_flag=True, help="Score all edits again, and replace their scores.")
@click.option("--workers", type=int, metavar="N", help="Number of threads that decode.  [default: one per core]")
@output_options
def score_command(store: Path, scorer: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Score the accepted edits in STORE, and keep the scores in STORE.

    clip:MODEL measures how similar edit and original are; MODEL is a hub id or a folder. module:function is
    your own function. Run the same command again to resume, or to score edits that are new.

    \b
    Example:
      dali-diffusemix score cache/edits --with flower_scorer:Agreement
    """
    from dali_diffusemix.inspect.scoring import score

    display = Display(as_json)
    with display.progress("Scoring", "edits") as progress:
        found = score(store, scorer, progress=progress, replace=overwrite, **options)
    display.line(
        f"{len(found.values)} edits have a score {found.name!r} by {found.by.scorer}; {found.made} were scored now"
    )
    if found.unreadable:
        display.line(f"{found.unreadable} have none: they or their originals could not be read")
    kept = {share: found.keeping(share) for share in _KEPT}
    if len(found.values):
        display.line("kept   min_score")
        display.lines(f"{share:4.0%}   {threshold:9.4f}" for share, threshold in kept.items())
    display.result(
        {
            "store": str(store),
            "name": found.name,
            "scorer": vars(found.by),
            "edits": len(found.values),
            "made": found.made,
            "unreadable": found.unreadable,
            "keeping": {str(share): threshold for share, threshold in kept.items()} if len(found.values) else {},
        }
    )


@click.command("export", cls=StyledCommand, short_help="Write images and edits as a folder for other loaders.")
@click.argument("root", type=PATH)
@click.argument("store", type=PATH)
@click.option("--out", type=PATH, default="exported", show_default=True, metavar="DIR", help="Folder to write.")
@click.option("--mixed", is_flag=True, help="Write mixed images instead of edits.")
@click.option("--fractals", type=PATH, metavar="FILE", help="Fractal bank, needed with --mixed.")
@click.option("--size", default=256, show_default=True, metavar="N", help="Side length of a mixed image in pixels.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same images.")
@click.option("--quality", default=95, show_default=True, metavar="N", help="JPEG quality of mixed images, 1 to 100.")
@output_options
def export_command(root: Path, store: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write the images of ROOT and their edits in STORE as a folder of class folders, for other loaders.

    Each edit is written beside its original, in the folder of its class. With --mixed, each edit is first
    mixed with its original and a fractal; such images are the same in every epoch, while this package's
    loader mixes anew.

    \b
    Example:
      dali-diffusemix export data/train cache/edits --out exported
    """
    from dali_diffusemix.inspect.export import export
    from dali_diffusemix.store import check_order

    check_order(root, store)

    display = Display(as_json)
    with display.progress("Exporting", "images") as progress:
        exported = export(root, store, out, progress=progress, **options)
    display.line(f"{exported.originals} originals and {exported.edits} {exported.kind} in {out}")
    if exported.left_out:
        display.line(f"{exported.left_out} left out: they could not be decoded")
    display.result(
        {"out": str(out), "originals": exported.originals, "edits": exported.edits, "left_out": exported.left_out}
    )
