"""Presets of the optimizer that change more than an option of the polar factor train a generated project."""

from pathlib import Path

from tests.processes import launch

PROGRAM = Path(__file__).with_name("preset_training.py")
STEPS = 30


def test_presets_train_and_do_what_they_say(baked_project: Path, tmp_path: Path) -> None:
    presets = ["moonlight", "int8", "per_head", "roles", "fixed_norm"]
    configs, source = baked_project / "configs", baked_project / "src"
    (found,) = launch(PROGRAM, "fit", 1, configs, presets, STEPS, folder=tmp_path, path=[source])
    for preset in presets:
        losses = found[preset]["losses"]
        assert len(losses) == STEPS
        assert sum(losses[-5:]) / 5 < 0.85 * losses[0], preset
    assert len({tuple(found[preset]["losses"]) for preset in presets}) == len(presets)

    def by_role(preset: str) -> dict[str, dict[str, object]]:
        return {group["role"]: group for group in found[preset]["groups"]}

    assert found["moonlight"]["state"] == ["torch.float32"]
    assert {"torch.int8", "torch.uint8"} <= set(found["int8"]["state"])
    lrs = {role: group["initial_lr"] for role, group in by_role("roles").items()}
    assert len(set(lrs.values())) >= 3
    assert lrs["matrix"] != lrs["embedding"]
    assert by_role("fixed_norm")["matrix"]["fixed_norm"]
    blocks = {layout["blocks"] for layout in by_role("per_head")["matrix"]["layouts"]}  # type: ignore[attr-defined]
    assert 2 in blocks
    assert blocks != {layout["blocks"] for layout in by_role("moonlight")["matrix"]["layouts"]}  # type: ignore[attr-defined]
