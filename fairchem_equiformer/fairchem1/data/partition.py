"""The partition into training, validation and test sets that QM9 and MD17 have in Equiformer."""

from __future__ import annotations

import difflib

import numpy as np

SPLITS = ("train", "val", "test")


def partition(count: int, num_train: int, num_val: int) -> dict[str, np.ndarray]:
    """One random order, cut at two places.

    The order is numpy's default generator's, seeded with 1, which TorchMD-NET and Equiformer share.

    Returns:
        Indices of entries by split.

    Raises:
        ValueError: if a part would be empty.
    """
    for key, size in {"num_train": num_train, "num_val": num_val}.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{key} is {size!r}, it must be a whole number above 0")
    if num_train + num_val >= count:
        raise ValueError(
            f"num_train and num_val are {num_train} and {num_val}, which leaves nothing for "
            f"testing: src holds {count}"
        )
    order = np.random.default_rng(1).permutation(count)
    parts = np.split(order, [num_train, num_train + num_val])
    return dict(zip(SPLITS, parts, strict=True))


def choice(key: str, value: object, choices: tuple[str, ...]) -> str:
    """The value of a config's key that must be one of a few.

    Raises:
        ValueError: if it is none of them, with the nearest.
    """
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key} is {value!r}, it must be one of {', '.join(choices)}{hint}")
