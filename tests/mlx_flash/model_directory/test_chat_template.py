"""Chat templates that loop or fill memory are refused; those that people use pass."""

import time

import pytest

from mlx_flash.common.platform import current_platform
from mlx_flash.model_directory import chat_template
from mlx_flash.model_directory.chat_template import TemplateLimit, try_out

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
LONG = "range(99999)"
BOMBS = {
    "loops": f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}{{% endfor %}}{{% endfor %}}",
    "loops that print": f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}x{{% endfor %}}"
    "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long text, in steps": "{% set n = 1000 * 1000 * 1000 %}{{ 'a' * n }}",
    "a long list": "{{ [1] * 1000000000 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "adding": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "a width": "{{ 'a'|center(1000000000) }}",
    "a method's width": "{{ 'a'.ljust(10000000000) }}",
    "a format": "{{ '%9999999999d'|format(1) }}{{ '%9999999999d' % 1 }}",
    "a star": "{{ '%*d' % (999999999, 1) }}",
    "str.format": "{{ '{:9999999999}'.format(1) }}",
    "a nested format": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a.join(['b'] * 1000000) }}",
    "a list of long texts": "{% set a = 'a' * 1000000 %}{{ ([a] * 100000)|join }}",
    "nested lists": "{% set a = ['a'] * 1000 %}{% set b = [a, a, a, a, a, a, a, a, a, a] %}"
    "{% set c = [b, b, b, b, b, b, b, b, b, b] %}{% set d = [c, c, c, c, c, c, c, c, c, c] %}"
    "{% set e = [d, d, d, d, d, d, d, d, d, d] %}{{ [e, e, e, e, e, e, e, e, e, e]|tojson }}",
    "many long texts": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = n.x + ['a' * 1000000 ~ i] %}{% endfor %}",
    "made-up text": "{{ lipsum(n=100000000) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon_and_small(name, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    before, start = current_platform().process_bytes(), time.process_time()
    with pytest.raises(TemplateLimit):
        try_out(BOMBS[name], [CHAT], {})
    assert time.process_time() - start < 15
    assert current_platform().process_bytes() - before < 600e6


def test_a_long_template():
    with pytest.raises(TemplateLimit, match="characters"):
        try_out("a" * (chat_template.MAX_TEMPLATE + 1), [CHAT], {})


CHATML = (
    "{{ '{{ {} {} }}'.format('role', 'call 123456789 ' * 2) }}{{ '** %s **' % '123456789' }}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{% generation %}{{ '<|im_end|>' + '\\n' }}{% endgeneration %}{% endfor %}"
    "{{ '%s' % strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{{ '-' * 80 }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_common_templates_pass():
    long = [{"role": "user", "content": "word " * 20000}] * 20
    for text in (CHATML, "{{ raise_exception('no') }}", "{{ nothing.here }}", "{% broken"):
        try_out(text, [CHAT, long], {"add_generation_prompt": True})
