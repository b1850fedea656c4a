"""Where a run starts that does not begin from nothing: its own last.pt, or the weights of another run."""

import sys

from config import BadInput
from datasets import splits_of
from rounds.reading import FREE_ON_RESUME, TO_RESUME, check_fits, checkpoint_of, load_checkpoint
from sites.given_splits import read_splits

ALIKE = 0.0005  # means of the same image differ by less, whatever machine decoded and resized it


def start_of(config, last, state, sites, device):
    """Return the parts of a run's state that are not those of a new run, and its best round's checkpoint or
    None; say which start it is. state: that of a new run. Raises BadInput."""
    if config.resume and last.exists():
        found, best = load_to_resume(last, sites, config, device)
        check_fits(last, "weights", found["weights"], state["weights"])
        for site in found["kept"].values():
            check_fits(last, "local weights", site["local"], {
                name: value for name, value in state["weights"].items() if name in site["local"]})
        say_what_changed(last, found.get("content", {}), state["content"])
        print(f"resuming after round {found['round']} of {last}")
        return {"content": state["content"]} | found, best
    if config.resume:
        print(f"resume: there is no {last} to go on from, so this run begins at round 1")
    if not config.init:
        return {}, None
    found = load_checkpoint(config.init, device)
    check_fits(config.init, "weights", found["weights"], state["weights"],
               "give a run of this width and these classes to init, or set init to none")
    print(f"init: starts from the weights of round {found['round']} in {config.init}")
    return {"weights": found["weights"]}, None


def load_to_resume(file, sites, config, device):
    """Return the state in last.pt, and what is in best.pt, None without a best round; raises BadInput if one
    of them is of other settings, or the sites or cases are others."""
    state = checkpoint_of(config, file, FREE_ON_RESUME, TO_RESUME, device)
    best = None
    if state["best"]["round"]:
        if not file.with_name("best.pt").exists():
            raise BadInput(f"{file.with_name('best.pt')}: is gone; restore it, or train into another folder "
                           "with out=FOLDER")
        best = checkpoint_of(config, file.with_name("best.pt"), FREE_ON_RESUME, device=device)
    splits = file.with_name("splits.json")
    if splits.exists() and read_splits(splits) != splits_of(sites):
        raise BadInput(f"{splits}: differs from the splits of the data now, the data have changed; "
                       "restore them, or train into another folder with out=FOLDER")
    if state["round"] > config.rounds:
        raise BadInput(f"rounds: {config.rounds} is less than the {state['round']} rounds that "
                       f"{file} has behind it, set rounds to at least that")
    return state, best


def say_what_changed(file, before, now):
    """Print a line for each site whose files are called as before but hold other images or masks. before,
    now: {site: {file: numbers}}, see `run_folder.content_of`."""
    for site in before.keys() & now.keys():
        other = [name for name, numbers in now[site].items() if any(
            abs(a - b) > ALIKE for a, b in zip(numbers, before[site].get(name, numbers)))]
        if other:
            print(f"warning: {site}: {other[0]} is not the image, or its mask not the mask, that {file} was "
                  f"trained on ({len(other)} such files); restore them, or train into another out=FOLDER",
                  file=sys.stderr, flush=True)
