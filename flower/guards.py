"""The keys of a federation: what its server does about a site that fails or that sends too much."""

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


def load_settings(file, overrides):
    """Return (config, guards) of a YAML file and key=value texts: the settings of the training, and those of
    the federation alone, which no run folder keeps. Raises BadInput."""
    given, name = read_yaml(file), Path(file).stem
    changed = [text for text in overrides if text.partition("=")[0] in GUARDS]
    found = {key: value for key, value in given.items() if key in GUARDS} | dict(map(read_override, changed))
    guards = {key: default for key, (_, default, _) in GUARDS.items()}
    guards |= {key: read_value(key, value, GUARDS, None) for key, value in found.items()}
    given = {"out": f"runs/{name}"} | {key: value for key, value in given.items() if key not in GUARDS}
    config = load_config(given, [text for text in overrides if text not in changed])
    if config.method in ("local", "pooled"):
        raise BadInput(f"method: {config.method} is no federation, nothing would travel; "
                       "run it with train.py")
    return config, SimpleNamespace(**guards)
