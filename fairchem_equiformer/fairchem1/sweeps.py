"""Sweeps: one config for each combination of values, as ``--sweep-yml`` asks for."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from fairchem.core.common.utils import UniqueKeyLoader

from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Config = dict[str, Any]


def read(_: Any) -> Callable[[Config, str | Path], list[Config]]:
    """For ``create_grid``: see `grid`."""
    return grid


def grid(config: Config, path: str | Path) -> list[Config]:
    """A config's copies with each combination of a sweep's values; the last key changes fastest.

    Their identifiers end in ``_run0``, ``_run1`` and so on.

    Args:
        config: as it is without the sweep.
        path: of a mapping in YAML of keys to lists of values. A key is ``section.key``, or a
            section holds a mapping.

    Raises:
        InputError: for a file that is no such mapping, or a section that the config lacks.
    """
    swept = dict(_flat(_mapping(Path(path)), Path(path)))
    configs = []
    for number, values in enumerate(itertools.product(*swept.values())):
        one = copy.deepcopy(config)
        for key, value in zip(swept, values, strict=True):
            _set(one, key, value, Path(path))
        one["identifier"] = f"{config.get('identifier', '')}_run{number}"
        configs.append(one)
    return configs


def _mapping(path: Path) -> Config:
    try:
        with path.open() as file:
            content = UniqueKeyLoader(file).get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--sweep-yml: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"--sweep-yml: {path}: it must map keys of the config to lists of values")
    return content


def _flat(values: Config, path: Path, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, path, f"{key}.")
        elif isinstance(value, list) and value:
            yield key, value
        else:
            raise InputError(
                f"--sweep-yml: {path}: {key} is {value!r}, and a list of values is needed, such as "
                f"[{value}]"
            )


def _set(config: Config, key: str, value: Any, path: Path) -> None:
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise InputError(
            f"--sweep-yml: {path}: {key}: the config has no section {'.'.join(sections)}"
        )
    section[name] = value
