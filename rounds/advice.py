"""What is said while a training goes wrong: one line for each kind of trouble, once in a run."""

import sys

from config import VOLUMES

ZERO, LOST, STILL, POOR, SAME = 0.01, 0.05, 0.01, 0.5, 0.001  # of Dice; STILL: share of the loss


class Advice:
    """Prints what goes wrong in the rounds behind the first quarter, and what to try of what is not set."""

    def __init__(self, config):
        self.rounds, self.quarter, self.seen, self.said = config.rounds, max(5, config.rounds // 4), [], set()
        tries = {"optimizer=adam lr=0.001": config.optimizer == "sgd",
                 "window=[0,200] if this is CT": config.task in VOLUMES and not config.window,
                 "tiles=true if objects are small in large images":
                     config.task not in VOLUMES and not config.tiles,
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
        if zero := [f"{site} {name}".strip() for site, row in sites.items()
                    for name, part in row.get("classes", {"": row}).items()
                    if part["dice"] is not None and part["dice"] < ZERO]:
            yield "zero", f"the validation Dice of {', '.join(zero)} is below {ZERO}"
        for site in sites:
            late = [d for *_, old in self.seen[-5:] if (d := old.get(site, {}).get("dice")) is not None]
            if len(late) == 5 and max(late) - min(late) < SAME and ZERO < late[-1] < POOR:
                yield "same", f"the validation Dice of {site} stays at {late[-1]:.3f}, as if all were marked"
        best, most, *_ = max(self.seen, key=lambda seen: seen[1])
        if best <= t - self.quarter and dice < most - LOST:
            yield "falling", f"the mean validation Dice fell from {most:.3f} in round {best} to {dice:.3f}"
        before = [old for at, _, old, _ in self.seen if at <= t - self.quarter]
        if before and abs(loss - before[-1]) < STILL * abs(before[-1]) and dice < POOR:
            yield "still", f"the loss stands still at {loss:.3f}, with a mean validation Dice of {dice:.3f}"
        if t == self.rounds and dice < POOR and not self.said:
            yield "low", f"the last round has a mean validation Dice of {dice:.3f}"
