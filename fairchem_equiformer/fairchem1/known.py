"""The keys and names of a config that fairchem-core 1.10 reads, and which one a typo may mean.

fairchem-core asks for the keys that it knows: what is misspelt is silently not there. A key that is
nearly a known one is refused; one that is like none gets a warning, since a trainer or dataset of
somebody's own may read it.
"""

from __future__ import annotations

import inspect
import logging
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.modules import evaluator

from fairchem_equiformer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

Config = dict[str, Any]

NEAR = 0.75  # of difflib's ratio: one letter of four is wrong


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SECTIONS = _words(
    "amp checkpoint cmd cpu dataset distributed_backend evaluation_metrics gp_gpus gpus"
    " hide_eval_progressbar identifier includes is_debug local_rank logger loss_functions mode"
    " model name noddp optim outputs print_every rank relax_dataset run_dir seed slurm submit"
    " summit task test_dataset timeout timestamp_id trainer val_dataset world_size"
)
OPTIM = _words(
    "batch_size checkpoint_every checkpoint_format clip_grad_norm denoising_pos_coefficient"
    " denoising_pos_params ema_decay energy_coefficient eval_batch_size eval_every"
    " force_coefficient load_balancing load_balancing_on_error"
    " load_datasets_and_model_then_exit loss_energy loss_force loss_forces lr_gamma lr_initial"
    " lr_milestones max_epochs nonfinite num_workers optimizer optimizer_params scheduler"
    " scheduler_params use_denoising_pos warmup_epochs warmup_factor warmup_steps weight_decay"
)
SCHEDULER_PARAMS = _words(
    "decay_epochs decay_rate epochs lambda_type lr lr_min_factor warmup_epochs warmup_factor"
)
SPLIT = _words(
    "a2g_args ase_read_args atoms_transform_args connect_args data2train first_n format"
    " grad_target_mean grad_target_std include_relaxed_energy index_file keep_in_memory"
    " key_mapping lin_ref max_atoms metadata_path molecule no_shuffle noisy_nodes normalize_labels"
    " num_train num_val oc20_ref pattern sample_n seed select_args shard split src subset_to"
    " target target_mean target_std test_split_settings total_shards"
    " train_on_oc20_total_energies train_split_settings transforms use_train_settings use_tqdm"
    " val_split_settings"
)
SPLITS = _words("train val test relax")
LOSS = _words("fn coefficient reduction")
METRICS = _words("metrics primary_metric")
# fairchem-core's trainers by all names; of the others, only its whole import knows.
TRAINERS = _words("ocp energy forces s2ef is2re equiformerv2_forces equiformerv2_energy")


def check_sections(config: Config) -> None:
    """Look for sections that nobody knows.

    Raises:
        InputError: for one that is nearly a known one.
    """
    _keys("", config, SECTIONS)


def check(config: Config) -> None:
    """Look for keys and names that nobody knows.

    Args:
        config: as fairchem-core will read it.

    Raises:
        InputError: for a key that is nearly a known one, and for the name of a trainer, model,
            optimizer, scheduler, loss, metric or dataset format that does not exist.
    """
    optim = config.get("optim") or {}
    _keys("optim.", optim, OPTIM | set(_schedulers_arguments(optim)))
    _keys("optim.scheduler_params.", optim.get("scheduler_params"), _scheduler_params(optim))
    _keys("evaluation_metrics.", config.get("evaluation_metrics"), METRICS)
    _keys("dataset.", config["dataset"], SPLITS)
    for name, split in _splits(config["dataset"]):
        _keys(f"dataset.{name}.", split, SPLIT)
        if split.get("src"):
            _registered(f"dataset.{name}.format", split.get("format", "lmdb"), "dataset")
    _registered("trainer", config.get("trainer", "ocp"), "trainer", TRAINERS)
    _registered("model.name", config["model"]["name"], "model")
    _optimizer(optim)
    _of_torch("optim.scheduler", optim.get("scheduler", "Null"), torch.optim.lr_scheduler, "Null")
    for losses in config.get("loss_functions") or []:
        for target, settings in losses.items():
            _keys(f"loss_functions.{target}.", settings, LOSS)
            if settings and settings.get("fn"):
                _registered(f"loss_functions.{target}.fn", settings["fn"], "loss")
    _metrics(config.get("evaluation_metrics") or {})


