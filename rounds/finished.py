"""A run that is there already, opened by the programs that score it or use it."""

from config import BadInput, load_config, read_yaml
from rounds.reading import FREE_ON_RESUME, checkpoint_of


def open_run(folder, kinds, overrides=(), free=()):
    """Return a run's config, with overrides of the keys `free`, and its checkpoints; raises BadInput.

    A run of a method of one's own needs trust=true among the overrides, for that method's file is run."""
    settings, changes = folder / "config.yaml", [text for text in overrides if not text.startswith("trust=")]
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such run folder; give the one that train.py wrote")
    method = str(read_yaml(settings).get("method"))
    if ".py:" in method and "trust=true" not in overrides:
        raise BadInput(f"trust: this run would run the code of {method.rpartition(':')[0]}; read that file, "
                       "and give trust=true if you trust it")
    config, own = load_config(settings, changes), load_config(settings)
    for key in (text.partition("=")[0] for text in changes):
        if key not in free:
            raise BadInput(f"{key}: is fixed by the run, leave it out; only {', '.join(sorted(free))} can be "
                           "changed here")
    return config, [checkpoint_of(own, folder / f"{kind}.pt", FREE_ON_RESUME) for kind in kinds]
