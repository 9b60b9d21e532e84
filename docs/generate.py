"""What mkdocs builds besides the pages in this folder: one page a technique out of the spec tables, and the real output of every command on a page.

A marker `<!-- run: ARGUMENTS -->` becomes the command and what it prints. A command that ends in a bug, or a page without text, fails the build.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]
os.environ.setdefault("COLUMNS", "100")

from questions import QUESTIONS  # noqa: E402  # pyright: ignore[reportMissingImports]

_RUN = re.compile(r"<!-- run: (?P<arguments>.+?) -->")


@cache
def output_of(arguments: str) -> str:
    """What `tradespace ARGUMENTS` prints, both streams; the exit code where it is not 0. Raises RuntimeError for a bug of ours."""
    from tradespace.cli.main import main

    out, old, code = io.StringIO(), sys.argv, 0
    sys.argv = ["tradespace", *shlex.split(arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = old
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    if code == 1 or "Traceback" in text or not text.strip():
        raise RuntimeError(f"docs: `tradespace {arguments}` failed:\n{text}")
    return f"```\n$ tradespace {arguments}\n{text}\n```" + (f"\n\nExit code {code}." if code else "")


def on_page_markdown(markdown: str, **_) -> str:
    return _RUN.sub(lambda match: output_of(match["arguments"]), markdown)


def on_files(files, config):
    from mkdocs.structure.files import File

    pages = {"questions.md": questions_page(), **technique_pages()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def questions_page() -> str:
    parts = ["# Questions", "Each is answered by a command; what follows it is what the command printed when this page was built."]
    for question, answer, commands in QUESTIONS:
        parts += [f"## {question}", answer, *(f"<!-- run: {command} -->" for command in commands)]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------------ techniques

_PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")


def _linked(text: str) -> str:
    return _PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _source(function) -> str:
    """A formula as the code has it."""
    return f"```python\n{inspect.cleandoc(inspect.getsource(function))}\n```"


def _file(thing) -> str:
    return f"`{Path(inspect.getsourcefile(thing) or '').resolve().relative_to(ROOT)}`"


def _measured(kind: str, name: str) -> str:
    """Figures that the planner knows of this technique: measured by us (with the record's date) or cited; said where there is none."""
    from tradespace.cost.quality import FIGURES

    found = [figure for figure in FIGURES if figure.kind == kind and figure.choice == name]
    if not found:
        return "**Loss.** Nobody's figure on the reference text is known: the planner says so."
    lines = [f"| {_linked(figure.label)} | {figure.kl_nats:.4g} |" for figure in found]
    return "\n".join(["**Loss**, against the 16-bit model:", "", "| source | nats per token |", "|---|---|", *lines])


def technique_pages() -> dict[str, str]:
    from tradespace.kv.retain import evict
    from tradespace.spec import attention, attention_workspace, formats, kv_retain, kv_stores

    pages: dict[str, str] = {}
    index = ["# Techniques", "One page each: the idea, the formula as the code has it, what was measured, the file, the paper.", ""]

    def add(group: str, title: str, slug: str, idea: str, parts: list[str]) -> None:
        path = f"techniques/{slug}.md"
        pages[path] = "\n\n".join([f"# {title}", _linked(idea), *parts]) + "\n"
        rows.setdefault(group, []).append(f"| [{title}]({slug}.md) | {_linked(idea).splitlines()[0]} |")

    rows: dict[str, list[str]] = {}
    for name, fmt in formats.FORMATS.items():
        if name in formats.ALIASES:
            continue
        runs = f"Runs since {fmt.runs_since}." if fmt.runs_since else "Priced; cannot run yet."
        square = f"{fmt.nbytes((4096, 4096)):,}"
        bytes_ = f"**Bytes.** {fmt.bits_per_weight:.3g} bits a weight of a large matrix, scales included; a 4096 × 4096 matrix takes {square} bytes."
        files = f"**Files.** {_file(formats.WeightFormat)} (what it costs), `src/tradespace/formats/` (how it is held)."
        add(
            "Weight formats",
            f"Weights: {name}",
            f"weights-{name}",
            fmt.idea,
            [runs, bytes_, _source(formats.WeightFormat.nbytes), _measured("weights", name), files],
        )
    for name, store in kv_stores.STORES.items():
        size = f"**Bytes.** A token's keys of 8 heads of 128: {store.key_bytes(8, 128) if not store.of_input else store.nbytes(1, 4096):,} bytes" + (
            " for a layer input of width 4096." if store.of_input else "."
        )
        files = f"**Files.** {_file(kv_stores.Store)}, `src/tradespace/kv/store/`."
        add("KV stores", f"KV store: {name}", f"store-{name}", store.idea, [size, _source(kv_stores.Store.nbytes), _measured("kv", name), files])
    ideas = dict(re.findall(r"^(full|sliding|h2o|snapkv|recent) +(.+)$", inspect.cleandoc(kv_retain.__doc__ or ""), re.MULTILINE))
    for kind in kv_retain.Retain.RUNS_SINCE:
        files = f"**Files.** {_file(kv_retain.Retain)}, `src/tradespace/kv/retain/`, {_file(evict)}."
        add(
            "KV retention",
            f"KV retention: {kind}",
            f"retain-{kind}",
            ideas.get(kind, kind),
            [_source(kv_retain.Retain.tokens), _source(kv_retain.Retain.exact_for), files],
        )
    for name, kernel in attention.KERNELS.items():
        files = f"**Files.** {_file(attention)}, `src/tradespace/kernels/attention/`."
        add(
            "Attention kernels",
            f"Attention: {name}",
            f"attention-{name}",
            kernel.idea,
            [
                f"**Memory.** What it holds beside q, k, v and the output grows as {kernel.memory} with T queries and n keys.",
                _source(attention_workspace),
                files,
            ],
        )
    for group, lines in rows.items():
        index += [f"## {group}", "", "| technique | idea |", "|---|---|", *lines, ""]
    pages["techniques/index.md"] = "\n".join(index) + "\n"
    return pages
