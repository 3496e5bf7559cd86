"""Config keys of a model: their names are known, and their values of the right kind."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, TypeVar

from typing_extensions import Self

K = TypeVar("K", bound="Keys")

# Annotation of a key: types that it takes, and what to call them.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a word"),
    "list[int]": ((list, tuple), "a list of whole numbers"),
    "list[str]": ((list, tuple), "a list of words"),
}
_ITEMS = {"list[int]": int, "list[str]": str}


@dataclass(frozen=True)
class Keys:
    """Base of the dataclasses whose fields are a model's config keys."""

    MODEL: ClassVar[str]  # in messages
    POSITIVE: ClassVar[tuple[str, ...]]
    PROBABILITIES: ClassVar[tuple[str, ...]]
    CHOICES: ClassVar[dict[str, tuple[Any, ...]]]

    @classmethod
    def from_keys(cls, keys: dict[str, Any]) -> Self:
        """Check the names of the keys, then their values.

        Keys set to None take their default, as in fairchem.

        Raises:
            ValueError: for an unknown key, naming the nearest known one.
        """
        known = [item.name for item in fields(cls)]
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                )
                raise ValueError(f"unknown key {key!r} in the config of {cls.MODEL}{hint}")
        return cls(**{key: value for key, value in keys.items() if value is not None})

    def __post_init__(self) -> None:
        self._check_types()
        for key in self.POSITIVE:
            value = getattr(self, key)
            if value is not None and not value > 0:
                self.refuse(key, "a number above 0")
        for key in self.PROBABILITIES:
            if not 0 <= getattr(self, key) < 1:
                self.refuse(key, "a probability, at least 0 and below 1")
        for key, choices in self.CHOICES.items():
            if getattr(self, key) not in choices:
                self.refuse(key, " or ".join(map(repr, choices)))

    def _check_types(self) -> None:
        for key in fields(self):
            value, kind = getattr(self, key.name), str(key.type).removesuffix(" | None")
            if value is None and kind != key.type:
                continue
            types, wanted = _TYPES[kind]
            suits = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
            if suits and kind in _ITEMS:
                suits = all(type(item) is _ITEMS[kind] for item in value)
            if not suits:
                self.refuse(key.name, wanted)

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raise ValueError for the value of a key."""
        raise ValueError(
            f"{self.MODEL} config: {key} is {getattr(self, key)!r}, it must be {wanted}"
        )
