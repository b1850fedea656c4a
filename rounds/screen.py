"""What a run prints about its rounds: a table with a line a round."""

import sys
from datetime import timedelta

WIDE = 15  # of a loss term's column


class RoundTable:
    """Prints a line a round, and its titles whenever the sites or the loss terms are others than before.
    names: the sites' names, if they are known (between hospitals they come and go)."""

    def __init__(self, rounds, names=()):
        self.rounds, self.names, self.titles = rounds, list(names), None

    def add(self, t, updates, seconds, scores):
        """Print the line of round t: mean loss terms, validation Dice of the sites, seconds, time left."""
        self.names = list(scores["sites"]) if scores else self.names or [u.site for u in updates]
        terms = list(dict.fromkeys(term for update in updates for term in update.losses))
        self.show_titles("".join(f"{f'L_{term}'[:WIDE - 1]:>{WIDE}}" for term in terms))
        means = [sum(u.losses.get(term, 0.0) for u in updates) / len(updates) for term in terms]
        dice = [scores["sites"][name]["dice"] for name in self.names] if scores else [None] * len(self.names)
        cells = [f"{t:5d}", *(f"{mean:{WIDE}.4f}" for mean in means), *(f"{digits(d):>13}" for d in dice),
                 f"{digits(scores and scores['mean']['dice']):>7}{seconds:8.1f}",
                 f"{timedelta(seconds=round((self.rounds - t) * seconds))!s:>17}"]
        print(f"\r{''.join(cells)}\033[K" if sys.stdout.isatty() else "".join(cells), flush=True)

    def show_titles(self, losses):
        """Print the titles over the lines unless they are there; losses: those of the loss terms."""
        sites = "".join(f"{name[:12]:>13}" for name in self.names)
        titles = (f"{'':{6 + len(losses)}}validation Dice\n{'round':>5}{losses}{sites}{'mean':>7}{'s':>8}"
                  f"{'left':>17}")
        if titles != self.titles:
            self.titles = titles
            print(titles)


def digits(dice):
    """Return a Dice for a table, or what stands for one that is not there."""
    return "-" if dice is None else f"{dice:.3f}"


def show_step(t):
    """Return progress(site, step, steps), which shows on a terminal what is being worked on."""
    def progress(site, step, steps):
        if sys.stdout.isatty():
            print(f"\r{t:5d}  {site} {step}/{steps}\033[K", end="", flush=True)
    return progress
