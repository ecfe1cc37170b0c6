@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Return a folder with twenty small text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"file {number}: the quick brown fox jumps over the lazy dog.\n" * 40)
    return folder
