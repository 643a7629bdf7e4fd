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
    found = [m["extra"] for line in lines if (m := _REQUIREMENT.match(line)) and m["name"].lower() == distribution]
    return f"; pip install 'mmrl[{found[0]}]'" if distribution and found else ""
