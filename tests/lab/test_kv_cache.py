"""`lab kv-cache` on a tiny random model: what it measures, what its numbers make it say, and what it leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cli.conftest import Ran, cli, folder, home  # noqa: F401 - fixtures
from tradespace.errors import InputError
from tradespace.lab import kv_cache, kv_cache_findings, kv_cache_simulation
from tradespace.lab.claims import decide, load_claims
from tradespace.lab.claims_found import CONFIRMED, HOLDS_IF, NOT_MEASURED, REFUTED, VERDICT_WORDS
from tradespace.lab.claims_kv import KV
from tradespace.lab.kv_cache_files import PAGE, PICTURE, RESULTS
from tradespace.lab.kv_cache_findings import Recomputing, crossing, verdict_of
from tradespace.lab.kv_cache_kinds import FULL, IDS, INPUT, RECENT, caches
from tradespace.measure.record import Figure, Record, read_record
from tradespace.spec.zoo import find_model

LENGTHS = (64, 128)


@pytest.fixture(scope="module")
def small_toy() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    whole = kv_cache_simulation.simulate
    patch.setattr(kv_cache_simulation, "simulate", lambda *, quick: whole(quick=quick, length=256, width=64, heads=4))
    yield
    patch.undo()


@pytest.fixture
def ran(cli: Callable[..., Ran], folder: Path, tmp_path: Path, small_toy) -> tuple[Ran, Path]:  # noqa: F811
    text = tmp_path / "text"
    text.write_text("why is the sky blue? because light is scattered by a lazy dog. " * 60)
    out = tmp_path / "out"
    return cli("lab", "kv-cache", folder, "--lengths", "64,128", "--text", text, "--quick", "-o", out), out


@pytest.fixture
def record(ran: tuple[Ran, Path]) -> Record:
    return read_record(ran[1] / "kv_cache.json")


def test_everything_is_written_and_said(ran, record):
    done, out = ran
    assert done.code == 0, done.err
    assert "about" in done.err.splitlines()[0] + done.err.splitlines()[1]
    assert all(word in " ".join(done.out.split()) for word in ("(a) A small window", "(b) Rebuilding exactly", "really cached", "by reading"))
    assert {path.name for path in out.iterdir()} == {"kv_cache.json", RESULTS, PICTURE, PAGE}
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    page = (out / PAGE).read_text()
    assert "Rebuilding exactly" in page and "<script" in page
    found = json.loads((out / RESULTS).read_text())
    assert set(found["lengths"]) == {"64", "128"}
    assert found["lengths"]["64"][FULL]["exact"]
    assert len(found["claim"]) == 4
    assert {kind.name for kind in caches(64, quick=True)} == set(found["lengths"]["64"])

    # every cache: bytes as stated, exact ones exact, times and their number in the row
    for row in record.rows:
        if row["part"] != "model":
            continue
        assert row["bytes"] == row["spec_bytes"], row["name"]
        assert row["exact"] == (row["name"] in (FULL, RECENT, IDS, INPUT))
        if row["exact"]:
            assert row["mean_kl"] < 1e-8
            assert row["top1_agreement"] == 1
        assert row["timed_tokens"] == len(record.figures[f"model: {row['name']} at {row['n']}"].values)
        assert row["timed_tokens"] >= 2

    # the audit reads it
    claims = load_claims()
    for number in KV:
        found = decide(claims[number], lambda name: record)
        assert found.verdict in VERDICT_WORDS and found.verdict != NOT_MEASURED
    assert decide(claims[34], lambda name: record).verdict == CONFIRMED

    # a part alone leaves the other one
    toy = replace(record, rows=tuple(row for row in record.rows if row["part"] == "simulation"))
    assert decide(claims[34], lambda name: toy).verdict == NOT_MEASURED
    assert kv_cache.markdown(toy)


def test_the_simulation_alone_keeps_what_was_measured_before(ran, cli, record):  # noqa: F811
    out = ran[1]
    done = cli("lab", "kv-cache", "--published-simulation", "--quick", "-o", out)
    assert done.code == 0, done.err
    again = read_record(out / "kv_cache.json")
    assert kv_cache_findings.lengths(again) == list(LENGTHS)
    assert [row["way"] for row in again.rows if row["part"] == "simulation"] == ["afresh"] * 3 + ["cached"] * 3


def test_bad_lengths_are_errors(cli, folder):  # noqa: F811
    cli("lab", "kv-cache", folder, "--lengths", "many").failed(2, "--lengths many")
    cli("lab", "kv-cache", folder, "--lengths", "8").failed(2, "at least 64")
    cli("lab", "kv-cache", folder, "--text", "nowhere").failed(2, "nowhere")


def test_lengths_are_clipped_to_the_context():
    said = []
    assert kv_cache.clipped((512, 4096, 2048), find_model("gpt2"), said.append) == [512, 1024]
    assert "1,024" in said[0]
    with pytest.raises(InputError):
        kv_cache.clipped((), find_model("gpt2"), said.append)


def test_words_follow_the_numbers():
    def at(n: int, compute_s: float) -> Recomputing:
        return Recomputing(n=n, saved_bytes=1000 * n, compute_s=compute_s, read_s=1e-6 * n)

    assert "at no length" in crossing([at(100, 1.0), at(1000, 20.0)])
    assert "from 1.0e+06 tokens on" in crossing([at(100, 0.01), at(10_000, 0.1)])
    assert "already" in crossing([at(100, 1e-5), at(1000, 1e-4)])
    assert at(100, 0.1).pays_below == pytest.approx(1e6)
    assert replace(at(100, 0.1), saved_bytes=-1).pays_below is None
    assert [verdict_of(6.8, 21.0), verdict_of(7, 50), verdict_of(1.2, 1.3)] == [CONFIRMED, HOLDS_IF, REFUTED]


def test_the_published_ratios_hold_under_their_own_rules_alone(record):
    claims = load_claims()
    for afresh, verdict in (((6.8, 21), CONFIRMED), ((6.8, 50), HOLDS_IF), ((2, 3), REFUTED)):
        figures = dict(record.figures)
        for name, ratio in zip(("√n", "O(1)"), afresh, strict=True):
            figures[f"simulation: afresh {name} over full"] = Figure.of([ratio], "×")
        changed = replace(record, figures=figures)
        assert decide(claims[50], lambda name, changed=changed: changed).verdict == verdict
        real = decide(claims[51], lambda name, changed=changed: changed)
        assert real.verdict == (REFUTED if verdict == REFUTED else HOLDS_IF)
