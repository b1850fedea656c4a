"""The keys of a federation: what its server does about a site that fails or that sends too much."""

import shlex
from pathlib import Path
from types import SimpleNamespace

from config import BadInput, load_config, read_override, read_value, read_yaml
from settings.kinds import choice, number, or_none, whole

GUARDS = {  # in the form of config.KEYS
    "on_site_failure": (choice("stop", "skip"), "stop", "skip: a site that fails sits out a round"),
    "min_sites": (whole(1), 1, "with skip: the fewest sites that a round may be averaged over"),
    "max_share": (number(above=0, most=1), 1.0, "the largest share of one site in the average of weights"),
    "update_norm": (or_none(number(least=1)), 10.0,
                    "X: of three sites, refuse an update X times as long as the median; none: any length"),
}


def settings(context, *overrides):
    """Return the config that the server and all sites share, as the run's settings name it, and guards."""
    run = context.run_config
    return load_settings(Path(__file__).parents[1] / str(run["config"]),
                         [*shlex.split(str(run["overrides"])), *overrides])


def load_settings(file, overrides):
    """Return (config, guards) of a YAML file and key=value texts: the settings of the training, and those of
    the federation alone, which no run folder keeps. Raises BadInput."""
    given, own = read_yaml(file), [text for text in overrides if text.partition("=")[0] in GUARDS]
    found = given | dict(map(read_override, own))
    guards = {key: read_value(key, found[key], GUARDS, None) if key in found else default
              for key, (_, default, _) in GUARDS.items()}
    given = {"out": f"runs/{Path(file).stem}"} | {key: given[key] for key in given if key not in GUARDS}
    config = load_config(given, [text for text in overrides if text not in own])
    if config.method in ("local", "pooled"):
        raise BadInput(f"method: {config.method} is no federation, nothing would travel; "
                       "run it with train.py")
    return config, SimpleNamespace(**guards)
