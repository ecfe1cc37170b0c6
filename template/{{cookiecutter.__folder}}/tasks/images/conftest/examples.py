@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Return a folder with twenty images of each of three classes, which their colours tell."""
    import numpy as np
    from PIL import Image

    (tmp_path / "small.yaml").write_text(NETWORK)
    folder, generator = tmp_path / "pictures", np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(156, size=(8, 10, 3), dtype=np.uint8)
            pixels[:, :, channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