def _splits(dataset: Any) -> Iterator[tuple[str, Config]]:
    if isinstance(dataset, dict):
        yield from ((name, dataset[name]) for name in sorted(SPLITS) if dataset.get(name))


def _hint(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1, cutoff=NEAR)
    return f"; do you mean {near[0]}?" if near else ""


def _keys(prefix: str, section: Any, known: Iterable[str]) -> None:
    """Refuse keys that are nearly known ones; name the others that are not known."""
    if not isinstance(section, dict):
        return
    unknown = sorted(str(key) for key in section if key not in set(known))
    for key in unknown:
        if hint := _hint(key, known):
            raise InputError(f"the config's key {prefix}{key} is not known{hint}")
    if unknown:
        names = ", ".join(prefix + key for key in unknown)
        logger.warning("no part of fairchem reads the config's %s", names)


def _registered(key: str, name: Any, kind: str, known: Iterable[str] = ()) -> None:
    """A name that fairchem-core finds: registered, or a path to be imported."""
    mapping = registry.mapping[f"{kind}_name_mapping"]
    if name in known or name in mapping:
        return
    if "." not in str(name):
        setup_imports()  # registers the rest, as the run would do
        if name not in mapping:
            hint = _hint(str(name), [*known, *mapping])
            raise InputError(f"{key}: there is no {kind} {name!r}{hint or _all(mapping)}")
        return
    try:
        registry.get_class(name, f"{kind}_name_mapping")
    except (ImportError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise InputError(f"{key}: cannot import {name} ({reason})") from error


def _all(mapping: Iterable[str]) -> str:
    return f"; there are {', '.join(sorted(mapping))}"


def _of_torch(key: str, name: Any, module: Any, *others: str) -> None:
    if name not in others and not inspect.isclass(getattr(module, str(name), None)):
        names = [found for found, value in vars(module).items() if inspect.isclass(value)]
        raise InputError(f"{key}: there is no {name!r} in torch{_hint(str(name), names)}")


def _optimizer(optim: Config) -> None:
    name = optim.get("optimizer", "AdamW")
    _of_torch("optim.optimizer", name, torch.optim)
    known = inspect.signature(getattr(torch.optim, name)).parameters
    for key in optim.get("optimizer_params") or {}:
        if key not in known:
            hint = _hint(key, known) or _all(set(known) - {"params", "lr"})
            raise InputError(f"optim.optimizer_params.{key}: {name} has no such argument{hint}")


def _schedulers_arguments(optim: Config) -> Iterator[str]:
    """What fairchem-core's trainers look up for a scheduler of torch in the section itself."""
    scheduler = getattr(torch.optim.lr_scheduler, str(optim.get("scheduler")), None)
    if inspect.isclass(scheduler):
        yield from inspect.signature(scheduler).parameters


def _scheduler_params(optim: Config) -> frozenset[str]:
    return SCHEDULER_PARAMS | set(_schedulers_arguments(optim))


def _metrics(section: Config) -> None:
    """Metrics are functions of fairchem-core's evaluator, by name."""
    known = [
        name
        for name, value in inspect.getmembers(evaluator, inspect.isfunction)
        if value.__module__ == evaluator.__name__ and name not in {"metrics_dict", "min_diff"}
    ]
    for target, names in (section.get("metrics") or {}).items():
        for name in names or []:
            if str(name).isidentifier() and name not in known:
                hint = _hint(name, known) or _all(known)
                raise InputError(f"evaluation_metrics.metrics.{target}: there is no {name!r}{hint}")
