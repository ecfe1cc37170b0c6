@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Return a folder for data that the tests need."""
    return tmp_path / "data"
