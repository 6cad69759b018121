"""Chat templates held to limits of time and memory.

A template is a program of the model's authors. transformers runs it in Jinja's sandbox, which keeps
it from files and code, but not from loops without end nor from ``'a' * 10**10``. So each rendering
is first tried in a sandbox that counts: blocks that are run, characters that are made, memory. What
passes there is rendered by transformers as ever; what does not is refused.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import show
from mlx_flash.errors import ModelError

MAX_TEMPLATE = 1 << 20  # characters of a template
MAX_TEXT = 8_000_000  # characters of a text, items of a list, that a template may make
MAX_NUMBER = 1_000_000  # of a width, a count or a factor
MAX_BITS = 4096  # of a whole number
MAX_STEPS = 1_000_000  # blocks: bodies of loops, branches, macros
MAX_SECONDS = 10.0
MAX_GROWTH = 400 << 20  # bytes by which the process may grow
LOOK_EVERY = 256  # steps between looks at clock and memory; 1 MB of text counts as as many
POSITIONAL = ("tools", "documents", "chat_template", "add_generation_prompt")
SEQUENCES = (str, bytes, list, tuple)


class TemplateLimit(ModelError):
    """A chat template that goes beyond the limits."""


def bounded(tokenizer: Any, name: object) -> Callable[..., Any]:
    """A tokenizer's ``apply_chat_template`` with limits.

    Args:
        tokenizer: mlx-lm's.
        name: of the model, for errors.
    """
    render = tokenizer.apply_chat_template

    @functools.wraps(render)
    def apply_chat_template(conversation: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs | dict(zip(POSITIONAL, args, strict=False))
        try:
            text = tokenizer.get_chat_template(given.get("chat_template"), given.get("tools"))
        except ValueError:  # there is none: render says so
            return render(conversation, *args, **kwargs)
        thinks = dict.fromkeys(("enable_thinking", "thinking"), tokenizer.has_thinking)
        try:
            try_out(text, _chats(conversation), thinks | tokenizer.special_tokens_map | given)
        except TemplateLimit as error:
            raise TemplateLimit(
                f"the chat template of {name} {error}; give the prompt without it, or put another "
                "chat_template.jinja there"
            ) from None
        return render(conversation, *args, **kwargs)

    return apply_chat_template


def try_out(text: str, chats: Iterable[Any], variables: dict[str, Any]) -> None:
    """Render a template for nothing but its limits.

    Raises:
        TemplateLimit: it goes beyond one; says which. Errors of another kind are left to whoever
            renders it in earnest.
    """
    if len(text) > MAX_TEMPLATE:
        raise TemplateLimit(f"has {len(text):,} characters, at most {MAX_TEMPLATE:,} are read")
    sandbox = Sandbox()
    try:
        template = sandbox.from_string(text)
        for chat in chats:
            template.render(
                **{"tools": None, "documents": None, "add_generation_prompt": False}
                | variables
                | {"messages": chat}
            )
    except TemplateLimit:
        raise
    except MemoryError:
        raise TemplateLimit("takes more memory than there is") from None
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return
    except RecursionError:
        raise TemplateLimit("calls itself without end") from None


def _chats(conversation: Any) -> list[Any]:
    """One conversation, or several, as a list of them."""
    several = isinstance(conversation, list | tuple) and conversation
    if several and isinstance(conversation[0], list | tuple):
        return list(conversation)
    return [conversation]


class _Counting(CodeGenerator):
    """Puts a step in front of each block, and has texts joined by the sandbox."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """The tag {% generation %} of transformers, which marks what an assistant said."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox with what a template may use up."""

    code_generator_class = _Counting
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._steps = self._made = self._looked = 0
        self._until = time.monotonic() + MAX_SECONDS
        self._most = current_platform().process_bytes() + MAX_GROWTH
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "lipsum": lambda *_, **__: self._refuse("makes up text (lipsum)"),
        }
        self.filters = {name: self._checking(code) for name, code in self.filters.items()}
        self.filters["tojson"] = self._checking(_to_json)
        self.concat = self.join

    def step(self) -> None:
        """Count a block that is run."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            self._refuse(f"runs more than {MAX_STEPS:,} steps")
        if self._steps + self._made // 4096 - self._looked >= LOOK_EVERY:
            self._look()

    def join(self, parts: Iterable[Any]) -> str:
        """Parts of the output, or of a ``~``, as one text."""
        found, size = [], 0
        for part in parts:
            self._check_size(_extent(part), "prints a value")
            found.append(str(part))
            size += len(found[-1])
            self._check_size(size, "makes a text")
        self._count(size)
        return "".join(found)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                self._refuse(f"computes with numbers of more than {MAX_BITS:,} bits")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, (right,))
        elif operator == "*":
            for value, factor in ((left, right), (right, left)):
                if isinstance(factor, int) and isinstance(value, SEQUENCES):
                    self._check_size(_extent(value) * factor, "repeats a text or a list")
        return self._counted(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._check_call(function, getattr(function, "__self__", None), args, kwargs)
        return self._counted(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        form, made = getattr(value, "__self__", None), super().wrap_str_format(value)
        if made is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(form, (*args, *kwargs.values()))
            return self._counted(made(*args, **kwargs))

        return checked

    def _checking(self, code: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are looked at."""

        @functools.wraps(code)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if hasattr(code, "jinja_pass_arg") else args
            self._check_call(code, given[0] if given else None, given[1:], kwargs)
            return self._counted(code(*args, **kwargs))

        return checked

    def _check_call(self, function: Any, value: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Refuse calls whose result would be large, before it is made.

        Args:
            value: what a method is of, or a filter is applied to.
        """
        self.step()
        name = re.sub("^(sync_)?do_", "", getattr(function, "__name__", ""))
        given = (*args, *kwargs.values())
        for one in (value, *given):
            self._check_size(_extent(one), f"gives {name} a value")
        if not isinstance(value, SEQUENCES):
            return
        if any(isinstance(number, int) and abs(number) > MAX_NUMBER for number in given):
            self._refuse(f"asks {name} for more than {MAX_NUMBER:,} characters or items")
        if name == "format" and isinstance(value, str):  # the filter
            self._check_format(value, given)
        elif name in ("replace", "join", "translate", "indent"):
            places = len(value)
            if name == "replace" and args and isinstance(value, str) and isinstance(args[0], str):
                places = value.count(args[0])
            self._check_size(places * max(map(_extent, given), default=1), f"makes {name} a text")

    def _check_format(self, form: str, given: Iterable[Any]) -> None:
        # A width that is given as a value: %*d, or a field within a field.
        inner = re.search(r"%[-#0 +]*\d*\.?\*", form) or re.search(
            r"\{[^{}]*\{", form.replace("{{", "")
        )
        left: list[Any] = [form, *given]
        while left:
            one = left.pop()
            if isinstance(one, list | tuple):
                left += one
            elif isinstance(one, dict):
                left += one.values()
            wide = isinstance(one, str) and re.search(r"\d{6}", one)
            if (wide and (one is form or inner)) or (
                isinstance(one, int) and abs(one) > MAX_NUMBER and inner
            ):
                self._refuse("formats with a width of more than five digits")

    def _check_size(self, size: int, what: str) -> None:
        if size > MAX_TEXT:
            self._refuse(f"{what} of more than {MAX_TEXT:,} characters or items")

    def _counted(self, value: Any) -> Any:
        if isinstance(value, SEQUENCES):
            self._check_size(len(value), "makes a text or a list")
            self._count(len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            self._refuse(f"computes with numbers of more than {MAX_BITS:,} bits")
        return value

    def _count(self, size: int) -> None:
        self._made += size
        if self._steps + self._made // 4096 - self._looked >= LOOK_EVERY:
            self._look()

    def _look(self) -> None:
        self._looked = self._steps + self._made // 4096
        if time.monotonic() > self._until:
            self._refuse(f"runs for more than {MAX_SECONDS:.0f} seconds")
        if current_platform().process_bytes() > self._most:
            self._refuse(f"takes more than {show(MAX_GROWTH)} of memory")

    def _refuse(self, what: str) -> None:
        raise TemplateLimit(what)


def _extent(value: Any) -> int:
    """Characters and items of a value with all that is in it; counted no further than the limit."""
    total, left = 0, [value]
    while left and total <= MAX_TEXT:
        one = left.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, dict):
            total += 2 * len(one)
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            total += len(one)
            left += one
    return total


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    known = ("ensure_ascii", "indent", "separators", "sort_keys")
    options = {"ensure_ascii": False} | {k: v for k, v in options.items() if k in known}
    return json.dumps(value, **options)
