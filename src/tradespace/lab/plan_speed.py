"""How long an answer takes without torch: the search over the whole space, and the command around it.

Each repeat is a process of its own, as a visitor's is, so that nothing is remembered from the one before. "search" is `plan` with the best plan, the frontier
and the reasons why the rest lost; "command" is `tradespace plan …` from its start to its end, imports and drawing included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tradespace.errors import EngineError
from tradespace.lab.common import command_line, markdown_table, timed_process
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

QUESTIONS = (("llama-2-70b", "40GB", "a100-40gb"), ("llama-2-7b", None, "rtx-4090"), ("llama-3.1-405b", None, "8x h100-80gb"))
LIMIT_S = 2.0  # of a search
_SEARCH = """
import sys, time
import tradespace as ts
model, memory, device = sys.argv[1:]
start = time.perf_counter()
found = ts.plan(model, memory=memory or None, device=device)
answer = found.best, found.pareto, found.why_not
print(time.perf_counter() - start, len(found.candidates), "torch" in sys.modules, found.best is None)
"""


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Search and command of three questions, interleaved; medians of 7."""
    rounds = 3 if quick else 7
    search: dict[str, list[float]] = {model: [] for model, _, _ in QUESTIONS}
    command: dict[str, list[float]] = {model: [] for model, _, _ in QUESTIONS}
    plans: dict[str, int] = {}
    for _ in range(rounds):
        for model, memory, device in QUESTIONS:
            seconds, count, torch, nothing = timed_process([sys.executable, "-c", _SEARCH, model, memory or "", device])[1].split()
            if torch == "True" or nothing == "True":
                raise EngineError(f"{model}: " + ("the search loaded torch" if torch == "True" else "no plan fits"))
            search[model].append(float(seconds))
            plans[model] = int(count)
            arguments = [sys.executable, "-m", "tradespace", "plan", model, *(("--memory", memory) if memory else ()), "--device", device]
            command[model].append(timed_process(arguments)[0])
    figures = {f"search {model}": Figure.of(values, "s") for model, values in search.items()}
    figures |= {f"command {model}": Figure.of(values, "s") for model, values in command.items()}
    rows = [{"model": model, "memory": memory or "", "device": device, "plans": plans[model]} for model, memory, device in QUESTIONS]
    for model in search:
        say(f"{model}: {plans[model]} plans, search {figures[f'search {model}'].median:.2f} s, command {figures[f'command {model}'].median:.2f} s")
    notes = f"each repeat a fresh process; search: plan, best, frontier and reasons (bar for llama-3.1-405b: {LIMIT_S} s); command: tradespace plan, whole"
    return new_record("plan-speed", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    """Seconds of each question: search and whole command."""
    rows = []
    for row in record.rows:
        search, command = (record.figures[f"{what} {row['model']}"] for what in ("search", "command"))
        asked = f"{row['model']}, {row['memory'] + ' on ' if row['memory'] else ''}{row['device']}"
        rows.append((asked, f"{row['plans']:,}", f"{search.median:.2f} [{search.min:.2f}–{search.max:.2f}]", f"{command.median:.2f}"))
    return markdown_table(("question", "plans priced", "search, s", "command, s"), rows)
