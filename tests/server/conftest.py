"""One server for all tests that only ask it; those that hurt theirs start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.running import Server

collect_ignore = ["page_driver.py"]  # runs in a process of its own, and needs Qt


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> tuple[Path, Path]:
    from cli.tiny_model import make_home, save_folder

    return save_folder(tmp_path_factory.mktemp("tiny")), make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def server(places) -> Iterator[Server]:
    found = Server(*places)
    yield found
    found.close()
