"""Checkpoints are whole, the one before is kept, and damage is seen before it is loaded."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fairchem.core.trainers import base_trainer

from fairchem_equiformer import files
from fairchem_equiformer.errors import InputError, StoppedError
from fairchem_equiformer.fairchem1 import saving

# Writes checkpoints of 4 MB, each full of its own number, until it is killed.
WRITER = """
import sys
from pathlib import Path
from fairchem_equiformer.files import keeping_the_one_before
path = Path(sys.argv[1])
for number in range(1, 10**6):
    with keeping_the_one_before(path, path.with_name("before")) as file:
        for _ in range(64):
            file.write(bytes([number % 251]) * 2**16)
    print(number, flush=True)
"""


def state(number, size=1000):
    return {"state_dict": {"weight": torch.full((size,), float(number))}, "step": number}


def save(folder, number, name="checkpoint.pt"):
    """As fairchem's trainers do."""
    return Path(base_trainer.save_checkpoint(state(number), str(folder), name))


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def flip(path, positions):
    content = bytearray(path.read_bytes())
    for position in positions:
        content[position] ^= 0xFF
    path.write_bytes(content)


def test_a_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    for number in (1, 2, 3):
        path = save(tmp_path, number)
    assert path == tmp_path / "checkpoint.pt"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint.previous.pt",
        "checkpoint.pt",
    ]
    assert [step_of(path), step_of(tmp_path / "checkpoint.previous.pt")] == [3, 2]


def test_only_the_state_of_training_is_kept_twice(tmp_path):
    for number in (1, 2):
        save(tmp_path, number, "best_checkpoint.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["best_checkpoint.pt"]


def test_without_hard_links_the_one_before_is_copied(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", unsupported)
    for number in (1, 2, 3):
        path = save(tmp_path, number)
    assert [step_of(path), step_of(tmp_path / "checkpoint.previous.pt")] == [3, 2]


def test_a_kill_while_writing_leaves_the_one_before(tmp_path, monkeypatch):
    path = save(tmp_path, 1)

    def killed(_, file):
        file.write(b"half")
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # SIGKILL tidies nothing up
        with pytest.raises(SystemError):
            save(tmp_path, 2)
    assert step_of(path) == 1
    save(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 2  # what was left over is gone


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.long)])
def test_random_kills(tmp_path, kills):
    """SIGKILL at a random moment of writing: the file, or the one before, is always whole."""
    rng, path = random.Random(0), tmp_path / "file"
    for _ in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        last = int(writer.stdout.readline())
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        last = int(([last, *writer.communicate()[0].split()])[-1])
        content = path.read_bytes()
        assert len(content) == 64 * 2**16
        assert set(content) <= {last % 251, (last + 1) % 251}
        assert len(set(content)) == 1
        assert len((tmp_path / "before").read_bytes() if last > 1 else content) == len(content)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path, monkeypatch, code):
    path = save(tmp_path, 1)

    def full(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoppedError) as stopped:
            save(tmp_path, 2)
    message = str(stopped.value)
    assert "\n" not in message
    for part in (str(path), os.strerror(code), "checkpoint before it is in place"):
        assert part in message
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert step_of(path) == 1


def test_a_full_device(monkeypatch, tmp_path):
    """What the kernel itself says while the tensors are written."""
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda _, mode: opened(Path("/dev/full"), mode))
    with pytest.raises(StoppedError, match="No space left on device"):
        base_trainer.save_checkpoint(state(1, 10**5), str(tmp_path))


def test_whole_checkpoints_are_good(tmp_path):
    assert saving.damage(save(tmp_path, 1)) is None
    old = tmp_path / "old.pt"
    torch.save(state(1), old, _use_new_zipfile_serialization=False)
    assert saving.damage(old) is None


def test_missing_empty_and_short_files_are_damaged(tmp_path):
    path = save(tmp_path, 1)
    content = path.read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 10):
        path.write_bytes(content[:keep])
        assert "cut short" in saving.damage(path)
    path.write_text("some text")
    assert "no file of torch.save" in saving.damage(path)
    path.write_bytes(b"")
    assert "empty" in saving.damage(path)
    path.unlink()
    assert "no such file" in saving.damage(path)


def test_flipped_bytes_are_seen(tmp_path):
    """torch loads them without a word; wherever they lie, they are seen or do no harm."""
    rng, path = random.Random(3), save(tmp_path, 1)
    content, expected = path.read_bytes(), state(1)["state_dict"]["weight"]
    seen = 0
    for _ in range(200):
        path.write_bytes(content)
        flip(path, [rng.randrange(len(content))])
        if saving.damage(path):
            seen += 1
        else:
            loaded = torch.load(path, weights_only=True)
            assert loaded["step"] == 1
            assert torch.equal(loaded["state_dict"]["weight"], expected)
    assert seen > 100


def test_the_newest_good_one_is_taken(tmp_path):
    for number in (1, 2):
        path = save(tmp_path, number)
    assert saving.newest_good(path) == (path, None)
    flip(path, range(2000, 2064))
    before = tmp_path / "checkpoint.previous.pt"
    good, reason = saving.newest_good(path)
    assert good == before
    assert "checksum" in reason
    flip(before, range(2000, 2064))
    with pytest.raises(InputError) as error:
        saving.newest_good(path)
    assert str(before) in str(error.value)


def test_other_files_have_no_one_before_them(tmp_path):
    path = save(tmp_path, 1, "best_checkpoint.pt")
    save(tmp_path, 1)
    flip(path, range(2000, 2064))
    with pytest.raises(InputError, match=r"best_checkpoint\.pt"):
        saving.newest_good(path)


def test_a_folder_is_on_disk_after_the_name(tmp_path, monkeypatch):
    """Without it, a crash of the machine may bring back the name of before."""
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle) or sync(handle))
    with files.keeping_the_one_before(tmp_path / "a", None) as file:
        file.write(b"x")
    assert len(synced) == 2
