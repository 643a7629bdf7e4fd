"""Packages that come with an extra of mmrl, such as `mmrl[video]`: what to install when one is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

# Import names that differ from the name of the distribution by more than a hyphen.
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+).*?extra == ['\"](?P<extra>[\w-]+)['\"]")


def how_to_install(error: ImportError) -> str:
    """The end of a message about a failed import: the extra that holds the package, empty where no extra does."""
    package = (error.name or "").partition(".")[0]
    distribution = _DISTRIBUTIONS.get(package, package).replace("_", "-").lower()
    try:
        lines = requires("mmrl") or []
    except PackageNotFoundError:
        return ""
    packages: dict[str, set[str]] = {}
    for line in lines:
        if match := _REQUIREMENT.match(line):
            packages.setdefault(match["extra"], set()).add(match["name"].lower())
    # The smallest one: an extra that includes others lists their packages as well.
    holding = sorted((len(names), extra) for extra, names in packages.items() if distribution in names)
    return f"; pip install 'mmrl[{holding[0][1]}]'" if distribution and holding else ""
