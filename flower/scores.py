"""The sites' scores at the server: of every round, by which the best is chosen, and of the end."""

import statistics

from flwr.app import ConfigRecord

from flower.faults import said, sit_out
from flower.fit import check_scores, classes_of
from flower.messages import pack_weights, shared
from rounds.checkpoint import save
from rounds.reading import checkpoint_of
from rounds.run_folder import as_json
from scoring.metrics import MEASURES, mean_scores
from scoring.results import KINDS, SCORED, explained, print_result


def ask_scores(ask_sites, run, method, config, guards):
    """Return the sites' validation scores of the last round, noted in the run."""
    answers = ask_sites("evaluate", {
        "weights": pack_weights(shared(run.w, method)),
        "round": ConfigRecord({"t": run.state["round"], "best": run.state["best"]["round"]})})
    return note_scores(run, answers, config, guards)


def note_scores(run, answers, config, guards, beside=False):
    """Return the validation scores of the last saved round as `evaluate` gives them; note them in the run.

    The best round is chosen by the sites' median: nobody can check what a site says, and one alone does not
    move it far. A site that failed altogether has been named, if updates came beside the scores; one whose
    scores are unfit is named here.
    """
    found = {site: answer for site, answer in answers.items()
             if not (beside and isinstance(answer, Exception))}
    scores = scores_of(with_scores(found, ("val",), config, guards), "val", config)
    run.score(scores, median_dice)
    return scores


def median_dice(scores):
    """Return the median of the sites' Dice, or None."""
    dice = [site["dice"] for site in scores["sites"].values() if site["dice"] is not None]
    return statistics.median(dice) if dice else None


def ask_results(ask_sites, run, config, guards, method, normed):
    """Have every site score the best and the last round; write and print result.json."""
    checkpoints = {kind: checkpoint_of(config, run.out / f"{kind}.pt") for kind in KINDS}
    rounds = {kind: checkpoints[kind]["round"] for kind in KINDS}
    answers = ask_sites("evaluate.finish", {"round": ConfigRecord(rounds)} | {
        kind: pack_weights(shared(checkpoints[kind]["weights"], method)) for kind in KINDS})
    parts = [f"{kind}.{split}" for kind in KINDS for split in SCORED]
    answers = with_scores(answers, parts, config, guards)
    foreign = [site for site in answers if site not in run.kept]
    result = {kind: {"round": rounds[kind]} | {
        split: scores_of(answers, f"{kind}.{split}", config, foreign) for split in SCORED} for kind in KINDS}
    print_result(result, config, normed, foreign)
    result = explained(result, config, normed, foreign, run.state["seconds"])
    save(run.out / "result.json", as_json(result))
    print(f"written to {run.out}: result.json, metrics.csv, best.pt, last.pt", flush=True)


def with_scores(answers, parts, config, guards):
    """Return the answers that hold the scores `parts`; a site that sent none is named."""
    kept = {}
    for site, answer in sorted(answers.items()):
        try:
            if isinstance(answer, Exception):
                raise answer
            for part in parts:
                check_scores(answer[part], config)
            kept[site] = answer
        except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
            words = f"its answer cannot be read: {problem!r}" if isinstance(problem, KeyError) else problem
            sit_out(f"site {said(site)} sent no scores: {said(words)}", guards)
    return kept


def scores_of(answers, part, config, foreign=()):
    """Return the sites' scores of a part, `val` or `best.test` and so on, as `evaluate` gives them."""
    sites = {}
    for site in sorted(answers):
        scores = answers[site][part]
        sites[site] = {name: scores.get(name) for name in MEASURES}
        if classes := {j: {name: scores.get(f"{j}/{name}") for name in MEASURES} for j in classes_of(config)}:
            sites[site]["classes"] = classes
    return {"sites": sites, "mean": mean_scores(sites, foreign)}
