"""Chat templates: messages → one prompt, by the Jinja template that a model carries, in a sandbox.

A template comes from a stranger. It is rendered in Jinja's immutable sandbox (no attribute that begins with an underscore, no changing of what it
is given), on plain JSON values only, with limits on its size, its output and its loops. The environment is that of transformers, for which the
templates are written: `trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, `tojson` without HTML escapes,
and `{% generation %}`, which marks the assistant's text for training and renders its body.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tradespace.errors import InputError
from tradespace.units import MiB

MAX_TEMPLATE_CHARS = 1 * MiB
MAX_OUTPUT_CHARS = 64 * MiB
MAX_LOOP_STEPS = 100_000  # of all range() loops of one rendering
MAX_DEPTH = 64  # of nested lists and maps in messages and tools


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way to declare it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a scope of its own, as the call block that transformers makes of it has
        return [jinja2.nodes.Scope(body, lineno=lineno)]


class _Refusal(jinja2.TemplateError):
    """The template itself said no, through raise_exception."""


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


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


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which in addition refuses the arithmetic that a few characters can fill any memory with."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, (str, list, tuple)) else None for side in (left, right)]
        if operator == "**" and not (isinstance(left, (int, float)) and isinstance(right, (int, float)) and abs(left) < 2**32 and abs(right) <= 64):
            raise jinja2.exceptions.SecurityError(f"{left!r:.20} ** {right!r:.20} is too large")
        if operator == "%":
            _check_arguments((left,))
        if operator == "+" and sum(size or 0 for size in sizes) > MAX_OUTPUT_CHARS:
            raise jinja2.exceptions.SecurityError(f"text of more than {MAX_OUTPUT_CHARS} characters")
        if operator == "*":
            size, factor = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            if size is not None and isinstance(factor, int) and size * factor > MAX_OUTPUT_CHARS:
                raise jinja2.exceptions.SecurityError(f"text of more than {MAX_OUTPUT_CHARS} characters")
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(obj, "__self__", None), str):  # ljust, center, zfill …
            _check_arguments((*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

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


def _check_arguments(values: Sequence[Any]) -> None:
    """Refuse numbers and formats that would make text of any length."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_OUTPUT_CHARS:
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


class _BoundedRange:
    """`range`, for all loops of one rendering together at most `MAX_LOOP_STEPS` long: nested, they would not end in a lifetime."""

    def __init__(self) -> None:
        self._left = MAX_LOOP_STEPS

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._left -= len(numbers)
        if self._left < 0:
            raise jinja2.exceptions.SecurityError(f"loops of more than {MAX_LOOP_STEPS} steps")
        return numbers


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters |= {name: _bounded(environment.filters[name]) for name in ("center", "indent", "format")}
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment.from_string(template)


def plain(value: Any, what: str, depth: int = 0) -> Any:
    """A copy of plain JSON values, so that a template meets no object with methods of its own. Raises InputError for anything else."""
    if depth > MAX_DEPTH:
        raise InputError(f"{what} is nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enum or another subclass: only its text
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"{what} has a key that is not a string")
        return {str.__str__(key): plain(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, what, depth + 1) for item in value]
    raise InputError(f"{what} holds a {type(value).__name__}; only strings, numbers, booleans, None, lists and maps are allowed")


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as maps with a `role` (a string) and, usually, `content`. Raises InputError that names the first bad one."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InputError('messages is not a list. Write [{"role": "user", "content": "…"}]')
    if not messages:
        raise InputError("messages is empty. A chat needs at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'message {index} is not a map with a "role". Write {{"role": "user", "content": "…"}}')
        checked.append(plain(message, f"message {index}"))
    return checked


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt for `messages`, special tokens included: encode it with `add_special_tokens=False`.

    `special_tokens` (bos_token, eos_token, …) and `variables` (such as enable_thinking) are the template's to read. Raises InputError with the
    cause for messages that are malformed or that the template refuses, and for a template that is broken, forbidden or boundless.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise InputError(f"the chat template is {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are read")
    values: dict[str, Any] = {**(special_tokens or {}), **plain(variables or {}, "variables")}
    values["messages"] = check_messages(messages)
    values["tools"] = plain(tools, "tools") if tools is not None else None
    values["documents"] = plain(documents, "documents") if documents is not None else None
    values["add_generation_prompt"] = add_generation_prompt
    values["range"] = _BoundedRange()
    try:
        pieces, num_chars = [], 0
        for piece in _compiled(template).generate(values):
            num_chars += len(piece)
            if num_chars > MAX_OUTPUT_CHARS:
                raise InputError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters for these messages: it was stopped")
            pieces.append(piece)
        return "".join(pieces)
    except _Refusal as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the model's chat template is not valid Jinja (line {error.lineno}: {error.message}). Give plain text instead of messages") from error
    except jinja2.exceptions.SecurityError as error:
        raise InputError(f"the model's chat template does something that the sandbox forbids: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        cause = str(error) or type(error).__name__
        raise InputError(f"the model's chat template failed on these messages ({type(error).__name__}: {cause[:300]})") from error
