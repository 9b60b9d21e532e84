"""`tradespace plan`: the byte ledger of the best plan, the Pareto frontier, and why every other family of options lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.markup import escape

from tradespace.cli.options import (
    Activations,
    AttentionPattern,
    Context,
    Goal,
    Json,
    KVRetain,
    KVStore,
    Memory,
    Offline,
    PlannedModel,
    Revision,
    console,
    error_dict,
    print_json,
    write_file,
)
from tradespace.spec.workload import Workload

if TYPE_CHECKING:
    from tradespace.planner.candidate import Candidate


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    model: PlannedModel,
    memory: Memory = None,
    device: Annotated[str | None, typer.Option("--device", help="a100-40gb, '2x h100-80gb', rtx-4090, m4-max …; default: this machine, measured.")] = None,
    device_memory: Annotated[str | None, typer.Option("--device-memory", help="Budget of each device, when it is not --memory.")] = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory", help="What the host may hold for layers that are streamed.")] = None,
    context: Context = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-np", min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Prompt tokens of a typical request.")] = None,
    output: Annotated[int | None, typer.Option("--output", min=1, help="Output tokens of a typical request.")] = None,
    goal: Annotated[Goal, typer.Option("--goal", help="What to be fast at.")] = "latency",
    weights: Annotated[str | None, typer.Option("--weights", help="Fix the weight format (bf16, int8, int4, nf4 …).")] = None,
    kv_store: KVStore = None,
    kv_retain: KVRetain = None,
    kv_layout: Annotated[str | None, typer.Option("--kv-layout", help="Fix the cache's layout (paged, contiguous).")] = None,
    attention: Annotated[str | None, typer.Option("--attention", help="Fix the attention kernel (native, sdpa, chunked, reference).")] = None,
    attention_pattern: AttentionPattern = None,
    activations: Activations = None,
    runnable: Annotated[bool, typer.Option("--runnable", help="Only what this version can run; leave out what is priced for later.")] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Write the best plan as YAML; `tradespace run --plan FILE` obeys it.")] = None,
    export: Annotated[str | None, typer.Option("--export", help="Print the best plan for vllm, sglang, llama.cpp, ollama, transformers or trl.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the frontier and the ledger into FILE.html (one self-contained file) or FILE.png.")] = None,
    what_if: Annotated[
        str | None, typer.Option("--what-if", help="Other proportions beside the model's own: layers=40,width=8192,kv_heads=8,ffn_ratio=4")
    ] = None,
    equal_parameters: Annotated[bool, typer.Option("--equal-parameters", help="With --what-if: adjust the depth so that parameters stay equal.")] = False,
    revision: Revision = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Search every plan for MODEL within a budget and show what each one costs. No weights are needed, and no torch.

    Example: tradespace plan llama-2-70b --memory 40GB --device a100-40gb
    """
    from tradespace import api
    from tradespace.cli.plan_view import alternatives_view, frontier_view, ledger_view, rejections_view, size, what_if_view
    from tradespace.planner.explain import alternatives, compare_shapes
    from tradespace.spec.attention_imposed import impose

    if export is not None or plot is not None:
        from tradespace.cli.plan_plot import check_wishes

        check_wishes(export, plot)
    spec = impose(api.find_spec(model, revision=revision, offline=offline), attention_pattern or "")
    machine = api.find_machine(device)
    work = api.workload(spec, context=context, concurrency=concurrency, prompt=prompt, output=output, goal=goal)
    budget = api.budget_bytes(device_memory if device_memory is not None else memory, machine)
    if what_if is not None:
        other = api.what_if(spec, what_if, equal_parameters=equal_parameters)
        rows = compare_shapes([spec, other], machine, work)
        print_json(rows) if json else console().print(what_if_view(rows))
        return
    pins = {
        "weights": weights, "kv_store": kv_store, "kv_retain": kv_retain, "layout": kv_layout, "attention": attention, "activations": activations,
    }  # fmt: skip
    frontier = api.plan(
        spec,
        memory=budget,
        device=machine,
        host_memory=host_memory,
        context=work.context_tokens,
        concurrency=concurrency,
        prompt=work.prompt_tokens,
        output=work.output_tokens,
        goal=goal,
        runnable_only=runnable,
        pins={axis: value for axis, value in pins.items() if value},
        stored=api.weights_at_hand(model, revision),
    )
    whole = not any(pins.values()) and not runnable and host_memory is None
    others = alternatives(spec, machine, work, budget, frontier=frontier if whole else None)
    if save is not None:
        save_plan(save, frontier)
    if plot is not None:
        from tradespace.cli.plan_plot import save_plot

        save_plot(plot, frontier)
    error = None if frontier.best is not None else api.no_plan(frontier)
    if export is not None and frontier.best is not None:
        show_export(frontier.best, export, model, as_json=json)
        return
    if json:
        print_json(frontier.to_dict() | {"alternatives": others} | (error_dict(error, error.exit_code) if error else {}))
        if error is not None:  # it is in the document: `main` would write a second one
            console(stderr=True).print(f"error: {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(error.exit_code)
    else:
        out = console()
        out.print(headline(spec.name, machine.name, budget, work), soft_wrap=True)
        if spec.plan_only:
            out.print(f"plan only: {spec.plan_only}", style="yellow", soft_wrap=True)
        if spec.quantization and spec.published_bytes is not None:
            out.print(f"published as {spec.quantization}: {size(spec.published_bytes)} of weights as stored, by its config", soft_wrap=True)
        if frontier.best is not None:
            out.print(ledger_view(frontier.best.ledger, title=f"best: {frontier.best.plan.describe()}"))
        out.print(frontier_view(frontier))
        out.print(rejections_view(frontier))
        if others:
            out.print(alternatives_view(others))
        if save is not None:
            out.print(f"saved {save}; obey it with: tradespace run {model} --plan {save} 'prompt'", soft_wrap=True)
        if plot is not None:
            out.print(f"drawn: {plot}", soft_wrap=True)
    if error is not None:
        raise error


def show_export(best: Candidate, tool: str, model: str, *, as_json: bool) -> None:
    """The best plan in another tool's words, and nothing else on standard output."""
    from tradespace.cli.plan_plot import print_export
    from tradespace.planner.export import export

    found = export(best, tool, model)
    print_json(found) if as_json else print_export(found)


def headline(model: str, device: str, budget: int, work: Workload) -> str:
    """What was asked, in one line."""
    from tradespace.units import format_bytes

    return (
        f"{model} in {format_bytes(budget)} ({format_bytes(budget, decimal=True)}) on {device}: {work.concurrency} × {work.context_tokens:,} tokens, "
        f"prompt {work.prompt_tokens:,}, output {work.output_tokens:,}, for {work.goal}"
    )


def save_plan(path: Path, frontier) -> None:
    """The best plan as YAML, whole or not at all."""
    if frontier.best is None:
        return  # the budget error that follows says why there is nothing to save
    write_file(path, yaml.safe_dump(frontier.best.plan.to_dict(), sort_keys=False), "--save")
