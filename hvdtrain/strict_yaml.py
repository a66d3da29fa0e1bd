"""YAML as recipes and runs hold it: the safe subset, with traps closed and small enough for memory."""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from hvdtrain.errors import ConfigError

_MOST_NODES = 1 << 16  # of a recipe: ours have a hundred
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def parse_yaml(text: str, origin: str) -> Any:
    """Errors: ConfigError naming ``origin`` and the line."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except (RecursionError, ValueError, KeyError, AttributeError) as error:  # `!!bool x`, `!!timestamp x`
        raise ConfigError(f"{origin} is not valid YAML: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, with traps closed: ``1e-3`` is a number, a key given twice is an error, and a few lines of
    aliases of aliases, which stand for more than fits into memory, are refused.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _nodes(node, {}) > _MOST_NODES:
            raise ConfigError(f"it holds itself, or more than {_MOST_NODES} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor` may come more than once
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        seen: set[Any] = set()
        for key in (key for key in keys if isinstance(key, Hashable)):  # for the others there is an error of YAML
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice, the second time before line {node.end_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for, aliases written out; infinite where it holds itself.

    Errors: ConfigError where a text has characters that no file name can have.
    """
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        if isinstance(node, yaml.ScalarNode):
            if _NO_TEXT.search(node.value):
                line = node.start_mark.line + 1
                raise ConfigError(f"line {line}: {node.value[:50]!r} has characters that are no text")
            inside: list[yaml.Node] = []
        else:
            is_mapping = isinstance(node, yaml.MappingNode)
            inside = [child for pair in node.value for child in pair] if is_mapping else node.value
        known[id(node)] = 1 + sum(_nodes(child, known) for child in inside)
    return known[id(node)]


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)?\.?\d+[eE][-+]?\d+"), list("-+.0123456789")
)
