"""The picture of a frontier: its data are the frontier's, the page needs nothing from outside."""

import json
import re
import sys

import pytest

from tradespace.api import plan
from tradespace.cli.plan_plot import save_plot
from tradespace.errors import InputError, TradespaceError
from tradespace.planner.plot import plot_data, plot_html


@pytest.fixture(scope="module")
def frontier():
    return plan("qwen3-0.6b", memory="4GB", device="ryzen-7950x")


def test_data_are_the_frontiers(frontier):
    data = json.loads(json.dumps(plot_data(frontier)))
    assert len(data["frontier"]) + data["unplaced"] == len(frontier.pareto)
    assert data["best"]["bytes"] == frontier.best.total_bytes and data["best"]["speed"] == frontier.best.decode_tokens_per_s.value
    assert sum(line["bytes"] for line in data["ledger"]) >= data["peak"] > 0
    assert data["peak"] <= data["budget"] == frontier.question.memory_bytes


def test_page_is_self_contained(frontier):
    page = plot_html(frontier)
    assert not re.findall(r"(?:src|href)=|@import|fetch\(", page) and page.count("http") == page.count("http://www.w3.org/2000/svg")
    assert page.count("</script>") == 1 and "%DATA%" not in page and "qwen3-0.6b" in page


def test_nothing_fits_is_still_a_page():
    page = plot_html(plan("llama-2-70b", memory="1GB", device="ryzen-7950x"))
    assert '"best": null' in page


def test_files(frontier, tmp_path, monkeypatch):
    save_plot(tmp_path / "f.html", frontier)
    assert (tmp_path / "f.html").read_text() == plot_html(frontier)
    pytest.importorskip("matplotlib")
    save_plot(tmp_path / "f.png", frontier)
    assert (tmp_path / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(InputError, match=r"ends in .html or .png"):
        save_plot(tmp_path / "f.pdf", frontier)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TradespaceError, match="html, which needs nothing"):
        save_plot(tmp_path / "g.png", frontier)
