"""Bad input ends in one line that says what is wrong, where and what to do; never a traceback."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import yaml
from fairchem.core import _cli

from fairchem_equiformer.fairchem1.cli import main
from tests.conftest import make_data, write_lmdb

MODES = ("train", "validate", "predict", "run-relaxations")


@pytest.fixture
def fairchem(tmp_path, capsys, monkeypatch):
    """The command in this process, up to where fairchem-core takes over: status and message."""
    monkeypatch.setattr(_cli, "main", lambda *_: None)

    def run(config, *args, mode="train", device=("--cpu",)):
        path = tmp_path / "config.yml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        options = ["--config-yml", path, *device, *args]
        status = main(["main", "--mode", mode, *map(str, options)])
        return status, capsys.readouterr().err

    return run


def assert_one_line(result, *parts):
    status, message = result
    assert status == 2
    assert message.startswith("fairchem: error: ")
    assert message.count("\n") == 1
    for part in parts:
        assert str(part) in message


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "best_checkpoint.pt"
    torch.save({"state_dict": {}, "config": {}}, path)
    return path


@pytest.mark.parametrize("mode", MODES)
def test_good_input_passes(fairchem, tiny_config, checkpoint, mode):
    assert fairchem(tiny_config, "--checkpoint", checkpoint, mode=mode) == (0, "")


def test_ranks_that_cannot_share_graphs(fairchem, tiny_config):
    result = fairchem(tiny_config, "--num-gpus=3", "--gp-gpus=2")
    assert_one_line(result, "--gp-gpus 2: 3 ranks", "groups of 2")
    assert fairchem(tiny_config, "--num-gpus=4", "--gp-gpus=2") == (0, "")
    assert fairchem(tiny_config, "--num-gpus=1", "--gp-gpus=2") == (0, "")


def test_old_list_of_datasets_passes(fairchem, tiny_config, checkpoint):
    tiny_config["dataset"] = [tiny_config["dataset"][name] for name in ("train", "val", "test")]
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode="predict")
    assert result == (0, "")


@pytest.mark.parametrize("split", ["train", "val", "test", "relax"])
@pytest.mark.parametrize("src", ["nowhere/data.lmdb", ["nowhere/data.lmdb"]])
def test_missing_data(fairchem, tiny_config, tmp_path, split, src):
    tiny_config["dataset"][split]["src"] = src
    key = f"dataset.{split}.src"
    assert_one_line(fairchem(tiny_config), tmp_path / "config.yml", f"--{key}=PATH", "nowhere/data")


@pytest.mark.parametrize("mode", MODES)
def test_data_not_set(fairchem, tiny_config, checkpoint, mode):
    split = dict(zip(MODES, ("train", "val", "test", "relax"), strict=True))[mode]
    tiny_config["dataset"][split].pop("src")
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode=mode)
    assert_one_line(result, f"dataset.{split}.src is not set", mode)


@pytest.mark.parametrize(
    ("src", "download"),
    [
        ("data/oc20/s2ef/2M/train", "--data-path data/oc20 --task s2ef --split 2M --ref-energy."),
        ("data/oc20/s2ef/all/train", "--split all --ref-energy."),
        ("data/oc20/s2ef/all/val_ood_cat", "--split val_ood_cat --ref-energy."),
        ("data/oc20/s2ef/all/test_id", "--split test --ref-energy."),
        ("data/oc20/s2ef/all_md/train", "--split md --ref-energy; link the .lmdb files of both"),
        ("s2ef/200k", "--data-path . --task s2ef --split 200k --ref-energy."),
        ("data/is2re/all/train/data.lmdb", "--data-path data --task is2re."),
        ("data/oc22/s2ef-total/train", "datasets/oc22.html"),
    ],
)
def test_missing_open_catalyst_data_say_what_to_download(fairchem, tiny_config, src, download):
    tiny_config["dataset"]["train"]["src"] = src
    assert_one_line(fairchem(tiny_config), src, download)


def test_data_of_other_formats_are_left_to_their_class(fairchem, tiny_config):
    labels = {"r_energy": True, "r_forces": True}
    tiny_config["dataset"] = {
        "train": {"format": "ase_db", "src": "mysql://host/table", "a2g_args": labels}
    }
    assert fairchem(tiny_config) == (0, "")


def test_missing_ase_database(fairchem, tiny_config, tmp_path):
    (tmp_path / "there.db").touch()
    splits = tiny_config["dataset"]
    splits["train"]["format"] = "ase_db"
    splits["train"]["a2g_args"] = {"r_energy": True, "r_forces": True}
    for split in splits.values():
        split["src"] = [str(tmp_path / "*.db"), "postgresql://host/base"]
    assert fairchem(tiny_config) == (0, "")
    splits["val"]["src"] = ["crystals.db"]
    assert_one_line(fairchem(tiny_config), "dataset.val.src", "crystals.db", "ase.db")


def test_labels_that_ase_databases_are_not_asked_for(fairchem, tiny_config, tmp_path):
    """Of a tensor that is taken apart, the tensor; under another name, that."""
    (tmp_path / "there.db").touch()
    train = tiny_config["dataset"]["train"]
    tiny_config["dataset"] = {"train": train}
    train |= {"format": "ase_db", "src": str(tmp_path / "there.db"), "a2g_args": {"r_forces": True}}
    train["transforms"]["decompose_tensor"] = {
        "tensor": "stress",
        "decomposition": {"stress_isotropic": {"irrep_dim": 0}},
    }
    tiny_config["loss_functions"].append({"stress_isotropic": {"fn": "mae", "coefficient": 1}})
    settings = "a2g_args: {r_energy: True, r_stress: True} under dataset.train"
    assert_one_line(fairchem(tiny_config), "dataset.train: loss_functions has energy", settings)
    train["a2g_args"]["r_stress"] = True
    train["key_mapping"] = {"corrected_energy": ["energy", "target"]}
    assert fairchem(tiny_config) == (0, "")


def test_a_name_that_the_data_have_already(fairchem, tiny_config, tmp_path):
    """Energies of the initial and of the relaxed structure."""
    entry = make_data(0)
    entry.y_relaxed = entry.energy_relaxed
    src = str(write_lmdb(tmp_path / "both.lmdb", [entry]))
    for split in tiny_config["dataset"].values():
        split["src"] = src
    tiny_config["dataset"]["train"]["key_mapping"] = {"y_relaxed": "energy"}
    message = "dataset.train: key_mapping calls y_relaxed energy"
    assert_one_line(fairchem(tiny_config), message, src, "(energy: unused)")
    mapping = {"energy": "unused", "y_relaxed": ["energy", "target"], "absent": "forces"}
    tiny_config["dataset"]["train"]["key_mapping"] = mapping
    assert fairchem(tiny_config) == (0, "")


def fine_tuning(config, start):
    head = {"module": "fairchem_equiformer.EnergyHead"}
    start = {"starting_checkpoint": str(start)}
    config["model"] = {"name": "hydra", "heads": {"energy": head}, "finetune_config": start}


def test_fine_tuning_without_its_start(fairchem, tiny_config, tmp_path):
    fine_tuning(tiny_config, tmp_path / "start.pt")
    key = "model.finetune_config.starting_checkpoint"
    assert_one_line(
        fairchem(tiny_config), f"--{key}=PATH", "start.pt", "fairchem_equiformer.convert"
    )


def test_fine_tuning_from_another_backbone(fairchem, tiny_config, checkpoint):
    fine_tuning(tiny_config, checkpoint)
    assert_one_line(fairchem(tiny_config), checkpoint, "no backbone of a hydra", "convert")
    for name, status in (("equiformer_v2_backbone", 2), ("fairchem_equiformer.Equi", 0)):
        model = {"name": "hydra", "backbone": {"model": name}}
        torch.save({"state_dict": {}, "config": {"model": model}}, checkpoint)
        result = fairchem(tiny_config)
        assert result[0] == status
    checkpoint.write_bytes(b"text")
    assert_one_line(fairchem(tiny_config), "starting_checkpoint", checkpoint, "cannot be read")


def test_folder_without_lmdb(fairchem, tiny_config, tmp_path):
    tiny_config["dataset"]["val"]["src"] = str(tmp_path)
    assert_one_line(fairchem(tiny_config), "dataset.val.src", "no .lmdb file", tmp_path)


def test_two_paths_for_one_lmdb(fairchem, tiny_config, tiny_lmdb):
    tiny_config["dataset"]["train"]["src"] = [str(tiny_lmdb), str(tiny_lmdb)]
    assert_one_line(fairchem(tiny_config), "dataset.train.src", "2 paths")


def test_missing_file_of_references(fairchem, tiny_config):
    transforms = tiny_config["dataset"]["train"]["transforms"]
    transforms["element_references"] = {"energy": {"file": "oc22/linfit.npz"}}
    key = "dataset.train.transforms.element_references.energy.file"
    assert_one_line(fairchem(tiny_config), f"--{key}=PATH", "oc22/linfit.npz", "oc22.html")


@pytest.mark.parametrize("section", ["model", "dataset", "optim"])
def test_missing_section(fairchem, tiny_config, section):
    del tiny_config[section]
    assert_one_line(fairchem(tiny_config), f"`{section}`")


def test_model_without_name(fairchem, tiny_config):
    del tiny_config["model"]["name"]
    assert_one_line(fairchem(tiny_config), "model.name", "fairchem_equiformer.EquiformerV2")


def test_dataset_without_splits(fairchem, tiny_config, tiny_lmdb):
    tiny_config["dataset"] = {"src": str(tiny_lmdb)}
    assert_one_line(fairchem(tiny_config), "dataset holds none of train, val, test, relax")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("includes: [absent.yml]", "absent.yml"),
        ("includes: absent.yml", "includes"),
        ("model: {name: a}\nmodel: {name: b}", "Duplicate Key: 'model'"),
        ("model: [unclosed", "line 1"),
        ("- a list", "dict"),
        ("", "a config maps keys to values"),
    ],
)
def test_unreadable_config(fairchem, tmp_path, text, part):
    assert_one_line(fairchem(text), tmp_path / "config.yml", part)


def test_includes_that_contradict_each_other(fairchem, tiny_config, tmp_path):
    for name, layers in (("a.yml", 1), ("b.yml", 2)):
        (tmp_path / name).write_text(yaml.safe_dump({"model": {"num_layers": layers}}))
    tiny_config["includes"] = ["a.yml", "b.yml"]
    assert_one_line(fairchem(tiny_config), "model.num_layers")


def test_missing_config(tmp_path, capsys):
    status = main(["--mode", "train", "--config-yml", str(tmp_path / "absent.yml")])
    assert_one_line((status, capsys.readouterr().err), "--config-yml", tmp_path / "absent.yml")


def test_missing_mode(tmp_path, capsys):
    status = main(["--config-yml", str(tmp_path / "absent.yml")])
    assert_one_line((status, capsys.readouterr().err), "--mode", *MODES)


@pytest.mark.parametrize("argument", ["train", "--optim.lr_initial", "--optim.x=b=c", "optim.x=1"])
def test_argument_that_is_no_override(fairchem, tiny_config, argument):
    assert_one_line(fairchem(tiny_config, argument), repr(argument))


def test_overrides_count(fairchem, tiny_config, tiny_lmdb):
    tiny_config["dataset"]["train"]["src"] = "nowhere"
    assert fairchem(tiny_config, f"--dataset.train.src={tiny_lmdb}") == (0, "")


@pytest.mark.parametrize("mode", MODES[1:])
def test_no_checkpoint(fairchem, tiny_config, mode):
    assert_one_line(fairchem(tiny_config, mode=mode), "--checkpoint", mode)


def test_missing_checkpoint(fairchem, tiny_config, tmp_path):
    path = tmp_path / "absent.pt"
    assert_one_line(fairchem(tiny_config, "--checkpoint", path), "--checkpoint", path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_checkpoint(fairchem, tiny_config, checkpoint, keep):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(keep * len(content))])
    result = fairchem(tiny_config, "--checkpoint", checkpoint)
    assert_one_line(result, checkpoint, "cannot be read")


@pytest.mark.parametrize(
    ("content", "wrong"), [({"weights": {}}, "no state_dict"), ([1, 2], "it holds list")]
)
def test_file_that_is_no_checkpoint(fairchem, tiny_config, checkpoint, content, wrong):
    torch.save(content, checkpoint)
    result = fairchem(tiny_config, "--checkpoint", checkpoint)
    assert_one_line(result, checkpoint, wrong)


def test_checkpoint_of_an_old_torch_passes(fairchem, tiny_config, checkpoint):
    torch.save({"state_dict": {}}, checkpoint, _use_new_zipfile_serialization=False)
    assert fairchem(tiny_config, "--checkpoint", checkpoint) == (0, "")


def test_training_state_without_training_data(fairchem, tiny_config, checkpoint):
    tiny_config["dataset"]["train"].pop("src")
    assert fairchem(tiny_config, "--checkpoint", checkpoint, mode="predict") == (0, "")
    torch.save({"state_dict": {}, "scheduler": {"last_epoch": 1}}, checkpoint)
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode="predict")
    assert_one_line(result, checkpoint, "dataset.train.src", "best_checkpoint.pt")


def test_energy_trainer_without_training_data(fairchem, tiny_config, checkpoint):
    tiny_config["trainer"] = "equiformerv2_energy"
    tiny_config["dataset"]["train"].pop("src")
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode="validate")
    assert_one_line(result, "equiformerv2_energy", "dataset.train.src")


def test_relaxation_without_settings(fairchem, tiny_config, checkpoint):
    del tiny_config["task"]["relax_opt"]
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode="run-relaxations")
    assert_one_line(result, "task.relax_opt", "maxstep")


def test_relaxation_with_unknown_setting(fairchem, tiny_config, checkpoint):
    tiny_config["task"]["relax_opt"]["name"] = "lbfgs"
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode="run-relaxations")
    assert_one_line(result, "task.relax_opt", "name", "maxstep")


def test_two_systems_with_one_sid(fairchem, tiny_config, checkpoint, tmp_path):
    entries = [make_data(index) for index in (5, 7, 5)]
    path = write_lmdb(tmp_path / "twice.lmdb", copy.deepcopy(entries))
    tiny_config["dataset"]["relax"] = {"src": str(path)}
    result = fairchem(tiny_config, "--checkpoint", checkpoint, mode="run-relaxations")
    assert_one_line(result, path, "systems 0 and 2", "sid 5")


def test_submission_without_slurm(fairchem, tiny_config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_one_line(fairchem(tiny_config, "--submit"), "--submit", "sbatch")


def test_missing_sweep(fairchem, tiny_config, tmp_path):
    path = tmp_path / "absent.yml"
    assert_one_line(fairchem(tiny_config, "--sweep-yml", path), "--sweep-yml", path)


def test_no_gpu(fairchem, tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert_one_line(fairchem(tiny_config, device=()), "no GPU", "--cpu")


def test_fewer_gpus_than_asked_for(fairchem, tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert fairchem(tiny_config, device=("--num-gpus", 2)) == (0, "")
    assert_one_line(fairchem(tiny_config, device=("--num-gpus", 4)), "--num-gpus 4", "2")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--optim.clip_grad_nrom=1", ("optim.clip_grad_nrom", "clip_grad_norm?")),
        ("--optim.batchsize=4", ("optim.batchsize", "batch_size?")),
        ("--optim.lr_inital=0.1", ("optim.lr_inital", "lr_initial?")),
        ("--optm.batch_size=4", ("key optm", "optim?")),
        ("--output.energy.level=system", ("key output ", "outputs?")),
        ("--dataset.train.formt=lmdb", ("dataset.train.formt", "format?")),
        ("--optim.scheduler_params.warmup_epoch=1", ("warmup_epoch ", "warmup_epochs?")),
        ("--optim.optimizer=AdamWW", ("optim.optimizer", "AdamWW", "AdamW?")),
        ("--optim.optimizer_params.weightdecay=1", ("weightdecay", "weight_decay?")),
        ("--optim.scheduler=LambdaRL", ("optim.scheduler", "LambdaRL", "LambdaLR?")),
        ("--trainer=equiformerv2_force", ("trainer", "equiformerv2_forces?")),
        ("--trainer=nowhere.Trainer", ("trainer", "nowhere.Trainer", "import")),
        ("--dataset.train.format=lmbd", ("dataset.train.format", "lmbd", "lmdb?")),
        ("--model.name=equiformer_v3", ("model.name", "equiformer_v3", "equiformer_v2?")),
        ("--optim.nonfinite=ignore", ("optim.nonfinite", "stop, skip, fairchem")),
    ],
)
def test_a_typo_is_named_with_what_it_may_mean(fairchem, tiny_config, tmp_path, override, parts):
    assert_one_line(fairchem(tiny_config, override), tmp_path / "config.yml", *parts)


def test_a_typo_in_a_loss_or_metric(fairchem, tiny_config):
    tiny_config["evaluation_metrics"]["metrics"]["forces"] = ["mae", "cosine_similarty"]
    assert_one_line(fairchem(tiny_config), "metrics.forces", "cosine_similarity?")
    tiny_config["evaluation_metrics"]["metrics"]["forces"] = ["mae"]
    tiny_config["loss_functions"][1]["forces"]["fn"] = "l2mea"
    assert_one_line(fairchem(tiny_config), "loss_functions.forces.fn", "l2mae?")


@pytest.mark.parametrize("section", ["optim", "model", "dataset"])
def test_a_misspelt_section_is_not_called_missing(fairchem, tiny_config, section):
    tiny_config[section + section[-1]] = tiny_config.pop(section)
    assert_one_line(fairchem(tiny_config), f"key {section}{section[-1]} ", f"{section}?")


def test_a_key_like_no_other_gets_a_warning(fairchem, tiny_config, caplog):
    assert fairchem(tiny_config, "--optim.my_own_idea=1") == (0, "")
    assert "optim.my_own_idea" in caplog.text


def test_a_folder_as_checkpoint(fairchem, tiny_config, tmp_path):
    result = fairchem(tiny_config, "--checkpoint", tmp_path)
    assert_one_line(result, tmp_path, "is a folder", "best_checkpoint.pt")


def test_a_run_dir_that_cannot_be_written(fairchem, tiny_config, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    assert_one_line(fairchem(tiny_config, "--run-dir", path), "--run-dir", path, "is a file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    result = fairchem(tiny_config, "--run-dir", tmp_path / "new" / "run")
    assert_one_line(result, "--run-dir", tmp_path, "nothing can be written")
