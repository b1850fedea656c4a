"""The last weights and prototypes that a majority of sites could train on, to go back to once."""

import sys


def note_trained(state, t, w, G, results, updates):
    """Note in the run's state that round t was trained from w and G, and by whom.

    They count as good if more than half of the sites that were asked gave a fit update. results: {site: what
    came}; updates: the fit ones.
    """
    if 2 * len(updates) > len(results):
        state["good"] = {"round": t - 1, "weights": w, "prototypes": G, "sites": []}
    if "good" in state:
        state["good"]["sites"] = sorted({*state["good"]["sites"], *(update.site for update in updates)})


def go_back(state, t, problem):
    """Return the weights and prototypes to train round t from again, and say so; raises `problem` if those
    that failed are the good ones themselves, or were already restored once."""
    good = state.get("good")
    if good is None or good["round"] == t - 1 or good.get("used"):
        raise problem
    good["used"] = True
    print(f"{problem}; going back to the weights of round {good['round']}, on which most sites could train. "
          f"In between took part: {', '.join(good['sites'])}", file=sys.stderr, flush=True)
    return good["weights"], good["prototypes"]
