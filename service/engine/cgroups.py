"""Finds the folders of the cgroups (v1 and v2) that contain this process. Their limits are read elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def own_cgroups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of each cgroup around this process with this controller, innermost first.

    A container may see its own cgroup as the root, so the folders need not exist.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            version, roots = 2, [_CGROUPS, _CGROUPS / "unified"]
        elif controller in controllers.split(","):
            version, roots = 1, [_CGROUPS / controller, _CGROUPS / controllers]
        else:
            continue
        for root in dict.fromkeys(roots):
            place = root / path.lstrip("/")
            for folder in (place, *place.parents):
                if not folder.is_relative_to(root):
                    break
                yield version, folder
