"""The README's tables are rendered from results/, never typed."""

from pathlib import Path

import pytest

from tradespace.errors import CorruptFileError, InputError

pytest.importorskip("torch", reason="the experiments that render the tables belong to the torch half")

from tradespace.lab.readme import RENDERED, render

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", RENDERED)
def test_the_documents_say_what_the_records_say(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- record: " in text
    assert render(text, ROOT / "results") == text, f"{name} differs from results/: run make readme"


def test_a_figure_typed_by_hand_is_found():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("<!-- record: paging -->")
    digit = next(index for index in range(start + 30, len(text)) if text[index].isdigit())
    forged = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert render(forged, ROOT / "results") == text


@pytest.mark.parametrize(("text", "error"), [("<!-- record: nothing -->\n<!-- end -->", InputError), ("<!-- record: paging -->\nno end", CorruptFileError)])
def test_a_section_that_nothing_fills_is_an_error(text, error):
    with pytest.raises(error):
        render(text, ROOT / "results")
