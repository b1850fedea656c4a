"""What a run prints about its rounds: a table with a line a round."""

import sys
from datetime import timedelta


class RoundTable:
    """Prints a line a round, and its titles whenever the sites in it are others than before.

    names: the sites' names, if they are known (between hospitals they come and go).
    """

    def __init__(self, rounds, names=()):
        self.rounds, self.names = rounds, list(names)
        if names:
            print(header(self.names), flush=True)

    def add(self, t, updates, seconds, scores):
        """Print the line of round t."""
        names = list(scores["sites"]) if scores else self.names or [u.site for u in updates]
        if names != self.names:
            self.names = names
            print(header(names))
        print(round_line(t, updates, scores, names, self.rounds, seconds), flush=True)


def show_step(t):
    """Return progress(site, step, steps), which shows on a terminal what is being worked on."""
    def progress(site, step, steps):
        if sys.stdout.isatty():
            print(f"\r{t:5d}  {site} {step}/{steps}\033[K", end="", flush=True)
    return progress


def header(names):
    """Return the titles over `round_line`."""
    sites = "".join(f"{name[:12]:>13}" for name in names)
    return (f"{'':32}validation Dice\n{'round':>5}{'L_dice':>8}{'contrast':>10}{'consist':>9}"
            f"{sites}{'mean':>7}{'s':>8}{'left':>17}")


def round_line(t, updates, scores, names, rounds, seconds):
    """Return one line on round t: mean loss terms, validation Dice per site, seconds, time left."""
    loss = {name: sum(u.losses.get(name, 0.0) for u in updates) / len(updates)
            for name in ("dice", "contrast", "consistency")}
    cells = [scores["sites"][name]["dice"] if scores else None for name in names]
    dice = "".join(f"{'-' if value is None else f'{value:.3f}':>13}" for value in cells)
    mean = scores["mean"]["dice"] if scores else None
    left = str(timedelta(seconds=round((rounds - t) * seconds)))
    line = (f"{t:5d}{loss['dice']:8.4f}{loss['contrast']:10.4f}{loss['consistency']:9.4f}{dice}"
            f"{'-' if mean is None else f'{mean:.3f}':>7}{seconds:8.1f}{left:>17}")
    return f"\r{line}\033[K" if sys.stdout.isatty() else line
