"""A GGUF model in several files, NAME-00001-of-00003.gguf and so on, as llama.cpp's `gguf-split` writes them.

Each part is a GGUF file of its own with the keys split.no (from 0), split.count and split.tensors.count; the first one has the model's metadata, every tensor
lies whole in one of them. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.rawfile import shown

if TYPE_CHECKING:
    from tradespace.loading.gguf import GGUFFile

KEYS = ("split.no", "split.count", "split.tensors.count")
MAX_PARTS = 1024  # a terabyte in parts of one gigabyte; each is opened
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the split model that `path` is a part of, by its name; a file that is not named as a part stands alone.

    >>> [part.name for part in part_paths(Path("m-00002-of-00002.gguf"))]
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MAX_PARTS:
        return (path,)
    return tuple(path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf") for number in range(1, int(match["count"]) + 1))


def join_parts(part: GGUFFile, read: Callable[[Path], GGUFFile]) -> GGUFFile:
    """The whole model that `part` belongs to: the first part's metadata without its split keys, and the tensors of all parts.

    Raises InputError (which part) where the file is not named as a part or another part is missing, CorruptFileError where the parts contradict each other.
    """
    paths, count = part_paths(part.path), part.metadata["split.count"]
    if len(paths) != count:
        shown_name = f"NAME-00001-of-{count:05d}.gguf" if count <= MAX_PARTS else f"at most {MAX_PARTS} files"
        raise InputError(f"{part.path}: one of {count} parts (split.count), so it must be named {shown_name} for the others to be found. Rename all parts")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{part.path}: lacks {len(missing)} of {count} parts: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}. Fetch them")
    parts = [part if path == part.path else read(path) for path in paths]
    tensors = {}
    for index, one in enumerate(parts):
        for key, need in (("split.no", index), ("split.count", count), ("split.tensors.count", part.metadata.get("split.tensors.count"))):
            if type(one.metadata.get(key)) is not int or one.metadata[key] != need:
                raise CorruptFileError(
                    f"{one.path}: metadata '{key}' must be {shown(need)}, has {shown(one.metadata.get(key))}. Its parts do not belong together"
                )
        twice = next((name for name in one.tensors if name in tensors), None)
        if twice is not None:
            raise CorruptFileError(f"{one.path}: tensor {shown(twice)} is in another part, too. Its parts do not belong together")
        tensors |= one.tensors
    if len(tensors) != part.metadata["split.tensors.count"]:
        raise CorruptFileError(f"{part.path}: split.tensors.count is {part.metadata['split.tensors.count']}; the parts hold {len(tensors)} tensors")
    first = parts[0]
    metadata = {key: value for key, value in first.metadata.items() if key not in KEYS}
    types = {key: name for key, name in first.metadata_types.items() if key not in KEYS}
    return replace(first, metadata=metadata, metadata_types=types, tensors=tensors)
