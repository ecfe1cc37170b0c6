"""``python -m lightning_muon.cli fit --model my.Module --data my.Data …``: train any importable module."""

from lightning_muon.cli.program import main

if __name__ == "__main__":
    main()
