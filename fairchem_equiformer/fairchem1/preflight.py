"""Looks at the input of a `fairchem` run before the run starts.

fairchem-core meets a missing file or key after minutes of set-up, with a traceback that does not
name it. Each check here costs little and raises one line that says what is wrong, where it stands
and what to do.
"""

from __future__ import annotations

import logging
import os
import shutil
from glob import glob
from importlib.util import find_spec
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fairchem.core
import torch
import yaml
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import create_dict_from_args, load_config, merge_dicts
from fairchem.core.datasets.lmdb_dataset import LmdbDataset

from fairchem_equiformer import checkpoints
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.fairchem1 import known, lmdb_files, resuming, saving, sweeps
from fairchem_equiformer.fairchem1.guard import policy_of
from fairchem_equiformer.fairchem1.names import (
    AUXILIARY_TASK_TRAINER,
    GRADIENT_FORCES_TRAINER,
    MD17_DATASET,
    NOISY_NODES_LMDB,
    QM9_DATASET,
    todays_name,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

Config = dict[str, Any]

SPLIT_READ_BY_MODE = {
    "train": "train",
    "validate": "val",
    "predict": "test",
    "run-relaxations": "relax",
}
# The formats that are LMDB files; of the others, only their classes know what `src` means.
LMDB_FORMATS = frozenset(
    {"lmdb", "single_point_lmdb", "trajectory_lmdb", "oc22_lmdb", NOISY_NODES_LMDB}
)
# The formats that hand on the labels that `a2g_args` asks for, and no others.
ASE_FORMATS = frozenset({"ase_db", "ase_read", "ase_read_multi"})
ASE_LABELS = frozenset({"energy", "forces", "stress"})
LBFGS_OPTIONS = frozenset({"maxstep", "memory", "damping", "alpha", "traj_dir"})
ENERGY_TRAINERS = frozenset({"equiformerv2_energy", AUXILIARY_TASK_TRAINER})
SCHEDULE_IN_EPOCHS = ENERGY_TRAINERS | {"equiformerv2_forces", GRADIENT_FORCES_TRAINER}
# fairchem's own, by all of their names: a checkpoint holds that of the task.
PLAIN_TRAINERS = frozenset({"ocp", "energy", "forces", "s2ef", "is2re"})
_PACKAGE = "fairchem_equiformer."
_CONVERT = "make one by: python -m fairchem_equiformer.convert {} {}"


def check(args: Namespace, overrides: list[str]) -> None:
    """Check all that a run reads before it computes.

    Args:
        args: The options that fairchem-core's parser knows.
        overrides: The others: `--key.subkey=value`, which change the config.

    Raises:
        InputError: At the first thing found wrong.
    """
    if args.mode is None:
        raise InputError(f"--mode is missing: one of {', '.join(SPLIT_READ_BY_MODE)}")
    if args.submit and shutil.which("sbatch") is None:
        raise InputError(
            "--submit needs Slurm, and no sbatch is on the PATH; without it the run starts here"
        )
    _check_graph_parallel(args.gp_gpus, args.num_nodes * args.num_gpus)
    _check_run_dir(Path(args.run_dir))
    config = read_config(args.config_yml, overrides)
    if args.sweep_yml is None:
        _check_config(args, config)
        return
    _check_sweep(args)
    for number, one in enumerate(sweeps.grid(config, args.sweep_yml)):
        _naming(f"--sweep-yml: {args.sweep_yml}: run {number}", _check_config, args, one)


def _check_sweep(args: Namespace) -> None:
    """The file is there, and fairchem-core will read it."""
    _require_file("--sweep-yml", args.sweep_yml)
    if not args.submit:
        raise InputError("--sweep-yml is read with --submit alone; without it one run would start")
    if args.timestamp_id is not None:
        raise InputError("--timestamp-id: the runs of a sweep cannot share one; leave it out")


def _check_config(args: Namespace, config: Config) -> None:
    """Check one config, and all that it names."""
    _check_spelling(args.config_yml, config)
    _check_sections(args.config_yml, config)
    if "multitask" in config.get("trainer", ""):
        return  # its data stand elsewhere in the config
    _check_known(args.config_yml, config)
    _check_start(args.config_yml, config)
    _check_losses(args.config_yml, config)
    _check_schedule(args.config_yml, config, args.mode)
    splits = _splits(args.config_yml, config)
    _check_noise(args.config_yml, splits)
    _check_data(args.config_yml, splits, args.mode)
    _check_labels(args.config_yml, config, splits, args.mode)
    _check_names(args.config_yml, splits)
    _check_checkpoint(args.checkpoint, config, splits, args.mode)
    if args.mode == "run-relaxations":
        _check_relaxation(args.config_yml, config.get("task") or {})
        _check_sids(splits["relax"])
    if not (args.submit or args.cpu):
        _check_gpus(args.num_gpus)
    _check_downloads(args.config_yml, splits)


def read_config(path: Path, overrides: list[str]) -> Config:
    """Read a config file with its includes and apply overrides, as fairchem-core will.

    Raises:
        InputError: If a file is missing or is not a mapping in YAML, if includes contradict each
            other, or if an override is not `--key.subkey=value`.
    """
    _require_file("--config-yml", path)
    try:
        config, _, contradictions = load_config(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: a config maps keys to values, and `includes` is a list of files ({error})"
        ) from error
    if contradictions:
        raise InputError(
            f"{path}: its includes give different values for {', '.join(contradictions)}; "
            "include one of them, or set the values in the file itself"
        )
    for override in overrides:
        if not override.startswith("--") or override.count("=") != 1:
            raise InputError(
                f"cannot read the argument {override!r}: it is no option of fairchem, and a value "
                "of the config is changed by --key.subkey=value"
            )
    return merge_dicts(config, create_dict_from_args(overrides))[0]


def _require_file(option: str, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{option}: no such file: {path} (looked from {Path.cwd()})")


def _check_graph_parallel(of_a_graph: int | None, ranks: int) -> None:
    """The ranks are a multiple of those that share a graph; fairchem-core takes more for all."""
    if of_a_graph is None or (of_a_graph >= 1 and ranks % min(of_a_graph, ranks) == 0):
        return
    raise InputError(
        f"--gp-gpus {of_a_graph}: {ranks} ranks (--num-gpus times --num-nodes) make no whole "
        f"groups of {of_a_graph}: take a divisor of {ranks}"
    )


def _check_run_dir(path: Path) -> None:
    """Checkpoints, results and logs can be written there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--run-dir: {path} is a file, and a folder is needed")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--run-dir: nothing can be written in {there}; take another folder")


def _check_spelling(file: Path, config: Config) -> None:
    """Sections that nobody reads, before what is missing is looked for under its right name."""
    if "multitask" not in str(config.get("trainer", "")):
        _naming(file, known.check_sections, config)


def _check_known(file: Path, config: Config) -> None:
    """Keys and names within the sections are known."""
    _naming(file, known.check, config)
    _naming(file, policy_of, config["optim"])


def _naming(where: Path | str, check: Callable[..., object], *args: object) -> None:
    try:
        check(*args)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_sections(file: Path, config: Config) -> None:
    for key in ("model", "dataset", "optim"):
        if not config.get(key):
            raise InputError(f"{file}: the section `{key}` is missing")
    if not config["model"].get("name"):
        raise InputError(
            f"{file}: model.name is missing; this package's is fairchem_equiformer.EquiformerV2"
        )


def _check_start(file: Path, config: Config) -> None:
    """The checkpoint that fine-tuning starts from is there, and its backbone is this package's."""
    model = config["model"]
    start = (model.get("finetune_config") or {}).get("starting_checkpoint")
    if start is None:
        return
    key = "model.finetune_config.starting_checkpoint"
    if not Path(start).is_file():
        raise InputError(
            f"{file}: {key}: no such file: {start} (looked from {Path.cwd()}); set it there or by "
            f"--{key}=PATH. From a published checkpoint, {_CONVERT.format('PUBLISHED.pt', start)}"
        )
    saved = _load(key, start, config).get("config", {}).get("model", {})
    heads = [head.get("module", "") for head in (model.get("heads") or {}).values()]
    name = (saved.get("backbone") or {}).get("model", "") if isinstance(saved, dict) else ""
    reads_it = not model.get("backbone") and any(head.startswith(_PACKAGE) for head in heads)
    if reads_it and not name.startswith(_PACKAGE):
        raise InputError(
            f"{file}: {key}: {start} holds {name or 'no backbone of a hydra'}, which the heads of "
            f"this package cannot read; {_CONVERT.format(start, 'start.pt')}"
        )


def _check_losses(file: Path, config: Config) -> None:
    """A coefficient that changes needs the trainer that changes it."""
    trainer = todays_name(config.get("trainer"))
    for losses in config.get("loss_functions") or []:
        for target, settings in losses.items():
            coefficient = (settings or {}).get("coefficient")
            if isinstance(coefficient, list) and trainer != AUXILIARY_TASK_TRAINER:
                raise InputError(
                    f"{file}: loss_functions: {target}: coefficient is {coefficient}, which needs "
                    f"trainer: {AUXILIARY_TASK_TRAINER}; others take a number"
                )


def _check_schedule(file: Path, config: Config, mode: str) -> None:
    """The trainer knows the schedule, and its times are epochs: not so in a checkpoint's config."""
    optim, trainer = config["optim"], todays_name(config.get("trainer", "ocp"))
    times = optim.get("scheduler_params") or {}
    if trainer in PLAIN_TRAINERS and optim.get("scheduler") == "LambdaLR":
        raise InputError(
            f"{file}: optim.scheduler is LambdaLR, which the trainer {trainer} cannot make: set "
            "trainer: equiformerv2_forces, or equiformerv2_energy for energies alone (the config "
            "in a checkpoint has s2ef or is2re in its place)"
        )
    if mode == "train" and trainer in SCHEDULE_IN_EPOCHS and "epochs" in times:
        raise InputError(
            f"{file}: optim.scheduler_params is that of a checkpoint, where warmup_epochs "
            f"({times.get('warmup_epochs')}) counts steps: it would be taken for epochs. Write it "
            "in epochs, such as 0.1, and delete the keys epochs and lr, which the trainer adds"
        )


def _check_noise(file: Path, splits: dict[str, Config]) -> None:
    """Noise is for training alone."""
    for name, split in splits.items():
        if name != "train" and split.get("noisy_nodes"):
            raise InputError(
                f"{file}: dataset.{name} would be read with noisy_nodes; only training may be: set "
                "it under dataset.train.train_split_settings"
            )


def _splits(file: Path, config: Config) -> dict[str, Config]:
    """Settings of each split, completed by those of the training set as the trainers do."""
    dataset = config["dataset"]
    if isinstance(dataset, list):  # the form of configs from before fairchem
        dataset = dict(zip(("train", "val", "test"), dataset, strict=False))
    names = tuple(SPLIT_READ_BY_MODE.values())
    if not set(dataset) & set(names):
        raise InputError(f"{file}: dataset holds none of {', '.join(names)}")
    given = {name: dataset.get(name) or {} for name in names}
    shared = {key: value for key, value in given["train"].items() if key != "src"}
    return {
        name: {**shared, **split} if split.get("use_train_settings", True) else split
        for name, split in given.items()
    }


def _check_data(file: Path, splits: dict[str, Config], mode: str) -> None:
    """Every file of data that the trainer will open is there."""
    needed = SPLIT_READ_BY_MODE[mode]
    if not splits[needed].get("src"):
        raise InputError(
            f"{file}: dataset.{needed}.src is not set, and --mode {mode} reads it; "
            f"set it there or by --dataset.{needed}.src=PATH"
        )
    for name, split in splits.items():
        key = f"dataset.{name}.src"
        hint = f"set it there or by --{key}=PATH"
        if split.get("src") and todays_name(split.get("format", "lmdb")) in LMDB_FORMATS:
            _check_lmdb(f"{file}: {key}", split["src"], hint)
            _check_lmdb_files(f"{file}: {key}", split)
        elif split.get("src") and split.get("format") == "ase_db":
            _check_ase_db(f"{file}: {key}", split["src"], hint)
    for key, path in _statistics_files(splits["train"]):
        if not Path(path).is_file():
            raise InputError(
                f"{file}: {key}: no such file: {path} (looked from {Path.cwd()}). "
                f"{_where_to_get(Path(path))}If it lies elsewhere, set it there or by --{key}=PATH"
            )


def _check_lmdb(where: str, src: str | list[str], hint: str) -> None:
    """One LMDB file, or one folder of them."""
    paths = [src] if isinstance(src, str) else list(src)
    if len(paths) != 1:
        raise InputError(f"{where}: {len(paths)} paths, where this format reads one file or folder")
    path = Path(paths[0])
    if path.is_dir() and not any(path.glob("*.lmdb")):
        problem = f"no .lmdb file in the folder {path}"
    elif not path.exists():
        problem = f"no such file or folder: {path} (looked from {Path.cwd()})"
    else:
        return
    raise InputError(f"{where}: {problem}. {_where_to_get(path)}If the data lie elsewhere, {hint}")


def _check_lmdb_files(where: str, split: Config) -> None:
    """The files are whole, and as many as they say."""
    src = split["src"] if isinstance(split["src"], str) else split["src"][0]
    path = Path(src)
    metadata = path / "metadata.npz" if path.is_dir() else path.with_name("metadata.npz")
    if split.get("metadata_path"):
        metadata = Path(split["metadata_path"])
    files = sorted(path.glob("*.lmdb")) if path.is_dir() else [path]
    try:
        lmdb_files.check(files, None if "total_shards" in split else metadata)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_ase_db(where: str, src: str | list[str], hint: str) -> None:
    """Files, folders, patterns of files, or addresses of database servers."""
    for name in [src] if isinstance(src, str) else src:
        if "://" not in name and not glob(name):  # noqa: PTH207  # may be absolute
            raise InputError(
                f"{where}: no such database: {name} (looked from {Path.cwd()}). Make it with "
                f"ase.db, or download OMat24 from https://huggingface.co/datasets/fairchem/OMAT24. "
                f"If the data lie elsewhere, {hint}"
            )
        if name.endswith(".aselmdb") and find_spec("ase_db_backends") is None:
            raise InputError(
                f"{where}: {name}: the format .aselmdb needs a package that is not installed: "
                "pip install ase-db-backends"
            )


def _check_labels(file: Path, config: Config, splits: dict[str, Config], mode: str) -> None:
    """What is trained on is read from databases of ASE."""
    for name in {"train": ("train", "val"), "validate": ("val",)}.get(mode, ()):
        split = splits[name]
        if not split.get("src") or split.get("format") not in ASE_FORMATS:
            continue
        read = {f"r_{label}": label for label in ASE_LABELS}
        given = {read.get(key) for key, value in (split.get("a2g_args") or {}).items() if value}
        for new in (split.get("key_mapping") or {}).values():
            given |= {new} if isinstance(new, str) else set(new)
        if missing := sorted(_labels(config, split) - given):
            settings = ", ".join(f"r_{label}: True" for label in missing)
            raise InputError(
                f"{file}: dataset.{name}: loss_functions has {' and '.join(missing)}, which "
                f"{split['format']} reads only if asked to: set a2g_args: {{{settings}}} under "
                "dataset.train"
            )


def _check_names(file: Path, splits: dict[str, Config]) -> None:
    """`key_mapping` gives no entry of an LMDB a name that another field of it has."""
    for name, split in splits.items():
        mapping = split.get("key_mapping")
        if not (mapping and split.get("src") and split.get("format", "lmdb") in LMDB_FORMATS):
            continue
        fields = set(LmdbDataset({"src": split["src"]})[0].keys())
        for old, new in mapping.items():
            news = [new] if isinstance(new, str) else new
            taken = sorted(fields.intersection(news) - {old})
            if old in fields and taken:
                raise InputError(
                    f"{file}: dataset.{name}: key_mapping calls {old} {taken[0]}, a name that the "
                    f"entries of {split['src']} have already: leave {old} out, or give the other "
                    f"one another name above it ({taken[0]}: unused)"
                )
            if old in fields:
                fields = (fields - {old}).union(news)


def _labels(config: Config, split: Config) -> set[str]:
    """Labels that the losses compare with, whole where a transform takes them apart."""
    targets = {target for losses in config.get("loss_functions") or [] for target in losses}
    tensors = (split.get("transforms") or {}).get("decompose_tensor") or {}
    if not targets.isdisjoint(tensors.get("decomposition") or {}):
        targets.add(tensors["tensor"])
    return targets & ASE_LABELS


def _check_downloads(file: Path, splits: dict[str, Config]) -> None:
    """The data are there, or are downloaded now: by one process, where there is internet access."""
    for name, split in splits.items():
        form = todays_name(split.get("format"))
        if split.get("src") and form in (QM9_DATASET, MD17_DATASET):
            settings = split | (split.get(f"{name}_split_settings") or {})
            try:
                registry.get_dataset_class(form)(settings)
            except (OSError, ValueError) as error:
                raise InputError(f"{file}: dataset.{name}: {error}") from error


def _where_to_get(path: Path) -> str:
    """How to download what fairchem keeps at such a path; empty for data of one's own."""
    parts = path.parts
    if any("oc22" in part.lower() for part in parts):
        return "Download the OC22 LMDBs from https://fair-chem.github.io/core/datasets/oc22.html. "
    script = relpath(Path(fairchem.core.__path__[0]) / "scripts" / "download_data.py")
    page = "https://fair-chem.github.io/core/datasets/oc20.html"
    for task in ("s2ef", "is2re"):
        if task in parts:
            above, below = parts[: parts.index(task)], parts[parts.index(task) + 1 :]
            command = f"python {script} --data-path {Path(*above)} --task {task}"
            if task == "is2re":
                return f"Download OC20 IS2RE (all splits; {page}): {command}. "
            splits = _s2ef_splits(below)
            # Without --ref-energy the labels are total energies, which no config here is made for.
            commands = " and ".join(f"{command} --split {name} --ref-energy" for name in splits)
            link = f"; link the .lmdb files of both into {path}, renamed apart"
            return f"Download OC20 S2EF ({page}): {commands}{link if len(splits) > 1 else ''}. "
    return ""


def _s2ef_splits(below: tuple[str, ...]) -> list[str]:
    """Splits of fairchem's download script that fill a folder such as `all/val_id`."""
    size, subset = (*below, "train", "train")[:2]
    if subset.startswith("val"):
        return [subset]
    if subset.startswith("test"):
        return ["test"]
    return ["all", "md"] if size == "all_md" else [size]


def _statistics_files(train: Config) -> Iterator[tuple[str, str]]:
    """Keys and paths of the files with normalisers and element references."""
    transforms = train.get("transforms") or {}
    for kind in ("element_references", "normalizer"):
        for target, settings in (transforms.get(kind) or {}).items():
            key = f"dataset.train.transforms.{kind}"
            if target == "file":
                yield f"{key}.file", settings
            elif isinstance(settings, dict) and settings.get("file"):
                yield f"{key}.{target}.file", settings["file"]


def _check_checkpoint(
    path: str | None, config: Config, splits: dict[str, Config], mode: str
) -> None:
    """The checkpoint exists, can be read, and fits the trainer that will load it."""
    if path is None:
        if mode != "train":
            raise InputError(f"--mode {mode} needs --checkpoint, e.g. a run's best_checkpoint.pt")
        return
    if Path(path).is_dir() and config["optim"].get("checkpoint_format") == "dcp":
        return
    if Path(path).is_dir():
        raise InputError(
            f"--checkpoint: {path} is a folder, and a file is needed, e.g. the best_checkpoint.pt "
            "in the folder of a run"
        )
    _require_file("--checkpoint", Path(path))
    path = _good_checkpoint(Path(path), mode)
    if "state_dict" not in (checkpoint := _load("--checkpoint", path, config)):
        raise InputError(f"--checkpoint: {path} holds no state_dict: not a checkpoint of fairchem")
    trainer = todays_name(config.get("trainer"))
    if trainer in SCHEDULE_IN_EPOCHS and not splits["train"].get("src"):
        if trainer in ENERGY_TRAINERS:
            raise InputError(
                f"the trainer {trainer} needs dataset.train.src even for --mode {mode}"
            )
        if checkpoint.get("scheduler") is not None:
            raise InputError(
                f"--checkpoint: {path} holds the state of training, which the trainer {trainer} "
                "loads only with dataset.train.src set; use best_checkpoint.pt of the same folder"
            )


def _good_checkpoint(path: Path, mode: str) -> str:
    """The file to load: a training goes on from the checkpoint kept before a damaged one."""
    if mode == "train":
        return str(saving.newest_good(path)[0])
    if reason := saving.damage(path):
        raise InputError(
            f"--checkpoint: {path} cannot be read ({reason}); copy it again, or take another one "
            f"of its folder, such as {saving.PREVIOUS}"
        )
    return str(path)


def _load(option: str, path: str, config: Config) -> Config:
    """A checkpoint's contents, which fairchem-core will read without a check; on disk so far."""
    try:
        return checkpoints.read(path, trusted=resuming.trusted(config), mapped=True)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _check_gpus(wanted: int) -> None:
    """There is a GPU for each process; without one, fairchem-core fails in NCCL."""
    found = torch.cuda.device_count()
    if not found:
        raise InputError("this machine has no GPU that PyTorch can use; add --cpu to run without")
    if wanted > found:
        raise InputError(f"--num-gpus {wanted}: this machine has {found}")


def _check_relaxation(file: Path, task: Config) -> None:
    options = task.get("relax_opt")
    if options is None:
        raise InputError(
            f"{file}: task.relax_opt is missing; it holds the settings of LBFGS: "
            f"{', '.join(sorted(LBFGS_OPTIONS))}"
        )
    if unknown := set(options) - LBFGS_OPTIONS:
        raise InputError(
            f"{file}: task.relax_opt: unknown {', '.join(sorted(unknown))}; "
            f"known are {', '.join(sorted(LBFGS_OPTIONS))}"
        )


def _check_sids(split: Config) -> None:
    """No two systems share a sid: trajectories and relaxed positions are named by it."""
    dataset = registry.get_dataset_class(split.get("format", "lmdb"))(split)
    logger.info("checking that the sids of %d systems differ", len(dataset))
    first: dict[str, int] = {}
    for index in range(len(dataset)):
        sid = str(dataset[index].sid)
        if sid in first:
            raise InputError(
                f"dataset.relax.src: {split['src']}: systems {first[sid]} and {index} share the "
                f"sid {sid}, which names their results; give each system its own"
            )
        first[sid] = index
