"""Files are written whole or not at all, and nothing is read or written through a link, a pipe or a device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mezo_dist.storage import files
from mezo_dist.storage.files import cut_torn_line, move_aside, open_in_place, open_log, read_in_place, replace_file


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of somebody's, which a planted link points to."""
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def place(path: Path, kind: str, victim: Path) -> None:
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(victim)
        case "dangling":
            path.symlink_to(victim.with_name("nothing"))
        case "device":
            path.symlink_to("/dev/zero")


KINDS = ["folder", "fifo", "link", "dangling", "device"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(tmp_path: Path, victim: Path, kind: str) -> None:
    place(tmp_path / "file", kind, victim)
    for call in (
        lambda: read_in_place(tmp_path / "file", 100),
        lambda: open_in_place(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        lambda: cut_torn_line(tmp_path / "file"),
    ):
        with pytest.raises(OSError, match=r"regular file|not followed|Is a directory|No such device"):
            call()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_a_large_file_is_not_read(victim: Path) -> None:
    assert read_in_place(victim, 8) == b"precious"
    with pytest.raises(OSError, match="larger than the 7 bytes"):
        read_in_place(victim, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_was_planted_is_not_written_through(tmp_path: Path, victim: Path, kind: str) -> None:
    place(tmp_path / ".file.part", kind, victim)
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new"
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    assert not os.path.lexists(tmp_path / ".file.part")


def test_a_part_that_appears_meanwhile_is_not_written_to(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.link(victim, tmp_path / ".file.part")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"


def test_a_link_is_replaced_and_a_folder_is_not(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "file").symlink_to(victim)
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new"
    assert victim.read_text() == "precious"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "folder", b"new")
    assert not os.path.lexists(tmp_path / ".folder.part")


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_log_takes_the_place_of_anything(tmp_path: Path, victim: Path, kind: str, anew: bool) -> None:
    place(tmp_path / "log", kind, victim)
    with open_log(tmp_path / "log", anew=anew) as log:
        log.write("line\n")
    assert (tmp_path / "log").read_text() == "line\n"
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    assert os.path.lexists(tmp_path / "log.aside")


def test_a_log_goes_on_after_its_last_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK", 4)
    path = tmp_path / "log"
    for content, kept in (
        ("first\nseco", "first\n"),
        ("first\n", "first\n"),
        ("torn from the beginning", ""),
        ("", ""),
        ("\n" + "x" * 7, "\n"),
        ("abc\n" + "x" * 8, "abc\n"),
    ):
        path.write_text(content)
        with open_log(path) as log:
            log.write("next\n")
        assert path.read_text() == f"{kept}next\n"
    with open_log(path, anew=True) as log:
        log.write("new\n")
    assert path.read_text() == "new\n"


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_log(tmp_path / "nowhere" / "log")


def test_names_aside_are_free(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "victim.aside").symlink_to("nowhere")
    assert move_aside(victim) == tmp_path / "victim.aside-2"
    assert (tmp_path / "victim.aside-2").read_text() == "precious"
