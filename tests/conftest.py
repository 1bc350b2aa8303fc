"""What all tests share."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder where this test caches its data: its own, not the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PICO_CACHE", str(folder))
    return folder
