"""What a model returns, as JSON: dicts, lists, tuples, named tuples and plain values around the output tensors.

Ours instead of `torch.utils._pytree.treespec_loads`, which imports any module that the text names, and this text comes
over the wire. A subclass of dict comes back as a dict; a named tuple as a new one with the same name and fields.
"""

import json
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import ModelError, ProtocolError


def dump_tree(tree: Any) -> str:
    """Write a tree whose tensors were replaced by `Leaf` as JSON.

    Raises:
        ModelError: when the tree holds something else than containers and plain values.
    """
    return json.dumps(_dump(tree), separators=(",", ":"))


class Leaf:
    """Stands in a tree for the flat output of this index."""

    def __init__(self, index: int) -> None:
        self.index = index


def _dump(node: Any) -> Any:
    if isinstance(node, Leaf):
        return {"leaf": node.index}
    if node is None or isinstance(node, (str, int, float, bool)):
        return {"value": node}
    if isinstance(node, Mapping) and all(key is None or isinstance(key, (str, int, float)) for key in node):
        return {"dict": [[key, _dump(item)] for key, item in node.items()]}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return {"named": [type(node).__name__, list(node._fields)], "items": [_dump(item) for item in node]}
    if isinstance(node, (list, tuple)):
        return {"list" if isinstance(node, list) else "tuple": [_dump(item) for item in node]}
    raise ModelError(
        f"expected a model that returns tensors in dicts, lists or tuples, got a {type(node).__name__}; wrap it in a "
        "factory (package.module:factory) whose forward returns one of these"
    )


def load_tree(text: str, leaves: Sequence[Any]) -> Any:
    """Rebuild what `dump_tree` wrote around these leaves.

    Raises:
        ProtocolError: when the text is not one that `dump_tree` writes.
    """
    try:
        return _load(json.loads(text), dict(enumerate(leaves)))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ProtocolError(f"expected an output tree as runtime.model.outputs writes it, got {text[:80]!r}") from error


def _load(node: Any, leaves: Mapping[int, Any]) -> Any:
    if "leaf" in node:
        return leaves[node["leaf"]]
    if "value" in node:
        return node["value"]
    if "dict" in node:
        return {key: _load(item, leaves) for key, item in node["dict"]}
    if "named" in node:
        name, fields = node["named"]
        return namedtuple(name, fields)(*(_load(item, leaves) for item in node["items"]))
    if "list" in node:
        return [_load(item, leaves) for item in node["list"]]
    return tuple(_load(item, leaves) for item in node["tuple"])
