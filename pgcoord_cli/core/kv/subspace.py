"""Subspaces: the keys that share a prefix, named by tuples. Pure."""

from __future__ import annotations

from typing import Any

from pgcoord_cli.core.kv import tuple_encoding
from pgcoord_cli.core.kv.checks import as_bytes
from pgcoord_cli.core.kv.tuple_encoding import Element, Elements


class Subspace:
    """The keys that begin with a raw prefix and a packed tuple. Its methods pack and unpack what comes after these.

    Immutable; two are equal if they have the same prefix. All that pack raise TypeError and ValueError as
    `pgcoord_cli.tuples.pack`.
    """

    __slots__ = ("_prefix",)

    __iter__ = None
    """Python would otherwise iterate by `__getitem__`, which has an answer for each number and never ends."""

    def __init__(self, prefix_tuple: Elements = (), raw_prefix: bytes = b"") -> None:
        self._prefix = tuple_encoding.pack(prefix_tuple, raw_prefix)

    def key(self) -> bytes:
        """Returns the prefix of all keys of the subspace."""
        return self._prefix

    def pack(self, elements: Elements = ()) -> bytes:
        """Returns the key of a tuple in the subspace."""
        return tuple_encoding.pack(elements, self._prefix)

    def pack_with_versionstamp(self, elements: Elements) -> bytes:
        """Returns the template for `set_versionstamped_key`, for a tuple with one incomplete Versionstamp."""
        return tuple_encoding.pack_with_versionstamp(elements, self._prefix)

    def unpack(self, key: bytes) -> tuple[Any, ...]:
        """Returns the tuple of a key. Raises ValueError if the key is not of the subspace or holds no packed tuple."""
        if not self.contains(key):
            raise ValueError(f"the key {key!r} is not of the subspace with the prefix {self._prefix!r}")
        return tuple_encoding.unpack(key, len(self._prefix))

    def range(self, elements: Elements = ()) -> tuple[bytes, bytes]:
        """Returns the begin and end of the keys whose tuples begin with these elements and are longer."""
        return tuple_encoding.range_of(elements, self._prefix)

    def contains(self, key: bytes) -> bool:
        """Whether the key begins with the prefix."""
        return as_bytes(key, "a key").startswith(self._prefix)

    def subspace(self, elements: Elements) -> Subspace:
        """Returns the subspace of the keys whose tuples begin with these elements."""
        return Subspace(elements, self._prefix)

    def __getitem__(self, element: Element) -> Subspace:
        """Returns the subspace of the keys whose tuples begin with this element."""
        return self.subspace((element,))

    def __contains__(self, key: bytes) -> bool:
        return self.contains(key)

    def __eq__(self, other: object) -> bool:
        return self._prefix == other._prefix if isinstance(other, Subspace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._prefix)

    def __repr__(self) -> str:
        return f"Subspace(raw_prefix={self._prefix!r})"
