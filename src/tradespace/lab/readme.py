"""Renders the tables of the README and of docs/howto/serve.md: what stands between `<!-- record: NAME -->` and `<!-- end -->` is never typed by hand.

`<!-- record: NAME VARIANT -->` is the record of the same experiment on another machine, results/NAME_VARIANT.json.

python -m tradespace.lab.readme            rewrites them
python -m tradespace.lab.readme --check    exit code 1 and the names where they and the records differ
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tradespace.errors import CorruptFileError, InputError
from tradespace.lab.experiments import EXPERIMENTS
from tradespace.measure.record import Record, read_record, write_atomically

RENDERED = ("README.md", "docs/howto/serve.md")
_SECTION = re.compile(r"<!-- record: (?P<name>[\w-]+)(?: (?P<variant>\w+))? -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def render(text: str, results: Path) -> str:
    """`text` with every marked section replaced by the table of its record. Raises InputError for a section that no experiment or record fills."""

    def section(match: re.Match[str]) -> str:
        name, variant = match["name"], match["variant"]
        if name not in EXPERIMENTS:
            raise InputError(f"README: no experiment '{name}'. Known: {', '.join(EXPERIMENTS)}")
        path = results / EXPERIMENTS[name].file
        if variant:
            path = path.with_stem(f"{path.stem}_{variant}")
        opening = f"<!-- record: {name}{f' {variant}' if variant else ''} -->"
        if not path.exists():  # said, not left out: a section promises figures
            return f"{opening}\n*Not measured yet: `tradespace lab run {name}`.*\n<!-- end -->"
        record = read_record(path)
        return f"{opening}\n{EXPERIMENTS[name].markdown(record)}\n{circumstances(record)}\n<!-- end -->"

    rendered = _SECTION.sub(section, text)
    if text.count("<!-- record:") != len(_SECTION.findall(text)):
        raise CorruptFileError("README: a '<!-- record: NAME -->' without its '<!-- end -->'")
    return rendered


def circumstances(record: Record) -> str:
    """Where, when and by which command a table was measured."""
    device = record.device.get("name", "unknown device")
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items() if version and name in ("python", "torch"))
    commit = record.commit[:10] + (" with changes" if record.dirty else "")
    return f"\n*Measured {record.date[:10]} at commit {commit} on {device}; {versions}; `{record.command}`.*\n"


def main(arguments: list[str]) -> int:
    """Rewrites (or with --check compares) the documents beside `results/` in the present folder."""
    differs = False
    for name in RENDERED:
        text = Path(name).read_text(encoding="utf-8")
        rendered = render(text, Path("results"))
        if "--check" not in arguments:
            write_atomically(Path(name), rendered)
        elif rendered != text:
            print(f"{name} differs from results/: run make readme", file=sys.stderr)
            differs = True
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
