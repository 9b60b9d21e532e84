"""Models from the Hugging Face Hub, through huggingface_hub: its cache, and HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT as it reads them.

Only data is fetched: configuration, tokenizer, chat template and safetensors (or the one GGUF file that was named). Never a pickle
(*.bin, *.pt) and never a *.py: code from a model's repository is not run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tradespace.errors import DownloadError, InputError
from tradespace.loading.transfer import require_free

# every configuration file that resolve or the tokenizer reads
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[^:\\]+\.gguf))?")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """`org/name`, or `org/name:FILE.gguf`."""

    repo: str
    gguf_file: str | None = None


def parse_hub_name(model: str) -> HubName | None:
    """The Hub name that `model` spells, or None if it does not look like one.

    >>> parse_hub_name("org/name:sub/model.Q4_0.gguf")
    HubName(repo='org/name', gguf_file='sub/model.Q4_0.gguf')
    >>> parse_hub_name("./folder"), parse_hub_name("a/b/c"), parse_hub_name("smollm2-135m")
    (None, None, None)
    """
    match = _HUB_NAME.fullmatch(model)
    if match is None or ".." in model:
        return None
    return HubName(repo=match["repo"], gguf_file=match["file"])


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository; size 0 where the Hub does not say."""

    name: str
    size_bytes: int


def wanted_files(names: list[str], hub_name: HubName) -> list[str]:
    """Which of a repository's files a pull fetches. Raises DownloadError if no weights among them can be read."""
    if hub_name.gguf_file is not None:
        if hub_name.gguf_file not in names:
            ggufs = [name for name in names if name.endswith(".gguf")]
            raise DownloadError(f"{hub_name.repo} has no {hub_name.gguf_file}. GGUF files there: {', '.join(ggufs[:20]) or 'none'}")
        return [hub_name.gguf_file]
    small = [name for name in (*SMALL_FILES, *TEMPLATE_FILES) if name in names]
    if INDEX_FILE in names:
        weights = [INDEX_FILE, *sorted(name for name in names if _SHARD.fullmatch(name))]
    else:
        weights = [SINGLE_FILE] if SINGLE_FILE in names else []
    if not weights:
        ggufs = [name for name in names if name.endswith(".gguf")]
        if ggufs:
            raise DownloadError(f"{hub_name.repo} holds GGUF files: name one, for example {hub_name.repo}:{ggufs[0]}")
        pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        why = "only pickled weights, which can run code when they are read" if pickles else "no weights"
        raise DownloadError(f"{hub_name.repo} holds {why}; tradespace reads safetensors and GGUF. Look for a converted repository of the same model")
    return small + weights


def list_hub_files(hub_name: HubName, revision: str | None) -> list[HubFile]:
    """The files that a pull of this name fetches, with their sizes. Needs the network."""
    from huggingface_hub import HfApi

    with hub_errors(hub_name.repo, revision):
        siblings = HfApi().model_info(hub_name.repo, revision=revision, files_metadata=True).siblings or []
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    return [HubFile(name=name, size_bytes=sizes[name]) for name in wanted_files(list(sizes), hub_name)]


def missing_files(hub_name: HubName, files: list[HubFile], revision: str | None) -> list[HubFile]:
    """Those of `files` that the Hub's cache does not hold."""
    from huggingface_hub import try_to_load_from_cache

    return [file for file in files if not isinstance(try_to_load_from_cache(hub_name.repo, file.name, revision=revision), str)]


