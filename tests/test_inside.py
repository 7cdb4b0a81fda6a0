import pytest

from prefgen.inside import is_inside


def test_links_are_followed_and_circles_are_no_error(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "own").write_text("x")
    (root / "link").symlink_to(root / "own")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    assert is_inside(root / "own", root=root)
    assert is_inside(root / "link", root=root)
    assert is_inside(root / "not there", root=root)
    assert not is_inside(root / "out", root=root)
    assert not is_inside(root / ".." / "secret", root=root)
    assert is_inside(root / "loop", root=root)
    with pytest.raises(OSError, match="symbolic links"):
        (root / "loop").stat()


def test_a_root_behind_a_link_is_the_folder_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert is_inside(tmp_path / "real" / "x", root=tmp_path / "link")


def test_nul_bytes_are_the_callers(tmp_path):
    with pytest.raises(ValueError, match="null byte"):
        is_inside(tmp_path / "a\0b", root=tmp_path)
