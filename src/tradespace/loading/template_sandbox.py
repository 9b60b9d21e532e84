"""The sandbox in which a stranger's Jinja template runs: what it may touch, how much it may write, how long it may take.

Jinja's immutable sandbox forbids attributes that begin with an underscore and changes to what the template is given. It has no clock and no measure: a few
nested loops do not end in a lifetime, and a loop around `s ~ s` fills any memory. So every loop, call, filter, comparison and piece of text is counted
against a `Budget`: steps, characters and CPU time of one rendering. Loops, comparisons and `~` are found in the template's syntax tree, as Jinja has no hook
for them; the rest are the environment's own hooks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from tradespace.units import MiB

MAX_CHARS = 64 * MiB  # of all text that a rendering makes, the prompt included
MAX_ITEMS = 50_000  # of a list that a template makes or gives to a filter: sorting is one step, and not interrupted
MAX_STEPS = 1_000_000  # turns of loops, calls, filters and comparisons of a rendering
MAX_CPU_S = 1.0  # of a rendering: a template of 10 KB takes milliseconds


class Budget:
    """What one rendering has used. Each of its methods raises SecurityError where that is too much."""

    def __init__(self) -> None:
        self.steps, self.chars = 0, 0
        self._end_s = time.thread_time() + MAX_CPU_S

    def step(self, chars: int = 0) -> None:
        """One step more, and so many characters."""
        self.steps += 1
        self.chars += chars
        if self.steps > MAX_STEPS:
            raise jinja2.exceptions.SecurityError(f"more than {MAX_STEPS} steps for these messages")
        if self.chars > MAX_CHARS:
            raise jinja2.exceptions.SecurityError(f"text of more than {MAX_CHARS} characters")
        if time.thread_time() > self._end_s:  # the thread's own time: a busy machine does not make a template hostile
            raise jinja2.exceptions.SecurityError(f"work for more than {MAX_CPU_S:.0f} s")


_UNLIMITED = Budget.__new__(Budget)  # while a template is compiled: constants are folded then, and its size is bounded
_UNLIMITED.steps, _UNLIMITED.chars, _UNLIMITED._end_s = -(1 << 62), -(1 << 62), float("inf")
_BUDGET: ContextVar[Budget] = ContextVar("budget", default=_UNLIMITED)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way to declare it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a scope of its own, as the call block that transformers makes of it has
        return [jinja2.nodes.Scope(body, lineno=lineno)]


class Refusal(jinja2.TemplateError):
    """The template itself said no, through raise_exception."""


def _raise_exception(message: object) -> None:
    raise Refusal(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, but for names that begin with an underscore: those would lead to Python's own attributes."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set '{name}'")
        super().__setitem__(name, value)


# these three take the context although they need none: Jinja then cannot compute them while it compiles


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[Any], chars: int) -> Iterable[Any]:
    """What a `for` runs over, each turn counted with the text of the loop's body."""
    return _Counted(items, chars)


class _Counted:
    def __init__(self, items: Iterable[Any], chars: int):
        self._items, self._chars = items, chars

    def __iter__(self) -> Iterator[Any]:
        budget = _BUDGET.get()
        for item in self._items:
            budget.step(self._chars)
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # TypeError where it has none, as Jinja expects


@jinja2.pass_context
def _tick(context: jinja2.runtime.Context, value: Any) -> Any:
    """The value itself, one step later."""
    _BUDGET.get().step()
    return value


@jinja2.pass_context
def _concat(context: jinja2.runtime.Context, parts: Sequence[Any]) -> str:
    """`a ~ b`: the text of both."""
    texts = [str(part) for part in parts]
    _BUDGET.get().step(sum(map(len, texts)))
    return "".join(texts)


def _written(value: Any) -> Any:
    """What `{{ … }}` is about to write."""
    _BUDGET.get().step(len(value) if isinstance(value, str) else 0)
    return value


