import sqlite3
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from infra.local.prefect_template import DATABASE, restore, save, template_path


def database(path: Path, word: str) -> Path:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("create table words (word text)")
        connection.execute("insert into words values (?)", (word,))
    return path


def words(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [word for (word,) in connection.execute("select word from words")]


def test_a_template_is_for_one_version_of_prefect(tmp_path: Path) -> None:
    assert template_path(tmp_path).name == f"prefect-{version('prefect')}.db"


def test_a_database_in_use_is_saved_whole_and_restored_into_a_new_home(tmp_path: Path) -> None:
    template = template_path(tmp_path / "templates")
    home = database(tmp_path / "home" / DATABASE, "first").parent
    (tmp_path / "new").mkdir()

    with closing(sqlite3.connect(home / DATABASE)) as user:
        user.execute("begin immediate")
        user.execute("insert into words values ('not committed')")
        save(template, home)
    restore(template, tmp_path / "new")

    assert words(tmp_path / "new" / DATABASE) == ["first"]
    assert list(template.parent.iterdir()) == [template]


def test_the_first_template_stays(tmp_path: Path) -> None:
    template = template_path(tmp_path / "templates")

    for word in ("first", "second"):
        save(template, database(tmp_path / word / DATABASE, word).parent)

    assert words(template) == ["first"]


def test_without_a_template_a_new_home_stays_empty(tmp_path: Path) -> None:
    restore(template_path(tmp_path / "templates"), tmp_path)

    assert list(tmp_path.iterdir()) == []
