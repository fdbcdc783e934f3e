import os
import shutil
import subprocess

import pytest

from lpcam.data.debian import fetch
from lpcam.errors import InputError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not here")


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """Puts an apt-get first in PATH that runs the given shell line and notes its arguments."""
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "calls"

    def install(line):
        script = programs / "apt-get"
        script.write_text(f"#!/bin/sh\necho $1 >> {calls}\n{line}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return calls

    return install


@pytest.fixture
def package(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: tiny\n"
    )
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / "wanted").write_text("this")
    (tree / "usr" / "share" / "unwanted").write_text("that")
    (tree / "usr" / "share" / "link").symlink_to("/etc/passwd")
    deb = tmp_path / "tiny.deb"
    subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
    return deb


@needs_dpkg
def test_only_what_is_wanted_is_unpacked(tmp_path, fake_apt, package):
    fake_apt(f"cp {package} tiny_1_all.deb")
    folder = tmp_path / "download"
    folder.mkdir()
    fetch("tiny", {"usr/share/wanted": folder / "a" / "b"}, folder, "do without")
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / "a" / "b"]
    assert (folder / "a" / "b").read_text() == "this"


@needs_dpkg
@pytest.mark.parametrize("name", ["usr/share/other", "usr/share/link"])
def test_a_file_that_the_package_lacks_is_named(tmp_path, fake_apt, package, name):
    fake_apt(f"cp {package} tiny_1_all.deb")
    with pytest.raises(InputError, match=f"tiny: has no {name}; do without"):
        fetch("tiny", {name: tmp_path / "never"}, tmp_path, "do without")
    assert not (tmp_path / "never").exists()


@needs_dpkg
def test_a_damaged_package_is_said_in_one_line(tmp_path, fake_apt):
    fake_apt("echo rubbish > tiny_1_all.deb")
    with pytest.raises(InputError, match=r"^tiny: .*; do without$") as caught:
        fetch("tiny", {"x": tmp_path / "x"}, tmp_path, "do without")
    assert "\n" not in str(caught.value)


@needs_dpkg
@pytest.mark.parametrize(
    ("user", "expected"),
    [(0, ["download", "update", "download"]), (1000, ["download"])],
    ids=["root", "user"],
)
def test_only_root_updates_the_lists(tmp_path, fake_apt, monkeypatch, user, expected):
    failing = "[ $1 = update ] || { echo first >&2; echo 'E: no such package' >&2; exit 100; }"
    calls = fake_apt(failing)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(InputError) as caught:
        fetch("tiny", {}, tmp_path, "do without")
    assert calls.read_text().split() == expected
    assert str(caught.value) == (
        "apt-get download tiny: E: no such package; run 'apt-get update', or do without"
    )


def test_without_apt_the_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"^apt-get: not found, needed to fetch tiny; do without$"):
        fetch("tiny", {}, tmp_path, "do without")
