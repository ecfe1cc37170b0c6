@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Return a folder with three classes of twenty images each: their brightest quarter tells the class."""
    ...