def _constant_chars(node: jinja2.nodes.Node) -> int:
    """Characters of text that one run of `node` can write at most: all that stands in it."""
    written = sum(len(found.data) for found in node.find_all(jinja2.nodes.TemplateData))
    return written + sum(len(found.value) for found in node.find_all(jinja2.nodes.Const) if isinstance(found.value, str))


class _Parser(jinja2.parser.Parser):
    """Jinja's parser, which looks at the clock."""

    environment: _Environment

    def parse_primary(self, *args: Any, **kwargs: Any) -> jinja2.nodes.Expr:
        self.environment.look_at_clock()
        return super().parse_primary(*args, **kwargs)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Jinja's compiler, which looks at the clock."""

    environment: _Environment

    def visit(self, node: jinja2.nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.environment.look_at_clock()
        return super().visit(node, *args, **kwargs)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which counts, and refuses the arithmetic that a few characters can fill any memory with."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._end_s = time.thread_time() + MAX_CPU_S

    def look_at_clock(self) -> None:
        """Raises SecurityError where the template takes too long to compile."""
        if time.thread_time() > self._end_s:
            raise jinja2.exceptions.SecurityError(f"it takes more than {MAX_CPU_S:.0f} s to compile")

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """The syntax tree, with loops, comparisons and concatenations made to count."""
        tree = _Parser(self, source, name, filename).parse()
        for loop in list(tree.find_all(jinja2.nodes.For)):
            chars = jinja2.nodes.Const(_constant_chars(loop))
            loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [chars], [], None, None)
        for comparison in list(tree.find_all(jinja2.nodes.Compare)):
            comparison.expr = jinja2.nodes.Filter(comparison.expr, "_tick", [], [], None, None)
        for concat in list(tree.find_all(jinja2.nodes.Concat)):
            parts = jinja2.nodes.List(concat.nodes)
            concat.nodes = [jinja2.nodes.Filter(parts, "_concat", [], [], None, None)]
        self.macro_chars = sum(_constant_chars(macro) for macro in tree.find_all((jinja2.nodes.Macro, jinja2.nodes.CallBlock)))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, (str, list, tuple)) else None for side in (left, right)]
        text = isinstance(left, str) or isinstance(right, str)
        size = 0
        if operator == "**" and not (isinstance(left, (int, float)) and isinstance(right, (int, float)) and abs(left) < 2**32 and abs(right) <= 64):
            raise jinja2.exceptions.SecurityError(f"{left!r:.20} ** {right!r:.20} is too large")
        if operator == "%":
            _check_arguments((left,))
        if operator == "+":
            size = sum(found or 0 for found in sizes)
        if operator == "*":
            known, factor = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            size = known * max(0, factor) if known is not None and isinstance(factor, int) else 0
            if known is None and isinstance(left, int) and isinstance(right, int) and max(left.bit_length(), right.bit_length()) > 4096:
                raise jinja2.exceptions.SecurityError("a number of more than 4096 bits")
        if size > MAX_ITEMS and not text:
            raise jinja2.exceptions.SecurityError(f"a list of more than {MAX_ITEMS} items")
        # a list's items count as characters, too: they are copied
        _BUDGET.get().step(size)
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):  # ljust, center, zfill …
            _check_arguments((*args, *kwargs.values()))
            if obj.__name__ in ("replace", "join", "translate", "expandtabs"):
                _check_growth(obj.__name__, owner, args)
        _BUDGET.get().step(self.macro_chars if isinstance(obj, jinja2.runtime.Macro) else len(owner) >> 4 if isinstance(owner, str) else 0)
        return super().call(context, obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _BUDGET.get().step(len(obj) if isinstance(argument, slice) and isinstance(obj, (str, list, tuple)) else 0)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:  # not a string's format method
            return None
        form = value.__self__

        @wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_arguments((form,))
            return wrapped(*args, **kwargs)

        return checked


def _check_growth(method: str, text: str, args: Sequence[Any]) -> None:
    """Counts the text that a string's method may make of it, where that may be much longer."""
    longest = max((len(found) for found in args if isinstance(found, str)), default=0)
    if method == "join":
        items = args[0] if args and isinstance(args[0], (list, tuple, str)) else ()
        _BUDGET.get().step(len(text) * len(items) + sum(len(found) for found in items if isinstance(found, str)))
    else:
        _BUDGET.get().step((len(text) + 1) * (longest + 8))


def _check_arguments(values: Sequence[Any]) -> None:
    """Refuse numbers and formats that would make text of any length."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_CHARS:
            raise jinja2.exceptions.SecurityError(f"a width of {value}")
        if isinstance(value, str) and len(_format_width(value)) > 5:
            raise jinja2.exceptions.SecurityError("a format wider than 99999 characters")


def _bounded(text_filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that takes a width or a format, with both checked."""

    @wraps(text_filter)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_arguments((value if text_filter is jinja2.filters.do_format else "", *args, *kwargs.values()))
        return text_filter(value, *args, **kwargs)

    return checked


def _format_width(form: str) -> str:
    """The longest width or precision in a format. One that is taken from the arguments (`*`, or braces in braces) counts as too wide."""
    if re.search(r"%[-+ #0]*(\*|\d*\.\*)|\{[^{}]*:[^{}]*\{", form):
        return "******"
    return max(re.findall(r"(?:%[-+ #0]*|\{[^{}]*:[^{}]*?|\.)(\d+)", form), key=len, default="")


# filters that go through what they are given item by item, in Python
_ITEM_FILTERS = {
    *("batch", "dictsort", "groupby", "items", "join", "list", "map", "max", "min"),
    *("reject", "rejectattr", "select", "selectattr", "slice", "sort", "sum", "unique"),
}


def _counting(name: str, text_filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's, counted with the size of what it is given."""

    @wraps(text_filter)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = [found for found in args if isinstance(found, (str, list, tuple, dict))]
        if name in _ITEM_FILTERS and given and len(given[0]) > MAX_ITEMS:
            raise jinja2.exceptions.SecurityError(f"'{name}' of more than {MAX_ITEMS} items")
        sizes = [_length(found) for found in given if not isinstance(found, dict)]
        # join and replace put one text between the items or letters of another
        grows = text_filter in (jinja2.filters.sync_do_join, jinja2.filters.do_join, jinja2.filters.do_replace)
        _BUDGET.get().step((sizes[0] + 1) * (max(sizes[1:], default=0) + 1) if grows and sizes else sum(sizes) >> 4)
        found = text_filter(*args, **kwargs)
        return iter(_Counted(found, 0)) if isinstance(found, Iterator) else found

    return counted


def _length(value: str | list[Any] | tuple[Any, ...]) -> int:
    """Characters of a text; items of a list, and the characters of those that are texts."""
    return len(value) if isinstance(value, str) else len(value) + sum(len(item) for item in value if isinstance(item, str))


class CountedRange:
    """`range`, which a template could turn into a list of any length."""

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_ITEMS:
            raise jinja2.exceptions.SecurityError(f"a range of more than {MAX_ITEMS} steps")
        _BUDGET.get().step(len(numbers))
        return numbers


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """The template, ready to be rendered. Raises jinja2.TemplateSyntaxError."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_written)
    environment.filters["tojson"] = _tojson
    environment.filters |= {name: _bounded(environment.filters[name]) for name in ("center", "indent", "format")}
    environment.filters = {name: _counting(name, found) for name, found in environment.filters.items()}
    environment.filters |= {"_counted": _counted, "_tick": _tick, "_concat": _concat}
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, range=CountedRange())
    return environment.from_string(template)


def render(template: str, values: dict[str, Any]) -> str:
    """The template's text for these values, within the limits above. Raises jinja2's errors: SecurityError where it was stopped, Refusal where it said no."""
    budget = Budget()  # before the template is compiled, which is part of what it costs
    ready = compiled(template)
    token = _BUDGET.set(budget)
    try:
        return ready.render(values)
    finally:
        _BUDGET.reset(token)
