"""The tables of experiment `quantizers`, made of its record alone: every row, and for every bar whether it holds, with the figures that say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp, expm1, hypot
from typing import Any

from tradespace.lab.common import markdown_table
from tradespace.measure.record import Record
from tradespace.units import format_bytes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """One sentence that must hold on one model. `holds` None: the record has not what it takes."""

    model: str
    sentence: str
    figures: str
    holds: bool


class Rows:
    """The rows of one model, by what was asked for."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def find(self, fmt: str, method: str, **other: str) -> Row | None:
        """The row of a format (its beginning is enough) by a method; scope linears and one format for all unless said otherwise."""
        wanted = {"scope": "linears", "rule": "uniform", "like": ""} | other
        return next(
            (row for row in self.rows if row["format"].startswith(fmt) and row["method"] == method and all(row[k] == v for k, v in wanted.items())), None
        )


def bars(record: Record) -> list[Bar]:
    """Every bar that the record's rows can judge, model by model."""
    found: list[Bar] = []
    for model in dict.fromkeys(row["model"] for row in record.rows):
        rows = Rows([row for row in record.rows if row["model"] == model])
        found += [*_methods(model, rows), *_two_bits(model, rows), *_allocate(model, rows), *_smooth(model, rows), *_claims(model, rows)]
    return found


def _kl(row: Row) -> str:
    return f"{row['mean_kl']:.4g} ± {row['kl_error']:.1g}"


def _below(model: str, sentence: str, low: Row | None, high: Row | None, *, share: float = 1.0) -> Iterator[Bar]:
    """low's KL is below `share` of high's, by more than the standard error of the difference if tokens were drawn anew for both."""
    if low is None or high is None:
        return
    gap, error = share * high["mean_kl"] - low["mean_kl"], hypot(share * high["kl_error"], low["kl_error"])
    close = f" (the difference is {gap / error:.1f} of its standard error)" if error and 0 < gap < 2 * error else ""
    yield Bar(model, sentence, f"{_kl(low)} against {_kl(high)}{close}", gap > 0)


def _methods(model: str, rows: Rows) -> Iterator[Bar]:
    for bits in (4, 3):
        for method in ("gptq", "awq"):
            for plain, name in (("rtn", "RTN"), ("rtn-search", "RTN with searched scales")):
                yield from _below(model, f"{method.upper()} < {name} at int{bits}", rows.find(f"int{bits}", method), rows.find(f"int{bits}", plain))


def _two_bits(model: str, rows: Rows) -> Iterator[Bar]:
    integer = rows.find("int2-g64", "gptq")
    for method, name in (("gptq", "e8 at 2 bits"), ("gptaq", "e8 at 2 bits by GPTAQ")):
        lattice = rows.find("e8", method)
        yield from _below(model, f"{name} < half of GPTQ at int2-g64", lattice, integer, share=0.5)
        if lattice and integer:
            yield Bar(model, f"{name}: with fewer bytes", f"{lattice['bytes']:,} against {integer['bytes']:,}", lattice["bytes"] < integer["bytes"])


def _allocate(model: str, rows: Rows) -> Iterator[Bar]:
    for bits in (4, 3):
        for rule, name in (("uniform", f"int{bits} throughout"), ("first-last", f"first and last in 16 bits, int{bits} between")):
            chosen = rows.find(f"int{bits}", "gptq", scope="all", rule="allocate", like=rule)
            yield from _below(model, f"allocate < {name}, at most its bytes", chosen, rows.find(f"int{bits}", "gptq", scope="all", rule=rule))


def _smooth(model: str, rows: Rows) -> Iterator[Bar]:
    plain, dense = rows.find("w8a8", "rtn"), rows.find("bf16", "rtn", scope="all")
    if not (plain and dense):
        return
    high = plain["perplexity"] / dense["perplexity"] - 1
    names = {"smoothquant": "α for the model", "smooth-search": "searched scales and GPTAQ", "hadamard-smooth": "rotated, searched scales and GPTAQ"}
    for method, name in names.items():
        smooth = rows.find("w8a8", method)
        if not smooth:
            continue
        low = smooth["perplexity"] / dense["perplexity"] - 1
        figures = f"{smooth['perplexity']:.4f}, {low:+.2%}; plain {plain['perplexity']:.4f}, {high:+.2%}; bf16 {dense['perplexity']:.4f}"
        yield Bar(model, f"SmoothQuant W8A8 ({name}) within 0.5% of bf16's perplexity, plain W8A8 not", figures, low <= 0.005 < high)


def _claims(model: str, rows: Rows) -> Iterator[Bar]:
    for words, most, fmt, method, scope in (
        ("INT8 costs < 1% of perplexity", 0.01, "int8", "rtn", "all"),
        ("INT4 costs at most 3% of perplexity, rounded to nearest", 0.03, "int4", "rtn", "all"),
        ("INT4 costs at most 3% of perplexity, linears by GPTQ", 0.03, "int4", "gptq", "linears"),
        ("INT4 costs at most 3% of perplexity, linears by AWQ", 0.03, "int4", "awq", "linears"),
    ):
        row = rows.find(fmt, method, scope=scope)
        if row:
            yield Bar(model, f"claim: {words}", increase(row), expm1(row["log_ratio"]) < most)


def increase(row: Row) -> str:
    """Of the perplexity over the file's own, with its standard error, tokens paired."""
    return f"{expm1(row['log_ratio']):+.2%} ± {exp(row['log_ratio']) * row['log_ratio_error']:.2%}"


def markdown(record: Record) -> str:
    header = ("model (stored)", "scope", "formats", "method", "weights", "bits", "mean KL, nats", "99%", "same top token", "perplexity")
    rows = [
        (
            f"{r['model']} ({r['stored']})",
            r["scope"],
            r["format"] if r["rule"] == "uniform" else f"{r['rule']} at {r['format']}" + (f" {r['like']}'s bytes" if r["like"] else ""),
            r["method"] + (f", α {r['alpha']}" if "alpha" in r else ""),
            format_bytes(r["bytes"]),
            f"{r['bits_per_weight']:.2f}",
            _kl(r),
            f"{r['p99_kl']:.3g}",
            f"{r['top1_agreement']:.1%}",
            f"{r['perplexity']:.4g} ({increase(r)})",
        )
        for r in record.rows
    ]
    judged = [(bar.model, bar.sentence, "held" if bar.holds else "NOT held", bar.figures) for bar in bars(record)]
    tables = (markdown_table(header, rows, left=4), markdown_table(("model", "bar", "verdict", "figures"), judged, left=4))
    return "\n\n".join((*tables, record.notes + "."))