def cached_files(hub_name: HubName, revision: str | None) -> Path | None:
    """The snapshot folder (or GGUF file) in the Hub's cache, or None if it is not there; no network."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if hub_name.gguf_file is not None:
        path = try_to_load_from_cache(hub_name.repo, hub_name.gguf_file, revision=revision)
        return Path(path) if isinstance(path, str) else None
    try:
        folder = Path(snapshot_download(hub_name.repo, revision=revision, local_files_only=True, allow_patterns=[*SMALL_FILES, *TEMPLATE_FILES]))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        return None
    return folder if (folder / "config.json").exists() else None


def fetch_from_hub(hub_name: HubName, *, revision: str | None, offline: bool, progress: bool) -> Path:
    """Download what is missing into the Hub's cache; the snapshot folder, or the GGUF file if one was named. Raises DownloadError."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if offline or constants.HF_HUB_OFFLINE:
        path = cached_files(hub_name, revision)
        if path is None:
            at = f" at revision {revision}" if revision else ""
            raise DownloadError(f"{hub_name.repo}{at} is not in the Hub cache, and this is offline. Run once with a network: tradespace pull {hub_name.repo}")
        return path
    files = list_hub_files(hub_name, revision)
    missing_bytes = sum(file.size_bytes for file in missing_files(hub_name, files, revision))
    require_free(Path(constants.HF_HUB_CACHE), missing_bytes, hub_name.repo, variable="HF_HOME")
    was_disabled = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        with hub_errors(hub_name.repo, revision):
            if hub_name.gguf_file is not None:
                return Path(hf_hub_download(hub_name.repo, hub_name.gguf_file, revision=revision))
            return Path(snapshot_download(hub_name.repo, revision=revision, allow_patterns=[file.name for file in files]))
    finally:
        if not progress and not was_disabled:
            enable_progress_bars()


def fetch_config(hub_name: HubName, *, revision: str | None, offline: bool) -> Path:
    """config.json alone, for planning without weights: its path in the Hub's cache. Raises DownloadError."""
    from huggingface_hub import constants, hf_hub_download

    with hub_errors(hub_name.repo, revision):
        return Path(hf_hub_download(hub_name.repo, "config.json", revision=revision, local_files_only=offline or constants.HF_HUB_OFFLINE))


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises, as a DownloadError with its cause and a remedy."""
    from huggingface_hub import errors

    # the HTTP library under huggingface_hub has changed twice; the base of its own HTTP error is that library's
    http_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]

    at = f" at revision '{revision}'" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        remedy = "Accept the licence on the model's page, then set HF_TOKEN to a token of that account (or run: hf auth login)"
        raise DownloadError(f"{repo} is gated: its owner asks you to accept a licence. {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision '{revision}'. Leave --revision out for the default branch, or name a branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        remedy = "Check the spelling; if it is private, set HF_TOKEN to a token that may read it"
        raise DownloadError(f"the Hub knows no model {repo} that we may see (it answers so for private ones, too). {remedy}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DownloadError(f"{repo}{at} is not in the Hub cache and the Hub cannot be reached. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE") from error
    except errors.EntryNotFoundError as error:
        raise DownloadError(f"{repo}{at}: a file is missing on the Hub ({_first_line(error)})") from error
    except errors.HFValidationError as error:
        raise InputError(f"'{repo}' is not a Hub name ({_first_line(error)}). Write org/name") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = "Set HF_TOKEN to a token that may read it" if status in (401, 403) else "Try again later"
        raise DownloadError(f"{repo}{at}: the Hub answered {status or _first_line(error)}. {remedy}") from error
    except (http_error, ConnectionError, TimeoutError) as error:
        raise _unreachable(repo + at, error) from error
    except OSError as error:
        if error.errno is None:  # requests' errors are OSErrors without a number
            raise _unreachable(repo + at, error) from error
        raise DownloadError(f"{repo}{at}: {error.strerror}. Check the Hub cache's folder (HF_HOME) and its free space") from error


def _unreachable(what: str, error: BaseException) -> DownloadError:
    reason = _first_line(error) or type(error).__name__
    return DownloadError(f"{what}: the Hub cannot be reached ({reason}). Check the network, or use --offline with a model that was pulled")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


def scan_cached_models() -> list[tuple[str, Path, int]]:
    """(repo id, folder, bytes on disk) of every model in the Hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    return sorted((repo.repo_id, repo.repo_path, repo.size_on_disk) for repo in cache.repos if repo.repo_type == "model")
