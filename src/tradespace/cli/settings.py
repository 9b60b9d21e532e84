"""Where flags come from besides the command line: TRADESPACE_* variables and a YAML file (`--config FILE`, or TRADESPACE_CONFIG).

In this order the first that says something wins: the command line, TRADESPACE_<COMMAND>_<FLAG>, TRADESPACE_<FLAG>, the file, the default. In the file a
flag's name is a key, for every command that has it; under a command's name it is meant for that one:

    memory: 6GiB
    plan:
      device: rtx-4090
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tradespace.errors import InputError

PREFIX = "TRADESPACE_"
# these name places, not flags
RESERVED = ("HOME", "KERNELS", "CONFIG")


def take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--config FILE`, and the file: the flag's, else the variable's. Raises InputError where the file's name is missing."""
    rest, found = [], os.environ.get(f"{PREFIX}CONFIG")
    words = iter(arguments)
    for word in words:
        if word == "--":
            return [*rest, word, *words], found
        if word == "--config":
            found = next(words, None)
            if found is None:
                raise InputError("--config needs a YAML file: --config tradespace.yaml")
        elif word.startswith("--config="):
            found = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, found


def flags_of(command: Any) -> dict[str, Any]:
    """A command's options by their Python names."""
    return {option.name: option for option in command.params if option.param_type_name == "option" and option.name not in ("help", "version")}


def keys_of(command: Any) -> dict[str, str]:
    """The Python names of a command's options by every long spelling, with underscores, and by themselves."""
    found = {}
    for name, option in flags_of(command).items():
        found |= dict.fromkeys((word.removeprefix("--").replace("-", "_") for word in option.opts if word.startswith("--")), name)
        found[name] = name
    return found


def words_of(command: Any) -> set[str]:
    """Every spelling of a command's flags."""
    return {word for option in command.params if option.param_type_name == "option" for word in (*option.opts, *option.secondary_opts)}


def read_variables(commands: Mapping[str, Any]) -> None:
    """Lets every flag of every command be set by TRADESPACE_<COMMAND>_<FLAG> and TRADESPACE_<FLAG>."""
    for name, command in leaves(commands).items():
        options, own = flags_of(command), name.replace(" ", "_").replace("-", "_").upper()
        for option in options.values():
            option.show_envvar = False  # the rule is one sentence; a list in every message is not
            option.envvar = []
        spelled = [(key.upper(), options[flag]) for key, flag in keys_of(command).items()]
        for upper, option in spelled:
            option.envvar.append(f"{PREFIX}{own}_{upper}")
        for upper, option in spelled:  # those of the command come first
            option.envvar += [f"{PREFIX}{upper}"] if upper not in RESERVED else []


def leaves(commands: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Commands by their whole name ("lab run"), groups opened."""
    found: dict[str, Any] = {}
    for name, command in commands.items():
        inner = getattr(command, "commands", None)
        found |= leaves(inner, f"{path}{name} ") if inner is not None else {f"{path}{name}": command}
    return found


def read_config(path: str, commands: Mapping[str, Any]) -> dict[str, Any]:
    """The file as defaults for each command. Raises InputError for what is no such file, and for a key that no command has, with the closest."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"--config {path}: there is no such file. Give a YAML file with flags as keys, such as 'memory: 6GiB'")
    import yaml  # where there is such a file

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {str(error).splitlines()[0]}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"--config {path} holds a {type(settings).__name__}; it must hold flags as keys, such as 'memory: 6GiB'")
    known = {key for command in leaves(commands).values() for key in keys_of(command)}
    general = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if key in commands:
            continue
        if name not in known:
            close = get_close_matches(name, [*known, *commands], n=2, cutoff=0.6)
            raise InputError(f"--config {path}: no command has a flag '{key}'." + (f" Did you mean {' or '.join(close)}?" if close else ""))
        general[name] = _plain(value, f"--config {path}: {key}")
    defaults: dict[str, Any] = {}
    _fill(defaults, commands, settings, general, f"--config {path}")
    return defaults


def _fill(defaults: MutableMapping[str, Any], commands: Mapping[str, Any], settings: Mapping[str, Any], general: Mapping[str, Any], where: str) -> None:
    for name, command in commands.items():
        own = settings.get(name, {}) if isinstance(settings, dict) else {}
        inner = getattr(command, "commands", None)
        if inner is not None:
            defaults[name] = {}
            _fill(defaults[name], inner, own if isinstance(own, dict) else {}, general, f"{where}: {name}")
            continue
        if name in settings and not isinstance(own, dict):
            raise InputError(f"{where}: {name} is a command; flags go under it, such as '{name}: {{memory: 6GiB}}'")
        flags = keys_of(command)
        defaults[name] = {flags[key]: value for key, value in general.items() if key in flags}
        for key, value in own.items():
            flag = str(key).replace("-", "_")
            if flag not in flags:
                close = get_close_matches(flag, flags, n=2, cutoff=0.6)
                raise InputError(f"{where}: `{name}` has no flag '{key}'." + (f" Did you mean {' or '.join(close)}?" if close else ""))
            defaults[name][flags[flag]] = _plain(value, f"{where}: {name}.{key}")


def _plain(value: Any, where: str) -> Any:
    """Text as the command line would give it; lists for flags that may be given several times."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list):
        return [str(entry) for entry in value]
    if isinstance(value, dict):
        raise InputError(f"{where} holds a mapping; a flag takes one value or a list")
    return str(value)
