"""Chat templates against transformers' own rendering, and templates that are hostile, broken or boundless."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import InputError
from tradespace.loading import template_sandbox
from tradespace.loading.chat_template import render_chat

# written for these tests in the manner of each family: what its published template does, by our own hand
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- set ns = namespace(last=-1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.seen %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- set ns.seen = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
<|im_start|>{{ message.role }}
{{ content }}<|im_end|>
{% if message.tool_calls %}
    {%- for call in message.tool_calls %}
<tool_call>{{ call.function.arguments | tojson }}</tool_call>
    {% endfor %}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant/user/assistant") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)
FAMILIES = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "gemma": GEMMA, "generation": GENERATION}
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<b>é & ü</b>", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich <&>"}}}]}


def by_transformers(template: str, messages: list[dict], **variables: object) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    return utils.render_jinja_template(conversations=[messages], chat_template=template, **{**SPECIAL, **variables})[0][0]


texts = st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=20)
turns = st.lists(texts, min_size=1, max_size=5).map(
    lambda contents: [{"role": "user" if index % 2 == 0 else "assistant", "content": content} for index, content in enumerate(contents)]
)
conversations = st.tuples(st.lists(texts.map(lambda text: {"role": "system", "content": text}), max_size=1), turns).map(lambda parts: parts[0] + parts[1])


@pytest.mark.parametrize("family", FAMILIES)
@given(messages=conversations, generate=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rendered_as_transformers_does(family, messages, generate):
    ours = render_chat(FAMILIES[family], messages, add_generation_prompt=generate, special_tokens=SPECIAL)
    assert ours == by_transformers(FAMILIES[family], messages, add_generation_prompt=generate)


def test_tools_and_variables_as_transformers_has_them():
    messages = [{"role": "user", "content": "hi"}, CALL, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "<think>x</think>\nSun."}]
    ours = render_chat(LLAMA3, messages[:1], tools=TOOLS, special_tokens=SPECIAL, add_generation_prompt=False)
    assert ours == by_transformers(LLAMA3, messages[:1], tools=TOOLS)
    assert "<b>é & ü</b>" in ours  # no HTML escapes, no \u escapes
    for thinking in (True, False):
        ours = render_chat(QWEN, messages, special_tokens=SPECIAL, variables={"enable_thinking": thinking})
        assert ours == by_transformers(QWEN, messages, enable_thinking=thinking, add_generation_prompt=True)


def test_dates():
    assert render_chat("{{ strftime_now('%Y') }}", [{"role": "user"}]) == by_transformers("{{ strftime_now('%Y') }}", [{"role": "user"}])


def test_a_template_that_refuses_says_why():
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        render_chat(GEMMA, [{"role": "assistant", "content": "first"}], special_tokens=SPECIAL)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"not valid Jinja \(line 1"),
        ("{{ undefined_thing.attribute }}", "'undefined_thing' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | nonsense }}", "nonsense"),
        ("{% include 'other' %}", "failed|no loader"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ],
)
def test_broken_templates(template, message):
    with pytest.raises(InputError, match=message):
        render_chat(template, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__['os'] }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ('%s' | format(messages)).__class__.__base__ }}",
        "{{ range.__class__.__init__.__globals__ }}",
        "{{ range._left }}{{ range._left.__class__ }}",
    ],
)
def test_hostile_templates_get_nowhere(template):
    messages = [{"role": "user", "content": "hi"}]
    try:
        rendered = render_chat(template, messages)
    except InputError:
        rendered = ""
    assert rendered == ""  # refused, or an attribute that is undefined there
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ [1] * 10000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ ''.ljust(9999999999) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9999999999) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a\nb' | indent(9999999999) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ],
)
def test_boundless_templates_are_stopped(template, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_CHARS", 1_000_000)
    with pytest.raises(InputError):
        render_chat(template, [{"role": "user", "content": "hi"}])


NESTED = "{% for a in messages[0].content %}" * 9 + "x" + "{% endfor %}" * 9


@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
        "{% set l = [1] * 1000 %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for item in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        "{% set x %}{% for i in range(900000) %}" + "y" * 1000 + "{% endfor %}{% endset %}{{ x | length }}",
        "{% set x = 'a' * 60000000 %}{% for i in range(900000) %}{% if 'b' in x %}{% endif %}{% endfor %}",
        "{% set x = 'a' * 60000000 %}" + "{% if 'b' in x %}{% endif %}" * 2200,
        "{% set x = 'a' * 6000000 %}{% for i in range(900000) %}{{ x[1:] | length }}{% endfor %}",
        "{{ range(199999) | list | sort | unique | list | length }}" * 200,
        "{{ range(49999) | list | sort | unique | list | length }}" * 200,
        "{% set x = ('a' * 60000000) | list %}{{ x | sort | length }}",
        "{{ ('a' * 60000000) | select | list | length }}",
        "{{ (('a ' * 30000000).split(' ')) | sort | length }}",
        "{{ (('a ' * 30000000).split(' ')) | unique | list | length }}",
        "{{ ('a' * 60000000) | join('') | length }}",
    ],
)
def test_templates_that_would_not_end_are_stopped_within_two_seconds(template):
    start_s = time.thread_time()
    with pytest.raises(InputError, match=r"was stopped|RecursionError|recursion"):
        render_chat(template, [{"role": "user", "content": "0123456789"}])
    assert time.thread_time() - start_s < 2


@pytest.mark.parametrize("template", ["{{ a+a+a+a+a+a+a+a+a+a }}" * 2600, "{{ a.b.c(d) }}" * 4600])
def test_compiling_looks_at_the_clock(template, monkeypatch):
    # a fast machine compiles these within the limit that users have, so the clock is tested with a lower one
    with monkeypatch.context() as lower:
        lower.setattr(template_sandbox, "MAX_CPU_S", 0.05)
        with pytest.raises(InputError, match="to compile"):
            render_chat(template, [{"role": "user", "content": "0123456789"}])
    start_s = time.thread_time()
    with pytest.raises(InputError, match=r"to compile|'a' is undefined"):
        render_chat(template, [{"role": "user", "content": "0123456789"}])
    assert time.thread_time() - start_s < 2


def test_long_conversations_are_left_alone():
    messages = [{"role": "user" if turn % 2 == 0 else "assistant", "content": "word " * 4000} for turn in range(400)]  # 8 MB of text
    for template in (CHATML, LLAMA3, QWEN):
        ours = render_chat(template, messages, add_generation_prompt=False, special_tokens={"bos_token": "<bos>"})
        assert ours == by_transformers(template, messages)


def test_ordinary_arithmetic_and_formats_are_left_alone():
    template = (
        "{{ 2 ** 10 }} {{ 'ab' * 3 }} {{ '%05.1f|%s' % (3.14159, 'x') }} {{ '{:>4}'.format(7) }} {{ 7 % 4 }} {{ [1] + [2] }}"
        "{{ 'a' | center(5) }}|{{ 'id 123456789'.strip() }}{{ 'a\nb' | indent(2) }}"
    )
    assert render_chat(template, [{"role": "user"}]) == by_transformers(template, [{"role": "user"}])


def test_output_has_a_limit(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_CHARS", 100)
    with pytest.raises(InputError, match="more than 100 characters"):
        render_chat("{% for i in range(1000) %}ab{{ i }}{% endfor %}", [{"role": "user"}])
    with pytest.raises(InputError, match="at most"):
        render_chat("a" * 2**21, [{"role": "user"}])


class Rogue:
    def __str__(self) -> str:
        raise AssertionError("a template must not meet this object")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "not a list"),
        (b"hi", "not a list"),
        (None, "not a list"),
        (["hi"], 'message 0 is not a map with a "role"'),
        ([{"role": "user"}, {"content": "x"}], "message 1 is not a map"),
        ([{"role": 3}], "message 0"),
        ([{"role": "user", "content": Rogue()}], "message 0 holds a Rogue"),
        ([{"role": "user", "content": {1: 2}}], "a key that is not a string"),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(InputError, match=message):
        render_chat(CHATML, messages)


def test_messages_without_an_end():
    endless: list = []
    endless.append(endless)
    with pytest.raises(InputError, match="nested more than"):
        render_chat(CHATML, [{"role": "user", "content": endless}])
