"""Chat templates: messages → one prompt, by the Jinja template that a model carries, in a sandbox.

A template comes from a stranger. It is rendered in Jinja's immutable sandbox (no attribute that begins with an underscore, no changing of what it
is given), on plain JSON values only, with limits on its size, its steps, its text and its time (`template_sandbox.py`). The environment is that of
transformers, for which the templates are written: `trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, `tojson` without HTML
escapes, and `{% generation %}`, which marks the assistant's text for training and renders its body.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions

from tradespace.errors import InputError
from tradespace.loading.template_sandbox import Refusal, render
from tradespace.units import KiB

MAX_TEMPLATE_CHARS = 64 * KiB
MAX_DEPTH = 64  # of nested lists and maps in messages and tools


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
    try:
        return render(template, values)
    except Refusal as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the model's chat template is not valid Jinja (line {error.lineno}: {error.message}). Give plain text instead of messages") from error
    except jinja2.exceptions.SecurityError as error:
        raise InputError(f"the model's chat template was stopped: it does what the sandbox forbids: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        cause = str(error) or type(error).__name__
        raise InputError(f"the model's chat template failed on these messages ({type(error).__name__}: {cause[:300]})") from error
