"""Schedules and warm-ups of the learning rate, for AdamW and Muon with the rates of their presets.

``python -m benchmarks.embedded_text.schedules`` trains each with the same seeds by the command ``sweep``.
"""

from benchmarks.embedded_text.project import QUICK, by_seed, compared, parser_of, sweep, write_config, write_record
from benchmarks.record import print_table

OPTIMIZERS = ("adamw", "moonlight")
COSINE = "cosine"  # the default, with which the others are compared
# Presets, or the content of a config file.
SCHEDULES = {
    COSINE: "model: {lr_scheduler: {class_path: lightning_muon.optim.WarmupCosine, init_args: {warmup: 0.0}}}",
    "cosine after a warm-up of 1/20": "schedule/warmup_cosine",
    "cosine after a warm-up of 1/5": "model: {lr_scheduler: {class_path: lightning_muon.optim.WarmupCosine,"
    " init_args: {warmup: 0.2}}}",
    "warm-up of 1/20, stable, decay in the last 1/5": "schedule/warmup_stable_decay",
    "one cycle": "schedule/one_cycle",
    "constant": "schedule/constant",
}
SEEDS = (42, 43, 44, 45)


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, or go on with it, and write the record."""
    options = parser_of(__doc__).parse_args(arguments)
    folder = options.folder.absolute() / "schedules"
    files = {
        name: text if text.startswith("schedule/") else write_config(folder, name.replace("/", "_"), text)
        for name, text in SCHEDULES.items()
    }
    configs = {(optimizer, name): [f"optimizer/{optimizer}", files[name]] for optimizer in OPTIMIZERS for name in files}
    varied = {"config": [*configs.values()], "seed_everything": SEEDS}
    trials = sweep(folder, varied, [f"--jobs={options.jobs}", *(QUICK if options.quick else ())])
    found = {key: by_seed(trials, {"config": config}) for key, config in configs.items()}
    rows = [
        {"optimizer": optimizer, "schedule": name, **compared(own, found[optimizer, COSINE], COSINE)}
        for (optimizer, name), own in found.items()
    ]
    title = f"Schedules of the learning rate, {len(SEEDS)} seeds; losses with 95 % intervals"
    print_table(title, rows, list(rows[0]))
    write_record(options, "schedules", title, folder, {"seeds": SEEDS, "rows": rows})


if __name__ == "__main__":
    main()
