"""What a run prints about its rounds: a table with a line a round."""

import sys
from datetime import timedelta

from rounds.advice import Advice

LINE = 79  # characters of a terminal that the progress in a round is written over


class RoundTable:
    """Prints a line a round, and its titles whenever the sites or the loss terms are others than before.
    names: the sites' names, if they are known (between hospitals they come and go)."""

    def __init__(self, config, names=()):
        self.rounds, self.names, self.titles, self.advice = config.rounds, list(names), None, Advice(config)

    def add(self, t, updates, seconds, scores):
        """Print the line of round t: mean loss terms, validation Dice of the sites, seconds, time left; and a
        warning if the training goes wrong."""
        self.names = list(scores["sites"]) if scores else self.names or [u.site for u in updates]
        terms = list(dict.fromkeys(term for update in updates for term in update.losses))
        means = [sum(u.losses.get(term, 0.0) for u in updates) / len(updates) for term in terms]
        dice = [scores["sites"][name]["dice"] for name in self.names] if scores else [None] * len(self.names)
        left = timedelta(seconds=round((self.rounds - t) * seconds))
        losses = [(f"L_{term}", f"{mean:.4f}" if abs(mean) < 1e8 else f"{mean:.4e}", 15)
                  for term, mean in zip(terms, means)]
        rest = [*((name, digits(d), 13) for name, d in zip(self.names, dice)),
                ("mean", digits(scores and scores["mean"]["dice"]), 7), ("s", f"{seconds:.1f}", 8),
                ("left", str(left), 17)]
        titles = (f"{'':{6 + len(in_columns(losses, 0))}}validation Dice",
                  f"round{in_columns(losses, 0)}{in_columns(rest, 0)}")
        shown = [] if titles == self.titles else titles
        self.titles = titles
        for line in (*shown, f"{t:5d}{in_columns(losses, 1)}{in_columns(rest, 1)}"):
            print(f"\r{line:{LINE}}" if sys.stdout.isatty() else line, flush=True)
        self.advice.look(t, updates, scores)


def in_columns(columns, part):
    """Return the titles (part 0) or the cells (part 1) of columns (title, cell, least width) as one line."""
    return "".join(f"{column[part]:>{max(column[2], len(column[0]) + 1)}}" for column in columns)


def digits(dice):
    """Return a Dice for a table, or what stands for one that is not there."""
    return "-" if dice is None else f"{dice:.3f}"


def show_step(t):
    """Return progress(site, step, steps), which draws on a terminal how far the round is at a site."""
    def progress(site, step, steps):
        if sys.stdout.isatty():
            bar = f"{t:5d}  [{'#' * (20 * step // steps):20}] {step}/{steps}  {site}"
            print(f"\r{bar[:LINE]:{LINE}}", end="", flush=True)
    return progress
