"""Settings that were renamed or removed since the first version (``data/old_settings.toml``).

``Config.load`` refuses an old name and says the new one; the second migration of the store's
database writes the new names into the settings that earlier edits recorded.
"""

import tomllib
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "data" / "old_settings.toml"


@cache
def old_settings(change: str) -> dict[str, dict[str, str]]:
    """By section and old name: the new name (``renamed``), or what to do (``removed``)."""
    changes: dict[str, dict[str, dict[str, str]]] = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return changes[change]
