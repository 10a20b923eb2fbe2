import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.wire.keys import Keys, check_new_name, load_authorised, load_keys, load_public_key, write_keys

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
KEY = st.text(Z85, min_size=40, max_size=40).map(str.encode)


@given(KEY, KEY)
def test_every_key_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, public: bytes, secret: bytes
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    _, path = write_keys(folder, "node", Keys(public, secret))
    assert load_keys(path) == Keys(public, secret)
    assert load_keys(folder) == Keys(public, secret)
    assert load_public_key(folder / "node.key") == public
    assert load_authorised(folder) == {public}


def test_a_secret_is_for_its_owner_only_and_no_secret_is_in_the_public_file(tmp_path: Path) -> None:
    public, secret = write_keys(tmp_path, "node", Keys(b"{" * 40, b"}" * 40))
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert "}" * 40 not in public.read_text()


def test_one_bad_file_does_not_lock_out_everybody(tmp_path: Path) -> None:
    write_keys(tmp_path, "good", Keys(b"a" * 40, b"b" * 40))
    (tmp_path / "bad.key").write_text("no key here")
    assert load_authorised(tmp_path) == {b"a" * 40}


def test_a_folder_with_several_secrets_asks_which(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_keys(tmp_path, name, Keys(b"a" * 40, b"b" * 40))
    with pytest.raises(ConfigError, match="name the file itself"):
        load_keys(tmp_path)


def test_a_name_is_checked_without_making_anything(tmp_path: Path) -> None:
    for name in ("", "a/b", "a b"):
        with pytest.raises(ConfigError, match="letters, digits"):
            check_new_name(tmp_path / "new", name)
    check_new_name(tmp_path / "new", "edge0")
    assert not (tmp_path / "new").exists()
