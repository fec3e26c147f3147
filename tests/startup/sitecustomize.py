"""What Python runs first in each process that a test starts.

Most of these processes import all that a run needs: a million objects that stay. Python would look for garbage among
them again and again while they are made, and once more at the end: up to a second of the four of such a process.
"""

import atexit
import gc
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

gc.set_threshold(20_000)
atexit.register(gc.freeze)

# The one that this one hides, where Python or the environment has one.
_here, _, _ = __file__.rpartition(os.sep)
_hidden = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != _here])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
