"""A comparison with another commit: what is checked out, what takes turns, and what is worse."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
import yaml

from benchmarks import base, compare
from benchmarks.base import KERNELS, ROOT, checked_out, judged
from tests.test_benchmarks import TINY

RECORD = {
    "flop": 100,
    "saved_bytes": 100,
    "regions": 100,
    "rounds": {"seconds": [1.0, 1.01, 1.02], "peak_bytes": [100, 101, 102]},
}


def changed(**figures):
    rounds = RECORD["rounds"] | {name: v for name, v in figures.items() if isinstance(v, list)}
    counts = {name: v for name, v in figures.items() if not isinstance(v, list)}
    return RECORD | counts | {"rounds": rounds}


def test_noise_is_not_worse():
    assert judged(RECORD, RECORD) == ([], [])
    assert judged(RECORD, changed(seconds=[1.05, 1.04, 2.0], flop=90, regions=3)) == ([], [])


@pytest.mark.parametrize("name", ["flop", "saved_bytes", "regions"])
def test_one_more_of_what_is_counted_is_worse(name):
    worse, unsure = judged(RECORD, changed(**{name: 101}))
    assert worse == [f"{name} from 100 to 101, +1.0%"]
    assert unsure == []


@pytest.mark.parametrize("name", ["seconds", "peak_bytes"])
def test_measured_ones_are_judged_by_the_noise_of_the_base(name):
    first = RECORD["rounds"][name][0]
    more = changed(**{name: [1.2 * first, 1.07 * first, 1.08 * first]})
    worse, unsure = judged(RECORD, more)
    assert len(worse) == 1
    assert worse[0].startswith(f"{name} from ")
    assert worse[0].endswith("+6.9% (the base's own rounds spread by 2.0%)")
    assert unsure == []

    noisy = changed(**{name: [first, first, 1.2 * first]})
    worse, unsure = judged(noisy, more)
    assert worse == []
    assert unsure[0].endswith("(the base's own rounds spread by 20.0%)")


def test_who_fails_is_worse_unless_the_base_did():
    failed = {"failure": "out of memory"}
    assert judged(RECORD, failed) == (["out of memory"], [])
    assert judged(failed, RECORD) == ([], ["the base: out of memory"])


def test_without_a_c_compiler_regions_are_not_compared():
    record = {name: value for name, value in RECORD.items() if name != "regions"}
    assert judged(record, changed(regions=200)) == ([], [])


def git(folder, *arguments):
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = [shutil.which("git"), *author, *arguments]
    return subprocess.check_output(command, cwd=folder, text=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A project of two commits, whose kernels changed in between."""
    root = tmp_path / "project"
    native = root / base.NATIVE
    native.mkdir(parents=True)
    (root / "benchmarks").mkdir()
    (root / "setup.py").write_text(f"open({str(KERNELS)!r}, 'w').write('built')")

    git(root, "init", "-q")
    (root / ".gitignore").write_text("*.so\n")
    for version in ("old", "new"):
        (native / "a.cpp").write_text(version)
        (root / "benchmarks" / "compare.py").write_text(version)
        git(root, "add", ".")
        git(root, "commit", "-qm", version)
    (root / KERNELS).write_text("copied")
    monkeypatch.setattr(base, "ROOT", root)
    return root


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@needs_git
@pytest.mark.parametrize(("ref", "kernels"), [("HEAD", "copied"), ("HEAD~1", "built")])
def test_a_commit_is_checked_out_with_its_kernels_and_this_trees_benchmarks(
    ref, kernels, repository
):
    with checked_out(ref) as tree:
        version = "new" if ref == "HEAD" else "old"
        assert (tree / base.NATIVE / "a.cpp").read_text() == version
        assert (tree / KERNELS).read_text() == kernels
        assert (tree / "benchmarks" / "compare.py").read_text() == "new"
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert (repository / "benchmarks" / "compare.py").read_text() == "new"


@needs_git
def test_what_cannot_be_checked_out_is_said(repository):
    with pytest.raises(SystemExit, match=r"git worktree add .*nowhere:\n.*invalid reference"):
        checked_out("nowhere").__enter__()
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    git(repository, "commit", "-qam", "broken")
    (repository / base.NATIVE / "a.cpp").write_text("newer")
    with pytest.raises(SystemExit, match="no compiler"):
        checked_out("HEAD").__enter__()


@pytest.fixture
def tiny(tmp_path):
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump({"model": TINY}))
    return [str(config), "--sizes", "45", "--out", str(tmp_path)]


def test_two_commits_take_turns(tiny, tmp_path, monkeypatch, capsys):
    calls = []

    def run(spec, _, contender):
        root = contender.root
        calls.append((spec.implementation, root, spec.weights))
        torch.save({"energy": torch.ones(1)}, spec.results)
        return {
            "atoms": 45,
            "parameters": 1,
            "times": [2.0 if root == compare.ROOT else 1.0],
            "cpu_times": [2.0],
            "peak_bytes": 100,
            "flop": 100,
            "gemm_flop_per_second": 1e9,
        }

    class Checkout:
        def __enter__(self):
            return tmp_path

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(compare, "run_child", run)
    monkeypatch.setattr(compare, "checked_out", lambda ref: {"main": Checkout()}[ref])
    with pytest.raises(SystemExit) as end:
        compare.main(["--base", "main", "--rounds", "2", "--models", *tiny])
    assert [root for _, root, _ in calls] == [tmp_path, ROOT, tmp_path, ROOT]
    assert {name for name, _, _ in calls} == {"ours"}
    assert len({weights for _, _, weights in calls}) == 1
    assert (
        "worse than the base:\ninference, tiny, 1 x 45 atoms: seconds from 1 to 2" in end.value.code
    )
    assert "base" in capsys.readouterr().out


def test_only_this_package_has_other_commits(capsys):
    assert compare.parse(["--base", "main"]).implementations == ["ours"]
    assert compare.parse(["--base", "main"]).rounds == 5
    assert compare.parse([]).implementations == ["stock", "ours"]
    with pytest.raises(SystemExit):
        compare.parse(["--base", "main", "--implementations", "stock", "ours"])
    assert "--base compares one implementation of this package" in capsys.readouterr().err


@needs_git
@pytest.mark.long
def test_a_real_comparison_with_this_commit(tiny, capsys):
    """The same code: whatever the machine does meanwhile, nothing that is counted differs."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no repository of git")
    command = ["--base", "HEAD", "--tasks", "training", "--rounds", "2", "--seconds", "0"]
    try:
        compare.main([*command, "--models", *tiny])
    except SystemExit as end:
        worse = end.code.splitlines()[1:]
        assert all(re.search("atoms: (seconds|peak_bytes) from", line) for line in worse), worse
    assert "ours" in capsys.readouterr().out
