"""What a command of several trainings keeps in its folder, so that the same words go on where they stopped."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.files import listed, read_json


def kept(path: Path, identity: Mapping[str, Any], what: str, ours: Collection[str] = ()) -> dict[str, Any]:
    """The tree in ``path``, or a new one with only ``identity``: what those who go on must share with who began.

    what: of which the folder is. ours: names that may be there before the file is.
    Errors: ConfigError where the folder is that of another, or holds something else.
    """
    out, tree = path.parent, {"identity": json.loads(json.dumps(identity))}
    if not path.exists():
        if strangers := [other.name for other in listed(out) if other.name not in ours]:
            raise ConfigError(f"--out {out} holds something else ({strangers[0]}); name a new folder")
        return tree
    before = read_json(path)
    here, there = tree["identity"], before.get("identity", {})
    if keys := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
        shown = ", ".join(f"{key} {there.get(key)} there and {here.get(key)} here" for key in keys[:3])
        raise ConfigError(f"--out {out} is of another {what}: {shown}; name another folder, or remove it")
    return before
