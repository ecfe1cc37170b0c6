@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Return a folder with a small table: a kind that follows from two numbers and a text."""
    folder = tmp_path / "table"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = ["length,width,colour,kind"]
    for length, width in torch.rand(160, 2, generator=generator).tolist():
        colour = "red" if width > 0.5 else "blue"
        kind = "long" if length > width else "wide"
        lines.append(f"{length:.3f},{width:.3f},{colour},{kind}")
    (folder / "rows.csv").write_text("\n".join(lines))
    return folder
