"""How often routing is right on architectures that nobody here wrote: the answers are in tests/corpus.

``python -m benchmarks.routing_corpus`` builds each, routes it, compares, and names what is wrong. Models of libraries
that are not installed are left out: ``make install-corpus`` installs all of them.
"""

import argparse
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.record import REPOSITORY, RESULTS, report
from tests.corpus.corpus import Judged, elements, entries, judge, missing

COLUMNS = ["library", "architectures", "parameters", "elements", "right", "guessed", "wrong with a warning", "wrong"]
LIBRARIES = ("transformers", "timm", "diffusers", "torch-geometric", "peft")


def row(library: str, architectures: list[list[Judged]]) -> dict[str, Any]:
    """Return the row of a library: counts, and of the verdicts the shares of all elements."""
    judged = [one for architecture in architectures for one in architecture]
    total = sum(one.elements for one in judged)
    result: dict[str, Any] = {"library": library, "architectures": len(architectures)}
    result |= {"parameters": len(judged), "elements": total}
    for verdict in ("right", "guessed", "wrong with a warning", "wrong"):
        count = elements(judged, verdict)
        result[verdict] = f"{100 * count / total:.2f} %"
        result[f"{verdict}, elements"] = count
        result[f"{verdict}, parameters"] = sum(one.verdict == verdict for one in judged)
    return result


def installed() -> dict[str, str]:
    """Return the versions of the libraries."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_corpus", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only models in plain PyTorch, to check that it runs")
    parser.add_argument("--results", type=Path, help="folder for the JSON record")
    options = parser.parse_args(arguments)
    libraries: defaultdict[str, list[list[Judged]]] = defaultdict(list)
    left_out = defaultdict(list)
    for entry in entries().values():
        if options.quick and entry.library != "plain":
            continue
        if absent := missing(entry.build):
            left_out[absent].append(entry.name)
            continue
        judged = judge(entry, entry.model())
        libraries[entry.library].append(judged)
        for one in judged:
            if one.verdict.startswith("wrong"):
                print(f"{entry.name}: {one.verdict}: {one}")
    for library, names in left_out.items():
        print(f"{library} is not installed: {len(names)} architectures are left out")
    rows = [row(library, libraries[library]) for library in sorted(libraries)]
    rows.append(row("together", [judged for of_one in libraries.values() for judged in of_one]))
    # --quick gives a part of the table only, so it must not replace the record.
    results = options.results or (REPOSITORY / "build" / "benchmarks" if options.quick else RESULTS)
    settings = {"quick": options.quick, "versions": installed(), "left out": dict(left_out)}
    report("Routes beside the answers of the corpus", rows, COLUMNS, settings, "routing_corpus-cpu", results)


if __name__ == "__main__":
    main()
