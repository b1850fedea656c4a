"""What is said while a training goes wrong: one line for each kind of trouble, once in a run."""

import sys

from config import VOLUMES

ZERO, LOST, STILL, POOR, SAME = 0.01, 0.05, 0.01, 0.5, 0.001  # of Dice; STILL: share of the loss


class Advice:
    """Looks at every validated round, from a quarter of the rounds on, and prints what to try of what is not
    set yet."""

    def __init__(self, config):
        self.quarter, self.seen, self.said = max(5, config.rounds // 4), [], set()
        tries = {"optimizer=adam lr=0.001": config.optimizer == "sgd",
                 "window=[low,high] if this is CT": config.task in VOLUMES and not config.window,
                 "tiles=true if objects are small in large images": not (config.task in VOLUMES or config.tiles),
                 "batch_size=2 and local_epochs=5 if the sites are small": config.batch_size > 2,
                 "more rounds; check_data.py shows whether the masks fit": True}
        self.remedies = ", ".join(text for text, fits in tries.items() if fits)

    def look(self, t, updates, scores):
        """Note round t's losses and scores, None if it was not validated, and print what is new in them."""
        if not scores or scores["mean"]["dice"] is None or not updates:
            return
        loss = sum(sum(update.losses.values()) for update in updates) / len(updates)
        self.seen.append((t, scores["mean"]["dice"], loss, scores["sites"]))
        for kind, text in self.troubles(*self.seen[-1]):
            if kind not in self.said and t > self.quarter:
                self.said.add(kind)
                print(f"warning: round {t}: {text}; try {self.remedies}", file=sys.stderr, flush=True)

    def troubles(self, t, dice, loss, sites):
        """Yield (kind, what is wrong) of the rounds so far, of which round t is the last."""
        for site, row in ((site, row) for site, row in sites.items() if row["dice"] is not None):
            late = [old[site]["dice"] for *_, old in self.seen[-5:] if site in old]
            if row["dice"] < ZERO:
                yield "zero", (f"the validation Dice of site {site} is {row['dice']:.3f}, and nothing is found "
                               f"in {row['misses']} of {row['cases']} images")
            elif row["dice"] < POOR and len(late) == 5 and max(late) - min(late) < SAME:
                yield "same", (f"the validation Dice of site {site} stays at {row['dice']:.3f}, as if all of an "
                               "image is predicted")
        best, most, *_ = max(self.seen, key=lambda seen: seen[1])
        if best <= t - self.quarter and dice < most - LOST:
            yield "falling", (f"the mean validation Dice has fallen from {most:.3f} in round {best} to "
                              f"{dice:.3f}")
        before = [old for at, _, old, _ in self.seen if at <= t - self.quarter]
        if before and abs(loss - before[-1]) < STILL * abs(before[-1]) and dice < POOR:
            yield "still", f"the loss stands still at {loss:.3f}, with a mean validation Dice of {dice:.3f}"
