"""`tradespace pull` and `tradespace models`."""

from __future__ import annotations

import typer
from rich.table import Table

from tradespace.cli.options import Json, Model, Offline, Revision, console, print_json
from tradespace.loading.pull import describe_pull, is_local, list_models
from tradespace.loading.pull import pull as fetch
from tradespace.units import format_bytes


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)
    app.command("models")(models)


def pull(model: Model, revision: Revision = None, offline: Offline = False, json: Json = False) -> None:
    """Fetch a model's files (resumes, checks sha256, appears whole or not at all) and print where they lie.

    Example: tradespace pull smollm2-135m
    """
    out = console(stderr=True)
    if not is_local(model) and not offline:
        planned = describe_pull(model, revision=revision, offline=offline)
        if planned.download_bytes:
            out.print(f"{model}: {format_bytes(planned.download_bytes)} to download, into {planned.target}", soft_wrap=True)
    path = fetch(model, revision=revision, offline=offline, progress=not json)
    if json:
        print_json({"model": model, "path": str(path)})
    else:
        print(path)


def models(json: Json = False) -> None:
    """List the models that run without naming a path: packaged aliases, our cache, the hub's cache.

    Example: tradespace models
    """
    entries = list_models()
    if json:
        print_json(entries)
        return
    table = Table("model", "kind", "on this machine", "size", "note", title="models", title_justify="left")
    for entry in entries:
        table.add_row(entry.name, entry.kind, "yes" if entry.path else "no", format_bytes(entry.bytes), entry.note or "")
    console().print(table)
