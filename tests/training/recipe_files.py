"""Configurations of trainings, written for one test each."""

from pathlib import Path

import yaml


def write_config(made, output, changes):
    """Writes a configuration beside its output; returns the path as text.

    Args:
        made: the configuration as a dictionary; changed in place.
        output: folder of the run.
        changes: values of the recipe by their path, "optimisation__steps".
    """
    for path, value in changes.items():
        place = made["recipe"]["init_args"]
        *parents, name = path.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    path = Path(f"{output}.yaml")
    path.write_text(yaml.safe_dump(made))
    return str(path)
