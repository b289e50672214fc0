"""Key selectors: keys by their position, relative to another key. Pure."""

from __future__ import annotations

from typing import NamedTuple


class KeySelector(NamedTuple):
    """A key by its position: `offset` keys after the last key below `key` (not above `key`, if `or_equal`)."""

    key: bytes
    or_equal: bool
    offset: int

    @classmethod
    def last_less_than(cls, key: bytes) -> KeySelector:
        """Selects the last key below `key`."""
        return cls(key, False, 0)

    @classmethod
    def last_less_or_equal(cls, key: bytes) -> KeySelector:
        """Selects `key` if it exists, or else the last key below it."""
        return cls(key, True, 0)

    @classmethod
    def first_greater_than(cls, key: bytes) -> KeySelector:
        """Selects the first key above `key`."""
        return cls(key, True, 1)

    @classmethod
    def first_greater_or_equal(cls, key: bytes) -> KeySelector:
        """Selects `key` if it exists, or else the first key above it."""
        return cls(key, False, 1)

    def __add__(self, keys: object) -> KeySelector:
        """Selects the key that is `keys` keys further on."""
        if not isinstance(keys, int):
            return NotImplemented
        return self._replace(offset=self.offset + keys)

    def __sub__(self, keys: int) -> KeySelector:
        """Selects the key that is `keys` keys further back."""
        return self._replace(offset=self.offset - keys)
