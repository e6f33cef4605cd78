"""The `generation` block of chat templates, by which a template says what the assistant wrote.

    {% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

It is transformers' extension of Jinja. Here the block's text is put between two marks.
"""

from collections.abc import Callable

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

# Characters of the private use area that no tokenizer has.
BEGIN, END = "\U000fe0df", "\U000fe0e0"


class GenerationMarks(Extension):
    """Puts marks around what the template's `generation` blocks render."""

    tags = {"generation"}  # noqa: RUF012 (as in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END
