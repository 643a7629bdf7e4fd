"""Fixtures that several tests of vision/ share."""

import pytest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of four small pictures, 0.png to 3.png, each another one."""
    from families import picture

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    return folder
