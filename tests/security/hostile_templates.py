"""Chat templates that mean harm. `{canary}` is a file that must never be made."""

from __future__ import annotations

SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

# name: (template, what the message must hold)
ENDLESS = {
    "nested loops": (SPIN, "runs for over"),
    "a power in C": ("{{ ((messages[0].content | length) + 7) ** (9 ** 9) }}", "runs for over"),
    "a power folded while compiling": ("{{ 9 ** (9 ** 9) }}", "runs for over"),
    "only for one row": ("{% if messages[0].content == 'hi' %}" + SPIN + "{% endif %}", "runs for over"),
}
GREEDY = {
    "a long string": ("{{ messages[0].role * 10 ** 9 }}", "MiB of memory"),
    "a long string folded while compiling": ("{{ 'x' * 10 ** 9 }}", "MiB of memory"),
    "doubling": ("{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
                 "MiB of memory"),
    "doubling a list": ("{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
                        "MiB of memory"),
    "replace": ("{{ ('a' * 9999) | replace('a', 'b' * 99999) }}", "MiB of memory"),
    "format width": ("{{ '{:>1999999999}'.format(1) }}", "MiB of memory"),
    "percent width": ("{{ '%01999999999d' % 1 }}", "MiB of memory"),
    "center": ("{{ 'x' | center(10 ** 9) }}", "MiB of memory"),
    "printing": ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "MiB of memory"),
    "batch": ("{{ [1] | batch(10 ** 9, 1) | list | length }}", "MiB of memory"),
}  # fmt: skip
# Each is refused by the sandbox, or comes to nothing; none may make the canary.
ESCAPES = {
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
    "globals of a function": ("{{ cycler.__init__.__globals__.os.system('touch {canary}') }}", "fails"),
    "globals of a helper": ("{{ raise_exception.__globals__['__builtins__'].open('{canary}', 'w') }}", "fails"),
    "attr filter": ("{{ (messages | attr('__class__')).__base__ }}", "fails"),
    "format to an attribute": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "fails"),
    "the template's own context": ("{{ self._TemplateReference__context.environment.loader }}", "fails"),
    "namespace with a private name": ("{% set n = namespace(__class__=1) %}{{ n.__class__ }}", "fails"),
    "changing the data": ("{{ messages.append({'role': 'user', 'content': 'x'}) }}", "fails"),
    "include": ("{% include '/etc/passwd' %}", "fails"),
    "import": ("{% import 'os' as os %}{{ os.system('touch {canary}') }}", "fails"),
    "statement": ("{% python open('{canary}', 'w') %}", "fails"),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails"),
    "a range of 10^9": ("{% for i in range(10 ** 9) %}{% endfor %}", "fails"),
    "brackets 30,000 deep": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", ""),
    "ifs 2,000 deep": ("{% if 1 %}" * 2_000 + "{% endif %}" * 2_000, ""),
}
