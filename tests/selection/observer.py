"""Notes which files of the project a Python process opens, which folders it lists, and which files it gives to others.

`install` has each process of an environment do so from its start, whoever starts it and with what variables. It imports
nothing that Python has not imported by then, and does nothing where `.tests/reads` is no folder.
"""

from __future__ import annotations

import os
import sys
import sysconfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = ".tests/reads"
# A line for each thing that was read: the reader, a tab, and the path from the project's root. A folder ends in "/".
LOG = "log.txt"
_MODULE = "overnight_observer"
EVENTS = frozenset({"open", "os.symlink", "os.listdir", "os.scandir", "subprocess.Popen"})
# Folders of a checkout that hold no file of the project.
_OTHERS = (".venv/", ".git/", ".tests/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/")


class Observer:
    """The observer of this process.

    `reader` is for whom the process works: a file of tests, or a fixture that several of them share. It is handed down
    in PYTHONPATH, as a folder that is not there. A process that has lost it asks its nearest observed ancestor.
    """

    def __init__(self, root: str) -> None:
        self.root = root + os.sep
        self.folder = self.root + FOLDER
        self._noted: set[tuple[str, str]] = set()
        self.reader = self._find_reader()

    def set_reader(self, reader: str) -> None:
        """Say for whom this process works from now on; those that it starts from now on work for the same."""
        self.reader = reader
        kept = [each for each in self._list_path() if not each.startswith(self.folder)]
        os.environ["PYTHONPATH"] = os.pathsep.join([*kept, f"{self.folder}/{reader}"])
        self.tell_children()

    def tell_children(self) -> None:
        """Leave the reader where processes look that have lost the variable."""
        _write(self._name_file(os.getpid()), self.reader, os.O_TRUNC)

    def note_path(self, path: object, end: str = "") -> None:
        """Note that a file was opened, or with the end "/" a folder listed, where it lies in the project."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            # The number of a file that is open already.
            return
        found = os.path.abspath(os.fsdecode(path)) + end
        if not found.startswith(self.root):
            return
        found = found[len(self.root) :]
        if found.startswith(_OTHERS):
            return
        if found.endswith(".pyc"):
            folder, _, name = found.rpartition("__pycache__/")
            found = f"{folder}{name.partition('.')[0]}.py"
        self.note(self.reader, found)

    def note(self, reader: str, read: str) -> None:
        """Note that someone needs something: a file, a folder, or another reader."""
        if (reader, read) not in self._noted:
            self._noted.add((reader, read))
            _write(f"{self.folder}/{LOG}", f"{reader}\t{read}\n", os.O_APPEND)

    def note_event(self, event: str, arguments: tuple[object, ...]) -> None:
        """Note what one of `EVENTS` tells of, with the arguments that Python's documentation has for it."""
        if event in ("open", "os.symlink"):
            self.note_path(arguments[0])
        elif event == "subprocess.Popen":
            # A program that is no Python tells of nothing: take what it is given.
            for each in arguments[1] if isinstance(arguments[1], (list, tuple)) else ():
                if isinstance(each, (str, os.PathLike)) and os.path.isfile(each):
                    self.note_path(each)
        else:
            self.note_path(arguments[0], "/")

    def _list_path(self) -> list[str]:
        return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]

    def _find_reader(self) -> str:
        for each in self._list_path():
            if each.startswith(f"{self.folder}/"):
                return each[len(self.folder) + 1 :]
        pid = os.getppid()
        while pid > 1:
            try:
                with open(self._name_file(pid)) as file:
                    return file.read()
            except OSError:
                pid = int(_read_status(pid)[1])
        return ""

    def _name_file(self, pid: int) -> str:
        # With the time of its start, since numbers are used again.
        return f"{self.folder}/{pid}-{_read_status(pid)[19]}"


# That of this process, where it is observed.
here: Observer | None = None


def observe(root: str) -> None:
    """Observe this process from now on, where reads are to be noted."""
    global here  # noqa: PLW0603 - a process has one
    if os.path.isdir(f"{root}/{FOLDER}"):
        here = Observer(root)
        here.tell_children()
        sys.addaudithook(_make_hook(here))


def _make_hook(observer: Observer) -> Callable[[str, tuple[object, ...]], None]:
    # When Python ends, it takes away what modules have, and calls hooks still.
    events, is_finalizing, find_frame = EVENTS, sys.is_finalizing, sys._getframe

    def note(event: str, arguments: tuple[object, ...]) -> None:
        # What imports lists folders too.
        if event in events and not is_finalizing():
            if "dir" in event and find_frame(1).f_code.co_filename.startswith("<frozen importlib"):
                return
            observer.note_event(event, arguments)

    return note


def find_observer() -> Observer | None:
    """Return that of this process; None where it is not observed."""
    module = sys.modules.get(_MODULE)
    return module.here if module else None


def install(root: str) -> None:
    """Have each process of this environment observed from its start, and forget what was noted before."""
    packages = sysconfig.get_path("purelib")
    with open(__file__) as file:
        _write(f"{packages}/{_MODULE}.py", file.read(), os.O_TRUNC)
    # Python runs such a line before anything else.
    _write(f"{packages}/{_MODULE}.pth", f"import {_MODULE}; {_MODULE}.observe({root!r})\n", os.O_TRUNC)
    os.makedirs(f"{root}/{FOLDER}")


def _read_status(pid: int) -> list[str]:
    """Return the fields of a process from its state on; the fourth of all is its parent, and the 22nd its start."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return ["", "0", *[""] * 20]


def _write(path: str, text: str, flag: int) -> None:
    # In one call, so that lines of several processes do not mix; nothing stays open.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)
