"""One of several processes: run the checks of a file, and write down which of them failed.

Usage: python run_checks.py FILE RANK WORLD_SIZE STORE RESULT
"""

import importlib
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    torch.set_num_threads(1)
    file, rank, world_size, store, result = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),  # a rank that waits for one that failed gives up
    )
    checks = importlib.import_module(file.stem)
    failures: dict[str, str] = {}
    for name, check in vars(checks).items():
        if name.startswith("check_") and world_size in getattr(check, "world_sizes", (world_size,)):
            try:
                check()
            except Exception:
                failures[name] = traceback.format_exc()
                break  # the ranks may no longer be at the same place
    Path(f"{result}.{rank}").write_text(json.dumps(failures))
    if not failures:
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
