"""A method in a file of one's own: FILE.py:FUNCTION."""

import importlib.util
from pathlib import Path

from settings.kinds import BadInput


def import_file(file, name):
    """Return the module of a file that has a function `name`; raises BadInput for what cannot be imported.

    It is looked for in the current folder, then beside config.py (at a site of Flower)."""
    found = Path(file) if Path(file).is_file() else Path(__file__).parents[1] / file
    if not found.is_file():
        raise BadInput(f"method: there is no file {file}, give its path from the current folder")
    spec = importlib.util.spec_from_file_location(found.stem, found)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:  # noqa: BLE001 - it is somebody's own code
        raise BadInput(f"method: {file} cannot be imported ({type(problem).__name__}: {problem}), "
                       "mend it") from None
    if not callable(getattr(module, name, None)):
        raise BadInput(f"method: {file} has no function {name}(config), name one of its functions")
    return module
