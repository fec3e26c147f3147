"""A migrated, empty Prefect database to start new homes from: it spares each of them 115 migrations."""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

DATABASE = "prefect.db"


def template_path(folder: Path) -> Path:
    """Name the template of the Prefect that is installed; another version has other migrations."""
    return folder / f"prefect-{version('prefect')}.db"


def restore(template: Path, home: Path) -> None:
    """Give a new `home` a copy of the template, if there is one."""
    if template.exists():
        shutil.copyfile(template, home / DATABASE)


def save(template: Path, home: Path) -> None:
    """Make the database of a server that just became ready the template, unless there is one already.

    The file appears whole or not at all, so several processes may do this at once.
    """
    if template.exists():
        return
    template.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=template.parent) as scratch:
        copy = Path(scratch) / DATABASE
        # SQLite's own backup is consistent while the server uses the database.
        with closing(sqlite3.connect(home / DATABASE)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        copy.replace(template)
