"""Paired differences per patient: their means, intervals and tests, from the cases.csv of runs over folds.

A number of a patient is the mean over the patient's files (and foreground classes); of a site over its
patients; of a setting over sites, unweighted. Every patient is tested once a seed, in one of the folds.
"""

import csv
import math

import numpy as np

from config import BadInput

DRAWS = 10_000


def read_cases(file):
    """Return the rows of a cases.csv."""
    try:
        with open(file, newline="", encoding="utf-8") as table:
            return list(csv.DictReader(table))
    except FileNotFoundError:
        raise BadInput(f"{file}: is missing, score that run again with eval.py") from None


def of_patients(tables, measure):
    """Return {(site, patient): mean of a measure} of one seed; tables: the test rows of each fold.

    measure: a function of a row, which gives a number, or None where the row has none. Raises BadInput
    for a patient that two folds test.
    """
    found = {}
    for rows in tables:
        of_fold = {}
        for row in rows:
            of_fold.setdefault((row["site"], row["case"]), []).append(measure(row))
        if twice := of_fold.keys() & found.keys():
            raise BadInput(f"cases.csv: patient {min(twice)[1]} is tested in two folds, "
                           "give all folds one split")
        found |= of_fold
    values = {key: [v for v in of_one if v is not None] for key, of_one in found.items()}
    return {key: float(np.mean(of_one)) for key, of_one in values.items() if of_one}


def by_site(seeds):
    """Return {site: array (S, n)} of S seeds' {(site, patient): value}, patients in order of their names.

    A patient that some seed has no value of is left out.
    """
    keys = sorted(set.intersection(*(set(of_seed) for of_seed in seeds)))
    return {site: np.array([[of_seed[key] for key in keys if key[0] == site] for of_seed in seeds])
            for site in sorted({site for site, _ in keys})}


def mean_of_sites(values):
    """Return the unweighted mean over sites of {site: array (S, n)}."""
    return float(np.mean([of_site.mean() for of_site in values.values()]))


def interval(differences, seed=0):
    """Return the 95 % interval of `mean_of_sites` of {site: array (S, n)}, by a bootstrap of 10,000 draws.

    A draw takes patients within each site and, where there are several, seeds, which all sites share, all
    with replacement. Of n it takes n - 1, because with n the variance would come out as (n - 1) / n of what
    it is, and a site may have 3 patients. The interval reaches from the 2.5 to the 97.5 % quantile.
    Source: percentile bootstrap, rescaled as by Rao and Wu.
    """
    random, total = np.random.default_rng(seed), 0
    S = len(next(iter(differences.values())))
    of_seeds = shares(random, S)
    for of_site in differences.values():
        total = total + ((of_seeds @ of_site) * shares(random, of_site.shape[1])).sum(1)
    low, high = np.quantile(total / len(differences), (0.025, 0.975))
    return float(low), float(high)


def shares(random, n):
    """Return each of n's share in each draw, (DRAWS, n): n - 1 are drawn, with replacement; of 1 that one."""
    m = max(1, n - 1)
    return random.multinomial(m, np.full(n, 1 / n), DRAWS) / m


def wilcoxon(differences):
    """Return (W, p) of Wilcoxon's signed rank test of paired differences (n,), two-sided.

        W = min(sum of the ranks of positive, of negative differences),  ranks of |d|, ties by their mean

    Zeros are dropped. Below 25 pairs p is exact, by counting all 2^n signs; from 25 on it is the normal
    approximation with the correction for ties. Without any pair it is 1.
    """
    d = np.asarray(differences, float)
    d = d[d != 0]
    n, size = len(d), abs(d)
    if n == 0:
        return 0.0, 1.0
    ranks = np.array([(size < x).sum() + ((size == x).sum() + 1) / 2 for x in size])
    W = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    if n < 25:
        twice = np.rint(2 * ranks).astype(int)  # whole numbers, whatever the ties
        ways = np.zeros(twice.sum() + 1)
        ways[0] = 1
        for r in twice:
            ways[r:] = ways[r:] + ways[:-r]
        p = 2 * ways[:round(2 * W) + 1].sum() / 2**n
    else:
        z = (W - ranks.sum() / 2) / math.sqrt((ranks**2).sum() / 4)
        p = math.erfc(-z / math.sqrt(2))
    return float(W), min(1.0, float(p))


# ---- What a table shows of a setting ----

def number(name):
    """Return the measure of a column of cases.csv."""
    return lambda row: float(row[name])


def marked_over_true(row):
    """Return |P| / |T| = recall / precision of a case, None where prediction and truth do not overlap."""
    precision, recall = float(row["precision"]), float(row["recall"])
    return recall / precision if precision > 0 and recall > 0 else None


MEASURES = {"dice": number("dice"), "precision": number("precision"), "recall": number("recall"),
            "marked": marked_over_true, "hd95": number("hd95")}


def summary(cases, base=None):
    """Return what a setting's cases say: `sites` {site: Dice}, the means of MEASURES, and against a base
    `difference`, `low`, `high`, `better`, `patients`, `p`.

    cases, base: [[rows of each fold] of each seed]; the base's patients are the same ones.
    """
    found = {name: by_site([of_patients(folds, measure) for folds in cases])
             for name, measure in MEASURES.items()}
    result = {name: mean_of_sites(values) for name, values in found.items()}
    result["sites"] = {site: float(values.mean()) for site, values in found["dice"].items()}
    if base is not None:
        other = by_site([of_patients(folds, number("dice")) for folds in base])
        if {site: values.shape for site, values in other.items()} != {
                site: values.shape for site, values in found["dice"].items()}:
            raise BadInput("cases.csv: the settings were not tested on the same patients, train them anew")
        differences = {site: found["dice"][site] - other[site] for site in other}
        each = np.concatenate([of_site.mean(0) for of_site in differences.values()])
        low, high = interval(differences)
        result |= {"difference": mean_of_sites(differences), "low": low, "high": high,
                   "better": int((each > 0).sum()), "patients": len(each), "p": wilcoxon(each)[1]}
    return result
