"""The sites' scores at the server: of every round, by which the best is chosen, and of the end."""

import statistics

from flwr.app import ConfigRecord

from flower.fit import read_scores, said, shared, sit_out
from flower.messages import pack_weights
from rounds.checkpoint import save
from rounds.reading import checkpoint_of
from rounds.run_folder import as_json
from scoring.metrics import mean_scores
from scoring.results import KINDS, SCORED, explained, print_result


def asked(run, method, **more):
    """Return what sites need to score the last saved round: its weights and number, the best one's."""
    numbers = {"t": run.state["round"], "best": run.state["best"]["round"]} | more
    return {"weights": pack_weights(shared(run.w, method)), "round": ConfigRecord(numbers)}


def note_scores(answers, run, guards):
    """Return the validation scores of the last saved round as `evaluate` gives them; note them in the run.

    The best round is chosen by the sites' median: nobody can check what a site says, and one alone does not
    move it far."""
    scores = as_scores(scores_in(answers, ["val"], run.config, guards), "val")
    run.score(scores, median_dice)
    return scores


def median_dice(scores):
    """Return the median of the sites' Dice, or None."""
    dice = [site["dice"] for site in scores["sites"].values() if site["dice"] is not None]
    return statistics.median(dice) if dice else None


def ask_results(nodes, run, method, normed):
    """Have every site score the best and the last round; write and print result.json."""
    config = run.config
    checkpoints = {kind: checkpoint_of(config, run.out / f"{kind}.pt") for kind in KINDS}
    rounds = {kind: checkpoints[kind]["round"] for kind in KINDS}
    answers = nodes.ask("evaluate.finish", {"round": ConfigRecord(rounds)} | {
        kind: pack_weights(shared(checkpoints[kind]["weights"], method)) for kind in KINDS})
    parts = [f"{kind}.{split}" for kind in KINDS for split in SCORED]
    found = scores_in(answers, parts, config, nodes.guards)
    foreign = [site for site in found if site not in run.kept]
    result = {kind: {"round": rounds[kind]} | {
        split: as_scores(found, f"{kind}.{split}", foreign) for split in SCORED} for kind in KINDS}
    print_result(result, config, normed, foreign)
    result = explained(result, config, normed, foreign, run.state["seconds"])
    save(run.out / "result.json", as_json(result))
    print(f"written to {run.out}: result.json, metrics.csv, best.pt, last.pt", flush=True)


def scores_in(answers, parts, config, guards):
    """Return {site: {part: its scores}} of the answers that hold all of `parts`; other sites are named."""
    found = {}
    for site, answer in sorted(answers.items()):
        try:
            if isinstance(answer, Exception):
                raise answer
            found[site] = {part: read_scores(answer[part], config) for part in parts}
        except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
            words = f"its answer cannot be read: {problem!r}" if isinstance(problem, KeyError) else problem
            sit_out(f"site {site} sent no scores: {said(words)}", guards)
    return found


def as_scores(found, part, foreign=()):
    """Return the sites' scores of a part, `val` or `best.test` and so on, as `evaluate` gives them."""
    sites = {site: of_site[part] for site, of_site in found.items()}
    return {"sites": sites, "mean": mean_scores(sites, foreign)}
